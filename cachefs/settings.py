"""Changing a live mount: the cache's size, its policy, the limit of pins."""

from collections.abc import Callable

import trio

from cachefs.cache import policy, wishes
from cachefs.cache.page import PAGE_SIZE
from cachefs.config import Config
from cachefs.errors import CachefsError
from cachefs.stack import Stack
from cachefs.units import format_size
from cachefs.warm import pages_of

LOOK_SECONDS = 0.05  # between two looks at pages that could not go


class Settings:
    """Makes a `Config` with some settings changed the one in effect; `changed(config)` is told of what has become of it."""

    def __init__(self, stack: Stack, changed: Callable[[Config], None]) -> None:
        self.stack = stack
        self.cache = stack.cache
        self.changed = changed
        self._lock = trio.Lock()

    async def apply(self, change: Callable[[Config], Config]) -> Config:
        """Returns the settings in effect afterwards; CachefsError where they are impossible, with nothing changed."""
        async with self._lock:
            old = self.stack.config
            new = change(old)
            self._check(new)
            self.cache.pin_limit_pages = new.pin_limit_bytes // PAGE_SIZE
            if new.policy != self.cache.policy.name:
                wishes.use_policy(self.cache, policy.make(new.policy, self.cache.capacity_pages))
            if new.cache_size_bytes != old.cache_size_bytes:
                await self._resize(new)
            self.stack.config = new
            self.stack.pins.kick()  # some may have room now
            self.changed(new)
            return new

    def _check(self, new: Config) -> None:
        most_bytes = self.cache.arena.most_pages * PAGE_SIZE
        if new.cache_size_bytes > most_bytes:
            raise CachefsError(f"this mount's cache can grow to {format_size(most_bytes)}: mount it anew with more")
        pinned_bytes = sum(pages_of(pin.size) for pin in self.stack.pins.pins.values()) * PAGE_SIZE
        if pinned_bytes > new.pin_limit_bytes:
            limit, pinned = format_size(new.pin_limit_bytes), format_size(pinned_bytes)
            raise CachefsError(f"pins take {pinned}, and could take no more than {limit} then: unpin some first")

    async def _resize(self, new: Config) -> None:
        """Shrinks step by step, as pages may go; a limit of unwritten data that is lower holds from the beginning."""
        pages, before = new.cache_size_bytes // PAGE_SIZE, self.stack.config
        if pages < self.cache.capacity_pages:
            self.stack.writeback.set_limits(new.dirty_limit_bytes, new.dirty_background_bytes)
        while self.cache.capacity_pages != pages:
            if wishes.resize(self.cache, pages):
                await trio.lowlevel.checkpoint()
                continue
            try:
                self.stack.writeback.need_room()
            except OSError as error:
                wishes.resize(self.cache, before.cache_size_bytes // PAGE_SIZE)
                self.stack.writeback.set_limits(before.dirty_limit_bytes, before.dirty_background_bytes)
                self.cache.pin_limit_pages = before.pin_limit_bytes // PAGE_SIZE
                raise CachefsError(f"the cache cannot shrink: unwritten data cannot be written ({error.strerror})") from None
            with trio.move_on_after(LOOK_SECONDS):
                await self.cache.room.park()
        self.stack.writeback.set_limits(new.dirty_limit_bytes, new.dirty_background_bytes)
