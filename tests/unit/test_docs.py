"""Documents against the code: every path, name, option, test and await that they mention exists."""

from __future__ import annotations

import ast
import builtins
import errno
import functools
import importlib
import keyword
import os
import re
from pathlib import Path

import pytest

from cachefs.cli import commands
from cachefs.config import KERNEL_CACHE_MODES, OPTIONS, POLICY_NAMES

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("docs/*.md"), *(ROOT / f"{name}.md" for name in ("README", "SEMANTICS", "CONTRIBUTING", "CHANGELOG")))
)
PACKAGES = ("cachefs", "backing")
TOP = re.compile(r"(cachefs|backing|tests|bench|scripts|deploy|docs|\.ci)(/[\w.@*-]+)*/?")
TEST = re.compile(r"(tests/[\w/]+\.py)::(test_\w+)")
DOTTED = re.compile(r"_?[A-Za-z]\w*(\._?[A-Za-z]\w*)+")
NAME = re.compile(r"_?[A-Za-z]\w*")
LIBRARIES = ("trio", "pyfuse3", "os", "mmap", "numpy", "click")
# Names that are not ours: programs, system calls, words of mount(8), libraries.
FOREIGN = {
    "fsync", "sync", "stat", "open", "close", "read", "write", "umount", "mount", "systemctl", "journalctl", "fusermount3",
    "argparse", "madvise", "posix_fallocate", "ro", "noatime", "nosuid", "nodev", "noexec", "_netdev", "ruff", "mypy",
    "user", "cachefs", "resident", "willneed", "dontneed", "noreuse", "random", "sequential",
    "wait", "park", "acquire_on_behalf_of", "_locked", "_bytes", "_pages", "_seconds", "_ns", *KERNEL_CACHE_MODES, *POLICY_NAMES,
}  # fmt: skip
AWAITS_OF = (
    "cachefs/cache/fill.py", "cachefs/writeback.py", "cachefs/files.py", "cachefs/durability.py", "cachefs/setattr.py",
    "cachefs/attributes.py", "cachefs/source.py", "cachefs/conflicts.py",
    "cachefs/watch.py", "cachefs/descriptors.py", "cachefs/watchdog.py", "cachefs/question.py",
    "cachefs/walk.py",
)  # fmt: skip


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def marked(document: str) -> list[str]:
    """What stands between backticks, but for blocks of code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE))


@functools.cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


@functools.cache
def known() -> tuple[frozenset[str], dict[str, frozenset[str]]]:
    """Every name that the packages define, and for each class and module the names of its members."""
    names: set[str] = set()
    members: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            module = tree(path.relative_to(ROOT).as_posix())
            members.setdefault(path.stem, set()).update(defined(module))
            names |= {path.stem, *defined(module)}
            for node in ast.walk(module):
                if isinstance(node, ast.ClassDef):
                    members.setdefault(node.name, set()).update(defined(node))
                if isinstance(node, ast.arg):
                    names.add(node.arg)
    return frozenset(names), {name: frozenset(found) for name, found in members.items()}


def defined(where: ast.AST) -> set[str]:
    """Names of functions, classes, variables, fields and attributes of self inside a module or class."""
    found: set[str] = set()
    for node in ast.walk(where):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def exists(name: str) -> bool:
    """Whether a dotted or plain name is one of ours, or one of a library's."""
    parts = name.removesuffix("()").split(".")
    names, members = known()
    if parts[0] in LIBRARIES:
        return of_library(parts)
    if len(parts) == 1:
        word = parts[0]
        of_python = keyword.iskeyword(word) or any(hasattr(module, word) for module in (os, errno, builtins))
        return word in names or word in FOREIGN or of_python
    if parts[0] in PACKAGES:
        path = ROOT.joinpath(*parts)
        return path.is_dir() or path.with_suffix(".py").exists() or parts[-1] in members.get(parts[-2], ())
    if parts[0] in members and parts[1] in members[parts[0]]:
        return all(part in names for part in parts[2:])
    return parts[0].islower() and all(part in names or part in FOREIGN for part in parts)  # an object, as in `inode.lock`


