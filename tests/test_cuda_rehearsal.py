"""CUDA code without a GPU: what is rehearsed, and that each planted fault is noticed.

Each check is a process of its own, as the rehearsal has to be there before torch.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from pages import ROOT

from reidnb.core import AS_TEXT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def compiler():
    "Whether the rehearsal can be built; where all is to be tested, it has to."
    missing = None
    if sys.platform != "linux":
        missing = "the rehearsal stands in for Linux's driver"
    elif shutil.which("cc") is None:
        missing = "the rehearsal needs a C compiler, cc"
    if missing and os.environ.get("CI"):
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)


@pytest.fixture(scope="session")
def check(compiler, mini, tmp_path_factory):
    "A function that does one of the program's checks; its output."

    def run(name, *words):
        folder = tmp_path_factory.mktemp("rehearsal")
        env = os.environ | {
            "TMPDIR": str(folder),
            "REIDNB_ROOT": str(folder),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(ROOT / "tests/cuda_checks.py"), name, str(mini), *words]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, **AS_TEXT)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not list(folder.iterdir()), "it leaves something behind"
        return done.stdout

    return run


@pytest.mark.parametrize("method", ["baseline", "bdb", "topdb", "stadb", "sen", "pmm"])
def test_no_step_waits(check, method):
    check("steps", method)


def test_stopped_and_resumed(check):
    check("resume")


def test_a_loss_that_becomes_nan(check):
    check("diverged")


def test_the_same_as_on_the_cpu(check):
    check("same")


def test_the_ledger(check):
    check("ledger")


WAITS = "a step waits for the GPU: "
FAULTS = {  # planted fault -> how it is named
    "index_of_the_cpu": WAITS + "aten.index.Tensor",
    "index_select_of_the_cpu": "on the same device",
    "item": WAITS + "aten._local_scalar_dense",
    "condition": WAITS + "aten._local_scalar_dense",
    "boolean_mask": WAITS + "aten.index.Tensor",
    "nonzero": WAITS + "aten.nonzero",
    "masked_select": WAITS + "aten.masked_select",
    "unique": WAITS + "aten._unique2",
    "bincount": WAITS + "aten.bincount",
    "repeat_interleave": WAITS + "aten.repeat_interleave",
    "equal": WAITS + "aten.equal",
    "to_the_cpu": WAITS + "from the GPU",
    "to_numpy": "can't convert cuda:0 device type tensor to numpy",
    "constant_sent_anew": WAITS + "to the GPU",
    "tensor_of_the_cpu": "on the same device",
    "generator_of_the_cpu": "the generator is on cpu",
    "synchronize": WAITS + "torch.cuda.synchronize",
    "batch_not_pinned": WAITS + "to the GPU",
    "batch_waited_for": WAITS + "to the GPU",
    "generator_of_the_gpu_not_restored": "not equal",
    "operator_of_both_devices": "the rehearsal cannot follow torch",
    "operator_without_cpu_form": "the rehearsal cannot follow torch",
    "internal_that_is_gone": "the rehearsal cannot follow torch",
}


@pytest.fixture(scope="session")
def found(check):
    "What each planted fault gave."
    return json.loads(check("faults").splitlines()[-1])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(found, fault):
    assert set(found) == set(FAULTS)
    assert found[fault] is not None, "it went unnoticed"
    assert FAULTS[fault] in found[fault]
