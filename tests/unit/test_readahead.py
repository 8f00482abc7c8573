"""Readahead: rows that pin Linux's behaviour, what differs on purpose, bounds, and the throughput it gives in
simulation.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.cache.readahead import MAX_STREAMS, Readahead, Window, initial_size, next_size
from cachefs.cache.speed import BackingSpeed

END = 1 << 20
HIT, MISS = False, True
Read = tuple[int, int, bool]  # first, count, missed


def run(reads: list[Read], max_pages: int = 1024, end: int = END) -> list[tuple[int, int] | None]:
    readahead = Readahead()
    windows = [readahead.on_read(first, count, missed, end, max_pages) for first, count, missed in reads]
    return [None if window is None else (window.start, window.size) for window in windows]


@pytest.mark.parametrize(
    ("count", "max_pages", "size"),
    [
        (1, 32, 4),  # Linux: x 4 up to max / 32
        (3, 128, 16),  # rounded up to 4 first
        (2, 32, 4),  # x 2 up to max / 4
        (8, 32, 16),
        (9, 32, 32),  # the maximum beyond
        (32, 32, 32),
        (64, 32, 32),  # never more, whatever the request
        (32, 1024, 128),
        (1, 1, 1),
        (1, 4096, 4),
    ],
)
def test_initial_size_is_linuxs(count: int, max_pages: int, size: int) -> None:
    assert initial_size(count, max_pages) == size


@pytest.mark.parametrize(
    ("size", "max_pages", "following"),
    [(4, 1024, 16), (63, 1024, 252), (64, 1024, 128), (512, 1024, 1024), (1000, 1024, 1024), (2000, 1024, 1024)],
)
def test_next_size_is_linuxs(size: int, max_pages: int, following: int) -> None:
    assert next_size(size, max_pages) == following


@pytest.mark.parametrize(
    ("reads", "windows"),
    [
        pytest.param([(0, 1, MISS)], [(0, 4)], id="start of file: a sequential reader is assumed"),
        pytest.param([(0, 32, MISS)], [(0, 128)], id="start of file, 128 KiB: window holds the request"),
        pytest.param([(0, 1, HIT)], [None], id="start of file, hit: Linux gets here on a miss only"),
        pytest.param([(777, 1, MISS)], [None], id="lone miss: as it is"),
        pytest.param([(777, 1, MISS), (9000, 1, MISS), (41, 1, MISS)], [None] * 3, id="random misses"),
        pytest.param([(777, 1, MISS), (776, 1, MISS), (775, 1, MISS)], [None] * 3, id="backward misses"),
        pytest.param([(777, 1, MISS), (779, 1, MISS), (781, 1, MISS)], [None] * 3, id="strided misses"),
        pytest.param([(777, 1, MISS), (778, 1, MISS)], [None, (778, 4)], id="sequential miss: previous + 1"),
        pytest.param([(777, 2, MISS), (778, 2, MISS)], [None, (778, 8)], id="sequential miss: same page (unaligned)"),
        pytest.param([(777, 1, HIT), (778, 1, MISS)], [None, (778, 4)], id="reader comes out of a cached region"),
        pytest.param(
            [(0, 1, MISS), (1, 1, HIT), (2, 1, HIT), (3, 1, HIT), (4, 1, HIT), (20, 1, HIT)],
            [(0, 4), (4, 16), None, None, (20, 64), None],
            id="marker after the request, then at the start of each window; x 4",
        ),
        pytest.param(
            [(0, 32, MISS), (32, 32, HIT), (64, 32, HIT), (96, 32, HIT), (128, 32, HIT), (700, 32, HIT)],
            [(0, 128), (128, 256), None, None, (384, 512), None],
            id="x 2, up to half the maximum; a hit far ahead is not this reader",
        ),
        pytest.param(
            [(0, 32, MISS), (32, 32, MISS), (128, 32, MISS)],
            [(0, 128), (128, 256), (384, 512)],
            id="marker page still in flight: starts the next window just the same",
        ),
        pytest.param(
            [(0, 32, MISS), (32, 32, HIT), (32, 32, HIT), (0, 32, HIT), (16, 8, HIT), (64, 32, HIT), (128, 32, HIT)],
            [(0, 128), (128, 256), None, None, None, None, (384, 512)],
            id="re-reading and backward hits restart nothing",
        ),
        pytest.param(
            [(0, 4, MISS), (4, 4, HIT), (16, 4, HIT), (20, 4, HIT)],
            [(0, 16), (16, 64), (80, 128), None],
            id="the marker wins over the position: two reads were overtaken",
        ),
        pytest.param(
            [(0, 32, MISS), (32, 32, HIT), (128, 1, MISS), (128, 1, HIT), (64, 32, HIT)],
            [(0, 128), (128, 256), None, None, None],
            id="a random read that falls on the marker page, far from the reader, triggers nothing",
        ),
        pytest.param([(500, 2000, MISS)], [None], id="oversize lone read: all of it is one batch already"),
        pytest.param(
            [(500, 2000, MISS), (2500, 2000, MISS)], [None, (4500, 1024)], id="oversize sequential: next maximum"
        ),
        pytest.param([(0, 2000, MISS)], [(2000, 1024)], id="oversize at the start of the file"),
        pytest.param(
            [(0, 32, MISS), (32, 32, HIT), (64, 32, MISS), (96, 32, MISS)],
            [(0, 128), (128, 256), (64, 128), (96, 128)],
            id="miss inside the window: a first window's worth is asked for again",
        ),
        pytest.param(
            [(0, 32, MISS), (32, 32, HIT), (64, 32, MISS), (96, 32, HIT), (128, 32, HIT)],
            [(0, 128), (128, 256), (64, 128), None, (384, 512)],
            id="and the stream goes on as before",
        ),
        pytest.param(
            [(0, 4, MISS), (4, 4, HIT), (2000, 1, MISS), (30, 1, MISS), (8, 4, HIT), (16, 4, HIT)],
            [(0, 16), (16, 64), None, None, None, (80, 128)],
            id="random misses, one of them inside the window, leave the stream alone",
        ),
    ],
)
def test_windows(reads: list[Read], windows: list[tuple[int, int] | None]) -> None:
    assert run(reads) == windows


def test_readahead_off() -> None:
    assert run([(0, 1, MISS), (1, 1, MISS), (2, 1, MISS)], max_pages=0) == [None] * 3


def test_windows_end_with_the_file_and_go_on_when_it_grows() -> None:
    readahead = Readahead()
    assert readahead.on_read(0, 32, MISS, 100, 1024) == Window(0, 100)
    assert readahead.on_read(32, 32, HIT, 100, 1024) is None
    assert readahead.on_read(64, 36, HIT, 100, 1024) is None
    assert readahead.on_read(100, 32, MISS, 5000, 1024) == Window(132, 256)


def sequential(readahead: Readahead, first: int, count: int, reads: int, max_pages: int) -> Iterator[tuple[int, int]]:
    """Reads on from `first`; yields (pages ahead before, pages ahead after) at each window."""
    stop = first
    for index in range(reads):
        position = first + (index + 1) * count
        window = readahead.on_read(position - count, count, position > stop, END, max_pages)
        if window is not None:
            yield stop - position, window.start + window.size - position
            stop = window.start + window.size


@pytest.mark.parametrize("count", [1, 4, 32, 256])
@pytest.mark.parametrize("max_pages", [64, 100, 1024, 1000, 4096])
def test_ramps_up_until_max_pages_are_ahead(count: int, max_pages: int) -> None:
    ahead = list(sequential(Readahead(), 0, count, 40 * max_pages // count + 40, max_pages))[-8:]
    for before, after in ahead:
        assert after <= max_pages
        if count <= max_pages // 8:
            assert before >= max_pages // 2 - count
            assert after >= max_pages - count


def test_follows_a_maximum_that_changes() -> None:
    readahead = Readahead()
    assert [after for _, after in sequential(readahead, 0, 32, 200, 64)][-1] in range(32, 65)
    grown = list(sequential(readahead, 6400, 32, 2000, 4096))[-1]
    assert grown[1] >= 4096 - 32
    shrunk = list(sequential(readahead, 70400, 32, 2000, 256))
    assert max(after for _, after in shrunk[1:]) <= 256
    assert shrunk[-1][1] >= 256 - 32


@pytest.mark.parametrize("streams", [2, 3, MAX_STREAMS])
def test_interleaved_streams_grow_like_single_ones(streams: int) -> None:
    """Linux keeps one size per handle and loses it here; with `MAX_STREAMS` states nothing is lost."""
    alone = run([(5000 + 4 * index, 4, index < 2) for index in range(200)])
    readahead = Readahead()
    windows: list[list[Window | None]] = [[] for _ in range(streams)]
    for index in range(200):
        for stream, seen in enumerate(windows):
            base = 5000 + 100_000 * stream
            seen.append(readahead.on_read(base + 4 * index, 4, index < 2, END, 1024))
    for stream, seen in enumerate(windows):
        base = 100_000 * stream
        assert [w and (w.start - base, w.size) for w in seen] == alone


def test_random_misses_never_push_a_stream_out() -> None:
    readahead = Readahead()
    readahead.on_read(0, 4, MISS, END, 1024)
    for index in range(100):
        assert readahead.on_read(10_000 + 977 * index, 1, MISS, END, 1024) is None
    assert readahead.on_read(4, 4, HIT, END, 1024) == Window(16, 64)


def test_a_fifth_stream_replaces_the_least_recently_used() -> None:
    readahead = Readahead()
    for base in (1000, 2000, 3000, 4000, 1016, 5000):  # 1016 is a marker of the first stream: used again
        readahead.on_read(base, 8, MISS, END, 1024)
        readahead.on_read(base + 8, 8, MISS, END, 1024)
    assert readahead.on_read(2016, 8, HIT, END, 1024) is None
    assert readahead.on_read(3016, 8, HIT, END, 1024) is not None


READS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 300), st.sampled_from(["next", "same", "back"])),
        st.integers(1, 300),
        st.booleans(),
        st.integers(0, 700),
        st.sampled_from([0, 1, 2, 3, 4, 31, 32, 100, 256, 4096]),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(READS)
def test_windows_stay_in_bounds(reads: list[tuple[int | str, int, bool, int, int]]) -> None:
    """Inside [0, end), never more than max_pages (a lone or first read included), never further than that after the
    request.
    """
    readahead = Readahead()
    stop = 0
    for where, count, missed, end, max_pages in reads:
        places = {"next": stop, "same": max(0, stop - 1), "back": max(0, stop - 2 * count)}
        first = places[where] if isinstance(where, str) else where
        stop = first + count
        window = readahead.on_read(first, count, missed, end, max_pages)
        if window is not None:
            assert 0 <= window.start < window.start + window.size <= end
            assert first <= window.start
            assert window.size <= max_pages
            assert window.start + window.size <= stop + max_pages
            assert missed or window.start >= stop


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(40)), st.integers(0, 3))
def test_random_4_kib_misses_fetch_at_most_16_kib(order: list[int], gap: int) -> None:
    """Each read's pages and window together, with nothing ever resident but what was fetched."""
    readahead, resident = Readahead(), set[int]()
    for index in order:
        page = index * (gap + 2)
        if page in resident:
            continue
        window = readahead.on_read(page, 1, MISS, END, 4096) or Window(page, 1)
        wanted = {page, *range(window.start, window.start + window.size)} - resident
        assert len(wanted) <= 4
        resident |= wanted


