"""The composition root: builds everything for one mount, runs it, and takes it down in the right order."""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pyfuse3
import trio

from backing.base import Backing
from backing.directory import DirectoryBacking
from backing.faulty import FaultyBacking
from backing.latency import LatencyBacking
from cachefs import __version__, controlserver, daemon, mountinfo
from cachefs.backingio import BackingIO
from cachefs.cache import policy
from cachefs.cache.fill import Filler
from cachefs.cache.page import PAGE_SIZE
from cachefs.cache.pagecache import PageCache
from cachefs.config import Config
from cachefs.descriptors import BUDGET_MAX, Descriptors
from cachefs.errors import CachefsError
from cachefs.files import Files
from cachefs.fs import FileSystem
from cachefs.inode import Inode, InodeTable
from cachefs.metrics import MetricsServer, make_registry
from cachefs.state import State
from cachefs.statistics import FileSystemStatistics, Statistics
from cachefs.transport import negotiate, seam
from cachefs.transport.operations import Operations
from cachefs.writeback import Writeback

log = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005  # a thread back from the backing waits no longer for the interpreter; Python's own 5 ms halve writeback
LAST_TRIES = 5  # at the end, for files whose writeback fails
LAST_TRY_PAUSE_SECONDS = 1.0
GRACE_SECONDS = 5.0  # for programs that still have files open when SIGTERM came
SWEEP_SECONDS, SWEEP_INODES = 1.0, 1000  # ~1 ms of every second
PROGRESS_SECONDS = 0.1
DISTANT = frozenset(("nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "afs", "fuse.sshfs", "fuse.rclone", "glusterfs", "lustre"))


def serve(config: Config, state: State, ready: Callable[[Mapping[str, object]], None]) -> int:
    """Runs one mount from start to after its unmount. `ready` is called once, with the addresses in use.

    Returns 0 when all was written, 1 when something could not be (it is in the log); CachefsError before it was ready.
    """
    raise_descriptor_limit()
    sys.setswitchinterval(SWITCH_SECONDS)
    os.umask(0)  # modes come with the callers' own umask
    try:
        backing = make_backing(config)
        return trio.run(functools.partial(Mount(config, state, backing).run, ready))
    except* CachefsError as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[CachefsError]) -> CachefsError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, CachefsError)
    return error


def raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptor_budget() -> int:
    """O_PATH descriptors to keep: a quarter of what the process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(BUDGET_MAX, soft // 4))


def make_backing(config: Config) -> Backing:
    """The store that these settings describe, with its simulated faults and distance."""
    try:
        backing: Backing = DirectoryBacking(config.source, blocking=_is_distant(config))
    except OSError as error:
        raise CachefsError(f"cannot open SOURCE {config.source}: {error.strerror}") from None
    if config.fault_plan:
        backing = _with_faults(backing, config.fault_plan)
    if config.simulate_latency_seconds or config.simulate_bandwidth_bytes_per_second:
        bandwidth = config.simulate_bandwidth_bytes_per_second or float("inf")
        backing = LatencyBacking(backing, config.simulate_latency_seconds, bandwidth)
    return backing


def _with_faults(backing: Backing, plan: str) -> Backing:
    try:
        return FaultyBacking(backing, plan)
    except OSError as error:
        raise CachefsError(f"cannot open the fault plan {plan}: {error.strerror}") from None
    except ValueError as error:
        raise CachefsError(f"bad fault plan {plan}: {error}") from None


def _is_distant(config: Config) -> bool:
    if config.backing != "auto":
        return config.backing == "network"
    path = Path(config.source)
    for candidate in (path, *path.parents):
        mount = mountinfo.top_mount(str(candidate))
        if mount is not None:
            return mount.fstype in DISTANT or mount.fstype.startswith("fuse")
    return False


class Mount:
    """Everything that belongs to one mount."""

    def __init__(self, config: Config, state: State, backing: Backing) -> None:
        self.config = config
        self.state = state
        self.backing = backing
        self.started = time.monotonic()
        self.stopping = False
        self.failed: list[dict[str, object]] = []  # what could not be written, at the end
        self.exit_status = 0
        self.metrics: MetricsServer | None = None
        self.kernel_cache = config.kernel_cache  # the mode in effect
        self._device: str | None = None  # of the mount, in mountinfo; None before there is one
        self._serving = trio.Event()
        self._unmounted = trio.Event()
        self._finished = trio.Event()
        self._answering = 0  # umount commands that wait for the end
        self._answered = trio.lowlevel.ParkingLot()

    def _build(self, nursery: trio.Nursery) -> None:
        config = self.config
        self.io = BackingIO(self.backing)
        root_fd = self.backing.open_root()
        self.table = InodeTable(self.backing.fstat(root_fd))
        self.descriptors = Descriptors(self.io, self.table, root_fd, descriptor_budget())
        pages = config.cache_size_bytes // PAGE_SIZE
        self.cache = PageCache(policy.make(config.policy, pages), pages, time.monotonic)
        self.writeback = Writeback(
            self.cache,
            limit_bytes=config.dirty_limit_bytes,
            background_bytes=config.dirty_background_bytes,
            expire_seconds=config.dirty_expire_seconds,
            interval_seconds=config.writeback_interval_seconds,
            settled=self._settled,
        )
        self.filler = Filler(self.cache, nursery, self.writeback.need_room)
        self.files = Files(
            self.io, self.descriptors, self.cache, self.filler, self.writeback,
            config.readahead_max_bytes, config.metadata_ttl_seconds, self._changed,
        )  # fmt: skip
        self.fs = FileSystem(self.io, self.table, self.descriptors, self.files, self.writeback)

    # --- running -------------------------------------------------------------------------------------------------------

    async def run(self, ready: Callable[[Mapping[str, object]], None]) -> int:
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            await nursery.start(self._watch_signals)
            self._build(nursery)
            try:
                self._connect(nursery)
                await self._start_services(nursery)
                await trio.to_thread.run_sync(os.stat, self.config.mountpoint)
                if self.kernel_cache != "off":
                    await trio.to_thread.run_sync(
                        negotiate.set_kernel_readahead, self.config.mountpoint, self.config.readahead_max_bytes >> 10
                    )
                ready({"metrics": self.metrics.url if self.metrics else None})
                log.info("serving %s on %s", self.config.source, self.config.mountpoint)
                self._serving.set()
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._unmount(lazy=True)
                raise
            await self._unmounted.wait()
            await self._finish()
            nursery.cancel_scope.cancel()
        return self.exit_status

    def _connect(self, nursery: trio.Nursery) -> None:
        """Mounts and begins to answer."""
        connection = negotiate.connect(self.config)
        mount = mountinfo.top_mount(self.config.mountpoint)
        self._device = mount.device if mount is not None else None
        if self.kernel_cache == "off" and not connection.direct_mmap:
            log.warning("this kernel cannot map files of a mount that sees every read: using --kernel-cache open")
            self.kernel_cache = "open"
        self.operations = Operations(
            self.fs, self.kernel_cache, self.config.metadata_ttl_seconds, connection.hand_over
        )
        pyfuse3.init(self.operations, f"/dev/fd/{connection.session_fd}", set())
        seam.enable()
        nursery.start_soon(self._serve_fuse)

    async def _serve_fuse(self) -> None:
        try:
            await pyfuse3.main()
        except Exception:
            log.critical("no more requests can be served", exc_info=True)  # what was acknowledged is still written out
            self.exit_status = 1
        finally:
            self._unmounted.set()

    async def _start_services(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self.writeback.run)
        nursery.start_soon(self._sweep)
        handlers = {"status": self._on_status, "umount": self._on_umount, "sync": self._on_sync}
        await nursery.start(controlserver.serve, self.state.socket_path, handlers)
        if self.config.metrics_host is not None:
            token = trio.lowlevel.current_trio_token()
            snapshot = functools.partial(trio.from_thread.run_sync, self.statistics, trio_token=token)
            self.metrics = MetricsServer(
                self.config.metrics_host, self.config.metrics_port, self.config.metrics_asked, make_registry(snapshot)
            )

    async def _sweep(self) -> None:
        """Now and then lets go of inodes that only their cached pages kept."""
        while True:
            await trio.sleep(SWEEP_SECONDS)
            self.fs.sweep(SWEEP_INODES)

    def _settled(self, inode: Inode) -> None:
        self.files.data.settle(inode)
        self.fs.drop(inode)

    def _changed(self, inode: Inode) -> None:
        """The file's contents changed underneath: the kernel's pages of it are wrong too."""
        if self.kernel_cache != "off":
            self.nursery.start_soon(self._invalidate, inode.node)

    async def _invalidate(self, node: int) -> None:
        with contextlib.suppress(OSError):  # the kernel may not know it any more
            await trio.to_thread.run_sync(pyfuse3.invalidate_inode, pyfuse3.InodeT(node))

    # --- stopping ------------------------------------------------------------------------------------------------------

    async def _watch_signals(self, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            task_status.started()
            async for _ in signals:
                self.nursery.start_soon(self._stop)

    async def _stop(self) -> None:
        """SIGTERM: write out while programs go on, take the mount away, give them a little time to close."""
        await self._serving.wait()
        if self.stopping:
            return
        self._mark_stopping()
        await self.writeback.flush_all()
        try:
            await self._unmount(lazy=False)
        except OSError as error:
            log.warning("%s is in use (%s): taken away under its users", self.config.mountpoint, error.strerror)
            with contextlib.suppress(OSError):
                await self._unmount(lazy=True)
        with trio.move_on_after(GRACE_SECONDS):
            await self._unmounted.wait()
        if not self._unmounted.is_set():
            pyfuse3.terminate()  # else what is acknowledged from now on would miss the last writeback
            with trio.move_on_after(GRACE_SECONDS):
                await self._unmounted.wait()
            self._unmounted.set()

    def _mark_stopping(self) -> None:
        if not self.stopping:
            self.stopping = True
            daemon.stopping(self.state)

    async def _unmount(self, lazy: bool) -> None:
        """Takes the mount away unless that has been done already; another one in its place is let be."""
        mount = mountinfo.top_mount(self.config.mountpoint)
        if mount is None or mount.device != self._device:
            return
        try:
            await trio.to_thread.run_sync(negotiate.unmount, self.config.mountpoint, lazy)
        except OSError as error:
            if error.errno != errno.EINVAL:  # it is not mounted any more
                raise

    async def _finish(self) -> None:
        """No request can come any more: writes what is left, and says what cannot be written."""
        self._mark_stopping()
        with contextlib.suppress(OSError):
            await self._unmount(lazy=True)  # still there, and dead, if the kernel was told to abort the connection
        for attempt in range(LAST_TRIES):
            if attempt:
                await trio.sleep(LAST_TRY_PAUSE_SECONDS)
            failed = await self.writeback.flush_all()
            if not failed:
                break
        self.failed = self._unwritten()
        for piece in self.failed:
            log.error("not written: %s", json.dumps(piece))
            self.exit_status = 1
        pyfuse3.close(unmount=False)
        if self.metrics is not None:
            self.metrics.close()
        log.info("unmounted %s", self.config.mountpoint)
        self._finished.set()
        with trio.move_on_after(GRACE_SECONDS):
            while self._answering:
                await self._answered.park()

    def _unwritten(self) -> list[dict[str, object]]:
        """The extents that are not on the backing."""
        found: list[dict[str, object]] = []
        for inode in self.writeback.dirty:
            if inode.file is not None and inode.unwritten and not inode.unlinked:
                reason = errno.errorcode.get(inode.error_errno, "") if inode.error_count else ""
                for offset, length in inode.file.dirty_extents():
                    found.append({"path": self._path(inode), "offset": offset, "length": length, "error": reason})
        return found

    def _path(self, inode: Inode) -> str:
        """A name of the inode relative to SOURCE, for people."""
        parts: list[bytes] = []
        while inode is not self.table.root and inode.names:
            inode, name = next(iter(inode.names))
            parts.append(name)
        return os.fsdecode(b"/".join(reversed(parts)))

    # --- control -------------------------------------------------------------------------------------------------------

    async def _on_status(self, request: Mapping[str, object], send: controlserver.Send) -> None:
        await send(
            {
                "done": True,
                "pid": os.getpid(),
                "version": __version__,
                "source": self.config.source,
                "mountpoint": self.config.mountpoint,
                "metrics": self.metrics.url if self.metrics else None,
                "statistics": dataclasses.asdict(self.statistics()),
            }
        )

    async def _on_sync(self, request: Mapping[str, object], send: controlserver.Send) -> None:
        failed: list[Inode] = []
        problem: OSError | None = None
        async with self._progress_to(send):
            try:
                failed = await self.fs.sync()
            except OSError as error:
                problem = error
        if problem is not None:
            raise CachefsError(f"{self.config.source} can't be made durable: {problem.strerror}")
        await send({"done": True, "unwritten": self._unwritten() if failed else []})

    async def _on_umount(self, request: Mapping[str, object], send: controlserver.Send) -> None:
        """Writes out, unmounts, and answers when all is done."""
        self._answering += 1
        try:
            async with self._progress_to(send):
                await self.writeback.flush_all()
                try:
                    await self._unmount(lazy=False)
                except OSError as error:
                    advice = "; close what is open there" if error.errno == errno.EBUSY else ""
                    await send({"error": f"{self.config.mountpoint}: {error.strerror}{advice}", "done": True})
                    return
                self._mark_stopping()
                await self._finished.wait()
            await send({"done": True, "unwritten": self.failed})
        finally:
            self._answering -= 1
            self._answered.unpark_all()

    @contextlib.asynccontextmanager
    async def _progress_to(self, send: controlserver.Send) -> AsyncIterator[None]:
        async def report() -> None:
            while True:
                await send({"dirty_bytes": self.writeback.unwritten_pages * PAGE_SIZE})
                await trio.sleep(PROGRESS_SECONDS)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(report)
            yield
            nursery.cancel_scope.cancel()

    # --- figures -------------------------------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        return Statistics(
            mountpoint=self.config.mountpoint,
            source=self.config.source,
            policy=self.config.policy,
            kernel_cache=self.kernel_cache,
            uptime_seconds=time.monotonic() - self.started,
            cache=self.cache.statistics(),
            writeback=self.writeback.statistics(),
            backing=self.io.statistics(),
            filesystem=FileSystemStatistics(
                durations={op: histogram.snapshot() for op, histogram in self.operations.durations.items()},
                open_handles=len(self.files.handles),
                known_inodes=len(self.table),
                open_descriptors=len(self.descriptors) + self.files.data.count,
            ),
        )
