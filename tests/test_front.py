"""The front: README, the pages of docs/guide, and what docs/front.py makes of them for the site."""

import json
import re
from pathlib import Path

import front
import nbformat.v4 as v4
import pytest
import sentences

from reidnb.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
TEXTS = [README, *GUIDE]
SHELL = re.compile(r"^```sh\n(.*?)^```", re.S | re.M)
LINK = re.compile(r"\]\(([^)#\s]+)")


def commands(file):
    "Return the commands of a text's shell blocks."
    for block in SHELL.findall(file.read_text(encoding="utf-8")):
        for line in block.splitlines():
            if line and not line.startswith("#"):
                yield line


def without_code(text):
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.S | re.M)


def test_the_readme_fits_on_a_few_screens():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    headings = re.findall(r"^## (.+)$", text, re.M)
    assert headings == [
        "Which paper?",
        "Install",
        "Train in minutes on a laptop",
        "Use one piece",
        "Change one thing",
        "Measured",
        "What held here",
        "What is not reproduced",
        "Map of the folders",
        "More",
    ]


def test_the_readme_names_every_notebook_that_is_a_module_or_a_page():
    text = README.read_text(encoding="utf-8")
    notebooks = [p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    assert len(notebooks) > 50
    for path in notebooks:
        name = path.relative_to(ROOT).as_posix()
        assert f"({name})" in text or path.stem == "index", name


def test_the_piece_of_the_readme_runs(capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M)
    names = {}
    exec(block, names)
    (rows,) = re.findall(r"# (\d+) rows", block)
    assert capsys.readouterr().out.strip() == f"tensor([{rows}, {rows}])"
    erased = (names["F"] == 0).all(dim=(1, 3)).sum(dim=1)
    assert erased.tolist() == [int(rows)] * 2


@pytest.mark.parametrize("file", TEXTS, ids=lambda f: f.stem)
def test_links_lead_to_files(file):
    links = LINK.findall(without_code(file.read_text(encoding="utf-8")))
    assert links
    for link in links:
        if "://" not in link:
            assert (file.parent / link).exists(), link


@pytest.mark.parametrize("file", TEXTS, ids=lambda f: f.stem)
def test_commands_name_what_is_there(file):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands(file):
        word, *rest = command.split()
        if word == "make":
            assert rest[0] in targets, command
        elif word == "papermill":
            assert (ROOT / rest[0]).is_file(), command
        elif word == "reidnb":
            assert rest[0] in main.commands, command


def test_every_page_of_the_guide_has_its_place():
    written = {p.stem for p in GUIDE} - {"when-something-is-wrong"}
    assert written == set(front.GUIDE)
    assert [p.stem for p in front.guide_pages(ROOT)][: len(front.GUIDE)] == list(front.GUIDE)


def terms():
    "The terms of the glossary, with the notebook of each."
    row = re.compile(r"^\| (.+?) \| .+ \| \[\w+\]\(\.\./\.\./(nbs/\S+)\) \|$", re.M)
    return row.findall((ROOT / "docs/guide/glossary.md").read_text(encoding="utf-8"))


def test_a_term_is_in_the_notebook_that_the_glossary_names():
    found = [(term, notebook) for names, notebook in terms() for term in names.split(", ")]
    assert len(found) > 40
    assert len({term for term, _ in found}) == len(found), "a term stands twice"
    for term, notebook in found:
        cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
        text = "".join("".join(c["source"]) for c in cells).lower()
        assert term.lower() in text, f"{term} is not in {notebook}"


def test_the_front_page_is_the_beginning_of_the_index():
    cells = ["# small", "## Which paper?", "## Install", "## Measured"]
    index = v4.new_notebook(cells=[v4.new_markdown_cell(c) for c in cells])
    rest = front.split(index, "## Symbols", [("Training", "guide/training")])
    assert [c.source for c in index.cells[:3]] == ["# small", "## Which paper?", "## Symbols"]
    assert "Training <guide/training>" in index.cells[3].source
    assert f"Install, train, results <{front.REST}>" in index.cells[3].source
    assert [c.source for c in rest.cells[1:]] == ["## Install", "## Measured"]


def test_an_index_without_the_heading_stays_whole():
    index = v4.new_notebook(cells=[v4.new_markdown_cell("# small")])
    assert front.split(index, "", []) is None
    assert len(index.cells) == 1


@pytest.fixture
def run(tmp_path):
    "A project with one published run."
    folder = tmp_path / "reports/published/runs/synthped-small/topdb/0123456789-s1"
    folder.mkdir(parents=True)
    recipe = dict(method="topdb", dataset="synthped-small", profile="laptop", source="paper")
    info = dict(recipe=recipe, seed=1, status="finished", metrics=dict(mAP=0.25, rank1=0.5))
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "metrics.csv").write_text("epoch\n")
    return folder


def test_a_figure_links_its_runs(run, tmp_path):
    name = run.relative_to(tmp_path).as_posix()
    wanted = []
    text = front.link_runs(f"- topdb: `{name}`, seed 1", "methods/topdb.ipynb", tmp_path, wanted)
    assert text == f"- topdb: [`{name}`](../{name}/index.md), seed 1"
    assert wanted == [run]
    other = name.replace("-s1", "-s2")
    assert front.link_runs(f"`{other}`", "a.md", tmp_path, wanted) == f"`{other}`"


def test_a_figure_leads_to_its_caption(tmp_path):
    folder = tmp_path / "reports/published/figures"
    folder.mkdir(parents=True)
    (folder / "topdb-fig6.md").write_text("Its caption.")
    wanted = []
    image = "![maps](../reports/published/figures/topdb-fig6.png)"
    linked = f"[{image}](../reports/published/figures/topdb-fig6.md)"
    assert front.link_figures(f"See {image}.", tmp_path, wanted) == f"See {linked}."
    assert front.link_figures(linked, tmp_path, []) == linked
    assert wanted == [folder / "topdb-fig6.md"]
    other = image.replace("fig6", "fig7")
    assert front.link_figures(other, tmp_path, wanted) == other


def test_a_run_has_a_page(run):
    text = front.run_page(run)
    assert "| mAP | 25.0 |" in text and "| rank1 | 50.0 |" in text
    assert "make train METHOD=topdb DATASET=synthped-small SEED=1" in text
    assert "[metrics.csv](metrics.csv)" in text and "queries.csv" not in text


def test_a_figure_links_its_cell(tmp_path):
    nb = v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# Top-DB-Net"),
            v4.new_markdown_cell("## Its figures"),
            v4.new_code_cell('paper_figure("topdb-fig6")'),
            v4.new_markdown_cell("## Others"),
            v4.new_code_cell('paper_figure("topdb-fig60")'),
        ]
    )
    pages = {tmp_path / "methods/topdb.ipynb": nb}
    assert front.shown_in("topdb-fig6", pages, tmp_path) == [("methods/topdb.ipynb", "Its figures")]
    page = front.figure_page("topdb-fig6", "Its caption.", pages, tmp_path, depth=3)
    assert "(../../../methods/topdb.ipynb#Its-figures)" in page
    assert "![Its caption.](topdb-fig6.png)" in page and "Its caption." in page


def test_the_page_of_sentences_begins_with_the_common_cases():
    page = sentences.page(ROOT)
    assert page.startswith("# When something is wrong\n")
    assert page.index("## Installation") < page.index("## Every sentence") < page.index("### core")
    assert "](../" not in page
