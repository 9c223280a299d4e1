"""Compiled networks: which are one piece, and that a step's losses stay as they were.

The networks are traced as `compiled=True` traces them. The compiler behind it is one that needs no C++.
"""

from functools import partial
from unittest.mock import patch

import pytest
import torch

from reidnb.core import temporary_seed
from reidnb.methods.registry import recipe
from reidnb.training.step import start, train_step

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
WHOLE = {"baseline": True, "bdb": True, "topdb": True, "sen": True, "stadb": False, "pmm": False}
PIDS = torch.arange(4).repeat_interleave(2)


@pytest.fixture
def traced(monkeypatch):
    "torch.compile without its last step, which writes programs in C++; what it was asked for."
    asked = []
    compile = torch.compile

    def with_eager_kernels(f, *, options, **how):
        asked.append(options)
        return compile(f, backend="aot_eager", **how)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", with_eager_kernels)
    yield asked
    torch._dynamo.reset()


def losses(r, x, **how):
    "The losses of three steps on one batch."
    found = []
    with temporary_seed(0):
        s = start(r, 4, CPU, **how)
        s.model.train()
        step = partial(train_step, center=s.center, center_optimizer=s.center_optimizer)
        for _ in range(3):
            found.append(step(s.model, s.optimizer, x, PIDS, r)["loss"].item())
    return found


@pytest.mark.parametrize("method", WHOLE)
def test_the_same_losses(tiny, traced, capsys, method):
    r = recipe(method, "synthped-mini", profile="smoke")
    x = torch.randn(8, 3, r.height, r.width, generator=torch.Generator().manual_seed(0))
    eager = losses(r, x)
    compiled = losses(r, x, compiled=True)
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(eager), rtol=1e-3, atol=0)
    assert eager[2] != eager[0]
    said = capsys.readouterr().out
    assert ("its trunk is compiled" in said) == (not WHOLE[method]), said
    assert "it runs as it is" not in said
    assert len(traced) == 1 + (not WHOLE[method])
    assert all(options["fallback_random"] for options in traced)


@pytest.mark.parametrize("graphs", [False, True])
def test_cuda_graphs_are_asked_for(tiny, graphs):
    "PyTorch knows the options; it refuses those that it does not."
    r = recipe("sen", "synthped-mini", profile="smoke")
    with patch("torch.compile", wraps=torch.compile) as spy:
        start(r, 4, CPU, compiled=True, graphs=graphs)
    assert [call.kwargs["options"]["triton.cudagraphs"] for call in spy.mock_calls] == [graphs]
