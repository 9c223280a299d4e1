"""Two processes (gloo) train as one does: the same loss, gradients and masks; and when one is lost, the run ends with a sentence."""
import multiprocessing as mp, os, signal, socket, threading, time
from pathlib import Path
import pytest, torch
from torch import nn
from reidnb.datasets import load_dataset
from reidnb.recipes import recipe
from reidnb.training import launch, read_run

METHODS = ["bdb", "topdb", "stadb", "sen"]

def one_step(method, path):
    "Losses, gradients and masks of a step on a fixed batch; this process' share of it, if there are several. In double precision, so that rounding hides nothing."
    from reidnb.core import temporary_seed
    from reidnb.training import join, ranks, start, train_step
    torch.set_num_threads(1); torch.set_default_dtype(torch.float64); join("cpu"); (rank, world), r = ranks(), recipe(method, "synthped-mini", profile="smoke", identities=8)
    s = start(r, 8, torch.device("cpu")); s.model.train(); masks = []
    for m in s.model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.eval()
    for b in s.model.branches.values():
        if b.mask is not None: b.mask.register_forward_hook(lambda m, i, out: masks.append((out != 0).any(1)))
    with temporary_seed(0): x, pids = torch.randn(32, 3, r.height, r.width), torch.arange(8).repeat_interleave(4)
    mine = x.view(world, -1, *x.shape[1:])[rank]
    with temporary_seed(1): parts = train_step(s.forward, s.optimizer, mine, pids, r, "", s.center, s.center_optimizer)
    grads = {n: p.grad for m in (s.model, s.center) if m is not None for n, p in m.named_parameters() if p.grad is not None}
    torch.save((parts, grads, masks), f"{path}-{world}-{rank}.pt")

def in_process(rank, world, port, method, path):
    os.environ.update(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=str(port)); one_step(method, path)

fresh = mp.get_context("forkserver"); fresh.set_forkserver_preload(["reidnb.training"])

@pytest.mark.parametrize("method", METHODS)
def test_as_one(method, tmp_path):
    with socket.socket() as free: free.bind(("localhost", 0)); port = free.getsockname()[1]
    calls = [(0, 1, port), (0, 2, port), (1, 2, port)]; all_ = [fresh.Process(target=in_process, args=(*c, method, str(tmp_path/"x"))) for c in calls]
    for p in all_: p.start()
    for p in all_: p.join(120)
    assert [p.exitcode for p in all_] == [0, 0, 0]
    (loss, grads, masks), *others = [torch.load(tmp_path/f"x-{w}-{r}.pt") for r, w, _ in calls]
    assert all(v > 0 for k, v in loss.items() if "accuracy" not in k) and sum(g.norm() > 0 for g in grads.values()) > 30
    assert len(masks) == (2 if method == "sen" else 1)
    for other_loss, other_grads, _ in others:
        assert other_loss.keys() == loss.keys() and other_grads.keys() == grads.keys()
        for k in loss: torch.testing.assert_close(other_loss[k], loss[k], rtol=1e-9, atol=0, msg=k)
        for k, g in grads.items(): assert (other_grads[k] - g).norm() <= 1e-8*g.norm(), k
    for m, a, b in zip(masks, *(o[2] for o in others)): assert torch.equal(torch.cat([a, b]), m) and 0 < m.float().mean() < 1

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
    r = recipe("bdb", "synthped-mini", profile="smoke", epochs=200); run, killed = tmp_path/r.directory, []
    def kill():
        while not (run/"metrics.csv").is_file(): time.sleep(.2)
        for p in Path("/proc").iterdir():
            try: env = (p/"environ").read_bytes().split(b"\0") if p.name.isdigit() else []
            except OSError: continue
            if b"RANK=1" in env and str(tmp_path).encode() in (p/"cmdline").read_bytes(): os.kill(int(p.name), signal.SIGKILL); killed.append(time.monotonic())
    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(RuntimeError, match="process 1 of 2 was ended by SIGKILL; .* is kept as of its last checkpoint, the same call continues it"): launch(r, root, 2, tmp_path, device="cpu")
    assert len(killed) == 1 and time.monotonic() - killed[0] < 60
    assert torch.load(run/"last.pt", weights_only=True)["epoch"] < 200 and read_run(run)["status"] != "finished"
