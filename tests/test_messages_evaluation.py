"""Evaluation: what wrong input is told, and what interruptions leave behind."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from commands import reidnb
from PIL import Image
from torch import nn

from reidnb.core import temporary_seed
from reidnb.data.load import load_dataset
from reidnb.evaluation.embeddings import extract, load_features
from reidnb.evaluation.metrics import Ranking, crowd, distances, rank_measures, ranking_table
from reidnb.evaluation.ranking import (
    evaluate_distances,
    evaluate_protocols,
    evaluate_ranking,
    recall_at_k,
    top_k,
)
from reidnb.evaluation.reranking import rerank
from reidnb.evaluation.statistics import bootstrap, camera_pairs, tar_at_far
from reidnb.evaluation.thresholds import rates_in_words, threshold_rates
from reidnb.methods.registry import recipe
from reidnb.parts.backbones import tiny_trunk
from reidnb.training.checkpoints import read_run
from reidnb.training.loop import train

INF, NAN = float("inf"), float("nan")


def refused(call, error, keyword):
    "The call raises this error, whose message contains the keyword."
    with pytest.raises(error) as info:
        call()
    assert keyword in str(info.value)


def rows(*table):
    "A parametrised table of (call, error, keyword)."
    return pytest.mark.parametrize(
        "call, error, keyword", table, ids=[f"{i}: {row[2][:40]}" for i, row in enumerate(table)]
    )


# rankings and tables

three = Ranking(
    **rank_measures(np.array([0, 0, 2, 2]), np.array([2, 3, 1, 51]), queries=3), gallery=60
)
named = replace(three, name="euclidean, single query, own camera excluded")
two = Ranking(**rank_measures(np.array([0, 1]), np.array([1, 3]), 2), gallery=9)


@rows(
    (lambda: three.metrics((1, 60)), ValueError, "rank-n is known for n from 1 to 50"),
    (lambda: three.recall((0,)), ValueError, "k=0: Recall@K"),
    (
        lambda: ranking_table([named, named]),
        ValueError,
        "two rankings are named 'euclidean, single query",
    ),
    (
        lambda: bootstrap(two, [1, 2, 3]),
        ValueError,
        "rankings and q_pids are of (2,) and (3,) queries",
    ),
    (lambda: bootstrap([], [1]), ValueError, "no ranking to sample from"),
    (lambda: bootstrap(two, [1, 2], 0), ValueError, "samples=0"),
    (lambda: bootstrap(two, [1, 2], level=95), ValueError, "level=95"),
)
def test_rankings(call, error, keyword):
    refused(call, error, keyword)


# evaluate_ranking, evaluate_distances, top_k


def ranking(**changed):
    given = dict(
        qf=[[0.0, 1.0]],
        gf=[[0.0, 1.0], [1.0, 1.0]],
        q_pids=[1],
        g_pids=[1, 2],
        q_camids=[0],
        g_camids=[1, 1],
    )
    return evaluate_ranking(**given | changed)


def of_distances(dist):
    return evaluate_distances(dist, [1], [1, 2], [0], [1, 1])


@rows(
    (
        lambda: ranking(g_pids=[1, 2, 3]),
        ValueError,
        "g_pids has shape (3,) but there are 2 such images",
    ),
    (lambda: ranking(q_camids=[]), ValueError, "q_camids has shape (0,)"),
    (
        lambda: ranking(q_pids=[1.0]),
        ValueError,
        "q_pids is of type float64: identities and cameras are integers",
    ),
    (
        lambda: ranking(gf=np.zeros((0, 2)), g_pids=[], g_camids=[]),
        ValueError,
        "1 query and 0 gallery images",
    ),
    (
        lambda: ranking(qf=np.zeros((0, 2)), q_pids=[], q_camids=[]),
        ValueError,
        "0 query and 2 gallery images",
    ),
    (
        lambda: ranking(gf=[[0.0, 1.0], [NAN, 0.0]]),
        ValueError,
        "gallery features hold NaN in 1 of 2 rows (first: row 1)",
    ),
    (lambda: ranking(qf=[[INF, 0.0]]), ValueError, "infinite"),
    (lambda: ranking(gf=np.zeros((2, 3))), ValueError, "2-d and gallery features 3-d"),
    (lambda: ranking(qf=[0.0, 1.0]), ValueError, "give a matrix"),
    (
        lambda: ranking(qf=torch.zeros(1, 2, device="meta"), gf=torch.zeros(2, 2)),
        ValueError,
        "query features are on meta and gallery features on cpu: move them to one device",
    ),
    (lambda: ranking(rerank=True), ValueError, "k1=20 is larger than the gallery of 2 images"),
    (lambda: ranking(rerank=np.True_), ValueError, "k1=20 is larger"),
    (
        lambda: ranking(rerank="yes"),
        ValueError,
        "rerank='yes': give True, False, or a dict",
    ),
    (lambda: ranking(rerank=1), ValueError, "rerank=1: give True, False, or a dict"),
    (lambda: ranking(rerank=None), ValueError, "rerank=None: give True, False, or a dict"),
    (lambda: ranking(rerank=dict(k3=1)), ValueError, "unknown number of re-ranking 'k3'"),
    (lambda: ranking(metric="cosin"), ValueError, "unknown metric 'cosin'"),
    (lambda: ranking(protocol="single-shot"), ValueError, "unknown protocol 'single-shot'"),
    (
        lambda: ranking(protocol="single-gallery-shot", repeats=0),
        ValueError,
        "repeats=0: sample at least one gallery",
    ),
    (
        lambda: ranking(g_camids=[0, 1], protocol="single-gallery-shot"),
        ValueError,
        "none of the 1 queries",
    ),
    (
        lambda: ranking(g_camids=[0, 1]),
        ValueError,
        "none of the 1 queries has a right answer",
    ),
    (lambda: of_distances([[NAN, 0.0]]), ValueError, "distances hold NaN in 1 of 1 rows"),
    (lambda: of_distances([[0.0, 1.0, 2.0]]), ValueError, "g_pids has shape (2,) but there are 3"),
    (lambda: top_k([[0.0]], [[1.0]], [1], [1], [0], [1], k=0), ValueError, "k=0: ask for"),
    (lambda: distances([[0.0]], [[1.0]], "cosin"), ValueError, "unknown metric 'cosin'"),
    (
        lambda: camera_pairs([[0.0]], [[1.0]], [1], [1, 2], [0], [0]),
        ValueError,
        "g_pids has shape (2,)",
    ),
    (
        lambda: evaluate_protocols([[0.0]], [[1.0]], [1], [1, 2], [0], [0]),
        ValueError,
        "g_pids has shape (2,)",
    ),
)
def test_ranking(call, error, keyword):
    refused(call, error, keyword)


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_error_in_a_slice_leaves_the_number_of_threads(cores, monkeypatch):
    "On a CPU each core takes slices of its own, with one thread each."
    import reidnb.evaluation.ranking as evaluation

    def fails(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(evaluation, "right_answers", fails)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(cores)
        with pytest.raises(ZeroDivisionError):
            evaluation.evaluate_distances(
                np.zeros((9, 2)), [1] * 9, [1, 2], [0] * 9, [1, 1], at_once=1
            )
        in_new_thread = ThreadPoolExecutor(1).submit(torch.get_num_threads).result()
        assert (torch.get_num_threads(), in_new_thread) == (cores, cores)
    finally:
        torch.set_num_threads(threads)


# tar_at_far

GALLERY = [[1.0], [2.0], [3.0], [4.0], [5.0], [0.0]]
LINE = [[0.0]], GALLERY, [1], [1, 2, 1, 2, 1, 1], [0], [1, 1, 1, 1, 1, 0]


@rows(
    (lambda: tar_at_far(*LINE, far=1.5), ValueError, "far=1.5: a false acceptance rate"),
    (lambda: tar_at_far(*LINE, far=(-1,)), ValueError, "far=-1"),
    (lambda: tar_at_far(*LINE, far=()), ValueError, "far is empty"),
    (
        lambda: tar_at_far(*LINE[:4], [1], [1, 1, 1, 1, 1, 1]),
        ValueError,
        "2 pairs of two persons and 0 of one person",
    ),
    (lambda: tar_at_far(*LINE[:3], [1] * 6, *LINE[4:]), ValueError, "0 pairs of two persons"),
    (lambda: tar_at_far(*LINE, metric="cosin"), ValueError, "unknown metric 'cosin'"),
    (lambda: tar_at_far([[INF]], *LINE[1:]), ValueError, "infinite"),
)
def test_tar_at_far(call, error, keyword):
    refused(call, error, keyword)


# recall_at_k

rng = np.random.default_rng(3)
F60, Y60 = rng.normal(size=(60, 6)), rng.integers(0, 12, 60)


def recall(labels=Y60, ks=(1, 2, 4, 8), f=F60, **how):
    return recall_at_k(f, labels, ks, **how)


@rows(
    (lambda: recall(Y60[:-1]), ValueError, "labels has shape (59,) but there are 60 such images"),
    (lambda: recall(Y60 + 0.5), ValueError, "labels is of type float64: identities"),
    (
        lambda: recall([0, 0], f=[[0.0, 1.0], [0.0, NAN]]),
        ValueError,
        "embeddings hold NaN in 1 of 2 rows (first: row 1)",
    ),
    (
        lambda: recall(f=F60[:, :2], gallery=[[0.0, NAN]], gallery_labels=[0]),
        ValueError,
        "gallery embeddings hold NaN in 1 of 1 rows",
    ),
    (lambda: recall([0, 0], f=[[INF], [0.0]]), ValueError, "infinite"),
    (lambda: recall(f=F60[:, 0]), ValueError, "embeddings have shape (60,): give a matrix"),
    (
        lambda: recall(gallery=F60[:, 1:], gallery_labels=Y60),
        ValueError,
        "query features are 6-d and gallery features 5-d",
    ),
    (
        lambda: recall(gallery=F60[1:], gallery_labels=Y60),
        ValueError,
        "gallery_labels has shape (60,) but there are 59",
    ),
    (lambda: recall(gallery=F60), ValueError, "give both or neither"),
    (lambda: recall(gallery_labels=Y60), ValueError, "give both or neither"),
    (lambda: recall(Y60[:0], f=F60[:0]), ValueError, "0 embeddings to search among 0"),
    (
        lambda: recall(gallery=F60[:0], gallery_labels=Y60[:0]),
        ValueError,
        "60 embeddings to search among 0",
    ),
    (lambda: recall(ks=(1, 0)), ValueError, "k=0: Recall@K looks at a whole number"),
    (lambda: recall(ks=(1, -1)), ValueError, "k=-1: Recall@K looks at a whole number"),
    (lambda: recall(ks=(1, 1.5)), ValueError, "k=1.5: Recall@K looks at a whole number"),
    (lambda: recall(ks=()), ValueError, "ks is empty"),
    (lambda: recall(metric="cosin"), ValueError, "unknown metric 'cosin'"),
)
def test_recall_at_k(call, error, keyword):
    refused(call, error, keyword)


# rerank

THREE, SIX = np.eye(3, 4), np.eye(6, 4)
WITH_NAN = np.where(np.arange(6)[:, None] == 2, np.nan, SIX)


def reranked(k1=3, qf=THREE, gf=SIX, **how):
    return rerank(qf, gf, k1=k1, **how)


@rows(
    (lambda: reranked(7), ValueError, "k1=7 is larger than the gallery of 6 images"),
    (lambda: reranked(20), ValueError, "k1=20 is larger"),
    (lambda: reranked(0), ValueError, "k1=0: give a whole number"),
    (lambda: reranked(-1), ValueError, "k1=-1: give a whole number"),
    (lambda: reranked(1.5), ValueError, "k1=1.5: give a whole number"),
    (lambda: reranked(k2=0), ValueError, "k2=0: give a whole number"),
    (lambda: reranked(k2=-1), ValueError, "k2=-1: give a whole number"),
    (lambda: reranked(k2=1.5), ValueError, "k2=1.5: give a whole number"),
    (lambda: reranked(k2=10), ValueError, "k2=10 is more than the 9 images of query and gallery"),
    (lambda: reranked(lambda_value=-0.1), ValueError, "weight between 0 and 1"),
    (lambda: reranked(lambda_value=1.1), ValueError, "weight between 0 and 1"),
    (lambda: reranked(lambda_value=NAN), ValueError, "weight between 0 and 1"),
    (lambda: reranked(power=0), ValueError, "power=0"),
    (lambda: reranked(metric="cosin"), ValueError, "unknown metric 'cosin'"),
    (
        lambda: reranked(gf=np.eye(6, 5)),
        ValueError,
        "query features are 4-d and gallery features 5-d",
    ),
    (
        lambda: reranked(gf=WITH_NAN),
        ValueError,
        "gallery features hold NaN in 1 of 6 rows (first: row 2)",
    ),
    (lambda: reranked(qf=np.full((1, 4), INF)), ValueError, "infinite"),
    (lambda: reranked(qf=np.ones(4)), ValueError, "give a matrix"),
    (lambda: reranked(qf=np.zeros((0, 4))), ValueError, "0 query and 6 gallery images"),
    (lambda: reranked(gf=np.zeros((0, 4))), ValueError, "3 query and 0 gallery images"),
    (
        lambda: reranked(qf=torch.zeros(3, 4, device="meta"), gf=torch.zeros(6, 4)),
        ValueError,
        "query features are on meta and gallery features on cpu: move them to one device",
    ),
)
def test_rerank(call, error, keyword):
    refused(call, error, keyword)


# extract


class Tiny(nn.Module):
    by = 1.0  # what it does differently is neither a weight nor a layer

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.by * self.bn(self.conv(x))[..., 0].flatten(1)


class Images:
    "Normalised images; after some batches they stop the program. `extract` looks at the first and the last one before."

    def __init__(self, x, after=None):
        self.x = x
        self.left = None if after is None else after + 1

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self.x[i]


with temporary_seed(0):
    MODEL, X = Tiny(), torch.randn(7, 3, 6, 5)


def cut_end(path, n):
    "Cut the last n bytes of a file."
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - n])


@pytest.mark.parametrize("spoil", [0, 5])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_extract_goes_on_where_it_was_stopped(tmp_path, after, spoil):
    "Stopped after the first, the second or the last batch, or in the middle of a row, it ends at the same numbers."
    MODEL.train()
    expected = extract(MODEL, Images(X), batch_size=3)
    out, part = tmp_path / "f.npy", tmp_path / "f.npy.part"
    with pytest.raises(KeyboardInterrupt):
        extract(MODEL, Images(X, after), 3, out=out)
    assert not out.exists()
    assert MODEL.training
    if after:
        cut_end(part, spoil)
        assert (part.stat().st_size - 128) // (4 * 16) == 3 * after - bool(spoil)
    resumed = extract(MODEL, Images(X), batch_size=2, out=out)
    torch.testing.assert_close(torch.tensor(resumed), expected, atol=1e-6, rtol=0)
    assert not part.exists()
    assert (tmp_path / "f.npy.json").exists()


def test_extract_stopped_within_the_head(tmp_path):
    out = tmp_path / "head.npy"
    with pytest.raises(KeyboardInterrupt):
        extract(MODEL, Images(X, 0), out=out)
    (tmp_path / "head.npy.part").write_bytes(b"\x93NUM")
    resumed = extract(MODEL, Images(X), batch_size=3, out=out)
    assert torch.equal(torch.tensor(resumed), extract(MODEL, Images(X), batch_size=3))


@contextmanager
def scaled(by):
    "The same network with other numbers."
    Tiny.by = by
    try:
        yield
    finally:
        Tiny.by = 1.0


def test_extract_refuses_features_of_others(tmp_path):
    other = "whole.npy holds features of other images, or of another network or other settings"
    out = tmp_path / "whole.npy"
    extract(MODEL, Images(X), out=out)
    refused(lambda: extract(MODEL, Images(X + 1), out=out), ValueError, other)
    refused(lambda: extract(MODEL, Images(X), flip=True, out=out), ValueError, other)
    with temporary_seed(1):
        refused(lambda: extract(Tiny(), Images(X), out=out), ValueError, other)
    extract(MODEL, Images(X), out=out)
    with scaled(1.1):
        refused(lambda: extract(MODEL, Images(X), out=out), ValueError, other)
    (tmp_path / "whole.npy.json").unlink()
    refused(lambda: extract(MODEL, Images(X), out=out), ValueError, other)


def test_extract_leaves_a_file_of_the_readers(tmp_path):
    (tmp_path / "own.npy.json").write_text("[1]")
    refused(
        lambda: extract(MODEL, Images(X), out=tmp_path / "own.npy"),
        ValueError,
        "own.npy holds features of other images",
    )
    assert (tmp_path / "own.npy.json").read_text() == "[1]"


@pytest.fixture
def files(tmp_path):
    paths = []
    for i, x in enumerate(X):
        paths.append(tmp_path / f"{i}.png")
        pixels = ((x.permute(1, 2, 0).clamp(-1, 1) + 1) * 127).byte().numpy()
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_extract_refuses_files_in_another_order(tmp_path, files):
    table = pd.DataFrame({"path": files})
    out = tmp_path / "t.npy"
    extract(MODEL, table, size=(6, 5), out=out)
    refused(
        lambda: extract(MODEL, table[::-1], size=(6, 5), out=out),
        ValueError,
        "t.npy holds features of other images",
    )


@rows(
    (lambda d: extract(MODEL, Images(X[:0])), ValueError, "no image"),
    (lambda d: extract(MODEL, []), ValueError, "no image"),
    (lambda d: extract(MODEL, Images(X), out=d / "f.pt"), ValueError, "name ends in .npy"),
    (lambda d: extract(MODEL, ["a.png"], size=64), ValueError, "size=64: give (height, width)"),
    (lambda d: extract(MODEL, str(d)), ValueError, "give a list of files"),
)
def test_extract(tmp_path, call, error, keyword):
    refused(lambda: call(tmp_path), error, keyword)


# load_features

GIVEN = dict(
    qf=np.ones((6, 32), "f4"),
    gf=np.ones((6, 32), "f4"),
    q_pids=np.arange(6),
    g_pids=np.arange(6),
    q_camids=np.zeros(6, int),
    g_camids=np.ones(6, int),
)


def saved_npz(path, **changed):
    np.savez(path, **GIVEN | changed)


def saved_part(path):
    np.savez(path, qf=GIVEN["qf"], gf=GIVEN["gf"], q_pids=[1])


def saved_cut(path):
    saved_npz(path)
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    "name, save, error, keyword",
    [
        (
            "arrays.pt",
            lambda p: torch.save(GIVEN, p),
            ValueError,
            "must hold tensors, not arrays",
        ),
        ("pair.pt", lambda p: torch.save((1, 2), p), ValueError, "but no qf"),
        (
            "short.npz",
            lambda p: saved_npz(p, g_camids=[1, 2]),
            ValueError,
            "g_camids has 2 entries, but gf has 6 rows",
        ),
        (
            "odd.npz",
            lambda p: saved_npz(p, qf=GIVEN["qf"] * 1j),
            ValueError,
            "odd.npz: features must be real numbers",
        ),
        (
            "odd.npz",
            lambda p: saved_npz(p, q_pids=np.arange(6) + 0.5),
            ValueError,
            "ids integers",
        ),
        (
            "odd.npz",
            lambda p: saved_npz(p, qf=np.array([[None]])),
            ValueError,
            "odd.npz: qf is an array of Python objects",
        ),
        (
            "turned.npz",
            lambda p: saved_npz(p, gf=GIVEN["gf"].T),
            ValueError,
            "g_pids has 6 entries, but gf has 32 rows: one per image, so transpose",
        ),
        ("nothing.npz", lambda p: None, FileNotFoundError, "nothing.npz is not there"),
        (
            "x.csv",
            lambda p: p.write_text("1"),
            ValueError,
            "features are read from .npz, .mat, .pt files",
        ),
        (
            "part.npz",
            saved_part,
            ValueError,
            "holds qf, gf, q_pids, but no g_pids (or gallery_label), q_camids (or query_cam)",
        ),
        ("cut.npz", saved_cut, ValueError, "cut.npz is no .npz archive, or not a whole one"),
        (
            "text.npz",
            lambda p: p.write_text("not an archive"),
            ValueError,
            "it should hold qf, gf, q_pids, g_pids, q_camids, g_camids",
        ),
        (
            "cut.mat",
            lambda p: p.write_bytes(b"MATLAB"),
            ValueError,
            "cut.mat cannot be read as a MATLAB file",
        ),
    ],
)
def test_load_features(tmp_path, name, save, error, keyword):
    save(tmp_path / name)
    refused(lambda: load_features(tmp_path / name), error, keyword)


def test_the_command_prints_rates_at_thresholds_or_why_not(tmp_path):
    names = ("qf", "gf", "q_pids", "g_pids", "q_camids", "g_camids")
    np.savez(tmp_path / "crowd.npz", **dict(zip(names, crowd(noise=1.3))))
    called = reidnb("evaluate", tmp_path / "crowd.npz")
    rates = threshold_rates(*crowd(noise=1.3))
    identified, verified = called.stdout.splitlines()[-2:]
    for far in ("0.01", "0.001"):
        share, threshold = rates[f"identified@{far}"], rates[f"threshold@{far}"]
        assert f"{share:.1%} at {far} (threshold {threshold:.4g})" in identified
        assert f"{rates[f'tar@{far}']:.1%} at {far}" in verified
    one = dict(zip(names, ([[0.0]], [[1.0]], [1], [1], [0], [1])))
    np.savez(tmp_path / "one.npz", **{name: np.array(value) for name, value in one.items()})
    called = reidnb("evaluate", tmp_path / "one.npz")
    assert called.status == 0
    assert called.stdout.splitlines()[-1].startswith("no threshold: 1 people have a query")


def test_the_command_prints_rates_of_a_run(mini, tmp_path):
    data = load_dataset("synthped-mini", mini)
    r = recipe("bdb", "synthped-mini", profile="smoke", steps=1, epochs=1, test_ids=5)
    with tiny_trunk():
        run = train(r, data, tmp_path, device="cpu")
        called = reidnb("evaluate", run, "--root", mini, "--device", "cpu")
        elsewhere = reidnb("evaluate", run, "--root", mini, "--on", "synthped-mini")
    info = read_run(run)
    measures, *rates = called.stdout.splitlines()[-3:]
    assert measures.startswith(f"mAP {info['metrics']['mAP']:.1%}, ")
    assert "\n".join(rates) == rates_in_words(info["thresholds"])
    assert "identified, at a false alarm rate: " in elsewhere.stdout


def test_the_command_does_not_advise_to_unpickle(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"no archive")
    called = reidnb("evaluate", tmp_path / "x.npz")
    assert called.status == 2
    assert "x.npz is no .npz archive" in called.stderr
    assert "pickle" not in called.stderr
