"""One run: what is asked for, where it works, who takes part, and what it says meanwhile."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peers import PEERS, Peer, missing
from processes import Failed
from results import LOADED, Results, others_busy


@dataclass
class Run:
    """`turns` is how every part goes through rounds and subjects."""

    rounds: int
    quick: bool
    work: Path
    results: Results = field(default_factory=Results)
    load: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {text}", file=sys.stderr, flush=True)

    def some(self, many: int, few: int) -> int:
        """How many of something: fewer with --quick."""
        return few if self.quick else many

    def peers(self, names: Sequence[str]) -> list[Peer]:
        """Those that are here; the others are noted by name."""
        found = []
        for name in names:
            reason = missing(PEERS[name])
            if reason is None:
                found.append(PEERS[name])
            else:
                self.results.note(f"{name}: skipped, {reason}")
        return found

    def turns(self, part: str, peers: Sequence[Peer], rounds: int | None = None) -> Iterator[tuple[int, Peer]]:
        """Each round goes through all peers, each beginning with another one."""
        rounds = self.rounds if rounds is None else rounds
        for number in range(rounds):
            self.load = others_busy()
            if self.load > LOADED:
                self.results.note(f"others kept {self.load:g} processors busy in round {number + 1} of {part}")
            order = [*peers[number % len(peers) :], *peers[: number % len(peers)]]
            for peer in order:
                if number < peer.rounds_max:
                    self.say(f"{part}: round {number + 1} of {rounds}: {peer.name}")
                    yield number, peer

    def each(self, part: str, peers: Sequence[Peer], turn: Callable[[int, Peer], None]) -> None:
        """`turn(round, peer)` for all turns; what fails is noted, and the others go on."""
        for number, peer in self.turns(part, peers):
            try:
                turn(number, peer)
            except (Failed, OSError) as error:
                self.results.note(f"{peer.name}: {part}, round {number + 1}: {error}")

    def directory(self, name: str) -> Path:
        path = self.work / name
        path.mkdir(parents=True, exist_ok=True)
        return path
