"""What options mean, which are refused, and what is checked before a mount."""

import os
from pathlib import Path

import pytest

from cachefs import config as config_module
from cachefs import mountinfo, preflight
from cachefs.config import Config, make_config, parse_metrics_address
from cachefs.errors import CachefsError, UsageError

GIBI = 1 << 30
MEBI = 1 << 20


def config_with(**options: str) -> Config:
    return make_config("/source", "/mountpoint", options, memory_bytes=16 * GIBI)


def test_defaults_work_with_no_option_at_all() -> None:
    config = config_with()
    assert config.cache_size_bytes == GIBI
    assert config.policy == config_module.DEFAULT_POLICY
    assert config.kernel_cache == "off"
    assert config.readahead_max_bytes == 16 * MEBI
    assert (config.dirty_limit_bytes, config.dirty_background_bytes) == (256 * MEBI, 128 * MEBI)
    assert (config.dirty_expire_seconds, config.writeback_interval_seconds, config.metadata_ttl_seconds) == (5, 1, 1)
    assert (config.metrics_host, config.metrics_port, config.metrics_asked) == ("127.0.0.1", 9477, False)
    assert (config.simulate_latency_seconds, config.simulate_bandwidth_bytes_per_second) == (0, 0)
    assert not config.read_only
    assert config.allow_other == (os.geteuid() == 0)


def test_the_default_cache_takes_at_most_a_quarter_of_a_small_memory() -> None:
    assert make_config("/s", "/m", memory_bytes=GIBI).cache_size_bytes == GIBI // 4


def test_percentages_are_of_memory_and_of_the_cache() -> None:
    config = config_with(cache_size="10%", dirty_limit="50%", dirty_background="10%")
    assert config.cache_size_bytes == 16 * GIBI // 10 // 4096 * 4096
    assert config.dirty_limit_bytes == config.cache_size_bytes // 2 // 4096 * 4096
    assert config.dirty_background_bytes == config.cache_size_bytes // 10


def test_the_background_threshold_follows_the_limit() -> None:
    assert config_with(dirty_limit="64M").dirty_background_bytes == 32 * MEBI


def test_the_known_policies_are_those_that_exist() -> None:
    policy = pytest.importorskip("cachefs.cache.policy")
    assert set(config_module.POLICY_NAMES) == set(policy.POLICIES)


def test_every_option_is_read() -> None:
    values = {
        "cache_size": "64M", "policy": "lru", "kernel_cache": "keep", "readahead_max": "0", "dirty_limit": "16M",
        "dirty_background": "4M", "dirty_expire": "2s", "writeback_interval": "500ms", "metadata_ttl": "0",
        "backing": "network", "backing_timeout": "5s", "metrics": "off", "page": "off", "state_dir": "/state",
        "simulate_latency": "10ms", "simulate_bandwidth": "200M", "log_level": "debug", "read_only": "yes", "allow_other": "no",
        "fault_plan": "/plan", "durability": "journal", "journal_size": "64M", "fast_lane": "off", "pin_limit": "8M",
        "cpu_latency": "off", "write_through": "off",
        "rule": "comm=tar advice=noreuse",
    }  # fmt: skip
    assert set(values) == {option.name for option in config_module.OPTIONS}
    default, config = config_with(), config_with(**values)
    unchanged = {name for name in Config.__slots__ if getattr(config, name) == getattr(default, name)}
    assert unchanged <= {"source", "mountpoint", "metrics_host", "mount_flags", "fsname", "allow_other"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_size": "12X"}, "--cache-size '12X' is not a size"),
        ({"cache_size": "60K"}, "below 16 pages: give at least 64 KiB"),
        ({"cache_size": "1T"}, "more than the memory"),
        ({"cache_size": "101%"}, "--cache-size '101%'"),
        ({"dirty_limit": "51%"}, "above half the cache: give at most 512 MiB"),
        ({"dirty_limit": "100"}, "below one page"),
        ({"dirty_limit": "16M", "dirty_background": "17M"}, "above the dirty limit: give at most"),
        ({"readahead_max": "10%"}, "--readahead-max '10%' is not a size"),
        ({"dirty_expire": "5 days"}, "--dirty-expire '5 days' is not a time"),
        ({"writeback_interval": "0"}, "give at least 10ms"),
        ({"backing_timeout": "0"}, "--backing-timeout '0' is too short"),
        ({"policy": "lfu"}, "--policy 'lfu' is not one of lru, sieve, s3fifo; did you mean"),
        ({"kernel_cache": "on"}, "--kernel-cache 'on' is not one of off, open, keep"),
        ({"backing": "nfs"}, "--backing 'nfs' is not one of"),
        ({"metrics": "here"}, "not ADDRESS:PORT"),
        ({"metrics": "127.0.0.1:99999"}, "not ADDRESS:PORT"),
        ({"simulate_bandwidth": "fast"}, "--simulate-bandwidth 'fast' is not a bandwidth"),
        ({"read_only": "perhaps"}, "is not yes or no"),
        ({"cahe_size": "1G"}, "no such option: cahe_size; did you mean cache_size?"),
    ],
)
def test_bad_values_are_usage_errors_that_name_the_option(options: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        config_with(**options)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9477", ("127.0.0.1", 9477)), ("0.0.0.0:0", ("0.0.0.0", 0)), ("9478", ("127.0.0.1", 9478)),
        (":9478", ("127.0.0.1", 9478)), ("[::1]:9477", ("::1", 9477)), ("localhost:80", ("localhost", 80)),
        ("off", (None, 0)),
    ],
)  # fmt: skip
def test_metrics_address(text: str, address: tuple[str | None, int]) -> None:
    assert parse_metrics_address(text) == address


