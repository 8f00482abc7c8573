"""The crash suite's checker: it accepts what may be and finds everything else. No mount: a plain directory is a correct one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checking import PAGE, check
from contents import stamp
from record import DONE, INTENT, Record
from tree import Operation, Tree
from workload import Workload
from writers import replay

from cachefs.transport.negotiate import WRITE_MAX_BYTES

OPERATIONS = 600


class Scene:
    """A directory that a workload has been at, and the tree that its record makes."""

    def __init__(self, base: Path, seed: int = 1) -> None:
        self.root = base / "w1"
        self.root.mkdir(mode=0o755)
        self.record = Record(base / "record")
        root_fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        steps = iter(range(OPERATIONS))
        Workload(Tree(1), root_fd, self.record, seed, 0).run(lambda: next(steps, None) is None)
        os.close(root_fd)
        self.tree = Tree(1)
        self.pending, complaints = replay(self.record, self.tree)
        assert complaints == []

    def complaints(self, pending: Operation | None = None) -> list[str]:
        found, self.tree = check(self.tree, pending, self.root)
        return found

    def largest(self) -> tuple[Path, int]:
        path, file = max(self.tree.names.items(), key=lambda item: len(item[1].data))
        return self.root / path, file.number

    def change(self, path: Path, offset: int, data: bytes) -> None:
        """What a bug would do: the times stay."""
        times = os.stat(path)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def scene(tmp_path: Path, no_umask: None) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.record.close()


@pytest.mark.parametrize("seed", range(5))
def test_a_plain_directory_holds_what_the_record_says(tmp_path: Path, no_umask: None, seed: int) -> None:
    scene = Scene(tmp_path, seed)
    assert scene.pending is None
    assert scene.complaints() == []
    assert len(scene.tree.names) > 3 and len(scene.tree.directories) > 1
    scene.record.close()


def flip_a_byte(scene: Scene) -> str:
    path, _ = scene.largest()
    scene.change(path, 77, bytes([path.read_bytes()[77] ^ 0x55]))
    return "1 pages differ: from 77 on"


def exchange_two_pages(scene: Scene) -> str:
    path, _ = scene.largest()
    data = path.read_bytes()
    scene.change(path, 0, data[PAGE : 2 * PAGE] + data[:PAGE])
    return "meant for"


def put_another_files_page(scene: Scene) -> str:
    path, number = scene.largest()
    scene.change(path, PAGE, stamp(1, number + 1, 9, PAGE, PAGE))
    return f"file {number + 1} of writer 1 by operation 9"


def lose_a_page(scene: Scene) -> str:
    path, _ = scene.largest()
    scene.change(path, PAGE, bytes(PAGE))
    return "zeros"


def lose_the_last_byte(scene: Scene) -> str:
    path, _ = scene.largest()
    os.truncate(path, path.stat().st_size - 1)
    return "bytes long instead of"


def add_a_byte(scene: Scene) -> str:
    path, _ = scene.largest()
    scene.change(path, path.stat().st_size, b"\0")
    return "bytes long instead of"


def lose_a_file(scene: Scene) -> str:
    scene.largest()[0].unlink()
    return "is missing"


def bring_a_file_back(scene: Scene) -> str:
    (scene.root / "f99").touch()
    return "should not be there"


def change_the_mode(scene: Scene) -> str:
    scene.largest()[0].chmod(0o601)
    return "has mode"


def change_the_owner(scene: Scene) -> str:
    os.chown(scene.largest()[0], 1, 1)
    return "has owner"


def change_the_mtime(scene: Scene) -> str:
    path, number = scene.largest()
    scene.tree.apply(("stat", number), os.stat(path).st_mtime_ns)
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 1))
    return "has mtime"


def make_a_copy_of_a_link(scene: Scene) -> str:
    path, _ = scene.largest()
    scene.tree.apply(("link", str(path.relative_to(scene.root)), "f98"))
    (scene.root / "f98").write_bytes(path.read_bytes())
    return "link count"


def lose_a_directory(scene: Scene) -> str:
    scene.tree.apply(("mkdir", "d99", 0o755))
    return "'d99' is missing"


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte, exchange_two_pages, put_another_files_page, lose_a_page, lose_the_last_byte, add_a_byte, lose_a_file,
        bring_a_file_back, change_the_mode, change_the_owner, change_the_mtime, make_a_copy_of_a_link, lose_a_directory,
    ],
)  # fmt: skip
def test_damage_is_found_and_named(scene: Scene, damage: Callable[[Scene], str]) -> None:
    word = damage(scene)
    assert any(word in line for line in scene.complaints()), scene.complaints()


def test_an_acknowledgement_that_the_directory_does_not_know_is_found(scene: Scene) -> None:
    _, number = scene.largest()
    scene.record.append(INTENT, ("write", number, 0, 10, 4_000_000))
    scene.record.append(DONE, 10)
    replay(scene.record, scene.tree)
    assert any("instead of" in line for line in scene.complaints())


@pytest.mark.parametrize("happened", [True, False])
def test_an_operation_under_way_may_have_happened_or_not(scene: Scene, happened: bool) -> None:
    path, _ = scene.largest()
    name = str(path.relative_to(scene.root))
    if happened:
        path.rename(scene.root / "f97")
    assert scene.complaints(("rename", name, "f97")) == []
    assert (("f97" if happened else name) in scene.tree.names) and scene.complaints() == []


def test_another_change_than_the_one_under_way_is_found(scene: Scene) -> None:
    path, _ = scene.largest()
    path.rename(scene.root / "f96")
    assert scene.complaints(("rename", str(path.relative_to(scene.root)), "f97")) != []


@pytest.mark.parametrize("pages", [(), (1,), (0, 2), (0, 1, 2), (2, 3)])
def test_a_write_under_way_may_have_happened_page_by_page(scene: Scene, pages: tuple[int, ...]) -> None:
    path, number = scene.largest()
    offset, length = len(scene.tree.files[number].data) // PAGE * PAGE - 2 * PAGE + 100, 3 * PAGE
    data, first = stamp(1, number, 5_000_000, offset, length), offset // PAGE
    for page in pages:
        start, stop = max(offset, (first + page) * PAGE), min(offset + length, (first + page + 1) * PAGE)
        scene.change(path, start, data[start - offset : stop - offset])
    assert scene.complaints(("write", number, offset, length, 5_000_000)) == []
    assert scene.complaints() == []


def test_a_write_under_way_may_have_set_the_time_and_left_the_bytes_as_they_were(scene: Scene) -> None:
    """Seen in CI: one byte, which the cell that it belongs to had already; the next check complained of its time."""
    path, number = scene.largest()
    scene.tree.apply(("stat", number), os.stat(path).st_mtime_ns)
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 1))
    assert path.read_bytes()[136:137] == stamp(1, number, 5_000_000, 136, 1)
    assert scene.complaints(("write", number, 136, 1, 5_000_000)) == []
    assert scene.complaints() == []


def test_the_rest_of_a_write_may_have_arrived_as_far_as_its_first_request(scene: Scene) -> None:
    """Seen in CI: the writer was told of the first request of 512 KiB, the second was done when the daemon was killed."""
    path, number = scene.largest()
    offset, length = len(scene.tree.files[number].data) - 100, WRITE_MAX_BYTES + 67_095
    scene.change(path, offset, stamp(1, number, 5_000_000, offset, WRITE_MAX_BYTES))
    assert scene.complaints(("write", number, offset, length, 5_000_000)) == []
    assert scene.complaints() == []


def test_half_a_page_of_a_write_under_way_is_found(scene: Scene) -> None:
    path, number = scene.largest()
    scene.change(path, 0, stamp(1, number, 5_000_000, 0, PAGE // 2))
    assert scene.complaints(("write", number, 0, PAGE, 5_000_000)) != []


@pytest.mark.parametrize(("done", "excused"), [((1 << 20) - 100, True), (5000, True), ((1 << 20) + 1_000_000, False)])
def test_a_long_write_under_way_may_be_cut_between_two_requests_once(scene: Scene, done: int, excused: bool) -> None:
    """Of [100, 3 MiB) `done` bytes arrived; where that is no excuse, there is a second cut of which nobody knows."""
    path, number = scene.largest()
    length = 3 << 20
    data = stamp(1, number, 5_000_000, 100, length)
    scene.change(path, 100, data[:done])
    if not excused:
        for start in (5_000, 100_000, 200_000):
            scene.change(path, start, bytes(50))
    assert (scene.complaints(("write", number, 100, length, 5_000_000)) == []) == excused


def test_a_write_under_way_excuses_no_other_page(scene: Scene) -> None:
    path, number = scene.largest()
    scene.change(path, PAGE, bytes(PAGE))
    assert scene.complaints(("write", number, 0, PAGE, 5_000_000)) != []
