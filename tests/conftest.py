"""What several test files share."""

import shutil

import nbformat
import pytest
from pages import ROOT

from reidnb.backbones import tiny_trunk
from reidnb.datasets import load_dataset


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

    Its training page has the tiny trunk.
    """
    folder = tmp_path / "project"
    (folder / "nbs").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "reports/notebooks").mkdir(parents=True)  # which a clone has
    shutil.copy(ROOT / "data/paper_results.csv", folder / "data")
    page = nbformat.read(ROOT / "nbs/train.ipynb", as_version=4)
    first = "from reidnb.backbones import tiny_trunk\ntiny_trunk().start()"
    page.cells.insert(0, nbformat.v4.new_code_cell(first))
    nbformat.write(page, folder / "nbs/train.ipynb")
    monkeypatch.setenv("REIDNB_ROOT", str(folder))
    return folder


def pytest_terminal_summary(terminalreporter):
    "How many tests were slow ones, and how long they took together."
    slow = [r for r in terminalreporter.stats.get("passed", []) if "slow" in r.keywords]
    if slow:
        terminalreporter.write_line(
            f"slow tests: {len(slow)}, {sum(r.duration for r in slow):.0f} s"
        )
