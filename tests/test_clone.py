"""The README's commands in a fresh clone, by papermill.

What they leave, and that no tracked file is another one afterwards.
"""

import json
import shutil

import pytest
from click.testing import CliRunner
from papermill.cli import papermill as papermill_command
from shipped import ROOT, git, new_repository, shipped_files


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A repository with the files of this one, also those that are not committed yet."
    folder = new_repository(tmp_path / "clone")
    for name in shipped_files(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    git(folder, "add", "-A")
    git(
        folder,
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@localhost",
        "commit",
        "-q",
        "-m",
        "as it is here",
    )
    monkeypatch.chdir(folder)
    monkeypatch.setenv("REIDNB_ROOT", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def papermill(page, *words):
    """`papermill nbs/PAGE.ipynb reports/notebooks/PAGE.ipynb …` in the working directory.

    The executed notebook's text.
    """
    executed = f"reports/notebooks/{page}.ipynb"
    done = CliRunner().invoke(
        papermill_command, [f"nbs/{page}.ipynb", executed, "--no-progress-bar", *words]
    )
    assert done.exit_code == 0, done.output
    with open(executed) as f:
        text = f.read()
    assert "Traceback" not in text and '"name": "stderr"' not in text, (
        "the reader would see warnings"
    )
    return text


def names(folder):
    return {f.name for f in folder.iterdir()}


@pytest.mark.slow
def test_the_readers_commands_change_no_tracked_file(clone):
    assert len(git(clone, "ls-files").splitlines()) > 100 and not git(
        clone, "status", "--porcelain"
    )
    small = "-p", "dataset", "synthped-mini"

    papermill("train", *small, "-p", "method", "bdb", "-p", "profile", "smoke")
    (run,) = (f.parent for f in (clone / "reports/runs/synthped-mini/bdb").glob("*/run.json"))
    info = json.loads((run / "run.json").read_text())
    assert (
        info["status"] == "finished"
        and info["recipe"]["method"] == "bdb"
        and info["recipe"]["profile"] == "smoke"
    )
    assert {
        "run.json",
        "metrics.csv",
        "references.csv",
        "curves.png",
        "cmc.png",
        "rank5.png",
        "activations.png",
    } <= names(run)
    assert not git(clone, "status", "--porcelain")

    text = papermill("figures", *small, "-p", "figure", "bdb-fig5")
    assert names(clone / "reports/figures") == {"bdb-fig5.png", "bdb-fig5.svg", "bdb-fig5.md"}
    assert "image/png" in text
    assert run.name in (clone / "reports/figures/bdb-fig5.md").read_text(), (
        "the reader's own run, not a published one"
    )
    assert not git(clone, "status", "--porcelain")

    tiny = json.dumps(dict(overrides=dict(steps=1, epochs=1, test_ids=5, checkpoint_epochs=[])))
    text = papermill(
        "ablation",
        "-p",
        "datasets",
        "synthped-mini",
        "-p",
        "table",
        "p-norm",
        "-p",
        "profile",
        "smoke",
        "-p",
        "cluster",
        "here",
        "-y",
        tiny,
    )
    assert names(clone / "reports/tables") == {
        "p-norm.md",
        "p-norm.csv",
        "p-norm.tex",
        "p-norm.png",
        "results.csv",
    }
    assert (
        "image/png" in text and text.count("finished runs in this folder") == 2
    )  # the code, and what it says
    assert not git(clone, "status", "--porcelain")

    text = papermill(
        "evaluate",
        "-p",
        "run",
        str(run.relative_to(clone)),
        "-p",
        "samples",
        "50",
        "-p",
        "hardest",
        "2",
    )
    assert "image/png" in text
    assert names(run / "evaluation") == {
        "table.csv",
        "intervals.csv",
        "cmc.png",
        "cameras.csv",
        "cameras.png",
        "thresholds.csv",
        "hardest.csv",
        "hardest.png",
        "features",
    }
    assert not git(clone, "status", "--porcelain")
