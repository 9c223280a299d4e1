"""What the figures, the maps and the gallery refuse, and what they answer: one keyword of each message."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from reidnb.core import relative_path
from reidnb.data.load import load_dataset
from reidnb.methods.registry import recipe
from reidnb.parts.backbones import tiny_trunk
from reidnb.results.gallery import browse, paper_figure
from reidnb.results.leaning import lean_on, leaning
from reidnb.results.maps import (
    body_share,
    overlap,
    overlay,
    read_evolution,
    record_evolution,
    stream_inputs,
)
from reidnb.results.panels import (
    activation_evolution,
    activation_overlays,
    rank_evolution,
    rank_panel,
)
from reidnb.results.plates import localisation
from reidnb.results.style import plot_camera_pairs, plot_cmc, plot_curves, save_figure
from reidnb.training.checkpoints import load_model
from reidnb.training.loop import train

SMOKE = dict(profile="smoke", epochs=3, checkpoint_epochs=(1, 2, 3))
GREY = np.full((192, 64, 3), 0.5)
METRICS = pd.DataFrame([{"epoch": 1, "lr": 1e-4, "a/id": 4.0}])
PAIRS = pd.DataFrame([(0, 1, 3, 0.5, 0.5)], columns=["query", "gallery", "queries", "mAP", "rank1"])
ANEW = (
    "keeps no epoch (no epoch-NNN.pt; checkpoints are not shipped): train it anew with "
    "`make train METHOD=bdb DATASET=synthped-mini SEED=0 ARGS='-p source paper -p profile smoke"
)


def copied(run, to, *ignored):
    "A copy of a run without some of its files."
    shutil.copytree(run, to, ignore=shutil.ignore_patterns(*ignored))
    return to


def renamed(run, to, old, new):
    "A copy of a run with another text in its run.json, and without weights."
    copied(run, to, "*.pt")
    info = (to / "run.json").read_text()
    assert old in info
    (to / "run.json").write_text(info.replace(old, new))
    return to


@pytest.fixture(scope="module")
def made(tmp_path_factory, mini):
    "Runs of seconds with three kept epochs each, and copies that lack something or claim to be others."
    folder = tmp_path_factory.mktemp("messages").resolve()
    store = folder / "runs"
    data = load_dataset("synthped-mini", mini)
    m = SimpleNamespace(folder=folder, store=store, root=mini, data=data)
    with tiny_trunk():
        for method in ("baseline", "bdb", "topdb"):
            run = train(recipe(method, "synthped-mini", **SMOKE), data, store, device="cpu")
            record_evolution(run, data)
            setattr(m, method, run)
        m.model, m.recipe = load_model(m.bdb)
        m.evolution = read_evolution(m.bdb)
        m.features = torch.load(m.bdb / "features.pt", weights_only=True)

        m.bare = copied(m.bdb, folder / "bare", "*.pt", "evolution.npz")
        m.cut = copied(m.bdb, folder / "cut", "*.pt")
        (m.cut / "evolution.npz").write_bytes((m.bdb / "evolution.npz").read_bytes()[:5000])
        m.other = copied(m.bdb, folder / "other", "*.pt")
        shutil.copy(m.topdb / "evolution.npz", m.other)
        m.unmeasured = copied(m.bdb, folder / "unmeasured", "*.pt", "localisation.csv")
        m.sen = renamed(m.bdb, folder / "sen", '"method": "bdb"', '"method": "sen"')
        m.topdb1 = renamed(m.topdb, folder / "topdb1", '"seed": 0', '"seed": 1')
        m.stopped = copied(m.bdb, folder / "stopped")
        info = (m.stopped / "run.json").read_text()
        (m.stopped / "run.json").write_text(info.replace('"finished"', '"interrupted"'))
        m.backwards = replace(data, query=data.query[::-1].reset_index(drop=True))
        yield m


def refuses(call, made, error, keyword):
    "The call raises this error with these words, and leaves no figure open."
    with pytest.raises(error, match=re.escape(keyword)):
        call(made)
    assert not plt.get_fignums()


STYLE = [
    (lambda: plot_curves(METRICS[:0]), ValueError, "metrics has no epoch to plot"),
    (lambda: plot_cmc({}), ValueError, "no ranking to plot"),
    (lambda: plot_camera_pairs(PAIRS[:0]), ValueError, "no pair of two cameras"),
    (lambda: plot_camera_pairs(PAIRS, "map"), ValueError, "unknown measure 'map'"),
    (lambda: overlay(GREY[..., 0], torch.rand(6, 2)), ValueError, "not (192, 64) and (6, 2)"),
    (lambda: overlay(GREY, torch.rand(1, 6, 2)), ValueError, "and (1, 6, 2)"),
    (
        lambda: body_share(torch.ones(1, 2, 2), np.ones((4, 4), bool)),
        ValueError,
        "not (1, 2, 2) and (4, 4)",
    ),
    (
        lambda: overlap(torch.ones(1, 2, 2), torch.ones(1, 1, 2)),
        ValueError,
        "not (1, 2, 2) and (1, 1, 2)",
    ),
]


@pytest.mark.parametrize("call, error, keyword", STYLE, ids=[row[2] for row in STYLE])
def test_without_a_run(call, error, keyword):
    with pytest.raises(error, match=re.escape(keyword)):
        call()
    assert not plt.get_fignums()


def test_a_figure_of_an_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="unknown format of a figure ''"):
        save_figure(plt.Figure(), tmp_path / "panel")
    assert not list(tmp_path.iterdir())


def panel(m, data=None, **how):
    return rank_panel(data or m.data, m.features, **how)


def overlays(m, images=None, **how):
    return activation_overlays(m.model, m.recipe, images or m.data.query[:1], **how)


PANELS = [
    (
        lambda m: panel(m, queries=[0, 99]),
        ValueError,
        "query 99 does not exist: synthped-mini has the queries 0 to 17",
    ),
    (lambda m: panel(m, queries=[]), ValueError, "query (none) does not exist"),
    (
        lambda m: panel(m, data=m.data.subset(2)),
        ValueError,
        "are of 18 query and 44 gallery images, but synthped-mini [2 ids] has",
    ),
    (
        lambda m: overlays(m, scale="all"),
        ValueError,
        "unknown scale 'all': choose one of row, image",
    ),
    (lambda m: overlays(m, [m.folder / "gone.jpg"]), OSError, "cannot be read as an image"),
    (
        lambda m: activation_evolution(m.bdb, m.data, epochs=[3, 7]),
        ValueError,
        "does not keep epoch 7: choose among 1, 2, 3",
    ),
    (
        lambda m: activation_evolution(m.bdb, m.data, images=[18]),
        ValueError,
        "query 18 does not exist",
    ),
    (
        lambda m: activation_evolution(m.store, m.data),
        FileNotFoundError,
        "is no run directory (it has no run.json)",
    ),
    (lambda m: activation_evolution(m.bare, m.data), FileNotFoundError, ANEW),
    (lambda m: rank_evolution(m.bdb, m.data, -1), ValueError, "query -1 does not exist"),
    (lambda m: rank_evolution(m.bare, m.data, 0), FileNotFoundError, "keeps no epoch"),
    (
        lambda m: rank_evolution(m.bdb, m.data, 0, epochs=[4]),
        ValueError,
        "does not keep epoch 4",
    ),
]


@pytest.mark.parametrize("call, error, keyword", PANELS, ids=[row[2] for row in PANELS])
def test_panels(made, call, error, keyword):
    refuses(call, made, error, keyword)


def in_training(m):
    model, _ = load_model(m.bdb)
    stream_inputs(model.train(), torch.rand(1, 512, 4, 2))


RECORDED = [
    (in_training, ValueError, "call model.eval() first"),
    (lambda m: record_evolution(m.bare, m.data), FileNotFoundError, ANEW[:-20]),
    (
        lambda m: record_evolution(m.bdb, m.data.subset(3)),
        ValueError,
        "was tested on synthped-mini, with other files than synthped-mini [3 ids] here",
    ),
    (lambda m: record_evolution(m.stopped, m.data), ValueError, "is not finished"),
    (lambda m: read_evolution(m.cut), ValueError, "as when it was cut short: delete it"),
    (lambda m: read_evolution(m.other), ValueError, "belongs to another recipe"),
    (lambda m: read_evolution(m.bare), FileNotFoundError, "has no evolution.npz"),
    (lambda m: read_evolution(m.folder), FileNotFoundError, "is no run directory"),
    (
        lambda m: m.evolution.at(7),
        ValueError,
        "does not keep epoch 7: choose among 1, 2, 3",
    ),
    (
        lambda m: m.evolution.place(18),
        ValueError,
        "query 18 is not among the 18 queries",
    ),
    (lambda m: localisation([m.unmeasured]), FileNotFoundError, "localisation.csv is not there"),
    (lambda m: leaning([m.unmeasured]), FileNotFoundError, "leaning.csv is not there"),
    (lambda m: lean_on(m.stopped, m.data), ValueError, "is not finished"),
    (lambda m: lean_on(m.bare, m.data), FileNotFoundError, "last.pt is not there"),
    (
        lambda m: lean_on(m.bdb, replace(m.data, root=m.folder)),
        ValueError,
        "is not a SynthPed set: only there are the parts of people known",
    ),
    (
        lambda m: lean_on(m.bdb, m.data.subset(3)),
        ValueError,
        "was tested on synthped-mini, with other files than synthped-mini [3 ids] here",
    ),
]


@pytest.mark.parametrize("call, error, keyword", RECORDED, ids=[row[2] for row in RECORDED])
def test_recorded_maps(made, call, error, keyword):
    refuses(call, made, error, keyword)


def drawn(m, name, runs=(), **how):
    "A figure from the runs that were made."
    how = dict(folder=m.store, root=m.root, dataset="synthped-mini") | how
    return paper_figure(name, runs, **how)


GALLERY = [
    (lambda m: drawn(m, "bdb-fig12"), ValueError, "unknown figure 'bdb-fig12'"),
    (
        lambda m: drawn(m, "bdb-fig1", p=3),
        ValueError,
        "p is 3: maps were recorded for 1, 2, 4",
    ),
    (
        lambda m: drawn(m, "topdb-fig6", [m.sen]),
        ValueError,
        "topdb-fig6 is plotted from runs of topdb/baseline or bdb or baseline and topdb, and ",
    ),
    (
        lambda m: drawn(m, "bdb-fig1", query=99),
        ValueError,
        "query 99 does not exist: synthped-mini has the queries 0 to 17",
    ),
    (
        lambda m: drawn(m, "topdb-fig4", epochs=[7]),
        ValueError,
        "does not keep epoch 7: choose among 1, 2, 3",
    ),
    (
        lambda m: drawn(m, "topdb-fig4", epochs=[1]),
        ValueError,
        "topdb-fig4 shows 3 epochs, and 1 were asked for: give 3 of 1, 2, 3",
    ),
    (
        lambda m: drawn(m, "bdb-fig8"),
        ValueError,
        "bdb-fig8 is about cub200, cars196, inshop, sop, grocery, not synthped-mini",
    ),
    (
        lambda m: drawn(m, "bdb-fig1", dataset="market1501"),
        FileNotFoundError,
        "`make train METHOD=baseline DATASET=market1501`",
    ),
    (
        lambda m: drawn(m, "bdb-fig1", cmap="cividiss"),
        ValueError,
        "unknown colour map 'cividiss': choose one of matplotlib's",
    ),
    (
        lambda m: drawn(m, "sen-fig9", dataset="market1501"),
        FileNotFoundError,
        "reidnb table sen-fig9 --datasets market1501",
    ),
    (lambda m: drawn(m, "bdb-fig1", [m.folder]), FileNotFoundError, "is no run directory"),
    (
        lambda m: drawn(m, "localisation", dataset="market1501"),
        FileNotFoundError,
        "has been measured",
    ),
    (
        lambda m: drawn(m, "lean-on"),
        FileNotFoundError,
        "lean-on needs runs on synthped-mini that have been measured, and there is none in ",
    ),
    (
        lambda m: drawn(m, "lean-on", dataset="market1501"),
        ValueError,
        "market1501 has no masks of parts: give runs on synthped-mini",
    ),
    (lambda m: drawn(m, "lean-on", [m.folder]), FileNotFoundError, "is no run directory"),
    (lambda m: drawn(m, "lean-on", query=3), ValueError, "lean-on takes no query: leave it out"),
    (lambda m: drawn(m, "lean-on", [m.bare]), FileNotFoundError, "leaning.csv is not there"),
    (
        lambda m: drawn(m, "bdb-fig1", [m.bdb], data=m.data.subset(2)),
        ValueError,
        "was tested on synthped-mini, on other images than those of synthped-mini [2 ids] here",
    ),
    (
        lambda m: drawn(m, "sen-fig9", [m.sen]),
        ValueError,
        "sen-fig9 takes no runs: leave it out (it looks for all runs of its table)",
    ),
    (
        lambda m: drawn(m, "bdb-fig5", [m.bdb], data=m.backwards),
        ValueError,
        "on other images than",
    ),
    (lambda m: drawn(m, "sen-fig1", p=4), ValueError, "sen-fig1 takes no p: leave it out"),
    (lambda m: drawn(m, "bdb-fig3", query=3), ValueError, "bdb-fig3 takes no query"),
    (lambda m: drawn(m, "bdb-fig5", k=10), ValueError, "k is 10, and 5 answers were recorded"),
    (
        lambda m: drawn(m, "topdb-fig6", [m.bdb, m.topdb], query=[3, 5]),
        ValueError,
        "this figure shows one query, not 2",
    ),
    (
        lambda m: drawn(m, "bdb-fig5", query="3;5"),
        ValueError,
        "query is a whole number or a list of them, not '3;5'",
    ),
    (
        lambda m: drawn(m, "topdb-fig4", [m.topdb, m.topdb1]),
        ValueError,
        "topdb-fig4 takes one run of topdb, and 2 were given",
    ),
    (lambda m: drawn(m, "bdb-fig5", [m.bare]), FileNotFoundError, "keeps no epoch (no epoch-NNN"),
    (lambda m: browse("bdb-fig3"), ValueError, "unknown figure with controls 'bdb-fig3'"),
]


@pytest.mark.parametrize("call, error, keyword", GALLERY, ids=[row[2] for row in GALLERY])
def test_gallery(made, call, error, keyword):
    refuses(call, made, error, keyword)


def test_a_run_is_missing_beside_the_named_ones(made, tmp_path):
    "One of yours is named: the other is looked for among yours, and a published one is offered."
    project = tmp_path.resolve()

    def placed(run, store):
        return copied(run, project / store / run.relative_to(made.store), "*.pt")

    def figure(*named):
        return paper_figure("bdb-fig1", named, made.data, query=3, dataset="synthped-mini")

    with patch.dict(os.environ, {"REIDNB_ROOT": str(project)}):
        published = placed(made.baseline, Path("reports/published/runs"))
        yours = placed(made.bdb, Path("reports/runs"))
        command = "make train METHOD=baseline DATASET=synthped-mini ARGS='-p profile smoke'"
        offer = f"or name a published one too: {relative_path(published)}"
        message = f"there is none in reports/runs: `{command}`, {offer}"
        with pytest.raises(FileNotFoundError, match=re.escape(message)):
            figure(yours)
        apart = copied(made.bdb, project / "apart", "*.pt")  # in no folder of runs
        with pytest.raises(FileNotFoundError, match="there is none beside the run that was named"):
            figure(apart)
