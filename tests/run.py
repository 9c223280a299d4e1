"""What `make test` and `make test-all` run, one part after the other.

At the end it says what that was and how long it took.

python tests/run.py --check  # formatted, linted, notebooks in step with the package
python tests/run.py          # the same, then every notebook and the ordinary tests
python tests/run.py --slow   # and the cells and tests marked slow, and the kept outputs
python tests/run.py --outputs  # write the outputs that notebooks keep
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import outputs

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent  # not resolved: the environment's


def run(*command, **more):
    """A command whose output is shown as it comes; the output. `more` are environment variables.

    When it fails, this program ends with its status.
    """
    own = {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    env = os.environ | own | more
    print("$", *command, flush=True)
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines = []
    for line in child.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if child.wait() != 0:
        sys.exit(child.returncode if child.returncode > 0 else 1)
    return "".join(lines)


def write_outputs():
    "Execute the notebooks that keep their outputs, and write what is new."
    words = ("--flags", "slow", "--n_workers", "2", "--timing")
    for name in outputs.KEPT:
        program = ("tests/notebooks.py", "--path", f"nbs/{name}", *words)
        run(sys.executable, *program, **{outputs.MODE: "write"})
    run(sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()")


def main(slow, only_check):
    seconds = {}

    def timed(part, *command, **more):
        began = time.monotonic()
        output = run(*command, **more)
        seconds[part] = time.monotonic() - began
        return output

    timed("format", sys.executable, "-m", "ruff", "format", "--check", ".")
    timed("lint", sys.executable, "-m", "ruff", "check", ".")
    # what only a test cell imports is not there in the exported module
    names = ("--isolated", "--select", "F821,F811")
    timed("names", sys.executable, "-m", "ruff", "check", *names, "reidnb")
    timed("in step", sys.executable, "tests/in_step.py")
    if only_check:
        return
    workers = ("--n_workers", "2", "--timing")
    flags = ["--flags", "slow"] if slow else []  # the cells that begin with #| slow
    # the kept pictures are compared only where figures are painted
    mode = {outputs.MODE: "compare"} if slow else {}
    # A worker process ends without the clean-up at its exit, so what its last notebooks hold in
    # temporary folders would stay, 1.5 GB each time.
    with tempfile.TemporaryDirectory(prefix="reidnb-") as scratch:
        mode["TMPDIR"] = scratch
        notebooks = timed(
            "notebooks", sys.executable, "tests/notebooks.py", *workers, *flags, **mode
        )
    which = [] if slow else ["-m", "not slow"]
    tests = timed(
        "tests", sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", *which
    )

    n_notebooks = len(re.findall(r"^\S+\.ipynb: \d+ secs$", notebooks, re.M))
    n_tests = int(re.findall(r"(\d+) passed", tests)[-1])
    parts = ", ".join(f"{part} {s / 60:.1f}" for part, s in seconds.items())
    without = "" if slow else " without what is marked slow (make test-all runs it)"
    minutes = sum(seconds.values()) / 60
    print(
        f"{n_notebooks} notebooks and {n_tests} tests{without}, all well: "
        f"{minutes:.1f} minutes ({parts})"
    )


if __name__ == "__main__":
    if "--outputs" in sys.argv[1:]:
        write_outputs()
    else:
        main("--slow" in sys.argv[1:], "--check" in sys.argv[1:])
