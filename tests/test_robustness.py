"""nbs/robustness.ipynb and the figure `occlusion`: tested again, drawn without weights, refused in a sentence."""

import re
import shutil

import pandas as pd
import pytest
from pages import printed, run_page

from reidnb.data.load import load_dataset
from reidnb.methods.registry import recipe
from reidnb.parts.backbones import tiny_trunk
from reidnb.results.gallery import paper_figure
from reidnb.training.loop import train
from reidnb.training.occluded import OCCLUSION_FILE

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(scope="module")
def made(mini, tmp_path_factory):
    "A folder with two runs of one step, which the page has tested with covered queries."
    folder = tmp_path_factory.mktemp("robustness")
    data = load_dataset("synthped-mini", mini)
    small = dict(profile="smoke", steps=1, epochs=1, test_ids=5)
    with tiny_trunk():
        for method in ("baseline", "bdb"):
            r = recipe(method, "synthped-mini", **small)
            train(r, data, folder / "runs", device="cpu")
        page(folder, mini)
    return folder


def runs_of(folder):
    return sorted(file.parent for file in (folder / "runs").rglob("run.json"))


def page(folder, root, **changed):
    "The page on the folder's runs, in few settings."
    given = dict(runs=",".join(map(str, runs_of(folder))), root=str(root), out=str(folder / "out"))
    given |= dict(fillings="grey,patch", sides="top,box", shares="0.5", samples=50, device="cpu")
    return printed(run_page("robustness", given | changed))


def test_the_page_writes_figure_and_table(made):
    out = made / "out"
    names = {f.name for f in out.rglob("*.*")}
    assert names == {f"occlusion.{kind}" for kind in ("png", "svg", "md", "csv")}
    table = pd.read_csv(out / "tables/occlusion.csv")
    assert set(table.network) == {"baseline", "bdb"}
    assert len(table) == 2 * 3 * (1 + 2 * 2)
    assert table.area_p.between(0, 1).sum() == 3 + 4
    assert "bdb: mAP under cover" in (out / "tables/occlusion.md").read_text()


def test_the_page_goes_on_and_takes_parameters(made, mini):
    before = [(run / OCCLUSION_FILE).read_bytes() for run in runs_of(made)]
    page(made, mini, out=str(made / "again"))
    assert before == [(run / OCCLUSION_FILE).read_bytes() for run in runs_of(made)]
    page(made, mini, out=str(made / "rank1"), measure="rank1", fillings="grey")
    assert (made / "rank1/figures/occlusion-rank1.png").is_file()
    assert "rank-1" in (made / "rank1/figures/occlusion-rank1.md").read_text()
    assert len(pd.read_csv(made / "rank1/tables/occlusion.csv")) == 2 * 3 * (1 + 2)


def test_without_weights_the_same_is_drawn(made, mini, tmp_path):
    shutil.copytree(made / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("*.pt"))
    page(tmp_path, mini)
    tables = [folder / "out" / "tables" / "occlusion.csv" for folder in (tmp_path, made)]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    fig, text = paper_figure("occlusion", folder=tmp_path / "runs", dataset="synthped-mini")
    assert sum(ax.get_visible() for ax in fig.axes) == 4
    assert text.count("runs/synthped-mini") == 2


def test_two_seeds_of_each_network(made, mini, tmp_path):
    "The means and deviations over seeds, in figure and table; the second seed is tested again."
    shutil.copytree(made / "runs", tmp_path / "runs")
    data = load_dataset("synthped-mini", mini)
    small = dict(profile="smoke", steps=1, epochs=1, test_ids=5, seed=1)
    with tiny_trunk():
        for method in ("baseline", "bdb"):
            r = recipe(method, "synthped-mini", **small)
            train(r, data, tmp_path / "runs", device="cpu")
    page(tmp_path, mini)
    t = pd.read_csv(tmp_path / "out/tables/occlusion.csv")
    assert (t.seeds == 2).all()
    of_all = t[(t.filling == "all") & (t.measure == "mAP")].set_index("network")
    for network in ("baseline", "bdb"):
        areas = []
        for run in runs_of(tmp_path):
            if network in run.parts:
                queries = pd.read_csv(run / OCCLUSION_FILE)
                clean = queries[queries.filling == "none"].ap.mean()
                areas.append((clean + queries[queries.filling != "none"].ap.mean()) / 2)
        assert len(areas) == 2
        assert of_all.area[network] == pytest.approx(sum(areas) / 2, abs=2e-5)
        assert of_all["std"][network] == pytest.approx(pd.Series(areas).std(), abs=2e-5)
    text = (tmp_path / "out/figures/occlusion.md").read_text()
    assert "seeds: baseline 2, bdb 2" in text


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(sides="middle"), "unknown side 'middle'"),
        (dict(fillings="black"), "unknown filling 'black'"),
        (dict(shares="0.2,1"), "share=1.0: cover more than 0 and less than 1"),
        (dict(shares="half"), "give numbers, separated by commas"),
        (dict(repeats=0), "repeats=0: test each setting at least once"),
        (dict(share=0.2), "unknown parameter 'share' (did you mean 'shares'?)"),
        (dict(measure="map"), "unknown measure 'map'"),
        (dict(baseline="pmm"), "unknown baseline among the runs 'pmm'"),
        (dict(runs="nowhere"), "nowhere is not a run directory"),
    ],
)
def test_what_is_refused(made, mini, wrong, said):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(said)):
        page(made, mini, **wrong)


def test_a_run_with_neither_weights_nor_the_file(made, mini, tmp_path):
    ignored = shutil.ignore_patterns("*.pt", "robustness")
    shutil.copytree(made / "runs", tmp_path / "runs", ignore=ignored)
    with pytest.raises(FileNotFoundError, match=re.escape("holds no weights (last.pt)")):
        page(tmp_path, mini)
    with pytest.raises(FileNotFoundError, match="occlusion needs runs on synthped-mini"):
        paper_figure("occlusion", folder=tmp_path / "runs", dataset="synthped-mini")


def test_weights_that_are_not_those_of_the_file(made, mini, tmp_path):
    shutil.copytree(made / "runs", tmp_path / "runs")
    file = runs_of(tmp_path)[0] / OCCLUSION_FILE
    rows = pd.read_csv(file)
    rows.assign(ap=rows.ap / 2).to_csv(file, index=False)
    with pytest.raises(ValueError, match="was made with other weights"):
        page(tmp_path, mini, fillings="noise")
