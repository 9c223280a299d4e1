"""What goes wrong in measurements and in the GPU ledger: each has its sentence, and leaves the files whole."""

import re
import tarfile
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import reidnb.bench.cost as cost
import reidnb.bench.ledger as ledgers
import reidnb.bench.measure as measuring
from reidnb.bench.cost import (
    cost_table,
    images_per_run,
    loading_speed,
    peak_tflops,
    speed_recipe,
    speed_table,
    step_speed,
)
from reidnb.bench.ledger import (
    LedgerRow,
    Sitting,
    begin_sitting,
    evaluation,
    from_line,
    ledger_rows,
    note,
    pack,
    read_ledger,
    throughput,
    to_line,
    work_off_rows,
    write_ledger,
)
from reidnb.bench.measure import (
    EVALUATION_COLUMNS,
    ladder,
    measure_all,
    plot_growth,
    read_rows,
    slope,
    textbook_evaluate,
)
from reidnb.evaluation.ranking import evaluate_distances, evaluate_ranking

SMALL = dict(backbone="resnet18", height=64, width=32, device="cpu")


def refuses(call, error, keyword):
    "The call raises this error, and its message has the keyword."
    with pytest.raises(error, match=re.escape(keyword)):
        call()


def messages(cases):
    "Parametrise by (call, error, keyword)."
    return pytest.mark.parametrize(
        "call, error, keyword", cases, ids=[f"{i}-{case[2]}" for i, case in enumerate(cases)]
    )


# --- measuring


def growth_rows():
    rows = []
    for n in (1000, 2000, 4000):
        rows.append(dict.fromkeys(EVALUATION_COLUMNS) | dict(task="rerank", q=n, g=n, status="ok"))
    return pd.DataFrame(rows).assign(seconds=1.0, peak_gb=2.0, base_gb=1.0)


@messages(
    [
        (lambda: ladder("market"), ValueError, "unknown size 'market' (did you mean 'market1501'"),
        (lambda: slope([1, 1], [2, 3]), ValueError, "two sizes that differ"),
        (lambda: slope([1, 2], [0, 3]), ValueError, "must be positive"),
        (lambda: plot_growth(growth_rows(), "time"), ValueError, "unknown cost 'time'"),
    ]
)
def test_measure(call, error, keyword):
    refuses(call, error, keyword)


UNANSWERED = {  # q_pids, g_pids, q_camids, g_camids
    "another person": ([1], [2, 0], [0], [1, 1]),
    "the same camera": ([1], [1, 2], [0], [0, 1]),
    "one image of a distractor": ([3], [0], [0], [1]),
    "no query has one": ([1, 2], [1, 2, 3], [0, 1], [0, 1, 2]),
}


@pytest.mark.parametrize("ids", UNANSWERED.values(), ids=UNANSWERED)
def test_problems_without_an_answer(ids):
    "The textbook refuses what the package refuses."
    ids = [np.array(x) for x in ids]
    qf = np.random.default_rng(0).normal(size=(len(ids[0]), 3))
    gf = np.random.default_rng(1).normal(size=(len(ids[1]), 3))
    dist = np.linalg.norm(qf[:, None] - gf, axis=2)
    calls = [
        partial(textbook_evaluate, dist, *ids),
        partial(evaluate_distances, dist, *ids),
        partial(evaluate_ranking, qf, gf, *ids),
    ]
    for call in calls:
        refuses(call, ValueError, "has a right answer")


@pytest.mark.parametrize(
    "ended, status",
    [
        ((-9, "", ""), "killed, most likely for memory"),
        ((-15, "", ""), "killed by signal 15"),
        (
            (1, "", "Traceback\nMemoryError: Unable to allocate 35 GiB\n\n"),
            "failed: MemoryError: Unable to allocate 35 GiB",
        ),
        ((3, "", ""), "failed: exit status 3"),
        ((0, 'noise\n{"seconds": 1}\n', ""), "ok"),
    ],
)
def test_how_a_child_ended(ended, status):
    assert measuring._outcome(*ended)["status"] == status


@pytest.mark.parametrize(
    "first, later, measured_again",
    [
        (dict(status="stopped after 5 s"), dict(limit_s=5), False),
        (dict(status="stopped after 5 s"), dict(limit_s=9), True),
        (dict(status="killed, most likely for memory"), dict(limit_s=9), False),
        (dict(status="failed: x"), dict(limit_s=5), True),
        (dict(code="0ldc0de0"), dict(limit_s=5), True),
    ],
)
def test_what_is_measured_again(tmp_path, monkeypatch, first, later, measured_again):
    "The new row takes the old one's place."
    asked = []
    given = dict(first)

    def measure(task, q, g, dim, repeats, device, limit_s):
        asked.append(task)
        row = dict.fromkeys(EVALUATION_COLUMNS) | measuring._where(task, q, g, dim, device)
        return row | dict(limit_s=limit_s, status="ok", seconds=1.0) | given

    monkeypatch.setattr(measuring, "run_task", measure)
    todo = [("rerank", 20, 90), ("top-k", 10, 40)]
    measure_all(todo, tmp_path / "a.csv", limit_s=5)
    given.clear()
    asked.clear()
    measure_all(todo, tmp_path / "a.csv", **later)
    assert asked == (["rerank", "top-k"] if measured_again else [])
    assert len(read_rows(tmp_path / "a.csv")) == 2


