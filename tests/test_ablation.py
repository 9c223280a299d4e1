"""The papers' tables, from nothing to files: each of them, killed, shared by workers, listed, on a cluster, and with something broken in the store."""
import json, os, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path
import nbformat, numpy as np, pandas as pd, papermill, pytest, submitit
from click.testing import CliRunner
from papermill.cli import papermill as papermill_command
from PIL import Image
from reidnb.datasets import load_dataset
from reidnb.experiments import TABLES, Worker, _submitted, jobs, render, stored_runs, submit, table, write_results
from reidnb.recipes import recipe
from reidnb.training import read_run

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(steps=1, epochs=1, test_ids=5, keep_epochs=[])
PAGE = nbformat.read(ROOT/"nbs/ablation.ipynb", as_version=4)

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "SynthPed-mini, and noise in Market-1501's layout with people enough for the largest batch of any table."
    root = tmp_path_factory.mktemp("data"); load_dataset("synthped-mini", root); rng = np.random.default_rng(0)
    for folder, people, cameras in (("bounding_box_train", range(1, 65), (1, 2)), ("query", range(101, 111), (1,)), ("bounding_box_test", range(101, 111), (2, 3))):
        (root/"Market-1501-v15.09.15"/folder).mkdir(parents=True)
        for name in (f"{p:04d}_c{c}s1_{i:06d}_00.jpg" for p in people for c in cameras for i in range(2 if folder.endswith("train") else 1)):
            Image.fromarray(rng.integers(0, 255, (32, 16, 3), np.uint8)).save(root/"Market-1501-v15.09.15"/folder/name)
    return root

def page(tmp, root, **given):
    "nbs/ablation.ipynb's cells, in this process."
    given = dict(datasets="synthped-mini", profile="smoke", cluster="here", root=str(root), runs=str(tmp/"runs"), out=str(tmp/"tables"), device="cpu", overrides=TINY) | given; scope = {}
    for cell in PAGE.cells:
        if cell.cell_type != "code": continue
        exec(cell.source, scope)
        if "parameters" in cell.metadata.get("tags", ()): assert set(given) <= set(scope), "a parameter that the notebook does not have"; scope.update(given)
    return scope

def files(folder, *kinds): return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.suffix[1:] in kinds}

def test_every_table(root, tmp_path, capsys):
    "Made from nothing at one step; then nothing is trained again, and the files are the same, byte for byte."
    for name, t in TABLES.items():
        scope = page(tmp_path, root, table=name, datasets="market1501" if "market1501" in t.datasets else "synthped-mini"); found = scope["found"]
        assert scope["said"] and not [v for v in scope["said"].values() if v.startswith("failed")] or not scope["missing"], (name, scope["said"])
        assert len(found) == len(t.rows) and (found.status == "finished").all(), (name, found.status.tolist())
        text = (tmp_path/"tables"/f"{name}.md").read_text(); assert all(r.label in text for r in t.rows) and "nan" not in text, name
        assert (tmp_path/"tables"/f"{name}.png").exists() == bool(t.sweep), name
        for f in (tmp_path/"runs").rglob("*.pt"): f.unlink()                                # gigabytes
    before, runs = files(tmp_path/"tables", "md", "csv", "tex", "png"), files(tmp_path/"runs", "json", "csv"); assert len(before) == 3*len(TABLES) + sum(t.sweep is not None for t in TABLES.values())
    for n in ("market1501", "synthped-mini"):
        scope = page(tmp_path, root, table=",".join(k for k, t in TABLES.items() if ("market1501" in t.datasets) == (n == "market1501")), datasets=n); assert not scope["missing"]
    assert files(tmp_path/"tables", "md", "csv", "tex", "png") == before and files(tmp_path/"runs", "json", "csv") == runs
    with pytest.raises(ValueError, match="unknown table 'bdb-table6'.*: choose one of " + ", ".join(TABLES)): page(tmp_path, root, table="bdb-table6")

