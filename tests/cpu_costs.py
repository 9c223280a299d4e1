"""What the CPU is kept busy with, beside the same of older code: steps, the ends of epochs, TAR at FAR.

python tests/cpu_costs.py DATA OLDER_CLONE reports/benchmarks/cpu-costs.csv        # all of it
python tests/cpu_costs.py DATA OLDER_CLONE reports/benchmarks/cpu-costs.csv steps  # one part anew

Each code runs in processes of its own, on one thread. Times are of the processor, so that other programs
of the machine change them little. Steps of the two are taken in turns. A step's time is the median over
several processes, because the smallest of many steps differs by 10 % between processes of the same code.
"""

import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import pandas as pd

HERE = Path(__file__).resolve().parent.parent
STEPS = 40  # timed ones of each process
PROCESSES = 3  # of each code
EPOCHS = 8
MARKET = 3368, 15913, 1536  # queries, gallery, dimension
METHODS = "baseline", "bdb"
COLUMNS = ["what", "of", "code", "cpu seconds", "result"]


def child(*words, clone):
    "Start this program in the code of a clone."
    env = os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def answer(process):
    "Wait for a line of a child that begins with an equals sign."
    for line in process.stdout:
        if line.startswith("="):
            return line[1:].strip()
    raise RuntimeError(f"{process.args} ended with {process.wait()}")


# ---- In the children


def say(value):
    "Answer the parent."
    print(f"={value}", file=sys.__stdout__, flush=True)


def laptop_run(root, method, **fields):
    "Return a recipe and its data."
    from reidnb import load_dataset, recipe

    r = recipe(method, "synthped-small", profile="laptop", checkpoint_epochs=(), **fields)
    return r, load_dataset("synthped-small", root)


def quietly_trained(r, data):
    "Train without a test, and without checkpoints by the clock."
    from reidnb import train

    with (
        tempfile.TemporaryDirectory() as folder,
        patch("reidnb.training.loop.SAVE_EVERY", float("inf")),
        patch("reidnb.training.loop.record_test"),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        train(r, data, folder, device="cpu")


def steps(root, method):
    "Train; before each step wait for a line, and afterwards say the CPU seconds between two steps."
    import reidnb.training.loop as loop

    r, data = laptop_run(root, method, steps=STEPS + 3)
    train_step = loop.train_step
    began = None

    def waiting(*given):
        nonlocal began
        now = time.process_time()
        say(None if began is None else now - began)
        sys.stdin.readline()
        began = time.process_time()
        return train_step(*given)

    with patch.object(loop, "train_step", waiting):
        quietly_trained(r, data)


def epochs(root, method):
    """Say how many CPU seconds pass in the training's own thread between two epochs.

    Taken off are those that pass between two steps anyhow. The network's own work is left out."""
    import torch

    import reidnb.training.loop as loop

    r, data = laptop_run(root, method, epochs=EPOCHS)
    train_step = loop.train_step
    gaps = []
    parts = {}
    last = None

    def stand_in(*given):
        nonlocal last, parts
        if last is not None:
            gaps.append(time.thread_time() - last)
        if not parts:
            parts = train_step(*given)
        last = time.thread_time()
        return {name: torch.ones(()) for name in parts}

    with patch.object(loop, "train_step", stand_in):
        quietly_trained(r, data)
    per_epoch = (len(gaps) + 1) // EPOCHS
    between = gaps[per_epoch - 1 :: per_epoch]
    inside = [g for i, g in enumerate(gaps) if i % per_epoch != per_epoch - 1]
    say(min(between) - min(inside))


def tar(repeats):
    "Say the CPU seconds of TAR at FAR at Market-1501's size, and the result."
    from reidnb.bench.measure import crowd_features
    from reidnb.evaluation.statistics import tar_at_far

    qf, gf, ids = crowd_features(*MARKET)
    times = []
    for _ in range(int(repeats)):
        began = time.process_time()
        result = tar_at_far(qf, gf, *ids)
        times.append(time.process_time() - began)
    say(f"{min(times)} {sum(result.values()) / len(result)}")


# ---- In the parent


def steps_in_turns(root, clones, method):
    "Return for each code the CPU seconds of a step, the median over its processes."
    children = []
    for _ in range(PROCESSES):
        for code, clone in clones.items():
            children.append((code, child("steps", root, method, clone=clone)))
    times = {code: [] for code in clones}
    for turn in range(STEPS + 3):
        if turn % 2:
            children.reverse()
        for code, process in children:
            seconds = answer(process)
            if turn >= 3:
                times[code].append(float(seconds))
            process.stdin.write("\n")
            process.stdin.flush()
    for _, process in children:
        process.communicate()
    return {code: statistics.median(found) for code, found in times.items()}


def measured(name, root, clones):
    "Yield rows: what, of what, by which code, CPU seconds, and the result where it has one."
    if name == "steps":
        for method in METHODS:
            for code, seconds in steps_in_turns(root, clones, method).items():
                yield "a training step", f"{method}, synthped-small, laptop", code, seconds, None
    if name == "epochs":
        for method in METHODS:
            for code, clone in clones.items():
                seconds = float(answer(child("epochs", root, method, clone=clone)))
                yield "between epochs", f"{method}, synthped-small, laptop", code, seconds, None
    if name == "tar":
        q, g, dim = MARKET
        for code, clone in clones.items():
            repeats = 1 if code == "before" else 3
            seconds, result = answer(child("tar", repeats, clone=clone)).split()
            yield "TAR at FAR", f"{q}×{g}, D={dim}", code, float(seconds), float(result)


def main(root, older, file, names):
    "Measure both codes, and put each row into the file as soon as it is known."
    clones = {"before": Path(older).resolve(), "now": HERE}
    for name in names:
        for row in measured(name, root, clones):
            print(*row, flush=True)
            rows = []
            if Path(file).is_file():
                rows = pd.read_csv(file).to_numpy().tolist()
            rows = [r for r in rows if r[:3] != list(row[:3])] + [row]
            table = pd.DataFrame(rows, columns=COLUMNS).sort_values(COLUMNS[:3], kind="stable")
            table.to_csv(file, index=False, float_format="%.6g")


CHILDREN = {"steps": steps, "epochs": epochs, "tar": tar}

if __name__ == "__main__":
    name, *words = sys.argv[1:]
    if name in CHILDREN:
        CHILDREN[name](*words)
    else:
        older, file, *names = words
        main(name, older, file, names or CHILDREN)
