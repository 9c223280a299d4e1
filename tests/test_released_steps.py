"""Three training steps of the released programs, in double precision: ours and a loop written by hand.

The loop follows the programs' rules: which layer comes after which, label smoothing, batch-hard
triplets, Adam with weight decay, the stairs of the learning rate. It shares the trunk's module and
the random numbers of masks and mixing with ours, and nothing else.
"""

import copy

import pytest
import torch
from torch import nn

from reidnb.core import temporary_seed
from reidnb.methods.method import lr_at
from reidnb.methods.registry import build_model, recipe
from reidnb.parts.masks import random_block_mask, top_block_mask
from reidnb.parts.mixing import hard_mix
from reidnb.training.step import train_step

pytestmark = pytest.mark.usefixtures("tiny")

K = 6
PIDS = torch.arange(4).repeat_interleave(4)
IMAGES = torch.randn(3, 16, 3, 192, 64, generator=torch.Generator().manual_seed(2)).double()


def released(name):
    "The network and the recipe of a released program, in double precision, with necks that differ from 1 and 0."
    with temporary_seed(0):
        model = build_model(name, K, backbone="resnet18", source="released").double()
        for branch in model.branches.values():
            if isinstance(branch.neck, nn.BatchNorm1d):
                branch.neck.weight.data.uniform_(0.5, 1.5)
    r = recipe(name, "market1501", source="released", backbone="resnet18", weights=None)
    return model, r


def head(branch, v):
    "Reduction, neck and classifier of one stream: embedding and logits."
    e = v
    if not isinstance(branch.reduce, nn.Identity):
        linear, norm = branch.reduce[0], branch.reduce[1]
        e = batch_norm(v @ linear.weight.T + linear.bias, norm).relu()
    hat = e if isinstance(branch.neck, nn.Identity) else batch_norm(e, branch.neck)
    return e, hat @ branch.classify.weight.T + branch.classify.bias


def batch_norm(v, norm):
    "BatchNorm in training, by its definition."
    mean, var = v.mean(0), v.var(0, unbiased=False)
    return (v - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias


def bdb_streams(model, F, r):
    b = model.branches
    G = b["drop"].before(F)
    M = random_block_mask(G, r.options["height_ratio"], r.options["width_ratio"])
    return [
        head(b["global"], F.mean((2, 3))),
        head(b["drop"], (G * M).amax((2, 3))),
    ]


def topdb_streams(model, F, r):
    b = model.branches
    G = model.shared(F)
    A = (G**2).sum(1)
    A = A / A.flatten(1).norm(dim=1)[:, None, None]  # the program divides by the length
    scores = A.amax(2)  # the maximum of a row
    k = round(r.options["height_ratio"] * G.shape[2])
    rows = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    M = torch.ones_like(scores).scatter(1, rows, 0)[:, None, :, None]
    return [
        head(b["global"], F.mean((2, 3))),
        head(b["drop"], (G * M).amax((2, 3))),
        head(b["regularizer"], G.mean((2, 3))),
    ]


def stadb_global_streams(model, F, r):
    return [head(model.branches["global"], F.mean((2, 3)))]


def pmm_streams(model, F, r):
    b = model.branches
    G = model.shared(F)
    first = head(b["stage1"], F.mean((2, 3)))

    def next_map(f, logits):
        "Mix the clean map where the Grad-CAM of the stage before is strongest."
        score = logits.gather(1, PIDS[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, f, retain_graph=True)
        cam = (gradient.mean((2, 3), keepdim=True) * f).sum(1).relu().detach()
        return hard_mix(G, top_block_mask(cam, r.options["blocks"], r.options["block"]), PIDS)

    f2 = next_map(F, first[1])
    second = head(b["stage2"], f2.amax((2, 3)))
    f3 = next_map(f2, second[1])  # stage III starts from the clean map
    return [first, second, head(b["stage3"], f3.amax((2, 3)))]


def loss_of(e, z, r):
    "Smoothed cross-entropy and the batch-hard triplet loss of one stream."
    target = torch.full_like(z, r.label_smoothing / K)
    target[torch.arange(len(z)), PIDS] += 1 - r.label_smoothing
    identity = -(target * z.log_softmax(1)).sum(1).mean()
    losses = []
    for i in range(len(e)):
        d = ((e[i] - e).square().sum(1)).clamp(min=1e-12).sqrt()
        same = PIDS == PIDS[i]
        hardest = d[same].max() - d[~same].min()
        if r.margin is None:
            losses.append((1 + hardest.exp()).log())
        else:
            losses.append((hardest + r.margin).clamp(min=0))
    return identity + torch.stack(losses).mean()


class Adam:
    "Adam with L2 weight decay in the gradient, as PyTorch's of that time."

    def __init__(self, parameters, weight_decay):
        self.parameters = parameters
        self.weight_decay = weight_decay
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]
        self.t = 0

    def step(self, lr):
        self.t += 1
        for p, m, v in zip(self.parameters, self.m, self.v):
            if p.grad is None:
                continue
            g = p.grad + self.weight_decay * p.data
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            corrected = v.div(1 - 0.999**self.t).sqrt() + 1e-8
            p.data -= lr * (m / (1 - 0.9**self.t)) / corrected


STREAMS = {
    "bdb": bdb_streams,
    "topdb": topdb_streams,
    "stadb/global": stadb_global_streams,
    "pmm": pmm_streams,
}


def program_trains(name, parameter):
    "Whether the program's optimiser has a parameter."
    if name == "stadb/global":
        return ".neck." not in parameter  # in no group of its optimiser
    return True  # Top-DB-Net's shift of the necks, too


def before_a_norm(name):
    "Whether a bias is directly before a BatchNorm: mathematically it has no gradient."
    return name.endswith("reduce.0.bias")


@pytest.mark.parametrize("name", STREAMS)
def test_three_steps(name):
    model, r = released(name)
    twin = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    rate = lr_at(r, 1)
    assert rate == r.lr / 10  # the first stair

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate, weight_decay=r.weight_decay)
    with temporary_seed(7):
        for x in IMAGES:
            train_step(model.train(), optimizer, x, PIDS, r)

    for p in twin.parameters():
        p.requires_grad_(True)
    adam = Adam([p for n, p in twin.named_parameters() if program_trains(name, n)], r.weight_decay)
    with temporary_seed(7):
        for x in IMAGES:
            F = twin.train().feature_map(x)
            loss = sum(loss_of(e, z, r) for e, z in STREAMS[name](twin, F, r))
            for p in twin.parameters():
                p.grad = None
            loss.backward()
            adam.step(rate)

    by_hand = dict(twin.named_parameters())
    moved = set()
    for n, p in model.named_parameters():
        if before_a_norm(n):
            continue
        torch.testing.assert_close(p.data, by_hand[n].data, atol=1e-9, rtol=0, msg=n)
        if not torch.equal(p, start[n]):
            moved.add(n)
    assert moved == {n for n in by_hand if program_trains(name, n) and not before_a_norm(n)}
