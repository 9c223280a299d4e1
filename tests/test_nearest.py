"""One mechanism below top-k, Recall@K, TAR at FAR and search: what it gives, what it holds, where it runs."""

import gc
import weakref
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reidnb.deploy.search as deploy
import reidnb.evaluation.ranking as ranking
from reidnb.deploy.export import Exported
from reidnb.deploy.search import Matcher, search
from reidnb.evaluation.metrics import METRICS, distances
from reidnb.evaluation.ranking import evaluate_ranking, recall_at_k, top_k
from reidnb.evaluation.reranking import rerank
from reidnb.evaluation.statistics import tar_at_far

Q, G, D = 20, 240, 24
SCALES = {
    torch.float32: dict(long=1e9, overflow=1e25, short=1e-22, tiny=1e-40),
    torch.float64: dict(long=1e100, overflow=1e160, short=1e-160, tiny=1e-310),
}
KINDS = "plain", "whole", "point", "far", "relu", "half zero", "long", "overflow", "short", "tiny"


def features(kind, dtype):
    "Copies, near ties, and what makes a product round most."
    generator = torch.Generator().manual_seed(0)
    qf = torch.randn(Q, D, generator=generator, dtype=torch.float64)
    gf = torch.randn(G, D, generator=generator, dtype=torch.float64)
    gf[:Q] = qf
    gf[80:160] = gf[:80]
    gf[160 : 160 + Q] = qf + 1e-8 * gf[160 : 160 + Q]
    gf[200 : 200 + Q] = qf * (1 + 1e-7)
    out = []
    for x in (qf, gf):
        if kind == "whole":
            x = x.round()
        elif kind == "point":
            x = torch.zeros_like(x)
        elif kind == "far":
            x = x + 1e6
        elif kind == "relu":
            x = (x + 2).relu()
        elif kind == "half zero":
            x = x * (x[:, :1] > 0)
        else:
            x = x * SCALES[dtype].get(kind, 1)
        out.append(x.to(dtype))
    return out


def identities():
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, n, (k,), generator=generator) for n, k in ((6, Q), (6, G), (3, Q), (3, G))
    ]


def sorted_gallery(d, q_pids, g_pids, q_camids, g_camids, k):
    "The definition: a stable sort, own images taken out."
    rows = []
    for i, order in enumerate(d.argsort(dim=1, stable=True)):
        own = (g_pids[order] == q_pids[i]) & (g_camids[order] == q_camids[i])
        kept = order[~own][:k].tolist()
        rows.append(kept + [-1] * (k - len(kept)))
    return rows


def rates(d, q_pids, g_pids, q_camids, g_camids, fars):
    "The definition: all impostors sorted."
    same = q_pids[:, None] == g_pids
    impostor = d[~same].sort().values
    genuine = d[same & (q_camids[:, None] != g_camids)]
    out = {}
    for f in fars:
        n = int(f * len(impostor) + 1e-6)
        out[f] = 1.0
        if n < len(impostor):
            out[f] = (genuine < impostor[n]).sum().item() / len(genuine)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("metric", METRICS)
def test_as_by_differences(kind, dtype, metric):
    "Top-k, Recall@K and TAR at FAR are those of the distances by differences in the same precision."
    qf, gf = features(kind, dtype)
    ids = identities()
    d = distances(qf, gf, metric)
    fars = (0, 1e-3, 0.01, 0.1, 0.5, 1)
    first = []
    for row in range(Q):
        order = d[row].argsort(stable=True)
        first.append((ids[1][order] == ids[0][row]).int().argmax().item() + 1)
    expected = {k: np.mean([r <= k for r in first]) for k in (1, 2, 5, 50)}
    for at_once in (500, 10**6):
        how = dict(metric=metric, at_once=at_once)
        for k in (1, 5, G + 3):
            assert top_k(qf, gf, *ids, k=k, **how).tolist() == sorted_gallery(d, *ids, k)
        assert recall_at_k(qf, ids[0], (1, 2, 5, 50), gf, ids[1], **how) == expected
        assert tar_at_far(qf, gf, *ids, far=fars, **how) == rates(d, *ids, fars)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad):
    qf, gf = features("plain", torch.float32)
    gf[3, 1] = bad
    ids = identities()
    for call in (
        lambda: top_k(qf, gf, *ids),
        lambda: recall_at_k(qf, ids[0], 1, gf, ids[1]),
        lambda: tar_at_far(qf, gf, *ids),
        lambda: search(qf, gf),
    ):
        with pytest.raises(ValueError, match="NaN|infinite"):
            call()


class Held(TorchDispatchMode):
    "The largest number of bytes that tensors made inside hold at a time, of one type or of all."

    def __init__(self, dtype=None):
        super().__init__()
        self.dtype, self.now, self.peak, self.known = dtype, 0, 0, set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and self.dtype in (None, x.dtype):
                self.note(x.untyped_storage())
        return out

    def note(self, storage):
        key = storage.data_ptr()
        if not key or key in self.known or not storage.nbytes():
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key, storage.nbytes())

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


def test_no_doubles_while_re_ranking(monkeypatch):
    "Re-ranking single-precision features holds no copy of them in double precision, nor do its callers."
    alive = []
    whole = ranking.reranker

    def spy(qf, gf, **how):
        gc.collect()
        objects = (x for x in gc.get_objects() if isinstance(x, torch.Tensor))
        alive.append(sum(x.dtype == torch.float64 and x.shape[-1:] == (37,) for x in objects))
        return whole(qf, gf, **how)

    monkeypatch.setattr(ranking, "reranker", spy)
    generator = torch.Generator().manual_seed(0)
    qf, gf = torch.randn(Q, 37, generator=generator), torch.randn(G, 37, generator=generator)
    for normalise in (False, True):
        evaluate_ranking(qf, gf, *identities(), rerank=True, normalise=normalise)
    assert alive == [0, 0]


def test_one_double_copy_for_centring():
    "Of wide features re-ranking makes one copy in double precision; it made two."
    qf, gf = torch.randn(Q, 4000), torch.randn(G, 4000)
    one = (Q + G) * 4000 * 8
    with Held(torch.float64) as held:
        rerank(qf, gf, at_once=1000)
    assert one <= held.peak < 1.6 * one


def test_memory_of_top_k():
    "No (q, G, D) differences: what is held is a few times the features and `at_once`."
    wide = 500
    qf, gf = torch.randn(200, wide), torch.randn(3000, wide)
    ids = [torch.randint(0, 50, (n,)) for n in (200, 3000)] + [
        torch.randint(0, 3, (n,)) for n in (200, 3000)
    ]
    at_once = 300_000
    for call in (top_k, tar_at_far):
        with Held() as held:
            call(qf, gf, *ids, at_once=at_once)
        assert held.peak < 4 * (3200 * wide + 8 * at_once) * 1.5, call


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_matcher_takes_the_gpu():
    "`Matcher` runs where every other command runs: on a CUDA GPU if there is one."
    asked = []

    def pick(name):
        asked.append(name)
        return torch.device("cuda:0")

    with patch.object(deploy, "pick_device", pick):
        assert Matcher(Mean(), (8, 4)).device == torch.device("cuda:0")
        assert deploy._device_for(Exported(lambda x: x), "auto") == torch.device("cpu")
    assert asked == ["auto"]
    assert Matcher(Mean(), (8, 4), device="cpu").device == torch.device("cpu")
    with pytest.raises(ValueError, match="an exported file runs on the CPU"):
        deploy._device_for(Exported(lambda x: x), "cuda")