# --- the cost of training


def too_few_classes():
    step_speed("bdb", num_classes=5, ids_per_batch=6, **SMALL)


@messages(
    [
        (
            lambda: speed_recipe("bdb", "jit"),
            ValueError,
            "unknown way 'jit': choose one of eager, fp32, compiled-fp32, bf16, compiled, graphs",
        ),
        (
            lambda: speed_recipe("bbd"),
            ValueError,
            "unknown method 'bbd' (did you mean 'bdb'?)",
        ),
        (lambda: peak_tflops("fp16", "cpu"), ValueError, "unknown precision 'fp16'"),
        (lambda: peak_tflops("tf32", "cpu"), ValueError, "choose one of fp32, bf16"),
        (lambda: step_speed("bdb", "fast"), ValueError, "unknown way 'fast'"),
        (lambda: step_speed("bdv"), ValueError, "unknown method 'bdv'"),
        (lambda: step_speed("bdb", steps=0), ValueError, "at least 1, not 0"),
        (too_few_classes, ValueError, "a batch of 6 identities needs as many"),
        (
            lambda: loading_speed(batch=64, images=32),
            ValueError,
            "32 images do not fill a batch of 64",
        ),
        (lambda: images_per_run("bdb/drop"), ValueError, "unknown method 'bdb/drop'"),
        (lambda: cost_table({"bdn": 1.0}), ValueError, "unknown method 'bdn'"),
    ]
)
@pytest.mark.usefixtures("tiny")
def test_cost(call, error, keyword):
    refuses(call, error, keyword)


def test_a_plan_with_a_way_that_does_not_exist(tmp_path, monkeypatch):
    "Nothing is started."
    monkeypatch.setattr(cost, "in_process", None)
    refuses(
        lambda: speed_table([("bdb", "fastest")], tmp_path / "t.csv", "cpu"),
        ValueError,
        "unknown way 'fastest'",
    )
    assert not list(tmp_path.iterdir())


# --- lines of the ledger

PLANNED = [LedgerRow("a", "first"), LedgerRow("b", "second"), LedgerRow("c", "third")]


@pytest.mark.parametrize(
    "line", ["| [y] | a | b | c | | | |", "| [x] | a | b |", "| [x] | a | b | c | soon | | |"]
)
def test_lines_that_are_no_rows(line):
    refuses(lambda: from_line(line), ValueError, "is no row of the ledger")


@pytest.mark.parametrize(
    "change, keyword",
    [
        (lambda text: text + "\n" + text, "LEDGER.md has more than one table"),
        (lambda text: text + to_line(PLANNED[0]), "LEDGER.md has a row twice"),
        (
            lambda text: text.replace("| [ ]", "| [yes]", 1),
            "LEDGER.md, line 10: '| [yes] | a",
        ),
    ],
)
def test_ledgers_that_cannot_be_read(tmp_path, change, keyword):
    file = tmp_path / "LEDGER.md"
    write_ledger(file, *read_ledger(file, PLANNED))
    file.write_text(change(file.read_text()))
    refuses(lambda: read_ledger(file, PLANNED), ValueError, keyword)


# --- a sitting


@pytest.fixture
def sit(tmp_path):
    "Return a function that begins a sitting in the test's folder."

    def begin(minutes=float("inf"), tiny=True):
        return Sitting(
            device=torch.device("cpu"),
            out=tmp_path,
            state=tmp_path / "state",
            data=tmp_path / "data",
            ledger=tmp_path / "LEDGER.md",
            minutes=minutes,
            tiny=tiny,
        )

    return begin


def row_of(s, name):
    return next(r for r in s.read()[1] if r.name == name)


NAMES = list(ledger_rows(True))


@pytest.fixture
def told():
    "What a row says on its way."
    return []


def test_a_way_that_fails_does_not_keep_the_others_from_being_measured(sit, monkeypatch, told):
    def one_way(plan, *args, **options):
        way = plan[0][1]
        speeds = dict(images_per_s=1234.5, tflops=30.0, peak_tflops=40.0, notice="")
        status = "killed" if way == "eager" else "ok"
        return pd.DataFrame([dict(speeds, way=way, status=status)])

    monkeypatch.setattr(ledgers, "speed_table", one_way)
    s = sit()
    refuses(
        lambda: throughput(s, row_of(s, "throughput bdb"), "bdb", told.append),
        RuntimeError,
        "eager: killed; images/s: fp32 1,234",
    )
    assert told == ["1 of 2 measured", "2 of 2 measured"]


@pytest.mark.parametrize("mark, again", [(" ", True), ("!", True), ("~", False)])
def test_what_a_half_done_row_knows_is_not_measured_again(sit, monkeypatch, told, mark, again):
    asked = []

    def one_way(plan, *args, **options):
        asked.append(options["again"])
        speeds = dict(images_per_s=1.0, tflops=3.0, peak_tflops=4.0, notice="")
        return pd.DataFrame([dict(speeds, way=plan[0][1], status="ok")])

    monkeypatch.setattr(ledgers, "speed_table", one_way)
    s = sit()
    throughput(s, replace(row_of(s, "throughput bdb"), mark=mark), "bdb", told.append)
    assert asked == [again, again]


