"""What training refuses, with which words; and runs that are interrupted, killed or damaged, and end the same."""

import errno
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import reidnb

import reidnb.training.loop as loop
from reidnb.data.load import load_dataset
from reidnb.methods.registry import build_model, recipe
from reidnb.parts.backbones import tiny_trunk
from reidnb.training.checkpoints import load_model, one_at_a_time, read_run, save_state, write_run
from reidnb.training.distributed import check_split
from reidnb.training.loop import _reason, _too_large, launch, train
from reidnb.training.step import start
from reidnb.training.testing import check_test, retrieve_from
from reidnb.training.testing import test_on as run_on

pytestmark = pytest.mark.usefixtures("tiny")

CPU = torch.device("cpu")
SMALL = recipe("bdb", "synthped-mini", profile="smoke")  # 2 epochs of 3 steps


@pytest.fixture(scope="module")
def data(mini):
    return load_dataset("synthped-mini", mini)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "A finished run that nobody changes."
    with tiny_trunk():
        return train(SMALL, data, tmp_path_factory.mktemp("whole"), device="cpu")


@pytest.fixture
def finished(whole, tmp_path):
    "A copy of it, in a folder of runs."
    return Path(shutil.copytree(whole, tmp_path / "runs" / SMALL.directory))


def ends_as(run, whole):
    "Whether a run has the rows and the figures of another one."
    assert read_run(run)["status"] == "finished"
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert (run / "queries.csv").read_bytes() == (whole / "queries.csv").read_bytes()
    assert read_run(run)["metrics"] == read_run(whole)["metrics"]


# --- what is refused


def set_status(run, status):
    write_run(run, status=status)
    return run


def spoil(run):
    for name in ("last.pt", "previous.pt"):
        (run / name).write_bytes((run / "epoch-001.pt").read_bytes()[:1000])
    return set_status(run, "stopped")


REFUSED = [
    (
        lambda c: check_split(replace(SMALL, ids_per_batch=1), CPU, False),
        ValueError,
        "1 identities in a batch cannot be cut for 1 processes, two or more each",
    ),
    (
        lambda c: check_split(replace(SMALL, ids_per_batch=3, accumulate=2), CPU, False),
        ValueError,
        "cut for 1 processes × 2 parts",
    ),
    (lambda c: check_split(SMALL, CPU, True), ValueError, "sync_bn is for GPUs"),
    (
        lambda c: check_test(recipe("bdb", "cub200"), c.data),
        ValueError,
        "synthped-mini has no boxes",
    ),
    (
        lambda c: train(replace(SMALL, cropped=True), c.data, c.out),
        ValueError,
        "synthped-mini has no boxes",
    ),
    (
        lambda c: train(replace(SMALL, dataset="market1501"), c.data, c.out),
        ValueError,
        "is for 'market1501', but the data set given is 'synthped-mini'",
    ),
    (
        lambda c: train(replace(SMALL, ids_per_batch=40), c.data, c.out),
        ValueError,
        "a batch of 40 identities",
    ),
    (
        lambda c: train(SMALL, c.data, c.out, max_minutes=-1),
        ValueError,
        "max_minutes is a time in minutes, not -1",
    ),
    (lambda c: train(SMALL, c.data, c.out, resume="x"), ValueError, "unknown resume 'x'"),
    (lambda c: train(SMALL, c.data, c.file), OSError, "cannot be written"),
    (lambda c: launch(SMALL, processes=0), ValueError, "at least 1, not 0"),
    (lambda c: retrieve_from(c.model, "after"), ValueError, "have no BN neck"),
    (lambda c: retrieve_from(c.model, "x"), ValueError, "unknown neck 'x'"),
    (
        lambda c: load_model(c.run, epoch=7),
        FileNotFoundError,
        "epoch-007.pt is not there; kept here: epoch-001.pt, epoch-002.pt",
    ),
    (
        lambda c: load_model(spoil(c.run)),
        ValueError,
        "last.pt holds no weights of this network",
    ),
    (
        lambda c: train(SMALL, c.data, spoil(c.run).parents[2]),
        ValueError,
        "no checkpoint can be continued from",
    ),
    (
        lambda c: run_on(set_status(c.run, "running"), c.data),
        ValueError,
        r"is not finished \(its status is 'running'\)",
    ),
]


