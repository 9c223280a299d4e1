"""The page of figures, the figures that are published, and outputs that are those of the code.

(Papermill itself runs the page in test_clone.)
"""

import json
import re
from base64 import b64encode
from io import BytesIO

import matplotlib
import nbformat
import numpy as np
import pytest
from outputs import ALL_BYTES, NOTEBOOK_BYTES, bytes_of_outputs, keeps_outputs, same_outputs
from pages import ROOT, outputs, printed, run_page
from PIL import Image, ImageOps

from reidnb.data.load import load_dataset
from reidnb.methods.registry import recipe
from reidnb.parts.backbones import tiny_trunk
from reidnb.results.gallery import MEASURED, figure_list, paper_figure, save_paper_figure
from reidnb.results.jobs import data_missing
from reidnb.results.plates import FIGURE_SPECS, FIGURES, NETWORKS
from reidnb.training.loop import train

PUBLISHED = ROOT / "reports/published/figures"
KEPT = sorted(PUBLISHED.glob("*.md"))
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Three runs of seconds with three kept epochs each."
    folder = tmp_path_factory.mktemp("figures")
    data = load_dataset("synthped-mini", folder / "data")
    with tiny_trunk():
        for method in ("baseline", "bdb", "topdb"):
            r = recipe(
                method, "synthped-mini", profile="smoke", epochs=3, checkpoint_epochs=(1, 2, 3)
            )
            train(r, data, folder / "runs", device="cpu")
    return folder


def page(made, out, pictures=False, **given):
    "nbs/figures.ipynb with its outputs."
    given = (
        dict(
            dataset="synthped-mini",
            folder=str(made / "runs"),
            root=str(made / "data"),
            out=str(made / out),
        )
        | given
    )
    return run_page("figures", given, pictures=pictures)


@pytest.mark.usefixtures("tiny")
def test_a_figure_from_runs_of_seconds(made):
    executed = page(made, "one", pictures=True, figure="topdb-fig4", query=4, p=4, cmap="cividis")
    assert {f.name for f in (made / "one").iterdir()} == {
        "topdb-fig4.png",
        "topdb-fig4.svg",
        "topdb-fig4.md",
    }
    assert sum("image/png" in o.get("data", {}) for o in outputs(executed)) == 1
    text = (made / "one/topdb-fig4.md").read_text()
    assert "epochs 1, 2, 3 of 3" in text and text.count("synthped-mini") >= 2
    assert "sampled at random" not in text  # the query was named
    page(made, "two", figure="topdb-fig4", query=4, cmap="cividis")
    assert (made / "one/topdb-fig4.png").read_bytes() != (
        made / "two/topdb-fig4.png"
    ).read_bytes(), "p has no effect"


@pytest.mark.usefixtures("tiny")
def test_what_needs_no_run_is_drawn(mini, tmp_path):
    "The diagrams of networks. All others are named."
    out = tmp_path / "figures"
    given = dict(root=str(mini), folder=str(tmp_path / "runs"), out=str(out))
    given |= dict(figure="all", dataset="synthped-mini", interactive=False)
    said = printed(run_page("figures", given))
    drawn = {f.stem for f in out.glob("*.png")}
    assert drawn == set(NETWORKS)
    named = set(re.findall(r"not drawn: (\S+) ", said))
    assert named == {"no"} | set(FIGURES) - drawn - {"localisation"}  # "no run … was measured"
    assert "not drawn: pmm-fig4 needs a run of pmm on synthped-mini with its kept epochs" in said


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_all_that_can_be_drawn(made):
    "Those whose runs are missing are named, the others are drawn."
    said = printed(page(made, "all", figure="all", interactive=False))
    drawn = {f.stem for f in (made / "all").glob("*.png")}
    assert {
        "bdb-fig1",
        "bdb-fig2",
        "bdb-fig3",
        "bdb-fig5",
        "bdb-fig6",
        "topdb-fig1",
        "topdb-fig6",
        "pmm-fig2",
        "localisation",
    } <= drawn
    assert drawn | set(re.findall(r"not drawn: (\S+) ", said)) == set(FIGURES)
    assert "not drawn: pmm-fig4 needs a run of pmm on synthped-mini with its kept epochs" in said
    assert "`make train METHOD=pmm DATASET=synthped-mini`" in said


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "given, said",
    [
        (dict(figure="bdb-fig99"), "unknown figure 'bdb-fig99'"),
        (dict(figure="sen-fig10"), "sen-fig10 needs a run of sen/base on synthped-mini"),
        (dict(figure="bdb-fig5", query=99), "query 99 does not exist"),
        (dict(figure="topdb-fig4", epochs=[9]), "does not keep epoch 9: choose among 1, 2, 3"),
        (dict(figure="bdb-fig5", epoch=3), "unknown parameter 'epoch' (did you mean 'epochs'?)"),
        (
            dict(figure="pmm-fig4", runs="a run of another method"),
            "pmm-fig4 is plotted from runs of pmm, and ",
        ),
    ],
)
def test_what_cannot_be_drawn_is_a_sentence(made, given, said):
    if "runs" in given:
        given = given | dict(runs=str(next((made / "runs").rglob("run.json")).parent))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(said)):
        page(made, "bad", **given)


