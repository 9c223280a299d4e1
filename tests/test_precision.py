"""Products in full precision, whatever PyTorch's switches for TF32 say, and the switches as before."""

import threading

import pytest
import torch

from reidnb.bench.cost import peak_tflops
from reidnb.core import _product_switches, float32_products, full_precision, tf32_convolutions
from reidnb.evaluation.reranking import rerank

new_switches = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="PyTorch before 2.9 has one switch"
)


def switches():
    "What all switches read, and what the products' own read once the ones above are gone."
    read = []
    for everything in (torch.backends.fp32_precision, "none"):
        torch.backends.fp32_precision, before = everything, torch.backends.fp32_precision
        read += [
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.mkldnn.matmul.fp32_precision,
            torch.backends.cudnn.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,
        ]
        torch.backends.fp32_precision = before
    return before, read


@pytest.fixture
def untouched():
    "The switches as PyTorch comes with them, before and after."
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    torch.backends.cudnn.fp32_precision = "none"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.mkldnn.matmul.fp32_precision = "none"


def everything():
    torch.backends.fp32_precision = "tf32"


def all_of_cuda():
    torch.backends.cudnn.fp32_precision = "tf32"


def products():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def products_on_the_cpu():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def by_the_old_switch():
    torch.set_float32_matmul_precision("medium")


def not_at_all():
    pass


SETTINGS = everything, all_of_cuda, products, products_on_the_cpu, by_the_old_switch, not_at_all


@new_switches
@pytest.mark.parametrize("setting", SETTINGS)
def test_switches(setting, untouched):
    "Re-ranking and the peak of `speed` work under each, compute the same, and leave all as it was."
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 64, generator=generator)
    plain = rerank(features[:8], features[8:])
    setting()
    before = switches()
    assert torch.equal(rerank(features[:8], features[8:]), plain)
    assert peak_tflops("fp32", "cpu", seconds=0) > 0
    assert switches() == before
    if setting is by_the_old_switch:
        assert torch.get_float32_matmul_precision() == "medium"


@new_switches
def test_inside(untouched):
    everything()
    with full_precision(torch.device("cpu")):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        with float32_products("tf32"):
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@new_switches
def test_after_an_error(untouched):
    before = switches()
    with pytest.raises(ZeroDivisionError), float32_products():
        raise ZeroDivisionError
    assert switches() == before


@new_switches
def test_convolutions(untouched):
    "The old switch cannot be read once the new one was set."
    assert tf32_convolutions()
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert not tf32_convolutions()
    with pytest.raises(RuntimeError):
        torch.backends.cudnn.allow_tf32  # noqa: B018


def test_old_pytorch(monkeypatch):
    "Before 2.9 there is only the old switch."
    if hasattr(torch.backends, "fp32_precision"):
        monkeypatch.setattr(torch, "backends", type("Old", (), {}))
    before = torch.get_float32_matmul_precision()
    with float32_products("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_threads_leave_the_switches():
    "Blocks of several threads overlap, and what was set before comes back after the last one."
    newer = hasattr(torch.backends, "fp32_precision")
    before = _product_switches()
    seen = []

    def work():
        for _ in range(300):
            with full_precision(torch.device("cpu")):
                seen.append(_product_switches())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _product_switches() == before
    assert set(seen) == {("ieee", "ieee") if newer else ("highest",)}