def test_every_listed_command_is_its_job(root, tmp_path, monkeypatch):
    "Papermill takes each line as it stands, and what it gives the notebook is that job's recipe and tests."
    monkeypatch.chdir(ROOT); todo = jobs(TABLES.values(), ["synthped-mini"], [0], "laptop"); seen = set()
    for j in todo:
        words = shlex.split(shlex.join(j.command(root, tmp_path/"runs"))); words[2] = str(tmp_path/"prepared.ipynb")
        done = CliRunner().invoke(papermill_command, [*words[1:], "--prepare-only"]); assert done.exit_code == 0, done.output
        cell, = (c for c in nbformat.read(words[2], as_version=4).cells if "injected-parameters" in c.metadata.get("tags", ())); given = {}; exec(cell.source, given); given.pop("__builtins__")
        assert (given.pop("root"), given.pop("out"), given.pop("references")) == (str(root), str(tmp_path/"runs"), False)
        assert tuple(given.pop("tests", ())) == j.tests and json.dumps(recipe(**given).json()) == json.dumps(j.recipe.json()); seen.add(j.command()[2])
    assert len(seen) == len(todo), "two jobs with one notebook"

def command(root, tmp, name, *more):
    return [sys.executable, "-m", "reidnb.experiments", name, "--datasets", "synthped-mini", "--profile", "smoke", "--root", str(root), "--runs", str(tmp/"runs"), "--out", str(tmp/"tables"), "--device", "cpu",
            "-p", "epochs", "1", "-p", "test_ids", "5", "-p", "keep_epochs", "[]", *map(str, more)]

