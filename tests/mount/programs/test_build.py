"""A make and gcc build on the mount, and what it made, run from there."""

import os
import re
from pathlib import Path

import pytest
from running import ProgramMount, run

pytestmark = pytest.mark.mount

UNITS = 60
MAKEFILE = """
CFLAGS = -O1 -fPIC -g
OBJECTS = $(patsubst %.c,%.o,$(filter-out main.c,$(wildcard *.c)))
program: main.o libunits.so
	$(CC) -o $@ main.o -L. -lunits '-Wl,-rpath,$$ORIGIN'
libunits.so: $(OBJECTS)
	$(CC) -shared -o $@ $^
libunits.a: $(OBJECTS)
	ar rcs $@ $^
static: main.o libunits.a
	$(CC) -o $@ main.o libunits.a
%.o: %.c units.h
	$(CC) $(CFLAGS) -c -o $@ $<
"""


def write_project(directory: Path) -> None:
    directory.mkdir()
    (directory / "Makefile").write_text(MAKEFILE)
    declarations = "".join(f"int unit_{n}(int);\n" for n in range(UNITS))
    (directory / "units.h").write_text(declarations)
    for number in range(UNITS):
        following = f"unit_{number + 1}(x + {number})" if number + 1 < UNITS else "x"
        text = f'#include "units.h"\nint unit_{number}(int x) {{ return {following}; }}\n'
        (directory / f"unit_{number}.c").write_text(text)
    main = '#include <stdio.h>\n#include "units.h"\nint main(void) { printf("%d\\n", unit_0(1)); return 0; }\n'
    (directory / "main.c").write_text(main)


def made(directory: Path, *targets: str) -> int:
    """Runs make; how many files were compiled."""
    return len(re.findall(r" -c -o ", run("make", "-j2", *targets, cwd=directory)))


def test_project_of_sixty_files_builds_and_runs(program_mount: ProgramMount) -> None:
    project, expected = program_mount.mountpoint / "project", f"{1 + sum(range(UNITS - 1))}\n"
    write_project(project)
    assert made(project) == UNITS + 1
    assert run(project / "program") == expected
    assert made(project) == 0  # times are as make needs them
    os.utime(project / "unit_7.c")
    assert made(project) == 1
    assert made(project, "static") == 0
    (project / "libunits.so").rename(project / "elsewhere.so")
    assert run(project / "static") == expected
    (project / "elsewhere.so").rename(project / "libunits.so")
    loads = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).unit_0(1))"
    assert run("python3", "-c", loads, project / "libunits.so") == expected
    program_mount.unmount()
    assert run(program_mount.source / "project" / "program") == expected
    assert made(program_mount.source / "project", "program", "static") == 0
