"""The daemon process: foreground or background, readiness told to whoever waits, systemd notified, log kept small."""

import contextlib
import faulthandler
import json
import logging
import logging.handlers
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from cachefs.config import Config
from cachefs.errors import CachefsError
from cachefs.state import SERVING, State

Ready = Callable[[Mapping[str, object]], None]
Show = Callable[[Mapping[str, Any]], None]
Serve = Callable[[Config, State, Ready], int]

PINGS = 4  # in the time after which systemd takes us for stuck
EXTEND_USEC = 60_000_000  # systemd is told at least every file of a recovery
LOG_BYTES = 4 * 1024 * 1024
LOG_BACKUPS = 3
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_log = logging.getLogger(__name__)


def run(config: Config, state: State, serve: Serve, *, foreground: bool, show: Show = lambda message: None) -> int:
    """Runs `serve` here until the unmount, or in a child that goes on when this returns; the exit status.

    `show` is told how a start in the background gets on: {"progress": [bytes done, bytes in all]}, {"notes": [lines]}.
    """
    return _run_foreground(config, state, serve) if foreground else _run_background(config, state, serve, show)


def notify(message: str, must_arrive: bool = False) -> None:
    """Tells systemd (READY=1, STOPPING=1, STATUS=...) if it started us and asked to be told.

    Who serves a file system does not wait for systemd, which may be waiting for that. Where there is no room, it has ten messages
    of us to read: so most need not arrive, and a thread waits with one that must.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] in ("/", "@") and not _sent(address, message, socket.MSG_DONTWAIT) and must_arrive:
        threading.Thread(target=_sent, args=(address, message, 0), name="cachefs-notify", daemon=True).start()


def _sent(address: str, message: str, flags: int) -> bool:
    """False where there is no room. A systemd that is not there is told nothing."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifying:
        try:
            notifying.connect("\0" + address[1:] if address[0] == "@" else address)
            notifying.sendall(message.encode("utf-8", "replace"), flags)
        except BlockingIOError:
            return False
    return True


def ping_seconds() -> float | None:
    """How often systemd wants to hear WATCHDOG=1 of this process, with time to spare; None = not at all."""
    with contextlib.suppress(KeyError, ValueError):
        if os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            return int(os.environ["WATCHDOG_USEC"]) / 1e6 / PINGS
    return None


def stopping(state: State) -> None:
    """Says that the unmount has begun: `serve` calls it before it writes out what is left."""
    state.mark_stopping()
    notify("STOPPING=1\nSTATUS=writing out", must_arrive=True)


def _run_foreground(config: Config, state: State, serve: Serve) -> int:
    handler = logging.StreamHandler(sys.stderr)
    _start_logging(handler, config.log_level)

    def ready(addresses: Mapping[str, object]) -> None:
        if "progress" in addresses:
            notify(f"EXTEND_TIMEOUT_USEC={EXTEND_USEC}\nSTATUS=writing out what a predecessor left")
            return
        _publish(state, addresses)
        notify(f"READY=1\nSTATUS=serving {config.source} on {config.mountpoint}", must_arrive=True)

    try:
        return serve(config, state, ready)
    except CachefsError:
        raise
    except Exception:
        _log.critical("the daemon failed", exc_info=True)
        return 1
    finally:
        state.close()
        logging.getLogger().removeHandler(handler)


def _run_background(config: Config, state: State, serve: Serve, show: Show) -> int:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _be_the_child(config, state, serve, writing)  # never returns
    os.close(writing)
    state.leave_to_child()
    try:
        return _wait_until_ready(child, reading, state.log_path, show)
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        raise
    finally:
        os.close(reading)


def _wait_until_ready(child: int, reading: int, log_path: str, show: Show) -> int:
    with open(reading, "rb", closefd=False) as pipe:
        for line in pipe:
            message = json.loads(line)
            show(message)
            if "error" in message:
                os.waitpid(child, 0)  # so that the state is free when the user reads the error
                error = CachefsError(message["error"])
                error.exit_status = message["exit_status"]
                raise error
            if "ready" in message:
                return 0
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    raise CachefsError(f"the daemon {how} before it was ready: see {log_path}")


def _be_the_child(config: Config, state: State, serve: Serve, writing: int) -> None:
    """The daemon's whole life; leaves by os._exit, as what the parent registered to run at exit is the parent's."""
    status = 1
    try:
        status = _serve_and_tell(config, state, serve, writing)
    except BaseException:
        _log.critical("the daemon failed", exc_info=True)
    finally:
        logging.shutdown()
        os._exit(status)


def _serve_and_tell(config: Config, state: State, serve: Serve, writing: int) -> int:
    """Runs `serve`, tells the waiting parent once how the start went, and gives up the state."""
    telling: int | None = writing

    def tell(message: Mapping[str, object], last: bool = True) -> None:
        nonlocal telling
        if telling is not None:
            with contextlib.suppress(OSError):  # the parent was interrupted
                os.write(telling, json.dumps(message).encode("ascii") + b"\n")
            if last:
                os.close(telling)
                telling = None

    def ready(addresses: Mapping[str, object]) -> None:
        if "progress" in addresses:
            tell(addresses, last=False)
            return
        _publish(state, addresses)
        tell({"ready": True, "notes": addresses.get("notes", [])})

    try:
        _leave_the_terminal(state, keep=(writing, state.lock_fd))
        _log_to_file(state.log_path, config.log_level)
        status = serve(config, state, ready)
    except CachefsError as error:
        _log.error("%s", error)
        state.close()
        tell({"error": str(error), "exit_status": error.exit_status})
        return error.exit_status
    state.close()
    return status


def _publish(state: State, addresses: Mapping[str, object]) -> None:
    metrics = addresses.get("metrics")
    state.publish(SERVING, None if metrics is None else str(metrics))


def _leave_the_terminal(state: State, keep: tuple[int, ...]) -> None:
    """A session of our own, no terminal, no descriptor that keeps another program's pipe or file open."""
    os.setsid()
    os.chdir("/")
    kept = {0, 1, 2, *keep}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))
    _redirect(os.devnull, os.O_RDONLY, (0,))
    try:
        _redirect(state.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, (1, 2))
    except OSError as error:
        _redirect(os.devnull, os.O_WRONLY, (1, 2))
        raise CachefsError(f"can't write the log {state.log_path}: {error.strerror}") from None


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _redirect(path: str, flags: int, descriptors: tuple[int, ...]) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    for descriptor in descriptors:
        os.dup2(fd, descriptor)
    os.close(fd)


class _DaemonLog(logging.handlers.RotatingFileHandler):
    """A log file of bounded size that stdout and stderr follow, so that libraries' own words are kept as well."""

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding, errors=self.errors, opener=_open_private)

    def doRollover(self) -> None:
        super().doRollover()
        _redirect(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, (1, 2))


def _log_to_file(path: str, level: str) -> None:
    logging.raiseExceptions = False  # a full disk must not take the daemon's errors with it
    faulthandler.enable(2)
    _start_logging(_DaemonLog(path, maxBytes=LOG_BYTES, backupCount=LOG_BACKUPS, errors="backslashreplace"), level)


def _start_logging(handler: logging.Handler, level: str) -> None:
    handler.setFormatter(logging.Formatter(_LOG_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
