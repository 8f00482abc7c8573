"""Pages that leave because of what became of their file: it was cut, is gone, or is another in the backing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cachefs.cache import leaving, reads
from cachefs.cache.page import PAGE_SIZE
from checked import Checked, contents

P = PAGE_SIZE


@pytest.mark.parametrize("dirty", [False, True])
@pytest.mark.parametrize("size", [0, 1, P - 1, P, P + 1, 3 * P, 300 * P, 300 * P + 9])
def test_truncate_down_and_up_again_shows_zeros(dirty: bool, size: int) -> None:
    cache = Checked("lru", 1000)
    file = cache.file(0)
    data = contents(0, 400 * P)
    cache.put(file, 0, data)
    if not dirty:
        cache.written(file)
    leaving.truncate(cache, file, size)
    cache.check_invariants()
    assert file.resident_pages == (size + P - 1) // P
    assert cache.seen(file, 0, 1 << 20) == data[: min(size, 1 << 20)]
    leaving.truncate(cache, file, size + 100)
    cache.check_invariants()
    tail = size % P
    if tail:
        assert cache.seen(file, size - tail, tail + 100 if tail + 100 <= P else P) == (data[size - tail : size] + bytes(100))[:P]


def test_discard_leaves_only_what_a_thread_works_on(make_cache: Callable[[int], Checked]) -> None:
    cache = make_cache(64)
    file = cache.file(0)
    cache.put(file, 0, b"x" * 8 * P)
    group = file.groups[0]
    cache.start_writeback(group, 0b1111)
    cache.put(file, 0, b"y")  # redirtied
    leaving.discard(cache, file)
    cache.check_invariants()
    assert group.resident == 0b1111
    cache.finish_writeback(group, 0b1111, None)
    cache.check_invariants()
    assert group.dirty == 1
    leaving.discard(cache, file)
    cache.check_invariants()
    assert not file.groups and not cache.resident_pages and not cache.dirty_pages


def test_invalidate_keeps_what_is_unwritten(make_cache: Callable[[int], Checked]) -> None:
    cache = make_cache(64)
    file = cache.file(8 * P)
    cache.bring(file, 0, 8)
    cache.put(file, 0, b"x" * 2 * P)
    cache.start_writeback(file.groups[0], 1)
    assert leaving.invalidate(cache, file) == 6
    cache.check_invariants()
    assert file.groups[0].uptodate == 0b11
    reads.count_request(cache, file, 2 * P, 8 * P)
    assert cache.misses["invalidated"] == 6
