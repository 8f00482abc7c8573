"""mount(8) and fstab with both types, and the links in /sbin that they need."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import ROOT, Command, Done, ended, is_mounted

from cachefs import mountinfo

HELPERS = ("mount.cachefs", "mount.fuse.cachefs")
MOUNT_FAILURE = 32  # of mount(8)
pytestmark = [
    pytest.mark.mount,
    pytest.mark.timeout(60),
    pytest.mark.skipif(os.geteuid() != 0, reason="mount(8) and /sbin want root"),
]


@pytest.fixture(scope="module", autouse=True)
def helpers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """/sbin/mount.cachefs and /sbin/mount.fuse.cachefs: the installed ones, or links of our own for as long as this takes."""
    script = tmp_path_factory.mktemp("helper") / "helper"
    script.write_text(f"#!{sys.executable}\nfrom cachefs.cli.helper import main\nmain()\n")
    script.chmod(0o755)
    made = []
    try:
        for name in HELPERS:
            with contextlib.suppress(FileExistsError):
                os.symlink(script, f"/sbin/{name}")
                made.append(name)
        yield
    finally:
        for name in made:
            os.unlink(f"/sbin/{name}")


def options_of(cachefs: Command, words: str = "") -> str:
    return ",".join(filter(None, [words, f"state_dir={cachefs.base}/state", "metrics=127.0.0.1:0"]))


def mount_8(cachefs: Command, *words: str | Path) -> Done:
    return cachefs.call("mount", *words)


def mounted_well(done: Done) -> None:
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done


def flags_of(path: Path) -> set[str]:
    """The flags of a mount, as in the sixth field of mountinfo."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == str(path):
            return set(fields[5].split(","))
    return set()


@pytest.mark.parametrize("fstype", ["cachefs", "fuse.cachefs"])
def test_mount_8_with_options(cachefs: Command, fstype: str) -> None:
    (cachefs.source / "file").write_text("text")
    words = "noatime,nosuid,nodev,noexec,_netdev,x-systemd.automount,fsname=x\\,y,cache_size=32M,policy=lru"
    mounted_well(mount_8(cachefs, "-t", fstype, "-o", options_of(cachefs, words), cachefs.source, cachefs.path))
    assert (cachefs.path / "file").read_text() == "text"
    assert flags_of(cachefs.path) == {"rw", "noatime", "nosuid", "nodev", "noexec"}
    mount = mountinfo.top_mount(str(cachefs.path))
    assert mount is not None
    assert (mount.fstype, mount.source) == ("fuse.cachefs", "x,y")
    status = cachefs.status()
    assert status["statistics"]["cache"]["capacity_bytes"] == 32 << 20
    assert status["statistics"]["policy"] == "lru"

    program = cachefs.path / "program"
    shutil.copy("/bin/true", program)
    with pytest.raises(PermissionError):
        subprocess.run([program], timeout=60)
    assert (cachefs.source / "program").stat().st_mode & 0o111

    subprocess.run(["umount", str(cachefs.path)], check=True, timeout=60)
    cachefs.run("umount", cachefs.path)  # waits for the daemon; there may be none any more
    cachefs.nothing_left()


def test_suid_and_dev_are_on_in_fstab_and_off_on_the_command_line(cachefs: Command) -> None:
    """As for every file system that mount(8) mounts, and as for every one that a FUSE program mounts itself."""
    mounted_well(mount_8(cachefs, "-t", "cachefs", "-o", options_of(cachefs), cachefs.source, cachefs.path))
    assert not flags_of(cachefs.path) & {"nosuid", "nodev", "noexec"}
    cachefs.umount_well()
    cachefs.mount()
    assert {"nosuid", "nodev"} <= flags_of(cachefs.path)
    mounted_well(mount_8(cachefs, "-o", "remount,rw", cachefs.path))
    cachefs.umount_well()
    cachefs.mount("-o", "suid,dev,noexec")
    assert flags_of(cachefs.path) & {"nosuid", "nodev", "noexec"} == {"noexec"}
    cachefs.umount_well()


@pytest.mark.parametrize("how", ["-r", "-oro"])
def test_a_mount_that_is_read_only(cachefs: Command, how: str) -> None:
    (cachefs.source / "file").write_text("text")
    mounted_well(mount_8(cachefs, "-t", "cachefs", how, "-o", options_of(cachefs), cachefs.source, cachefs.path))
    assert (cachefs.path / "file").read_text() == "text"
    for change in (
        lambda: (cachefs.path / "file").write_text("other"),
        lambda: (cachefs.path / "new").touch(),
        lambda: (cachefs.path / "file").unlink(),
        lambda: (cachefs.path / "file").chmod(0o600),
        lambda: os.utime(cachefs.path / "file"),
        lambda: (cachefs.path / "file").rename(cachefs.path / "other"),
        lambda: (cachefs.path / "directory").mkdir(),
        lambda: os.setxattr(cachefs.path / "file", "user.name", b"value"),
        lambda: os.truncate(cachefs.path / "file", 0),
    ):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS
    assert cachefs.run("sync", cachefs.path).returncode == 0
    cachefs.umount_well()
    assert (cachefs.source / "file").read_text() == "text"


