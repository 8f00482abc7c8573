"""What programs ask of a store that is far away: little when cold, next to nothing when warm, and never wrong for long."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.mount

FILES = 20
DISTANT = ("--backing", "network", "--metadata-ttl", "1h")


def calls_of(mount: Any) -> Counter[str]:
    """Calls to the store so far, by kind."""
    durations = mount.ask("status")["statistics"]["backing"]["durations"]
    return Counter({op: sum(histogram["counts"]) for op, histogram in durations.items()})


def read_like_tar(directory: Path) -> None:
    for name in sorted(os.listdir(directory)):
        with open(directory / name, "rb") as file:
            before = os.fstat(file.fileno())
            assert len(file.read()) == before.st_size
            after = os.fstat(file.fileno())  # reading has made the kernel forget the time of the last access
            assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
            assert after.st_ctime_ns == before.st_ctime_ns


def test_cold_file_costs_an_open_and_a_read_and_a_warm_one_nothing(mounted: Callable[..., Any]) -> None:
    mount = mounted(*DISTANT)
    (mount.source / "d").mkdir()
    for number in range(FILES):
        (mount.source / "d" / f"f{number}").write_bytes(b"x" * (1000 * number + 1))
    start = calls_of(mount)
    read_like_tar(mount.path / "d")
    cold = calls_of(mount)
    assert (cold - start)["open"] <= FILES + 2  # the directory is opened too
    assert (cold - start)["read"] == FILES
    assert (cold - start)["stat"] <= 2
    read_like_tar(mount.path / "d")
    warm = calls_of(mount) - cold
    assert warm.keys() <= {"readdir", "lookup", "stat", "close"}, warm  # of the directory; its files are not asked for
    assert warm["stat"] <= 2


def test_name_that_is_not_there_is_asked_for_once_until_it_is_made(mounted: Callable[..., Any]) -> None:
    mount = mounted(*DISTANT)
    start = calls_of(mount)
    for _ in range(5):
        assert not (mount.path / "name").exists()
    assert (calls_of(mount) - start)["lookup"] == 1
    (mount.path / "name").write_text("made")
    assert (mount.path / "name").read_text() == "made"
    assert not (mount.path / "other").exists()
    (mount.path / "name").rename(mount.path / "other")
    assert (mount.path / "other").read_text() == "made"
    assert not (mount.path / "name").exists()
    os.link(mount.path / "other", mount.path / "name")
    assert (mount.path / "name").read_text() == "made"


def test_changes_made_here_are_believed_at_once(mounted: Callable[..., Any]) -> None:
    mount = mounted(*DISTANT)
    path, other = mount.path / "file", mount.path / "other"
    path.write_bytes(b"x" * 5000)
    path.chmod(0o600)
    os.link(path, other)
    assert (path.stat().st_mode & 0o777, path.stat().st_nlink, other.stat().st_size) == (0o600, 2, 5000)
    os.truncate(path, 100)
    assert (other.stat().st_size, other.read_bytes()) == (100, b"x" * 100)
    other.unlink()
    os.utime(path, ns=(1, 2))
    assert (path.stat().st_nlink, path.stat().st_atime_ns, path.stat().st_mtime_ns) == (1, 1, 2)


@pytest.mark.parametrize("ttl", ["0s", "50ms"])
def test_changes_made_elsewhere_are_noticed_after_the_ttl(mounted: Callable[..., Any], ttl: str) -> None:
    mount = mounted("--backing", "network", "--metadata-ttl", ttl)
    assert not (mount.path / "name").exists()
    (mount.source / "name").write_text("made elsewhere")
    wait_for(lambda: (mount.path / "name").exists())
    assert (mount.path / "name").read_text() == "made elsewhere"
    (mount.source / "name").write_text("and changed")
    wait_for(lambda: (mount.path / "name").stat().st_size == len("and changed"))
    assert (mount.path / "name").read_text() == "and changed"


def wait_for(true: Callable[[], bool]) -> None:
    """Looks until it is so; pytest's limit ends a test that waits in vain."""
    while not true():
        pass
