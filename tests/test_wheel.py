"""The wheel by itself: built, unzipped, and used in an empty folder, with no clone around it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from shipped import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    "The folder that the wheel was unzipped to."
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools leaves its build folder beside what it builds
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "reidnb", source / "reidnb")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("reidnb-*.whl")
    with zipfile.ZipFile(wheel) as z:
        z.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def call(package, tmp_path):
    "Calls `python -m reidnb …` in an empty folder; only the unzipped wheel is on the path."
    env = {k: v for k, v in os.environ.items() if not k.startswith("REIDNB")}
    env["PYTHONPATH"] = str(package)

    def command(*words, status=0):
        p = subprocess.run(
            [sys.executable, "-m", "reidnb", *words],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        assert p.returncode == status, p.stdout + p.stderr
        return p.stdout

    return command


def test_everything_is_in_it(package):
    modules = {p.relative_to(package) for p in (package / "reidnb").rglob("*.py")}
    here = {p.relative_to(ROOT) for p in (ROOT / "reidnb").rglob("*.py")}
    assert modules == here
    assert (package / "reidnb/py.typed").is_file()
    assert (package / "reidnb/shipped/paper_results.csv").is_file()
    assert (package / "reidnb/shipped/claims.yaml").is_file()
    assert len(list((package / "reidnb/shipped/tables").glob("*.yaml"))) > 10


def test_the_commands_work_without_a_clone(call, package, tmp_path):
    where = subprocess.run(
        [sys.executable, "-c", "import reidnb; print(reidnb.__file__)"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert Path(where.strip()).is_relative_to(package), "the clone was imported, not the wheel"
    assert "doctor" in call("--help")
    call("synthped", "mini", "data/synthped-mini")
    assert "synthped-mini" in call("doctor", "synthped-mini", "data")
    said = call(
        "train",
        "bdb",
        "synthped-mini",
        "--profile",
        "smoke",
        "-p",
        "epochs",
        "1",
        "-p",
        "steps",
        "1",
    )
    assert "mAP" in said
    (run,) = (tmp_path / "reports/runs").rglob("run.json")
    assert json.loads(run.read_text())["status"] == "finished"
    pictures = tmp_path / "my_pictures"  # a folder for each person
    for file in (tmp_path / "data/synthped-mini/bounding_box_train").glob("*.jpg"):
        (pictures / file.name[:4]).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, pictures / file.name[:4])
    call("doctor", "folder", "my_pictures")
    call("train", "bdb", "folder", "--root", "my_pictures", "--profile", "smoke", "--panel")
    assert len(list((tmp_path / "reports/runs/folder/bdb").glob("*/rank5.png"))) == 1
    jobs = call("table", "topdb-table1", "--datasets", "synthped-mini", "--list").splitlines()
    assert len(jobs) == 4
    assert all(" train topdb" in line for line in jobs)
