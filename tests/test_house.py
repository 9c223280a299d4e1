"""What holds for all notebooks.

The order of rooms, no star imports, nothing of a machine, parameters cells tagged.
"""

import ast
import json
import re
from pathlib import Path

import pytest
from shipped import new_repository, shipped_files

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
ROOMS = {p.stem.split("_", 1)[1]: int(p.stem[:2]) for p in NOTEBOOKS if re.match(r"\d\d_", p.stem)}


def cells(p):
    return json.loads(p.read_text())["cells"]


def source(c):
    return "".join(c["source"])


def test_every_module_has_its_notebook():
    assert len(ROOMS) >= 14 and {p.stem for p in (ROOT / "reidnb").glob("*.py")} - {
        "__init__",
        "_modidx",
    } == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_to_lower_numbers(room):
    for node in ast.walk(ast.parse((ROOT / "reidnb" / f"{room}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not any(a.name == "*" for a in node.names)
            used = node.module if node.level else (node.module or "").removeprefix("reidnb.")
            if node.level or (node.module or "").startswith("reidnb."):
                assert ROOMS[used] < ROOMS[room], f"{room} imports {used}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_can_be_shown(path):
    text = path.read_text()
    assert len(text) < 3_000_000
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|Users)/[\w.-]+", text), (
        "the path of a machine"
    )
    for c in cells(path):
        assert not any(o.get("output_type") == "error" for o in c.get("outputs", [])), "a traceback"
        assert not ("eval: false" in source(c) and "assert" in source(c)), "a test that never runs"


DEFINES = {
    "your_method"
}  # no paper: it shows how to define a method, where a reader who changes it can see all of it


@pytest.mark.parametrize(
    "path",
    sorted(p for p in (ROOT / "nbs" / "papers").glob("*.ipynb") if p.stem not in DEFINES),
    ids=lambda p: p.stem,
)
def test_a_paper_notebook_defines_nothing(path):
    for c in cells(path):
        tree = ast.parse(source(c)) if c["cell_type"] == "code" else ast.Module([], [])
        passed = {
            id(a)
            for n in ast.walk(tree)
            if isinstance(n, ast.Call)
            for a in [*n.args, *(k.value for k in n.keywords)]
        }  # key=lambda … is no definition
        for n in ast.walk(tree):
            assert not isinstance(
                n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            ) and not (isinstance(n, ast.Lambda) and id(n) not in passed), source(c)


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in NOTEBOOKS
        if "papermill" in p.read_text()
        and p.stem.isidentifier()
        and p.stem in ("train", "evaluate", "ablation", "figures", "benchmark")
    ],
    ids=lambda p: p.stem,
)
def test_parameters_are_tagged(path):
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells(path)) == 1, (
        "papermill would inject above the defaults, and they would win"
    )


def test_the_repository_stays_small(tmp_path):
    "Below 50 MiB, all that is tracked together."
    sizes = {
        name: (ROOT / name).stat().st_size
        for name in shipped_files(new_repository(tmp_path / "empty"))
    }
    assert "settings.ini" in sizes and not any(
        name.startswith((".venv/", "_site/")) for name in sizes
    )
    largest = sorted(sizes, key=sizes.get)[-5:]
    assert sum(sizes.values()) < 50 * 2**20, (
        f"{sum(sizes.values()) / 2**20:.1f} MiB; the largest are {largest}"
    )
