"""nbs/train.ipynb as papermill runs it: parameters take effect, what does not exist is named, a second call continues."""
import json, subprocess, sys
from pathlib import Path
import papermill, pytest
from reidnb.datasets import SOURCES, load_dataset
from reidnb.fixtures import FIXTURES, write_fixture

ROOT = Path(__file__).resolve().parent.parent

def run(tmp, **parameters):
    "Execute the notebook on SynthPed-mini; the runs that it left, by their directory."
    given = dict(dataset="synthped-mini", profile="smoke", root=str(tmp/"data"), out=str(tmp/"runs"), device="cpu") | parameters
    papermill.execute_notebook(str(ROOT/"nbs"/"train.ipynb"), str(tmp/"executed.ipynb"), parameters=given, cwd=str(tmp), progress_bar=False)
    return {f.parent: json.loads(f.read_text()) for f in (tmp/"runs").rglob("run.json")}

@pytest.fixture(scope="module")
def tmp(tmp_path_factory): return tmp_path_factory.mktemp("train")

@pytest.fixture(scope="module")
def first(tmp): return run(tmp, method="bdb", epochs=1)

def test_a_run_leaves_its_directory(first, tmp):
    (path, info), = first.items()
    assert info["status"] == "finished" and 0 < info["metrics"]["mAP"] <= 1
    assert {"run.json", "metrics.csv", "references.csv", "curves.png", "cmc.png", "rank5.png", "activations.png"} <= {p.name for p in path.iterdir()}
    text = (tmp/"executed.ipynb").read_text()
    assert "Traceback" not in text and '"name": "stderr"' not in text, "the reader would see warnings"

@pytest.mark.parametrize("method", ["baseline", "topdb", "stadb", "sen", "pmm", "pmm/cutmix", "bdb/no-triplet"])
def test_every_method_runs(method, tmp_path):
    (path, info), = run(tmp_path, method=method, epochs=1, references=False).items()
    assert info["status"] == "finished" and info["recipe"]["method"] == method and path.parent.name == method.split("/")[-1]
    assert 0 < info["metrics"]["mAP"] <= 1 and {"maps.npz", "metrics.csv", "activations.png"} <= {p.name for p in path.iterdir()}

FORMS = {"folder": dict(camera=r"cam(\d+)_"), "cub200": dict(metric_loss="margin"), "inshop": dict(method="baseline", metric_loss="lifted"), "sop": dict(metric_loss="histogram"), "cars196": dict(source="released")}

@pytest.mark.parametrize("dataset", list(FIXTURES))
def test_every_data_set_runs(dataset, tmp_path):
    "On its fixture; the retrieval sets with one of the losses of BDB Table 8 each."
    own = write_fixture(dataset, tmp_path/"data")
    (path, info), = run(tmp_path, **dict(method="bdb", dataset=dataset, root=str(own if dataset == "folder" else tmp_path/"data"), epochs=1, references=False) | FORMS.get(dataset, {})).items()
    assert info["status"] == "finished" and info["recipe"]["dataset"] == dataset and {"rank5.png", "activations.png"} <= {p.name for p in path.iterdir()}
    recall = [k for k in info["metrics"] if k.startswith("recall@")]; ks = SOURCES[dataset].recall_ks if dataset in SOURCES else ()
    assert recall == [f"recall@{k}" for k in ks] and 0 < info["metrics"]["mAP"] <= 1
    if ks: assert info["metrics"]["recall@1"] == info["metrics"]["rank1"] and list((path/"metrics.csv").read_text().split("\n")[0].split(",")).count("global/" + info["recipe"]["metric_loss"]) == 1
    text = (tmp_path/"executed.ipynb").read_text(); assert "Traceback" not in text and '"name": "stderr"' not in text

