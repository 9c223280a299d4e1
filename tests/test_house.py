"""What holds for all notebooks.

Rooms and floors, the front door, no star imports, nothing of a machine, parameters cells tagged.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shipped import new_repository, shipped_files

import reidnb

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
PAGES = (
    "train",
    "evaluate",
    "ablation",
    "figures",
    "robustness",
    "benchmark",
)  # what papermill runs

FLOORS = {  # folder -> floor; a module imports from lower floors and from its own folder
    "core": 0,
    "parts": 1,
    "data": 1,
    "methods": 2,
    "evaluation": 2,
    "training": 3,
    "results": 4,
    "deploy": 4,
    "bench": 5,
}
FRONT = {"__init__": "api", "__main__": "cli"}  # the two modules whose notebook has another name


def cells(p):
    return json.loads(p.read_text())["cells"]


def source(c):
    return "".join(c["source"])


def name_in_nbs(path):
    "A notebook's path below nbs/, for the name of its test."
    return path.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def modules():
    "The modules of the package by their names below reidnb: core, parts.masks, …"
    for file in sorted((ROOT / "reidnb").rglob("*.py")):
        name = ".".join(file.relative_to(ROOT / "reidnb").with_suffix("").parts)
        if not name.endswith(("_modidx", ".__init__")):
            yield name


MODULES = list(modules())
ROOMS = [name for name in MODULES if name not in FRONT]


def imported(room):
    "The modules of the package that a room imports, with the names that it takes from each."
    found = {}
    file = ROOT / "reidnb" / (room.replace(".", "/") + ".py")
    here = ["reidnb", *room.split(".")]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("reidnb."):
                    found.setdefault(alias.name.removeprefix("reidnb."), [])
        if not isinstance(node, ast.ImportFrom):
            continue
        full = node.module or ""
        if node.level:
            full = ".".join([*here[: -node.level], *([full] if full else [])])
        if full == "reidnb":
            taken = {alias.name for alias in node.names}
            assert taken <= {"__version__"}, f"{room} goes through the front door for {taken}"
        if full.startswith("reidnb."):
            names = found.setdefault(full.removeprefix("reidnb."), [])
            names.extend(alias.name for alias in node.names)
    return found


def test_every_module_has_its_notebook():
    written = {}
    for path in NOTEBOOKS:
        for c in cells(path):
            if found := re.match(r"#\|\s*default_exp (\S+)", source(c)):
                written[found[1]] = ".".join(path.relative_to(ROOT / "nbs").with_suffix("").parts)
    assert set(written) == set(MODULES)
    assert len(ROOMS) > 30
    for module, notebook in written.items():
        assert notebook == FRONT.get(module, module), f"{notebook}.ipynb exports {module}"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room):
    folder = room.split(".")[0]
    for module, names in imported(room).items():
        below = module.split(".")[0]
        assert module in ROOMS, f"{room} imports {module}, which is no room"
        assert below == folder or FLOORS[below] < FLOORS[folder], f"{room} imports {module}"
        private = [name for name in names if name.startswith("_")]
        assert not private, f"{room} imports private names of {module}: {private}"
        assert "*" not in names


OLD = re.compile(
    r"nbs/papers|\b[012]\d_[a-z_]+\.ipynb"
    r"|reidnb\.(gpu_ledger|experiments|synthetic|datasets|loading|localisation|benchmarks|speed)\b"
)


@pytest.mark.parametrize("place", ["nbs/**/*.ipynb", "docs/*.py", "data/*.md", "README.md"])
def test_no_old_name_is_left(place):
    for file in ROOT.glob(place):
        found = OLD.search(file.read_text(encoding="utf-8"))
        assert not found, f"{file.relative_to(ROOT)} names {found[0]}"


def test_no_circle_within_a_folder():
    uses = {room: set(imported(room)) for room in ROOMS}
    while uses:
        free = [room for room, below in uses.items() if not below & set(uses)]
        assert free, f"these import each other: {sorted(uses)}"
        for room in free:
            del uses[room]


CONTRACTS = """
    activation_map stripe_relevance top_stripes grad_cam random_block_mask top_stripe_mask self_threshold_mask
    smallest_mask largest_mask top_block_mask hard_mix batch_hard_triplet build_model load_released
    evaluate_ranking evaluate_distances rerank recall_at_k load_dataset recipe lr_at train
