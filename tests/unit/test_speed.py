"""BackingSpeed: what it concludes from calls, what does not fool it, and that small windows do not trap it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cache.speed import EPOCH_SECONDS, FLOOR_PAGES, UNMEASURED_PAGES, BackingSpeed

MAXIMUM = 4096
KIB, MIB = 1 << 10, 1 << 20


def feed(
    speed: BackingSpeed,
    latency_seconds: float,
    bytes_per_second: float,
    sizes: list[int],
    now: float = 0.0,
    jitter: random.Random | None = None,
) -> float:
    """One call after the other, each with the link to itself; returns the time after the last."""
    for nbytes in sizes:
        noise = 1.0 + 0.2 * jitter.random() if jitter else 1.0
        seconds = (latency_seconds + nbytes / bytes_per_second) * noise
        now += seconds
        speed.observe(nbytes, seconds, now)
    return now


def test_nothing_measured_gives_linuxs_default() -> None:
    speed = BackingSpeed()
    assert (speed.latency_seconds, speed.bandwidth_bytes_per_second) == (0.0, 0.0)
    assert speed.window_pages(MAXIMUM) == UNMEASURED_PAGES
    assert speed.window_pages(8) == 8
    assert speed.window_pages(0) == 0


@pytest.mark.parametrize(
    ("latency_seconds", "bytes_per_second"), [(0.010, 200e6), (0.005, 100e6), (0.0001, 2e9), (0.1, 5e6), (0.001, 10e6)]
)
def test_calls_of_several_sizes_show_latency_and_bandwidth(latency_seconds: float, bytes_per_second: float) -> None:
    speed = BackingSpeed()
    feed(speed, latency_seconds, bytes_per_second, [64 * KIB, 128 * KIB, 512 * KIB, MIB] * 5)
    assert speed.latency_seconds == pytest.approx(latency_seconds, rel=0.1)
    assert speed.bandwidth_bytes_per_second == pytest.approx(bytes_per_second, rel=0.1)


def test_first_call_already_widens_the_window() -> None:
    """All of its duration counts as latency: 4 x what was in flight, not a guess that it was all transfer."""
    speed = BackingSpeed()
    feed(speed, 0.010, 200e6, [512 * KIB])
    assert speed.window_pages(MAXIMUM) >= 4 * 128


def test_one_size_only_never_traps_it() -> None:
    """Each round the window is in flight as calls of 1 MiB at most; with one call there is nothing to tell latency
    from.
    """
    speed, now, free_at = BackingSpeed(), 0.0, 0.0
    for _ in range(12):
        left, done = speed.window_pages(MAXIMUM) * 4096, []
        free_at = now + 0.010
        while left > 0:
            nbytes = min(left, MIB)
            free_at += nbytes / 200e6
            done.append((nbytes, free_at))
            left -= nbytes
        for nbytes, at in done:
            speed.observe(nbytes, at - now, at)
        now = free_at
    assert speed.window_pages(MAXIMUM) >= 2 * 0.010 * 200e6 / 4096 * 0.95


def test_local_disk_has_windows_of_at_least_512_kib() -> None:
    """A window is half of what is ahead."""
    speed = BackingSpeed()
    feed(speed, 0.0001, 2e9, [128 * KIB, 512 * KIB, MIB] * 5)
    assert speed.window_pages(MAXIMUM) // 2 * 4096 >= 512 * KIB


def test_slow_near_store_keeps_small_windows() -> None:
    """5 ms of 10 MB/s: more would only stand in the way of other reads."""
    speed = BackingSpeed()
    now = feed(speed, 0.001, 10e6, [64 * KIB, 128 * KIB, 512 * KIB] * 5)
    feed(speed, 0.001, 10e6, [128 * KIB] * 20, now)
    assert speed.window_pages(MAXIMUM) <= FLOOR_PAGES // 4


def test_random_4_kib_reads_show_latency_but_no_bandwidth() -> None:
    speed = BackingSpeed()
    feed(speed, 0.010, 200e6, [4096] * 200)
    assert speed.latency_seconds == pytest.approx(0.010, rel=0.05)
    assert speed.window_pages(MAXIMUM) == UNMEASURED_PAGES


def steady() -> tuple[BackingSpeed, float]:
    speed = BackingSpeed()
    now = feed(speed, 0.010, 200e6, [128 * KIB, 512 * KIB, MIB] * 20)
    return speed, now


@pytest.mark.parametrize("nbytes", [4096, 128 * KIB, MIB])
@pytest.mark.parametrize("calls", [1, 30])
def test_calls_answered_by_a_nearer_cache_move_nothing(nbytes: int, calls: int) -> None:
    speed, now = steady()
    before = (speed.latency_seconds, speed.bandwidth_bytes_per_second, speed.window_pages(MAXIMUM))
    for _ in range(calls):
        now += 0.00003
        speed.observe(nbytes, 0.00003, now)
    assert (speed.latency_seconds, speed.bandwidth_bytes_per_second, speed.window_pages(MAXIMUM)) == before


def test_one_fast_call_within_reason_moves_nothing_either() -> None:
    """A figure counts when two calls have shown it."""
    speed, now = steady()
    feed(speed, 0.002, 2e9, [MIB], now)
    assert speed.bandwidth_bytes_per_second <= 260e6
    assert speed.latency_seconds == pytest.approx(0.010, rel=0.1)


def test_slow_calls_move_nothing() -> None:
    speed, now = steady()
    before = speed.window_pages(MAXIMUM)
    feed(speed, 3.0, 1e6, [MIB, 4096, MIB], now)
    assert speed.window_pages(MAXIMUM) == before


def test_a_slow_first_call_is_forgotten() -> None:
    """Automounters and sleeping disks take seconds once."""
    speed = BackingSpeed()
    feed(speed, 3.0, 200e6, [128 * KIB])
    feed(speed, 0.010, 200e6, [128 * KIB, 512 * KIB, MIB] * 40, 3.1)
    assert speed.latency_seconds == pytest.approx(0.010, rel=0.1)
    assert speed.bandwidth_bytes_per_second == pytest.approx(200e6, rel=0.3)


def test_idle_time_changes_nothing() -> None:
    speed, now = steady()
    before = speed.window_pages(MAXIMUM)
    feed(speed, 0.010, 200e6, [MIB], now + 86400.0)
    assert speed.window_pages(MAXIMUM) == pytest.approx(before, rel=0.1)


def test_a_store_that_became_slower_or_faster_is_noticed_within_two_epochs() -> None:
    speed, now = steady()
    calls = [128 * KIB, 512 * KIB, MIB]
    for latency_seconds, bytes_per_second in ((0.040, 50e6), (0.003, 400e6)):
        until = now + 3 * EPOCH_SECONDS
        while now < until:
            now = feed(speed, latency_seconds, bytes_per_second, calls, now)
        assert speed.latency_seconds == pytest.approx(latency_seconds, rel=0.3)
        assert speed.bandwidth_bytes_per_second == pytest.approx(bytes_per_second, rel=0.3)


def test_own_queue_is_not_mistaken_for_latency() -> None:
    """Four readers keep four windows in flight for minutes: every call queues. Without probing each epoch would double
    the window.
    """
    speed, now, free_at = BackingSpeed(), 0.0, 0.0
    in_flight: list[tuple[float, float, int]] = []  # FIFO: end, begin, bytes
    queued = 0
    for _ in range(30_000):
        while queued < 4 * speed.window_pages(MAXIMUM) * 4096:
            free_at = max(now + 0.010, free_at) + 256 * KIB / 50e6
            in_flight.append((free_at, now, 256 * KIB))
            queued += 256 * KIB
        now, begun, nbytes = in_flight.pop(0)
        queued -= nbytes
        speed.observe(nbytes, now - begun, now)
    assert now > 5 * EPOCH_SECONDS
    assert speed.latency_seconds < 0.050
    assert speed.window_pages(MAXIMUM) < MAXIMUM // 4
    assert speed.bandwidth_bytes_per_second == pytest.approx(50e6, rel=0.1)


def test_jitter_does_not_move_the_window_much() -> None:
    speed = BackingSpeed()
    feed(speed, 0.010, 200e6, [128 * KIB, 512 * KIB, MIB] * 300, jitter=random.Random(1))
    assert speed.latency_seconds == pytest.approx(0.010, rel=0.3)
    assert speed.bandwidth_bytes_per_second == pytest.approx(200e6, rel=0.4)


@given(
    st.lists(
        st.tuples(st.integers(-1, 1 << 30), st.floats(-1.0, 1e6), st.floats(0.0, 1e6)), max_size=50
    ),
    st.integers(0, 1 << 20),
)
def test_any_input_gives_finite_figures(calls: list[tuple[int, float, float]], maximum: int) -> None:
    """Clocks that stand still or step back included: times are as given, in no order."""
    speed = BackingSpeed()
    for nbytes, seconds, now in calls:
        speed.observe(nbytes, seconds, now)
        assert 0.0 <= speed.latency_seconds < 1e7
        assert 0.0 <= speed.bandwidth_bytes_per_second < 1e17
        assert min(UNMEASURED_PAGES, maximum) <= speed.window_pages(maximum) <= maximum
