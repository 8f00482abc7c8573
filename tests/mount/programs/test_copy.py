"""tar and rsync through the mount: a tree several times as large as the cache arrives, comes back, and is the same."""

import os
import random
from pathlib import Path

import pytest
from running import CACHE_BYTES, ProgramMount, run

pytestmark = pytest.mark.mount


def write_tree(root: Path, nbytes: int) -> None:
    """Small and large files, an empty and a sparse one, links of both kinds, names and modes that trip careless programs."""
    chance = random.Random(2)
    written = number = 0
    while written < nbytes:
        directory = root / f"d{number % 7}" / f"e{number % 3}"
        directory.mkdir(parents=True, exist_ok=True)
        size = chance.choice((0, 1, 4095, 4096, 4097, 60_000, 1 << 20, 3_000_001))
        (directory / f"f{number}").write_bytes(chance.randbytes(size))
        written, number = written + size, number + 1
    for name in ("empty", "a b", "-x", "new\nline", "ü", "*", "x" * 255):
        (root / name).write_text(name)
    with open(root / "sparse", "wb") as file:
        os.pwrite(file.fileno(), b"end", 20_000_000)
    (root / "link").symlink_to("d0/e0/f0")
    (root / "dangling").symlink_to("/nowhere")
    os.link(root / "a b", root / "second name")
    (root / "d0").chmod(0o2750)
    (root / "-x").chmod(0o4755)
    (root / "closed").mkdir(mode=0o700)
    os.utime(root / "empty", ns=(1_000_000_001, 1_234_567_890_123_456_789))


def assert_same(one: Path, other: Path) -> None:
    """By rsync's checksums, modes, times and links."""
    words = ("rsync", "--archive", "--hard-links", "--checksum", "--dry-run", "--itemize-changes", "--delete")
    assert run(*words, f"{one}/", f"{other}/") == ""


def test_tree_survives_tar_and_rsync(program_mount: ProgramMount, tmp_path: Path) -> None:
    tree, copies = tmp_path / "tree", program_mount.mountpoint
    write_tree(tree, (2 if program_mount.kernel_cache == "off" else 1) * CACHE_BYTES)
    run("rsync", "--archive", "--hard-links", f"{tree}/", f"{copies}/one/")
    (copies / "two").mkdir()
    run("tar", "--create", "--sparse", "--file", copies / "archive.tar", "--directory", copies / "one", ".")
    run("tar", "--compare", "--file", copies / "archive.tar", "--directory", tree)
    run("tar", "--extract", "--preserve-permissions", "--file", copies / "archive.tar", "--directory", copies / "two")
    assert_same(tree, copies / "one")
    assert_same(copies / "one", copies / "two")
    run("diff", "-r", "--no-dereference", tree, copies / "two")
    program_mount.sync()
    assert_same(tree, program_mount.source / "one")
    program_mount.unmount()
    assert_same(tree, program_mount.source / "two")


def test_writeback_after_a_rename_is_not_seen_as_a_change(program_mount: ProgramMount) -> None:
    """tar complains of a file whose ctime moves while it reads."""
    for number in range(20):
        path = program_mount.mountpoint / f"new{number}"
        path.write_bytes(b"x" * 3_000_000)
        os.utime(path, ns=(0, number))
        path.rename(program_mount.mountpoint / f"file{number}")
    paths = sorted(program_mount.mountpoint.iterdir())
    before = [(st.st_ctime_ns, st.st_mtime_ns, st.st_size) for st in map(os.stat, paths)]
    program_mount.sync()
    for path in paths:  # reading makes the kernel ask for attributes again
        assert len(path.read_bytes()) == 3_000_000
    assert [(st.st_ctime_ns, st.st_mtime_ns, st.st_size) for st in map(os.stat, paths)] == before
