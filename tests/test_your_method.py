"""A method from outside the package: a file that --import reads, torchrun's children, and a changed paper."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from commands import reidnb

from reidnb.core import project_root
from reidnb.data.load import load_dataset
from reidnb.methods.registry import (
    IMPORTED,
    check_known_elsewhere,
    forget,
    import_methods,
    recipe,
    use,
)
from reidnb.training.checkpoints import read_run
from reidnb.training.loop import train

ROOT = project_root()


def code_cells(notebook):
    cells = json.loads((ROOT / "nbs/methods" / f"{notebook}.ipynb").read_text())["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


@pytest.fixture
def my_method(tmp_path):
    "The three cells that `your_method` tells a reader to copy: imports, mask, network and record."
    cells = code_cells("your_method")
    wanted = [
        c for c in cells if c.startswith("import torch\n\nfrom reidnb.methods.bdb import BDB")
    ]
    wanted += [c for c in cells if "def likely_stripe_mask" in c]
    wanted += [c for c in cells if "YOURS = Method(" in c]
    assert len(wanted) == 3
    file = tmp_path / "my_method.py"
    file.write_text("\n\n".join(wanted))
    return file


@pytest.fixture
def forgotten():
    yield
    forget("yours")
    os.environ.pop(IMPORTED, None)


def test_a_file_gives_a_method(my_method, forgotten):
    import_methods(str(my_method))
    assert recipe("yours", "x").options == {"height_ratio": 0.3, "beta": 1.0}
    assert os.environ[IMPORTED] == str(my_method)
    import_methods(str(my_method))  # a second time changes nothing
    assert os.environ[IMPORTED] == str(my_method)


def test_a_file_that_fails_is_named_and_tried_again(tmp_path, my_method, forgotten):
    text = my_method.read_text()
    my_method.write_text("raise RuntimeError('half of it')")
    for _ in range(2):
        with pytest.raises(ValueError, match="my_method.py cannot be imported: RuntimeError: half"):
            import_methods(str(my_method))
    my_method.write_text(text)
    import_methods(str(my_method))
    assert recipe("yours", "x").options["beta"] == 1.0


def test_a_changed_paper_is_imported_again(tmp_path, forgotten):
    file = tmp_path / "json.py"  # a name that the standard library has
    file.write_text(
        "from dataclasses import replace\n"
        "from reidnb.methods.bdb import BDB\n"
        "from reidnb.methods.registry import use\n"
        "use(replace(BDB, options=BDB.options | dict(height_ratio=0.9)))\n"
    )
    for _ in range(2):
        import_methods(str(file))
        assert recipe("bdb", "x").options["height_ratio"] == 0.9
        check_known_elsewhere("bdb")
        forget("bdb")
    assert json.loads("[1]") == [1]


@pytest.mark.parametrize("name, keyword", [("no_such_module", "no module"), ("no.py", "no file")])
def test_nothing_to_import(name, keyword):
    result = reidnb("train", "yours", "synthped-mini", "--import", name)
    assert result.status == 2 and keyword in result.stderr
    assert IMPORTED not in os.environ


def command(*words, folder):
    env = {k: v for k, v in os.environ.items() if k != IMPORTED}
    done = subprocess.run(
        [sys.executable, "-m", "reidnb", *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_method_reaches_torchruns_children(my_method, project):
    words = "train yours synthped-mini --profile smoke -p epochs 1 --processes 2 --import".split()
    command(*words, str(my_method), folder=project)
    (file,) = (project / "reports/runs/synthped-mini/yours").glob("*/run.json")
    info = read_run(file.parent)
    assert info["status"] == "finished" and info["recipe"]["options"]["beta"] == 1.0


@pytest.mark.slow
def test_the_method_stands_in_a_table_beside_bdb(my_method, project):
    table = {
        "title": "Mine beside BDB",
        "datasets": ["synthped-mini"],
        "metrics": ["mAP"],
        "rows": [
            {"label": "BDB", "method": "bdb"},
            {"label": "mine", "method": "yours", "changed": {"beta": 2.0}},
        ],
    }
    (project / "mine.yaml").write_text(yaml.safe_dump(table))
    words = "table mine.yaml --profile smoke --import".split()
    command(*words, str(my_method), folder=project)
    found = pd.read_csv(next((project / "reports/tables").rglob("results.csv")))
    assert set(found.status) == {"finished"} and len(found) == 2


def changed_topdb(before, after):
    "Run the cells that define Top-DB-Net in a copy of its notebook, with one thing changed."
    cells = [c for c in code_cells("topdb") if c.startswith("#| export")]
    source = "\n\n".join(cells)
    assert source.count(before) == 1
    namespace = {}
    exec(compile(source.replace(before, after), "a copy of topdb.ipynb", "exec"), namespace)
    return namespace["TOPDB"]


def test_a_changed_mask_in_a_copy_of_a_papers_notebook_changes_the_training(tmp_path, tiny):
    data = load_dataset("synthped-mini", ROOT / "data")
    r = recipe("topdb", "synthped-mini", profile="smoke", epochs=1)
    losses = {}
    for name, rule in {"as it is": "top-stripes", "changed": "smallest"}.items():
        if rule == "top-stripes":
            record = changed_topdb('"top-stripes", ratio', '"top-stripes", ratio')
        else:
            record = changed_topdb(
                'Erase("top-stripes", ratio=height_ratio, reduce=score, p=p)',
                'Erase("smallest", ratio=height_ratio, p=p)',
            )
        use(record)
        try:
            run = train(r, data, tmp_path / name)
        finally:
            forget("topdb")
        losses[name] = pd.read_csv(run / "metrics.csv").loss.tolist()
    run = train(r, data, tmp_path / "shipped")
    assert losses["as it is"] == pd.read_csv(run / "metrics.csv").loss.tolist()
    assert losses["changed"] != losses["as it is"]
