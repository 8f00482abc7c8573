"""Minutes of stress-ng's file-system stressors beside random operations: no wrong byte, no trouble in the log."""

import os
import subprocess

import pytest
from running import ProgramMount, results, run, sha256, worker

SECONDS = float(os.environ.get("CACHEFS_STRESS_SECONDS", "600"))
# The stressors of stress-ng that use files, where Linux lets them run on FUSE. Each version of it has some of them.
STRESSORS = (
    "access", "chattr", "chdir", "chmod", "chown", "copy-file", "dentry", "dir", "dirdeep", "dirmany", "dup", "fallocate",
    "fcntl", "fiemap", "file-ioctl", "filename", "flock", "fpunch", "fstat", "getdent", "hdd", "io", "iomix", "lease", "link",
    "locka", "lockf", "lockmix", "lockofd", "mknod", "mmapaddr", "open", "readahead", "rename", "revio", "seek",
    "sendfile", "splice", "symlink", "sync-file", "touch", "unlink", "utime", "verity", "xattr",
)  # fmt: skip
FILES, SIZE_MAX = 3, 40 << 20


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 2 + 300)
def test_stressors_beside_random_operations(program_mount: ProgramMount) -> None:
    seconds = SECONDS / 3  # of the mode
    stressed = program_mount.mountpoint / "stressed"
    stressed.mkdir()
    words = ["stress-ng", "--temp-path", str(stressed), "--timeout", f"{seconds:.0f}s", "--verify", "--hdd-bytes", "32m"]
    for name in set(run("stress-ng", "--stressors").split()) & set(STRESSORS):
        words += [f"--{name}", "1"]
    words += ["--mmap", "1", "--mmap-file", "--mmap-bytes", "16m"]
    paths = [program_mount.mountpoint / f"random{number}" for number in range(FILES)]
    workers = [worker("random_operations", path, n, SIZE_MAX, seconds) for n, path in enumerate(paths)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=seconds * 2 + 200, check=False)
    expected = [output.split()[1] for output in results(workers, seconds + 200)]
    assert done.returncode == 0, done.stdout + done.stderr
    assert [sha256(path) for path in paths] == expected
    program_mount.unmount()
    assert [sha256(program_mount.source / path.name) for path in paths] == expected
