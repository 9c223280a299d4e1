"""Processes of their own that need not import torch first.

They are forked from one that has. (A child imports the file of what it calls.)
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from reidnb.parts.backbones import tiny_trunk

ROOT = Path(__file__).resolve().parent.parent

fresh = multiprocessing.get_context("forkserver")
fresh.set_forkserver_preload(["reidnb.results.jobs"])


@dataclass
class Ended:
    "How a command ended, and what it said."

    returncode: int
    stdout: str
    stderr: str


def python_m(module, *args, cwd=ROOT, tiny=False, **env):
    """`python -m MODULE ARGS` in a process of its own, with the tiny trunk or ResNet-18's, without
    the seconds of imports.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        child = fresh.Process(
            target=_run,
            args=(module, [str(a) for a in args], str(cwd), tiny, env, str(out), str(err)),
        )
        child.start()
        child.join()
        return Ended(child.exitcode, out.read_text(), err.read_text())


def _run(module, args, cwd, tiny, env, out, err):
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv = [module, *args]
    with tiny_trunk() if tiny else nullcontext():
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def tables(args, project):
    "`reidnb table ARGS` with the tiny trunk; to be called in a child."
    from reidnb.__main__ import main

    os.environ["REIDNB_ROOT"] = project
    with tiny_trunk():
        main(["table", *args])
