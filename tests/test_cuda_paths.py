"""What a CUDA GPU is asked for and told, on a machine without one."""

import json
import math
import os
import threading
import weakref
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reidnb.bench.cost as cost
import reidnb.core as core
import reidnb.training.checkpoints as checkpoints
import reidnb.training.loop as loop
import reidnb.training.testing as testing
from reidnb.bench.cost import gpu_use, peak_tflops, whole_steps
from reidnb.data.load import load_dataset
from reidnb.evaluation.metrics import Ranking
from reidnb.methods.registry import recipe


@pytest.fixture
def newer_switch():
    "TF32 is switched on by PyTorch's newer switch, beside which the older one cannot be read."
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this PyTorch has only the older switch")
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    yield matmul
    assert matmul.fp32_precision == "tf32", "the user's switch comes back"
    matmul.fp32_precision = before


def test_speed_beside_the_newer_switch(newer_switch):
    assert peak_tflops("fp32", "cpu", 0.01) > 0


def test_events_of_another_gpu():
    "Steps on the second GPU are timed on its stream, while the first is the current one."
    events = []

    def event(**given):
        events.append(MagicMock(elapsed_time=lambda other: 2.0))
        return events[-1]

    steps = MagicMock(device=torch.device("cuda", 1), return_value={"loss": 0.0})
    with (
        patch("torch.cuda.Event", event),
        patch("torch.cuda.synchronize"),
        patch("torch.cuda.current_stream", lambda device=None: f"the stream of {device}"),
    ):
        _, ms, _ = whole_steps(steps, 3)
    assert ms == 2 and len(events) == 4
    for e in events:
        e.record.assert_called_once_with("the stream of cuda:1")


class WithoutCupti:
    "A profiler that notes what the processor does, and nothing of a GPU."

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def export_chrome_trace(self, file):
        events = [{"cat": "cpu_op", "ts": 0, "dur": 5}, {"ph": "M"}]
        Path(file).write_text(json.dumps({"traceEvents": events}))


def refusing(**given):
    raise AssertionError("Legacy CUDA profiling requires use_cpu=True")


@pytest.mark.parametrize("profiler", [lambda **given: WithoutCupti(), refusing])
def test_busy_without_cupti(profiler, capsys):
    "How busy a GPU is stays unknown where the profiler cannot see it, and one sentence says so."
    steps = MagicMock(device=torch.device("cuda", 0))
    with (
        patch.object(cost, "profile", profiler),
        patch("torch.cuda.synchronize"),
        patch("torch.cuda.get_sync_debug_mode", lambda: 0),
        patch("torch.cuda.set_sync_debug_mode"),
    ):
        use = gpu_use(steps, 2)
    assert math.isnan(use["busy"]) and use["waits"] == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "CUPTI" in said


class Enough(Exception):
    "Ends a call where the rest does not matter."


def test_memory_before_the_test(tiny, mini, tmp_path):
    "When the test begins, images, gradients and averages are gone."
    stores, seen = [], []
    checked_store = loop.checked_store

    def watched(*given):
        store = checked_store(*given)
        stores.append(weakref.ref(store))
        return store

    def look(s, *given):
        kept = [p.grad for p in s.model.parameters() if p.grad is not None]
        seen.extend([stores[0](), kept, dict(s.optimizer.state)])
        assert s.step == 1
        raise Enough

    r = recipe("bdb", "synthped-mini", profile="smoke", steps=1)
    data = load_dataset("synthped-mini", mini)
    with patch.object(loop, "checked_store", watched), patch.object(loop, "record_test", look):
        loop.train(r, data, tmp_path, device="cpu")
    assert seen == [None, [], {}]


def test_memory_before_torchrun(tmp_path):
    "The process that starts others gives back what its own GPU work has left."
    order = []
    r = recipe("bdb", "synthped-mini", profile="smoke")
    with (
        patch("torch.cuda.is_initialized", lambda: True),
        patch("torch.cuda.empty_cache", lambda: order.append("given back")),
        patch.object(loop, "_run_torchrun", lambda *given: order.append("started") or (0, "")),
    ):
        loop.launch(r, tmp_path, 2, tmp_path)
    assert order == ["given back", "started"]


