"""A lock for tasks that is taken at once where it is free."""

import trio


class Lock:
    """One task at a time; those that wait get it in the order in which they came.

    trio.Lock gives the turn away each time it is taken, which for a request that need not wait costs more than all its work.
    Here taking a free one, and giving it back, are plain code: nothing happens between. Taking it twice waits for ever.
    """

    __slots__ = ("_taken", "_waiting")

    def __init__(self) -> None:
        self._taken = False
        self._waiting: trio.lowlevel.ParkingLot | None = None  # made for the first that has to wait; most locks never need it

    def locked(self) -> bool:
        return self._taken

    async def __aenter__(self) -> None:
        if not self._taken:
            self._taken = True
            return
        if self._waiting is None:
            self._waiting = trio.lowlevel.ParkingLot()
        await self._waiting.park()  # who lets go of it leaves it taken, for us

    async def __aexit__(self, *_: object) -> None:
        if self._waiting:
            self._waiting.unpark()
        else:
            self._taken = False
