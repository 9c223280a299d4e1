"""nbs/train.ipynb.

Parameters take effect, what does not exist is named, a second call continues. (Papermill itself
runs it in test_clone.)
"""

import json

import pytest
from pages import ROOT, load_page, new_shell, outputs, run_cells, run_page, working_in

from reidnb.data.dataset import TEST_SETS
from reidnb.data.fixtures import FIXTURES, write_fixture
from reidnb.data.load import DATA_SOURCES, load_dataset
from reidnb.parts.backbones import tiny_trunk

pytestmark = pytest.mark.usefixtures("tiny")


def run(tmp, **parameters):
    """Execute the notebook on SynthPed-mini.

    The runs that it left, by their directory, and the notebook.
    """
    given = dict(
        dataset="synthped-mini",
        profile="smoke",
        root=str(tmp / "data"),
        out=str(tmp / "runs"),
        device="cpu",
    )
    page = run_page("train", given | parameters, cwd=tmp)
    return {f.parent: json.loads(f.read_text()) for f in (tmp / "runs").rglob("run.json")}, page


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def first(tmp):
    "One run: its directory and its run.json."
    with tiny_trunk():
        runs, _ = run(tmp, method="bdb", epochs=1)
    ((path, info),) = runs.items()
    return path, info


def test_a_run_leaves_its_directory(first):
    path, info = first
    assert info["status"] == "finished"
    assert 0 < info["metrics"]["mAP"] <= 1
    assert {
        "run.json",
        "metrics.csv",
        "references.csv",
        "curves.png",
        "cmc.png",
        "rank5.png",
        "activations.png",
    } <= {p.name for p in path.iterdir()}


def some_fast(names, fast):
    "Parameters; `make test-all` runs those that are not among the fast ones."
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


METHODS = ["baseline", "topdb", "stadb", "sen", "pmm", "pmm/cutmix", "bdb/no-triplet"]


@pytest.mark.parametrize("method", some_fast(METHODS, ["sen", "pmm"]))
def test_every_method_runs(method, tmp_path):
    runs, _ = run(tmp_path, method=method, epochs=1, references=False)
    ((path, info),) = runs.items()
    assert info["status"] == "finished"
    assert info["recipe"]["method"] == method
    assert path.parent.name == method.split("/")[-1]
    assert 0 < info["metrics"]["mAP"] <= 1
    assert {"maps.npz", "metrics.csv", "activations.png"} <= {p.name for p in path.iterdir()}


FORMS = {
    "folder": dict(camera=r"cam(\d+)_"),
    "cub200": dict(metric_loss="margin"),
    "inshop": dict(method="baseline", metric_loss="lifted"),
    "sop": dict(metric_loss="histogram"),
    "cars196": dict(source="released"),
}


TRAINABLE = [name for name in FIXTURES if name not in TEST_SETS]


@pytest.mark.parametrize("dataset", some_fast(TRAINABLE, FORMS))
def test_every_data_set_runs(dataset, tmp_path):
    "On its fixture; the retrieval sets with one of the losses of BDB Table 8 each."
    own = write_fixture(dataset, tmp_path / "data")
    root = own if dataset == "folder" else tmp_path / "data"
    given = dict(
        method="bdb", dataset=dataset, root=str(root), epochs=1, references=False
    ) | FORMS.get(dataset, {})
    runs, _ = run(tmp_path, **given)
    ((path, info),) = runs.items()
    assert info["status"] == "finished"
    assert info["recipe"]["dataset"] == dataset
    assert {"rank5.png", "activations.png"} <= {p.name for p in path.iterdir()}
    recall = [k for k in info["metrics"] if k.startswith("recall@")]
    ks = DATA_SOURCES[dataset].recall_ks if dataset in DATA_SOURCES else ()
    assert recall == [f"recall@{k}" for k in ks]
    assert 0 < info["metrics"]["mAP"] <= 1
    if ks:
        assert info["metrics"]["recall@1"] == info["metrics"]["rank1"]
        columns = (path / "metrics.csv").read_text().split("\n")[0].split(",")
        assert columns.count("global/" + info["recipe"]["metric_loss"]) == 1


