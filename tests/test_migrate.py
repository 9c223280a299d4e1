"""docs/migrate_runs.py: older runs under the new names of a recipe's fields."""

import copy
import json
import shutil

import numpy as np
import pytest
from migrate_runs import (
    RENAMED,
    main,
    migrate,
    old_hash,
    old_hashes,
    renamed,
    replace_in_texts,
)
from pages import ROOT

from reidnb.methods.registry import recipe
from reidnb.results.maps import read_evolution
from reidnb.training.checkpoints import as_recipe, read_run

PUBLISHED = ROOT / "reports/published/runs"
STORED = recipe("topdb", "synthped-small", profile="study")  # a published run with all its files
NEW = recipe("topdb", "synthped-small", profile="laptop", erase_aspect="log-uniform")
OLD_PLACE = "synthped-small/topdb/d1469ca9fc-s0"
OLD = {  # the recipe in a run.json of before, whose directory was d1469ca9fc-s0
    "method": "topdb",
    "dataset": "synthped-small",
    "source": "paper",
    "profile": "laptop",
    "seed": 0,
    "backbone": "resnet18",
    "weights": None,
    "options": {
        "streams": "global+drop+regularizer",
        "height_ratio": 0.3,
        "mask_from": "trunk",
        "score": "mean",
        "p": 2,
        "test_neck": False,
    },
    "height": 192,
    "width": 64,
    "flip": 0.5,
    "shift": 0,
    "cut": 0.0,
    "cut_size": 32,
    "erase": 0.5,
    "identities": 8,
    "instances": 4,
    "epoch": "identities",
    "half": 0.34,
    "triplet_weight": 1.0,
    "id_weight": 1.0,
    "margin": 0.3,
    "smoothing": 0.1,
    "epochs": 15,
    "schedule": "onecycle",
    "lr": 0.006,
    "weight_decay": 0.0005,
    "precision": "fp32",
    "keep_epochs": [5, 10, 15],
    "flip_test": False,
    "steps": None,
    "test_ids": None,
    "zoom": 0.5,
    "erase_fill": [0.0, 0.0, 0.0],
    "loss_weights": {},
    "center_lr": 0.5,
    "metric_loss": "triplet",
    "fit": "stretch",
    "test_fit": "stretch",
    "resize": 0,
    "test_size": 0,
    "cropped": False,
    "accumulate": 1,
}


def as_run_of(recipe, run):
    "Copy a published run, as if it had been made by another recipe."
    shutil.copytree(PUBLISHED / STORED.directory, run)
    (run / "run.json").write_text(json.dumps(read_run(run) | {"recipe": recipe}, indent=1) + "\n")
    with np.load(run / "evolution.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    about = json.loads(str(arrays["about"])) | {"recipe": recipe}
    np.savez_compressed(run / "evolution.npz", **(arrays | {"about": np.array(json.dumps(about))}))


@pytest.fixture
def new_run(tmp_path):
    "A run as the fields are called today."
    run = tmp_path / "today" / NEW.directory
    as_run_of(renamed(OLD), run)
    return run


@pytest.fixture
def old_runs(tmp_path):
    "A folder with the same run as it was before the fields were renamed."
    as_run_of(OLD, tmp_path / "runs" / OLD_PLACE)
    return tmp_path / "runs"


def test_the_old_hash():
    assert old_hash(OLD) == "d1469ca9fc" == old_hash(renamed(OLD))
    assert NEW.hash == as_recipe(json.loads(json.dumps(NEW.json()))).hash != "d1469ca9fc"


def test_every_old_name_has_a_new_one():
    assert set(RENAMED) <= set(OLD) and set(RENAMED.values()) <= set(NEW.json())


def test_an_older_run_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="migrate_runs.py"):
        as_recipe(OLD)


def test_a_run_moves_and_what_was_measured_stays(old_runs, new_run):
    assert migrate(old_runs) == ({OLD_PLACE: NEW.directory}, {})
    run = old_runs / NEW.directory
    assert {f.name for f in run.iterdir()} == {f.name for f in new_run.iterdir()}
    for name in ("run.json", "metrics.csv", "queries.csv", "maps.npz"):
        assert (run / name).read_bytes() == (new_run / name).read_bytes(), name
    there, here = read_evolution(new_run), read_evolution(run)
    assert here.recipe == there.recipe == NEW
    for name, maps in there.maps.items():
        assert np.array_equal(here.maps[name], maps) and maps.any()
    assert migrate(old_runs) == ({}, {})  # a second time changes nothing


def test_an_interrupted_migration_goes_on(old_runs, tmp_path):
    (tmp_path / "fig.md").write_text("- `runs/synthped-small/topdb/d1469ca9fc-s0`, [d1469ca9fc]\n")
    (tmp_path / "metrics.csv").write_text("d1469ca9fc\n")
    migrate(old_runs)  # and then it was stopped, before the captions
    main([str(old_runs), "--texts", str(tmp_path)])
    assert (tmp_path / "fig.md").read_text() == f"- `runs/{NEW.directory}`, [{NEW.hash}]\n"
    assert (tmp_path / "metrics.csv").read_text() == "d1469ca9fc\n"
    assert replace_in_texts(tmp_path, old_hashes(old_runs)) == 0


def test_one_bad_run_does_not_stop_the_others(old_runs, new_run, capsys):
    shutil.copytree(new_run, old_runs / "copy" / OLD_PLACE)  # of another folder
    shutil.copytree(old_runs / OLD_PLACE, old_runs / "synthped-small/topdb/0000000000-s0")
    bad = old_runs / "synthped-small/bdb/1111111111-s0"
    bad.mkdir(parents=True)
    (bad / "run.json").write_text('{"recipe": {"method": "bdb"}}')
    with pytest.raises(SystemExit) as ended:
        main([str(old_runs)])
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert "exists: keep one of the two" in said.err and "1111111111-s0" in said.err
    assert (old_runs / NEW.directory / "run.json").is_file()


def test_options_that_the_oldest_runs_lack(tmp_path):
    r = recipe("bdb", "synthped-small", profile="laptop")
    values = copy.deepcopy(r.json())
    del values["options"]["streams"], values["options"]["drop"]
    run = tmp_path / "synthped-small/bdb/0123456789-s0"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"recipe": values}))
    assert list(migrate(tmp_path)[0].values()) == [r.directory]


def test_published_runs_have_the_new_names():
    found = list(PUBLISHED.rglob("run.json"))
    for file in found:
        r = as_recipe(json.loads(file.read_text())["recipe"])
        assert file.parent == PUBLISHED / r.directory
    assert len(found) >= 39
