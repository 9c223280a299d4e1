"""nbs/evaluate.ipynb.

On a run, on runs of two seeds, on a file of features; what cannot be evaluated is named. (Papermill
itself runs it in test_clone.)
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pages import outputs, run_page
from PIL import Image
from scipy.io import savemat

from reidnb.data.fixtures import write_fixture
from reidnb.data.load import load_dataset
from reidnb.evaluation.embeddings import FEATURES
from reidnb.evaluation.ranking import evaluate_ranking
from reidnb.methods.registry import recipe
from reidnb.parts.backbones import tiny_trunk
from reidnb.training.checkpoints import read_run
from reidnb.training.loop import train

pytestmark = pytest.mark.usefixtures("tiny")


def evaluate(tmp, **parameters):
    "Execute the notebook; what it printed and showed, as text."
    given = {"root": str(tmp / "data"), "device": "cpu", "samples": 50, "hardest": 2}
    return str(outputs(run_page("evaluate", given | parameters, cwd=tmp)))


def rows(place):
    return pd.read_csv(place / "table.csv", index_col="row")


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def runs(tmp):
    "One network, trained with two seeds."
    data = load_dataset("synthped-mini", tmp / "data")
    with tiny_trunk():
        return [
            train(
                recipe("bdb", "synthped-mini", profile="smoke", epochs=1, seed=s),
                data,
                tmp / "runs",
                device="cpu",
            )
            for s in (0, 1)
        ]


def test_a_run(runs, tmp):
    evaluate(tmp, run=str(runs[0]))
    place = runs[0] / "evaluation"
    table = rows(place)
    assert {
        "table.csv",
        "intervals.csv",
        "cmc.png",
        "cameras.csv",
        "cameras.png",
        "thresholds.csv",
        "hardest.csv",
        "hardest.png",
        "features",
    } == {p.name for p in place.iterdir()}
    protocols = [
        ", ".join(x for x in (f, r, j) if x) or "plain"
        for f in ("", "flip")
        for r in ("", "re-ranked")
        for j in ("", "junk counted")
    ]
    assert list(table.index) == protocols
    m = read_run(runs[0])["metrics"]
    assert [table.mAP["plain"], table.rank1["plain"]] == [
        round(100 * m[k], 2) for k in ("mAP", "rank1")
    ]
    assert {"mAP", "mAP@50", "mINP", "rank1", "rank5", "rank10", "rank20"} <= set(table)
    assert table.mAP.nunique() > 4
    sure = pd.read_csv(place / "intervals.csv", index_col="measure")
    assert (
        (sure.low <= sure.value).all()
        and (sure.value <= sure.high).all()
        and (sure.low < sure.high).any()
    )
    before = {p: p.stat().st_mtime_ns for p in (place / "features").rglob("*.npy")}
    assert len(before) == 4
    evaluate(tmp, run=str(runs[0]), rerank=True, junk=True)
    assert before == {p: p.stat().st_mtime_ns for p in (place / "features").rglob("*.npy")}, (
        "something is extracted twice"
    )
    assert list(rows(place).index) == ["re-ranked, junk counted", "flip, re-ranked, junk counted"]


def test_copies_can_be_left_out(tmp, tmp_path):
    "Noise, each picture twice: with the copies the test is easy, without them it is not."
    rng = np.random.default_rng(0)
    for person in range(12):
        folder = tmp_path / "set" / f"p{person}"
        folder.mkdir(parents=True)
        for view in range(3):
            picture = Image.fromarray(rng.integers(0, 255, (64, 32, 3)).astype("uint8"))
            picture.save(folder / f"{view}.png")
            picture.save(folder / f"{view} - Copy.png")
    run = train(
        recipe("bdb", "folder", profile="smoke", epochs=1),
        load_dataset("folder", tmp_path / "set"),
        tmp_path / "runs",
        device="cpu",
    )
    given = dict(run=str(run), root=str(tmp_path / "set"), flip=False, rerank=False)
    evaluate(tmp, **given)
    said = evaluate(tmp, **given, leave_out_copies=True)
    assert "18 test images are left out, because another has the same content" in said
    assert (
        rows(run / "evaluation").rank1["plain"]
        == 100
        > rows(run / "evaluation-without-copies").rank1["plain"]
    )


def test_two_seeds_and_options(runs, tmp):
    evaluate(
        tmp,
        run=",".join(map(str, runs)),
        out=str(tmp / "both"),
        flip=True,
        rerank=False,
        junk=False,
        metric="cosine",
        test_ids=5,
    )
    table = rows(tmp / "both")
    sure = pd.read_csv(tmp / "both" / "intervals.csv", index_col=["row", "measure"])
    assert list(table.index) == ["seed 0, flip", "seed 1, flip"]
    assert table.protocol.iloc[0] == "cosine, flip, single query, own camera excluded"
    assert sure.value["mean of 2 seeds, flip", "mAP"] == pytest.approx(
        table.mAP.mean() / 100, abs=1e-3
    )
    assert set(sure.people) == {5}


def test_birds_a_neck_and_another_set(tmp):
    """A retrieval set, where query and gallery are the same images.

    A network with a BN neck; a test elsewhere.
    """
    birds = load_dataset("cub200", write_fixture("cub200", tmp / "data"))
    r = recipe("topdb", "cub200", profile="smoke", epochs=1, cropped=False)
    run = train(r, birds, tmp / "runs", device="cpu")
    text = evaluate(tmp, run=str(run), flip=False, rerank=False, neck="after")
    table = rows(run / "evaluation")
    assert "no camera pairs" in text
    (file,) = (run / "evaluation").rglob("*.npy")
    assert table.protocol.iloc[0] == "euclidean, after the neck, single query, own camera excluded"
    assert table["recall@1"]["plain"] == table.rank1["plain"]
    before_the_neck = torch.load(run / "features.pt", weights_only=True)["query"].numpy()
    assert not np.allclose(np.load(file), before_the_neck, atol=1e-3)
    evaluate(tmp, run=str(run), dataset="synthped-mini", flip=False, rerank=False)
    assert list(rows(run / "evaluation-synthped-mini").index) == ["plain", "junk counted"]


def test_features_of_another_program(tmp):
    rng = np.random.default_rng(0)
    g_pids = np.r_[np.repeat(np.arange(20), 5), [-1] * 10]
    ids = dict(
        q_pids=np.arange(20),
        g_pids=g_pids,
        q_camids=np.zeros(20, int),
        g_camids=np.r_[np.tile(np.arange(1, 6), 20), [1] * 10],
    )
    x = dict(
        qf=rng.normal(size=(20, 8)) + 1.5 * np.eye(20, 8),
        gf=rng.normal(size=(110, 8)) + 1.5 * np.eye(21, 8)[g_pids],
    )
    x = {k: v.astype("float32") for k, v in x.items()}
    savemat(
        tmp / "theirs.mat", {FEATURES[k]: v.astype(float) for k, v in (x | ids).items()}
    )  # cameras are called 0 to 5 there
    text = evaluate(tmp, features=str(tmp / "theirs.mat"), out=str(tmp / "theirs"))
    table = rows(tmp / "theirs")
    assert list(table.index) == ["plain", "junk counted", "re-ranked", "re-ranked, junk counted"]
    assert "no panel" in text and not (tmp / "theirs" / "hardest.png").exists()
    kept = g_pids >= 0
    r = evaluate_ranking(
        x["qf"], x["gf"][kept], ids["q_pids"], g_pids[kept], ids["q_camids"], ids["g_camids"][kept]
    )
    assert table.mAP["plain"] == round(100 * r.mAP, 2) != table.mAP["junk counted"]
    pairs = pd.read_csv(tmp / "theirs" / "cameras.csv")
    assert set(pairs["query"]) == {"c0"} and set(pairs.gallery) == {f"c{i}" for i in range(1, 6)}


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(run="nowhere"), "there is no run directory nowhere"),
        (dict(feature="x.npz"), "unknown parameter 'feature'"),
    ],
)
def test_what_cannot_be_evaluated_is_named(tmp, wrong, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        evaluate(tmp, **wrong)


def test_two_networks_are_not_two_seeds(runs, tmp):
    data = load_dataset("synthped-mini", tmp / "data")
    other = train(
        recipe("baseline", "synthped-mini", profile="smoke", epochs=1),
        data,
        tmp / "runs",
        device="cpu",
    )
    with pytest.raises(ValueError, match="nothing but the seed"):
        evaluate(tmp, run=f"{runs[0]},{other}")


def test_other_files_than_those_of_the_training_are_noticed(runs, tmp):
    data = load_dataset("synthped-mini", tmp / "other")
    one = Path(data.train.path[0])
    one.write_bytes(one.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="was trained on other files of synthped-mini"):
        evaluate(tmp, run=str(runs[0]), root=str(tmp / "other"))
