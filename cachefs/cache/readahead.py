"""Linux's on-demand readahead (mm/readahead.c) as a pure per-handle state: no I/O, no clock, no page flags.

One stream is one sequential reader. What it has asked for ends at `stop`; the marker is the page whose reading starts
the next window, so that there is always one window being read while another one is being fetched:

            reader                marker                      stop
              v                     v                          v
    ----------|== up to date, or =====|#==== window in flight ==|   next window: [stop, stop + next size)

Linux keeps the marker as a page flag and the last window in the handle, so streams that share a handle find each
other's flags but lose each other's sizes. Here the marker lies in the stream, and a handle keeps `MAX_STREAMS` of
them.

Sizes follow Linux: the first window is 4 x or 2 x the request, then windows grow x 4 while small and x 2 until the
maximum. The maximum differs: `max_pages` bounds what lies *ahead of the reader*, so one window grows to half of it.
When a window is started max_pages are ahead, and max_pages / 2 remain when the next one starts. With max_pages = 2 x
latency x bandwidth (see speed.py) that remainder is just what the link delivers until the new window's first byte
arrives: the link never idles, and the first call of each window still meets an empty queue, which keeps the measured
latency honest. Linux's marker (ahead in [max, 2 max]) would queue a whole delay's worth of data in front of everybody
else's reads.
"""

import sys
from dataclasses import dataclass

# Readers told apart on one handle; a database or a multi-part download rarely has more on one descriptor
MAX_STREAMS = 4
# A read up to this many times its own length from the stream's position still belongs to it: parallel reads of one
# stream (libaio, kernel readahead) overtake each other by a few requests
DISORDER = 8


@dataclass(frozen=True, slots=True)
class Window:
    """Pages [start, start + size) that should become resident; the ones that are, or are being filled, cost nothing.

    `transient` ones are read once and not wanted afterwards.
    """

    start: int
    size: int
    transient: bool = False


class Stream:
    """One sequential reader. Invariant: marker <= stop; both only grow."""

    __slots__ = ("marker", "position", "size", "stop")

    def __init__(self, position: int, marker: int, stop: int, size: int) -> None:
        self.position = position  # page after the last one read
        self.marker = marker  # reading this page starts the next window
        self.stop = stop  # page after the last one asked for
        self.size = size  # pages of the last window, before it was clipped to the end of the file


def initial_size(count: int, max_pages: int) -> int:
    """Linux's get_init_ra_size: 4 x the request (as a power of two) when small, 2 x when medium, else all."""
    size = 1 << (count - 1).bit_length()
    if size <= max_pages // 32:
        return size * 4
    if size <= max_pages // 4:
        return size * 2
    return max_pages


