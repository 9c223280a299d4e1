"""What can be wrong with a table, its runs, its jobs, or with what is published: each is named, in one sentence."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from commands import reidnb

from reidnb.core import STORES
from reidnb.data.load import load_dataset
from reidnb.methods.registry import recipe
from reidnb.results.jobs import data_missing, jobs, run_jobs, submit
from reidnb.results.publish import publish_folder
from reidnb.results.tables import (
    TABLES,
    compare,
    paper_results,
    read_table,
    stored_runs,
    table,
    table_files,
)
from reidnb.training.loop import train
from reidnb.training.testing import (
    check_protocols,
    protocol_file,
    queries,
    test_again,
    tested_again,
)

TINY = dict(profile="smoke", steps=1, epochs=1, test_ids=5)


def finish(store, r, **changes):
    "A finished run of a recipe, as if it had been trained; its directory."
    run = store / r.directory
    run.mkdir(parents=True, exist_ok=True)
    info = dict(recipe=r.json(), status="finished", seed=r.seed, versions={"device": "CPU"})
    info |= dict(metrics={"mAP": 0.5}, tested={"gallery": 50})
    (run / "run.json").write_text(json.dumps(info | changes))
    (run / "metrics.csv").write_text("epoch\n1\n")
    keep_queries(run, pids=range(20))
    return run


def keep_queries(run, pids):
    one = np.ones(len(pids))
    rows = dict(pid=pids, ap=one / 2, ap50=one / 2, inp=one / 2, first_match=1)
    pd.DataFrame(rows).to_csv(run / "queries.csv", index=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with two runs that were tested on other queries, and a few broken files."
    place = tmp_path_factory.mktemp("place")
    run = finish(place / "runs", recipe("bdb", "synthped-mini", **TINY)).rename(place / "run")
    other = place / "other"
    shutil.copytree(run, other)
    keep_queries(other, pids=range(100, 120))
    broken = protocol_file(run, {"flip": True})
    broken.parent.mkdir()
    broken.write_text("{")
    printed = paper_results().astype(str).replace({"True": "yes", "False": "no"})
    printed.drop(columns="slip").to_csv(place / "no-slips.csv", index=False)
    printed.assign(cited="perhaps").to_csv(place / "perhaps.csv", index=False)
    return place


def one_job():
    return jobs(table("stadb-table2"), ["synthped-mini"], [0], **TINY)


@pytest.mark.parametrize(
    "call, error, keyword",
    [
        (lambda p: paper_results("topdb-table3"), ValueError, "did you mean 'topdb-table2'"),
        (lambda p: paper_results(path=p / "no-slips.csv"), ValueError, "have the columns"),
        (lambda p: paper_results(path=p / "perhaps.csv"), ValueError, "not 'perhaps'"),
        (lambda p: table("topdb-table3"), ValueError, "choose one of bdb-table1, bdb-table2"),
        (lambda p: compare([p / "run"], [p / "other"]), ValueError, "on other queries than"),
        (lambda p: queries(p), FileNotFoundError, "queries.csv is not there"),
        (lambda p: queries(p / "run", {"flip": True}), FileNotFoundError, "flip-true.csv"),
        (lambda p: test_again(p / "run", None, rerun=True), ValueError, "did you mean 'rerank'"),
        (lambda p: check_protocols({"rerank": True}), ValueError, "a list of protocols"),
        (lambda p: tested_again(p / "run", {"flip": True}), ValueError, "is not valid JSON"),
        (lambda p: run_jobs([], how="there"), ValueError, "unknown way of working 'there'"),
        (lambda p: submit(one_job(), p, p, cluster="cloud"), ValueError, "here, local, slurm"),
        (lambda p: submit(one_job(), p, p, workers=0), ValueError, "at least 1, not 0"),
        (lambda p: submit(one_job(), p, p, workers=1.5), ValueError, "at least 1, not 1.5"),
        (
            lambda p: submit(one_job(), p, p, parameters={"colour": "red"}),
            ValueError,
            "does not take the parameters {'colour': 'red'}",
        ),
    ],
)
def test_a_mistake_is_named(call, error, keyword, place):
    with pytest.raises(error, match=re.escape(keyword)):
        call(place)


@pytest.mark.skipif(shutil.which("srun") is not None, reason="SLURM is on this machine")
def test_without_slurm(place):
    with pytest.raises(ValueError, match="SLURM's commands are not on this machine"):
        submit(one_job(), place, place, cluster="slurm")


# tables' files

ROWS = "rows:\n  - {label: A, method: bdb}\n  - {label: B, method: baseline}\n"
HEAD = "title: T\ndatasets: [market1501]\nmetrics: [mAP]\n"


@pytest.mark.parametrize(
    "text, keyword",
    [
        ("title: [", "is not valid YAML, line"),
        ("", "should be a mapping of title, datasets"),
        (HEAD, "lacks the key rows"),
        (HEAD + "rows: []", "rows is empty"),
        (HEAD + ROWS + "besst: A", "'besst' (did you mean 'best'?)"),
        (HEAD.replace("T", "7") + ROWS, "title should be text, not 7"),
        (HEAD.replace("[mAP]", "mAP") + ROWS, "metrics should be a list, not 'mAP'"),
        (HEAD.replace("mAP", "1") + ROWS, "metrics should be a list of texts, and holds 1"),
        (HEAD + "rows: [A]", "row 1 should be a mapping of label, method"),
        (HEAD + "rows: [{label: A}]", "row 1 lacks the key method"),
        (HEAD + "rows: [{label: A, reference: raw}]", "unknown reference of"),
        (
            HEAD + "rows: [{label: A, reference: raw pixels, method: bdb}]",
            "row 1: a reference is not trained, so it has nothing but a label",
        ),
        (HEAD + ROWS.replace("bdb", "bdb, lable: C"), "row 1 'lable' (did you mean 'label'?)"),
        (HEAD + ROWS.replace("bdb", "bdb, printed: true"), "printed should be a whole number"),
        (HEAD + ROWS.replace("bdb", "bdb, changed: [cut]"), "changed should be a mapping"),
        (HEAD + ROWS.replace("bdb", "bdb, test: {rerun: true}"), "row 1 'rerun'"),
        (HEAD + ROWS.replace("label: B", "label: A"), "two rows have the label 'A'"),
        (HEAD + ROWS + "best: C", "unknown row that is best in"),
        (HEAD + ROWS + "claimed: [{above: A, below: C}]", "unknown row that is claimed in"),
        (HEAD + ROWS + "claimed: [{above: A}]", "claim 1 lacks the key below"),
    ],
)
def test_a_mistake_in_a_tables_file(text, keyword, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as e:
        read_table(file)
    assert "mine.yaml" in str(e.value) and keyword in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_tables_of_a_project_of_ones_own(tmp_path, monkeypatch):
    "Its own, where it has some; else those beside the package. An empty folder is an error."
    files = table_files()
    assert {f.stem for f in files} <= set(TABLES)
    monkeypatch.setenv("REIDNB_ROOT", str(tmp_path))
    assert [f.name for f in table_files()] == [f.name for f in files]
    own = tmp_path / "data/tables"
    own.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="data/tables holds no tables"):
        table_files()
    (own / "mine.yaml").write_text(HEAD + ROWS)
    (file,) = table_files()
    assert read_table(file).name == "mine"


# the store


@pytest.mark.parametrize(
    "text, keyword",
    [
        (lambda info: "{", "is not valid JSON"),
        (
            lambda info: json.dumps(info | {"recipe": info["recipe"] | {"lr": 7.0}}),
            "by its recipe and this version it belongs in synthped-mini/bdb/",
        ),
        (lambda info: json.dumps(info | {"recipe": None}), "is not of this version"),
        (
            lambda info: json.dumps(info | {"recipe": info["recipe"] | {"new": 1}}),
            "no recipe has the field 'new'",
        ),
        (lambda info: json.dumps(info | {"metrics": {}}), "has no mAP"),
    ],
)
def test_a_broken_run_is_named_and_left_out(text, keyword, tmp_path):
    run = finish(tmp_path, recipe("bdb", "synthped-mini", **TINY))
    finish(tmp_path, recipe("bdb/drop-only", "synthped-mini", **TINY))
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(text(info))
    rows, (sentence,) = stored_runs(tmp_path)
    assert rows.method.tolist() == ["bdb/drop-only"]
    assert run.name in sentence and " is left out: " in sentence and keyword in sentence


def test_a_copied_run_is_left_out(tmp_path):
    run = finish(tmp_path, recipe("bdb", "synthped-mini", **TINY))
    shutil.copytree(run, run.with_name("copy"))
    rows, (sentence,) = stored_runs(tmp_path)
    assert len(rows) == 1 and "copy is left out: by its recipe" in sentence


# jobs, and the command


def test_missing_data_is_named(tmp_path):
    assert data_missing("synthped-mini", tmp_path) is None
    todo = jobs(table("bdb-table4"), ["market1501"], [5], "smoke")
    said = run_jobs(todo, tmp_path / "no data", tmp_path / "runs", "cpu")
    assert len(said) == 4
    for what in said.values():
        assert re.fullmatch(r"failed: data missing at .*no data/Market-1501.*", what)


@pytest.mark.parametrize(
    "words, keyword",
    [
        ("bdb-table3 --datasets synthpedmini --list", "did you mean 'synthped-mini'?"),
        ("bdb-table33", "unknown table 'bdb-table33' (did you mean 'bdb-table3'?)"),
        ("bdb-table33", "choose one of bdb-table1, bdb-table2"),
        ("bdb-table33", "protocols"),
        ("bdb-table3 --seeds 0", "at least 1"),
        ("bdb-table3 --out reports/published/tables", "only `make publish` writes there"),
    ],
)
def test_the_commands_mistakes(words, keyword):
    called = reidnb("table", *words.split(), "--device", "cpu", "--profile", "smoke")
    assert called.status == 2
    assert called.stderr.startswith("error: ") and keyword in called.stderr


def test_a_table_without_its_data_says_so(tmp_path):
    places = ["--runs", tmp_path / "runs", "--out", tmp_path / "tables", "--root", tmp_path]
    words = ["bdb-table7", "--datasets", "cub200", "--profile", "smoke", "--cluster", "here"]
    assert reidnb("table", *words, "--device", "cpu", *places).status == 1
    text = (tmp_path / "tables/bdb-table7.md").read_text()
    assert "BDB, cub200, seed 0: not run: data missing at " in text


def test_a_table_that_stays_as_it_is_is_not_named_as_written(tmp_path):
    "With runs of other settings in it, and nothing to put in its place."
    r = recipe("bdb", "synthped-mini", **TINY)
    finish(tmp_path / "runs", r)
    fields = [w for name, value in TINY.items() if name != "profile" for w in ("-p", name, value)]
    places = ["--runs", tmp_path / "runs", "--out", tmp_path / "tables"]
    words = ["bdb-table4", "--datasets", "synthped-mini", "--profile", "smoke", "--render", *places]
    written = reidnb("table", *words, *fields)
    assert written.status == 0
    assert "bdb-table4.md, from " in written.stdout
    before = (tmp_path / "tables/bdb-table4.md").read_bytes()

    kept = reidnb("table", *words, "-p", "lr", 0.5)
    assert kept.status == 0
    assert kept.stdout.strip().endswith("stays as it is: there is nothing to put in its place")
    assert (tmp_path / "tables/bdb-table4.md").read_bytes() == before


# what is published


@pytest.fixture
def yours(tmp_path, monkeypatch):
    "A finished run in a project of the reader's."
    monkeypatch.setenv("REIDNB_ROOT", str(tmp_path))
    return finish(tmp_path / STORES[0], recipe("bdb", "synthped-mini", **TINY))


@pytest.mark.parametrize(
    "changes, keyword",
    [
        (lambda info: dict(status="running"), "is not finished (status 'running')"),
        (lambda info: dict(fixture=True), "synthetic fixture"),
        (
            lambda info: dict(recipe=info["recipe"] | {"dataset": "folder"}),
            "private pictures",
        ),
    ],
)
def test_a_run_that_is_not_published(changes, keyword, yours):
    info = json.loads((yours / "run.json").read_text())
    (yours / "run.json").write_text(json.dumps(info | changes(info)))
    called = reidnb("publish", yours)
    assert called.status == 2
    assert keyword in called.stderr


def test_a_run_that_is_not_whole(yours):
    (yours / "queries.csv").unlink()
    called = reidnb("publish", yours)
    assert called.status == 2
    assert "lacks queries.csv: train it again" in called.stderr


def test_nothing_is_copied_where_one_of_two_may_not_be(yours, tmp_path):
    called = reidnb("publish", yours, tmp_path / "nowhere")
    assert called.status == 2
    assert "is no run directory" in called.stderr
    assert not (tmp_path / STORES[1]).exists()


def test_a_published_run_is_not_published_again(tmp_path, monkeypatch):
    monkeypatch.setenv("REIDNB_ROOT", str(tmp_path))
    run = finish(tmp_path / STORES[1], recipe("bdb", "synthped-mini", **TINY))
    called = reidnb("publish", run)
    assert called.status == 2
    assert "is published already" in called.stderr


def test_no_training_writes_among_the_published(mini, tmp_path, monkeypatch):
    monkeypatch.setenv("REIDNB_ROOT", str(tmp_path))
    data = load_dataset("synthped-mini", mini)
    with pytest.raises(ValueError, match="only `make publish` writes there"):
        train(recipe("bdb", "synthped-mini", **TINY), data, STORES[1], device="cpu")


@pytest.mark.parametrize(
    "words, keyword",
    [
        ("--ledger", "holds nothing to publish"),
        ("--tables bdb-table33 --figures nothing", "bdb-table33, nothing: no such table or figure"),
    ],
)
def test_there_is_no_such_thing_to_publish(words, keyword, yours):
    called = reidnb("publish", *words.split())
    assert called.status == 2
    assert keyword in called.stderr


def test_nothing_is_named_to_publish():
    called = reidnb("publish")
    assert called.status == 2
    assert "give runs, --tables, --figures" in called.stderr


def test_a_large_file_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setenv("REIDNB_ROOT", str(tmp_path))
    monkeypatch.setattr("reidnb.results.publish.LARGEST", 3)
    (tmp_path / "reports/gpu").mkdir(parents=True)
    (tmp_path / "reports/gpu/LEDGER.md").write_text("mine")
    with pytest.raises(ValueError, match="LEDGER.md: larger than"):
        publish_folder("gpu")