def test_paths_become_real_paths(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to("source")
    config = make_config(str(tmp_path / "link"), str(tmp_path / "source" / ".." / "m"))
    assert (config.source, config.mountpoint) == (str(tmp_path / "source"), str(tmp_path / "m"))


# --- before a mount


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A source and a mountpoint on a machine that has FUSE."""
    monkeypatch.setattr(preflight, "FUSE_DEVICE", os.devnull)
    source, mountpoint = tmp_path / "source", tmp_path / "mountpoint"
    source.mkdir()
    mountpoint.mkdir()
    return source, mountpoint


def refusal(source: Path, mountpoint: Path, **options: str) -> str:
    with pytest.raises(CachefsError) as refused:
        preflight.check_paths(make_config(str(source), str(mountpoint), options))
    assert refused.value.exit_status == 1
    assert "\n" not in str(refused.value)
    return str(refused.value)


def be_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)


def test_good_paths_pass(paths: tuple[Path, Path]) -> None:
    source, mountpoint = paths
    preflight.check_paths(make_config(str(source), str(mountpoint)))


def test_source_must_be_a_directory_that_exists(paths: tuple[Path, Path]) -> None:
    source, mountpoint = paths
    (source / "file").touch()
    assert "does not exist" in refusal(source / "absent", mountpoint)
    assert "is not a directory" in refusal(source / "file", mountpoint)
    assert "can't be reached: Not a directory" in refusal(source / "file" / "below", mountpoint)


def test_source_must_be_readable(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "is not readable" in refusal(*paths)


def test_source_and_mountpoint_must_not_overlap(paths: tuple[Path, Path]) -> None:
    source, mountpoint = paths
    (source / "inner").mkdir()
    (mountpoint / "inner").mkdir()
    (mountpoint / "alias").symlink_to(source)
    assert "are both" in refusal(source, source)
    assert "are both" in refusal(source, mountpoint / "alias")
    assert "is inside SOURCE" in refusal(source, source / "inner")
    assert "would hide it" in refusal(mountpoint / "inner", mountpoint)
    assert "is inside SOURCE /" in refusal(Path("/"), mountpoint)


def test_a_name_that_only_begins_alike_is_no_overlap(paths: tuple[Path, Path]) -> None:
    source, _ = paths
    neighbour = source.with_name("source-mount")
    neighbour.mkdir()
    preflight.check_paths(make_config(str(source), str(neighbour)))


def test_mountpoint_must_be_a_directory_that_exists(paths: tuple[Path, Path]) -> None:
    source, mountpoint = paths
    (mountpoint / "file").touch()
    assert "mkdir -p" in refusal(source, mountpoint / "absent")
    assert "is not a directory" in refusal(source, mountpoint / "file")


def test_a_mounted_mountpoint_is_refused(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountinfo, "is_cachefs", lambda path, pid=None: True)
    assert "is already a cachefs: first run cachefs umount" in refusal(*paths)


def test_without_the_device_the_line_says_how_to_get_it(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "FUSE_DEVICE", "/nonexistent/fuse")
    assert "modprobe fuse" in refusal(*paths)


def test_a_device_that_can_t_be_opened_is_one_line(
    paths: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(preflight, "FUSE_DEVICE", str(tmp_path))
    assert "can't be opened (Is a directory): modprobe fuse" in refusal(*paths)


def test_a_user_needs_fusermount3(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    be_a_user(monkeypatch)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "apt install fuse3" in refusal(*paths)


def test_a_user_needs_leave_for_allow_other(paths: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    be_a_user(monkeypatch)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    conf = tmp_path / "fuse.conf"
    conf.write_text("# user_allow_other\n")
    monkeypatch.setattr(preflight, "FUSE_CONF", str(conf))
    assert "user_allow_other" in refusal(*paths, allow_other="yes")
    conf.write_text("user_allow_other\n")
    preflight.check_paths(make_config(str(paths[0]), str(paths[1]), {"allow_other": "yes"}))


# --- what is mounted

MOUNTINFO = rb"""22 1 0:20 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 22 0:40 / /mnt/with\040space\134 rw,nosuid - fuse.cachefs /srv/\377 rw,user_id=0
31 30 0:41 / /mnt/a rw - fuse.cachefs /srv/a rw
32 31 0:42 / /mnt/a rw - tmpfs tmpfs rw
nonsense
"""


def test_mountinfo_is_read_with_its_escapes() -> None:
    mounts = mountinfo.parse(MOUNTINFO)
    assert [mount.mountpoint for mount in mounts] == ["/", "/mnt/with space\\", "/mnt/a", "/mnt/a"]
    assert mounts[1] == mountinfo.Mount("/mnt/with space\\", "fuse.cachefs", "/srv/\udcff", "0:40")


def test_the_topmost_mount_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountinfo, "mounts", lambda pid: mountinfo.parse(MOUNTINFO))
    assert mountinfo.is_cachefs("/mnt/with space\\")
    assert not mountinfo.is_cachefs("/mnt/a")
    assert not mountinfo.is_cachefs("/mnt/b")


def test_what_a_killed_cachefs_left_is_unmounted(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ["dead", "dead"]
    monkeypatch.setattr(mountinfo, "is_dead", lambda path: bool(layers))
    monkeypatch.setattr(mountinfo, "is_cachefs", lambda path: True)
    monkeypatch.setattr(mountinfo, "detach", lambda path: layers.pop())
    assert mountinfo.release_if_dead("/mnt/a")
    assert not mountinfo.release_if_dead("/mnt/a")


def test_another_program_s_dead_mount_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountinfo, "is_dead", lambda path: True)
    monkeypatch.setattr(mountinfo, "is_cachefs", lambda path: False)
    with pytest.raises(CachefsError, match="umount -l"):
        mountinfo.release_if_dead("/mnt/a")