@pytest.mark.slow
def test_two_sets_and_a_third_to_test_on(tmp_path):
    """Trained on two sets, tested on the first, on the second and on a third, without training
    again for it.
    """
    for n in ("market1501", "msmt17", "dukemtmc"):
        write_fixture(n, tmp_path / "data")
    given = dict(method="bdb", dataset="market1501+msmt17", epochs=1, references=False)
    runs, _ = run(tmp_path, **given)
    ((path, info),) = runs.items()
    before = (path / "last.pt").stat().st_mtime_ns
    assert info["classes"] == sum(
        load_dataset(n, tmp_path / "data").num_classes for n in ("market1501", "msmt17")
    )
    assert not (path / "tests.json").exists()
    runs, page = run(tmp_path, **given, test_dataset="dukemtmc+msmt17")
    assert list(runs) == [path]
    assert (path / "last.pt").stat().st_mtime_ns == before
    tests = json.loads((path / "tests.json").read_text())
    assert set(tests) == {"dukemtmc", "msmt17"}
    assert tests["dukemtmc"]["tested"]["gallery"] == len(
        load_dataset("dukemtmc", tmp_path / "data").gallery
    )
    assert tests["dukemtmc"]["metrics"] != tests["msmt17"]["metrics"]
    assert "bdb, tested on dukemtmc" in str(outputs(page))


def test_parameters_take_effect(first, tmp):
    "An untagged parameters cell would silently win over what papermill injects."
    path, info = first
    assert (info["recipe"]["method"], info["recipe"]["epochs"], info["recipe"]["seed"]) == (
        "bdb",
        1,
        0,
    )
    # lr, weights and loss_weights are not in the parameters cell
    runs, _ = run(
        tmp,
        method="baseline",
        epochs=1,
        seed=5,
        lr=2e-4,
        weights=None,
        loss_weights={"global/triplet": 0.5},
        references=False,
    )
    other = next(r for p, r in runs.items() if p != path)
    assert (other["recipe"]["method"], other["recipe"]["seed"], other["recipe"]["lr"]) == (
        "baseline",
        5,
        2e-4,
    )
    assert other["recipe"]["loss_weights"] == {"global/triplet": 0.5}
    assert other["metrics"] != info["metrics"]


def test_a_second_call_trains_nothing(first, tmp):
    path, _ = first
    before = (path / "last.pt").stat().st_mtime_ns, (path / "metrics.csv").read_bytes()
    run(tmp, method="bdb", epochs=1)
    assert before == ((path / "last.pt").stat().st_mtime_ns, (path / "metrics.csv").read_bytes())


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(method="bdbnet"), "choose one of baseline, bdb"),
        (dict(dataset="market"), "synthped-small"),
        (dict(heigth=96), "did you mean 'height'"),
        (dict(method="sen", source="released"), "no program was released"),
        (dict(method="stadb", rho=1.5), "rho is a number in"),
        (dict(dataset="market1501"), "bounding_box_train"),
        (dict(dataset="occluded-reid"), "occluded-reid has no training images: train on another"),
    ],
)
def test_what_does_not_exist_is_named(tmp_path, wrong, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        run(tmp_path, **wrong)


def test_run_all_twice_in_one_kernel():
    """Change a parameter and run all cells again, as one does in JupyterLab.

    The change counts, and nothing of the first pass is left.
    """

    def upto_recipe(**values):
        page = load_page("train", dict(profile="smoke") | values)
        end = next(i for i, c in enumerate(page.cells) if "recipe(method" in c.source)
        return page.cells[: end + 1]

    shell = new_shell()
    said = []
    with working_in(ROOT / "nbs"):
        for values in (
            dict(method="bdb", epochs=7, height_ratio=0.5),
            dict(method="bdb", epochs=3),
        ):
            cells = upto_recipe(**values)
            run_cells(shell, cells)
            said.append("".join("".join(o["text"]) for o in cells[-1].outputs))
    assert "7 epochs" in said[0] and "height_ratio 0.5" in said[0]
    assert "3 epochs" in said[1] and "height_ratio 0.3" in said[1]


def test_a_clone_without_weights_trains_again(first, tmp):
    """git keeps run.json and metrics.csv, not the weights.

    The notebook must not stop at the missing files.
    """
    path, info = first
    for f in path.glob("*.pt"):
        f.unlink()
    runs, _ = run(tmp, method="bdb", epochs=1)
    assert runs[path]["metrics"] == info["metrics"]
