"""nbs/benchmark.ipynb, both halves of it: each measurement is a process."""

import pandas as pd
import pytest
from pages import printed, run_page

EVALUATION = dict(sizes=[[60, 300]], largest=None, dim=16, repeats=1, tasks="rerank", device="cpu")
TRAINING = dict(
    training_methods="bdb",
    training_ways="eager,fp32",
    training_backbone="resnet18",
    training_identities=2,
    training_height=64,
    training_width=32,
    training_steps=1,
    training_warm=0,
    loading_images=16,
    loading_batch=8,
    loading_batches=2,
)


@pytest.mark.slow
def test_both_halves(tmp_path):
    page = run_page("benchmark", EVALUATION | TRAINING | dict(out=str(tmp_path)))
    measured = pd.read_csv(tmp_path / "evaluation.csv")
    assert measured.task.tolist() == ["rerank", "textbook-rerank"]
    assert measured.status.tolist() == ["ok", "ok"]
    training = pd.read_csv(tmp_path / "training.csv")
    assert training.way.tolist() == ["eager", "fp32"]
    assert training.status.tolist() == ["ok", "ok"]
    assert (training.images_per_s > 0).all()
    loading = pd.read_csv(tmp_path / "loading.csv")
    assert (loading.images_per_s > 0).all()
    cost = pd.read_csv(tmp_path / "training-cost.csv")
    assert (cost.hours > 0).any()
    files = {f.name for f in tmp_path.iterdir()}
    assert {"time.png", "memory.svg", "training-stages.png", "training-stages.svg"} <= files
    assert "2 + 2 measurements" in printed(page)
