"""What one mount was asked to do: `Config`, and the table of options behind it.

The command line, `-o` and fstab give the same option names and the same strings; only `make_config` reads them.
"""

import difflib
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cachefs.errors import UsageError
from cachefs.rules import parse_rules
from cachefs.units import format_size, parse_bandwidth, parse_duration, parse_size

PAGE_BYTES = 4096
SMALLEST_CACHE_BYTES = 16 * PAGE_BYTES
DEFAULT_CACHE_BYTES = 1 << 30
UNPINNED_SHARE = 8  # at least one part in so many of the cache is neither pinned nor unwritten
SETTABLE = ("cache_size", "policy", "pin_limit")  # while mounted
POLICY_NAMES = ("lru", "sieve", "s3fifo")
DEFAULT_POLICY = "s3fifo"
KERNEL_CACHE_MODES = ("off", "open", "keep")
DURABILITIES = ("backing", "journal", "none")
BACKING_KINDS = ("auto", "local", "network")
PAGE_MODES = ("auto", "on", "off")
LOG_LEVELS = ("debug", "info", "warning", "error")
MOUNT_FLAGS = ("nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime", "strictatime", "nosymfollow")


@dataclass(frozen=True, slots=True)
class Option:
    """One option of `cachefs mount`; `name` in -o and fstab, `--na-me` on the command line."""

    name: str
    metavar: str  # "" = a flag: present means true
    help: str
    default: str
    choices: tuple[str, ...] = ()
    hidden: bool = False
    repeatable: bool = False  # given more than once, the texts are joined by `rules.SEPARATOR`

    @property
    def dashed(self) -> str:
        return "--" + self.name.replace("_", "-")


