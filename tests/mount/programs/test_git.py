"""git on the mount: init, commit, branch, merge, gc, clone and fsck of a repository with a few thousand objects."""

import random
from pathlib import Path

import pytest
from running import ProgramMount, run

pytestmark = pytest.mark.mount

DIRECTORIES, FILES_EACH = 20, 30
COMMITS = {"off": 6, "open": 2, "keep": 2}  # for time's sake
IDENTITY = {
    "GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example.org", "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.org", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null",
}  # fmt: skip


def git(repository: Path, *words: str) -> str:
    return run("git", "-c", "init.defaultBranch=main", *words, cwd=repository, env=IDENTITY)


def write_files(repository: Path, chance: random.Random, share: float) -> None:
    for number in range(DIRECTORIES * FILES_EACH):
        if chance.random() < share:
            path = repository / f"d{number // FILES_EACH}" / f"f{number}"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"{number} {chance.random()}\n" for _ in range(chance.randrange(1, 120))))


def test_repository_of_a_few_thousand_objects(program_mount: ProgramMount) -> None:
    repository, chance = program_mount.mountpoint / "repository", random.Random(1)
    repository.mkdir()
    git(repository, "init", "--quiet")
    commits = COMMITS[program_mount.kernel_cache]
    for number in range(commits):
        write_files(repository, chance, 1.0 if number == 0 else 0.5)
        git(repository, "add", "--all")
        git(repository, "commit", "--quiet", "--message", f"commit {number}")
    git(repository, "checkout", "--quiet", "-b", "side", "HEAD~1")
    (repository / "only here").write_text("x\n")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "side")
    git(repository, "checkout", "--quiet", "main")
    git(repository, "merge", "--quiet", "--no-edit", "side")
    loose = int(git(repository, "count-objects").split()[0])
    assert loose > commits * 330
    git(repository, "gc", "--quiet", "--prune=now")
    assert int(git(repository, "count-objects").split()[0]) == 0

    clone = program_mount.mountpoint / "clone"
    git(program_mount.mountpoint, "clone", "--quiet", "--no-local", "repository", "clone")
    git(program_mount.mountpoint, "clone", "--quiet", "--shared", "repository", "shared")  # objects stay where they are
    for tree in (repository, clone, program_mount.mountpoint / "shared"):
        assert git(tree, "fsck", "--strict", "--full") == ""
        assert git(tree, "status", "--porcelain") == ""
        assert len(git(tree, "log", "--format=%H").split()) == commits + 2
    assert git(clone, "rev-parse", "HEAD") == git(repository, "rev-parse", "HEAD")
    run("diff", "-r", "--exclude=.git", repository, clone)
    program_mount.sync()
    assert git(program_mount.source / "repository", "fsck", "--strict", "--full") == ""