@pytest.mark.parametrize("call, error, words", REFUSED, ids=[words for *_, words in REFUSED])
def test_refused(call, error, words, data, finished, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    model = build_model("bdb", 4, "resnet18")
    case = SimpleNamespace(data=data, run=finished, out=tmp_path / "other", file=file, model=model)
    with pytest.raises(error, match=words):
        call(case)
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").rglob("*.pt"))


def test_one_call_at_a_time(data, tmp_path):
    with one_at_a_time(tmp_path, SMALL):
        with pytest.raises(BlockingIOError, match="is being trained by another process"):
            train(SMALL, data, tmp_path, device="cpu")


def test_files_that_cannot_be_used(mini, finished, tmp_path):
    "They are named before anything is trained; other files under the same names are refused."
    root = shutil.copytree(mini, tmp_path / "data")
    data = load_dataset("synthped-mini", root)
    image = Path(data.train.path[0])
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 3])
    with pytest.raises(ValueError, match=image.name):
        train(SMALL, data, tmp_path / "e")
    assert not (tmp_path / "e").exists()

    image.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="was trained on other files"):
        train(SMALL, data, finished.parents[2])

    image.write_bytes(content)
    image.with_name("somebody.jpg").write_bytes(content)
    with pytest.warns(UserWarning):
        spoiled = load_dataset("synthped-mini", root)
    with pytest.raises(ValueError, match="1 images of synthped-mini cannot be used"):
        train(SMALL, spoiled, tmp_path / "e")


def test_the_command_line_names_what_is_unknown():
    called = reidnb("train", "bdbb", "synthped-mini")
    assert called.status == 1
    assert "error: unknown method 'bdbb' (did you mean 'bdb'?)" in called.stderr


# --- sentences


ROOT_CAUSE = (
    "Root Cause (first observed failure):\n[0]:\n"
    "  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 7)\n"
)
OTHER = (
    "failed (exitcode: -9) local_rank: 1 (pid: 7) of binary: python\nFailures:\n[1]:\n"
    "  rank      : 0 (local_rank: 0)\n  exitcode  : {} (pid: 6)\n"
)


@pytest.mark.parametrize(
    "text, processes, said",
    [
        (OTHER.format(1) + ROOT_CAUSE, 2, "process 1 of 2 was ended by SIGKILL"),
        (OTHER.format(-2) + ROOT_CAUSE, 2, "process 1 of 2 was ended by SIGKILL"),
        (OTHER.format(-15) + ROOT_CAUSE, 2, "process 1 of 2 was ended by SIGKILL"),
        (OTHER.format(-6) + ROOT_CAUSE, 2, "process 1 of 2 was ended by SIGKILL"),
        (
            "error: another process of this run has ended: x\n" + ROOT_CAUSE,
            4,
            "process 1 of 4 was ended by SIGKILL",
        ),
        (
            "error: another process of this run has ended: x\n",
            4,
            "another process of this run has ended: x",
        ),
        ("a\nerror: no such file\n", 2, "no such file"),
        ("a\nb\n", 2, "b"),
        ("", 2, "torchrun failed without a message"),
    ],
)
def test_why_torchrun_failed(text, processes, said):
    assert _reason(text, processes) == said


@pytest.mark.parametrize(
    "accumulate, said, not_said",
    [(2, "-p accumulate 4 (mining", "fewer identities"), (4, "or fewer identities", "accumulate")],
)
def test_a_step_that_a_gpu_does_not_hold(accumulate, said, not_said):
    words = _too_large(replace(SMALL, ids_per_batch=8, accumulate=accumulate))
    assert said in words and not_said not in words
    images = 32 // accumulate
    assert f"a step of {images} images of 96×32 (the batch is 8 identities × 4 images)" in words


def test_a_network_that_cannot_be_compiled(monkeypatch, capsys):
    "It runs as it is, and a line says so once of the network and once of its trunk."

    def broken(*given):
        raise RuntimeError("no compiler\nfound")

    x = torch.randn(4, 3, 96, 32)
    plain = start(SMALL, 4, CPU).model.train()
    monkeypatch.setattr("torch.compile", lambda f, **how: broken)
    slow = start(SMALL, 4, CPU, compiled=True).model.train()
    for _ in range(2):
        torch.testing.assert_close(slow(x)["global"].logits, plain(x)["global"].logits)
    assert capsys.readouterr().out == (
        "torch.compile does not take this network (RuntimeError: no compiler): its trunk is compiled\n"
        "torch.compile does not take this trunk (RuntimeError: no compiler): it runs as it is\n"
    )


@pytest.mark.parametrize(
    "device, accumulate, keyword", [("cpu", 1, "on the device cpu"), ("cuda", 2, "accumulate=2")]
)
def test_graphs_that_cannot_be(device, accumulate, keyword):
    with pytest.raises(ValueError, match=keyword):
        loop._check_graphs(replace(SMALL, accumulate=accumulate), torch.device(device))


def test_graphs_on_the_cpu(data, tmp_path):
    with pytest.raises(ValueError, match="CUDA graphs"):
        train(SMALL, data, tmp_path, device="cpu", graphs=True)
    assert not list(tmp_path.iterdir())


