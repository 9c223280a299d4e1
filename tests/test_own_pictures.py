"""Own pictures from the command line: a folder of people, a training, a panel of answers."""

import json
import re

import pytest
from commands import reidnb
from test_what_users_reported import people

pytestmark = pytest.mark.usefixtures("tiny", "project")


def train(folder, *words):
    "Train on a folder in the profile smoke, two steps."
    fixed = ("--root", folder, "--profile", "smoke", "-p", "steps", 2)
    return reidnb("train", "bdb", "folder", *fixed, *words)


def test_a_folder_of_people_gives_a_panel_of_answers(tmp_path, project):
    "Batches are made as small as the set, the panel is a picture, and a second call draws again."
    pictures = people(tmp_path / "my_pictures", names=6)
    called = train(pictures, "--panel")
    assert called.status == 0, called.stderr
    assert "to suit so few pictures: ids_per_batch 3" in called.stdout
    (panel,) = (project / "reports/runs/folder/bdb").glob("*/rank5.png")
    assert panel.read_bytes().startswith(b"\x89PNG") and panel.stat().st_size > 5_000
    assert panel.name in called.stdout
    recipe = json.loads((panel.parent / "run.json").read_text())["recipe"]
    assert recipe["ids_per_batch"] == 3 and recipe["dataset"] == "folder"

    panel.unlink()
    again = train(pictures, "--panel")
    assert again.status == 0 and panel.is_file()
    assert len(list(panel.parents[1].glob("*/run.json"))) == 1


def test_what_is_given_is_not_suited(tmp_path, project):
    pictures = people(tmp_path / "my_pictures", names=6)
    called = train(pictures, "-p", "ids_per_batch", 2)
    assert called.status == 0, called.stderr
    assert "to suit" not in called.stdout
    assert not list((project / "reports/runs").rglob("rank5.png"))


def test_camera_and_share_are_those_of_the_folder(tmp_path, project):
    "Of ten people two are left to train on; a camera that no name has is one sentence."
    pictures = people(tmp_path / "my_pictures", names=10)
    called = train(pictures, "--test-share", 0.8)
    assert called.status == 0, called.stderr
    assert "to suit so few pictures: ids_per_batch 2" in called.stdout
    called = train(pictures, "--camera", r"cam(\d+)_")
    assert called.status == 1 and re.search("camera", called.stderr)


def test_a_run_is_not_tested_on_people_that_it_was_trained_on(tmp_path):
    "Another share splits the people otherwise: a sentence, and nothing is kept of such a test."
    pictures = people(tmp_path / "my_pictures", names=10)
    called = train(pictures, "--test-share", 0.8, "--out", tmp_path / "runs")
    assert called.status == 0, called.stderr
    (file,) = (tmp_path / "runs/folder/bdb").glob("*/run.json")
    run = file.parent
    called = reidnb("evaluate", run, "--root", pictures)
    assert called.status == 2
    assert "another split" in called.stderr and "--test-share" in called.stderr
    assert not list(run.glob("protocols/*"))
    called = reidnb("evaluate", run, "--root", pictures, "--test-share", 0.8)
    assert called.status == 0, called.stderr
    assert "mAP" in called.stdout


@pytest.mark.parametrize("option, value", [("--camera", "c(.)"), ("--test-share", 0.3)])
def test_other_sets_refuse_what_is_for_own_pictures(option, value):
    called = reidnb("train", "bdb", "synthped-mini", "--profile", "smoke", option, value)
    assert called.status == 1
    assert "'folder'" in called.stderr