def test_a_listed_command_runs(root, tmp_path):
    tmp_path = tmp_path/"a folder"; given = command(root, tmp_path, "topdb-table2", "-p", "steps", 1)
    lines = subprocess.run([*given, "--list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines(); assert len(lines) == 1
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(lines[0], shell=True, cwd=ROOT, check=True, capture_output=True, env=env); (ROOT/shlex.split(lines[0])[2]).unlink()
    assert subprocess.run([*given, "--list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""       # trained, and re-ranked too
    rows, left_out = stored_runs(tmp_path/"runs"); assert rows.status.tolist() == ["finished"] and not left_out

def test_killed_and_restarted(root, tmp_path):
    "SIGKILL to all its processes, twice: nothing half-done counts, and in the end all is as if nothing had happened."
    def whole(out): t = pd.read_csv(out/"results.csv").drop(columns="minutes"); assert t.run.is_unique and len(t) == 5; return t
    subprocess.run(command(root, tmp_path/"calm", "bdb-table2", "--cluster", "here"), cwd=ROOT, check=True, capture_output=True); runs = tmp_path/"killed/runs"
    for n, cluster in ((1, "here"), (2, "local")):                                             # runs that are finished when it comes
        p = subprocess.Popen(command(root, tmp_path/"killed", "bdb-table2", "--cluster", cluster), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); end = time.time() + 300
        state = lambda: [json.loads(f.read_text())["status"] for f in runs.rglob("run.json")]
        while not (state().count("finished") >= n and "running" in state()) and p.poll() is None and time.time() < end: time.sleep(.01)
        assert p.poll() is None; os.killpg(p.pid, signal.SIGKILL); p.wait()
        rows, left_out = stored_runs(runs); assert not left_out and "running" in set(rows.status) and rows.run.is_unique
        assert subprocess.run([*command(root, tmp_path/"killed", "bdb-table2"), "--render"], cwd=ROOT, capture_output=True).returncode == 0
        text = (tmp_path/"killed/tables/bdb-table2.md").read_text().split("Not in the table yet")[1]; assert text.count("seed 0: ") == 5 - (rows.status == "finished").sum() and "seed 0: running" in text
        assert len(pd.read_csv(tmp_path/"killed/results.csv")) == (rows.status == "finished").sum()
    subprocess.run(command(root, tmp_path/"killed", "bdb-table2", "--cluster", "here"), cwd=ROOT, check=True, capture_output=True)
    pd.testing.assert_frame_equal(whole(tmp_path/"calm"), whole(tmp_path/"killed"))
    assert files(tmp_path/"calm/tables", "md", "csv", "tex") == files(tmp_path/"killed/tables", "md", "csv", "tex")

def test_two_workers_share(root, tmp_path):
    "Each job is done by one of them, and found by the other."
    todo = jobs(table("sen-table2"), ["synthped-mini"], [0], "smoke", **TINY)
    said = [h.result() for h in _submitted(todo, root, tmp_path/"runs", "cpu", "local", 2, {})]
    assert all(sorted(s[j.recipe.directory] for s in said) == ["done", "found"] for j in todo), said
    assert all("done" in s.values() for s in said), "one of them did nothing"
    for j in todo: assert j.done(tmp_path/"runs"); (ROOT/j.command()[2]).unlink()

SLURM = {"sbatch": """file="${@: -1}"; id=4$RANDOM; export SLURM_ARRAY_JOB_ID=$id SLURM_JOB_NODELIST=here SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=1 SLURM_NNODES=1 SLURM_NODEID=0 SLURM_LOCALID=0 SLURM_PROCID=0
cp "$file" "$HERE/submitted.sh"; last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$file")
for i in $(seq 0 $last); do SLURM_ARRAY_TASK_ID=$i SLURM_JOB_ID=${id}_$i; export SLURM_ARRAY_TASK_ID SLURM_JOB_ID; (bash "$file"; touch "$HERE/ended-$i") >/dev/null 2>&1 & done; echo "Submitted batch job $id" """,
         "srun": """while [ "${1:0:1}" = - ]; do if [ "$1" = --output ] || [ "$1" = --error ]; then shift; fi; shift; done; exec "$@" """,
         "sacct": """echo "JobID|State|NodeList"; for a in "$@"; do case $a in [0-9]*) id=${a%%_*};; esac; done; for i in 0 1; do s=RUNNING; [ -f "$HERE/ended-$i" ] && s=COMPLETED; echo "${id}_$i|$s|here"; done """, "scancel": "true", "squeue": "true"}

def test_on_slurm(root, tmp_path, monkeypatch):
    "With commands in SLURM's place that start what they are given: one job of an array for each of the table's, with the parameters asked for."
    (tmp_path/"bin").mkdir(); monkeypatch.setenv("PATH", f"{tmp_path/'bin'}:{os.environ['PATH']}"); monkeypatch.setenv("HERE", str(tmp_path))
    for n, does in SLURM.items(): (tmp_path/"bin"/n).write_text(f"#!/bin/bash\n{does}\n"); (tmp_path/"bin"/n).chmod(0o755)
    todo = jobs(table("stadb-table3"), ["synthped-mini"], [0], "smoke", **TINY)
    said = submit(todo, root, tmp_path/"runs", "cpu", "slurm", 2, dict(slurm_partition="gpu", timeout_min=7, gpus_per_node=1)); text = (tmp_path/"submitted.sh").read_text()
    assert list(said.values()) == ["done", "done"] and all(j.done(tmp_path/"runs") for j in todo), said
    assert all(f"#SBATCH --{x}\n" in text for x in ("array=0-1%2", "partition=gpu", "time=7", "gpus-per-node=1")), text
    assert isinstance(Worker().checkpoint(todo, root, tmp_path, "cpu", {}), submitit.helpers.DelayedSubmission)      # preempted: queued again as it was
    for j in todo: (ROOT/j.command()[2]).unlink()

def test_what_is_broken_is_named_and_left_out(root, tmp_path):
    "A run of another version, a broken run.json, a lost figure, no data; the rest is rendered."
    given = command(root, tmp_path, "sen-table2", "-p", "steps", 1); subprocess.run([*given, "--cluster", "here"], cwd=ROOT, check=True, capture_output=True)
    runs = {r.method: tmp_path/"runs"/r.run for r in stored_runs(tmp_path/"runs")[0].itertuples()}; keep = read_run(runs["sen"])
    (runs["sen/base"]/"run.json").write_text('{"status": "fin'); info = read_run(runs["sen/bs"]); (runs["sen/bs"]/"run.json").write_text(json.dumps(info | {"recipe": info["recipe"] | {"margin": 9.}}))
    info = read_run(runs["sen/ms"]); del info["metrics"]["rank1"]; (runs["sen/ms"]/"run.json").write_text(json.dumps(info))
    done = subprocess.run([*given, "--render"], cwd=ROOT, capture_output=True, text=True); assert done.returncode == 0, done.stderr
    text = (tmp_path/"tables/sen-table2.md").read_text(); row = {l.split(" | ")[0].strip("| "): l for l in text.splitlines() if l.startswith("| ")}
    assert "Baseline, synthped-mini, seed 0: left out: " in text and "not valid JSON" in text and "+BS, synthped-mini, seed 0: left out: by its recipe and this version it belongs in " in text
    assert f"{100*info['metrics']['mAP']:.1f} |" in row["+MS"] and f"{100*keep['metrics']['rank1']:.1f} |" in row["+BS+MS"]
    assert done.stdout.count(" is left out: ") == 2 and pd.read_csv(tmp_path/"results.csv").method.tolist() == ["sen", "sen/ms"]
    info = read_run(runs["sen"]); del info["tested"]; (runs["sen"]/"run.json").write_text(json.dumps(info)); (runs["sen/ms"]/"queries.csv").write_text("a,b\n1,2\n")
    assert subprocess.run([*given, "--render"], cwd=ROOT).returncode == 0; text = (tmp_path/"tables/sen-table2.md").read_text(); assert "**not comparable** 1 of 1: +MS" in text and "not of this version" in text
    again = subprocess.run([*given, "--cluster", "here", "--datasets", " synthped-mini, dukemtmc,synthped-mini"], cwd=ROOT, capture_output=True, text=True); assert again.returncode == 1      # some failed
    text = (tmp_path/"tables/sen-table2.md").read_text(); assert text.count("dukemtmc, seed 0: not run: data missing at ") == 4 and "DukeMTMC-reID" in text
    assert text.count("synthped-mini, seed 0: left out") == 2 and row["+MS"].split(" | ")[0] in text          # what is broken is not overwritten, what is finished not made again

def test_papermill_runs_the_page(root, tmp_path):
    given = dict(table="stadb-table11", datasets="synthped-mini", profile="smoke", root=str(root), runs=str(tmp_path/"runs"), out=str(tmp_path/"tables"), device="cpu", overrides=TINY, cluster="here")
    papermill.execute_notebook(str(ROOT/"nbs/ablation.ipynb"), str(tmp_path/"executed.ipynb"), parameters=given, cwd=str(ROOT), progress_bar=False)
    text = (tmp_path/"executed.ipynb").read_text(); assert '"name": "stderr"' not in text and "image/png" in text and text.count("finished runs in the store") == 2       # the code, and what it says

def test_the_kept_tables_are_those_of_the_kept_runs(tmp_path):
    "What the README's command writes, byte for byte; and each run in results.csv is there, with those figures."
    kept = files(ROOT/"reports/tables", "md", "csv", "tex"); names = sorted({f.stem for f in kept}); assert names
    for n in names:
        text, _ = render(table(n), ["synthped-small"], [0], "laptop", out=tmp_path/"tables")
        assert "not the paper's benchmark" in text and "The paper claims" in text and "- synthped-small, mAP: **" in text
    assert files(tmp_path/"tables", "md", "csv", "tex") == kept
    write_results("reports/runs", tmp_path/"results.csv"); assert set((ROOT/"reports/results.csv").read_text().splitlines()) <= set((tmp_path/"results.csv").read_text().splitlines())
