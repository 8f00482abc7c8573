"""Everything of a mount below FUSE, put together: backing, inodes, cache, writeback, files, names."""

import contextlib
import functools
import math
import os
import resource
import time
from collections.abc import Callable

from backing.base import Backing
from cachefs.backingio import BackingIO
from cachefs.cache import policy
from cachefs.cache.figures import statistics_of
from cachefs.cache.fill import Filler
from cachefs.cache.page import PAGE_SIZE
from cachefs.cache.pagecache import PageCache
from cachefs.config import Config, machine_memory_bytes
from cachefs.descriptors import BUDGET_MAX, Descriptors
from cachefs.entries import merged
from cachefs.files import Files
from cachefs.fs import FileSystem
from cachefs.hints import Hints
from cachefs.inode import Inode, InodeTable
from cachefs.keeper import Keeper
from cachefs.ledger import Ledger
from cachefs.pins import Pins
from cachefs.rules import parse_rules
from cachefs.savings import Savings
from cachefs.statistics import FileSystemStatistics, HistogramSnapshot, Statistics
from cachefs.tasks import Spawner
from cachefs.walk import Walker
from cachefs.watch import Watcher
from cachefs.watchdog import Unreachable
from cachefs.writeback import Writeback


def raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptor_budget() -> int:
    """O_PATH descriptors to keep: a quarter of what the process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(BUDGET_MAX, soft // 4))


class Stack:
    """The parts of one mount.

    `changed(inode)` is told when a file turns out to have been changed underneath, `gone(parent, name)` when a name does not
    mean any more what the kernel knows.

    `pins_file` is where pins are kept (None: nowhere).
    """

    def __init__(
        self,
        config: Config,
        backing: Backing,
        tasks: Spawner,
        changed: Callable[[Inode], None],
        gone: Callable[[Inode, bytes], None],
        pins_file: str | None = None,
    ) -> None:
        self.config = config
        self.started = time.monotonic()
        self.savings = Savings()
        self.io = BackingIO(backing, tasks, config.backing_timeout_seconds)
        root_fd = backing.open_root()
        self.table = InodeTable(backing.fstat(root_fd))
        self.descriptors = Descriptors(self.io, self.table, root_fd, descriptor_budget())
        pages = config.cache_size_bytes // PAGE_SIZE
        most_pages = max(pages, machine_memory_bytes() // PAGE_SIZE)
        self.cache = PageCache(policy.make(config.policy, pages), pages, time.monotonic, most_pages)
        self.cache.pin_limit_pages = config.pin_limit_bytes // PAGE_SIZE
        self.keeper = Keeper(self.cache, self.table, backing)
        self.writeback = Writeback(
            self.cache,
            self.keeper,
            limit_bytes=config.dirty_limit_bytes,
            background_bytes=config.dirty_background_bytes,
            expire_seconds=config.dirty_expire_seconds,
            interval_seconds=config.writeback_interval_seconds,
            settled=self._settled,
            watchdog=self.io.watchdog,
        )
        self.filler = Filler(self.cache, tasks, self.writeback.need_room, self.io.watchdog)
        self.files = Files(
            self.io, self.descriptors, self.cache, self.filler, self.writeback, self.keeper,
            config.readahead_max_bytes, config.metadata_ttl_seconds, changed, gone, config.write_through,
        )  # fmt: skip
        self.watcher = Watcher(self.descriptors, self.files, gone) if backing.watch_path(root_fd) is not None else None
        self.fs = FileSystem(self.io, self.table, self.descriptors, self.files, self.writeback)
        self.walker = Walker(self.fs, tasks) if backing.blocking else None
        self.keeper.make_durable = functools.partial(self.io.ask, self.fs.make_durable)
        self.ledger = Ledger(self.fs)
        self.pins = Pins(self.fs, pins_file)
        self.hints = Hints(self.files, self.pins, parse_rules(config.rule), tasks, changed)
        self.fs.xattrs.hints, self.files.advise = self.hints, self.hints.opened

    def _settled(self, inode: Inode) -> None:
        self.files.data.settle(inode)
        self.fs.drop(inode)

    async def write_out(self) -> list[Inode]:
        """Writes out everything that is dirty now, for as long as it gets on; returns the inodes that could not be written."""
        left = math.inf
        while self.writeback.unwritten_pages < left:
            left = self.writeback.unwritten_pages
            try:
                return await self.io.ask(self.writeback.flush_all)
            except Unreachable:
                continue
        return list(self.writeback.dirty)

    def unwritten(self) -> list[dict[str, object]]:
        """The entries of everything that is not on the backing, merged; takes as long as it takes."""
        return merged(entry for part in self.ledger.parts() for entry in part)

    def path(self, inode: Inode) -> str:
        """A name of the inode relative to SOURCE, for people."""
        return os.fsdecode(self.ledger.path(inode) or b"")

    def tick(self) -> None:
        """To be called every second or so: moves the clock that reads are stamped with, and adds up what they saved."""
        self.cache.accounts.tick(self.cache.clock())
        self.savings.account(self.cache.reads_hit, self.io.speed.latency_seconds)

    def statistics(self, kernel_cache: str, durations: dict[str, HistogramSnapshot], ready_seconds: float) -> Statistics:
        """A snapshot; what is above, the kernel's mode and the session's figures, is passed in."""
        self.tick()
        return Statistics(
            mountpoint=self.config.mountpoint,
            source=self.config.source,
            policy=self.cache.policy.name,
            kernel_cache=kernel_cache,
            uptime_seconds=time.monotonic() - self.started,
            cache=statistics_of(self.cache),
            writeback=self.writeback.statistics(self.files.through.written_bytes),
            backing=self.io.statistics(),
            journal=self.keeper.statistics(),
            conflicts=self.files.conflicts.statistics(),
            filesystem=FileSystemStatistics(
                durations=durations,
                saved_seconds=self.savings.seconds,
                ready_seconds=ready_seconds,
                open_handles=len(self.files.handles),
                known_inodes=len(self.table),
                open_descriptors=len(self.descriptors) + self.files.data.count,
            ),
        )

    def check(self) -> None:
        """Asserts the invariants of cache and inodes; slow."""
        self.cache.check_invariants()
        self.table.check()
        assert sum(account.opens for account in self.cache.accounts) == len(self.files.handles), "handles without an account"
        self.keeper.check()
