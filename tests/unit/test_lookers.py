"""Which programs are sent attributes with the names that they list."""

from __future__ import annotations

from cachefs.transport.lookers import LOOKS, PROGRAMS_MAX, Lookers

FIND, LS = 11, 12


def test_a_program_that_never_looks_is_never_sent_attributes() -> None:
    lookers = Lookers()
    for directory in range(2, 100):
        assert not lookers.wants(FIND)
        lookers.listed(FIND, directory, 50)
        lookers.looked(FIND, directory)  # of a directory inside, which it goes into
    assert not lookers.wants(FIND)


def test_a_program_that_looks_up_what_it_has_listed_is_sent_attributes_from_then_on() -> None:
    lookers = Lookers()
    lookers.listed(LS, 2, 1000)
    for _ in range(LOOKS - 1):
        lookers.looked(LS, 2)
        assert not lookers.wants(LS)
    lookers.looked(LS, 2)
    assert lookers.wants(LS) and not lookers.wants(FIND)


def test_of_few_names_most_are_enough() -> None:
    lookers = Lookers()
    lookers.listed(LS, 2, 3)
    lookers.looked(LS, 2)
    assert not lookers.wants(LS)
    lookers.looked(LS, 2)
    assert lookers.wants(LS)


def test_looks_elsewhere_do_not_count() -> None:
    lookers = Lookers()
    lookers.listed(LS, 2, 100)
    lookers.listed(LS, 3, 100)
    for _ in range(2 * LOOKS):
        lookers.looked(LS, 2)
        lookers.looked(FIND, 3)
    assert not lookers.wants(LS) and not lookers.wants(FIND)


def test_parts_of_one_listing_add_up() -> None:
    lookers = Lookers()
    for _ in range(3):
        lookers.listed(LS, 2, 2)
    for _ in range(3):
        lookers.looked(LS, 2)
    assert not lookers.wants(LS)
    lookers.looked(LS, 2)
    assert lookers.wants(LS)


def test_it_remembers_the_latest_programs() -> None:
    lookers = Lookers()
    lookers.listed(LS, 2, 1)
    lookers.looked(LS, 2)
    for pid in range(1000, 1000 + PROGRAMS_MAX - 1):
        lookers.listed(pid, 3, 1)
    assert lookers.wants(LS)
    lookers.listed(5000, 3, 1)
    assert not lookers.wants(LS)
    assert len(lookers._programs) <= PROGRAMS_MAX
