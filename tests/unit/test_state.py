"""State directory, lock and registry: who may hold a state, who has to wait, who is listed."""

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs import mountinfo, state
from cachefs.config import Config, make_config
from cachefs.errors import CachefsError
from cachefs.state import SERVING, State, daemons, find_daemon, state_directory


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory of this test's own, and no wait before words."""
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(state, "_QUIET_SECONDS", 0.0)
    return tmp_path / "run"


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The mountpoints that the kernel is made to know."""
    mountpoints: set[str] = set()
    monkeypatch.setattr(mountinfo, "is_cachefs", lambda path, pid=None: path in mountpoints)
    return mountpoints


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_of(tmp_path, "source", "mountpoint")


def config_of(tmp_path: Path, source: str, mountpoint: str) -> Config:
    return make_config(str(tmp_path / source), str(tmp_path / mountpoint), {"state_dir": str(tmp_path / "state")})


@pytest.fixture
def held(config: Config) -> Iterator[State]:
    opened = State.open(config)
    yield opened
    opened.close()


def test_the_state_directory_is_private_and_belongs_to_the_source(held: State, config: Config) -> None:
    assert held.directory == state_directory(config)
    assert stat.S_IMODE(os.stat(held.directory).st_mode) == 0o700
    assert os.listdir(held.directory) != []
    assert stat.S_IMODE(os.stat(os.path.dirname(held.socket_path)).st_mode) == 0o700


def test_where_state_lives_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = make_config("/source", "/mountpoint")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert os.path.dirname(state_directory(config)) == "/var/lib/cachefs"
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert os.path.dirname(state_directory(config)) == str(tmp_path / "cachefs")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert os.path.dirname(state_directory(config)) == str(tmp_path / ".local/state/cachefs")


def test_where_sockets_live_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CACHEFS_RUNTIME_DIR")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert state.runtime_directory() == "/run/cachefs"
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert state.runtime_directory() == str(tmp_path / "cachefs")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
    assert state.runtime_directory() == "/tmp/cachefs-4711"


def test_a_directory_that_is_not_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(CachefsError, match="not a directory of yours"):
            state.make_private(str(tmp_path / name))
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(CachefsError, match="not a directory of yours"):
        state.make_private(str(tmp_path / "target"))


def test_a_state_directory_that_can_t_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(CachefsError, match="give another with --state-dir"):
        State.open(config_of(tmp_path, "source", "mountpoint"))


def test_state_below_the_mountpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CachefsError, match="would hide"):
        State.open(make_config(str(tmp_path / "source"), str(tmp_path), {"state_dir": str(tmp_path / "state")}))


def test_a_second_daemon_on_a_served_state_is_refused(held: State, config: Config, mounted: set[str]) -> None:
    held.publish(SERVING)
    mounted.add(config.mountpoint)
    with pytest.raises(CachefsError) as refused:
        State.open(config)
    assert f"already mounted on {config.mountpoint} by process {os.getpid()}" in str(refused.value)


@pytest.mark.parametrize("how", ["stopping", "unmounted", "starting"])
def test_a_predecessor_that_finishes_is_waited_for(
    how: str, config: Config, mounted: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    predecessor = State.open(config)
    if how != "starting":
        predecessor.publish(SERVING)
    if how == "stopping":
        mounted.add(config.mountpoint)
        predecessor.mark_stopping()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        predecessor.close()

    successor = State.open(config, say=say)
    successor.close()
    what = "start" if how == "starting" else "finish writing out"
    assert said == [f"waiting for pid {os.getpid()} to {what}"]


def test_the_wait_for_a_predecessor_is_bounded(held: State, config: Config, mounted: set[str]) -> None:
    held.mark_stopping()
    with pytest.raises(CachefsError, match=r"did not finish writing out in 0 seconds: see .*cachefs.log"):
        State.open(config, wait_seconds=0)


def test_a_stale_record_does_not_refuse(held: State, config: Config, mounted: set[str]) -> None:
    """The record names a process that is gone: whoever holds the lock has not written its own yet."""
    mounted.add(config.mountpoint)
    path = os.path.join(held.directory, "daemon.json")
    text = Path(path).read_text().replace(f'"pid": {os.getpid()}', '"pid": 4194399').replace("starting", "serving")
    Path(path).write_text(text)
    with pytest.raises(CachefsError, match="did not finish"):
        State.open(config, wait_seconds=0)


def test_the_lock_survives_a_fork_and_dies_with_the_last_process(config: Config, mounted: set[str]) -> None:
    opened = State.open(config)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    opened.leave_to_child()
    try:
        assert state.is_held(opened.directory)
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(child, 0)
    assert not state.is_held(opened.directory)
    State.open(config).close()


def test_what_the_last_holder_left_mounted_is_released(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = State.open(config)
    os.close(killed.lock_fd)  # as the kernel does: the record stays
    released: list[str] = []
    monkeypatch.setattr(mountinfo, "release_if_dead", released.append)
    State.open(config).close()
    assert released == [config.mountpoint]


def test_live_daemons_are_listed_and_found(tmp_path: Path, mounted: set[str]) -> None:
    second = State.open(config_of(tmp_path, "other", "b"))
    first = State.open(config_of(tmp_path, "source", "a"))
    first.publish(SERVING, metrics="http://127.0.0.1:9477/metrics")
    try:
        assert [os.path.basename(record.mountpoint) for record in daemons()] == ["a", "b"]
        assert find_daemon(str(tmp_path / "a")) == first.record
        assert find_daemon(str(tmp_path / "other")) == second.record
        assert find_daemon(str(tmp_path)) is None
        assert first.record.metrics == "http://127.0.0.1:9477/metrics"
    finally:
        first.close()
        second.close()
    assert daemons() == []


def test_what_a_killed_daemon_left_in_the_registry_is_dropped(config: Config, runtime: Path) -> None:
    killed = State.open(config)
    Path(killed.socket_path).touch()
    (runtime / "garbage.json").write_text("{")
    os.close(killed.lock_fd)
    assert daemons() == []
    assert sorted(os.listdir(runtime)) == ["garbage.json"]


def test_no_runtime_directory_means_no_daemons() -> None:
    assert daemons() == []


def test_stopping_on_a_full_disk_goes_on(held: State, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str, text: str) -> None:
        raise CachefsError("can't write: No space left on device")

    monkeypatch.setattr(state, "_write_atomically", full)
    held.mark_stopping()


def test_two_that_start_at_once_are_told_apart(config: Config, mounted: set[str]) -> None:
    """One gets the state, the other waits for it and is refused when the first one serves."""
    first = State.open(config)
    waiting, refused = threading.Event(), threading.Event()

    def second() -> None:
        try:
            State.open(config, say=lambda line: waiting.set())
        except CachefsError:
            refused.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert waiting.wait(10)
    mounted.add(config.mountpoint)
    first.publish(SERVING)
    thread.join(10)
    first.close()
    assert refused.is_set()
