"""What search and export refuse, and what the message says: the type of the error and one keyword."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import reidnb
from PIL import Image
from torch import nn

import reidnb.deploy.export as exporting
from reidnb.core import temporary_seed
from reidnb.deploy.export import export, load_exported
from reidnb.deploy.search import NOBODY, Index, Matcher, build_index, search
from reidnb.methods.registry import build_model
from reidnb.parts.backbones import tiny_trunk

SIZE = (64, 32)


def refuses(call, error, keyword):
    "The call raises this error, and its message has the keyword."
    with pytest.raises(error, match=re.escape(keyword)):
        call()


def messages(cases):
    "Parametrise by (call, error, keyword)."
    return pytest.mark.parametrize(
        "call, error, keyword", cases, ids=[f"{i}-{case[2]}" for i, case in enumerate(cases)]
    )


def without(monkeypatch, *names):
    "As if these modules were not installed."
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def network(method="bdb", seed=0):
    with tiny_trunk(), temporary_seed(seed):
        return build_model(method, 5, backbone="resnet18")


def mean_colour():
    "Return a network of one vector of three numbers for a picture."
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))


# --- the k nearest


def features(n, changes=()):
    "Return n features of 16 numbers, some of which are replaced: (row, column, value)."
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(n))
    for row, column, value in changes:
        x[row, column] = value
    return x


Q = features(13)
G = features(700)
BAD = features(700, [(431, 3, float("nan"))])
WORSE = features(700, [(650, 0, float("inf")), (699, 0, float("inf"))])


@messages(
    [
        (
            lambda: search(Q, BAD, at_once=6400),
            ValueError,
            "gallery features hold NaN or infinite values in row 431",
        ),
        (
            lambda: search(Q, WORSE, at_once=6400),
            ValueError,
            "gallery features hold NaN or infinite values in row 650",
        ),
        (
            lambda: search(BAD, G),
            ValueError,
            "query features hold NaN in 1 of 700 rows (first: row 431)",
        ),
        (
            lambda: search(WORSE, G),
            ValueError,
            "query features hold NaN or infinite values in row 650",
        ),
        (lambda: search(Q, G, 701), ValueError, "k=701 is more than the 700 images of the gallery"),
        (lambda: search(Q, G, 0), ValueError, "k=0: ask for a whole number of images"),
        (lambda: search(Q, G, 2.5), ValueError, "k=2.5: ask for a whole number of images"),
        (
            lambda: search(Q[:, :8], G),
            ValueError,
            "query features are 8-d and gallery features 16-d",
        ),
        (
            lambda: search(Q, G, metric="cosin"),
            ValueError,
            "unknown metric 'cosin' (did you mean 'cosine'?)",
        ),
        (lambda: search(Q, G[:0]), ValueError, "the gallery is empty"),
        (lambda: search(Q[:0], G), ValueError, "there is no query"),
        (lambda: search(Q, G[0]), ValueError, "gallery features have shape (16,)"),
        (lambda: search(Q[0], G), ValueError, "query features have shape (16,)"),
    ]
)
def test_search(call, error, keyword):
    refuses(call, error, keyword)


# --- an index


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    "A flat index of G, and two files that are none."
    folder = tmp_path_factory.mktemp("indexes")
    build_index(G, folder / "flat.index")
    np.save(folder / "gallery.npy", G.numpy())
    (folder / "flat.json").write_text("[1]")
    return folder


@messages(
    [
        (lambda d: Index.load(d / "gallery.npy", G), ValueError, "is no index of this package"),
        (lambda d: Index.load(d / "flat.json", G), ValueError, "is no index of this package"),
        (lambda d: Index.load(d / "none.index", G), FileNotFoundError, "there is no index"),
        (
            lambda d: Index.load(d / "flat.index", G + 1),
            ValueError,
            "flat.index was built from other features than these (700 × 16)",
        ),
        (lambda d: Index.load(d / "flat.index", G[:699]), ValueError, "from other features"),
        (lambda d: Index.load(d / "flat.index", G.double()), ValueError, "from other features"),
        (lambda d: build_index(d / "gallery.npy"), ValueError, "open the file first"),
        (lambda d: build_index(G, sample=0), ValueError, "sample=0"),
        (lambda d: build_index(G, recall=99), ValueError, "recall=99: the share of neighbours"),
        (
            lambda d: build_index(G[:, :15], codes="pq"),
            ValueError,
            "codes='pq' takes 8 dimensions at a time, and the features have 15",
        ),
        (
            lambda d: build_index(G, codes="hnsw"),
            ValueError,
            "unknown codes 'hnsw': choose one of auto, flat, sq8, pq",
        ),
        (lambda d: build_index(G, queries=Q[:, :4]), ValueError, "query features are 4-d"),
        (lambda d: build_index(G[:0]), ValueError, "the gallery is empty"),
        (
            lambda d: build_index(BAD, sample=700),
            ValueError,
            "NaN or infinite values in row 431",
        ),
    ]
)
def test_index(indexes, call, error, keyword):
    refuses(lambda: call(indexes), error, keyword)


def test_a_small_gallery_needs_no_faiss(monkeypatch):
    without(monkeypatch, "faiss")
    refuses(
        lambda: build_index(G, codes="sq8"),
        ImportError,
        "needs faiss, which is not installed: run `pip install",
    )
    assert build_index(G).recall == 1


# --- who is in a picture


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Two pictures, half a picture, and folders without people or without pictures."
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("one.jpg", "two.jpg"):
        Image.fromarray(rng.integers(0, 256, (64, 32, 3), dtype="uint8")).save(folder / name)
    whole = (folder / "one.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "nobody").mkdir()
    (folder / "empty" / "Cleo").mkdir(parents=True)
    export(mean_colour(), folder / "net.pt2", SIZE)
    return folder


@pytest.fixture
def known(pictures):
    "A matcher that knows Ana by one picture, and the folder of pictures."
    matcher = Matcher(mean_colour(), SIZE).add("Ana", pictures / "one.jpg")
    return SimpleNamespace(matcher=matcher, folder=pictures, one=pictures / "one.jpg")


def with_ben(known):
    return known.matcher.add("Ben", known.folder / "two.jpg")


@messages(
    [
        (
            lambda x: x.matcher.add("Ben", [x.one, x.folder / "broken.jpg"]),
            OSError,
            "broken.jpg cannot be read as an image",
        ),
        (
            lambda x: x.matcher.who(Image.open(x.folder / "broken.jpg")),
            OSError,
            "broken.jpg cannot be read as an image",
        ),
        (lambda x: Matcher(mean_colour(), SIZE).who(x.one), ValueError, "nobody is enrolled yet"),
        (lambda x: x.matcher.who([]), ValueError, "no picture is given"),
        (lambda x: x.matcher.who(x.one, k=0), ValueError, "k=0: ask for"),
        (lambda x: x.matcher.who([np.zeros(3)]), TypeError, "not ndarray"),
        (lambda x: x.matcher.add(NOBODY, x.one), ValueError, "cannot be called 'nobody'"),
        (lambda x: Matcher(mean_colour()), ValueError, "size is missing"),
        (
            lambda x: Matcher(x.folder / "net.pt2", size=SIZE),
            ValueError,
            "has its own size",
        ),
        (lambda x: x.matcher.calibrate(), ValueError, "people enrolled: 1"),
        (lambda x: with_ben(x).calibrate(), ValueError, "no person has two pictures"),
        (
            lambda x: with_ben(x).calibrate(far=2),
            ValueError,
            "far=2: a false acceptance rate",
        ),
        (
            lambda x: x.matcher.add_folder(x.folder / "nobody"),
            ValueError,
            "has no folder in it",
        ),
        (
            lambda x: x.matcher.add_folder(x.folder / "empty"),
            ValueError,
            "has no picture (.jpg, .jpeg, .png) of Cleo in it",
        ),
        (
            lambda x: x.matcher.add_folder(x.folder / "none"),
            FileNotFoundError,
            "none is no folder",
        ),
    ]
)
def test_matcher(known, call, error, keyword):
    refuses(lambda: call(known), error, keyword)


def test_of_pictures_that_cannot_all_be_read_none_is_enrolled(known):
    with pytest.raises(OSError):
        known.matcher.add("Ben", [known.one, known.folder / "broken.jpg"])
    assert known.matcher.people == ["Ana"]
    assert len(known.matcher.gf) == len(known.matcher.pictures) == 1


# --- a network that is not there


@pytest.mark.parametrize(
    "network, keyword",
    [
        ("nothing", "nothing does not exist: give a run directory, or an exported file"),
        ("one.jpg", "one.jpg is no network: give a run directory, or an exported file"),
        ("gone.pt2", "gone.pt2 is not there: write it with reidnb.export"),
    ],
)
@pytest.mark.parametrize("command", ["search", "export"])
def test_a_path_without_a_network(pictures, command, network, keyword):
    more = [pictures, pictures / "one.jpg"] if command == "search" else [pictures / "x.pt2"]
    called = reidnb(command, pictures / network, *more)
    assert called.status == 2
    assert keyword in called.stderr
    assert "last.pt" not in called.stderr


# --- export


def of_no_embedding():
    return nn.Conv2d(3, 4, 1)


def of_nan():
    net = mean_colour()
    net[2].weight.data.fill_(float("nan"))
    return net


@messages(
    [
        (lambda d: export(mean_colour(), d / "x.pt2"), ValueError, "size is missing"),
        (
            lambda d: export(mean_colour(), d / "x.pt", SIZE),
            ValueError,
            "unknown kind of exported file '.pt' (did you mean '.pt2'?)",
        ),
        (
            lambda d: export(mean_colour(), d / "x.pt2", SIZE, fit="crop"),
            ValueError,
            "unknown fit 'crop'",
        ),
        (
            lambda d: export(d / "net.pt2", d / "x.pt2"),
            ValueError,
            "this is an exported file already",
        ),
        (
            lambda d: export(of_no_embedding(), d / "x.pt2", (8, 8)),
            ValueError,
            "does not give one (N, D) embedding",
        ),
        (
            lambda d: export(of_nan(), d / "x.pt2", (8, 8)),
            ValueError,
            "differs from the network by nan",
        ),
        (lambda d: load_exported(d / "x.onnx"), FileNotFoundError, "x.onnx is not there"),
    ]
)
def test_export(pictures, call, error, keyword):
    refuses(lambda: call(pictures), error, keyword)
    assert not list(pictures.glob("*x.*"))


def test_a_file_of_other_weights_is_not_left_behind(tmp_path, monkeypatch):
    other = network(seed=1)
    compare = exporting._difference
    monkeypatch.setattr(
        exporting, "_difference", lambda model, file, about: compare(other, file, about)
    )
    refuses(
        lambda: export(network(), tmp_path / "wrong.pt2", SIZE),
        ValueError,
        "wrong.pt2 differs from the network by ",
    )
    assert not list(tmp_path.iterdir())


def test_a_file_that_something_else_wrote(tmp_path):
    program = torch.export.export(nn.Flatten(), (torch.zeros(2, 3, 4, 4),))
    torch.export.save(program, tmp_path / "strange.pt2")
    refuses(
        lambda: load_exported(tmp_path / "strange.pt2"),
        ValueError,
        "strange.pt2 does not say how to feed it",
    )


def test_onnx_that_is_not_installed(tmp_path, monkeypatch):
    without(monkeypatch, "onnx", "onnxruntime")
    refuses(
        lambda: export(mean_colour(), tmp_path / "x.onnx", SIZE),
        ImportError,
        "needs onnx, which is not installed: run `pip",
    )
    (tmp_path / "x.onnx").touch()
    refuses(
        lambda: load_exported(tmp_path / "x.onnx"),
        ImportError,
        "needs onnxruntime, which is not installed",
    )
