"""A campaign: writers work on a mount whose daemon is killed again and again, and nothing acknowledged may be missing.

A round is: mount (perhaps killed while it recovers, and mounted again), compare the mount with the record, let the writers
work, and end the daemon: by SIGKILL while they work, by SIGKILL during an unmount, or by an unmount that is let finish. After
the latter the directory behind is compared with the record too.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from daemons import Crashed, Place
from writers import StopFlag, Writer

# Mean growth of the records from mount to kill; exponential, so that some kills come at once and some late. Some 80 bytes a call.
WORK_BYTES = 15_000
WORK_MOST_SECONDS = 20.0
POLL_SECONDS = 0.002
KILLED_AT_START, KILLED_AT_END, CLEAN = 0.15, 0.12, 0.08  # shares of the rounds
# After a signal, while writers are at work; and see `Campaign._look_aside`.
ORDINARY = re.compile("is in use .*: taken away under its users|another one has its place; what was not written is in")
STOP_WAYS = ("umount", "signal", "fusermount")
TUNINGS: Sequence[Sequence[str]] = (
    ("--cache-size", "16M"),
    ("--cache-size", "16M", "--dirty-expire", "40ms", "--writeback-interval", "20ms"),
    ("--cache-size", "4M", "--dirty-limit", "50%"),
    ("--cache-size", "64M", "--dirty-limit", "50%", "--dirty-expire", "60s"),
    ("--cache-size", "64M", "--dirty-expire", "100ms", "--writeback-interval", "50ms"),
)


class Campaign:
    """One place, its writers, and how often what was done to its daemon. `ordinary` is what its log may say."""

    def __init__(
        self,
        place: Place,
        writers: Sequence[Writer],
        seed: int,
        *,
        options: Sequence[str] = (),
        ordinary: re.Pattern[str] = ORDINARY,
        faults: Faults | None = None,
    ) -> None:
        self.place, self.writers = place, writers
        self.seed, self.random = seed, random.Random(seed)
        self.options, self.ordinary, self.faults = list(options), ordinary, faults
        self.done: Counter[str] = Counter()
        self._stop = StopFlag()
        for writer in writers:
            writer.prepare(place.source)

    def run(self, kills: int) -> None:
        """Goes on until so many daemons were killed and everything was written out at the end; raises Crashed at trouble."""
        while self.kills < kills:
            self._round()
        self._start()
        self._end_cleanly()

    def run_without_kills(self, rounds: int) -> None:
        """The same work, but every round ends by an unmount: finds what kills are not to blame for."""
        for _ in range(rounds):
            self.done["rounds"] += 1
            self._start()
            self._set_faults()
            self._let_work()
            self._join()
            self._end_cleanly()

    @property
    def kills(self) -> int:
        return sum(count for what, count in self.done.items() if what.startswith("killed"))

    def summary(self) -> str:
        acknowledged = ", ".join(f"{writer.name} {writer.acknowledged}" for writer in self.writers)
        return f"seed {self.seed}: {dict(self.done)}; acknowledged: {acknowledged}"

    # --- a round -------------------------------------------------------------------------------------------------------

    def _round(self) -> None:
        self.done["rounds"] += 1
        while self.random.random() < KILLED_AT_START:
            self._kill_at_start()
        self._start()
        self._set_faults()
        self._let_work()
        choice = self.random.random()
        if choice < KILLED_AT_END:
            self._kill_at_end()
        elif choice < KILLED_AT_END + CLEAN:
            self._join()
            self._end_cleanly()
        else:
            self.done["killed at work" if self.place.kill() else "ended by itself"] += 1
            self._join()

    def _start(self) -> None:
        """Mounts, and compares what is there with the record."""
        self._choose_options()
        self._set_faults(none=True)
        self.place.start()
        self._look_aside()
        self._check(self.place.path, "the mount", mounted=True)
        self._complain([f"the log says: {line}" for line in self.place.bad_lines(self.ordinary)])

    def _choose_options(self) -> None:
        through = self.random.choice(("auto", "off", "off"))
        self.place.options = [*self.random.choice(TUNINGS), "--write-through", through, *self.options]
        if self.faults is not None:
            self.place.options += ["--fault-plan", str(self.faults.path)]

    def _kill_at_start(self) -> None:
        """Kills while it mounts: mostly in the middle of recovery."""
        self._choose_options()
        self.place.begin()
        self.place.ended(self.random.uniform(0, self.place.start_seconds * 1.1))
        self.done["killed at start" if self.place.kill() else "ended by itself"] += 1

    def _let_work(self) -> None:
        self._stop.set(False)
        for writer in self.writers:
            writer.start(self.place.path, self.random.getrandbits(32), self._stop)
        enough = self._recorded_bytes() + self.random.expovariate(1 / WORK_BYTES)
        deadline = time.monotonic() + WORK_MOST_SECONDS
        while self._recorded_bytes() < enough and time.monotonic() < deadline:
            if self.place.ended(POLL_SECONDS):
                raise Crashed(f"the daemon ended while it was at work:\n{self.place.log_text()}")
        for writer in self.writers:
            if writer.ended() and not (self.faults is not None and writer.ended_by_mapping()):
                raise Crashed(f"{writer.name} has ended while the mount was alive: {writer.join()} {writer.record.last(set())}")

    def _recorded_bytes(self) -> int:
        return sum(writer.record.size() for writer in self.writers)

    def _join(self) -> None:
        """The mount is gone or they are to stop: waits for the writers, and takes in what was acknowledged to them."""
        self._stop.set(True)
        self._complain([line for writer in self.writers for line in writer.join()])

    def _kill_at_end(self) -> None:
        """Kills during an unmount. A signal takes the mount away from writers at work; else they have stopped before."""
        how = self.random.choice(STOP_WAYS)
        if how != "signal":
            self._join()
        self._set_faults(none=True)
        command = self.place.ask_to_end(how)
        self.place.ended(self.random.expovariate(1 / 0.03))
        self.done["killed at end" if self.place.kill() else "ended by itself"] += 1
        if command:
            self.place.spawner.wait(command)
        if how == "signal":
            self._join()

    def _end_cleanly(self) -> None:
        self._set_faults(none=True)
        self.place.unmount()
        self.done["unmounted"] += 1
        self._check(self.place.source, "SOURCE", mounted=False)
        self._complain([f"the log says: {line}" for line in self.place.bad_lines(self.ordinary)])

    # --- finding -------------------------------------------------------------------------------------------------------

    def _check(self, root: Path, where: str, mounted: bool) -> None:
        begun = time.monotonic()
        self._complain([f"{where}: {line}" for writer in self.writers for line in writer.check(root, mounted)])
        self.done["milliseconds of checks"] += round(1000 * (time.monotonic() - begun))

    def _look_aside(self) -> None:
        """Recovery may have put aside what an operation under way was removing, and nothing else."""
        going = {path for writer in self.writers for path in writer.victims()}
        for aside in self.place.recovered():
            if not aside.paths & going:
                history = [line for writer in self.writers for line in writer.history(aside.paths | going)]
                found = f"recovery found no place for {aside.note}; under way was the end of {going or 'nothing'}"
                self._complain([found, *history])
            shutil.rmtree(aside.directory)
            self.done["put aside"] += 1

    def _complain(self, complaints: Sequence[str]) -> None:
        if complaints:
            shown = "\n  ".join(complaints[:60])
            options = " ".join(self.place.options)
            raise Crashed(f"{self.summary()}\noptions: {options}\n  {shown}\nlog:\n{self.place.log_text()[-1500:]}")

    def _set_faults(self, none: bool = False) -> None:
        if self.faults is not None:
            self.faults.set([] if none else self.faults.choose(self.random))


class Faults:
    """The plan file of what goes wrong with the backing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set([])

    def set(self, rules: Sequence[dict[str, object]]) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(rules))
        new.replace(self.path)

    def choose(self, source: random.Random) -> list[dict[str, object]]:
        """Some of: short calls, failing ones now and then, slow ones. All failures end after some calls."""
        rules: list[dict[str, object]] = []
        if source.random() < 0.5:
            errno = source.choice(("EIO", "ENOSPC", "EDQUOT"))
            rules.append({"op": "pwritev", "after": source.randrange(30), "count": source.randrange(1, 6), "errno": errno})
        if source.random() < 0.5:
            short = source.choice((512, 1000, 4096, 5000))
            rules.append({"op": "pwritev", "after": source.randrange(20), "count": source.randrange(50), "short": short})
        if source.random() < 0.3:
            rules.append({"op": "fsync", "after": source.randrange(4), "count": 1, "errno": "EIO"})
        if source.random() < 0.3:
            rules.append({"op": "preadv", "after": source.randrange(20), "count": source.randrange(1, 5), "errno": "EIO"})
        if source.random() < 0.3:
            rules.append({"op": source.choice(("*", "pwritev", "fstat")), "delay_seconds": source.choice((0.0005, 0.003, 0.02))})
        return rules