"""  # DESIGN.md, "Contracts"


@pytest.mark.parametrize("name", CONTRACTS.split())
def test_contracts_are_offered(name):
    assert callable(getattr(reidnb, name))


def test_importing_the_package_loads_nothing_else():
    code = (
        "import time; began = time.perf_counter(); import reidnb; took = time.perf_counter() - began;"
        "import sys; print(took, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    took, *loaded = child.stdout.split()
    assert loaded == ["False", "False"]
    assert float(took) < 0.2


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = reidnb.no_such_thing
    assert not hasattr(reidnb, "no_such_thing")
    assert {"train", "top_stripe_mask", "__version__"} <= set(dir(reidnb))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_in_nbs)
def test_a_notebook_can_be_shown(path):
    text = path.read_text()
    assert len(text) < 3_000_000
    machine = re.search(r"(?<![\w.])/(?:home|root|tmp|work|Users)/[\w.-]+", text)
    assert not machine, "the path of a machine"
    for c in cells(path):
        errors = [o for o in c.get("outputs", []) if o.get("output_type") == "error"]
        assert not errors, "a traceback"
        assert not ("eval: false" in source(c) and "assert" in source(c)), "a test that never runs"


def headings(path):
    "The headings of a notebook: level, text."
    for c in cells(path):
        if c["cell_type"] == "markdown":
            text = re.sub(r"^```.*?^```", "", source(c), flags=re.S | re.M)
            for marks, heading in re.findall(r"^(#+) (.+)$", text, re.M):
                yield len(marks), heading.strip()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_in_nbs)
def test_headings_make_a_table_of_contents(path):
    "JupyterLab and the site build it from them: one title, no level left out, no name twice."
    levels, names = zip(*headings(path))
    assert source(cells(path)[0]).startswith("# ")
    assert levels.count(1) == 1 and levels[0] == 1
    for above, level in zip(levels, levels[1:]):
        assert level <= above + 1
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem != "index"], ids=name_in_nbs)
def test_the_second_cell_says_how_long_a_notebook_runs(path):
    second = cells(path)[1]
    assert second["cell_type"] == "markdown"
    assert re.search(r"\b(seconds?|minutes?|hours?)\b", source(second).split("\n\n")[0])


def shows_a_figure(cell):
    "Does a cell end with a figure, as most that plot do?"
    code = source(cell)
    if cell["cell_type"] != "code" or re.match(r"#\| (export|hide)", code):
        return False
    return bool(re.search(r"^(show_images\(.*|plt\.show\(\)|fig)$", code, re.M))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_in_nbs)
def test_every_picture_has_an_alternative_text(path):
    "A line `#| fig-alt: …` in the cell; the caption, for figures of the papers."
    for c in cells(path):
        if c["cell_type"] == "markdown":
            assert not re.search(r"!\[\s*\]\(|<img(?![^>]*\salt=)", source(c))
        if shows_a_figure(c):
            assert "#| fig-alt: " in source(c), c["id"]
        for output in c.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert output["metadata"]["image/png"]["alt"], c["id"]


PAPERS = ("bdb", "topdb", "stadb", "sen", "pmm")


def is_definition(node, passed):
    "Whether a node defines a function; a lambda that is passed on, as in key=lambda …, does not."
    if isinstance(node, ast.Lambda):
        return id(node) not in passed
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


@pytest.mark.parametrize("name", [*PAPERS, "compare"])
def test_a_paper_notebook_defines_only_what_it_exports(name):
    for c in cells(ROOT / "nbs" / "methods" / f"{name}.ipynb"):
        if c["cell_type"] != "code" or source(c).startswith("#| export"):
            continue
        nodes = list(ast.walk(ast.parse(source(c))))
        calls = [n for n in nodes if isinstance(n, ast.Call)]
        passed = {id(a) for n in calls for a in [*n.args, *(k.value for k in n.keywords)]}
        assert not any(is_definition(n, passed) for n in nodes), source(c)


TEXT_ONLY = {  # modules whose code names a paper's method: figures, rows, costs, examples
    "__main__.py",
    "bench/cost.py",
    "bench/ledger.py",
    "methods/registry.py",
    "results/gallery.py",
    "results/plates.py",
    "results/publish.py",
    "results/tables.py",
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_is_one_module(name):
    "Its name, in code, is only where figures, tables and examples list methods."
    for path in (ROOT / "reidnb").rglob("*.py"):
        module = path.relative_to(ROOT / "reidnb").as_posix()
        if module in TEXT_ONLY or module in ("_modidx.py", f"methods/{name}.py"):
            continue
        tree = ast.parse(path.read_text())
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        assert name not in strings, module


@pytest.mark.parametrize("name", PAGES)
def test_parameters_are_tagged(name):
    tags = [c["metadata"].get("tags", []) for c in cells(ROOT / "nbs" / f"{name}.ipynb")]
    tagged = sum("parameters" in t for t in tags)
    assert tagged == 1, "papermill would inject above the defaults, and they would win"


def test_the_repository_stays_small(tmp_path):
    "Below 50 MiB, all that is tracked together."
    names = shipped_files(new_repository(tmp_path / "empty"))
    sizes = {name: (ROOT / name).stat().st_size for name in names}
    assert "settings.ini" in sizes
    assert not any(name.startswith((".venv/", "_site/")) for name in sizes)
    largest = sorted(sizes, key=sizes.get)[-5:]
    total = sum(sizes.values()) / 2**20
    assert total < 50, f"{total:.1f} MiB; the largest are {largest}"
