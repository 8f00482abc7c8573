"""SIGKILL at any moment: nothing that was acknowledged is lost, and nothing is another file's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from campaign import Faults
from daemons import Crashed, Place, Spawner, wait_until
from scenes import campaign, durability, seed_of

from cachefs import mountinfo

KERNEL_CACHE_MODES = ("off", "open", "keep")
SHORT, LONG = 34, 167  # kills in one mode: 100 and 500 in all three
LONG_SECONDS = 1800

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not os.path.exists("/dev/fuse") or shutil.which("fusermount3") is None, reason="no FUSE here"),
]
long = [pytest.mark.crash, pytest.mark.timeout(LONG_SECONDS)]
kills = pytest.mark.parametrize("kills", [SHORT, pytest.param(LONG, marks=long)])
modes = pytest.mark.parametrize("kernel_cache", KERNEL_CACHE_MODES)


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory for one campaign; not pytest's, which would keep it."""
    path = Path(tempfile.mkdtemp(prefix="cachefs-crash-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def place(base: Path) -> Iterator[Place]:
    spawner = Spawner()
    place = Place(base, spawner)
    yield place
    place.remove()
    spawner.close()


@modes
@kills
def test_no_acknowledged_write_is_lost_and_every_committed_transaction_is_there(
    base: Path, kernel_cache: str, kills: int
) -> None:
    with campaign(base, seed_of(f"{kernel_cache} {kills}"), ["--kernel-cache", kernel_cache]) as running:
        running.run(kills)
        print(running.summary())
        assert all(writer.acknowledged >= kills // 4 for writer in running.writers), running.summary()


@pytest.mark.parametrize("kills", [12, pytest.param(LONG, marks=long)])
@pytest.mark.parametrize("kernel_cache", ["off", "keep"])
def test_none_is_lost_while_the_backing_fails_and_falls_short(base: Path, kernel_cache: str, kills: int) -> None:
    options = ["--kernel-cache", kernel_cache]
    with campaign(base, seed_of(f"faults {kernel_cache} {kills}"), options, faults=True, sqlite=False) as running:
        running.run(kills)
        print(running.summary())


def test_without_a_journal_the_same_kills_lose_writes(base: Path) -> None:
    """The campaign can fail: what it finds nothing wrong with above is because of the journal."""
    options = [*durability("none"), "--write-through", "off"]
    with campaign(base, seed_of("no journal"), options, sqlite=False) as running, pytest.raises(Crashed) as found:
        running.run(SHORT)
    assert "the mount: writer" in str(found.value)


def test_without_a_journal_what_was_written_through_is_there(base: Path) -> None:
    """And not because it finds fault with everything: through O_DSYNC nothing is acknowledged that is not in SOURCE."""
    with campaign(base, seed_of("O_DSYNC"), durability("none"), sqlite=False, synchronous=True) as running:
        running.run(SHORT // 2)


def test_a_daemon_killed_while_its_first_request_waits_is_gone(place: Place) -> None:
    """A request of its own would keep it from ending: only its end takes the connection away that it waits for."""
    faults = Faults(place.base / "plan")
    faults.set([{"op": "fstat", "delay_seconds": 0.7}])
    place.options = ["--fault-plan", str(faults.path)]
    place.begin()
    wait_until(lambda: mountinfo.top_mount(str(place.path)) is not None, "the mount")
    place.ended(0.2)
    assert place.kill()
    faults.set([])
    place.start()
    place.unmount()