# -- throughput, by simulation
# ---------------------------------------------------------------------------------------------------

FILL_PAGES = 256


@dataclass
class Link:
    """A store as `--simulate-latency --simulate-bandwidth` makes it: each call waits the latency, then its turn on one
    link.
    """

    latency_seconds: float
    bytes_per_second: float
    free_at: float = 0.0

    def call(self, now: float, nbytes: int) -> float:
        self.free_at = max(now + self.latency_seconds, self.free_at) + nbytes / self.bytes_per_second
        return self.free_at


@dataclass
class Reader:
    """A sequential reader of one file, its pages, and the cache's part: fills of at most 1 MiB that do not cross 1 MiB
    borders.
    """

    pages: int
    count: int = 32
    think_seconds: float = 0.0001  # our own cost of one read
    position: int = 0
    readahead: Readahead = field(default_factory=Readahead)
    wanted: set[int] = field(default_factory=set)
    resident: set[int] = field(default_factory=set)
    finished: float = 0.0


def fills(reader: Reader, first: int, size: int) -> Iterator[tuple[int, int]]:
    start = None
    for page in range(first, first + size + 1):
        absent = page < first + size and page not in reader.wanted
        if start is not None and (not absent or page % FILL_PAGES == 0):
            yield start, page
            start = None
        if absent and start is None:
            start = page