def again(name, text, to, **given):
    "A published figure, drawn from the runs that its caption names."
    runs = ()
    if name in FIGURE_SPECS or name in MEASURED:
        runs = re.findall(r"^- .*?: `(reports/published/runs/[^`]+)`", text, re.M)
        assert runs, "the caption names no published run"
    data = None
    if name in FIGURE_SPECS and FIGURE_SPECS[name].maps:
        on = runs[0].split("/")[3]
        if data_missing(on, ROOT / "data"):
            pytest.skip(f"the photographs of {on} are not here")
        data = load_dataset(on, ROOT / "data")
    return save_paper_figure(
        *paper_figure(name, runs, data, folder="reports/published/runs", **given), name, to
    )


def worst(a, b):
    "The largest difference of two pictures, over blocks of 16×16 pixels."
    a, b = (np.asarray(Image.open(f).convert("RGB"), float).mean(2) for f in (a, b))
    assert a.shape == b.shape
    h, w = (n // 16 * 16 for n in a.shape)
    return np.abs((a - b)[:h, :w].reshape(h // 16, 16, w // 16, 16).mean((1, 3))).max()


def roughly(a, b):
    "The largest difference of two pictures of about the same size, each in 8×8 blocks."
    sizes = np.array([Image.open(f).size for f in (a, b)])
    assert np.abs(sizes[0] - sizes[1]).max() < 0.05 * sizes.max()
    a, b = (Image.open(f).convert("L").resize((8, 8), Image.BOX) for f in (a, b))
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).max()


def same_layout():
    """Is the installed matplotlib of the same minor version as that of the published pictures?

    Other versions move the parts of a figure by some pixels."""
    pins = (ROOT / "constraints.txt").read_text()
    published = re.search(r"^matplotlib==(\d+\.\d+)\.", pins, re.M)[1]
    return matplotlib.__version__.startswith(f"{published}.")


@pytest.mark.parametrize("caption", KEPT, ids=lambda f: f.stem)
def test_the_published_figures_are_those_of_the_published_runs(caption, tmp_path):
    """Drawn again from what is shipped, without weights.

    The same words, and by the matplotlib of the published pictures the same picture but for rounding.
    """
    text = caption.read_text()
    png, _, md = again(caption.stem, text, tmp_path)
    assert md.read_text() == text
    published = caption.with_suffix(".png")
    if same_layout():
        assert worst(png, published) < 5
    else:
        assert roughly(png, published) < 40
    assert caption.with_suffix(".svg").is_file()


def test_every_figure_of_the_papers_is_kept_or_says_what_it_takes():
    text = (ROOT / "reports/published/figures.md").read_text()
    assert text == figure_list()
    assert text.count("\n- ") == 34
    for line in text.splitlines():
        if "not kept" in line:
            assert " needs runs " in line or " shows photographs" in line
            assert "`reidnb table " in line or "`make figure " in line


def test_another_figure_is_noticed(tmp_path):
    "The same people through another power of the map."
    text = (PUBLISHED / "bdb-fig1.md").read_text()
    png, _, _ = again("bdb-fig1", text, tmp_path / "published")
    other, _, _ = again("bdb-fig1", text, tmp_path / "other", p=1)
    assert worst(png, other) > 10


def test_the_evolution_figures_have_three_epochs():
    assert len(KEPT) >= 25
    for name in ("topdb-fig4", "topdb-fig6", "sen-fig10", "sen-fig11"):
        epochs = re.search(r"epochs ([\d, ]+) of", (PUBLISHED / f"{name}.md").read_text())[1]
        assert len(epochs.split(",")) >= 3


def kept_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem != "index"], ids=lambda p: p.stem)
def test_outputs_are_kept_where_a_test_compares_them(path):
    "`make test-all` compares the outputs of parts/, methods/ and one_page; others would go stale."
    assert bool(kept_outputs(path)) == keeps_outputs(path)
    assert bytes_of_outputs(json.loads(path.read_text())) <= NOTEBOOK_BYTES


def test_kept_outputs_are_small_in_all():
    assert sum(bytes_of_outputs(json.loads(path.read_text())) for path in NOTEBOOKS) <= ALL_BYTES


def test_changed_outputs_are_seen(tmp_path, monkeypatch):
    "Another number, another picture, a missing output and one too many; a moved pixel is none."
    image = Image.new("RGB", (96, 48), "white")
    image.paste("black", (0, 0, 48, 48))
    moved = image.copy()
    moved.putpixel((30, 10), (0, 0, 0))
    other = ImageOps.mirror(image)

    def shown(picture):
        file = BytesIO()
        picture.save(file, "PNG")
        return {"data": {"image/png": b64encode(file.getvalue()).decode()}}

    text = {"name": "stdout", "output_type": "stream", "text": ["0.5\n"]}
    assert same_outputs([text, shown(image)], [text, shown(moved)])
    assert not same_outputs([text], [text | {"text": ["0.6\n"]}])
    assert not same_outputs([shown(image)], [shown(other)])
    assert not same_outputs([shown(image)], [text])
    assert not same_outputs([text], [])
    assert not same_outputs([], [text])


def test_the_front_page_shows_what_its_code_gives(monkeypatch):
    "The README's tables are in nbs/index.ipynb as outputs: run again, they are the same."
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.chdir(ROOT / "nbs")
    shell = InteractiveShell()
    kept = 0
    for c in nbformat.read("index.ipynb", 4).cells:
        if c.cell_type != "code":
            continue
        done = shell.run_cell(c.source)
        done.raise_error()
        if c.outputs:
            kept += 1
            assert done.result.data == c.outputs[0]["data"]["text/markdown"]
    assert kept == 4
