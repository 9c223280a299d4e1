"""What a training step costs that can be counted without a GPU: operations, waits, uploads, graph breaks.

python tests/cuda_counts.py DATA now reports/benchmarks/gpu-counts.csv   # adds rows to the file
PYTHONPATH=OLDER_CLONE python tests/cuda_counts.py DATA before …         # those of other code
"""
# ruff: noqa: E402, I001  (the rehearsal must be imported before torch)

from cuda_rehearsal import OPERATIONS, UPLOADED, WAITS, Gpu, try_out

import math
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch

import reidnb.training.step as step_module
from reidnb import build_model, load_dataset, recipe, train
from reidnb.methods.registry import METHODS
from reidnb.parts.backbones import tiny_trunk
from reidnb.training.testing import test_features

ROOMS = {  # free bytes of the GPU's memory
    "images on the GPU": 2**37,
    "images read ahead": 2**10,
}
CPU = torch.device("cpu")


def small_recipe(method, **fields):
    "Return a recipe of seconds that augments in every way."
    return recipe(
        method,
        "synthped-mini",
        profile="smoke",
        cutout_prob=0.5,
        erase_prob=0.5,
        zoom_prob=0.5,
        **fields,
    )


def trained(r, data, folder, **how):
    "Train on the GPU; return the run directory."
    with Gpu():
        return train(r, data, folder, device="cuda", **how)


def counted(r, data):
    "Train without the test, and return the operations, what made the host wait, and the bytes uploaded."
    for counter in (OPERATIONS, WAITS, UPLOADED):
        counter.clear()
    # saved by the clock, a slow machine would save within the three steps
    never = patch("reidnb.training.loop.SAVE_EVERY", math.inf)
    with tempfile.TemporaryDirectory() as folder, never:
        with patch("reidnb.training.loop.record_test"):
            trained(r, data, folder)
    return {"operations": OPERATIONS.copy(), "waits": WAITS.copy(), "bytes up": UPLOADED.copy()}


def counts(data, code, file):
    "Add what a step, the end of an epoch and a test image cost to a CSV file."
    counted(small_recipe("bdb", precision="bf16", steps=1), data)  # constants that are sent once
    rows = []
    for method in METHODS:
        breaks = graph_breaks(method)
        for room, free in ROOMS.items():
            r = small_recipe(method, precision="bf16", epochs=3, checkpoint_epochs=())
            with patch("torch.cuda.mem_get_info", lambda device=None, free=free: (free, free)):
                costs = costs_of(r, data)
            rows.append(
                {"code": code, "method": method, "images": room}
                | costs
                | {"bytes up a test image": test_bytes(r, data)}
                | {"graph breaks": breaks, "compiled": what_is_compiled(breaks)}
            )
            print(rows[-1])
    pd.DataFrame(rows).to_csv(file, mode="a", header=not Path(file).is_file(), index=False)


def costs_of(r, data):
    "Return what a step costs, and how often the end of an epoch waits."
    per_epoch = len(data.train) // r.batch
    totals = {}
    for n in (1, 3, per_epoch, 2 * per_epoch):
        totals[n] = Counter(
            {what: found.total() for what, found in counted(replace(r, steps=n), data).items()}
        )
    a_step = {what: (totals[3][what] - totals[1][what]) / 2 for what in totals[3]}
    two_epochs = totals[2 * per_epoch]["waits"] - totals[per_epoch]["waits"]
    return {
        "operations a step": a_step["operations"],
        "waits a step": a_step["waits"],
        "bytes up a step": a_step["bytes up"],
        "waits between epochs": two_epochs - per_epoch * a_step["waits"],
    }


def test_bytes(r, data):
    "Return how many bytes go up for an image of the test, on average."
    model = build_model(r.method, data.num_classes, r.backbone)
    with Gpu():
        model.to("cuda")
        UPLOADED.clear()
        test_features(model, r, data, torch.device("cuda"))
    return round(UPLOADED.total() / (len(data.query) + len(data.gallery)))


def graph_breaks(method):
    "Return how often PyTorch's compiler has to leave a network, on its way through a training pass."
    r = small_recipe(method)
    model = step_module.start(r, 4, CPU).model.train()
    x = torch.zeros(8, 3, r.height, r.width)
    pids = torch.arange(4).repeat_interleave(2)
    torch._dynamo.reset()
    with patch("torch.cuda.is_available", lambda: False):  # the compiler asks a GPU more than this
        return torch._dynamo.explain(model.forward)(x, pids).graph_break_count


def what_is_compiled(breaks):
    "Return what the option `compiled` compiles."
    if hasattr(step_module, "compile_network") and breaks == 0:
        return "network"
    return "trunk"


if __name__ == "__main__":
    try_out()
    root, code, file = sys.argv[1:]
    with tiny_trunk():
        counts(load_dataset("synthped-mini", root), code, file)