def test_tasks_that_take_too_long(sit, monkeypatch, told):
    "Stopped by the sitting's end, the row stays open. Stopped by the limit, it has failed."
    limits = []

    def late(plan, path, device, again, limit_s, **options):
        limits.append(limit_s)
        return pd.DataFrame([dict(task=plan[0][0], status=f"stopped after {limit_s:g} s")])

    monkeypatch.setattr(ledgers, "measure_all", late)
    s = sit(minutes=5, tiny=False)
    row = row_of(s, "evaluation market1501")
    assert evaluation(s, row, (18, 44), told.append) is None
    assert not told
    assert 290 < limits[0] <= 300
    s.minutes = 100
    refuses(
        lambda: evaluation(s, row, (18, 44), told.append),
        RuntimeError,
        "evaluate-distances: stopped after 600 s; evaluate-features: stopped",
    )
    assert len(told) == 8


@pytest.fixture
def go(sit, monkeypatch):
    """Return a function that does rows, with other work in place of the real.

    It takes a pattern and what becomes of rows: an error, or "stopped". It returns the rows that
    were begun, and how many of them failed.
    """

    def begin(pattern="*", acts=()):
        acts = dict(acts)
        did = []

        def act(s, row, x, tell):
            did.append(row.name)
            how = acts.get(row.name, "fine")
            if isinstance(how, BaseException):
                raise how
            tell("1 of 2")
            return None if how == "stopped" else how

        monkeypatch.setattr(ledgers, "WORK", dict.fromkeys(ledgers.WORK, act))
        return work_off_rows(sit(), pattern), did

    return begin


def marks(sit):
    return "".join(r.mark for r in sit().read()[1])


def test_a_pattern_that_fits_no_row(go):
    refuses(lambda: go("bbd*"), ValueError, "no row is called 'bbd*'; there are throughput bdb, ")


def test_two_rows_that_fail_alike_end_the_sitting(go, sit, capsys):
    assert go(acts=dict.fromkeys(NAMES, ValueError("no weights"))) == (2, NAMES[:2])
    assert "same reason" in capsys.readouterr().out
    assert marks(sit) == "!!   "


def test_rows_that_fail_for_reasons_of_their_own_do_not(go, sit):
    assert go(acts={name: ValueError(name) for name in NAMES}) == (5, NAMES)
    assert marks(sit) == "!!!!!"


def test_what_has_failed_comes_last(go, sit):
    go("[te]*", {NAMES[0]: ValueError("ill")})
    assert marks(sit) == "!x   "
    assert go() == (0, [*NAMES[2:], NAMES[0]])
    assert marks(sit) == "xxxxx"


def test_ctrl_c_ends_the_sitting(go, sit):
    with pytest.raises(KeyboardInterrupt):
        go(acts={NAMES[1]: KeyboardInterrupt()})
    assert marks(sit) == "x    "


def test_what_another_card_has_begun_is_left_alone(go, sit, capsys):
    "But a training whose state is here is gone on with, and its line names both cards."
    s = sit()
    s.since = time.monotonic()
    for name in ("throughput bdb", "bdb s1"):
        note(s, row_of(s, name), "~", "1 of 3")
    s.ledger.write_text(s.ledger.read_text().replace(s.where, "Card A, torch 1"))
    begun = s.read()[1][0]
    assert begun.where == "Card A, torch 1"
    assert go("*b*1") == (0, [])
    assert go("[te]*") == (0, ["evaluation mini"])
    assert row_of(s, "throughput bdb") == begun
    said = capsys.readouterr().out
    assert "half done on another card (Card A, torch 1): skipped" in said

    state = s.state / s.plan()["bdb s1"][1].directory
    state.mkdir(parents=True)
    (state / "last.pt").touch()
    assert go("bdb s1") == (0, ["bdb s1"])
    assert row_of(s, "bdb s1").where == f"Card A, torch 1; then {s.where}"


def test_states_that_cannot_be_packed(sit, tmp_path):
    s = sit()
    file = tmp_path / "none.tar"
    refuses(lambda: pack(s, file), ValueError, "there is nothing to pack")
    state = s.state / s.plan()["bdb s1"][1].directory
    state.mkdir(parents=True)
    (state / "last.pt").touch()
    (state / "run.json").write_text('{"status": "finished"}')
    refuses(lambda: pack(s, file), ValueError, "there is nothing to pack")
    assert not file.exists()
    (state / "run.json").write_text('{"status": "running"}')
    pack(s, file)
    with tarfile.open(file) as tar:
        assert len(tar.getnames()) == 2


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_sitting_without_a_gpu(tmp_path, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuses(
        lambda: begin_sitting(out=tmp_path / "real", device=device),
        ValueError,
        "sees no CUDA GPU, so nothing was done",
    )
    assert not (tmp_path / "real").exists()
