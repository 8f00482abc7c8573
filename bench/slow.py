"""Jobs on a slow backing: sshfs, over a real sshd on the loopback and a relay that adds 5 ms each way."""

import contextlib
import getpass
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from jobs import Amount, materials, work_on
from micro import MIB, read_all, read_some, timed, write_file
from peers import PEERS, Mounted, Peer, drop_kernel_caches, mounted, unmount
from processes import Failed, run, service
from turns import Run

DELAY_SECONDS = 0.005  # each way
SSHFS = Peer("sshfs", "sshfs", "sshfs", None)  # alone
SMALL = Amount(50, 15, 2, 500, 5, 200)
SSHD = "/usr/sbin/sshd"
PRIVSEP = Path("/run/sshd")


def slow(bench: Run) -> None:
    """Reads, find, grep -r, untar, git, make and SQLite over sshfs 10 ms away: cold, warm, and warm after a remount."""
    for program, package in ((SSHD, "openssh-server"), ("sshfs", "sshfs"), ("ssh", "openssh-client")):
        if shutil.which(program) is None:
            bench.results.note(f"slow: skipped, {program} is not installed (Debian: {package})")
            return
    remote = bench.directory("slow/remote")
    made = materials(bench.directory("slow/materials"), SMALL)
    write_file(remote / "f", bench.some(128, 16) * MIB)  # for streams
    write_file(remote / "g", 64 * MIB)  # for reads here and there: rclone would have all of it by the time of the stream
    run(["tar", "xf", str(made / "tree.tar")], cwd=remote)
    with far_away(bench.directory("slow/ssh")) as ssh_config:

        def turn(number: int, peer: Peer) -> None:
            one_round(bench, number, peer.name, remote, made, ssh_config)

        bench.each("slow", [SSHFS, *bench.peers(("cachefs", "cachefs journal", "rclone"))], turn)
        for number in range(bench.rounds):
            bandwidth(bench, number, remote, ssh_config)


def one_round(bench: Run, number: int, name: str, remote: Path, made: Path, ssh_config: Path) -> None:
    work = bench.work / "slow" / name.replace(" ", "-")
    shutil.rmtree(work, ignore_errors=True)
    run(["sync"])
    with over_sshfs(name, remote, work, ssh_config) as mount:
        for case, job in reading(mount.path).items():
            for state in ("cold", "warm"):
                timed(bench, "slow", f"{case} {state}", number, name, mount, job)
        timed(bench, "slow", "write 64 MiB", number, name, mount, lambda: write_and_sync(mount.path / "new"))
        (mount.path / "jobs").mkdir()
        for case, job in work_on(mount.path / "jobs", made, SMALL).items():
            if case not in ("find", "grep -r"):
                timed(bench, "slow", case, number, name, mount, job)
    if name != "sshfs":
        with over_sshfs(name, remote, work, ssh_config) as mount:
            for case, job in reading(mount.path).items():
                timed(bench, "slow", f"{case} remounted", number, name, mount, job)
    for left in ("jobs", "new"):
        shutil.rmtree(remote / left, ignore_errors=True)
        (remote / left).unlink(missing_ok=True)


def reading(root: Path) -> dict[str, Callable[[], int]]:
    def once(*command: str, allowed: tuple[int, ...] = (0,)) -> Callable[[], int]:
        def job() -> int:
            run(command, cwd=root, allowed=allowed)
            return 1

        return job

    return {
        "find": once("find", "tree", "-type", "f"),
        "grep -r": once("grep", "-rc", "no such text", "tree", allowed=(1,)),
        "random 4k": lambda: read_some(root / "g", 100),
        "stream": lambda: read_all(root / "f") and 1,
    }


def write_and_sync(path: Path) -> int:
    write_file(path, 64 * MIB)
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    return 1


def bandwidth(bench: Run, number: int, remote: Path, ssh_config: Path) -> None:
    """What the way there gives: the same file by one ssh, with no file system."""
    nothing = Mounted(remote, None, ssh_config)
    command = f"ssh -F {ssh_config} far cat {remote}/f >/dev/null"
    timed(bench, "slow", "stream cold", number, "ssh cat", nothing, lambda: run(["sh", "-c", command]) is None or 1)


@contextlib.contextmanager
def over_sshfs(name: str, remote: Path, work: Path, ssh_config: Path) -> Iterator[Mounted]:
    """A new sshfs, and on it a new mount of cachefs or rclone; the kernel's caches are empty."""
    near = work / "near"
    near.mkdir(parents=True, exist_ok=True)
    command = ["sshfs", "-f", "-F", str(ssh_config), f"far:{remote}", str(near)]
    try:
        with service(command, lambda: os.path.ismount(near), work / "sshfs.log", stop=lambda: unmount(near)) as process:
            drop_kernel_caches()
            if name == "sshfs":
                yield Mounted(near, process.pid, work / "sshfs.log")
            else:
                with mounted(PEERS[name], near, work) as mount:
                    yield mount
    finally:
        if os.path.ismount(near):
            unmount(near)


@contextlib.contextmanager
def far_away(work: Path) -> Iterator[Path]:
    """An sshd of our own with keys of its own, behind the relay; the configuration by which `ssh` finds it as `far`."""
    for name in ("host", "user"):
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(work / name)])
    shutil.copy(work / "user.pub", work / "authorized")
    port, relay_port = free_port(), free_port()
    made_privsep = os.geteuid() == 0 and not PRIVSEP.exists()
    if made_privsep:
        PRIVSEP.mkdir(mode=0o755)
    (work / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {work}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {work}/authorized\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        "Subsystem sftp internal-sftp\nMaxStartups 50\n"
    )
    config = work / "ssh_config"
    config.write_text(
        f"Host far\n HostName 127.0.0.1\n Port {relay_port}\n User {getpass.getuser()}\n IdentityFile {work}/user\n"
        f" IdentitiesOnly yes\n UserKnownHostsFile {work}/known\n StrictHostKeyChecking accept-new\n BatchMode yes\n"
    )
    sshd = [SSHD, "-D", "-e", "-f", str(work / "sshd_config")]
    relay = [sys.executable, str(Path(__file__).with_name("relay.py")), str(relay_port), str(port), str(DELAY_SECONDS)]
    try:
        with (
            service(sshd, lambda: listens(port), work / "sshd.log"),
            service(relay, lambda: listens(relay_port), work / "relay.log"),
        ):
            check(config, work)
            yield config
    finally:
        if made_privsep:
            with contextlib.suppress(OSError):
                PRIVSEP.rmdir()


def check(config: Path, work: Path) -> None:
    try:
        run(["ssh", "-F", str(config), "far", "true"], timeout=20)
    except Failed as error:
        raise Failed(f"{error}; sshd says: {(work / 'sshd.log').read_text()[-300:]}") from None


def free_port() -> int:
    with socket.socket() as ours:
        ours.bind(("127.0.0.1", 0))
        number: int = ours.getsockname()[1]
        return number


def listens(port: int) -> bool:
    with socket.socket() as ours:
        ours.settimeout(1)
        return ours.connect_ex(("127.0.0.1", port)) == 0
