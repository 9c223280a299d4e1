"""What is rehearsed on a GPU that is not there; `test_cuda_rehearsal.py` calls these, one a process.

python tests/cuda_checks.py steps DATA bdb      # no step waits for the GPU
python tests/cuda_checks.py resume DATA         # a run that was stopped ends at the same weights
python tests/cuda_checks.py diverged DATA       # a loss that becomes NaN ends the run
python tests/cuda_checks.py same DATA           # evaluation, search, features: the same as on the CPU
python tests/cuda_checks.py faults DATA         # what each planted fault gives, as JSON
python tests/cuda_checks.py ledger DATA         # the tiny ledger's rows are all done
python tests/cuda_checks.py notebook nbs/core.ipynb  # its tests, with a GPU
"""
# ruff: noqa: E402, I001  (the rehearsal must be imported before torch)

from cuda_rehearsal import CannotFollow, Gpu, internal, try_out
from cuda_counts import ROOMS, counted, small_recipe, trained

import json
import math
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from click.testing import CliRunner
from torch.testing import assert_close

from reidnb import (
    ImageStore,
    Matcher,
    build_model,
    evaluate_distances,
    evaluate_ranking,
    extract,
    load_dataset,
    read_run,
    recall_at_k,
    rerank,
    search,
    top_k,
)
from reidnb.__main__ import main as main_command
from reidnb.bench.ledger import begin_sitting, open_rows, read_ledger, work_off_rows
from reidnb.bench.measure import crowd_features
from reidnb.data.images import Normalised
from reidnb.evaluation.statistics import tar_at_far
from reidnb.evaluation.thresholds import threshold_rates
from reidnb.parts.backbones import tiny_trunk
from reidnb.training.step import prepare_batch

# ---- Steps


def check_steps(data, method, precision, room):
    "Raise an AssertionError where three steps wait more often than one."
    free = ROOMS[room]
    r = small_recipe(method, precision=precision, steps=3)
    with patch("torch.cuda.mem_get_info", lambda device=None: (free, free)):
        one = counted(replace(r, steps=1), data)
        three = counted(r, data)
    for (operator, place), n in (three["waits"] - one["waits"]).items():
        raise AssertionError(
            f"{method}, {precision}, {room}: a step waits for the GPU: {operator} in {place}, "
            f"{n} times in two steps"
        )
    batch = 3 * r.batch * math.prod(r.train_shape)  # bytes of its pictures
    uploaded = three["bytes up"].total() - one["bytes up"].total()
    images_go_up = uploaded >= 2 * batch
    assert images_go_up == (room == "images read ahead"), f"{room}: {three['bytes up']}"


def steps(data, method):
    "Train a method as a whole, then count the waits of its steps."
    with tempfile.TemporaryDirectory() as folder:
        # this also sends the constants that a process sends once
        run = trained(small_recipe(method, precision="bf16", steps=1), data, folder)
        assert read_run(run)["status"] == "finished", read_run(run)["status"]
    for room in ROOMS:
        check_steps(data, method, "bf16", room)
    check_steps(data, method, "fp32", "images on the GPU")


# ---- Stopped and resumed


def resume(data):
    "Stop a run after its first and after its second step; it ends as one that was let alone."
    r = small_recipe("bdb", checkpoint_epochs=())
    with tempfile.TemporaryDirectory() as folder:
        whole = trained(r, data, f"{folder}/whole")
        for _ in range(2):
            stopped = trained(r, data, f"{folder}/stopped", max_minutes=0)
            assert read_run(stopped)["status"] == "stopped: the time was up"
        trained(r, data, f"{folder}/stopped")
        assert read_run(whole)["status"] == read_run(stopped)["status"] == "finished"
        a, b = (torch.load(run / "last.pt", weights_only=True) for run in (whole, stopped))
        assert a["step"] == b["step"] == 6
        equal = partial(assert_close, rtol=0, atol=0, equal_nan=True)
        for part in ("model", "optimizer"):
            equal(a[part], b[part])
        equal(a["rng"]["cuda"], b["rng"]["cuda"])
        for name in ("metrics.csv", "queries.csv"):
            assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name


def diverged(data):
    "Let a loss become NaN: no step asks for it, so the end of the epoch says it."
    wild = small_recipe("bdb", lr=1e20)
    with tempfile.TemporaryDirectory() as folder:
        try:
            trained(wild, data, folder)
        except FloatingPointError as error:
            said = str(error)
        assert "the loss became nan before step 4 (epoch 1), in " in said, said
        status = read_run(Path(folder) / wild.directory)["status"]
        assert status == f"failed: {said}"


# ---- The same as on the CPU


def on_both(compute, *features, **how):
    "Compute something of features on the CPU and of the same on the GPU."
    on_cpu = compute(*features, **how)
    with Gpu():
        on_gpu = compute(*[f.to("cuda") for f in features], **how)
        moved = [x.cpu() if isinstance(x, torch.Tensor) else x for x in as_list(on_gpu)]
    return as_list(on_cpu), moved


