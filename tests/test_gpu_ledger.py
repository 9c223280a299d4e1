"""`reidnb ledger --tiny`.

Stopped and resumed, ticked off, its files; and the kept ledger lists what the code plans.
"""

import pandas as pd
import pytest
import torch
from children import ROOT, python_m
from commands import reidnb

from reidnb.bench.ledger import from_line, open_rows, read_ledger
from reidnb.training.checkpoints import read_run


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("ledger")


def call(here, *args):
    folders = "--out", here / "out", "--state", here / "state", "--data", here / "data"
    done = python_m(
        "reidnb",
        "ledger",
        "--tiny",
        *folders,
        *args,
        tiny=True,
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def rows(here):
    return {r.name: r for r in read_ledger(here / "out/tiny/LEDGER.md", open_rows(True))[1]}


@pytest.mark.slow
def test_stopped_and_resumed(here):
    "No minutes: one step is trained. Then all the rest."
    done = call(here, "--minutes", 0, "--rows", "bdb s0")
    assert done.returncode == 0 and "the same call continues" in done.stdout, (
        done.stdout + done.stderr
    )
    assert [(r.mark, r.name, r.result) for r in rows(here).values() if r.mark != " "] == [
        ("~", "bdb s0", "step 1 of 3")
    ]
    done = call(here)
    assert done.returncode == 0 and "5 of 5 rows are to be done" in done.stdout, (
        done.stdout + done.stderr
    )
    assert {r.mark for r in rows(here).values()} == {"x"}
    assert all(r.where and r.when and r.result for r in rows(here).values())
    assert "1/3" in done.stdout, "its bar began at the second step"
    assert "step 3 of 3" in rows(here)["bdb s0"].result
    for kind, n in (("throughput", 2), ("evaluation", 1)):
        assert pd.read_csv(here / f"out/tiny/{kind}.csv").status.tolist() == ["ok"] * n
    what_is_left_behind(here)  # here, as another worker has another folder


def what_is_left_behind(here):
    "Small files only; the checkpoints lie with the state."
    out = here / "out"
    files = [f for f in out.rglob("*") if f.is_file()]
    runs = [f.parent for f in out.rglob("run.json")]
    assert sorted(d.parent.name for d in runs) == ["bdb", "bdb", "gap"]
    for d in runs:
        state = here / "state" / d.relative_to(out / "tiny")
        assert {f.name for f in d.iterdir()} == {
            "run.json",
            "metrics.csv",
            "queries.csv",
            "maps.npz",
            "result.csv",
            "result.md",
            "curves.png",
            "rank5.png",
        }
        assert read_run(d)["status"] == "finished"
        assert (d / "metrics.csv").read_bytes() == (state / "metrics.csv").read_bytes()
        assert pd.read_csv(d / "result.csv").mAP[0] == pytest.approx(
            read_run(d)["metrics"]["mAP"], rel=1e-4
        )
    assert max(f.stat().st_size for f in files) < 15e6
    assert not [f for f in files if f.suffix in (".pt", ".tmp")]
    assert len([*(here / "state").rglob("last.pt")]) == 3
    assert not [f for f in files if str(here) in f.read_text(errors="replace")], (
        "a path of this machine"
    )


def test_without_a_gpu(here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    called = reidnb("ledger", "--out", here / "real")
    assert called.status == 2
    assert "sees no CUDA GPU" in called.stderr
    assert not (here / "real").exists()


def test_what_makes_no_sense_is_named(here):
    assert reidnb("ledger", "--tiny", "--ledger", "x").status == 2
    called = reidnb("ledger", "--list", "--out", here / "real", "--rows", "stbad*")
    assert (called.status, called.stdout) == (2, "")
    assert "no row is called 'stbad*'" in called.stderr


def test_a_list_of_open_rows(here):
    called = reidnb("ledger", "--list", "--out", here / "real", "--rows", "* s0")
    assert called.status == 0
    assert called.stdout.startswith("| [ ] | bdb s0")
    assert (here / "real" / "LEDGER.md").is_file()


def test_the_published_ledger():
    """All planned rows, in order.

    Behind them only what was done once; whatever is not open has a card, a day and a result.
    """
    lines = (ROOT / "reports/published/gpu/LEDGER.md").read_text().splitlines()
    kept, planned = [from_line(t) for t in lines if t.startswith("| [")], open_rows(False)
    assert [(r.name, r.what) for r in kept[: len(planned)]] == [
        (r.name, r.what) for r in planned
    ] and len(planned) > 60
    assert not [r for r in kept[len(planned) :] if r.mark == " "]
    assert all(bool(r.where and r.when and r.result) == (r.mark != " ") for r in kept)
