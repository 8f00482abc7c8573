"""fsync with no thread of ours: Linux has threads for it, and says when it is done (io_submit(2) with IOCB_CMD_FSYNC).

Reads and writes are not done so: without O_DIRECT, io_submit waits for them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

_NUMBERS = {  # of io_setup, io_destroy, io_getevents, io_submit: asm/unistd_64.h, asm-generic/unistd.h
    "x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2), "riscv64": (0, 1, 4, 2),
}  # fmt: skip
# linux/aio_abi.h, little-endian. struct iocb: data, key, rw_flags, opcode, priority, fd, buf, nbytes, offset, -, flags, resfd.
_IOCB, _IOCB_CMD_FSYNC, _IOCB_CMD_FDSYNC, _IOCB_FLAG_RESFD = struct.Struct("<QIiHhIQQqQII"), 2, 3, 1
_EVENT = struct.Struct("<QQqq")  # struct io_event: data, iocb, result, -
UNDER_WAY_MAX = 128

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class SyncQueue:
    """Files that are being made durable. OSError where the kernel, or a sandbox around us, has nothing like it.

    Not for two threads. It belongs to the process that made it: a forked child cannot use it.
    """

    def __init__(self) -> None:
        if platform.machine() not in _NUMBERS:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._setup, self._destroy, self._getevents, self._submit = _NUMBERS[platform.machine()]
        self._context = ctypes.c_ulong()
        _call(self._setup, UNDER_WAY_MAX, ctypes.byref(self._context))
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable when there is something for `ended`
        self._request = ctypes.create_string_buffer(_IOCB.size)
        self._requests = (ctypes.c_void_p * 1)(ctypes.addressof(self._request))
        self._events = ctypes.create_string_buffer(_EVENT.size * UNDER_WAY_MAX)

    def begin(self, fd: int, datasync: bool, tag: int) -> None:
        """Begins an fsync, or fdatasync, which `ended` will tell of as `tag`. OSError (EAGAIN: too many) if it does not."""
        command = _IOCB_CMD_FDSYNC if datasync else _IOCB_CMD_FSYNC
        _IOCB.pack_into(self._request, 0, tag, 0, 0, command, 0, fd, 0, 0, 0, 0, _IOCB_FLAG_RESFD, self.fd)
        _call(self._submit, self._context, ctypes.c_long(1), self._requests)

    def ended(self) -> list[tuple[int, int]]:
        """Those that have ended since: (tag, errno), 0 = all is well."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return []
        ended, count = [], UNDER_WAY_MAX
        while count == UNDER_WAY_MAX:  # the kernel takes more at a time than it was asked for
            count = _call(self._getevents, self._context, ctypes.c_long(0), ctypes.c_long(UNDER_WAY_MAX), self._events, None)
            events = (_EVENT.unpack_from(self._events, i * _EVENT.size) for i in range(count))
            ended += [(tag, max(0, -result)) for tag, _, result, _ in events]
        return ended

    def close(self) -> None:
        """Waits for what is under way, and gives it all back."""
        _call(self._destroy, self._context)
        os.close(self.fd)


def _call(number: int, *args: object) -> int:
    result: int = _syscall(ctypes.c_long(number), *args)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