def test_two_sets_and_a_third_to_test_on(tmp_path):
    "Trained on two sets, tested on the first, on the second and on a third, without training again for it."
    for n in ("market1501", "msmt17", "dukemtmc"): write_fixture(n, tmp_path/"data")
    given = dict(method="bdb", dataset="market1501+msmt17", epochs=1, references=False)
    (path, info), = run(tmp_path, **given).items(); before = (path/"last.pt").stat().st_mtime_ns
    assert info["classes"] == sum(load_dataset(n, tmp_path/"data").num_classes for n in ("market1501", "msmt17")) and not (path/"tests.json").exists()
    assert list(run(tmp_path, **given, test_dataset="dukemtmc+msmt17")) == [path] and (path/"last.pt").stat().st_mtime_ns == before
    tests = json.loads((path/"tests.json").read_text()); assert set(tests) == {"dukemtmc", "msmt17"}
    assert tests["dukemtmc"]["tested"]["gallery"] == len(load_dataset("dukemtmc", tmp_path/"data").gallery) and tests["dukemtmc"]["metrics"] != tests["msmt17"]["metrics"]
    assert "bdb, tested on dukemtmc" in (tmp_path/"executed.ipynb").read_text()

def test_parameters_take_effect(first, tmp):
    "An untagged parameters cell would silently win over what papermill injects."
    (path, info), = first.items()
    assert (info["recipe"]["method"], info["recipe"]["epochs"], info["recipe"]["seed"]) == ("bdb", 1, 0)
    runs = run(tmp, method="baseline", epochs=1, seed=5, lr=2e-4, weights=None, loss_weights={"global/triplet": .5}, references=False)   # lr, weights and loss_weights are not in the parameters cell
    other = next(r for p, r in runs.items() if p != path)
    assert (other["recipe"]["method"], other["recipe"]["seed"], other["recipe"]["lr"]) == ("baseline", 5, 2e-4)
    assert other["recipe"]["loss_weights"] == {"global/triplet": .5} and other["metrics"] != info["metrics"]

def test_a_second_call_trains_nothing(first, tmp):
    path = next(iter(first)); before = (path/"last.pt").stat().st_mtime_ns, (path/"metrics.csv").read_bytes()
    run(tmp, method="bdb", epochs=1)
    assert before == ((path/"last.pt").stat().st_mtime_ns, (path/"metrics.csv").read_bytes())

@pytest.mark.parametrize("wrong, said", [(dict(method="bdbnet"), "choose one of baseline, bdb"), (dict(dataset="market"), "synthped-small"),
                                         (dict(heigth=96), "did you mean 'height'"), (dict(method="sen", source="released"), "no program was released"), (dict(method="stadb", rho=1.5), "rho is 1.5: choose one in"), (dict(dataset="market1501"), "bounding_box_train")])
def test_what_does_not_exist_is_named(tmp_path, wrong, said):
    with pytest.raises(papermill.PapermillExecutionError, match=said): run(tmp_path, **wrong)

def test_run_all_twice_in_one_kernel(tmp_path):
    "Change a parameter and run all cells again, as one does in JupyterLab: the change counts, and nothing of the first pass is left."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(ROOT/"nbs"/"train.ipynb", 4); upto = next(i for i, c in enumerate(nb.cells) if "recipe(method" in c.source) + 1
    def again(**values):
        cells = [nbformat.v4.new_code_cell(c.source) for c in nb.cells[:upto] if c.cell_type == "code"]
        cells[1].source += "\nprofile = 'smoke'\n" + "\n".join(f"{k} = {v!r}" for k, v in values.items())
        return cells
    both = nbformat.v4.new_notebook(cells=again(method="bdb", epochs=7, height_ratio=.5) + again(method="bdb", epochs=3), metadata=nb.metadata)
    NotebookClient(both, resources={"metadata": {"path": str(ROOT/"nbs")}}, timeout=120).execute()
    first, second = ("".join(o.get("text", "") for o in c.outputs) for c in both.cells if "recipe(method" in c.source)
    assert "7 epochs" in first and "height_ratio 0.5" in first and "3 epochs" in second and "height_ratio 0.3" in second

def test_a_clone_without_weights_trains_again(first, tmp):
    "git keeps run.json and metrics.csv, not the weights: the notebook must not stop at the missing files."
    (path, info), = first.items()
    for f in path.glob("*.pt"): f.unlink()
    assert run(tmp, method="bdb", epochs=1)[path]["metrics"] == info["metrics"]
