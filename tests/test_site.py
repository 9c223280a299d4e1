"""docs/make_site.py on three small notebooks.

What a reader sees, links that lead somewhere, and what stops it.
"""

import inspect
import io
import json
import re
from base64 import b64encode
from pathlib import Path

import make_site
import nbformat.v4 as v4
import public_names
import pytest
import sentences
from PIL import Image

import reidnb

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::PendingDeprecationWarning"
)


def write(path, *cells):
    "A notebook: text is Markdown, code begins with `>>>`."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            v4.new_notebook(
                cells=[
                    v4.new_code_cell(c[3:]) if c.startswith(">>>") else v4.new_markdown_cell(c)
                    for c in cells
                ]
            )
        )
    )


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A project with three notebooks, a folder and a few files."
    monkeypatch.setattr(make_site, "ROOT", tmp_path)
    make_site.surroundings.cache_clear()
    for name, text in {
        "settings.ini": "[DEFAULT]\ntst_flags = slow\n",
        "data/README.md": "# Data\n\n[masks](../nbs/parts/masks.ipynb#Its-rule,-twice)\n",
        "reports/tables/t.md": "# T\n",
        "reports/tables/said.md": "**said.** A caption has no title.\n",
        "reports/tables/t.csv": "a\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write(
        tmp_path / "nbs/index.ipynb",
        "# small\n\n> A project.",
        "[Paper B](methods/b.ipynb), [data](../data/README.md), [tables](../reports/tables), "
        "[a file](../reports/tables/t.csv), `[no](link.ipynb)`",
    )
    write(
        tmp_path / "nbs/parts/masks.ipynb",
        "# Masks",
        ">>>#| default_exp masks",
        ">>>#| hide\nsecret = 1",
        "## Its rule, twice",
        ">>>#| export\n#| slow\nvisible = 2",
        "$$a \\\\ b \\tag{7}$$",
    )
    write(
        tmp_path / "nbs/methods/b.ipynb",
        "# A long title",
        "[up](../parts/masks.ipynb#Its-rule,-twice) [below](#On-links)",
        "## On links",
        ">>>import os\nprint('ran' + os.environ['IN_TEST'], os.path.basename(os.getcwd()))",
    )
    yield tmp_path
    make_site.surroundings.cache_clear()


def test_a_site(small):
    make_site.run_all([small / "nbs/methods/b.ipynb"])
    make_site.build(small / "_site")
    index, masks, paper = (
        (small / "_site" / f"{n}.html").read_text() for n in ("index", "parts/masks", "methods/b")
    )
    assert (
        "default_exp" not in masks
        and "#|" not in masks
        and "secret" not in masks
        and "visible" in masks
        and "outputs are missing" in masks
    )
    assert (
        "ran1 methods" in paper
        and "outputs are missing" not in paper
        and 'href="../parts/masks.html#its-rule-twice"' in paper
    )
    assert (
        r"\[a \\ b \tag{7}\]" in masks
        and (small / "_site/_static/mathjax/tex-chtml.js").is_file()
        and "://cdn" not in masks
    )
    assert (
        index.index("The five papers")
        < index.index("Paper B")
        < index.index("Parts of a network")
        < index.index("Masks")
        < index.index("Data and results")
    )
    assert "A caption has no title" in (small / "_site/reports/tables/said.html").read_text()
    assert [p.name for p in small.iterdir() if p.name.startswith(".site-")] == []


def test_a_picture_has_its_alternative_text(small):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    data = {"image/png": b64encode(file.getvalue()).decode()}
    path = small / "nbs/parts/masks.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"][-2]["source"] = "#| fig-alt: A black square: nothing else\nfig"
    nb["cells"][-2]["outputs"] = [v4.new_output("display_data", data)]
    path.write_text(json.dumps(nb))
    make_site.build(small / "_site")
    masks = (small / "_site/parts/masks.html").read_text()
    assert 'alt="A black square: nothing else"' in masks
    assert "fig-alt" not in masks


def test_nothing_is_run_twice_and_failures_are_named(small):
    paper = small / "nbs/methods/b.ipynb"
    make_site.run_all([paper])
    [before] = (small / "build/executed").iterdir()
    stamp = before.stat().st_mtime_ns
    nb = json.loads(paper.read_text())
    nb["cells"][0]["source"] = "# Another title"
    paper.write_text(json.dumps(nb))
    make_site.run_all([paper])
    assert before.stat().st_mtime_ns == stamp
    write(small / "nbs/02_bad.ipynb", "# Bad", ">>>assert 1 == 2, 'they differ'")
    with pytest.raises(SystemExit, match="nbs/02_bad.ipynb: AssertionError: they differ"):
        make_site.run_all([small / "nbs/02_bad.ipynb"])


