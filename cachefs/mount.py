"""The composition root: builds everything for one mount, runs it, and takes it down in the right order."""

import contextlib
import errno
import functools
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping

import trio

from backing.base import Backing
from cachefs import controlserver, daemon, garbage, mountinfo
from cachefs.commands import Commands
from cachefs.config import Config
from cachefs.daemon import Ready
from cachefs.errors import CachefsError
from cachefs.history import History
from cachefs.inode import Inode
from cachefs.keepcommands import KeepCommands
from cachefs.leftover import leave_descriptors
from cachefs.metrics import MetricsServer, make_registry
from cachefs.page.picture import Picture
from cachefs.page.web import FromThread, Page
from cachefs.picturecommands import PictureCommands
from cachefs.pulse import Pulse
from cachefs.recovery import Predecessor, Recovery
from cachefs.settings import Settings
from cachefs.stack import Stack, raise_descriptor_limit
from cachefs.state import State
from cachefs.statistics import Statistics
from cachefs.store import make_backing
from cachefs.tasks import Guarded
from cachefs.transport import negotiate
from cachefs.transport.session import open_session
from cachefs.viewcommands import ViewCommands
from cachefs.watchdog import Unreachable

log = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005  # a thread back from the backing waits no longer for the interpreter; Python's own 5 ms halve writeback
LAST_TRIES = 5  # at the end, for files whose writeback fails
LAST_TRY_PAUSE_SECONDS = 1.0
GRACE_SECONDS = 5.0  # for programs that still have files open when SIGTERM came
PINS_FILE = "pins.json"
LOGGED = ("path", "offset", "length", "error")  # of an entry
SWEEP_INODES = 1000  # at each beat: ~1 ms


def serve(config: Config, state: State, ready: Ready) -> int:
    """Runs one mount from start to after its unmount. `ready` is called once, with the addresses in use; before, with progress.

    Returns 0 when all was written, 1 when something could not be (it is in the log); CachefsError before it was ready.
    """
    raise_descriptor_limit()
    sys.setswitchinterval(SWITCH_SECONDS)
    garbage.look_once()
    os.umask(0)  # modes come with the callers' own umask
    backing = make_backing(config)
    predecessor = Predecessor(config, state.directory) if config.durability != "none" else None
    mount = Mount(config, state, backing, predecessor)
    try:
        return trio.run(functools.partial(mount.run, ready))
    except BaseExceptionGroup as group:
        # Not `except*`: what is raised in there comes out in a group again.
        problem = _lone_problem(group)
        if problem is None:
            raise
    finally:
        if mount.lost:
            leave_descriptors(config.source)
    raise problem