def test_remount_takes_what_is_so_already_and_refuses_the_rest(cachefs: Command) -> None:
    words = options_of(cachefs, "noatime,cache_size=32M")
    mounted_well(mount_8(cachefs, "-t", "cachefs", "-o", words, cachefs.source, cachefs.path))
    pid = cachefs.record()["pid"]
    before = flags_of(cachefs.path)
    for same in ("remount,rw,noatime", "remount,rw,noatime,cache_size=32768K"):
        mounted_well(mount_8(cachefs, "-o", same, cachefs.path))
    for other, name in (("remount,noatime,cache_size=64M", "cache_size"), ("remount,ro,noatime", "ro/rw")):
        done = mount_8(cachefs, "-o", other, cachefs.path)
        assert done.returncode == MOUNT_FAILURE
        assert done.stderr == f"cachefs: {name} can't be changed while mounted: first run cachefs umount {cachefs.path}\n"
    assert flags_of(cachefs.path) == before
    assert cachefs.record()["pid"] == pid
    cachefs.umount_well()


def test_a_line_of_fstab(cachefs: Command) -> None:
    cachefs.source = cachefs.directory("so urce")
    fields = [str(path).replace(" ", "\\040") for path in (cachefs.source, cachefs.path)]
    fstab = cachefs.base / "fstab"
    words = options_of(cachefs, "defaults,noauto,nofail,user,cache_size=5%")
    fstab.write_text(" ".join([*fields, "cachefs", words, "0 0\n"]))
    mounted_well(mount_8(cachefs, "--fstab", fstab, cachefs.path))
    assert {"nosuid", "nodev", "noexec"} <= flags_of(cachefs.path)
    assert cachefs.record()["source"] == str(cachefs.source)
    (cachefs.path / "file").write_text("text")
    mounted_well(mount_8(cachefs, "--fstab", fstab, "-o", "remount", cachefs.path))
    done = mount_8(cachefs, "--fstab", fstab, cachefs.path)
    assert done.returncode == MOUNT_FAILURE
    cachefs.umount_well()
    assert (cachefs.source / "file").read_text() == "text"
    fstab.write_text(fstab.read_text().replace("noauto,", ""))
    mounted_well(mount_8(cachefs, "--fstab", fstab, "--all", "-t", "cachefs"))
    assert (cachefs.path / "file").read_text() == "text"
    mounted_well(mount_8(cachefs, "--fstab", fstab, "--all", "-t", "cachefs"))  # what is mounted is let be
    cachefs.umount_well()


def test_mount_8_over_a_killed_daemon(cachefs: Command) -> None:
    (cachefs.source / "file").write_text("text")
    mounted_well(mount_8(cachefs, "-t", "cachefs", "-o", options_of(cachefs), cachefs.source, cachefs.path))
    pid = cachefs.record()["pid"]
    os.kill(pid, 9)
    while not ended(pid):
        pass
    mounted_well(mount_8(cachefs, "-t", "cachefs", "-o", options_of(cachefs), cachefs.source, cachefs.path))
    assert (cachefs.path / "file").read_text() == "text"
    cachefs.umount_well()


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ("cache_size=12X", 1, "cachefs: --cache-size '12X' is not a size: write it like 512M, 2G or 10%\n"),
        ("no_such_thing", 1, "cachefs: no such mount option: no_such_thing\n"),
        ("metrics=127.0.0.1:1,state_dir=/proc/none", 32, "cachefs: can't use /proc/none/"),
    ],
)
def test_mount_8_hands_on_what_was_wrong(cachefs: Command, words: str, status: int, line: str) -> None:
    done = mount_8(cachefs, "-t", "cachefs", "-o", words, cachefs.source, cachefs.path)
    assert done.returncode == status
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert not is_mounted(cachefs.path)


def test_the_links_are_made_and_removed(tmp_path: Path) -> None:
    """`make install-system` and `make uninstall-system`, with another directory for /sbin and a project of two files."""
    project, sbin = tmp_path / "project", tmp_path / "sbin"
    for directory in (project / "scripts", project / ".venv" / "bin", sbin):
        directory.mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "mount_helpers.sh", project / "scripts")

    def call(what: str) -> Done:
        script = project / "scripts" / "mount_helpers.sh"
        environment = {**os.environ, "SBIN": str(sbin)}
        return subprocess.run(["bash", script, what], env=environment, capture_output=True, text=True, timeout=60, check=False)

    done = call("link")
    assert (done.returncode, done.stderr) == (1, "setup: there is no .venv/bin/mount.cachefs: run make install first\n")
    for name in HELPERS:
        (project / ".venv" / "bin" / name).write_text("#!/bin/sh\n")
        (project / ".venv" / "bin" / name).chmod(0o755)
    for _ in range(2):
        assert call("link").returncode == 0
        assert {path.name: path.readlink() for path in sbin.iterdir()} == {
            name: project / ".venv" / "bin" / name for name in HELPERS
        }
    for _ in range(2):
        assert call("unlink").returncode == 0
        assert list(sbin.iterdir()) == []
    (sbin / HELPERS[0]).write_text("somebody else's")
    done = call("link")
    assert done.returncode == 1
    assert done.stderr == f"setup: {sbin}/{HELPERS[0]} is there already and is not ours: remove it first\n"
    assert call("unlink").returncode == 0
    assert (sbin / HELPERS[0]).read_text() == "somebody else's"
