"""Two processes (gloo) train as one does.

The same loss, gradients and masks; and when one is lost, the run ends with a sentence.
"""

import os
import socket
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch
from children import fresh
from torch import nn

from reidnb.data.load import load_dataset
from reidnb.methods.registry import recipe
from reidnb.parts.backbones import tiny_trunk
from reidnb.training.checkpoints import read_run
from reidnb.training.loop import launch

METHODS = [("bdb", 1), ("topdb", 1), ("stadb", 1), ("sen", 1), ("sen", 2)]  # and parts of a batch


def fixed(method, accumulate=1, **given):
    """A recipe, its state, the masks that its branches make from now on, this process' number and
    how many there are.
    """
    from reidnb.training.distributed import join, ranks
    from reidnb.training.step import start

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that rounding hides nothing
    join("cpu")
    r = recipe(
        method, "synthped-mini", profile="smoke", ids_per_batch=8, accumulate=accumulate, **given
    )
    with tiny_trunk():
        s = start(r, 8, torch.device("cpu"))
    s.model.train()
    masks = []
    for b in s.model.branches.values():
        if b.mask is not None:
            b.mask.register_forward_hook(lambda m, i, out: masks.append((out != 0).any(1)))
    return r, s, masks, *ranks()


def one_step(path, method, accumulate):
    """Losses, gradients and masks of a step on a fixed batch.

    This process' share of it, if there are several.
    """
    from reidnb.core import temporary_seed
    from reidnb.training.step import train_step

    r, s, masks, rank, world = fixed(method, accumulate)
    for m in s.model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()
    with temporary_seed(0):
        x = torch.randn(32, 3, r.height, r.width)
    pids = torch.arange(8).repeat_interleave(4)
    if world == 1:
        # its parts are those of two
        order = torch.arange(32).view(2, accumulate, -1).transpose(0, 1).flatten()
        x, pids = x[order], pids[order]
    mine = x.view(world, -1, *x.shape[1:])[rank]
    with temporary_seed(1):
        parts = train_step(s.forward, s.optimizer, mine, pids, r, "", s.center, s.center_optimizer)
    modules = [m for m in (s.model, s.center) if m is not None]
    grads = {n: p.grad for m in modules for n, p in m.named_parameters() if p.grad is not None}
    torch.save((parts, grads, masks), f"{path}-{world}-{rank}.pt")


def one_epoch(path, method, accumulate):
    "What the batches of a real epoch are in this process, and where the weights end."
    import reidnb.training.loop as training
    from reidnb.core import progress

    r, s, masks, rank, world = fixed(method, accumulate, cutout_prob=0.5)
    seen, train_step = [], training.train_step

    class Pictures:
        def __getitem__(self, idx):
            return (
                (torch.arange(3 * 96 * 32) % 251)
                .to(torch.uint8)
                .view(1, 3, 96, 32)
                .repeat(len(idx), 1, 1, 1)
            )

    def look(model, optimizer, x, *given):
        seen.append(x.detach().clone())
        return train_step(model, optimizer, x.double(), *given)

    labels = torch.arange(8).repeat_interleave(4).numpy()
    with patch("reidnb.training.loop.train_step", look):
        row = training.run_epoch(
            s, r, Pictures(), labels, torch.device("cpu"), progress(disable=True)
        )
    torch.save((row, s.model.trunk[0].weight, [seen, masks]), f"{path}-{world}-{rank}.pt")


class Idle(nn.Linear):
    "A module that no step calls."


def two_steps(path, method, given):
    "Losses of two steps of a recipe that leaves a part of the network out; `idle` is a method of one's own."
    from reidnb.core import temporary_seed
    from reidnb.methods.registry import METHODS, use
    from reidnb.training.step import train_step

    if method == "idle":
        bdb = METHODS["bdb"]

        def build(trunk, classes, **options):
            network = bdb.build(trunk, classes, **options)
            network.extra = Idle(2, 2)
            return network

        use(replace(bdb, name="idle", build=build, variants={}))
    r, s, _, rank, world = fixed(method, **given)
    with temporary_seed(0):
        x = torch.randn(32, 3, r.height, r.width)
    mine = x.view(world, -1, *x.shape[1:])[rank]
    pids = torch.arange(8).repeat_interleave(4)
    losses = [train_step(s.forward, s.optimizer, mine, pids, r)["loss"].item() for _ in range(2)]
    torch.save((losses, s.forward.find_unused_parameters), f"{path}-{world}-{rank}.pt")


