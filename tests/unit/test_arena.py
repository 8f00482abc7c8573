"""The arena: slots, and memory that is accounted for whatever comes and goes."""

from __future__ import annotations

import random

from cachefs.cache.arena import Arena
from cachefs.cache.file import CachedFile
from cachefs.cache.page import ALL, FIRST, GROUP_PAGES, GROUP_SIZE, PAGE_SIZE, SMALL_PAGES, Group

FILE = CachedFile(1, None, 0)  # type: ignore[arg-type]  # nothing is read


def new(arena: Arena, index: int = 0, pages: int = GROUP_PAGES, near: int = -1) -> Group:
    group = Group(FILE, index, *arena.allocate(pages, near))
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


def test_random_use_is_accounted_for() -> None:
    rng = random.Random(5)
    arena = Arena(512)
    groups: list[Group] = []
    resident = 0
    for step in range(3000):
        while resident > 400 or (groups and rng.random() < 0.3):
            group = rng.choice(groups)
            going = group.uptodate & rng.getrandbits(256) if rng.random() < 0.7 else group.uptodate
            resident -= going.bit_count()
            if going:
                leave(arena, group, going)
                if not group.uptodate:
                    groups.remove(group)
        if not groups or rng.random() < 0.4:
            groups.append(new(arena, step, rng.choice((1, 16, 256)), rng.choice((-1, rng.randrange(9) * GROUP_SIZE))))
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
