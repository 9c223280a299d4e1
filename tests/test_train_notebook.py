"""nbs/train.ipynb as papermill runs it: parameters take effect, what does not exist is named, a second call continues."""
import json, subprocess, sys
from pathlib import Path
import papermill, pytest

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