def _lone_problem(error: BaseException) -> CachefsError | None:
    """The CachefsError that a group of groups is about, if it is about nothing else."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, CachefsError) else None


class Mount:
    """Everything that belongs to one mount."""

    def __init__(self, config: Config, state: State, backing: Backing, predecessor: Predecessor | None) -> None:
        self.config = config
        self.predecessor = predecessor
        self.state = state
        self.backing = backing
        self.stopping = False
        self.failed: list[dict[str, object]] = []  # entries of what could not be written, at the end
        self.kept_at_end: str | None = None  # where that is from then on; None = nowhere: it is lost
        self.exit_status = 0
        self.lost = False  # whether SOURCE was, at the end
        self.metrics: MetricsServer | None = None
        self.kernel_cache = config.kernel_cache  # the mode in effect
        self._device: str | None = None  # of the mount, in mountinfo; None before there is one
        self._connected = False  # before, while a predecessor's data is written, the kernel knows nothing that it could forget
        self._answering = trio.Event()  # or it never will, and `_unmounted` is set
        self._serving = trio.Event()
        self._unmounted = trio.Event()
        self.finished = trio.Event()

    # --- running -------------------------------------------------------------------------------------------------------

    async def run(self, ready: Ready) -> int:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._watch_signals)
            self.tasks = Guarded(nursery)
            pins_file = os.path.join(self.state.directory, PINS_FILE)
            self.stack = Stack(self.config, self.backing, self.tasks, self._changed, self._gone, pins_file)
            self.history = History(self.stack)
            try:
                await self._serve(ready, nursery)
            finally:  # of all that is under way, threads that hang in SOURCE included
                nursery.cancel_scope.cancel()
                self.stack.io.watchdog.abandon()
                self.lost = self.stack.io.watchdog.lost
        return self.exit_status

    async def _serve(self, ready: Ready, nursery: trio.Nursery) -> None:
        self.commands = Commands(self)
        if daemon.ping_seconds() is not None:
            self.tasks.start_service(self._ping)
        if self.stack.io.watchdog.watching:
            self.tasks.start_service(self.stack.io.watchdog.run)
        notes = await self._recover(ready)
        try:
            self._connect(nursery)
            await self._start_services(nursery)
            await self._answering.wait()
            if self.kernel_cache != "off" and self._device is not None:
                negotiate.set_kernel_readahead(self._device, self.config.readahead_max_bytes >> 10)
            ready({"metrics": self.metrics_url, "notes": notes})
            log.info("serving %s on %s", self.config.source, self.config.mountpoint)
            self._serving.set()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.unmount(lazy=True)
            raise
        await self._unmounted.wait()
        await self._finish()

    async def _recover(self, ready: Ready) -> list[str]:
        """Writes what a killed predecessor could not, before the mountpoint answers; returns what the user has to know of it."""
        if self.predecessor is None:
            return []
        recovery = Recovery(self.stack, self.predecessor, lambda done, total: ready({"progress": [done, total]}))
        try:
            await self.stack.io.ask(recovery.run)
        except Unreachable as error:
            why = f"SOURCE {self.config.source} does not answer ({error.strerror})"
            raise CachefsError(f"{why}: what the journal has for it is kept; mount again when it does") from None
        return recovery.notes

    def _connect(self, nursery: trio.Nursery) -> None:
        """Mounts and begins to answer."""
        connection = negotiate.connect(self.config)
        mount = mountinfo.top_mount(self.config.mountpoint)
        self._device = mount.device if mount is not None else None
        if self.kernel_cache == "off" and not connection.direct_mmap:
            log.warning("this kernel cannot map files of a mount that sees every read: using --kernel-cache open")
            self.kernel_cache = "open"
        self.session = open_session(
            connection, self.stack.fs, self.kernel_cache, self.config.metadata_ttl_seconds, self._answering.set,
            self.config.fast_lane, self.config.cpu_latency,
        )  # fmt: skip
        self._connected = True
        nursery.start_soon(self._serve_fuse)

    async def _serve_fuse(self) -> None:
        try:
            await self.session.run()
        except Exception:
            log.critical("no more requests can be served", exc_info=True)  # what was acknowledged is still written out
            self.exit_status = 1
        finally:
            self._unmounted.set()
            self._answering.set()

    async def _start_services(self, nursery: trio.Nursery) -> None:
        self.pulse = Pulse(self._requests, self._is_busy, self.session.when_asked, self.stack.tick)
        self.tasks.start_service(self.pulse.run)
        self.tasks.start_service(self.stack.writeback.run)
        self.tasks.start_service(self._sweep)
        self.tasks.start_service(self._retire)
        self.tasks.start_service(functools.partial(self.stack.files.space.watch, self.pulse.next))
        if self.stack.watcher is not None:
            self.tasks.start_service(self.stack.watcher.run)
        self.stack.pins.load()
        self.tasks.start_service(self.stack.pins.run)
        keeping = KeepCommands(self.stack, Settings(self.stack, self._settings_changed), self._forget_in_kernel)
        picture = Picture(self.stack, self.history)
        seeing = PictureCommands(picture, self.statistics)
        handlers = {
            **self.commands.handlers(), **ViewCommands(self.stack).handlers(), **keeping.handlers(), **seeing.handlers(),
        }  # fmt: skip
        handlers = {name: self._waking(handler) for name, handler in handlers.items()}
        await nursery.start(controlserver.serve, self.state.socket_path, handlers)
        if self.config.metrics_host is not None:
            token = trio.lowlevel.current_trio_token()
            snapshot = functools.partial(trio.from_thread.run_sync, self.statistics, trio_token=token)
            host, registry = self.config.metrics_host, make_registry(snapshot)
            page = Page(picture, FromThread(self.tasks, token), host) if self.config.page else None
            self.metrics = MetricsServer(host, self.config.metrics_port, self.config.metrics_asked, registry, page)

    def _waking(self, handler: controlserver.Handler) -> controlserver.Handler:
        async def handle(request: Mapping[str, object], send: controlserver.Send) -> None:
            self.pulse.wake()
            await handler(request, send)

        return handle

    async def _ping(self) -> None:
        """Tells systemd that this thread still goes round, to the very end of the mount."""
        while (seconds := daemon.ping_seconds()) is not None:
            daemon.notify("WATCHDOG=1")
            await trio.sleep(seconds)

    async def _sweep(self) -> None:
        """At each beat lets go of what only cached pages kept, and moves the clock that reads are stamped with."""
        while True:
            await self.pulse.next()
            self.stack.fs.sweep(SWEEP_INODES)
            if self.stack.watcher is not None:
                self.stack.watcher.tidy()
            self.stack.tick()
            self.history.take()

    async def _retire(self) -> None:
        while True:
            await self.pulse.next()
            self.stack.keeper.settle()
            if not self.stack.io.watchdog.lost:
                await self.stack.keeper.retire()

    def _requests(self) -> int:
        return sum(sum(histogram.counts) for histogram in self.session.durations.values())

    def _is_busy(self) -> bool:
        """Whether something is left to be done every second that no request will tell of."""
        return bool(self.stack.writeback.dirty or self.stack.keeper.written_back or self.stack.io.watchdog.lost)

    def _changed(self, inode: Inode) -> None:
        """The file's contents changed underneath: what the kernel knows is wrong too, in mode `off` its size and mapped pages."""
        self._forget_in_kernel(inode)
        if inode.kept:
            self.stack.pins.kick()

    def _forget_in_kernel(self, inode: Inode) -> None:
        if self._connected and not self._unmounted.is_set():
            self.tasks.start_soon(self.invalidate, inode.node)

    def _settings_changed(self, config: Config) -> None:
        self.config = config
        self.state.reconfigure(config)

    def _gone(self, parent: Inode, name: bytes) -> None:
        """Somebody else has removed or replaced what had this name: the kernel is to ask again."""
        if self._connected and not self._unmounted.is_set():
            self.session.forget_name(parent.node, name)

    async def invalidate(self, node: int) -> None:
        """The kernel forgets the attributes of a file and what it has of its contents."""
        with contextlib.suppress(OSError):  # the kernel may not know it any more
            await trio.to_thread.run_sync(self.session.invalidate, node)

    # --- stopping ------------------------------------------------------------------------------------------------------

    async def _watch_signals(self, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            task_status.started()
            async for _ in signals:
                self.tasks.start_soon(self._stop)

    async def _stop(self) -> None:
        """SIGTERM: write out while programs go on, take the mount away, give them a little time to close."""
        await self._serving.wait()
        if self.stopping:
            return
        self.mark_stopping()
        await self.stack.write_out()
        try:
            await self.unmount(lazy=False)
        except OSError as error:
            log.warning("%s is in use (%s): taken away under its users", self.config.mountpoint, error.strerror)
            with contextlib.suppress(OSError):
                await self.unmount(lazy=True)
        with trio.move_on_after(GRACE_SECONDS):
            await self._unmounted.wait()
        if not self._unmounted.is_set():
            self.session.terminate()  # else what is acknowledged from now on would miss the last writeback
            with trio.move_on_after(GRACE_SECONDS):
                await self._unmounted.wait()
            self._unmounted.set()

    def mark_stopping(self) -> None:
        if not self.stopping:
            self.stopping = True
            daemon.stopping(self.state)

    async def unmount(self, lazy: bool) -> None:
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
        self.mark_stopping()
        with contextlib.suppress(OSError):
            await self.unmount(lazy=True)  # still there, and dead, if the kernel was told to abort the connection
        for attempt in range(LAST_TRIES):
            if attempt:
                await trio.sleep(LAST_TRY_PAUSE_SECONDS)
            failed = await self.stack.write_out()
            if not failed or self.stack.io.watchdog.lost:
                break
        self.failed = self.stack.unwritten()
        for entry in self.failed:
            log.error("not written: %s", json.dumps({key: entry[key] for key in LOGGED}))
            self.exit_status = 1
        self.kept_at_end = self.kept
        self.state.note_end(self.failed, self.kept_at_end)
        if os.environ.get("CACHEFS_CHECK"):
            self._check()
        self.session.close()
        await self.stack.keeper.close()
        if self.metrics is not None:
            self.metrics.close()
        log.info("unmounted %s", self.config.mountpoint)
        self.finished.set()
        with trio.move_on_after(GRACE_SECONDS):
            while self.commands.pending:
                await self.commands.answered.park()

    # --- figures -------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """For tests: whether everything still fits together after what the mount went through."""
        try:
            self.stack.check()
        except AssertionError:
            log.critical("invariants do not hold", exc_info=True)
            self.exit_status = 1

    @property
    def kept(self) -> str | None:
        """Where acknowledged data outlives this process, for people; None = nowhere."""
        journal = self.stack.keeper.journal
        return f"in the journal {journal.directory}, for the next mount" if journal is not None else None

    @property
    def metrics_url(self) -> str | None:
        return self.metrics.url if self.metrics is not None else None

    @property
    def page_url(self) -> str | None:
        return self.metrics.url.removesuffix("metrics") if self.metrics is not None and self.config.page else None

    def statistics(self) -> Statistics:
        durations = {op: histogram.snapshot() for op, histogram in self.session.durations.items()}
        return self.stack.statistics(self.kernel_cache, durations, self.session.ready_seconds)