OPTIONS = (
    Option("cache_size", "SIZE", "memory for pages: 512M, 2G, 10% (of RAM)", "1G, at most 25% of RAM"),
    Option("policy", "NAME", "which pages to keep", DEFAULT_POLICY, POLICY_NAMES),
    Option("kernel_cache", "MODE", "what the kernel may cache beside us", "off", KERNEL_CACHE_MODES),
    Option("pin_limit", "SIZE", "most memory that pinned files may take: 64M, 50% (of the cache)", "50%"),
    Option("rule", "RULE", "advice for some reads: 'comm=restic advice=noreuse' (repeatable)", "none", repeatable=True),
    Option("readahead_max", "SIZE", "largest readahead window; 0 = no readahead", "16M"),
    Option("dirty_limit", "SIZE", "most data not yet on SOURCE: 64M, 25% (of the cache)", "25%"),
    Option("dirty_background", "SIZE", "how much of it starts writeback", "half of --dirty-limit"),
    Option("dirty_expire", "TIME", "age at which it is written back", "5s"),
    Option("writeback_interval", "TIME", "how often to look for it", "1s"),
    Option("write_through", "MODE", "small writes go to a local SOURCE at once while it takes them", "auto", ("auto", "off")),
    Option("durability", "KIND", "when fsync returns, and whether there is a journal", "backing", DURABILITIES),
    Option("journal_size", "SIZE", "most disk for the journal of unwritten data; writers wait at it", "1G"),
    Option("metadata_ttl", "TIME", "how long names and attributes are believed", "1s"),
    Option("backing", "KIND", "is SOURCE a local disk or far away", "auto", BACKING_KINDS),
    Option("backing_timeout", "TIME", "how long SOURCE may take to answer, if far away, before requests fail", "30s"),
    Option("metrics", "ADDRESS:PORT", "where Prometheus finds /metrics; port 0 = any, off = nowhere", "127.0.0.1:9477"),
    Option("page", "MODE", "show the cache, with names of files, there; auto = if only this machine can ask", "auto", PAGE_MODES),
    Option("state_dir", "DIR", "where locks and logs live", "/var/lib/cachefs or ~/.local/state/cachefs"),
    Option("fast_lane", "MODE", "answer requests ourselves, without pyfuse3", "on", ("on", "off")),
    Option("cpu_latency", "MODE", "keep idle processors ready while requests come one after another", "auto", ("auto", "off")),
    Option("simulate_latency", "TIME", "make every call to SOURCE take longer (experiments)", "0"),
    Option("simulate_bandwidth", "SIZE", "make SOURCE slower: bytes a second (experiments)", "none"),
    Option("log_level", "LEVEL", "how much goes into the log", "info", LOG_LEVELS),
    Option("read_only", "", "refuse every change", "no"),
    Option("allow_other", "", "let other users in", "yes for root, else no"),
    Option("fault_plan", "FILE", "JSON file of backing faults to inject (tests)", "none", hidden=True),
)
_OPTIONS = {option.name: option for option in OPTIONS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One mount's settings, all decided: paths are real paths, percentages are bytes. `make_config` builds it."""

    source: str
    mountpoint: str
    cache_size_bytes: int
    policy: str
    kernel_cache: str  # off | open | keep
    pin_limit_bytes: int
    rule: str  # as `rules.parse_rules` reads it
    readahead_max_bytes: int  # 0 = off
    dirty_limit_bytes: int
    dirty_background_bytes: int
    dirty_expire_seconds: float
    writeback_interval_seconds: float
    write_through: bool  # small writes may go to a local SOURCE at once
    durability: str  # backing | journal | none
    journal_size_bytes: int
    metadata_ttl_seconds: float
    backing: str  # auto | local | network
    backing_timeout_seconds: float
    metrics_host: str | None  # None = off
    metrics_port: int  # 0 = any
    metrics_asked: bool  # asked for by name, so that a taken port is an error
    page: bool  # the page is served at the same address
    state_dir: str | None
    fast_lane: bool
    cpu_latency: bool  # idle processors may be kept ready
    simulate_latency_seconds: float
    simulate_bandwidth_bytes_per_second: float  # 0 = as fast as it is
    fault_plan: str | None
    read_only: bool
    allow_other: bool
    mount_flags: frozenset[str]  # of MOUNT_FLAGS, suid and dev: those asked for, never two that contradict each other
    fsname: str | None
    log_level: str


def make_config(
    source: str,
    mountpoint: str,
    options: Mapping[str, str] | None = None,
    *,
    mount_flags: frozenset[str] = frozenset(),
    fsname: str | None = None,
    memory_bytes: int | None = None,
) -> Config:
    """The `Config` that these strings ask for; UsageError where they make no sense. Changes nothing, mounts nothing."""
    asked = dict(options or {})
    for name in asked:
        if name not in _OPTIONS:
            raise UsageError(f"no such option: {name}{nearest(name, _OPTIONS)}")
    memory = machine_memory_bytes() if memory_bytes is None else memory_bytes
    cache_bytes = _cache_size(asked, memory)
    limit_bytes, background_bytes = _dirty_limits(asked, cache_bytes)
    host, port = parse_metrics_address(asked.get("metrics", _OPTIONS["metrics"].default))
    return Config(
        source=os.path.realpath(source),
        mountpoint=os.path.realpath(mountpoint),
        cache_size_bytes=cache_bytes,
        policy=_choice(asked, "policy"),
        kernel_cache=_choice(asked, "kernel_cache"),
        pin_limit_bytes=_pin_limit(asked, cache_bytes, limit_bytes),
        rule=_rule(asked),
        readahead_max_bytes=_size(asked, "readahead_max") // PAGE_BYTES * PAGE_BYTES,
        dirty_limit_bytes=limit_bytes,
        dirty_background_bytes=background_bytes,
        dirty_expire_seconds=_duration(asked, "dirty_expire"),
        writeback_interval_seconds=_interval(asked, "writeback_interval"),
        write_through=_choice(asked, "write_through") == "auto",
        durability=_choice(asked, "durability"),
        journal_size_bytes=_journal_size(asked, limit_bytes),
        metadata_ttl_seconds=_duration(asked, "metadata_ttl"),
        backing=_choice(asked, "backing"),
        backing_timeout_seconds=_interval(asked, "backing_timeout"),
        metrics_host=host,
        metrics_port=port,
        metrics_asked="metrics" in asked,
        page=_page(asked, host),
        state_dir=os.path.abspath(asked["state_dir"]) if asked.get("state_dir") else None,
        fast_lane=_choice(asked, "fast_lane") == "on",
        cpu_latency=_choice(asked, "cpu_latency") == "auto",
        simulate_latency_seconds=_duration(asked, "simulate_latency"),
        simulate_bandwidth_bytes_per_second=_bandwidth(asked, "simulate_bandwidth"),
        fault_plan=os.path.abspath(asked["fault_plan"]) if asked.get("fault_plan") else None,
        read_only=_boolean(asked, "read_only", False),
        allow_other=_boolean(asked, "allow_other", os.geteuid() == 0),
        mount_flags=mount_flags,
        fsname=fsname,
        log_level=_choice(asked, "log_level"),
    )


def nearest(name: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    """`; did you mean X?` for the known name most like `name`, or nothing."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def machine_memory_bytes() -> int:
    """Memory that this process may use: the machine's RAM, or its control group's limit where that is smaller."""
    ram_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                return min(ram_bytes, int(file.read()))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return ram_bytes


def parse_metrics_address(text: str) -> tuple[str | None, int]:
    """Host and port in `ADDRESS:PORT`, `:PORT`, `PORT` or `[v6]:PORT`; no host for `off`."""
    if text == "off":
        return None, 0
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise UsageError(f"--metrics {text!r} is not ADDRESS:PORT: write it like 127.0.0.1:9477, or off")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def _page(asked: Mapping[str, str], host: str | None) -> bool:
    """Whether the page is served: it tells names of files, so others than this machine get it only where that was asked for."""
    mode = _choice(asked, "page")
    return host is not None and (mode == "on" or (mode == "auto" and is_loopback(host)))


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _cache_size(asked: Mapping[str, str], memory_bytes: int) -> int:
    if "cache_size" not in asked:
        size_bytes = max(SMALLEST_CACHE_BYTES, min(DEFAULT_CACHE_BYTES, memory_bytes // 4))
        return size_bytes // PAGE_BYTES * PAGE_BYTES
    size_bytes = _size(asked, "cache_size", memory_bytes)
    given = f"--cache-size {asked['cache_size']}"
    if size_bytes < SMALLEST_CACHE_BYTES:
        raise UsageError(f"{given} is below 16 pages: give at least {format_size(SMALLEST_CACHE_BYTES)}")
    if size_bytes > memory_bytes:
        raise UsageError(f"{given} is more than the memory there is: give less than {format_size(memory_bytes)}")
    return size_bytes // PAGE_BYTES * PAGE_BYTES


def _dirty_limits(asked: Mapping[str, str], cache_bytes: int) -> tuple[int, int]:
    """Limit and background threshold in bytes; the limit in whole pages."""
    limit_bytes = _size(asked, "dirty_limit", cache_bytes) // PAGE_BYTES * PAGE_BYTES
    given = f"--dirty-limit {_text(asked, 'dirty_limit')}"
    if limit_bytes > cache_bytes // 2:
        raise UsageError(f"{given} is above half the cache: give at most {format_size(cache_bytes // 2)}")
    if limit_bytes < PAGE_BYTES:
        raise UsageError(f"{given} is below one page: give at least {format_size(PAGE_BYTES)}")
    if "dirty_background" not in asked:
        return limit_bytes, limit_bytes // 2
    background_bytes = _size(asked, "dirty_background", cache_bytes)
    if background_bytes > limit_bytes:
        given = f"--dirty-background {asked['dirty_background']}"
        raise UsageError(f"{given} is above the dirty limit: give at most {format_size(limit_bytes)}")
    return limit_bytes, background_bytes


def _pin_limit(asked: Mapping[str, str], cache_bytes: int, dirty_limit_bytes: int) -> int:
    """What is neither pinned nor unwritten has to be enough for everybody else."""
    size_bytes = _size(asked, "pin_limit", cache_bytes) // PAGE_BYTES * PAGE_BYTES
    most_bytes = cache_bytes - cache_bytes // UNPINNED_SHARE - dirty_limit_bytes
    if "pin_limit" not in asked:
        return min(size_bytes, most_bytes)
    if size_bytes > most_bytes:
        given = f"--pin-limit {asked['pin_limit']} with a dirty limit of {format_size(dirty_limit_bytes)}"
        raise UsageError(f"{given} leaves too little of the cache: give at most {format_size(most_bytes)}")
    return size_bytes


def _rule(asked: Mapping[str, str]) -> str:
    text = asked.get("rule", "")
    parse_rules(text)
    return text


def changed(config: Config, settings: Mapping[str, str], memory_bytes: int | None = None) -> Config:
    """The settings of a live mount with some of SETTABLE changed; UsageError where that makes no sense.

    With the cache's size change the limits that are parts of it, each in proportion.
    """
    for name in settings:
        if name not in SETTABLE:
            known = ", ".join(name.replace("_", "-") for name in SETTABLE)
            raise UsageError(f"{name.replace('_', '-')} cannot be set while mounted, only {known}{nearest(name, SETTABLE)}")
    if "policy" in settings:
        config = replace(config, policy=_choice(settings, "policy"))
    if "cache_size" in settings:
        old, new = config.cache_size_bytes, _cache_size(settings, memory_bytes or machine_memory_bytes())

        def scaled(nbytes: int) -> int:
            return nbytes * new // old // PAGE_BYTES * PAGE_BYTES

        journal_bytes = config.journal_size_bytes or 2 * new
        limit_bytes = max(PAGE_BYTES, min(scaled(config.dirty_limit_bytes), journal_bytes // 2))
        config = replace(
            config, cache_size_bytes=new, dirty_limit_bytes=limit_bytes, pin_limit_bytes=scaled(config.pin_limit_bytes),
            dirty_background_bytes=min(scaled(config.dirty_background_bytes), limit_bytes),
        )  # fmt: skip
    if "pin_limit" in settings:
        limit_bytes = _pin_limit(settings, config.cache_size_bytes, config.dirty_limit_bytes)
        config = replace(config, pin_limit_bytes=limit_bytes)
    return config


def _journal_size(asked: Mapping[str, str], limit_bytes: int) -> int:
    """At least twice what may be unwritten: else writers would wait at it all of a sudden, and not be slowed before."""
    size_bytes = _size(asked, "journal_size")
    if _text(asked, "durability") == "none":
        return 0
    if "journal_size" not in asked:
        return max(size_bytes, 2 * limit_bytes)
    if size_bytes < 2 * limit_bytes:
        given = f"--journal-size {asked['journal_size']}"
        raise UsageError(f"{given} is below twice the dirty limit: give at least {format_size(2 * limit_bytes)}")
    return size_bytes


def _text(asked: Mapping[str, str], name: str) -> str:
    return asked.get(name, _OPTIONS[name].default)


def _size(asked: Mapping[str, str], name: str, percent_of_bytes: int | None = None) -> int:
    try:
        return parse_size(_text(asked, name), percent_of_bytes)
    except UsageError as error:
        raise UsageError(f"{_OPTIONS[name].dashed} {error}") from None


def _duration(asked: Mapping[str, str], name: str) -> float:
    try:
        return parse_duration(_text(asked, name))
    except UsageError as error:
        raise UsageError(f"{_OPTIONS[name].dashed} {error}") from None


def _interval(asked: Mapping[str, str], name: str) -> float:
    """A duration that may not be nought: it would be a busy loop, or no time to answer in."""
    seconds = _duration(asked, name)
    if seconds < 0.01:
        raise UsageError(f"{_OPTIONS[name].dashed} {asked[name]!r} is too short: give at least 10ms")
    return seconds


def _bandwidth(asked: Mapping[str, str], name: str) -> float:
    if asked.get(name, "none") == "none":
        return 0.0
    try:
        return parse_bandwidth(asked[name])
    except UsageError as error:
        raise UsageError(f"{_OPTIONS[name].dashed} {error}") from None


def _choice(asked: Mapping[str, str], name: str) -> str:
    value, choices = _text(asked, name), _OPTIONS[name].choices
    if value not in choices:
        given = f"{_OPTIONS[name].dashed} {value!r}"
        raise UsageError(f"{given} is not one of {', '.join(choices)}{nearest(value, choices)}")
    return value


def _boolean(asked: Mapping[str, str], name: str, default: bool) -> bool:
    words = {"true": True, "yes": True, "1": True, "": True, "false": False, "no": False, "0": False}
    if name not in asked:
        return default
    if asked[name].lower() not in words:
        raise UsageError(f"{_OPTIONS[name].dashed} {asked[name]!r} is not yes or no")
    return words[asked[name].lower()]
