"""What several test files share."""

import os
import shutil

import pytest
from pages import ROOT

from reidnb.data.load import load_dataset
from reidnb.parts.backbones import tiny_trunk


@pytest.fixture
def tiny():
    "ResNet-18 is a tiny network of the same form."
    with tiny_trunk():
        yield


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    "A data folder with SynthPed-mini; nobody changes it."
    folder = tmp_path_factory.mktemp("data")
    load_dataset("synthped-mini", folder)
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of the reader's, so that nothing goes to the reports/ of whoever runs the tests.

    Commands that are started there have the tiny trunk.
    """
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "reports/notebooks").mkdir(parents=True)  # which a clone has
    shutil.copy(ROOT / "data/paper_results.csv", folder / "data")
    paths = [str(ROOT / "tests" / "tiny"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("REIDNB_ROOT", str(folder))
    return folder


def pytest_terminal_summary(terminalreporter):
    "How many tests were slow ones, and how long they took together."
    slow = [r for r in terminalreporter.stats.get("passed", []) if "slow" in r.keywords]
    if slow:
        terminalreporter.write_line(
            f"slow tests: {len(slow)}, {sum(r.duration for r in slow):.0f} s"
        )