def prepared(path, root):
    "How many files this process hashed and decoded before a run, and the images that it trains on."
    import reidnb.data.images as images
    from reidnb.training.distributed import join, ranks
    from reidnb.training.loop import shared_store

    join("cpu")
    rank, world = ranks()
    looked_at = []
    hashed, decode = images._digest, images.ImageStore.decode
    images._digest = lambda path: looked_at.append(path) or hashed(path)
    images.ImageStore.decode = lambda store, i: looked_at.append(i) or decode(store, i)
    r = recipe("bdb", "synthped-mini", profile="smoke")
    store = shared_store(r, load_dataset("synthped-mini", root))
    torch.save((len(looked_at), store[range(len(store))].clone()), f"{path}-{world}-{rank}.pt")


def resumed(path, own_disk):
    """The weights and the step at which this process goes on.

    Process 0 has a checkpoint, process 1 an older one or none: each has its own disk.
    """
    from reidnb.core import temporary_seed
    from reidnb.training.checkpoints import load_state, save_state
    from reidnb.training.step import start

    r, s, _, rank, world = fixed("bdb")
    run = Path(f"{path}-disk-{rank}")
    run.mkdir()
    if rank == 0 or own_disk == "another":
        with (
            temporary_seed(rank),
            torch.no_grad(),
            patch("reidnb.training.checkpoints.ranks", lambda: (0, 1)),
        ):
            for weight in s.model.parameters():
                weight.normal_()
            s.step = 5 + rank
            save_state(s, run, kept=False)
    with tiny_trunk():
        s = load_state(start(r, 8, torch.device("cpu")), run)
    weights = torch.cat([weight.flatten() for weight in s.model.parameters()])
    torch.save((s.step, weights.detach()), f"{path}-{world}-{rank}.pt")


def refused(path):
    "What both processes hear of an error in process 0."
    from reidnb.training.distributed import from_rank0, join, ranks

    join("cpu")
    rank, world = ranks()

    def make():
        assert rank == 0
        raise ValueError("no such picture")

    with pytest.raises(ValueError) as said:
        from_rank0(make)
    torch.save(str(said.value), f"{path}-{world}-{rank}.pt")


def one_run(path, root, out, tiny, recipe, minutes):
    "This process' part of a run, with its share of `minutes`; the run directory."
    from reidnb.training.loop import train

    torch.set_num_threads(1)
    with tiny_trunk() if tiny else nullcontext():
        run = train(
            recipe,
            load_dataset("synthped-mini", root),
            out,
            device="cpu",
            max_minutes=minutes[int(os.environ["RANK"])],
        )
    torch.save(str(run), f"{path}-2-{os.environ['RANK']}.pt")