def as_list(x):
    "Return several results as a list, and one as a list of one."
    return list(x) if isinstance(x, (tuple, list)) else [x]


def check_same(compute, *features, **how):
    "Raise an AssertionError unless the results of the CPU and the GPU are the same bits."
    for a, b in zip(*on_both(compute, *features, **how), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), (compute, how)
        else:
            np.testing.assert_equal(b, a, err_msg=f"{compute}, {how}")


def measures(ranking):
    "Return all that a ranking says of its queries."
    return ranking.first_match, ranking.ap, ranking.ap50, ranking.inp


def evaluation_is_the_same():
    "Rank, re-rank and search a crowd; small parts, so that what joins them is rehearsed too."
    qf, gf, ids = crowd_features(40, 150, 32)
    q_pids, g_pids, *_ = ids

    def ranked(q, g, **how):
        return measures(evaluate_ranking(q, g, *ids, **how))

    def ranked_distances(q, g):
        return measures(evaluate_distances(torch.cdist(q, g), *ids))

    for metric in ("euclidean", "cosine"):
        check_same(ranked, qf, gf, metric=metric, at_once=1500)
        check_same(ranked, qf, gf, metric=metric, at_once=3000, rerank=True)
        check_same(rerank, qf, gf, metric=metric, at_once=3000)
        check_same(search, qf, gf, metric=metric, at_once=3000)
    check_same(ranked, qf, gf, protocol="single-gallery-shot", repeats=3)
    check_same(ranked_distances, qf, gf)
    check_same(lambda q, g: top_k(q, g, *ids, k=7), qf, gf)
    check_same(lambda q: recall_at_k(q, q_pids), qf)
    check_same(lambda q, g: list(tar_at_far(q, g, *ids).values()), qf, gf)
    check_same(lambda q, g: list(threshold_rates(q, g, *ids).values()), qf, gf)
    check_same(
        lambda q, g: recall_at_k(q, q_pids, gallery=g, gallery_labels=g_pids, metric="cosine"),
        qf,
        gf,
    )


def features_are_the_same(data):
    "Extract features of images, and match people in them."
    images = Normalised(ImageStore(data.query.path, (96, 32)))
    people = data.gallery.groupby("pid").path.first()
    for method in ("bdb", "sen"):
        torch.manual_seed(0)
        model = build_model(method, 12, backbone="resnet18").eval()
        features, answers = {}, {}
        for device in ("cpu", "cuda"):
            with Gpu():
                features[device] = extract(model, images, batch_size=5, device=device, flip=True)
                matcher = Matcher(model, (96, 32), device=device, batch_size=3)
                for pid, path in people.items():
                    matcher.add(f"person {pid}", path)
                answers[device] = matcher.who(data.query.path[:7].tolist())
                matcher.add("twice", [people.iloc[0], data.query.path[0]])
                answers[device].attrs = matcher.calibrate(far=0.2)
        assert features["cpu"].std() > 0
        assert torch.equal(features["cpu"], features["cuda"]), method
        pd.testing.assert_frame_equal(answers["cpu"], answers["cuda"], check_exact=True)
        assert answers["cpu"].attrs == answers["cuda"].attrs


def same(data):
    "Compare all that is computed after training."
    evaluation_is_the_same()
    features_are_the_same(data)


# ---- Planted faults

FAULTS = {}  # name -> a function that plants the fault, checks, and so should raise an error


def in_each_step(room="images on the GPU"):
    "Make a function of a batch a fault: it is called with each batch before its step."

    def add(fault):
        def prepare(*args):
            x = prepare_batch(*args)
            fault(x)
            return x

        def check(data):
            with patch("reidnb.training.loop.prepare_batch", prepare):
                check_steps(data, "bdb", "bf16", room)

        FAULTS[fault.__name__] = check
        return fault

    return add


def planted(fault):
    "Make a function of the data a fault; it does its own check."
    FAULTS[fault.__name__] = fault
    return fault


@in_each_step()
def index_of_the_cpu(x):
    return x[torch.arange(len(x)).flip(0)]


@in_each_step()
def index_select_of_the_cpu(x):
    return x.index_select(0, torch.arange(len(x)))


@in_each_step()
def item(x):
    return x.sum().item()


@in_each_step()
def condition(x):
    if (x > 0).any():
        return x


@in_each_step()
def boolean_mask(x):
    return x[x[:, 0, 0, 0] > 0]


@in_each_step()
def nonzero(x):
    return (x > 0).nonzero()


@in_each_step()
def masked_select(x):
    return x.masked_select(x > 0)


@in_each_step()
def unique(x):
    return x[0, 0, 0].unique()


@in_each_step()
def bincount(x):
    return torch.bincount((x[:, 0, 0, 0] > 0).long())


@in_each_step()
def repeat_interleave(x):
    return x.repeat_interleave(torch.ones(len(x), dtype=torch.long, device=x.device), 0)