def simulate(link: Link, speed: BackingSpeed, readers: list[Reader], max_pages: int = 4096, now: float = 0.0) -> float:
    """Runs the readers to their ends and returns the time that took."""
    begun = now
    events: list[tuple[float, int, int, int, int, float]] = []  # time, order, reader, start page, stop page, begun
    order = 0
    waiting = set(range(len(readers)))
    for index in range(len(readers)):
        heapq.heappush(events, (now, (order := order + 1), index, 0, 0, now))
    asked = [False] * len(readers)
    while events:
        now, _, index, start, stop, since = heapq.heappop(events)
        reader = readers[index]
        if stop:
            speed.observe((stop - start) * 4096, now - since, now)
            reader.resident.update(range(start, stop))
            if index not in waiting:
                continue
        waiting.add(index)
        request = range(reader.position, reader.position + reader.count)
        if not asked[index]:
            asked[index] = True
            missed = not reader.resident.issuperset(request)
            window = reader.readahead.on_read(
                request.start, reader.count, missed, reader.pages, speed.window_pages(max_pages)
            )
            spans = [(request.start, reader.count)] + ([(window.start, window.size)] if window else [])
            merged = spans if len(spans) == 1 or window is None or window.start > request.stop else [
                (request.start, max(request.stop, window.start + window.size) - request.start)
            ]
            for span in merged:
                for page, after in list(fills(reader, *span)):
                    reader.wanted.update(range(page, after))
                    done = link.call(now, (after - page) * 4096)
                    heapq.heappush(events, (done, (order := order + 1), index, page, after, now))
        if reader.resident.issuperset(request):
            reader.position += reader.count
            asked[index] = False
            waiting.discard(index)
            if reader.position < reader.pages:
                heapq.heappush(events, (now + reader.think_seconds, (order := order + 1), index, 0, 0, now))
            else:
                reader.finished = now
    return max(reader.finished for reader in readers) - begun


