"""Who is measured: cachefs, the file systems it is measured against, and the bare directory."""

import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from processes import cpu_seconds, rss_bytes, run, service

ROOT = Path(__file__).resolve().parent.parent
FETCHED = ROOT / ".venv" / "bench"  # what is fetched at bench time

Command = Callable[[Path, Path, Path], list[str]]  # source, mountpoint, working directory


@dataclass(frozen=True)
class Peer:
    """One way to get at a directory. `mode` says who answers reads: `daemon` sees each, `kernel` those it has not cached."""

    name: str
    program: str  # that has to be there
    package: str  # what Debian calls it
    command: Command | None  # None = the directory itself
    mode: str = "kernel"
    rounds_max: int = 99  # of the long jobs


@dataclass(frozen=True)
class Mounted:
    """A place to work in, and the process behind it (None: the kernel alone)."""

    path: Path
    pid: int | None
    log: Path

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid) if self.pid is not None else 0.0

    def rss_bytes(self) -> int:
        return rss_bytes(self.pid) if self.pid is not None else 0


def cachefs_command(*options: str) -> Command:
    def command(source: Path, mnt: Path, work: Path) -> list[str]:
        words = [sys.executable, "-m", "cachefs", "mount", str(source), str(mnt), "--foreground", "--metrics", "127.0.0.1:0"]
        return [*words, "--state-dir", str(work / "state"), *options]

    return command


def passthrough(_source: Path, _mnt: Path, _work: Path) -> list[str]:
    return [sys.executable, str(FETCHED / "passthroughfs.py"), str(_source), str(_mnt)]


def rclone(source: Path, mnt: Path, work: Path) -> list[str]:
    words = ["rclone", "mount", str(source), str(mnt), "--vfs-cache-mode", "full"]
    return [*words, "--cache-dir", str(work / "rclone"), "--config", "/dev/null"]


PEERS = {
    peer.name: peer
    for peer in (
        Peer("bare", "", "", None),
        Peer("cachefs", sys.executable, "", cachefs_command(), "daemon"),
        Peer("cachefs infinite", sys.executable, "", cachefs_command("--metadata-ttl", "1h"), "daemon"),
        Peer("cachefs keep", sys.executable, "", cachefs_command("--kernel-cache", "keep")),
        Peer("cachefs journal", sys.executable, "", cachefs_command("--durability", "journal")),
        Peer("bindfs direct", "bindfs", "bindfs", lambda s, m, w: ["bindfs", "-f", "-o", "direct_io", str(s), str(m)], "daemon"),
        Peer("bindfs", "bindfs", "bindfs", lambda s, m, w: ["bindfs", "-f", str(s), str(m)]),
        Peer(
            "mergerfs direct", "mergerfs", "mergerfs",
            lambda s, m, w: ["mergerfs", "-f", "-o", "cache.files=off,minfreespace=0", str(s), str(m)], "daemon",
        ),
        Peer("mergerfs", "mergerfs", "mergerfs", lambda s, m, w: ["mergerfs", "-f", "-o", "minfreespace=0", str(s), str(m)]),
        Peer("unionfs", "unionfs", "unionfs-fuse", lambda s, m, w: ["unionfs", "-f", f"{s}=RW", str(m)], rounds_max=3),
        Peer("pyfuse3", str(FETCHED / "passthroughfs.py"), "", passthrough, rounds_max=3),
        Peer("rclone", "rclone", "rclone", rclone, rounds_max=2),
    )
}  # fmt: skip


def missing(peer: Peer) -> str | None:
    """Why a peer cannot be measured here, for people; None = it can."""
    if peer.name == "pyfuse3":
        return None if (FETCHED / "passthroughfs.py").exists() else "its source package was not fetched"
    if peer.program and shutil.which(peer.program) is None:
        return f"{peer.program} is not installed (Debian: {peer.package})"
    return None


def version(peer: Peer) -> str:
    """As Debian counts; empty where that is not Debian's or not a package."""
    if peer.package and shutil.which("dpkg-query"):
        command = ["dpkg-query", "-W", "-f", "${Version}", peer.package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or "none of Debian's"
    return ""


def fetch_passthrough() -> None:
    """pyfuse3's own example, from the source package of the version that we run on; Failed without a package index."""
    target = FETCHED / "passthroughfs.py"
    if target.exists():
        return
    import pyfuse3

    FETCHED.mkdir(parents=True, exist_ok=True)
    pin = f"pyfuse3=={pyfuse3.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "pyfuse3", "-d", str(FETCHED), pin]
    run(pip, timeout=300)
    for archive in FETCHED.glob("pyfuse3-*.tar.gz"):
        with tarfile.open(archive) as tar:
            name = next(name for name in tar.getnames() if name.endswith("examples/passthroughfs.py"))
            member = tar.extractfile(name)
            assert member is not None
            target.write_bytes(member.read())


@contextlib.contextmanager
def mounted(peer: Peer, source: Path, work: Path) -> Iterator[Mounted]:
    """`source` through a peer, mounted below `work`. Nothing of it is left afterwards but what a cache keeps in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    log = work / "log"
    if peer.command is None:
        yield Mounted(source, None, log)
        return
    mnt = work / "mnt"
    mnt.mkdir(exist_ok=True)
    env = {**os.environ, "CACHEFS_RUNTIME_DIR": str(work / "run"), "PYTHONPATH": str(ROOT)}
    try:
        with service(peer.command(source, mnt, work), lambda: answers(mnt), log, env, lambda: unmount(mnt)) as process:
            yield Mounted(mnt, process.pid, log)
    finally:
        if os.path.ismount(mnt):
            subprocess.run(["fusermount3", "-uz", str(mnt)], check=False, capture_output=True)


def answers(mnt: Path) -> bool:
    try:
        return os.path.ismount(mnt) and os.listdir(mnt) is not None
    except OSError:
        return False


def unmount(mnt: Path) -> None:
    """Takes a mount away; lazily if it is in use."""
    for flag in ("-u", "-uz"):
        done = subprocess.run(["fusermount3", flag, str(mnt)], check=False, capture_output=True, timeout=60)
        if done.returncode == 0:
            return


def drop_kernel_caches() -> bool:
    """What the kernel has cached of all files leaves, so that a cold read is one; False without the right to."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True
