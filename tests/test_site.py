"""docs/make_site.py on three small notebooks.

What a reader sees, links that lead somewhere, and what stops it.
"""

import json
from pathlib import Path

import make_site
import nbformat.v4 as v4
import pytest
import sentences

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
        "very copy is in the gallery",
        "cannot be read as an image",
        "is being trained by another process",
        "give a run or a file of features, not both",
    ],
)
def test_the_page_of_sentences_has_what_the_package_says(words):
    assert words in sentences.page(ROOT).replace("\\", "")
