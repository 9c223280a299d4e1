"""Killed at any moment (SIGKILL, in the middle of a step or of a save), a run that is called again ends at the same weights, bit for bit."""
import multiprocessing as mp, os, random, signal, sys, threading
from pathlib import Path
import pytest, torch
from reidnb.datasets import load_dataset
from reidnb.recipes import recipe

def go(method, root, out, steps, seconds):
    "Train in this process; after so many steps and seconds, die."
    import reidnb.training as training
    step, left, done = training.train_step, steps, 0; training.SAVE_EVERY = 0; sys.stdout = open(os.devnull, "w")          # saved after each step
    def counted(*a, **kw):
        nonlocal left, done
        if left == 0: threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        left -= 1; done += 1
        return step(*a, **kw)
    training.train_step = counted
    training.train(recipe(method, "synthped-mini", profile="smoke", epochs=4, keep_epochs=()), load_dataset("synthped-mini", root), out, device="cpu")
    if steps >= 0: os.kill(os.getpid(), signal.SIGKILL)                     # it was quicker than the timer
    (Path(out)/"done").write_text(str(done))

def child(*args):
    p = fresh.Process(target=go, args=[*map(str, args[:3]), *args[3:]]); p.start(); p.join(300)
    return p.exitcode

def place(out):
    "Steps done, and how many of them in the epoch that was running."
    f = next((f for n in ("last", "previous") for f in out.rglob(f"{n}.pt")), None); c = torch.load(f, weights_only=True) if f else {"step": 0, "batch": 0}
    return c["step"], c["batch"]

fresh = mp.get_context("forkserver"); fresh.set_forkserver_preload(["reidnb.training"])      # imports once; each child is a process of its own

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    d = tmp_path_factory.mktemp("data"); load_dataset("synthped-mini", d); return d

@pytest.mark.parametrize("method", ["bdb", "stadb", "pmm"])
def test_killed_five_times(method, root, tmp_path):
    assert child(method, root, tmp_path/"whole", -1, 0) == 0; rng = random.Random(method)
    at = []
    for _ in range(5):
        assert child(method, root, tmp_path/"killed", rng.randrange(3), rng.uniform(0, .3)) == -signal.SIGKILL
        at += [place(tmp_path/"killed")]
    assert child(method, root, tmp_path/"killed", -1, 0) == 0
    assert at == sorted(at) and at[0] != at[-1] and any(batch for _, batch in at)                        # it goes on, and not from the start of an epoch only
    assert int((tmp_path/"killed/done").read_text()) == 12 - at[-1][0] and int((tmp_path/"whole/done").read_text()) == 12
    a, b = (torch.load(next((tmp_path/d).rglob("last.pt")), weights_only=True) for d in ("whole", "killed"))
    assert a["step"] == b["step"] > 10 and a["rows"] == b["rows"]
    for k, v in a["model"].items(): assert torch.equal(v, b["model"][k]), k
    for k, v in a["optimizer"]["state"].items(): assert all(torch.equal(v[x], b["optimizer"]["state"][k][x]) for x in v)
    files = [next((tmp_path/d).rglob("metrics.csv")) for d in ("whole", "killed")]; assert files[0].read_bytes() == files[1].read_bytes()
