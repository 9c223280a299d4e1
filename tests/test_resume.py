"""Killed at any moment (SIGKILL, in the middle of a step or of a save), a run that is called again
ends at the same weights, bit for bit.
"""

import os
import random
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from children import fresh

from reidnb.data.load import load_dataset
from reidnb.methods.registry import recipe
from reidnb.parts.backbones import tiny_trunk
from reidnb.parts.losses import CenterLoss
from reidnb.parts.mixing import hard_mix

EPOCHS, STEPS = 6, 18


def go(method, root, out, steps, seconds):
    """Train in this process; after so many steps and seconds, die.

    With steps -1 come to the end, and write how many steps that took.
    """
    import reidnb.training.loop as training

    sys.stdout = open(os.devnull, "w")
    training.SAVE_EVERY = 0  # saved after each step
    train_step, left, done = training.train_step, steps, 0

    def counted(*args, **given):
        nonlocal left, done
        if left == 0:
            threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        left -= 1
        done += 1
        return train_step(*args, **given)

    training.train_step = counted
    with tiny_trunk():
        r = recipe(method, "synthped-mini", profile="smoke", epochs=EPOCHS, checkpoint_epochs=())
        training.train(r, load_dataset("synthped-mini", root), out, device="cpu")
    if steps >= 0:
        os.kill(os.getpid(), signal.SIGKILL)  # it was quicker than the timer
    (Path(out) / "done").write_text(str(done))


def child(method, root, out, steps, seconds):
    "Its exit code."
    p = fresh.Process(target=go, args=(method, str(root), str(out), steps, seconds))
    p.start()
    p.join(300)
    return p.exitcode


def place(out):
    "Steps done, and how many of them in the epoch that was running."
    for name in ("last.pt", "previous.pt"):
        for f in out.rglob(name):
            saved = torch.load(f, weights_only=True)
            return saved["step"], saved["batch"]
    return 0, 0


@pytest.mark.parametrize(
    "method",
    [
        "bdb",
        pytest.param("stadb", marks=pytest.mark.slow),
        pytest.param("pmm", marks=pytest.mark.slow),
    ],
)
def test_killed_five_times(method, mini, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert child(method, mini, whole, -1, 0) == 0
    rng = random.Random(method)
    at = []
    for _ in range(5):
        assert child(method, mini, killed, rng.randrange(3), rng.uniform(0, 0.1)) == -signal.SIGKILL
        at.append(place(killed))
    assert child(method, mini, killed, -1, 0) == 0
    # it goes on, and not from the start of an epoch only
    assert at == sorted(at) and at[0] != at[-1]
    assert any(batch for _, batch in at)
    assert int((whole / "done").read_text()) == STEPS
    assert int((killed / "done").read_text()) == STEPS - at[-1][0] > 0
    a, b = (torch.load(next(d.rglob("last.pt")), weights_only=True) for d in (whole, killed))
    assert a["step"] == b["step"] == STEPS
    assert a["rows"] == b["rows"]
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    for name, state in a["optimizer"]["state"].items():
        for part in state:
            assert torch.equal(state[part], b["optimizer"]["state"][name][part]), (name, part)
    rows_a, rows_b = (next(d.rglob("metrics.csv")) for d in (whole, killed))
    assert rows_a.read_bytes() == rows_b.read_bytes()


def gradient_of_mixing():
    "The gradient of features of which two images are mixed into thirty others."
    F = torch.linspace(-1, 1, 32 * 512 * 12).sin().view(32, 512, 6, 2).requires_grad_()
    nothing_kept = torch.zeros(1, 1, 6, 2)
    pids = (torch.arange(32) > 29).long()
    mixed = hard_mix(F, nothing_kept, pids, torch.Generator().manual_seed(0))
    (mixed * torch.linspace(-9, 9, mixed.numel()).sin().view_as(mixed)).sum().backward()
    return F.grad


def gradient_of_centres():
    "The gradient of 16 centres, each by 64 embeddings."
    center = CenterLoss(16, 2048)
    with torch.no_grad():
        center.centers.zero_()
    f = torch.linspace(-9, 9, 1024 * 2048).sin().view(1024, 2048)
    center(f, torch.arange(1024) % 16).backward()
    return center.centers.grad


@pytest.mark.parametrize("gradient", [gradient_of_mixing, gradient_of_centres])
def test_a_gradient_is_added_up_in_one_order(gradient):
    "Also by several threads: else a run of several threads could not be repeated."
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = {gradient().numpy().tobytes() for _ in range(50)}
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
