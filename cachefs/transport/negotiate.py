"""Mounting, and answering the kernel's INIT ourselves, because pyfuse3 and libfuse 3.14 cannot ask for what we need.

libfuse takes `/dev/fd/N` as a mountpoint that is mounted already. So: mount, read the kernel's INIT from the descriptor,
answer it with our flags, and give libfuse a socket N with the same INIT in it. When libfuse has read that, `hand_over`
puts the real descriptor in the socket's place; libfuse's own answer gets ENOENT from the kernel, which it ignores.

Layouts: include/uapi/linux/fuse.h, struct fuse_in_header, fuse_init_in, fuse_init_out.
"""

import array
import contextlib
import ctypes
import errno
import os
import socket
import struct
import subprocess
from dataclasses import dataclass

from cachefs.config import Config
from cachefs.errors import CachefsError

INIT = 26
IN_HEADER, INIT_IN, OUT_HEADER = struct.Struct("<IIQQIIII"), struct.Struct("<IIIII"), struct.Struct("<IiQ")
INIT_OUT = struct.Struct("<IIIIHHIIHHIIIHH")
INIT_OUT_BYTES = 64

ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES, DONT_MASK = 1 << 0, 1 << 3, 1 << 5, 1 << 6
AUTO_INVAL_DATA, DO_READDIRPLUS, ASYNC_DIO, PARALLEL_DIROPS = 1 << 12, 1 << 13, 1 << 15, 1 << 18
POSIX_ACL, MAX_PAGES, HANDLE_KILLPRIV_V2, INIT_EXT = 1 << 20, 1 << 22, 1 << 28, 1 << 30
DIRECT_IO_ALLOW_MMAP = 1 << 36
WANTED = (
    ASYNC_READ | ATOMIC_O_TRUNC | BIG_WRITES | DONT_MASK | AUTO_INVAL_DATA | DO_READDIRPLUS | ASYNC_DIO
    | PARALLEL_DIROPS | POSIX_ACL | MAX_PAGES | HANDLE_KILLPRIV_V2 | INIT_EXT | DIRECT_IO_ALLOW_MMAP
)  # fmt: skip

REQUEST_MAX_BYTES = (1 << 20) + 8192
# Of 256 pages, 1 MiB of memory that begins within a page would come as 1 MiB less some bytes, and these bytes.
WRITE_MAX_BYTES = 1 << 19
PAGES_MAX = 256
READAHEAD_MAX_BYTES = 16 << 20
BACKGROUND_MAX = 128  # requests of readahead and asynchronous I/O that the kernel has under way at once

FSTYPE = "fuse.cachefs"
MNT_DETACH = 2
MOUNT_FLAGS = {
    "ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "dirsync": 128, "noatime": 1024, "nodiratime": 2048,
    "relatime": 1 << 21, "strictatime": 1 << 24,
}  # fmt: skip  # linux/mount.h

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Connection:
    """A mounted file system whose INIT was answered."""

    fuse_fd: int
    granted: int  # flags of WANTED that the kernel has
    request: bytes  # the INIT, as the kernel sent it
    session_fd: int = -1  # what libfuse reads from
    peer: socket.socket | None = None

    @property
    def direct_mmap(self) -> bool:
        """Whether files may be mapped shared although every read and write comes to us."""
        return bool(self.granted & DIRECT_IO_ALLOW_MMAP)

    def for_libfuse(self) -> str:
        """The mountpoint that libfuse is to be given: a socket with the INIT in it."""
        ours, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.peer.send(self.request)
        self.session_fd = ours.detach()
        return f"/dev/fd/{self.session_fd}"

    def hand_over(self) -> None:
        """To be called when libfuse has read INIT from the socket: from now on it reads from the kernel."""
        assert self.peer is not None
        os.dup2(self.fuse_fd, self.session_fd, inheritable=False)
        os.close(self.fuse_fd)
        self.peer.close()
        self.fuse_fd = self.session_fd


def connect(config: Config) -> Connection:
    """Mounts, and agrees with the kernel; raises CachefsError where either cannot be."""
    fuse_fd = _mount_as_root(config) if os.geteuid() == 0 else _mount_by_helper(config)
    try:
        request, granted = _answer_init(fuse_fd)
    except OSError as error:
        os.close(fuse_fd)
        unmount(config.mountpoint, lazy=True)
        raise CachefsError(f"the kernel and cachefs do not understand each other: {error.strerror}") from None
    return Connection(fuse_fd, granted, request)


