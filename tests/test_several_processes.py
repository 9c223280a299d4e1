"""Two processes (gloo) train as one does: the same loss, gradients and masks; and when one is lost, the run ends with a sentence."""
import multiprocessing as mp, os, signal, socket, threading, time
from pathlib import Path
import pytest, torch
from torch import nn
from reidnb.datasets import load_dataset
from reidnb.recipes import recipe
from reidnb.training import launch, read_run

METHODS = [("bdb", 1), ("topdb", 1), ("stadb", 1), ("sen", 1), ("sen", 2)]                          # and parts of a batch

def fixed(method, accumulate=1, **kw):
    from reidnb.training import join, ranks, start
    torch.set_num_threads(1); torch.set_default_dtype(torch.float64); join("cpu")                      # in double precision, so that rounding hides nothing
    r = recipe(method, "synthped-mini", profile="smoke", identities=8, accumulate=accumulate, **kw); s = start(r, 8, torch.device("cpu")); s.model.train(); masks = []
    for b in s.model.branches.values():
        if b.mask is not None: b.mask.register_forward_hook(lambda m, i, out: masks.append((out != 0).any(1)))
    return r, s, masks, *ranks()

def one_step(path, method, accumulate):
    "Losses, gradients and masks of a step on a fixed batch; this process' share of it, if there are several."
    from reidnb.core import temporary_seed
    from reidnb.training import train_step
    r, s, masks, rank, world = fixed(method, accumulate)
    for m in s.model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.eval()
    with temporary_seed(0): x, pids = torch.randn(32, 3, r.height, r.width), torch.arange(8).repeat_interleave(4)
    if world == 1: order = torch.arange(32).view(2, accumulate, -1).transpose(0, 1).flatten(); x, pids = x[order], pids[order]     # its parts are those of two
    mine = x.view(world, -1, *x.shape[1:])[rank]
    with temporary_seed(1): parts = train_step(s.forward, s.optimizer, mine, pids, r, "", s.center, s.center_optimizer)
    grads = {n: p.grad for m in (s.model, s.center) if m is not None for n, p in m.named_parameters() if p.grad is not None}
    torch.save((parts, grads, masks), f"{path}-{world}-{rank}.pt")

def one_epoch(path, method, accumulate):
    "What a real epoch draws in this process, and where the weights end."
    from unittest.mock import patch
    import reidnb.training as training
    from reidnb.core import progress
    r, s, masks, rank, world = fixed(method, accumulate, cut=.5); seen, step = [], training.train_step
    class Pictures:
        def __getitem__(self, idx): return (torch.arange(3*96*32) % 251).to(torch.uint8).view(1, 3, 96, 32).repeat(len(idx), 1, 1, 1)
    def look(model, optimizer, x, *a): seen.append(x.detach().clone()); return step(model, optimizer, x.double(), *a)
    with patch("reidnb.training.train_step", look): row = training.run_epoch(s, r, Pictures(), torch.arange(8).repeat_interleave(4).numpy(), torch.device("cpu"), progress(disable=True))
    torch.save((row, s.model.trunk[0].weight, [seen, masks]), f"{path}-{world}-{rank}.pt")

def in_process(rank, world, port, f, *args):
    os.environ.update(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=str(port)); f(*args)

fresh = mp.get_context("forkserver"); fresh.set_forkserver_preload(["reidnb.training"])

def run(f, path, *args, worlds=((0, 1), (0, 2), (1, 2))):
    with socket.socket() as free: free.bind(("localhost", 0)); port = free.getsockname()[1]
    all_ = [fresh.Process(target=in_process, args=(*w, port, f, str(path), *args)) for w in worlds]
    for p in all_: p.start()
    for p in all_: p.join(120)
    assert [p.exitcode for p in all_] == [0]*len(worlds)
    return [torch.load(f"{path}-{w}-{r}.pt") for r, w in worlds]

