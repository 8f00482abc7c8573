"""What a caller of `PageCache` may have to wait for: a fill under way, a group that threads are at work in, room."""

from dataclasses import dataclass

import trio

from cachefs.cache.page import FIRST, GROUP_SHIFT, PAGE_SHIFT, Group


@dataclass(slots=True, eq=False)
class Fill:
    """Pages of one group that a thread is reading: [first, first + count) in the group, `view` their memory."""

    group: Group
    first: int
    count: int
    view: memoryview
    done: trio.Event
    error: OSError | None = None  # what kept the backing from reading them

    @property
    def mask(self) -> int:
        return FIRST[self.count] << self.first

    @property
    def offset(self) -> int:
        """Where the first page starts in the file, in bytes."""
        return (self.group.index << GROUP_SHIFT | self.first) << PAGE_SHIFT


class Busy(Exception):
    """Pages cannot be had now: a slot has to move first, but threads are at work in it. Wait for `group` to be quiet."""

    def __init__(self, group: Group) -> None:
        self.group = group


class NoRoom(Exception):
    """Every page is dirty, in writeback or filling; wait for `PageCache.room`."""


class TooDirty(NoRoom):
    """As many pages are unwritten as may be."""
