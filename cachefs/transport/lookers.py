"""Which programs look at what they list: theirs are the listings that attributes are sent along with.

READDIRPLUS spares a program that goes on to stat or open what it has listed (`ls -l`, `grep -r`, `tar`) a LOOKUP a name;
one that wants names and kinds alone (`find`, completion in a shell) pays for it with a stat a name. The kernel's own rule
(FUSE_READDIRPLUS_AUTO) sends them with the first answer of each directory, which is all of most. Here a program is taken for
one that wants names alone until it has looked up some of the files that it was sent without attributes. Pure: no I/O, no clock.
"""

LOOKS = 8  # of names in one directory that was listed without attributes: then it looks
PROGRAMS_MAX = 64  # that are remembered, the latest


class _Program:
    """Threads of the kernel's `pid` count as programs; a number that comes back as another program's costs some stats."""

    __slots__ = ("directory", "looks", "names")

    def __init__(self) -> None:
        self.directory = 0  # the node that it listed last without attributes
        self.names = 0  # how many it was sent of that
        self.looks = 0  # how many of these it has looked up


class Lookers:
    """`wants(pid)` before each part of a listing, `listed` after one without attributes, `looked` at a LOOKUP of a file."""

    def __init__(self) -> None:
        self._programs: dict[int, _Program | None] = {}  # None: it looks

    def wants(self, pid: int) -> bool:
        return pid in self._programs and self._programs[pid] is None

    def listed(self, pid: int, directory: int, names: int) -> None:
        """It was sent so many names of a directory without attributes."""
        program = self._programs.pop(pid, None) or _Program()
        if program.directory != directory:
            program.directory, program.names, program.looks = directory, 0, 0
        program.names += names
        self._programs[pid] = program
        if len(self._programs) > PROGRAMS_MAX:
            del self._programs[next(iter(self._programs))]

    def looked(self, pid: int, directory: int) -> None:
        program = self._programs.get(pid)
        if program is not None and program.directory == directory:
            program.looks += 1
            if program.looks >= LOOKS or 2 * program.looks > program.names:
                self._programs[pid] = None
