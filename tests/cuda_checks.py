"""What is rehearsed on a GPU that is not there; `test_cuda_rehearsal.py` calls these, one a process.

python tests/cuda_checks.py steps DATA bdb      # no step waits for the GPU
python tests/cuda_checks.py resume DATA         # a run that was stopped ends at the same weights
python tests/cuda_checks.py diverged DATA       # a loss that becomes NaN ends the run
python tests/cuda_checks.py same DATA           # evaluation, search, features: the same as on the CPU
python tests/cuda_checks.py faults DATA         # what each planted fault gives, as JSON
python tests/cuda_checks.py notebook nbs/core.ipynb  # its tests, with a GPU
python tests/cuda_checks.py counts DATA now reports/benchmarks/gpu-counts.csv  # waits and uploads
"""
# ruff: noqa: E402, I001  (the rehearsal must be imported before torch)

from cuda_rehearsal import UPLOADED, WAITS, CannotFollow, Gpu, internal, try_out

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
    recipe,
    rerank,
    search,
    top_k,
    train,
)
from reidnb.bench.measure import crowd_features
from reidnb.data.images import Normalised
from reidnb.evaluation.statistics import tar_at_far
from reidnb.evaluation.thresholds import threshold_rates
from reidnb.methods.registry import METHODS
from reidnb.parts.backbones import tiny_trunk
from reidnb.training.step import prepare_batch
from reidnb.training.testing import test_features

# ---- Steps

ROOMS = {  # free bytes of the GPU's memory
    "images on the GPU": 2**37,
    "images read ahead": 2**10,
}


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


def waits_of(r, data):
    "Train without the test, and return what made the host wait, and the bytes uploaded."
    WAITS.clear()
    UPLOADED.clear()
    # saved by the clock, a slow machine would save within the three steps
    never = patch("reidnb.training.loop.SAVE_EVERY", math.inf)
    with tempfile.TemporaryDirectory() as folder, never:
        with patch("reidnb.training.loop.record_test"):
            trained(r, data, folder)
    return WAITS.copy(), UPLOADED.copy()


def check_steps(data, method, precision, room):
    "Raise an AssertionError where three steps wait more often than one."
    free = ROOMS[room]
    r = small_recipe(method, precision=precision, steps=3)
    with patch("torch.cuda.mem_get_info", lambda device=None: (free, free)):
        one, uploaded_by_one = waits_of(replace(r, steps=1), data)
        three, uploaded = waits_of(r, data)
    for (operator, place), n in (three - one).items():
        raise AssertionError(
            f"{method}, {precision}, {room}: a step waits for the GPU: {operator} in {place}, "
            f"{n} times in two steps"
        )
    batch = 3 * r.batch * math.prod(r.train_shape)  # bytes of its pictures
    images_go_up = uploaded.total() - uploaded_by_one.total() >= 2 * batch
    assert images_go_up == (room == "images read ahead"), f"{room}: {uploaded}"


def steps(data, method):
    "Train a method as a whole, then count the waits of its steps."
    with tempfile.TemporaryDirectory() as folder:
        # this also sends the constants that a process sends once
        run = trained(small_recipe(method, precision="bf16", steps=1), data, folder)
        assert read_run(run)["status"] == "finished", read_run(run)["status"]
    for room in ROOMS:
        check_steps(data, method, "bf16", room)
    check_steps(data, method, "fp32", "images on the GPU")


# ---- Counts


def counts(data, code, file):
    "Add what a step, the end of an epoch and a test image cost in waits and uploads to a CSV file."
    waits_of(small_recipe("bdb", precision="bf16", steps=1), data)  # constants that are sent once
    rows = []
    for method in METHODS:
        for room, free in ROOMS.items():
            r = small_recipe(method, precision="bf16", epochs=3, checkpoint_epochs=())
            per_epoch = len(data.train) // r.batch
            with patch("torch.cuda.mem_get_info", lambda device=None, free=free: (free, free)):
                waits, uploads = {}, {}
                for n in (1, 3, per_epoch, 2 * per_epoch):
                    found = waits_of(replace(r, steps=n), data)
                    waits[n], uploads[n] = (counter.total() for counter in found)
            step_waits = (waits[3] - waits[1]) / 2
            between = waits[2 * per_epoch] - waits[per_epoch] - per_epoch * step_waits
            rows.append(
                {
                    "code": code,
                    "method": method,
                    "images": room,
                    "waits a step": step_waits,
                    "bytes up a step": (uploads[3] - uploads[1]) / 2,
                    "waits between epochs": between,
                    "bytes up a test image": test_bytes(r, data),
                }
            )
    pd.DataFrame(rows).to_csv(file, mode="a", header=not Path(file).is_file(), index=False)


def test_bytes(r, data):
    "Return how many bytes go up for an image of the test, on average."
    model = build_model(r.method, data.num_classes, r.backbone)
    with Gpu():
        model.to("cuda")
        UPLOADED.clear()
        test_features(model, r, data, torch.device("cuda"))
    return round(UPLOADED.total() / (len(data.query) + len(data.gallery)))


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
    "counts": counts,
}


def main(check, *words):
    "Do a check, with the tiny trunk in ResNet-18's place."
    try_out()
    if check == "notebook":
        return notebook(*words)
    root, *rest = words
    data = load_dataset("synthped-mini", root)
    with tiny_trunk():
        CHECKS[check](data, *rest)


if __name__ == "__main__":
    main(*sys.argv[1:])
