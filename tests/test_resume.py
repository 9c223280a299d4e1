"""Killed at any moment (SIGKILL, in the middle of a step or of a save), a run that is called again ends at the same weights, bit for bit."""
import multiprocessing as mp, os, random, signal, sys, threading
import pytest, torch
from reidnb.datasets import load_dataset
from reidnb.recipes import recipe

def go(method, root, out, steps, seconds):
    "Train in this process; after so many steps and seconds, die."
    import reidnb.training as training
    step, left = training.train_step, steps; training.SAVE_EVERY = 0; sys.stdout = open(os.devnull, "w")          # saved after each step
    def counted(*a, **kw):
        nonlocal left
        if left == 0: threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        left -= 1
        return step(*a, **kw)
    training.train_step = counted
    training.train(recipe(method, "synthped-mini", profile="smoke", epochs=4, keep_epochs=()), load_dataset("synthped-mini", root), out, device="cpu")
    if steps >= 0: os.kill(os.getpid(), signal.SIGKILL)                     # it was quicker than the timer

def child(*args):
    p = fresh.Process(target=go, args=[*map(str, args[:3]), *args[3:]]); p.start(); p.join(300)
    return p.exitcode

fresh = mp.get_context("forkserver"); fresh.set_forkserver_preload(["reidnb.training"])      # imports once; each child is a process of its own

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    d = tmp_path_factory.mktemp("data"); load_dataset("synthped-mini", d); return d

@pytest.mark.parametrize("method", ["bdb", "stadb", "pmm"])
def test_killed_five_times(method, root, tmp_path):
    assert child(method, root, tmp_path/"whole", -1, 0) == 0; rng = random.Random(method)
    for _ in range(5): assert child(method, root, tmp_path/"killed", rng.randrange(3), rng.uniform(0, .3)) == -signal.SIGKILL
    assert child(method, root, tmp_path/"killed", -1, 0) == 0
    a, b = (torch.load(next((tmp_path/d).rglob("last.pt")), weights_only=True) for d in ("whole", "killed"))
    assert a["step"] == b["step"] > 10 and a["rows"] == b["rows"]
    for k, v in a["model"].items(): assert torch.equal(v, b["model"][k]), k
    for k, v in a["optimizer"]["state"].items(): assert all(torch.equal(v[x], b["optimizer"]["state"][k][x]) for x in v)
    files = [next((tmp_path/d).rglob("metrics.csv")) for d in ("whole", "killed")]; assert files[0].read_bytes() == files[1].read_bytes()
