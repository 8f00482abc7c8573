"""Who uses the cache: what each program of each user read and wrote, for a bounded number of them.

A handle belongs to an account from its open to its close, and the cache counts into the account what the handle does: so
the sums over all accounts are the totals of the cache, always. There are `ACCOUNTS_MAX` accounts with a name. When one more
is wanted, the smallest that nobody has open is closed, and what it counted goes to its user's `OTHER`: those that use the
cache most keep their names, and no sum ever falls.
"""

from collections.abc import Callable, Iterator

from cachefs.statistics import UseStatistics

ACCOUNTS_MAX = 64  # programs by name and user
USERS_MAX = 32  # users with an OTHER of their own
OTHER = "other"
ANYBODY = -1  # no user's id: of those beyond USERS_MAX, and of work that nobody asked for
COUNTERS = ("page_hits", "page_misses", "hit_bytes", "miss_bytes", "write_bytes")  # as in UseStatistics


class Account:
    """What one program, by name, of one user did. The counters are the cache's to change.

    `stamp` is (name, time in seconds, as of the last tick): a read leaves it on what it read, which costs no look at the clock.
    """

    __slots__ = ("hit_bytes", "miss_bytes", "name", "opens", "page_hits", "page_misses", "stamp", "uid", "write_bytes")

    def __init__(self, name: str, uid: int, now: float) -> None:
        self.name = name
        self.uid = uid
        self.opens = 0  # handles that count here
        self.page_hits = self.page_misses = 0
        self.hit_bytes = self.miss_bytes = self.write_bytes = 0
        self.stamp = (name, now)

    @property
    def bytes(self) -> int:
        """All that went through."""
        return self.hit_bytes + self.miss_bytes + self.write_bytes

    def take_over(self, other: "Account") -> None:
        """Counts as its own what another one has counted."""
        for counter in COUNTERS:
            setattr(self, counter, getattr(self, counter) + getattr(other, counter))


class Accounts:
    """All accounts. `nobody` is there from the start, for what no handle does."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.nobody = Account(OTHER, ANYBODY, now)
        self._named: dict[tuple[str, int], Account] = {}
        self._others: dict[int, Account] = {ANYBODY: self.nobody}  # {uid: its OTHER}

    def __iter__(self) -> Iterator[Account]:
        yield from self._named.values()
        yield from self._others.values()

    def open(self, name: str, uid: int) -> Account:
        """The account of a new handle; `close` it with the handle."""
        account = self._named.get((name, uid))
        if account is None:
            if len(self._named) < ACCOUNTS_MAX or self._close_smallest():
                account = self._named[name, uid] = Account(name, uid, self.now)
            else:
                account = self._other(uid)
        account.opens += 1
        return account

    def close(self, account: Account) -> None:
        account.opens -= 1

    def _close_smallest(self) -> bool:
        """Makes room for another name, if one has no handle."""
        idle = [account for account in self._named.values() if not account.opens]
        if not idle:
            return False
        smallest = min(idle, key=lambda account: account.bytes)
        del self._named[smallest.name, smallest.uid]
        self._other(smallest.uid).take_over(smallest)
        return True

    def _other(self, uid: int) -> Account:
        if uid not in self._others and len(self._others) > USERS_MAX:
            return self.nobody
        return self._others.setdefault(uid, Account(OTHER, uid, self.now))

    def total(self, counter: str) -> int:
        return sum(getattr(account, counter) for account in self)

    def by_program(self) -> dict[str, UseStatistics]:
        """What each program did, for all users together."""
        return self._sums(lambda account: account.name)

    def by_user(self) -> dict[str, UseStatistics]:
        """What each user did, by number, with all programs together."""
        return self._sums(lambda account: OTHER if account.uid == ANYBODY else str(account.uid))

    def _sums(self, key: Callable[[Account], str]) -> dict[str, UseStatistics]:
        sums: dict[str, list[int]] = {}
        for account in self:
            counts = sums.setdefault(key(account), [0] * len(COUNTERS))
            for i, counter in enumerate(COUNTERS):
                counts[i] += getattr(account, counter)
        return {name: UseStatistics(*counts) for name, counts in sums.items()}

    def tick(self, now: float) -> None:
        """Sets the time that stamps tell."""
        self.now = now
        for account in self:
            account.stamp = (account.name, now)