def unmount(mountpoint: str, lazy: bool = False) -> None:
    """Unmounts; raises OSError (EBUSY while files are open there, unless `lazy`). Waits: not for the trio thread."""
    if os.geteuid() == 0:
        if _libc.umount2(os.fsencode(mountpoint), MNT_DETACH if lazy else 0):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return
    command = ["fusermount3", "-uz" if lazy else "-u", "--", mountpoint]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except subprocess.TimeoutExpired:
        raise OSError(errno.ETIMEDOUT, "fusermount3 does not answer") from None
    if done.returncode:
        if "busy" in done.stderr:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        raise OSError(errno.EPERM, " ".join(done.stderr.split()) or f"fusermount3 exit status {done.returncode}")


def _source_name(config: Config) -> str:
    return config.fsname or config.source


def _mount_as_root(config: Config) -> int:
    flags = 0 if "suid" in config.mount_flags else MOUNT_FLAGS["nosuid"]
    flags |= 0 if "dev" in config.mount_flags else MOUNT_FLAGS["nodev"]
    for word in config.mount_flags:
        flags |= MOUNT_FLAGS.get(word, 0)
    flags |= MOUNT_FLAGS["ro"] if config.read_only else 0
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions"
    options += ",allow_other" if config.allow_other else ""
    paths = (os.fsencode(_source_name(config)), os.fsencode(config.mountpoint))
    if _libc.mount(*paths, FSTYPE.encode(), ctypes.c_ulong(flags), options.encode()):
        number = ctypes.get_errno()
        os.close(fd)
        raise CachefsError(f"cannot mount on {config.mountpoint}: {os.strerror(number)}")
    return fd


def _mount_by_helper(config: Config) -> int:
    """Mounts by fusermount3, which may do so for users and sends the descriptor over a socket."""
    words = [word for word in config.mount_flags if word in ("noexec", "noatime", "sync", "dirsync")]
    words += ["ro"] if config.read_only else []
    words += ["allow_other"] if config.allow_other else []
    name = _source_name(config).replace("\\", "\\\\").replace(",", "\\,")
    options = ["default_permissions", "subtype=cachefs", f"fsname={name}", *sorted(words)]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        command = ["fusermount3", "-o", ",".join(options), "--", config.mountpoint]
        environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
        done = subprocess.run(
            command, env=environment, pass_fds=[theirs.fileno()], capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            reason = done.stderr.strip().removeprefix("fusermount3: ") or f"fusermount3 exit status {done.returncode}"
            raise CachefsError(f"cannot mount on {config.mountpoint}: {reason.splitlines()[-1]}")
        return _receive_descriptor(ours)


def _receive_descriptor(end: socket.socket) -> int:
    fds = array.array("i")
    _, ancillary, _, _ = end.recvmsg(1, socket.CMSG_LEN(fds.itemsize))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: fds.itemsize])
            os.set_inheritable(fds[0], False)
            return fds[0]
    raise CachefsError("fusermount3 sent no descriptor")


def _answer_init(fuse_fd: int) -> tuple[bytes, int]:
    """Reads the kernel's INIT and answers it; returns the request, for libfuse to see, and the flags granted."""
    request = os.read(fuse_fd, REQUEST_MAX_BYTES)
    _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
    if opcode != INIT:
        raise OSError(errno.EPROTO, "first request is not INIT")
    major, minor, _, flags, flags2 = INIT_IN.unpack_from(request, IN_HEADER.size)
    granted = WANTED & (flags | flags2 << 32)
    congestion = BACKGROUND_MAX * 3 // 4
    reply = INIT_OUT.pack(
        major, minor, READAHEAD_MAX_BYTES, granted & 0xFFFFFFFF, BACKGROUND_MAX, congestion, WRITE_MAX_BYTES,
        1, PAGES_MAX, 0, granted >> 32, 0, 0, 0, 0,
    ).ljust(INIT_OUT_BYTES, b"\0")  # fmt: skip
    os.write(fuse_fd, OUT_HEADER.pack(OUT_HEADER.size + len(reply), 0, unique) + reply)
    return request, granted


def set_kernel_readahead(device: str, kilobytes: int) -> None:
    """The kernel's own readahead on the mount `device` (major:minor), where it caches; needs root, else it is let be."""
    path = f"/sys/class/bdi/{device}/read_ahead_kb"
    with contextlib.suppress(OSError), open(path, "w") as file:
        file.write(str(kilobytes))
