"""How a process ends although it has files of a backing open that hangs: another one is left behind with their descriptors.

The kernel closes them when a process ends, and to close a file on FUSE it waits for an answer, unkillable. So they go to a
process that shares the table of descriptors. It ends when all of them are closed: when the backing answers, or is gone.
"""

import contextlib
import ctypes
import os
import platform
import select
import signal

CLONE_FILES = 0x400  # linux/sched.h
_CLONE = {"x86_64": 56, "aarch64": 220}  # the system call: os.fork() would copy the table


def leave_descriptors(source: str) -> None:
    """To be called last of all. Does nothing on machines whose system calls we do not know.

    The one that is left behind costs little: it does not get the arena (MADV_DONTFORK).
    """
    call = _CLONE.get(platform.machine())
    if call is None:
        return
    parent = os.pidfd_open(os.getpid())
    # PyDLL keeps the interpreter's lock, so that the child has it. Threads that hang in calls hold no other one.
    if ctypes.PyDLL(None).syscall(ctypes.c_long(call), ctypes.c_long(CLONE_FILES | signal.SIGCHLD), None, None, None, None) == 0:
        try:
            _wait_and_close(parent, os.fsencode(source))
        finally:
            os._exit(0)


def _wait_and_close(parent: int, source: bytes) -> None:
    """Waits until the parent is gone, for who closes a shared table last is the one that waits; and lets go of all else."""
    poll = select.poll()
    poll.register(parent, select.POLLIN)
    poll.poll()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(b"/proc/self/fd/" + os.fsencode(name)).startswith(source):
                os.close(int(name))
