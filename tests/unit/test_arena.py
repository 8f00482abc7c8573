"""The arena: slots, and memory that is accounted for whatever comes and goes."""

from __future__ import annotations

import ctypes
import mmap
import random
from pathlib import Path

import pytest

from cachefs.cache import arena as arenas
from cachefs.cache.arena import Arena
from cachefs.cache.file import CachedFile
from cachefs.cache.page import ALL, FIRST, GROUP_PAGES, GROUP_SIZE, PAGE_SIZE, SMALL_PAGES, Group

FILE = CachedFile(1, None, 0)  # type: ignore[arg-type]  # nothing is read


def new(arena: Arena, index: int = 0, pages: int = GROUP_PAGES, near: int = -1, whole: bool = False) -> Group:
    group = Group(FILE, index, *arena.allocate(pages, near, whole))
    if group.touched:
        arena.leave_holes(group)
    return group


def fill(arena: Arena, group: Group, mask: int) -> None:
    arena.touch(group, mask)
    group.uptodate |= mask


def leave(arena: Arena, group: Group, mask: int) -> None:
    group.uptodate &= ~mask
    if group.uptodate:
        arena.leave_holes(group)
    else:
        arena.release(group)


def test_a_group_gets_the_slot_behind_its_predecessor() -> None:
    arena = Arena(1024)
    slots = [new(arena, i) for i in range(4)]
    for group in slots:
        fill(arena, group, ALL)
    for group in slots:
        leave(arena, group, ALL)
    third = new(arena, near=slots[2].base)
    assert third.base == slots[2].base
    assert new(arena, near=third.base + GROUP_SIZE).base == slots[3].base


def test_small_and_large_slots_do_not_overlap() -> None:
    arena = Arena(64)
    groups = [new(arena, i, pages) for i, pages in enumerate((1, SMALL_PAGES, SMALL_PAGES + 1, GROUP_PAGES, 3))]
    assert [group.capacity for group in groups] == [SMALL_PAGES, SMALL_PAGES, GROUP_PAGES, GROUP_PAGES, SMALL_PAGES]
    for group in groups:
        fill(arena, group, 1)
    arena.check(groups)


def test_memory_is_reused_before_more_is_taken() -> None:
    arena = Arena(1024)
    group = new(arena)
    fill(arena, group, ALL)
    leave(arena, group, ALL)
    again = new(arena, 1)
    assert again.touched == ALL
    fill(arena, again, FIRST[10])
    assert arena.physical_pages == GROUP_PAGES
    arena.check([again])


def test_given_back_memory_reads_as_zeros() -> None:
    arena = Arena(300)
    groups = [new(arena, i) for i in range(3)]
    for group in groups[:2]:
        fill(arena, group, ALL)
        arena.view[group.base : group.base + GROUP_SIZE] = b"x" * GROUP_SIZE
        leave(arena, group, ALL >> 1)
    fill(arena, groups[2], ALL)
    arena.check(groups)
    group = groups[0]
    assert group.touched == 1 << 255
    assert arena.view[group.base : group.base + GROUP_SIZE] == bytes(GROUP_SIZE - PAGE_SIZE) + b"x" * PAGE_SIZE


def test_regression_memory_about_to_be_used_is_not_given_back() -> None:
    """`touch` pushed the count over the limit, and the pages it was called for passed for stale ones."""
    arena = Arena(16)  # and 256 of slack
    group, other = new(arena), new(arena, 1)
    fill(arena, group, FIRST[200])
    leave(arena, group, FIRST[200] & ~1)
    fill(arena, other, FIRST[72])
    assert arena.physical_pages == 272
    fill(arena, group, 1 << 255)
    assert group.touched == group.uptodate == 1 | 1 << 255
    arena.check([group, other])


