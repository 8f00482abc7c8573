"""What calls to a backing show of its latency and bandwidth, and how much readahead that needs; pure, no clock.

Kin to TCP's BBR: the bandwidth is the highest delivery rate of late, the latency the lowest duration of late less the
time the bytes themselves took. Both hold for one or two epochs, and a figure counts only when two calls have shown it,
so a single odd one (a file that happened to be in a nearer cache) moves nothing.

Why it does not stay trapped in small windows: with too little in flight the delivery rate is in-flight / latency, so a
window of GAIN x rate x latency is GAIN times what was in flight, and the rate grows by that factor a round trip until
the link is full. This works only as long as latency is not mistaken for transfer time; hence the care in `_intercept`.
"""

from bisect import bisect_right

PAGE_BYTES = 4096
UNMEASURED_PAGES = 32  # 128 KiB: Linux's default, harmless on any store
# One latency x bandwidth being read while another one is in flight (readahead.py), and the growth per round trip
GAIN = 2.0
STARTUP_GAIN = 4.0  # while the delivery rate still grows: three round trips instead of six to a large window
STARTUP_ROUNDS = 4.0  # round trips without growth that end it
GROWTH = 1.25  # what counts as growth (BBR's figure): below it is noise
# Least time a window should last: thread hand-over and a busy interpreter take up to this, and the lowest duration
# never shows it. On a fast store the floor is therefore FLOOR_PAGES, on a 20 MB/s one stays near 128 KiB.
SLACK_SECONDS = 0.005
# Half of it is one window: 512 KiB a call, where ~0.1 ms of our own cost per call is below a third at 2 GB/s
FLOOR_PAGES = 256
EPOCH_SECONDS = 15.0  # figures live one to two of them
MIN_RATE_BYTES = 65536  # shorter transfers say more about latency than about bandwidth
NEARER = 20.0  # a call this many times faster than calls usually take was answered by a cache before the backing
HISTORY = 256  # completions remembered, far more than are in flight at a time
PROBE_CALLS = 3

# {bit length of nbytes: the two fastest calls as (seconds, nbytes), ascending}
Fastest = dict[int, list[tuple[float, int]]]
INFINITY = float("inf")


