"""The page of figures by papermill, the figures that are kept, and outputs that are those of the code."""
import json, re
from pathlib import Path
import nbformat, numpy as np, papermill, pytest
from PIL import Image
from reidnb.datasets import load_dataset
from reidnb.gallery import FIGURES, PLATES, paper_figure, save_paper_figure
from reidnb.recipes import recipe
from reidnb.training import train

ROOT = Path(__file__).resolve().parent.parent
KEPT = sorted((ROOT/"reports/figures").glob("*.md"))
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Three runs of seconds with three kept epochs each."
    d = tmp_path_factory.mktemp("figures"); data = load_dataset("synthped-mini", d/"data")
    for m in ("baseline", "bdb", "topdb"): train(recipe(m, "synthped-mini", profile="smoke", epochs=3, keep_epochs=(1, 2, 3)), data, d/"runs", device="cpu")
    return d

def page(made, out, **given):
    "nbs/figures.ipynb by papermill; what it printed and showed."
    given = dict(dataset="synthped-mini", folder=str(made/"runs"), root=str(made/"data"), out=str(made/out)) | given
    papermill.execute_notebook(str(ROOT/"nbs/figures.ipynb"), str(made/f"{out}.ipynb"), parameters=given, cwd=str(ROOT), progress_bar=False)
    return [o for c in nbformat.read(made/f"{out}.ipynb", 4).cells for o in c.get("outputs", [])]

def test_a_figure_from_runs_of_seconds(made):
    outputs = page(made, "one", figure="topdb-fig6", query=4, p=4, cmap="cividis")
    assert {f.name for f in (made/"one").iterdir()} == {"topdb-fig6.png", "topdb-fig6.svg", "topdb-fig6.md"} and sum("image/png" in o.get("data", {}) for o in outputs) == 1
    text = (made/"one/topdb-fig6.md").read_text(); assert "epochs 1, 2, 3 of 3" in text and text.count("synthped-mini") >= 2 and "by lot" not in text      # the query was named
    page(made, "two", figure="topdb-fig6", query=4, cmap="cividis"); assert (made/"one/topdb-fig6.png").read_bytes() != (made/"two/topdb-fig6.png").read_bytes()      # p takes effect

def test_all_that_can_be_drawn(made):
    "Those whose runs are missing are named, the others are drawn."
    printed = "".join(o.get("text", "") for o in page(made, "all", figure="all", interactive=False)); drawn = {f.stem for f in (made/"all").glob("*.png")}
    assert {"bdb-fig1", "bdb-fig2", "bdb-fig3", "bdb-fig5", "bdb-fig6", "topdb-fig1", "topdb-fig6", "pmm-fig2", "localisation"} <= drawn and drawn | set(re.findall(r"not drawn: (\S+) ", printed)) == set(FIGURES)
    assert "not drawn: pmm-fig4 wants a run of pmm on synthped-mini with its kept epochs" in printed and "`make train METHOD=pmm DATASET=synthped-mini`" in printed

def test_what_cannot_be_drawn_is_a_sentence(made):
    for given, said in ((dict(figure="bdb-fig99"), "unknown figure 'bdb-fig99'"), (dict(figure="sen-fig10"), "sen-fig10 wants a run of sen/base on synthped-mini"),
                        (dict(figure="bdb-fig5", query=99), "query 99 does not exist"), (dict(figure="topdb-fig4", epochs=[9]), "does not keep epoch 9: choose among 1, 2, 3"),
                        (dict(figure="bdb-fig5", epoch=3), "unknown parameter 'epoch' (did you mean 'epochs'?)"), (dict(figure="pmm-fig4", runs=str(next((made/"runs").rglob("run.json")).parent)), "pmm-fig4 is drawn from runs of pmm, and ")):
        with pytest.raises(papermill.PapermillExecutionError, match=re.escape(said)): page(made, "bad", **given)

def again(name, text, to, **given):
    "A kept figure, drawn from the runs that its caption names."
    runs = re.findall(r"^- .*?: `(reports/runs/[^`]+)`", text, re.M) if name in PLATES or name == "localisation" else ()
    data = load_dataset("synthped-small", ROOT/"data") if name in PLATES and PLATES[name].maps else None
    return save_paper_figure(*paper_figure(name, runs, data, **given), name, to)

def worst(a, b):
    "The largest difference of two pictures, over blocks of 16×16 pixels."
    a, b = (np.asarray(Image.open(f).convert("RGB"), float).mean(2) for f in (a, b)); assert a.shape == b.shape; h, w = (n//16*16 for n in a.shape)
    return np.abs((a - b)[:h, :w].reshape(h//16, 16, w//16, 16).mean((1, 3))).max()

@pytest.mark.parametrize("caption", KEPT, ids=lambda f: f.stem)
def test_the_kept_figures_are_those_of_the_kept_runs(caption, tmp_path):
    "Drawn again from what is shipped, without weights: the same words, and the same picture but for rounding."
    text = caption.read_text(); png, _, md = again(caption.stem, text, tmp_path); assert md.read_text() == text
    assert worst(png, caption.with_suffix(".png")) < 5 and caption.with_suffix(".svg").is_file()

def test_another_figure_is_noticed(tmp_path):
    "The same people through another power of the map."
    f = ROOT/"reports/figures/bdb-fig1.md"; assert worst(again("bdb-fig1", f.read_text(), tmp_path, p=1)[0], f.with_suffix(".png")) > 10

def test_the_evolution_figures_have_three_epochs():
    assert len(KEPT) >= 25
    for n in ("topdb-fig4", "topdb-fig6", "sen-fig10", "sen-fig11"): assert len(re.search(r"epochs ([\d, ]+) of", (ROOT/f"reports/figures/{n}.md").read_text())[1].split(",")) >= 3

@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem != "index"], ids=lambda p: p.stem)
def test_no_output_is_kept(path):
    "So none is stale; `make docs` and a reader make their own."
    assert not any(c.get("outputs") for c in json.loads(path.read_text())["cells"])

def test_the_front_page_shows_what_its_code_gives(monkeypatch):
    "The README's tables are in nbs/index.ipynb as outputs: run again, they are the same."
    from IPython.core.interactiveshell import InteractiveShell
    monkeypatch.chdir(ROOT/"nbs"); shell = InteractiveShell(); kept = 0
    for c in nbformat.read("index.ipynb", 4).cells:
        if c.cell_type != "code": continue
        done = shell.run_cell(c.source); done.raise_error()
        if c.outputs: kept += 1; assert done.result.data == c.outputs[0]["data"]["text/markdown"]
    assert kept == 2
