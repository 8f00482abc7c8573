"""Processes of a bench run: each in a session of its own, and ended whatever becomes of the run."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

START_SECONDS = 30.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.02


class Failed(Exception):
    """A command failed, or something did not start: one line that says what, and the end of what it said itself."""


def run(
    command: Sequence[str],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 600.0,
    allowed: Sequence[int] = (0,),
) -> str:
    """The command's standard output; Failed unless its exit status is `allowed`."""
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:
        end_group(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failed(f"{command[0]}: not done after {timeout:g} s") from None
        raise
    if process.returncode not in allowed:
        raise Failed(f"{' '.join(command[:4])}: exit status {process.returncode}: {(err or out)[-300:].strip()}")
    return out


@contextlib.contextmanager
def service(
    command: Sequence[str],
    ready: Callable[[], bool],
    log: Path,
    env: Mapping[str, str] | None = None,
    stop: Callable[[], None] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs as long as one is inside, `ready` when one comes in; `stop` asks it to end (default: SIGTERM)."""
    with open(log, "ab") as out:
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")[-500:].strip()
                raise Failed(f"{' '.join(command[:3])} did not start: {said}")
            time.sleep(POLL_SECONDS)
        yield process
    finally:
        if stop is not None:
            stop()
        elif process.poll() is None:
            process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        end_group(process)


def end_group(process: subprocess.Popen) -> None:  # type: ignore[type-arg]
    """Kills what is left of a process and the children in its session, and waits for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, all threads, in user and kernel mode; to about 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