class BackingSpeed:
    """Estimates of one backing, fed with every read call that went to it. Reading them costs next to nothing."""

    __slots__ = (
        "_bytes", "_classes", "_delivered", "_epoch_end", "_full_at", "_full_rate", "_now", "_old_classes",
        "_old_rates", "_pages", "_probe_calls", "_probe_from", "_rates", "_squares", "_sum", "_times",
        "bandwidth_bytes_per_second", "latency_seconds",
    )  # fmt: skip

    def __init__(self) -> None:
        self.latency_seconds = 0.0  # 0 = nothing measured
        self.bandwidth_bytes_per_second = 0.0
        self._pages = UNMEASURED_PAGES
        self._now = 0.0
        self._epoch_end = 0.0
        self._classes: Fastest = {}  # this epoch
        self._old_classes: Fastest = {}  # the epoch before
        self._rates = (0.0, 0.0)  # highest and second highest delivery rate of this epoch
        self._old_rates = (0.0, 0.0)
        self._bytes = 0  # delivered in all
        self._times = [0.0]  # completions, ascending
        self._delivered = [0]  # _bytes after each
        # Fading sums of duration ** 2 and duration: their quotient is the usual duration, weighted by time spent
        self._squares = 0.0
        self._sum = 0.0
        self._full_rate = 0.0  # bandwidth when it last grew by GROWTH, and when that was
        self._full_at = 0.0
        self._probe_from = INFINITY  # calls started after this see an empty queue
        self._probe_calls = 0  # more such calls wanted; 0 = not probing

    def observe(self, nbytes: int, seconds: float, now: float) -> None:
        """One call that read `nbytes` took `seconds` and ended at `now` (any monotonic clock)."""
        if nbytes <= 0:
            return
        if seconds < 1e-6:
            seconds = 1e-6
        if now > self._now:
            self._now = now
        if now >= self._epoch_end:
            self._rotate(now, seconds)
        rate = self._deliver(nbytes, seconds)
        self._squares = self._squares * 0.9 + seconds * seconds
        self._sum = self._sum * 0.9 + seconds
        if seconds * NEARER * self._sum < self._squares:
            return
        changed = self._note_duration(nbytes, seconds)
        if rate > self._rates[1]:
            self._rates = (rate, self._rates[0]) if rate > self._rates[0] else (self._rates[0], rate)
            changed = True
        if self._probe_calls and now - seconds >= self._probe_from:
            self._probe_calls -= 1
            changed = True
        if changed or self._full_at > 0.0:
            self._estimate()

    def window_pages(self, readahead_max_pages: int) -> int:
        """Pages a sequential reader should have ahead of it, at most the given maximum."""
        pages = self._pages
        return pages if pages < readahead_max_pages else readahead_max_pages

    def _deliver(self, nbytes: int, seconds: float) -> float:
        """Accounts for the call; returns the rate at which all calls together delivered during its life.

        0 = too little to tell. Idle time does not count. The life begins at the last completion before it: only between
        completions are the bytes whole that a busy link has moved.
        """
        times, delivered = self._times, self._delivered
        start = self._now - seconds
        index = max(0, bisect_right(times, start) - 1)
        idle = max(0.0, start - times[index])
        before = delivered[index]
        self._bytes += nbytes
        times.append(self._now)
        delivered.append(self._bytes)
        if len(times) > 2 * HISTORY:
            del times[:HISTORY], delivered[:HISTORY]
        total = self._bytes - before
        return total / (seconds + idle if idle < seconds else seconds) if total >= MIN_RATE_BYTES else 0.0

    def _note_duration(self, nbytes: int, seconds: float) -> bool:
        """Keeps the two fastest calls of each size class; whether this is one of them."""
        bits = nbytes.bit_length()
        fastest = self._classes.get(bits)
        if fastest is None:
            self._classes[bits] = [(seconds, nbytes)]
        elif len(fastest) < 2 or seconds < fastest[1][0]:
            self._classes[bits] = sorted([fastest[0], (seconds, nbytes)])
        else:
            return False
        return True

    def _rotate(self, now: float, seconds: float) -> None:
        """Begins an epoch. It happens at a call only, so estimates outlive any idle time until there is news.

        A latency that seems to have risen may be our own queue, with several readers always in flight. Nothing but a
        look at the empty queue can tell, so the window is small until calls have been seen that started after the
        queue had drained (BBR's PROBE_RTT): some ten milliseconds every quarter of a minute, and only then.
        """
        before = self.latency_seconds
        self._epoch_end = now + EPOCH_SECONDS
        self._old_classes, self._classes = self._classes, {}
        self._old_rates, self._rates = self._rates, (0.0, 0.0)
        if self._old_classes:
            self._estimate()
            if self.latency_seconds > before * GROWTH and self.bandwidth_bytes_per_second > 0.0:
                self._probe_from = now + 2.0 * seconds
                self._probe_calls = PROBE_CALLS
                self.latency_seconds = before

    def _estimate(self) -> None:
        """Recomputes everything that is read from outside; only when a figure has changed."""
        points = self._points()
        delivered = max(_confirmed(self._rates), _confirmed(self._old_rates))
        self.bandwidth_bytes_per_second = bandwidth = max(delivered, _transfer_rate(points))
        if not self._probe_calls:
            self.latency_seconds = _intercept(points, bandwidth)
        latency = self.latency_seconds
        if bandwidth > self._full_rate * GROWTH:
            self._full_rate, self._full_at = bandwidth, self._now
        elif self._full_at > 0.0 and self._now - self._full_at > STARTUP_ROUNDS * latency:
            self._full_at = 0.0
            self._full_rate = bandwidth
        gain = STARTUP_GAIN if self._full_at > 0.0 else GAIN
        floor = min(FLOOR_PAGES, max(UNMEASURED_PAGES, int(bandwidth * SLACK_SECONDS / PAGE_BYTES)))
        wanted = int(gain * bandwidth * latency / PAGE_BYTES) + 1
        self._pages = floor if self._probe_calls else max(floor, wanted)

    def _points(self) -> list[tuple[float, int]]:
        """(duration, bytes) of the fastest calls of each size class and epoch, the fastest of all first."""
        both = (*self._old_classes.values(), *self._classes.values())
        return sorted(point for points in both for point in points)


def _confirmed(rates: tuple[float, float]) -> float:
    """The second highest rate; the only one while there is no second."""
    return rates[1] or rates[0]


def _transfer_rate(points: list[tuple[float, int]]) -> float:
    """What a single call moves per second once it moves, from the difference between small and large ones; 0 = unknown.

    It shows the bandwidth of a disk that is read one call at a time, where the delivery rate never gets there. A
    difference below a quarter of the large call is jitter rather than transfer.
    """
    seconds, nbytes = _base(points)
    largest = max((n for _, n in points), default=0)
    if largest < max(2 * nbytes, MIN_RATE_BYTES):
        return 0.0
    alike = [point for point in points if point[1].bit_length() == largest.bit_length()]
    large_seconds, large_bytes = _base(alike)
    transfer = large_seconds - seconds
    return (large_bytes - nbytes) / transfer if transfer * 4.0 >= large_seconds else 0.0


def _intercept(points: list[tuple[float, int]], bandwidth: float) -> float:
    """The latency: a fast call less its transfer time, told from the difference to calls at least twice the size.

    Without such calls all of the duration counts as latency: too large a window corrects itself, too small a one
    cannot. The flattest slope counts (the larger call that queued least), and never more than the bandwidth allows.
    """
    seconds, nbytes = _base(points)
    slopes = [(s - seconds) / (n - nbytes) for s, n in points if n >= 2 * nbytes]
    slope = min(*slopes, 1.0 / bandwidth) if slopes and bandwidth > 0.0 else 0.0
    return max(seconds - nbytes * max(slope, 0.0), seconds / 8.0)  # an eighth keeps zero, the trap, out


def _base(points: list[tuple[float, int]]) -> tuple[float, int]:
    """The second fastest call: two have shown it. The only one while there is no second."""
    return points[1] if len(points) > 1 else points[0] if points else (0.0, 0)