def of_library(parts: list[str]) -> bool:
    found: object = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            try:
                found = importlib.import_module(".".join(parts[:i]))
            except ImportError:
                return False
        else:
            found = getattr(found, part)
    return True


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_and_name_in_backticks_exists(document: str) -> None:
    missing = []
    for text in marked(document):
        if match := TEST.fullmatch(text):
            good = match[2] in names_in(match[1])
        elif TOP.fullmatch(text) and "/" in text:
            good = any(ROOT.glob(text.rstrip("/")))
        elif text.endswith((".md", ".py", ".toml")) and " " not in text:
            good = any(ROOT.glob(text)) or any(ROOT.glob(f"cachefs/**/{text}")) or any(ROOT.glob(f"backing/{text}"))
        elif DOTTED.fullmatch(text) or NAME.fullmatch(text):
            good = exists(text)
        else:
            continue
        if not good:
            missing.append(text)
    assert not missing


@pytest.mark.parametrize("document", [*DOCUMENTS, "METRICS.md", "deploy/README.md", "deploy/RUNBOOK.md"])
def test_every_link_leads_somewhere(document: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text_of(document))
    assert not [to for to in targets if "://" not in to and not (ROOT / document).parent.joinpath(to).exists()]


@pytest.mark.parametrize("document", [*DOCUMENTS, "deploy/README.md", "deploy/RUNBOOK.md"])
def test_every_command_target_and_option_exists(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    parameters = [parameter for command in commands.commands.values() for parameter in command.params]
    options = {"--version", *(word for parameter in parameters for word in (*parameter.opts, *parameter.secondary_opts))}
    missing = []
    for text in marked(document):
        first, _, rest = text.partition(" ")
        word = rest.split(" ")[0]
        if first == "make" and word and word not in targets:
            missing.append(text)
        if first == "cachefs" and word and not word.startswith("-") and word not in commands.commands:
            missing.append(text)
        if first in ("cachefs", *options) or first.startswith("--"):
            missing += [option for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text) if option not in options]
    assert not missing


def test_the_options_of_the_readme_are_those_of_the_program() -> None:
    section = text_of("README.md").split("\n## Options\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(--[^`]+)` \| (.+) \| (.+) \|$", section, re.MULTILINE)
    wanted = [
        (
            f"{option.dashed} {option.metavar}".strip(),
            option.help + (f": {', '.join(option.choices)}" if option.choices else ""),
            option.default,
        )
        for option in OPTIONS
        if not option.hidden
    ]
    assert rows == wanted


# --- SEMANTICS.md


@functools.cache
def names_in(path: str) -> frozenset[str]:
    if not (ROOT / path).exists():
        return frozenset()
    return frozenset(node.name for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def statements() -> list[str]:
    """The points and rows of SEMANTICS.md, each with the lines that it goes on in."""
    found: list[str] = []
    for line in text_of("SEMANTICS.md").splitlines():
        if line.startswith("- ") or (line.startswith("| ") and not line.startswith(("| what ", "|--"))):
            found.append(line)
        elif line.startswith("  ") and found:
            found[-1] += line
    return found


def test_every_statement_of_the_semantics_names_a_test() -> None:
    assert len(statements()) > 30
    assert not [statement for statement in statements() if not TEST.search(statement)]


def test_every_test_that_the_semantics_name_exists() -> None:
    missing = [f"{path}::{name}" for path, name in TEST.findall(text_of("SEMANTICS.md")) if name not in names_in(path)]
    assert not missing


# --- docs/concurrency.md


def awaits(path: str) -> dict[str, set[str]]:
    """{qualified name of a function: what it awaits}."""
    found: dict[str, set[str]] = {}

    def walk(node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and len(names) == 2:
                walk(child, names)  # what a function in a function awaits belongs to the outer one
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                walk(child, (*names, child.name))
            else:
                if isinstance(child, ast.Await):
                    called = child.value.func if isinstance(child.value, ast.Call) else child.value
                    found.setdefault(".".join(names), set()).add(ast.unparse(called))
                if isinstance(child, ast.AsyncWith):
                    found.setdefault(".".join(names), set()).update(ast.unparse(item.context_expr) for item in child.items)
                walk(child, names)

    walk(tree(path), ())
    return found


@pytest.mark.parametrize("path", AWAITS_OF)
def test_every_await_of_the_data_path_is_accounted_for(path: str) -> None:
    section = text_of("docs/concurrency.md").split(f"\n### {path}\n")[1].split("\n#")[0]
    listed = {
        cells[1].strip(" `"): set(re.findall(r"`([^`]+)`", cells[2]))
        for cells in (line.split("|") for line in section.splitlines())
        if len(cells) == 6 and "`" in cells[1]
    }
    assert listed == awaits(path)