@in_each_step()
def equal(x):
    return torch.equal(x, x.clone())


@in_each_step()
def to_the_cpu(x):
    return x.cpu()


@in_each_step()
def to_numpy(x):
    return np.asarray(x)


@in_each_step()
def constant_sent_anew(x):
    return x * torch.tensor([1.0, 2.0, 3.0], device=x.device)[:, None, None]


@in_each_step()
def tensor_of_the_cpu(x):
    return x + torch.zeros(3, 1, 1)


@in_each_step()
def generator_of_the_cpu(x):
    return torch.rand(len(x), device=x.device, generator=torch.Generator())


@in_each_step()
def synchronize(x):
    torch.cuda.synchronize()


@planted
def batch_not_pinned(data):
    def stay(x):
        return x

    with patch("torch.Tensor.pin_memory", stay):
        check_steps(data, "bdb", "bf16", "images read ahead")


@planted
def batch_waited_for(data):
    def prepare(x, r, epoch, device):
        return prepare_batch(x.to(device), r, epoch, device)

    with patch("reidnb.training.loop.prepare_batch", prepare):
        check_steps(data, "bdb", "bf16", "images read ahead")


@planted
def generator_of_the_gpu_not_restored(data):
    with patch("torch.cuda.set_rng_state"):
        resume(data)


LIBRARY = torch.library.Library("rehearsal", "DEF")
LIBRARY.define("of_both(Tensor a, Tensor b) -> Tensor")
LIBRARY.define("of_gpu(Tensor a) -> Tensor")
LIBRARY.impl("of_both", lambda a, b: a + b, "CPU")


@in_each_step()
def operator_of_both_devices(x):
    return torch.ops.rehearsal.of_both(x, torch.zeros(3, 1, 1))


@in_each_step()
def operator_without_cpu_form(x):
    return torch.ops.rehearsal.of_gpu(x)


@planted
def internal_that_is_gone(data):
    internal(torch._C, "_gone")


def faults(data):
    "Print what each fault gives: the error's sentence, or null where it was not noticed."
    check_steps(data, "bdb", "bf16", "images on the GPU")  # without a fault
    found = {}
    for name, check in FAULTS.items():
        try:
            check(data)
            found[name] = None
        except (AssertionError, CannotFollow, RuntimeError, TypeError) as error:
            found[name] = str(error)
    print(json.dumps(found))


# ---- The ledger


def in_this_process(command, arguments, threads, limit_s):
    "Call a command of `reidnb` here, as another process would have no GPU."
    done = CliRunner().invoke(main_command, [command, *map(str, arguments)])
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout.splitlines()[-1]) | {"status": "ok"}


def no_profiler(**given):
    "Fail as PyTorch's profiler does without CUPTI."
    raise AssertionError("Legacy CUDA profiling requires use_cpu=True")


def ledger(root):
    "Work off the tiny ledger on the GPU; end with an AssertionError unless each row is done."
    with (
        tempfile.TemporaryDirectory() as folder,
        patch("reidnb.bench.cost.in_process", in_this_process),
        patch("reidnb.bench.measure.in_process", in_this_process),
        patch("reidnb.bench.cost.peak_tflops", lambda *given: 1.0),  # a large product, on a CPU
        patch("reidnb.bench.cost.profile", no_profiler),
        Gpu(),
    ):
        folder = Path(folder)
        s = begin_sitting(
            tiny=True, device="cuda", out=folder / "out", state=folder / "state", data=root
        )
        assert s.device.type == "cuda"
        assert work_off_rows(s) == 0
        _, rows, _ = read_ledger(s.ledger, open_rows(True))
        assert [r.mark for r in rows] == ["x"] * len(rows), rows
        speeds = pd.read_csv(s.out / "throughput.csv")
        assert set(speeds.device) == {"cuda"} and (speeds.images_per_s > 0).all()
        assert (speeds.waits == 0).all() and speeds.busy.isna().all()
        assert speeds.notice.str.contains("CUPTI").all()


# ---- Notebooks


def notebook(path):
    "Run a notebook's tests with a GPU; end with status 1 where one fails."
    import nbdev.test
    import notebooks  # noqa: F401  (its shell takes back what a notebook leaves behind)

    with Gpu():
        passed, seconds = nbdev.test.test_nb(Path(path), ["notest", "gpu", "slow"])
    print(f"{path}: {seconds:.0f} s")
    sys.exit(0 if passed else 1)


CHECKS = {
    "steps": steps,
    "resume": resume,
    "diverged": diverged,
    "same": same,
    "faults": faults,
}


def main(check, *words):
    "Do a check, with the tiny trunk in ResNet-18's place."
    try_out()
    if check == "notebook":
        return notebook(*words)
    if check == "ledger":
        with tiny_trunk():
            return ledger(*words)
    root, *rest = words
    data = load_dataset("synthped-mini", root)
    with tiny_trunk():
        CHECKS[check](data, *rest)


if __name__ == "__main__":
    main(*sys.argv[1:])