def test_regression_a_recycled_slot_with_more_memory_than_pages_is_known_to_have_holes() -> None:
    """Streams fill slots whole; then lone pages take them over. The arena found nothing to give back and failed."""
    arena = Arena(2048)
    slots = [new(arena, i) for i in range(8)]
    for group in slots:
        fill(arena, group, ALL)
    for group in slots:
        leave(arena, group, ALL)
    lone = []
    for i in range(600):
        lone.append(new(arena, i))
        fill(arena, lone[-1], 1)
    arena.check(lone)
    assert arena.physical_pages <= arena.capacity_pages + arena.slack_pages


@pytest.fixture
def huge_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if the kernel had them, whatever this one is told."""
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(arenas, "HUGE_PAGES", str(tmp_path / "enabled"))


@pytest.mark.usefixtures("huge_pages")
def test_groups_that_will_be_filled_lie_two_in_a_huge_page_which_counts_from_its_first_byte_on() -> None:
    arena = Arena(2048)
    first = new(arena, 1, whole=True)
    assert arena.physical_pages == 512 and first.touched == ALL
    second = new(arena, 2, near=first.base + GROUP_SIZE, whole=True)
    assert second.base == first.base + GROUP_SIZE and arena.physical_pages == 512
    assert (ctypes.addressof(ctypes.c_char.from_buffer(arena._map)) + first.base) % (2 << 20) == 0
    for group in (first, second):
        fill(arena, group, ALL)
    other = new(arena, 3)
    fill(arena, other, ALL)
    assert arena.physical_pages == 768 and abs(other.base - first.base) >= 2 << 20
    arena.check([first, second, other])
    for group in (first, second, other):
        leave(arena, group, ALL)
    assert new(arena, 4, whole=True).base == first.base and arena.physical_pages == 768


@pytest.mark.usefixtures("huge_pages")
def test_no_huge_page_is_begun_where_memory_is_short() -> None:
    arena = Arena(1000)  # and 256 of slack
    groups = [new(arena, i, whole=True) for i in range(4)]
    for group in groups:
        fill(arena, group, FIRST[200])
    assert arena.physical_pages == 1024
    late = new(arena, 9, whole=True)
    assert not late.touched and abs(late.base - groups[0].base) >= 2 << 20
    fill(arena, late, FIRST[200])
    arena.check([*groups, late])
    for i in range(10, 20):
        groups.append(new(arena, i))
        fill(arena, groups[-1], FIRST[20])
    arena.check([*groups, late])
    assert arena.physical_pages <= arena.capacity_pages + arena.slack_pages


@pytest.mark.usefixtures("huge_pages")
def test_what_is_left_of_a_huge_page_is_taken_page_by_page() -> None:
    """Given back in part, it lies in small pages from then on: there is nothing to gain by counting all of it."""
    arena = Arena(1000)
    first, second = (new(arena, i, whole=True) for i in range(2))
    fill(arena, first, ALL)
    fill(arena, second, ALL)
    leave(arena, second, ALL)
    arena.resize(0)
    assert arena.physical_pages == 256  # the slot that was free went back
    arena.resize(1000)
    again = new(arena, 2, whole=True)
    assert again.base == second.base and again.touched == 0
    fill(arena, again, 1)
    assert arena.physical_pages == 257
    arena.check([first, again])


@pytest.mark.usefixtures("huge_pages")
def test_regression_the_kernel_makes_no_huge_page_again_of_what_is_left_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """khugepaged did, of a single page, within seconds: memory that had gone back came again, and nobody counted it."""
    arena, advised = Arena(1000), []

    class Watched:
        def __init__(self, memory: mmap.mmap) -> None:
            self.memory = memory

        def madvise(self, advice: int, start: int, length: int) -> None:
            advised.append((advice, start, length))
            self.memory.madvise(advice, start, length)

    monkeypatch.setattr(arena, "_map", Watched(arena._map))
    first, second = (new(arena, i, whole=True) for i in range(2))
    for group in (first, second):
        fill(arena, group, ALL)
    leave(arena, first, ALL ^ 1)
    leave(arena, second, ALL)
    arena.resize(0)
    assert arena.physical_pages <= 256
    small = (mmap.MADV_NOHUGEPAGE, first.base, 2 << 20)
    assert advised[0] == small and advised.count(small) == 1
    leave(arena, first, 1)
    arena.resize(0)
    while arena._whole.warm:
        arena._discard(*arena._whole.cool())
    arena.resize(1000)
    again = new(arena, 3, whole=True)
    assert again.base in (first.base, second.base) and advised[-1] == (mmap.MADV_HUGEPAGE, first.base, 2 << 20)
    arena.check([again])


@pytest.mark.usefixtures("huge_pages")
def test_regression_a_huge_page_with_no_memory_is_not_begun_unnoticed() -> None:
    """Where a free slot with memory was there, one without was taken if it was the nearest, and counted for nothing."""
    arena = Arena(4096)
    groups = [new(arena, i, whole=True) for i in range(4)]
    for group in groups:
        fill(arena, group, ALL)
    for group in groups[2:]:
        leave(arena, group, ALL)
    while arena._whole.warm:
        arena._discard(*arena._whole.cool())
    leave(arena, groups[0], ALL)
    taken = new(arena, 9, near=groups[2].base, whole=True)
    assert taken.base == groups[0].base
    arena.check([groups[1], taken])


def test_memory_with_no_room_for_a_huge_page_has_none() -> None:
    memory = mmap.mmap(-1, 4 << 20)
    start, end = arenas._huge(memory, 3 << 20)
    assert start == end or end <= 4 << 20


def test_without_huge_pages_there_is_one_kind_of_large_slots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    for where in (tmp_path / "enabled", tmp_path / "nothing"):
        monkeypatch.setattr(arenas, "HUGE_PAGES", str(where))
        arena = Arena(2048)
        group = new(arena, whole=True)
        assert group.base == 0 and not group.touched and not arena.physical_pages


def test_the_kernel_gives_huge_pages() -> None:
    if not any(word in Path(arenas.HUGE_PAGES).read_text() for word in ("[madvise]", "[always]")):
        pytest.skip("not on this kernel")
    arena = Arena(4096)
    groups = [new(arena, i, whole=True) for i in range(8)]
    for group in groups:
        fill(arena, group, ALL)
        arena.view[group.base : group.base + GROUP_SIZE] = bytes(GROUP_SIZE)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    assert any(line.startswith("AnonHugePages:") and int(line.split()[1]) >= 2048 for line in lines)


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("capacity", [512, 2048])
def test_random_use_is_accounted_for(capacity: int) -> None:
    rng = random.Random(5)
    arena = Arena(capacity)
    groups: list[Group] = []
    resident = 0
    for step in range(3000):
        while resident > capacity - 112 or (groups and rng.random() < 0.3):
            group = rng.choice(groups)
            going = group.uptodate & rng.getrandbits(256) if rng.random() < 0.7 else group.uptodate
            resident -= going.bit_count()
            if going:
                leave(arena, group, going)
                if not group.uptodate:
                    groups.remove(group)
        if not groups or rng.random() < 0.4:
            near = rng.choice((-1, rng.randrange(9) * GROUP_SIZE, groups[-1].base + GROUP_SIZE if groups else -1))
            groups.append(new(arena, step, rng.choice((1, 16, 256)), near, whole=rng.random() < 0.4))
        group = groups[-1] if not groups[-1].uptodate else rng.choice(groups)
        first = rng.randrange(group.capacity)
        mask = FIRST[min(rng.choice((1, 4, 100)), group.capacity - first)] << first & ~group.uptodate or ~group.uptodate & 1
        if not mask and not group.uptodate:
            mask = 1
        fill(arena, group, mask)
        resident += mask.bit_count()
        if step % 50 == 0:
            arena.check(groups)
    arena.check(groups)
