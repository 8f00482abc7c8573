"""The writers of a campaign: each is a process a round, with a directory on the mount and a record beside it."""

from __future__ import annotations

import errno
import faulthandler
import mmap
import os
import re
import signal
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checking import check
from record import DONE, FAILED, INTENT, WRONG, Record
from tree import Operation, Tree
from workload import WEIGHTS, Workload

# What a call gets when the daemon dies under it or has died before.
DEAD = frozenset({errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV})


class StopFlag:
    """One byte that all writers see."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1)

    def set(self, stop: bool) -> None:
        self._memory[0] = stop

    def __call__(self) -> bool:
        return bool(self._memory[0])


class Writer:
    """One writer: what it knows of its files lives here, what it does in a child process a round."""

    def __init__(self, name: str, record_directory: Path) -> None:
        self.name = name
        self.record = Record(record_directory / name)
        self.acknowledged = 0
        self._child = 0

    def prepare(self, directory: Path) -> None:
        """Makes what the writer begins with, in a directory that is not mounted yet."""
        raise NotImplementedError

    def work(self, mountpoint: Path, seed: int, stop: StopFlag) -> None:
        """The child's part: works until told to stop, or until the mount is gone."""
        raise NotImplementedError

    def check(self, root: Path, mounted: bool) -> list[str]:
        """Complaints about what is in `root`, a mountpoint or the directory behind it."""
        raise NotImplementedError

    def victims(self) -> set[str]:
        """Paths in the mount whose files an operation under way may have removed."""
        raise NotImplementedError

    def history(self, paths: set[str]) -> list[str]:
        """For people: the last operations on what is or was called so in the mount."""
        inside = {os.path.relpath(path, self.name) for path in paths if path.startswith(f"{self.name}/")}
        return [f"  {self.name}: {line}" for line in self.record.last({*inside})] if inside else []

    def start(self, mountpoint: Path, seed: int, stop: StopFlag) -> None:
        self._child = os.fork()
        if self._child == 0:
            status = 1
            try:
                os.umask(0)
                faulthandler.disable()  # to die of a mapping is no failure here
                self.work(mountpoint, seed, stop)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def ended(self) -> bool:
        """Whether the child has ended by itself, looked at without waiting."""
        return not self._child or os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def ended_by_mapping(self) -> bool:
        """Whether it has ended because a page that it touched in a mapping could not be read."""
        end = os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOHANG | os.WNOWAIT) if self._child else None
        return end is not None and (end.si_code, end.si_status) == (os.CLD_KILLED, signal.SIGBUS)

    def join(self) -> list[str]:
        """Waits for the child; complains if it failed. A mapping of a dead mount costs the child its life: that may be."""
        _, status = os.waitpid(self._child, 0)
        self._child = 0
        code = os.waitstatus_to_exitcode(status)
        return [] if code in (0, -signal.SIGBUS) else [f"{self.name} ended with {code}, see stderr"]

    def kill(self) -> None:
        """For the end of a test that failed."""
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._child = 0

    def close(self) -> None:
        self.kill()
        self.record.close()


def replay(record: Record, tree: Tree, errnos: frozenset[int] = DEAD) -> tuple[Operation | None, list[str]]:
    """Applies what was acknowledged since the last time; the operation under way at the end, and complaints."""
    pending: Operation | None = None
    complaints = []
    for what, _, detail in record.news():
        if what == INTENT:
            assert pending is None
            pending = detail
        elif what == DONE and pending is not None:
            tree.apply(pending, detail)
            pending = None
        elif what == WRONG:
            complaints.append(f"writer {tree.writer}: {detail}")
        elif what == FAILED and detail not in errnos:
            complaints.append(f"writer {tree.writer}: {os.strerror(detail)} for {pending or 'a call that changes nothing'}")
    return pending, complaints


class FileWriter(Writer):
    """A writer of files in a directory of its own."""

    def __init__(self, number: int, record_directory: Path, weights: Mapping[str, int] = WEIGHTS, **how: Any) -> None:
        super().__init__(f"w{number}", record_directory)
        self.tree = Tree(number)
        self.weights, self.how = weights, how
        self.pending: Operation | None = None
        self._next_operation = 0

    def prepare(self, directory: Path) -> None:
        (directory / self.name).mkdir(mode=0o755)

    def work(self, mountpoint: Path, seed: int, stop: StopFlag) -> None:
        try:
            root_fd = os.open(mountpoint / self.name, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            return self.record.append(FAILED, error.errno)
        first = self._next_operation
        Workload(self.tree, root_fd, self.record, seed, first, weights=self.weights, **self.how).run(stop)

    def join(self) -> list[str]:
        complaints = super().join()
        before = self.tree.applied
        self.pending, more = replay(self.record, self.tree)
        self.tree.forget_closed()
        self._next_operation += 1_000_000
        self.acknowledged += self.tree.applied - before
        return complaints + more

    def victims(self) -> set[str]:
        if self.pending is None or self.pending[0] not in ("unlink", "rename"):
            return set()
        return {f"{self.name}/{self.pending[-1]}"}

    def check(self, root: Path, mounted: bool) -> list[str]:
        complaints, self.tree = check(self.tree, self.pending, root / self.name)
        self.pending = None
        if complaints:
            numbers: set[int | str] = {int(number) for line in complaints for number in re.findall(r"\(file (\d+)\)", line)}
            complaints += [f"  {self.name}: {line}" for line in self.record.last(numbers)]
        return complaints