@pytest.mark.parametrize("method, accumulate", METHODS)
def test_as_one(method, accumulate, tmp_path):
    (loss, grads, masks), *others = run(one_step, tmp_path/"x", method, accumulate)
    assert all(v > 0 for k, v in loss.items() if "accuracy" not in k) and sum(g.norm() > 0 for g in grads.values()) > 30
    assert len(masks) == (2 if method == "sen" else 1)*accumulate
    for other_loss, other_grads, _ in others:
        assert other_loss.keys() == loss.keys() and other_grads.keys() == grads.keys()
        for k in loss: torch.testing.assert_close(other_loss[k], loss[k], rtol=1e-9, atol=0, msg=k)
        for k, g in grads.items(): assert (other_grads[k] - g).norm() <= 1e-8*g.norm(), k
    for m, a, b in zip(masks, *(o[2] for o in others)): assert torch.equal(torch.cat([a, b]), m) and 0 < m.float().mean() < 1

def test_an_epoch_of_two(tmp_path):
    "One block for the whole batch, but each process' images are cut in their own way."
    (row, weight, (seen, masks)), (row2, weight2, (seen2, masks2)) = run(one_epoch, tmp_path/"x", "bdb", 1, worlds=((0, 2), (1, 2)))
    assert row == row2 and torch.equal(weight, weight2) and len(seen) == len(masks) == 1
    assert all(torch.equal(m, m2) and 0 < m.float().mean() < 1 for m, m2 in zip(masks, masks2)) and not torch.equal(seen[0], seen2[0])

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    d = tmp_path_factory.mktemp("data"); load_dataset("synthped-mini", d); return d

def test_a_run_of_two(root, tmp_path, capfd):
    r = recipe("bdb", "synthped-mini", profile="smoke"); run = launch(r, root, 2, tmp_path, device="cpu")
    info = read_run(run); assert info["status"] == "finished" and info["versions"]["processes"] == 2 and 0 < info["metrics"]["mAP"] <= 1
    before = (run/"metrics.csv").read_bytes(); assert len(before.splitlines()) == 3
    again = launch(r, root, 2, tmp_path/"again", device="cpu"); assert (again/"metrics.csv").read_bytes() == before       # the same, byte for byte
    assert capfd.readouterr().out.count("bdb on synthped-mini") == 2                                                       # one of the two speaks

def test_what_cannot_be(root, tmp_path):
    with pytest.raises(RuntimeError, match="3 identities in a batch cannot be cut for 2 processes"): launch(recipe("bdb", "synthped-mini", profile="smoke", identities=3), root, 2, tmp_path, device="cpu")

@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process by /proc")
def test_one_is_killed(root, tmp_path):
    r = recipe("bdb", "synthped-mini", profile="smoke", epochs=200, keep_epochs=(1,)); run, killed = tmp_path/r.directory, []
    def kill():
        while not (run/"metrics.csv").is_file(): time.sleep(.2)
        for p in Path("/proc").iterdir():
            try: env = (p/"environ").read_bytes().split(b"\0") if p.name.isdigit() else []
            except OSError: continue
            if b"RANK=1" in env and str(tmp_path).encode() in (p/"cmdline").read_bytes(): os.kill(int(p.name), signal.SIGKILL); killed.append(time.monotonic())
    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(RuntimeError, match="process 1 of 2 was ended by SIGKILL; .* is kept as of its last checkpoint, the same call continues it"): launch(r, root, 2, tmp_path, device="cpu")
    assert len(killed) == 1 and time.monotonic() - killed[0] < 60
    step = torch.load(run/"last.pt", weights_only=True)["step"]; assert step < 600 and read_run(run)["status"] != "finished"
    launch(r, root, 2, tmp_path, device="cpu", max_minutes=.1)                                         # the same call goes on
    assert read_run(run)["status"] == "stopped: the time was up" and torch.load(run/"last.pt", weights_only=True)["step"] > step and len(read_run(run)["parts"]) == 2
