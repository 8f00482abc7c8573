"""Whether to look again for a next request before sleeping. Pure: it hears of what happened, and has no clock.

To be woken costs more than a hit: a program that reads again at once is answered sooner, and for less CPU, by somebody who
kept looking. Who looks in vain burns CPU. So one look's length is fixed, and looking has to have paid lately: `trust` grows
when a request came during a look, or so soon after falling asleep that a look would have met it, and falls twice as fast.
With nothing to do it is 0, and nobody looks at all.
"""

import os

LOOK_NS = 50_000  # how long one look lasts: programs that read on come back within 10-20 us, a woken sleeper needs 30 and more
SOON_NS = 2 * LOOK_NS  # asleep for less than that, waking included: a look would have met the request
TRUST_MAX = 8
LOSS = 2  # for a look in vain


class Patience:
    """The account of looks that paid and looks in vain. On one processor nobody else could make a request meanwhile."""

    __slots__ = ("most", "trust")

    def __init__(self, processors: int | None = None) -> None:
        self.most = TRUST_MAX if (processors or len(os.sched_getaffinity(0))) > 1 else 0
        self.trust = 0

    def met(self) -> None:
        """A request came while looking."""
        if self.trust < self.most:
            self.trust += 1

    def in_vain(self) -> None:
        """None came."""
        self.trust = max(0, self.trust - LOSS)

    def slept(self, nanoseconds: int) -> None:
        """It came after that much sleep, with no look before."""
        if nanoseconds < SOON_NS and self.trust < self.most:
            self.trust += 1