def next_size(size: int, max_pages: int) -> int:
    """Linux's get_next_ra_size: 4 x while below a sixteenth of the maximum, then 2 x."""
    return min(size * 4 if size < max_pages // 16 else size * 2, max_pages)


class Readahead:
    """Decides what one open handle prefetches. `on_read` hears of every read before its pages are filled.

    For handles about which more is known, `least_pages` and `most_pages` bound the maximum that `on_read` is given: with a
    least maximum each lone miss begins a stream, and with the largest window. `transient` says that what is read will not be
    read again.
    """

    __slots__ = ("_current", "_previous", "_recent", "_streams", "least_pages", "most_pages", "transient")

    def __init__(self) -> None:
        self.least_pages, self.most_pages = 0, sys.maxsize
        self.transient = False
        self._current = Stream(-2, -2, -2, 0)  # the one that the last read belonged to; this one matches nothing
        self._streams: list[Stream] = []  # the one with the latest miss or marker first
        self._previous = -2  # page after the last read of any kind (Linux's prev_pos)
        # Pages after the last misses that belong to no stream. They are kept apart from the streams so that random
        # reads can never push a stream out.
        self._recent: list[int] = []

    def on_read(self, first: int, count: int, missed: bool, end: int, max_pages: int) -> Window | None:
        """Pages [first, first + count) are asked for; returns what to prefetch.

        `missed` = one of them is not up to date (in flight counts); `end` = pages in the file; `max_pages` = 0 is off.
        The window has at most `max_pages` pages, lies in [first, end) and reaches no further than max_pages behind the
        request. Absent pages of the request itself are the caller's business.
        """
        if not missed and not self.is_event(first, first + count):
            return None
        window = self._on_event(first, count, missed, end, max_pages)
        return Window(window.start, window.size, True) if self.transient and window is not None else window

    def is_event(self, first: int, stop: int) -> bool:
        """Hears of a hit of pages [first, stop); whether `on_read` has to be asked, as it may start a window.

        The hot path: no call, no allocation.
        """
        stream = self._current
        if 0 <= stream.position - first <= 1 and stop <= stream.marker:
            self._previous = stream.position = stop
            return False
        for stream in self._streams:
            if 0 <= stream.position - first <= 1:
                if stop > stream.marker:
                    return True
                self._previous = stream.position = stop
                self._current = stream
                return False
            if first <= stream.marker < stop:
                return True
        self._previous = stop  # a random or repeated hit
        return False

    def describe(self) -> list[dict[str, int]]:
        """The streams in pages, the one with the latest miss or marker first; for people."""
        return [{"position": s.position, "marker": s.marker, "stop": s.stop, "window": s.size} for s in self._streams]

    def _on_event(self, first: int, count: int, missed: bool, end: int, max_pages: int) -> Window | None:
        """A miss, or a hit that may touch a stream other than the current one or reach a marker."""
        previous, self._previous = self._previous, first + count
        max_pages = min(max(max_pages, self.least_pages), self.most_pages)
        if max_pages <= 0 or count <= 0:
            return None
        stream = self._find(first, count)
        if stream is not None:
            self._use(stream)
            stream.position = max(stream.position, first + count)
            if first + count > stream.marker:
                return self._advance(stream, first + count, count, end, max_pages)
            return _ask_again(stream, first, count, end, max_pages) if missed else None
        if not missed:
            return None
        if first == 0 or self.least_pages or self._is_sequential(first, previous):
            return self._begin(first, count, end, max_pages)
        # A standalone read: as it is, without polluting the streams.
        self._recent = [first + count, *self._recent[: MAX_STREAMS - 1]]
        return None

    def _find(self, first: int, count: int) -> Stream | None:
        """The stream a read belongs to: it goes on there, repeats its last page, or lies near it in the window."""
        near = DISORDER * count
        best = None
        for stream in self._streams:
            distance = first - stream.position
            if -1 <= distance <= 0:
                return stream
            at_marker = first <= stream.marker < first + count
            if -near <= distance <= near and (at_marker or stream.position < first < stream.stop):
                best = best or stream
        return best

    def _is_sequential(self, first: int, previous: int) -> bool:
        """Linux: page - previous page <= 1, here against the last read and the last few lone misses."""
        return first - previous in (-1, 0) or any(first - recent in (-1, 0) for recent in self._recent)

    def _begin(self, first: int, count: int, end: int, max_pages: int) -> Window | None:
        """Starts a stream. The window holds the request too, so that one call can fetch both."""
        self._recent = [recent for recent in self._recent if first - recent not in (-1, 0)]
        size = max(initial_size(count, max_pages), self.least_pages // 2)
        stop = first + count
        stream = Stream(stop, stop, max(stop, first + size), size)
        self._use(stream)
        if size <= count:
            # The window ends in the request: its marker would be hit by this very read, so the next one starts at once.
            return self._advance(stream, stop, count, end, max_pages)
        stream.stop = max(stop, min(stream.stop, end))
        return _clip(first, size, end)

    def _advance(self, stream: Stream, position: int, count: int, end: int, max_pages: int) -> Window | None:
        """The reader, now at `position`, has reached the marker: asks for the next window, from `stop` on."""
        stream.stop = start = max(stream.stop, position)
        # Half the maximum: two windows make up what is ahead. A request larger than that gets its own length
        # prefetched.
        size = min(next_size(stream.size, max_pages), max(max_pages // 2, min(count, max_pages)))
        room = max_pages - size
        if start - position > room:
            # The maximum has shrunk: wait until the window fits.
            stream.marker = start - room
            return None
        window = _clip(start, size, end)
        stream.marker = start
        if window is not None:
            stream.stop = start + window.size
            stream.size = size
        # At the end of the file marker and stop stay there: if the file grows, reading on goes on with the window
        # size reached.
        return window

    def _use(self, stream: Stream) -> None:
        """Makes it the most recently used one; a new stream replaces the least recently used.

        Hits do not count as use: a stream that lives reaches its marker before long, and hits stay cheap.
        """
        self._current = stream
        if not self._streams or self._streams[0] is not stream:
            self._streams = [stream, *(other for other in self._streams if other is not stream)][:MAX_STREAMS]


def _ask_again(stream: Stream, first: int, count: int, end: int, max_pages: int) -> Window | None:
    """A miss in what was asked for: mostly still in flight, else evicted early or a failed fill.

    The two look the same here, so the state stays, and a first window's worth is asked for once more: nothing happens
    where it is in flight, and where it is gone the stream goes on with small windows until the next marker. Linux
    starts over.
    """
    size = min(initial_size(count, max_pages), stream.stop - first)
    return _clip(first, size, end) if size > count else None


def _clip(start: int, size: int, end: int) -> Window | None:
    size = min(size, end - start)
    return Window(start, size) if size > 0 else None
