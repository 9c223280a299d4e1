"""Which files the repository ships.

Those that git does not ignore, in a clone and in an unpacked tarball alike.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def git(folder, *words):
    "What git says in a folder."
    return subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    ).stdout


def new_repository(folder):
    "An empty one; without git the test is skipped."
    if not shutil.which("git"):
        pytest.skip("git is not on this machine, and only git knows which files it ignores")
    git(folder.parent, "init", "-q", str(folder))
    return folder


def shipped_files(repository):
    "Paths from ROOT. Seen from an empty repository, every file that is not ignored is a new one."
    names = git(
        ROOT,
        f"--git-dir={repository / '.git'}",
        f"--work-tree={ROOT}",
        "ls-files",
        "-z",
        "--others",
        "--exclude-standard",
    )
    return names.strip("\0").split("\0")