def in_process(rank, world, port, f, *args):
    os.environ.update(
        WORLD_SIZE=str(world),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    f(*args)


def run(f, path, *args, worlds=((0, 1), (0, 2), (1, 2))):
    "Call f in a process for each (number, of how many); what each saved."
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        fresh.Process(target=in_process, args=(*w, port, f, str(path), *args)) for w in worlds
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join(120)
    assert [p.exitcode for p in processes] == [0] * len(worlds)
    return [torch.load(f"{path}-{w}-{r}.pt") for r, w in worlds]


@pytest.mark.parametrize("method, accumulate", METHODS)
def test_as_one(method, accumulate, tmp_path):
    (loss, grads, masks), *others = run(one_step, tmp_path / "x", method, accumulate)
    assert all(v > 0 for k, v in loss.items() if "accuracy" not in k)
    assert sum(g.norm() > 0 for g in grads.values()) > 30
    assert len(masks) == (2 if method == "sen" else 1) * accumulate
    for other_loss, other_grads, _ in others:
        assert other_loss.keys() == loss.keys() and other_grads.keys() == grads.keys()
        for k in loss:
            torch.testing.assert_close(other_loss[k], loss[k], rtol=1e-9, atol=0, msg=k)
        for k, g in grads.items():
            assert (other_grads[k] - g).norm() <= 1e-8 * g.norm(), k
    for m, a, b in zip(masks, *(o[2] for o in others)):
        assert torch.equal(torch.cat([a, b]), m)
        assert 0 < m.float().mean() < 1


def test_an_epoch_of_two(tmp_path):
    "One block for the whole batch, but each process' images are cut in their own way."
    first, second = run(one_epoch, tmp_path / "x", "bdb", 1, worlds=((0, 2), (1, 2)))
    row, weight, (seen, masks) = first
    row2, weight2, (seen2, masks2) = second
    assert row == row2
    assert torch.equal(weight, weight2)
    assert len(seen) == len(masks) == 1
    assert all(torch.equal(m, m2) and 0 < m.float().mean() < 1 for m, m2 in zip(masks, masks2))
    assert not torch.equal(seen[0], seen2[0])


TWO = (0, 2), (1, 2)


@pytest.mark.parametrize(
    "method, given, skips",
    [
        ("bdb", {}, False),
        ("bdb", {"loss_weights": {"drop/id": 0.0, "drop/triplet": 0.0}}, True),
        ("idle", {}, True),
    ],
)
def test_parts_left_out(method, given, skips, tmp_path):
    "A loss that is off, or a module that is not called: the processes do not wait for its gradient."
    first, second = run(two_steps, tmp_path / "x", method, given, worlds=TWO)
    assert first == second
    losses, finds_unused = first
    assert finds_unused == skips and losses[0] != losses[1]


def test_one_of_two_prepares(mini, tmp_path):
    "Process 0 hashes and decodes the images, and the other reads them."
    (first, images), (second, same) = run(prepared, tmp_path / "x", str(mini), worlds=TWO)
    assert first > 0 == second
    assert torch.equal(images, same) and images.float().std() > 1


@pytest.mark.parametrize("own_disk", ["empty", "another"])
def test_two_disks(own_disk, tmp_path):
    "Whatever the second process has on its disk, both go on from the first one's checkpoint."
    (step, weights), (step2, weights2) = run(resumed, tmp_path / "x", own_disk, worlds=TWO)
    assert step == step2 == 5
    assert torch.equal(weights, weights2)


def test_one_error_for_two(tmp_path):
    assert run(refused, tmp_path / "x", worlds=TWO) == ["no such picture"] * 2


def test_two_whose_time_is_up(mini, tmp_path):
    "One of them has no time left: they agree on that, and stop behind the same step."
    r = recipe("bdb", "synthped-mini", profile="smoke")
    first, second = run(
        one_run, tmp_path / "x", str(mini), str(tmp_path), True, r, (1000, 0), worlds=TWO
    )
    assert first == second
    assert read_run(first)["status"] == "stopped: the time was up"
    assert torch.load(Path(first) / "last.pt", weights_only=True)["step"] == 1


@pytest.mark.slow
def test_what_cannot_be(mini, tmp_path):
    "A process says why, and the call that started it repeats that."
    r = recipe("bdb", "synthped-mini", profile="smoke", ids_per_batch=3)
    with pytest.raises(RuntimeError, match="3 identities in a batch cannot be cut for 2 processes"):
        launch(r, mini, 2, tmp_path, device="cpu")


def kill_one(run, killed):
    "End the second of the two processes as soon as an epoch is over."
    while not (run / "metrics.csv").is_file():
        time.sleep(0.02)
    for p in psutil.Process().children(recursive=True):
        if p.environ().get("RANK") == "1" and "reidnb train" in " ".join(p.cmdline()):
            p.kill()
            killed.append(time.monotonic())


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="finds the process by its environment"
)
def test_a_run_of_two(mini, tmp_path, capfd):
    """One of the two is killed, which the call says.

    The same call goes on, and the run is that of two that were let alone, byte for byte.
    """
    r = recipe("bdb", "synthped-mini", profile="smoke", epochs=3, checkpoint_epochs=(1,))
    whole, _ = run(
        one_run,
        tmp_path / "x",
        str(mini),
        str(tmp_path / "whole"),
        False,
        r,
        (None, None),
        worlds=TWO,
    )

    place, killed = tmp_path / "killed" / r.directory, []
    threading.Thread(target=kill_one, args=(place, killed), daemon=True).start()
    with pytest.raises(
        RuntimeError,
        match="process 1 of 2 was ended by SIGKILL; .* is kept as of its last checkpoint, the same call continues it",
    ):
        launch(r, mini, 2, tmp_path / "killed", device="cpu")
    assert len(killed) == 1 and time.monotonic() - killed[0] < 60
    step = torch.load(place / "last.pt", weights_only=True)["step"]
    assert 0 < step < 9 and read_run(place)["status"] != "finished"

    capfd.readouterr()
    assert launch(r, mini, 2, tmp_path / "killed", device="cpu") == place
    assert capfd.readouterr().out.count("bdb on synthped-mini") == 1, "one of the two speaks"
    info = read_run(place)
    assert info["status"] == "finished" and info["versions"]["processes"] == 2
    assert 0 < info["metrics"]["mAP"] <= 1
    assert [p["first_step"] for p in info["parts"]] == [1, step + 1]
    rows = (place / "metrics.csv").read_bytes()
    assert len(rows.splitlines()) == 4
    assert rows == (Path(whole) / "metrics.csv").read_bytes()
