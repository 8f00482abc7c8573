"""The beat of what is done every second or so. It stops while nobody asks for anything: an idle mount sleeps.

To wake up is cheap for a processor that is awake. One that sleeps has given its caches, and in a virtual machine itself, to
others: a beat has been seen to take 5 ms there, and 0.3 elsewhere.
"""

from collections.abc import Callable

import trio

BEAT_SECONDS = 1.0
PAUSE_MOST_SECONDS = 60.0  # for what goes by unseen: a request that came just when it stopped

Rouse = Callable[[], None]


class Pulse:
    """Beats for whoever waits for `next`.

    `asked()` counts requests, `busy()` says whether there is work that no request tells of, and `when_asked(rouse)` has `rouse`
    called once, before the next request is served; it returns False where that cannot be, and the pulse never stops then.
    `roused()` is called when it goes on.
    """

    def __init__(
        self,
        asked: Callable[[], int],
        busy: Callable[[], bool],
        when_asked: Callable[[Rouse], bool],
        roused: Callable[[], None],
    ) -> None:
        self._asked = asked
        self._busy = busy
        self._when_asked = when_asked
        self._roused = roused
        self._beat = trio.Event()
        self._woken = trio.Event()
        self._last_asked = -1

    async def next(self) -> None:
        """Waits for the next beat."""
        await self._beat.wait()

    def wake(self) -> None:
        """Something was asked for, or will have to be done: it beats once more at least."""
        if not self._woken.is_set():
            self._roused()
            self._woken.set()

    async def run(self) -> None:
        while True:
            await trio.sleep(BEAT_SECONDS)
            beat, self._beat = self._beat, trio.Event()
            beat.set()
            asked, self._last_asked = self._last_asked, self._asked()
            if asked == self._last_asked and not self._busy():  # what followed the last request is being done
                await self._pause()

    async def _pause(self) -> None:
        self._woken = trio.Event()
        if self._when_asked(self.wake):
            with trio.move_on_after(PAUSE_MOST_SECONDS):
                await self._woken.wait()