@pytest.mark.parametrize(
    ("latency_seconds", "bytes_per_second", "mebibytes", "share"),
    [
        (0.010, 200e6, 64, 0.75),  # what issue 2 promises
        (0.005, 100e6, 64, 0.85),
        (0.010, 200e6, 256, 0.90),
        (0.0001, 1e9, 64, 0.80),  # local disk; our own 0.1 ms a read is in the time
        (0.100, 50e6, 256, 0.80),  # a distant store
        (0.001, 10e6, 16, 0.95),  # a slow link
    ],
)
def test_a_cold_sequential_read_fills_the_link(
    latency_seconds: float, bytes_per_second: float, mebibytes: int, share: float
) -> None:
    reader = Reader(pages=mebibytes * 256)
    seconds = simulate(Link(latency_seconds, bytes_per_second), BackingSpeed(), [reader])
    assert mebibytes * (1 << 20) / seconds >= share * bytes_per_second


@pytest.mark.parametrize("count", [1, 8, 256])
def test_other_request_sizes_fill_it_too(count: int) -> None:
    reader = Reader(pages=64 * 256, count=count, think_seconds=0.000002 * count)
    seconds = simulate(Link(0.010, 200e6), BackingSpeed(), [reader])
    assert 64 * (1 << 20) / seconds >= 0.75 * 200e6


def test_two_readers_share_the_link_without_losing_it() -> None:
    readers = [Reader(pages=32 * 256), Reader(pages=32 * 256)]
    seconds = simulate(Link(0.010, 200e6), BackingSpeed(), readers)
    assert 64 * (1 << 20) / seconds >= 0.75 * 200e6


def test_a_second_file_starts_at_full_speed() -> None:
    link, speed = Link(0.010, 200e6), BackingSpeed()
    now = simulate(link, speed, [Reader(pages=32 * 256)])
    seconds = simulate(link, speed, [Reader(pages=32 * 256)], now=now + 3600.0)
    assert 32 * (1 << 20) / seconds >= 0.75 * 200e6
