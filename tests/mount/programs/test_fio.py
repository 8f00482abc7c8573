"""fio writes and reads at random through three kinds of system calls, and finds every block as it wrote it."""

import ctypes
import errno
import json

import pytest
from running import CACHE_BYTES, ProgramMount, run

pytestmark = pytest.mark.mount

ENGINES = {
    "psync": (),
    "libaio": ("--direct=1", "--iodepth=16"),
    "io_uring": ("--iodepth=16",),
}
IO_URING_SETUP = 425


def io_uring_refused() -> str:
    """Why this kernel gives no ring, or nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(120)
    if libc.syscall(IO_URING_SETUP, 1, parameters) >= 0:
        return ""  # one descriptor more until the process ends
    return errno.errorcode.get(ctypes.get_errno(), "?")


@pytest.mark.parametrize("engine", ENGINES)
def test_random_blocks_verify(program_mount: ProgramMount, engine: str) -> None:
    if engine == "io_uring" and (reason := io_uring_refused()):
        pytest.skip(f"the kernel refuses io_uring: {reason}")
    large = engine == "psync" and program_mount.kernel_cache == "off"
    size = CACHE_BYTES * 13 // 4 if large else CACHE_BYTES // 2
    words = [
        "fio", "--name=verify", f"--directory={program_mount.mountpoint}", f"--ioengine={engine}", *ENGINES[engine],
        "--rw=randrw", "--bsrange=4k-128k", f"--size={size // 2}", "--numjobs=2", "--verify=crc32c",
        "--verify_fatal=1", "--end_fsync=1", "--randseed=1", "--output-format=json",
    ]  # fmt: skip
    report = json.loads(run(*words, cwd=program_mount.mountpoint))
    assert [job["error"] for job in report["jobs"]] == [0, 0]
    assert sum(job["write"]["io_bytes"] for job in report["jobs"]) > size // 3
    assert sum(job["read"]["io_bytes"] for job in report["jobs"]) > size // 2
    verify = [*words, "--verify_only"]
    program_mount.unmount()
    run(*[w.replace(str(program_mount.mountpoint), str(program_mount.source)) for w in verify], cwd=program_mount.source)
