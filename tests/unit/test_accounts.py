"""Accounts of programs and users: bounded, and no sum over them ever falls."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cachefs.cache.account import ACCOUNTS_MAX, ANYBODY, COUNTERS, OTHER, USERS_MAX, Account, Accounts
from cachefs.process import KNOWN_MAX, UNKNOWN, _known, name_of


def by_name(accounts: Accounts) -> dict[tuple[str, int], int]:
    return {(account.name, account.uid): account.hit_bytes for account in accounts}


def test_a_program_of_a_user_has_one_account_whatever_it_opens() -> None:
    accounts = Accounts(0.0)
    first, second = accounts.open("tar", 0), accounts.open("tar", 0)
    assert first is second and first.opens == 2
    assert accounts.open("tar", 1) is not first
    assert accounts.open("cat", 0) is not first


def test_the_smallest_that_nobody_has_open_makes_room() -> None:
    accounts = Accounts(0.0)
    held = accounts.open("held", 0)
    for i in range(1, ACCOUNTS_MAX):
        account = accounts.open(f"p{i}", 7)
        account.hit_bytes = 100 + i
        accounts.close(account)
    accounts.open("new", 0)
    found = by_name(accounts)
    assert ("p1", 7) not in found and found[OTHER, 7] == 101
    assert ("held", 0) in found and ("p2", 7) in found and ("new", 0) in found
    assert held.opens == 1


def test_when_all_are_open_a_new_program_counts_as_other() -> None:
    accounts = Accounts(0.0)
    for i in range(ACCOUNTS_MAX):
        accounts.open(f"p{i}", 0)
    late = accounts.open("late", 5)
    assert (late.name, late.uid, late.opens) == (OTHER, 5, 1)
    accounts.close(late)
    assert late.opens == 0


def test_users_are_bounded_too() -> None:
    accounts = Accounts(0.0)
    for uid in range(ACCOUNTS_MAX + 2 * USERS_MAX):
        accounts.open("p", uid)
    assert len(list(accounts)) == ACCOUNTS_MAX + USERS_MAX + 1
    assert accounts.open("q", 999) is accounts.nobody


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 40), st.integers(0, 10), st.booleans()), max_size=300))
def test_sums_are_what_was_counted_and_never_fall(steps: list[tuple[int, int, int, bool]]) -> None:
    accounts, counted = Accounts(0.0), 0
    last: Counter[str] = Counter()
    open_: list[Account] = []
    for name, uid, nbytes, close in steps:
        account = accounts.open(f"p{name}", uid)
        open_.append(account)
        for counter in COUNTERS:
            setattr(account, counter, getattr(account, counter) + nbytes)
        counted += nbytes
        if close:
            accounts.close(open_.pop(0))
        assert {accounts.total(counter) for counter in COUNTERS} == {counted}
        others = Counter({str(a.uid): a.hit_bytes for a in accounts if a.name == OTHER})
        assert all(others[uid] >= nbytes for uid, nbytes in last.items())
        last = others
    assert sum(account.opens for account in accounts) == len(open_)


def test_stamps_tell_the_time_of_the_last_tick() -> None:
    accounts = Accounts(1.0)
    assert accounts.nobody.stamp == (OTHER, 1.0) and accounts.nobody.uid == ANYBODY
    account = accounts.open("tar", 0)
    accounts.tick(5.0)
    assert account.stamp == ("tar", 5.0)
    assert accounts.open("cat", 0).stamp == ("cat", 5.0)


# --- which program


def test_a_thread_has_the_name_of_its_process() -> None:
    own, seen = name_of(os.getpid()), []

    def look() -> None:
        with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as file:
            file.write("worker")
        seen.append(name_of(threading.get_native_id()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [own] != [UNKNOWN]


def test_a_process_is_known_by_its_latest_name() -> None:
    """It changes with exec(2): what runs in a shell's child is not the shell."""
    script = "echo this is sh; read line; exec cat"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == b"this is sh\n"
        assert name_of(child.pid) == "sh"
        child.stdin.write(b"go on\nword\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"word\n"  # now it is cat
        assert name_of(child.pid) == "cat"
        child.stdin.close()
    assert name_of(child.pid) == UNKNOWN


def test_regression_a_process_without_a_name_costs_one_descriptor() -> None:
    script = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b''); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        assert name_of(child.pid) == ""
        before = len(os.listdir("/proc/self/fd"))
        assert {name_of(child.pid) for _ in range(5)} == {""}
        assert len(os.listdir("/proc/self/fd")) == before
        child.stdin.close()


def test_of_many_processes_only_the_latest_are_remembered() -> None:
    children = [subprocess.Popen(["cat"], stdin=subprocess.PIPE) for _ in range(KNOWN_MAX + 3)]
    try:
        for _ in range(2):
            assert {name_of(child.pid) for child in children} <= {"cat", name_of(os.getpid())}  # some are not that far yet
        assert len(_known) <= KNOWN_MAX
    finally:
        for child in children:
            child.communicate()


def test_who_is_gone_or_cannot_be_seen_is_unknown() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    assert name_of(child) == name_of(0) == UNKNOWN