def test_no_room_for_the_network(tiny, mini, tmp_path):
    full = patch.object(loop, "start", side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    r = recipe("bdb", "synthped-mini", profile="smoke")
    data = load_dataset("synthped-mini", mini)
    with full, pytest.raises(RuntimeError, match="ids_per_batch.*accumulate.*precision bf16"):
        loop.train(r, data, tmp_path, device="cpu")


def test_lookalikes_on_the_gpu(mini):
    "The device that ranks the test ranks its look-alikes too."
    data = load_dataset("synthped-mini", mini)
    ones = torch.ones(len(data.query)).numpy()
    ranking = Ranking(ones, ones, ones, ones, len(data.gallery))
    features = {
        "query": torch.zeros(len(data.query), 2),
        "gallery": torch.zeros(len(data.gallery), 2),
    }

    def look(qf, gf, *ids, **given):
        assert {qf.device.type, gf.device.type} == {"meta"}
        raise Enough

    with patch.object(testing, "top_k", look), pytest.raises(Enough):
        testing.lookalike_metrics(features, data, ranking, torch.device("meta"))


@pytest.mark.parametrize(
    "files, limit",
    [
        ({}, float("inf")),
        ({"cpu.max": "max 100000"}, float("inf")),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu.max": "max 100000", "a/b/cpu.max": "300000 100000"}, 3),
        ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "300000 100000"}, 2),
    ],
)
def test_cores_of_a_container(files, limit, tmp_path):
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    own = tmp_path / "own"
    own.write_text("1:cpu:/elsewhere\n0::/a/b\n")
    assert core._container_limit(tmp_path, own) == limit


@pytest.mark.parametrize("limit, cores", [(float("inf"), 3), (2.5, 3), (1.5, 2), (0.5, 1)])
def test_cores_by_affinity(limit, cores):
    "Of eight cores three may be used, or what the container may use, if that is less."
    with (
        patch.object(os, "cpu_count", lambda: 8),
        patch.object(os, "sched_getaffinity", lambda pid: {1, 4, 6}, create=True),
        patch.object(core, "_container_limit", lambda: limit),
    ):
        assert core.usable_cores() == cores


class Reads(TorchDispatchMode):
    "Counts how often a single number is asked for: each time, a GPU would be waited for."

    n = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.n += f is torch.ops.aten._local_scalar_dense.default
        return f(*args, **(kwargs or {}))


def test_sums_are_read_at_once():
    sums = {f"{i}/id": torch.tensor(float(i), dtype=torch.float64) for i in range(9)}
    s = MagicMock(sums=sums, batch=2, epoch=0, step=2)
    with Reads() as reads:
        row = loop._end_epoch(s, recipe("bdb", "synthped-mini", profile="smoke"))
    assert reads.n == 0
    assert [row[name] for name in sums] == [i / 2 for i in range(9)]


@pytest.mark.parametrize("device, benchmark", [("cuda", True), ("cpu", False)])
def test_cudnn_tries_its_algorithms(device, benchmark):
    assert not torch.backends.cudnn.benchmark
    with pytest.raises(Enough), loop._fastest_convolutions(torch.device(device)):
        assert torch.backends.cudnn.benchmark == benchmark
        raise Enough
    assert not torch.backends.cudnn.benchmark


def test_between_epochs(tiny, mini, tmp_path):
    "A thread makes an epoch's batches while the one before runs, and metrics.csv gets rows."
    threads, epochs, whole = [], [], []
    epoch_batches, write_metrics = loop.epoch_batches, checkpoints.write_metrics

    def batches(r, labels, epoch):
        threads.append(threading.current_thread())
        epochs.append(epoch)
        return epoch_batches(r, labels, epoch)

    def written(rows, run):
        whole.append(len(rows))
        write_metrics(rows, run)

    r = recipe("bdb", "synthped-mini", profile="smoke", epochs=4, checkpoint_epochs=())
    data = load_dataset("synthped-mini", mini)
    with (
        patch.object(loop, "epoch_batches", batches),
        patch.object(loop, "write_metrics", written),
        patch.object(checkpoints, "write_metrics", written),
        patch.object(loop, "record_test", lambda *given: None),
    ):
        run = loop.train(r, data, tmp_path, device="cpu")
    assert epochs == [1, 1, 2, 3, 4]  # the first time they are only counted
    assert threading.main_thread() not in threads[1:]
    assert whole == [1, 4]
    assert len((run / "metrics.csv").read_text().splitlines()) == 5