def test_a_rate_that_explodes(data, tmp_path):
    "The run stops and says where; the checkpoint before is still good."
    wild = replace(SMALL, lr=1e20)
    with pytest.raises(FloatingPointError, match="the loss became"):
        train(wild, data, tmp_path, device="cpu")
    status = read_run(tmp_path / wild.directory)["status"]
    assert status.startswith("failed: the loss became") and "at step 2 (epoch 1" in status
    model, _ = load_model(tmp_path / wild.directory)
    assert all(v.isfinite().all() for v in model.state_dict().values())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    s = start(SMALL, 4, CPU)
    save_state(s, tmp_path, kept=False)
    before = (tmp_path / "last.pt").read_bytes()
    name, weight = next(iter(s.model.named_parameters()))
    weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=f"{name} holds values that are not finite"):
        save_state(s, tmp_path, kept=False)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_full_disk_that_torch_does_not_name(data, tmp_path, monkeypatch):
    def full(*args):
        raise RuntimeError("PytorchStreamWriter failed")

    room = SimpleNamespace(free=100_000_000)  # less than a checkpoint takes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="the disk is full") as e:
        train(SMALL, data, tmp_path, device="cpu")
    assert e.value.errno == errno.ENOSPC
    assert read_run(tmp_path / SMALL.directory)["status"] == "failed: the disk is full"


# --- interrupted, and called again


def raise_at(n, call):
    "A function that is interrupted when it is called for the n-th time."
    calls = iter(range(1, n))

    def interrupted(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return call(*args)

    return interrupted


def ask_at(n, call):
    "A function during whose n-th call SIGTERM comes."
    calls = iter(range(1, n))

    def asked(*args):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(*args)

    return asked


@pytest.mark.parametrize(
    "name, interrupted, place",
    [
        ("train_step", lambda f: ask_at(2, f), "at step 3."),
        ("train_step", lambda f: raise_at(5, f), "after its last saved step."),
        ("record_test", lambda f: raise_at(1, f), "after its last saved step."),
    ],
    ids=["asked to end in the first epoch", "torn out of the second", "torn out of the test"],
)
def test_interrupted(name, interrupted, place, data, whole, tmp_path, monkeypatch, capsys):
    "A step that is asked to end is done and saved; what was not saved is done again."
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    run = tmp_path / SMALL.directory
    with monkeypatch.context() as m:
        m.setattr(loop, name, interrupted(getattr(loop, name)))
        with pytest.raises(KeyboardInterrupt):
            train(SMALL, data, tmp_path, device="cpu")
    said = capsys.readouterr().out
    assert "Interrupted; the same call continues" in said and place in said
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert read_run(run)["status"] == "interrupted" and "metrics" not in read_run(run)
    assert load_model(run)[1] == SMALL
    train(SMALL, data, tmp_path, device="cpu")
    if place == "at step 3.":
        assert "last.pt, after 2 steps (epoch 1)" in capsys.readouterr().out
    ends_as(run, whole)


# --- damaged, and called again


def step_of(run):
    return torch.load(run / "last.pt", weights_only=True)["step"]


def one_step(data, out):
    return train(SMALL, data, out, device="cpu", max_minutes=0)


@pytest.mark.parametrize("spoilt", ["cut short", "empty", "somebody else's"])
def test_a_damaged_checkpoint(spoilt, data, whole, tmp_path, capsys):
    "The one before it serves, and the run ends the same."
    run = one_step(data, tmp_path)
    one_step(data, tmp_path)
    good = (run / "previous.pt").read_bytes()
    content = {
        "cut short": good[: len(good) // 2],
        "empty": b"",
        "somebody else's": (whole / "epoch-001.pt").read_bytes(),
    }
    (run / "last.pt").write_bytes(content[spoilt])
    one_step(data, tmp_path)
    said = capsys.readouterr().out
    assert "not continued from" in said and "last.pt: it " in said
    assert step_of(run) == 2
    train(SMALL, data, tmp_path, device="cpu")
    ends_as(run, whole)


def test_killed_between_two_files(data, whole, tmp_path):
    "previous.pt alone is enough; a bad last.pt does not push the good one before it out; lost rows are written again."
    for _ in range(3):
        run = one_step(data, tmp_path)
    (run / "last.pt").unlink()
    one_step(data, tmp_path)
    assert step_of(run) == 3

    (run / "last.pt").write_bytes(b"bad")
    good = (run / "previous.pt").read_bytes()
    one_step(data, tmp_path)
    assert step_of(run) == 3 and (run / "previous.pt").read_bytes() == good
    assert [part["first_step"] for part in read_run(run)["parts"]] == [1, 2, 3, 3, 3]

    train(SMALL, data, tmp_path, device="cpu")
    ends_as(run, whole)
    assert len(read_run(run)["parts"]) == 6
    (run / "metrics.csv").unlink()
    train(SMALL, data, tmp_path, device="cpu")
    ends_as(run, whole)


def test_the_last_row_of_capped_steps(data, tmp_path):
    "A run that has all its steps, but neither its last row nor metrics.csv, gets them."
    capped = replace(SMALL, steps=2)
    for _ in range(3):
        run = train(capped, data, tmp_path, device="cpu", max_minutes=0)
    assert read_run(run)["status"] == "finished"
    assert (run / "metrics.csv").read_text().splitlines()[1].startswith("1,2,")
