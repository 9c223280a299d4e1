"""The papers' tables, from nothing to files.

Each of them, killed, shared by workers, listed, on a cluster, and with something broken in the
store.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import submitit
from children import fresh, tables
from commands import reidnb
from pages import ROOT, run_page
from PIL import Image

from reidnb.__main__ import parse_pairs
from reidnb.__main__ import train as train_command
from reidnb.data.load import load_dataset
from reidnb.methods.registry import recipe
from reidnb.results.jobs import Worker, _submitted, jobs, render_table, run_jobs, submit
from reidnb.results.publish import made_with
from reidnb.results.tables import TABLES, stored_runs, table, write_results
from reidnb.training.checkpoints import read_run

TINY = dict(steps=1, epochs=1, test_ids=5, checkpoint_epochs=[])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """SynthPed-mini, and noise in Market-1501's layout with people enough for the largest batch of
    any table.
    """
    root = tmp_path_factory.mktemp("data")
    load_dataset("synthped-mini", root)
    rng = np.random.default_rng(0)
    for name, people, cameras, images in (
        ("bounding_box_train", range(1, 65), (1, 2), 2),
        ("query", range(101, 111), (1,), 1),
        ("bounding_box_test", range(101, 111), (2, 3), 1),
    ):
        folder = root / "Market-1501-v15.09.15" / name
        folder.mkdir(parents=True)
        for p in people:
            for c in cameras:
                for i in range(images):
                    noise = rng.integers(0, 255, (32, 16, 3), np.uint8)
                    Image.fromarray(noise).save(folder / f"{p:04d}_c{c}s1_{i:06d}_00.jpg")
    return root


def page(tmp, root, **given):
    "nbs/ablation.ipynb, executed."
    places = dict(root=str(root), runs=str(tmp / "runs"), out=str(tmp / "tables"))
    usual = dict(
        datasets="synthped-mini", profile="smoke", cluster="here", device="cpu", overrides=TINY
    )
    return run_page("ablation", usual | places | given)


def files(folder, *kinds):
    """What is in the files of some kinds, by their names.

    Without the list of all runs, which holds times.
    """
    return {
        f.relative_to(folder): f.read_bytes()
        for f in folder.rglob("*")
        if f.suffix[1:] in kinds and f.name != "results.csv"
    }


def dataset_of(t):
    "What a table is tried on here."
    return "market1501" if "market1501" in t.datasets else "synthped-mini"


def made_twice(names, root, tmp):
    """Tables from nothing at one step.

    Then nothing is trained again, and the files are the same, byte for byte.
    """
    for name in names:
        t = TABLES[name]
        page(tmp, root, table=name, datasets=dataset_of(t))
        rows, _ = stored_runs(tmp / "runs")
        wanted = {j.recipe.directory for j in jobs(t, [dataset_of(t)], [0], "smoke", **TINY)}
        assert wanted <= set(rows.run[rows.status == "finished"]), name
        text = (tmp / "tables" / f"{name}.md").read_text()
        assert all(r.label in text for r in t.rows), name
        assert "Not in the table yet" not in text and "nan" not in text, name
        assert (tmp / "tables" / f"{name}.png").exists() == bool(t.sweep), name
    made = files(tmp / "tables", "md", "csv", "tex", "png")
    runs = files(tmp / "runs", "json", "csv")
    assert len(made) == 3 * len(names) + sum(TABLES[name].sweep is not None for name in names)
    for dataset in ("market1501", "synthped-mini"):
        here = [name for name in names if dataset_of(TABLES[name]) == dataset]
        if here:
            again = page(tmp, root, table=",".join(here), datasets=dataset)
            assert " 0 to do; " in str(again)
    assert files(tmp / "tables", "md", "csv", "tex", "png") == made
    assert files(tmp / "runs", "json", "csv") == runs


@pytest.mark.usefixtures("tiny")
def test_two_tables(root, tmp_path):
    "One of rows, one of a sweep."
    made_twice(["topdb-table2", "p-norm"], root, tmp_path)
    with pytest.raises(
        ValueError, match="unknown table 'bdb-table6'.*: choose one of " + ", ".join(TABLES)
    ):
        page(tmp_path, root, table="bdb-table6")


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_every_table(root, tmp_path):
    made_twice(list(TABLES), root, tmp_path)


def test_every_listed_command_is_its_job(root, tmp_path):
    "What each line gives the command is that job's recipe and tests."
    todo = jobs(TABLES.values(), ["synthped-mini"], [0], "laptop")
    for j in todo:
        words = shlex.split(shlex.join(j.command(root, tmp_path / "runs")))
        assert words[:2] == ["reidnb", "train"]
        given = train_command.make_context("train", words[2:]).params
        assert (given["root"], given["out"]) == (str(root), str(tmp_path / "runs"))
        assert tuple(json.loads(given["tests"])) == j.tests
        named = {k: given[k] for k in ("method", "dataset", "source", "profile", "seed")}
        r = recipe(**named, **parse_pairs(given["fields"]))
        assert json.dumps(r.json()) == json.dumps(j.recipe.json())


def words(root, tmp, name, *more, epochs=1):
    "What `reidnb table` is given."
    places = ["--root", root, "--runs", tmp / "runs", "--out", tmp / "tables"]
    small = [
        "--profile",
        "smoke",
        "-p",
        "epochs",
        epochs,
        "-p",
        "test_ids",
        5,
        "-p",
        "checkpoint_epochs",
        "[]",
    ]
    return [
        str(w)
        for w in (name, "--datasets", "synthped-mini", "--device", "cpu", *places, *small, *more)
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_a_listed_command_runs(root, tmp_path, project):
    "By the shell, in the project's folder."
    place = tmp_path / "a folder"
    given = words(root, place, "topdb-table2", "-p", "steps", 1, "--list")
    called = reidnb("table", *given)
    assert called.status == 0
    (line,) = called.stdout.splitlines()
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(line, shell=True, cwd=project, check=True, capture_output=True, env=env)
    called = reidnb("table", *given)
    assert (called.status, called.stdout) == (0, ""), "it is trained, and re-ranked too"
    rows, left_out = stored_runs(place / "runs")
    assert rows.status.tolist() == ["finished"] and not left_out


def killed(given, project, runs, finished):
    """Call the command, and end all its processes by SIGKILL as soon as so many runs are finished
    and another is running.
    """
    child = fresh.Process(target=tables, args=(given, str(project)))
    child.start()
    end = time.time() + 300
    while time.time() < end and child.is_alive():
        states = [json.loads(f.read_text())["status"] for f in runs.rglob("run.json")]
        if states.count("finished") >= finished and "running" in states:
            break
        time.sleep(0.005)
    assert child.is_alive(), "it came to its end before"
    everybody = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    for p in everybody:
        p.kill()
    psutil.wait_procs(everybody)
    child.join()
    return len(everybody)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_killed_and_restarted(root, tmp_path, project):
    """SIGKILL to all its processes, twice.

    Nothing half-done counts, and in the end all is as if nothing had happened.
    """

    def given(place, *more):
        return words(root, tmp_path / place, "bdb-table2", *more, epochs=4)

    def results(place):
        rows = pd.read_csv(tmp_path / place / "tables/results.csv")
        assert rows.run.is_unique
        return rows.drop(columns="minutes")

    runs = tmp_path / "killed/runs"
    for finished, cluster in ((0, "local"), (2, "here")):
        processes = killed(given("killed", "--cluster", cluster), project, runs, finished)
        assert processes > 2 if cluster == "local" else processes == 1
        rows, left_out = stored_runs(runs)
        assert not left_out and rows.run.is_unique
        assert "running" in set(rows.status)
        done = (rows.status == "finished").sum()
        assert done >= finished
        assert reidnb("table", *given("killed", "--render")).status == 0
        text = (
            (tmp_path / "killed/tables/bdb-table2.md").read_text().split("Not in the table yet")[1]
        )
        assert text.count("seed 0: ") == 5 - done and "seed 0: running" in text
        assert len(results("killed")) == done

    for place in ("killed", "calm"):
        assert reidnb("table", *given(place, "--cluster", "here")).status == 0
    assert len(results("calm")) == 5
    pd.testing.assert_frame_equal(results("calm"), results("killed"))
    assert files(tmp_path / "calm/tables", "md", "csv", "tex") == files(
        tmp_path / "killed/tables", "md", "csv", "tex"
    )


@pytest.mark.slow
def test_two_workers_share(root, tmp_path, project):
    "Each job is done by one of them, and found by the other."
    todo = jobs(table("stadb-table3"), ["synthped-mini"], [0], "smoke", **TINY)
    said = [h.result() for h in _submitted(todo, root, tmp_path / "runs", "cpu", "local", 2, {})]
    assert len(todo) == 2 and len(said) == 2
    for j in todo:
        assert sorted(s[j.recipe.directory] for s in said) == ["done", "found"], said
        assert j.done(tmp_path / "runs")
    assert all("done" in s.values() for s in said), "one of them did nothing"


SLURM = {
    "sbatch": r"""
        file="${@: -1}"
        id=4$RANDOM
        export SLURM_ARRAY_JOB_ID=$id SLURM_JOB_NODELIST=here SLURM_JOB_NUM_NODES=1
        export SLURM_NTASKS=1 SLURM_NNODES=1 SLURM_NODEID=0 SLURM_LOCALID=0 SLURM_PROCID=0
        cp "$file" "$HERE/submitted.sh"
        last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$file")
        for i in $(seq 0 $last); do
            export SLURM_ARRAY_TASK_ID=$i SLURM_JOB_ID=${id}_$i
            (bash "$file"; touch "$HERE/ended-$i") >/dev/null 2>&1 &
        done
        echo "Submitted batch job $id"
    """,
    "srun": r"""
        while [ "${1:0:1}" = - ]; do
            if [ "$1" = --output ] || [ "$1" = --error ]; then shift; fi
            shift
        done
        exec "$@"
    """,
    "sacct": r"""
        echo "JobID|State|NodeList"
        for a in "$@"; do
            case $a in [0-9]*) id=${a%%_*};; esac
        done
        for i in 0 1; do
            s=RUNNING
            [ -f "$HERE/ended-$i" ] && s=COMPLETED
            echo "${id}_$i|$s|here"
        done
    """,
    "scancel": "true",
    "squeue": "true",
}


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_on_slurm(root, tmp_path, project, monkeypatch):
    """With commands in SLURM's place that start what they are given.

    One job of an array for each of the table's, with the parameters asked for.
    """
    bin = tmp_path / "bin"
    bin.mkdir()
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(tmp_path))
    for name, does in SLURM.items():
        (bin / name).write_text(f"#!/bin/bash\n{does}\n")
        (bin / name).chmod(0o755)
    todo = jobs(table("stadb-table3"), ["synthped-mini"], [0], "smoke", **TINY)
    run_jobs(todo[:1], root, tmp_path / "runs", "cpu")  # the first is there already
    said = submit(
        todo,
        root,
        tmp_path / "runs",
        "cpu",
        "slurm",
        2,
        dict(slurm_partition="gpu", timeout_min=7, gpus_per_node=1),
    )
    assert list(said.values()) == ["found", "done"]
    assert all(j.done(tmp_path / "runs") for j in todo)
    text = (tmp_path / "submitted.sh").read_text()
    for asked in ("array=0-1%2", "partition=gpu", "time=7", "gpus-per-node=1"):
        assert f"#SBATCH --{asked}\n" in text, text
    again = Worker().checkpoint(todo, root, tmp_path, "cpu", {})
    assert isinstance(again, submitit.helpers.DelayedSubmission), (
        "preempted: queued again as it was"
    )


@pytest.mark.usefixtures("tiny")
def test_what_is_broken_is_named_and_left_out(root, tmp_path, project):
    "A run of another version, a broken run.json, a lost figure, no data; the rest is rendered."
    given = words(root, tmp_path, "sen-table2", "-p", "steps", 1)
    assert reidnb("table", *given, "--cluster", "here").status == 0
    runs = {
        r.method: tmp_path / "runs" / r.run for r in stored_runs(tmp_path / "runs")[0].itertuples()
    }
    keep = read_run(runs["sen"])
    (runs["sen/base"] / "run.json").write_text('{"status": "fin')
    info = read_run(runs["sen/bs"])
    (runs["sen/bs"] / "run.json").write_text(
        json.dumps(info | {"recipe": info["recipe"] | {"margin": 9.0}})
    )
    info = read_run(runs["sen/ms"])
    del info["metrics"]["rank1"]
    (runs["sen/ms"] / "run.json").write_text(json.dumps(info))

    called = reidnb("table", *given, "--render")
    assert called.status == 0
    assert called.stdout.count(" is left out: ") == 2
    text = (tmp_path / "tables/sen-table2.md").read_text()
    row = {
        line.split(" | ")[0].strip("| "): line
        for line in text.splitlines()
        if line.startswith("| ")
    }
    assert "Baseline, synthped-mini, seed 0: left out: " in text and "not valid JSON" in text
    assert (
        "+BS, synthped-mini, seed 0: left out: by its recipe and this version it belongs in "
        in text
    )
    assert f"{100 * info['metrics']['mAP']:.1f} |" in row["+MS"]
    assert f"{100 * keep['metrics']['rank1']:.1f} |" in row["+BS+MS"]
    assert pd.read_csv(tmp_path / "tables/results.csv").method.tolist() == ["sen", "sen/ms"]

    info = read_run(runs["sen"])
    del info["tested"]
    (runs["sen"] / "run.json").write_text(json.dumps(info))
    (runs["sen/ms"] / "queries.csv").write_text("a,b\n1,2\n")
    assert reidnb("table", *given, "--render").status == 0
    text = (tmp_path / "tables/sen-table2.md").read_text()
    assert "**not comparable** 1 of 1: +MS" in text and "not of this version" in text

    sets = " synthped-mini, dukemtmc,synthped-mini"
    called = reidnb("table", *given, "--cluster", "here", "--datasets", sets)
    assert called.status == 1, "some failed"
    text = (tmp_path / "tables/sen-table2.md").read_text()
    assert (
        text.count("dukemtmc, seed 0: not run: data missing at ") == 4 and "DukeMTMC-reID" in text
    )
    # what is broken is not overwritten, what is finished not made again
    assert text.count("synthped-mini, seed 0: left out") == 2
    assert row["+MS"].split(" | ")[0] in text


def test_the_published_tables_are_those_of_the_published_runs(tmp_path):
    """What `make publish` wrote, byte for byte.

    And each run in results.csv is there, with those figures.
    """
    published = ROOT / "reports/published"
    kept = files(published / "tables", "md", "csv", "tex")
    kept = {f: text for f, text in kept.items() if f.stem in TABLES}  # others are a figure's
    names = sorted({f.stem for f in kept})
    assert names
    for name in names:
        datasets, seeds, profile = made_with(kept[Path(f"{name}.md")].decode())
        text, _ = render_table(
            table(name),
            datasets,
            range(seeds),
            profile,
            "reports/published/runs",
            tmp_path / "tables",
            root=tmp_path / "no pictures",
        )
        printed = table(name).is_printed
        assert ("not the paper's benchmark" if printed else "no paper has this table") in text
        claim = "The paper claims" if printed else "Asked of"
        not_known = "Whether that holds here is not known yet"  # no pair has runs of both rows
        assert claim in text and (f"- {datasets[0]}, mAP: **" in text or not_known in text)
    assert files(tmp_path / "tables", "md", "csv", "tex") == kept
    write_results("reports/published/runs", tmp_path / "results.csv")
    assert set((published / "results.csv").read_text().splitlines()) <= set(
        (tmp_path / "results.csv").read_text().splitlines()
    )
