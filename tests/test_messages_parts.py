"""Every slip in the parts of a network is answered by one sentence: the type of the error and one keyword of it."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from reidnb.core import (
    Stream,
    atomic_write,
    autocast,
    check_pids,
    check_rank,
    check_two_identities,
    from_root,
    may_write,
    one_of,
    pick_device,
)
from reidnb.data.images import read_picture
from reidnb.parts.activations import (
    activation_map,
    grad_cam,
    normalise_map,
    stripe_relevance,
    top_stripes,
)
from reidnb.parts.attention import ATTENTIONS, CBAM, build_attention
from reidnb.parts.backbones import build_trunk, read_weights
from reidnb.parts.branches import Branch, DropOrAttend, Erase
from reidnb.parts.losses import (
    CenterLoss,
    batch_hard_triplet,
    metric_loss,
    pairwise_distances,
    smoothed_cross_entropy,
    total_loss,
)
from reidnb.parts.masks import (
    batch_dropout_mask,
    dropblock_mask,
    dropout_mask,
    largest_mask,
    random_block_mask,
    self_threshold_mask,
    smallest_mask,
    spatial_dropout_mask,
    top_block_mask,
    top_stripe_mask,
)
from reidnb.parts.mixing import attentive_cutmix, cutmix, hard_mix, negatives

NAN = float("nan")
PIDS = torch.tensor([0, 0, 1, 1])


def raises(call, error, keyword):
    with pytest.raises(error, match=re.escape(keyword)):
        call()


# --- core

CORE = [
    (lambda: may_write("reports/published/runs"), "only `make publish` writes there"),
    (lambda: from_root(None), "None is not the path of a file or folder"),
    (lambda: from_root(True), "True is not the path of a file or folder"),
    (
        lambda: one_of("method", "bbd", ["baseline", "bdb"]),
        "unknown method 'bbd' (did you mean 'bdb'?)",
    ),
    (
        lambda: one_of("method", "x", ["baseline", "bdb"]),
        "unknown method 'x': choose one of baseline, bdb",
    ),
    (lambda: autocast(pick_device("cpu"), "fp8"), "unknown precision 'fp8'"),
    (
        lambda: check_rank(torch.zeros(2, 3)),
        "F is a tensor of shape (N, C, H, W), not of shape (2, 3)",
    ),
    (lambda: check_pids(PIDS, 3), "3 images need pids of shape (3,), not of shape (4,)"),
    (lambda: check_pids(PIDS + 3, 4, 4), "pids run from 3 to 4, but the classes are 0 to 3"),
    (lambda: check_pids(PIDS - 1, 4, 4), "pids run from -1 to 0"),
    (
        lambda: check_two_identities(PIDS[:2], "x is missing"),
        "all 2 images of the batch have one pid, so x",
    ),
]


@pytest.mark.parametrize("call, keyword", CORE)
def test_core(call, keyword):
    raises(call, ValueError, keyword)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    raises(lambda: pick_device("cuda:1"), ValueError, "sees no CUDA GPU")


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a" / "x.txt"
    with atomic_write(file) as temporary:
        temporary.write_text("first")
    with pytest.raises(RuntimeError, match="power cut"):
        with atomic_write(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power cut")
    assert file.read_text() == "first"
    assert list(file.parent.iterdir()) == [file]


def a_picture(file):
    Image.fromarray(np.zeros((4, 2, 3), np.uint8)).save(file)
    return file.read_bytes()


@pytest.mark.parametrize("length", [0, 40, None], ids=["empty", "cut short", "no picture"])
def test_a_bad_picture(tmp_path, length):
    file = tmp_path / "x.png"
    whole = a_picture(file)
    file.write_bytes(b"no picture" if length is None else whole[:length])
    raises(lambda: read_picture(file), OSError, "x.png cannot be read as an image")


def test_a_picture_that_is_too_large(tmp_path, monkeypatch):
    file = tmp_path / "x.png"
    a_picture(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    raises(lambda: read_picture(file), OSError, "(Image size (8 pixels) exceeds limit")
    raises(lambda: read_picture(file), OSError, "scale it down")


# --- backbones


def test_a_backbone_that_does_not_exist():
    raises(lambda: build_trunk("resnet19"), ValueError, "unknown backbone 'resnet19'")


def test_weights_that_do_not_exist():
    keyword = "neither 'imagenet' nor a file"
    raises(lambda: build_trunk("resnet18", weights="nowhere.pt"), FileNotFoundError, keyword)


def test_weights_of_another_network(tmp_path):
    file = tmp_path / "other.pt"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    raises(lambda: build_trunk("resnet34", weights=file), ValueError, "does not hold a resnet34")


@pytest.mark.parametrize(
    "saved, keyword",
    [
        ([1, 2], "holds a list, not a state dict"),
        ({}, "holds a dict of nothing"),
        ({"state_dict": {"epoch": 3}}, "holds a dict of 'epoch'"),
    ],
)
def test_a_file_without_weights(tmp_path, saved, keyword):
    torch.save(saved, tmp_path / "x.pt")
    raises(lambda: read_weights(tmp_path / "x.pt"), ValueError, keyword)


@pytest.mark.parametrize(
    "content, keyword",
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
        (b"PK\x03\x04 cut short", "is cut short or damaged"),
    ],
)
def test_a_download_that_went_wrong(tmp_path, content, keyword):
    file = tmp_path / "x.pt"
    file.write_bytes(content)
    raises(lambda: read_weights(file), ValueError, keyword)


# --- activations

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
F4 = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
S = F4.mean((1, 2, 3))
ACTIVATIONS = [
    (lambda: activation_map(X), "F is a tensor of shape (N, C, H, W), not of shape (2, 3, 4)"),
    (lambda: activation_map(X[None], p=0), "a number above 0, not 0"),
    (lambda: stripe_relevance(X[0]), "(N, H, W)"),
    (lambda: stripe_relevance(X, "median"), "mean, max"),
    (lambda: normalise_map(X[0]), "(N, H, W)"),
    (lambda: top_stripes(X, 1), "(N, H)"),
    (lambda: top_stripes(X[0], 5), "k is 1 to 4, the number of rows, not 5"),
    (lambda: grad_cam(F4[0], S), "(N, C, H, W)"),
    (lambda: grad_cam(F4, F4.mean((2, 3))), "one per image, not of shape (2, 3)"),
    (lambda: grad_cam(F4, S.sum()), "not of shape ()"),
    (lambda: grad_cam(F4.detach(), S), "F requires no gradient"),
    (lambda: grad_cam(F4, S.detach()), "scores have no gradient"),
    (lambda: grad_cam(F4 * 1, S), "scores do not depend on F"),
]


@pytest.mark.parametrize("call, keyword", ACTIVATIONS)
def test_activations(call, keyword):
    raises(call, ValueError, keyword)


# --- masks

F = torch.rand(2, 3, 8, 4, generator=torch.Generator().manual_seed(2))
CAM = torch.rand(3, 24, 8, generator=torch.Generator().manual_seed(3))
OPEN = [  # rules for which a ratio of 0 or 1 has no meaning, and what their ratio is called
    (top_stripe_mask, "height"),
    (smallest_mask, "erasing"),
    (largest_mask, "erasing"),
    (dropout_mask, "erasing"),
    (spatial_dropout_mask, "erasing"),
    (batch_dropout_mask, "erasing"),
]


@pytest.mark.parametrize("bad", [0, -0.3, 1.1, 30, NAN])
@pytest.mark.parametrize("rule", [random_block_mask, dropblock_mask])
def test_ratios_of_a_block(rule, bad):
    raises(
        lambda: rule(F, bad, 1.0), ValueError, f"the height ratio is {bad!r}: choose one in (0, 1]"
    )
    raises(
        lambda: rule(F, 0.3, bad), ValueError, f"the width ratio is {bad!r}: choose one in (0, 1]"
    )


@pytest.mark.parametrize("bad", [0, 1, -0.3, 1.5, 30, NAN])
@pytest.mark.parametrize("rule, what", OPEN)
def test_ratios_in_the_open_interval(rule, what, bad):
    keyword = f"the {what} ratio is {bad!r}: choose one in the open interval (0, 1)"
    raises(lambda: rule(F, bad), ValueError, keyword)


@pytest.mark.parametrize("rule, what", OPEN)
def test_features_of_another_rank(rule, what):
    keyword = "F is a tensor of shape (N, C, H, W), not of shape (3, 8, 4)"
    raises(lambda: rule(F[0], 0.3), ValueError, keyword)


@pytest.mark.parametrize("rule", [smallest_mask, largest_mask, batch_dropout_mask])
def test_a_grid_too_small_for_places(rule):
    keyword = "round(0.01 * 32) = 0 cells of 32: the grid is too small for this ratio"
    raises(lambda: rule(F, 0.01), ValueError, keyword)


@pytest.mark.parametrize("bad", [-0.1, 1.5, 80, NAN])
def test_alpha(bad):
    keyword = f"alpha is {bad!r}: choose one in [0, 1]"
    raises(lambda: self_threshold_mask(F, bad), ValueError, keyword)


@pytest.mark.parametrize("bad", [0, -1, 33, 2.5])
def test_number_of_blocks(bad):
    keyword = f"k is {bad!r}: choose 1 to 32, the number of 3x2 blocks"
    raises(lambda: top_block_mask(CAM, bad), ValueError, keyword)


MASKS = [
    (
        lambda: random_block_mask(F, 0.05, 1.0),
        "the grid is too small for this ratio, use one above 0.0625",
    ),
    (lambda: random_block_mask(F[0], 0.3, 1.0), "not of shape (3, 8, 4)"),
    (lambda: dropblock_mask(F[0], 0.3, 1.0), "(N, C, H, W)"),
    (
        lambda: top_stripe_mask(F, 0.05),
        "the grid is too small for this ratio, use one above 0.0625",
    ),
    (lambda: top_stripe_mask(F, 0.3, reduce="median"), "mean, max"),
    (lambda: self_threshold_mask(F[0], 0.8), "(N, C, H, W)"),
    (
        lambda: top_block_mask(torch.rand(1, 16, 8), 3),
        "16x8 cells cannot be cut into blocks of 3x2: "
        "the block's height must divide 16 (one of 1, 2, 4, 8, 16)",
    ),
    (lambda: top_block_mask(CAM, 3, block=(0, 2)), "blocks of 0x2"),
    (lambda: top_block_mask(CAM[None], 3), "cam is a tensor of shape (N, H, W)"),
]


@pytest.mark.parametrize("call, keyword", MASKS)
def test_masks(call, keyword):
    raises(call, ValueError, keyword)


# --- mixing

M = torch.ones(3, 1, 3, 3)
F3 = torch.rand(3, 3, 3, 3, generator=torch.Generator().manual_seed(4))
IMAGES = torch.arange(8.0)[:, None, None, None].expand(8, 3, 48, 16)
HEAT = torch.rand(8, 12, 4, generator=torch.Generator().manual_seed(5))
PAIRS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
MIXING = [
    (lambda: negatives(torch.full((8,), 3)), "all 8 images of the batch have one pid"),
    (lambda: negatives(torch.full((8,), 3)), "no image of another person to mix in"),
    (lambda: negatives(torch.tensor([5])), "sample at least two identities"),
    (
        lambda: hard_mix(F3, M, torch.tensor([1, 2])),
        "3 images need pids of shape (3,), not of shape (2,)",
    ),
    (
        lambda: hard_mix(F3, M[:, 0], torch.tensor([1, 2, 2])),
        "mask is a tensor of shape (N, C, H, W), not of shape (3, 3, 3)",
    ),
    (
        lambda: hard_mix(F3, M.repeat(1, 4, 1, 1), torch.tensor([1, 2, 2])),
        "each size is the features' or 1",
    ),
    (
        lambda: attentive_cutmix(IMAGES, torch.rand(8, 9, 4), PAIRS, 4, 2),
        "8 heat maps of 9x4 cells do not fit 8 images of 48x16 pixels",
    ),
    (
        lambda: attentive_cutmix(IMAGES, HEAT[:4], PAIRS, 4, 2),
        "4 heat maps of 12x4 cells do not fit 8 images",
    ),
    (lambda: attentive_cutmix(IMAGES, HEAT, PAIRS, 4, 9), "k is 9: choose 1 to 8"),
    (
        lambda: attentive_cutmix(IMAGES, HEAT[0], PAIRS, 4, 2),
        "heat is a tensor of shape (N, h, w)",
    ),
    (lambda: cutmix(IMAGES[0], PAIRS, 4), "x is a tensor of shape (N, C, H, W)"),
    (lambda: cutmix(IMAGES, PAIRS[:3], 4), "8 images need pids of shape (8,)"),
    (lambda: cutmix(IMAGES, PAIRS, 3), "pids run from 0 to 3, but the classes are 0 to 2"),
    (lambda: cutmix(IMAGES, PAIRS - 1, 4), "pids run from -1 to 2"),
]


@pytest.mark.parametrize("call, keyword", MIXING)
def test_mixing(call, keyword):
    raises(call, ValueError, keyword)


# --- attention

DATA = torch.rand(3, 32, 12, 4, generator=torch.Generator().manual_seed(6))
ATTENTION = [
    (lambda: CBAM(32, channel=False, spatial=False), "keep one of them"),
    (
        lambda: build_attention("cbma", 32),
        "unknown attention 'cbma' (did you mean 'cbam'?): "
        "choose one of cbam, channel, spatial, se, srm, triplet",
    ),
    (
        lambda: build_attention("srm", 32).train()(DATA[:1]),
        "batches of 2 images or more, not of 1",
    ),
]


@pytest.mark.parametrize("call, keyword", ATTENTION)
def test_attention(call, keyword):
    raises(call, ValueError, keyword)


@pytest.mark.parametrize("name", ["cbam", "channel", "se"])
def test_reduction_of_an_attention(name):
    keyword = "a reduction of 16 leaves 8 channels no hidden layer: choose one of 1 to 8"
    raises(lambda: build_attention(name, 8), ValueError, keyword)
    raises(lambda: build_attention(name, 8, reduction=0), ValueError, "a reduction of 0")


@pytest.mark.parametrize("kernel", [4, 0, -1])
@pytest.mark.parametrize("name", ["cbam", "spatial", "triplet"])
def test_kernel_of_an_attention(name, kernel):
    keyword = f"the kernel is {kernel}, but only one of an odd number"
    raises(lambda: build_attention(name, 32, kernel=kernel), ValueError, keyword)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_features_of_another_rank_for_an_attention(name):
    raises(lambda: build_attention(name, 32)(DATA[0]), ValueError, "not of shape (32, 12, 4)")


@pytest.mark.parametrize("name", ["cbam", "channel", "se", "srm"])
def test_other_channels_for_an_attention(name):
    keyword = "F has 16 channels, but this attention was built for 32"
    raises(lambda: build_attention(name, 32)(DATA[:, :16]), ValueError, keyword)


# --- branches

BRANCHES = [
    (lambda: Erase("top-stripe"), "unknown rule 'top-stripe' (did you mean 'top-stripes'?)"),
    (lambda: Erase("smallest", ratio=1), "ratio is 1: choose one in (0, 1)"),
    (lambda: Erase("dropblock", height_ratio=0), "height_ratio is 0: choose one in (0, 1]"),
    (lambda: DropOrAttend(rho=1.5), "rho is 1.5: choose one in [0, 1]"),
    (lambda: DropOrAttend(alpha=-0.1), "alpha is -0.1"),
    (lambda: Branch("x", 64, 10, 32, pool="median"), "unknown pooling 'median'"),
]


@pytest.mark.parametrize("call, keyword", BRANCHES)
def test_branches(call, keyword):
    raises(call, ValueError, keyword)


# --- losses

f, z = torch.randn(4, 8), torch.randn(4, 9)
LOSSES = [
    (
        lambda: batch_hard_triplet(f, torch.zeros(4).long()),
        "all 4 images of the batch have one pid",
    ),
    (lambda: batch_hard_triplet(f, torch.zeros(4).long()), "so the triplet loss has no negatives"),
    (
        lambda: batch_hard_triplet(f, PIDS[:3]),
        "4 images need pids of shape (4,), not of shape (3,)",
    ),
    (lambda: batch_hard_triplet(f[0], PIDS), "the embedding is a tensor of shape (N, D)"),
    (lambda: batch_hard_triplet(f, PIDS, margin=-1), "a number from 0 up, or None"),
    (lambda: pairwise_distances(f, z), "(4, 8) and (4, 9)"),
    (lambda: smoothed_cross_entropy(z, PIDS, epsilon=1.5), "epsilon is 1.5"),
    (
        lambda: smoothed_cross_entropy(z, PIDS[:3]),
        "labels of shape (3,) do not fit logits of shape (4, 9)",
    ),
    (lambda: smoothed_cross_entropy(z, torch.rand(4, 8)), "(N, K) soft labels"),
    (
        lambda: smoothed_cross_entropy(z, torch.tensor([2, 7, 1501, 3])),
        "labels run from 2 to 1501",
    ),
    (lambda: CenterLoss(5, 8)(f, PIDS[:1]), "4 images need pids of shape (4,)"),
    (lambda: CenterLoss(5, 8)(f, PIDS.float()), "torch.float32"),
    (lambda: CenterLoss(5, 8)(f, PIDS + 4), "but the classes are 0 to 4"),
    (lambda: CenterLoss(5, 16)(f, PIDS), "the centres have 16 dimensions"),
    (lambda: metric_loss(f, PIDS, "lifte"), "unknown metric loss 'lifte' (did you mean 'lifted'?)"),
    (lambda: metric_loss(f, torch.zeros(4).long()), "so the triplet loss has no negatives"),
]


@pytest.mark.parametrize("call, keyword", LOSSES)
def test_losses(call, keyword):
    raises(call, ValueError, keyword)


@pytest.mark.parametrize("name", ["lifted", "margin", "histogram"])
def test_retrieval_losses(name):
    for call, keyword in [
        (
            lambda: metric_loss(f, torch.zeros(4).long(), name),
            f"all 4 images of the batch have one pid, so the {name} loss has no negatives",
        ),
        (
            lambda: metric_loss(f, torch.arange(4), name),
            f"each of the 4 images of the batch has a pid of its own, so the {name} loss has no positives",
        ),
        (lambda: metric_loss(f, PIDS[:3], name), "4 images need pids of shape (4,)"),
        (
            lambda: metric_loss(f, PIDS, name, margin=0.3),
            f"margin=0.3 is for the triplet loss, and the {name} loss has constants",
        ),
        (
            lambda: total_loss(STREAMS, PIDS, metric_loss=name, loss_weights={f"a/{name}": 1}),
            "choose one of id, triplet, center",
        ),
    ]:
        raises(call, ValueError, keyword)


STREAMS = {"a": Stream(f, z)}
TOTAL = [
    (lambda: total_loss(STREAMS, torch.zeros(4).long()), "no negatives"),
    (
        lambda: total_loss({"a": Stream(f, None)}, PIDS, triplet_weight=0),
        "no loss to minimise",
    ),
    (lambda: total_loss(f, PIDS), "not a Tensor: call the model in training mode"),
    (lambda: total_loss(STREAMS, PIDS, metric_loss="lifed"), "unknown metric loss 'lifed'"),
    (
        lambda: total_loss(STREAMS, PIDS, loss_weights={"a/center": 0.0005}),
        "pass center=CenterLoss",
    ),
]


@pytest.mark.parametrize("call, keyword", TOTAL)
def test_the_sum_of_losses(call, keyword):
    raises(call, ValueError, keyword)


def test_a_centre_loss_of_a_stream_that_is_not_there_is_not_asked_for():
    value, _ = total_loss(STREAMS, PIDS, loss_weights={"b/center": 0.0005})
    assert math.isfinite(value)


POOLS = """
import signal
from reidnb.core import worker_map

signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command line does
for _ in range(20):
    with worker_map(2) as run:
        assert sorted(run(abs, range(-40, 0))) == list(range(1, 41))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads take the processes' place")
def test_workers_end_without_a_word():
    "A pool ends its workers by SIGTERM, which must not be a KeyboardInterrupt in them."
    words = [sys.executable, "-c", POOLS]
    child = subprocess.run(words, capture_output=True, text=True, timeout=120)  # lest it hangs
    assert (child.returncode, child.stderr) == (0, "")