def test_a_file_that_is_not_there_stops_it(small):
    write(small / "nbs/02_bad.ipynb", "# Bad", "[x](03_gone.ipynb) ![y](../reports/gone.png)")
    with pytest.raises(
        SystemExit,
        match="(?s)nbs/02_bad.ipynb: 03_gone.ipynb.*nbs/02_bad.ipynb: ../reports/gone.png",
    ):
        make_site.build(small / "_site")
    assert not (small / "_site").exists()


def test_an_anchor_that_is_not_there_stops_it(small):
    write(
        small / "nbs/02_bad.ipynb",
        "# Bad",
        '[x](parts/masks.ipynb#Nowhere) [y](#Nor-here) <img src="data:,"> [z](https://example.org/a#b)',
    )
    with pytest.raises(
        SystemExit, match="(?s)02_bad.html: #Nor-here.*02_bad.html: parts/masks.html#Nowhere"
    ):
        make_site.build(small / "_site")
    assert not (small / "_site").exists()


def test_links_of_html(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="#here">1</a><a href="b%20c.html#there">2</a><a href="/d.html">3</a>'
        '<img src="e.png"><a href="https:///f">4</a><a href="b c.html?x=1#no">5</a>'
    )
    (tmp_path / "b c.html").write_text('<h2 id="there">')
    assert make_site.broken_links(tmp_path) == [
        "a.html: /d.html",
        "a.html: b c.html?x=1#no",
        "a.html: e.png",
        "a.html: https:///f",
    ]


def test_the_sentences_of_a_module():
    """What is raised, with … for what is filled in.

    A reason that is worded apart; what the doctor finds.
    """
    code = """
def check(x):
    if x: raise ValueError(f"{x} is wrong: " + f"give {x + 1}")
    raise OSError(28, "no room here")
def why(x):
    "Why it fails."
    return f"since {x} fell"
def name(x): return f"the name {x}"
def again(e): raise
finding("fault", "files that are torn", [], "mend them")
"""
    assert set(sentences.sentences(code)) == {
        ("… is wrong: give …", ""),
        ("no room here", ""),
        ("since … fell", ""),
        ("files that are torn", "mend them"),
    }


@pytest.mark.parametrize(
    "words",
    [
        "is a web page, not a weights file",
        "make room, and the same call continues",
        "queries of … can be answered",
        "images from the query's own camera do not count",
        "queries with a copy in the gallery",
        "cannot be read as an image",
        "is being trained by another process",
        "give a run or a file of features, not both",
    ],
)
def test_the_page_of_sentences_has_what_the_package_says(words):
    assert words in sentences.page(ROOT).replace("\\", "")


@pytest.fixture(scope="module")
def names_page():
    return public_names.page(ROOT)


@pytest.mark.parametrize("name", sorted(reidnb.__all__))
def test_every_public_name_has_its_place(names_page, name):
    "Its heading, its parameters as Python sees them, and its docstring's first line."
    begin = names_page.index(f"\n### {name}\n")
    end = names_page.find("\n##", begin + 1)
    text = names_page[begin : end if end > 0 else None]
    it = getattr(reidnb, name)
    if not callable(it):
        assert f"{name}:" in text or f"{name} =" in text
        return
    first = (it.__doc__ or "").strip().split("\n")[0]
    assert first in text and f"{name}" in text.split("```python")[1]
    for parameter in inspect.signature(it).parameters:
        assert re.search(rf"\b{parameter}\b", text), parameter


def test_the_page_of_names_has_no_other_and_links_each_notebook(names_page):
    headings = re.findall(r"^### (\w+)$", names_page, re.M)
    assert sorted(headings) == sorted(reidnb.__all__)
    links = re.findall(r"\]\(([\w/]+\.ipynb)\)", names_page)
    assert len(links) == len(reidnb.OFFERED)
    assert all((ROOT / "nbs" / link).is_file() for link in links)


def test_a_name_that_is_nowhere_stops_the_page(tmp_path):
    (tmp_path / "reidnb").mkdir()
    (tmp_path / "reidnb/__init__.py").write_text('OFFERED = {"core": "gone"}\n')
    (tmp_path / "reidnb/core.py").write_text("here = 1\n")
    with pytest.raises(LookupError, match="core defines no gone"):
        public_names.page(tmp_path)
    assert public_names.page(tmp_path / "elsewhere") == ""
