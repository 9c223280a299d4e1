"""What the methods' rooms refuse, and in which words: the type of the error and a keyword of its sentence."""

import re

import pytest
import torch

from reidnb.core import temporary_seed
from reidnb.methods.models import RELEASED_NAMES, build_model, load_released
from reidnb.methods.recipes import recipe, register_method
from reidnb.parts.branches import Branch

K = 4
x = torch.randn(4, 3, 192, 64, generator=torch.Generator().manual_seed(0))
pids = torch.tensor([0, 0, 3, 3])

pytestmark = pytest.mark.usefixtures("tiny")


def refuses(call, error, keyword):
    with pytest.raises(error, match=re.escape(keyword)):
        call()


def small(name, num_classes=K, **options):
    with temporary_seed(0):
        return build_model(name, num_classes, backbone="resnet18", **options)


def step(name, x=x, pids=pids, **options):
    return small(name, **options).train()(x, pids)


NETWORKS = {
    "method": (
        lambda: build_model("bdbnet", 10),
        "unknown method 'bdbnet' (did you mean 'bdb'?): choose one of baseline, bdb",
    ),
    "option": (
        lambda: build_model("bdb", 10, heigth_ratio=0.3),
        "unknown option of bdb 'heigth_ratio' (did you mean 'height_ratio'?)",
    ),
    "no options": (lambda: build_model("baseline", 10, height_ratio=0.3), "it has none"),
    "source": (lambda: build_model("bdb", 10, source="program"), "unknown source 'program'"),
    "unreleased": (
        lambda: build_model("sen", 10, source="released"),
        "does not exist for sen",
    ),
    "classes": (lambda: build_model("bdb", 0), "number of training identities, at least 1, not 0"),
    "height_ratio": (
        lambda: small("bdb", height_ratio=1.3),
        "height_ratio is 1.3: choose one in (0, 1]",
    ),
    "r1": (lambda: small("sen", r1=0.0), "r1 is 0.0: choose one in (0, 1)"),
    "blocks": (lambda: small("pmm", blocks=0), "blocks is 0"),
    "block": (lambda: small("pmm", block=3), "block is 3: choose two whole numbers"),
    "p": (lambda: small("sen", p=0), "p is 0"),
    "rho": (lambda: small("stadb", rho=2), "rho is 2: choose one in [0, 1]"),
    "alpha": (lambda: small("stadb", alpha=-1), "alpha is -1"),
    "stages": (lambda: small("pmm", stages=4), "stages is 4: choose 1, 2 or 3"),
    "neck": (
        lambda: small("stadb", neck="false"),
        "neck is True or False (with a capital), not 'false'",
    ),
    "drop": (
        lambda: small("bdb", drop="self-threshold"),
        "unknown drop 'self-threshold': choose one of batch-dropblock",
    ),
    "stream": (
        lambda: small("bdb", streams="gobal"),
        "unknown stream of bdb 'gobal' (did you mean 'global'?)",
    ),
    "no retrieval": (
        lambda: small("sen", streams="bs"),
        "none of the streams (bs) serves retrieval",
    ),
    "no choice": (lambda: small("stadb", streams="global+drop"), "rho is 1.0, not 0.25"),
}


@pytest.mark.parametrize("call, keyword", NETWORKS.values(), ids=NETWORKS)
def test_networks(call, keyword):
    refuses(call, ValueError, keyword)


PASSES = {
    "no pids": (lambda: small("pmm").train()(x), "call model(x, pids)"),
    "too few pids": (lambda: step("pmm", pids=pids[:3]), "pids are (N,) for N = 4 images"),
    "classes": (
        lambda: step("pmm", pids=pids + 4),
        "pids run from 4 to 7, but the network has classes 0 to 3",
    ),
    "one identity": (lambda: step("pmm", pids=0 * pids), "one"),
    "blocks and grid": (lambda: step("pmm", block=(5, 2)), "5"),
    "small grid": (
        lambda: step("bdb", x[:, :, :64, :32], height_ratio=0.05),
        "grid is too small",
    ),
}


@pytest.mark.parametrize("call, keyword", PASSES.values(), ids=PASSES)
def test_training_passes(call, keyword):
    refuses(call, ValueError, keyword)


def released_state():
    "BDB's weights under the program's names."
    back = [(ours, theirs) for theirs, ours in RELEASED_NAMES["bdb"].items()]
    back.sort(key=lambda pair: -len(pair[0]))
    state = {}
    for key, tensor in small("bdb").state_dict().items():
        ours, theirs = next(pair for pair in back if key.startswith(pair[0]))
        state[theirs + key.removeprefix(ours)] = tensor
    return state


def load(state=None, model="bdb", name="bdb", num_classes=K):
    load_released(small(model, num_classes), name, released_state() if state is None else state)


WEIGHTS = {
    "shape": (
        lambda: load(num_classes=5),
        ValueError,
        "'global_softmax.weight' is of shape (4, 512), but (5, 512) is wanted",
    ),
    "no place": (
        lambda: load({"head.weight": torch.zeros(2)}),
        ValueError,
        "there is no place for its tensor 'head.weight'",
    ),
    "missing": (
        lambda: load(dict(list(released_state().items())[:-2])),
        ValueError,
        "2 tensors are missing",
    ),
    "another model": (
        lambda: load(model="pmm"),
        ValueError,
        "is it build_model('bdb', K, source='released')?",
    ),
    "no file": (lambda: load("nowhere.pt"), FileNotFoundError, "nowhere.pt does not exist"),
    "method": (
        lambda: load(model="sen", name="sen"),
        ValueError,
        "unknown method with a released network 'sen'",
    ),
}


@pytest.mark.parametrize("call, error, keyword", WEIGHTS.values(), ids=WEIGHTS)
def test_released_weights(call, error, keyword):
    refuses(call, error, keyword)


def a_recipe(method="bdb", dataset="market1501", **how):
    return lambda: recipe(method, dataset, **how)


NAMES = {
    "unreleased": (a_recipe("sen", source="released"), "does not exist for sen"),
    "profile": (a_recipe(profile="phone"), "choose one of paper, laptop, smoke"),
    "another method's option": (
        a_recipe("topdb", rho=0.5),
        "unknown recipe field or option of topdb 'rho'",
    ),
    "batch": (a_recipe(batch=64), "a batch is identities × instances"),
    "misspelt": (
        a_recipe(heigth=3),
        "unknown recipe field or option of bdb 'heigth' (did you mean 'height'?)",
    ),
    "no options": (a_recipe("baseline", height_ratio=0.3), "option of baseline"),
    "backbone": (a_recipe(backbone="vit"), "unknown backbone 'vit'"),
    "schedule": (a_recipe(schedule="poly"), "unknown schedule 'poly'"),
    "fit": (a_recipe(dataset="cub200", fit="padd"), "unknown fit 'padd' (did you mean 'pad'?)"),
    "test_fit": (a_recipe(dataset="cub200", test_fit="crop"), "unknown test_fit 'crop'"),
    "metric_loss": (
        a_recipe(dataset="cub200", metric_loss="contrastive"),
        "unknown metric_loss 'contrastive': choose one of triplet, lifted, margin, histogram",
    ),
}

OPTIONS = {
    "rho": (a_recipe("stadb", rho=1.5), "rho is 1.5: choose one in [0, 1]"),
    "height_ratio": (a_recipe("topdb", height_ratio="a"), "height_ratio is 'a'"),
    "blocks": (a_recipe("pmm", blocks=0), "blocks is 0"),
    "block": (a_recipe("pmm", block=(0, 2)), "block is (0, 2)"),
    "too many blocks": (
        a_recipe("pmm", blocks=99),
        "blocks 99, block 3×2: images of 384×128 have a grid of 24×8 cells, which has 32 such blocks",
    ),
    "blocks and grid": (a_recipe("pmm", height=200), "13×8 cells, which cannot be cut"),
}

NUMBERS = {
    "epochs": (a_recipe(epochs=0), "epochs is a whole number of at least 1, not 0"),
    "epochs in words": (
        a_recipe(epochs="five"),
        "epochs is a whole number of at least 1, not 'five'",
    ),
    "cut": (a_recipe(cut=64), "cut is a share between 0 and 1, not 64"),
    "identities": (
        a_recipe(identities=1),
        "identities is a whole number of at least 2, not 1",
    ),
    "lr": (a_recipe(lr="high"), "lr is a number of at least 0, not 'high'"),
    "steps": (a_recipe(steps=0), "steps is a whole number of at least 1, not 0"),
    "flip_test": (
        a_recipe(flip_test="false"),
        "flip_test is True or False (with a capital), not 'false'",
    ),
    "cropped": (
        a_recipe(dataset="cub200", cropped=1),
        "cropped is True or False (with a capital), not 1",
    ),
    "cropped in words": (a_recipe(dataset="cub200", cropped="no"), "not 'no'"),
    "keep_epochs": (a_recipe(keep_epochs=(7, 401)), "keep_epochs are epochs from 1 to 400"),
    "cut_size": (
        a_recipe(cut=0.5, cut_size=200),
        "cut_size 200 does not fit into images of 384×128",
    ),
    "margin": (
        a_recipe(dataset="cub200", metric_loss="lifted", margin=0.2),
        "margin 0.2 belongs to the triplet loss, and the lifted loss has constants of its own",
    ),
    "accumulate": (
        a_recipe(accumulate=3),
        "accumulate 3: 32 identities cannot be cut into 3 equal parts of two or more",
    ),
    "accumulate all": (
        a_recipe(accumulate=32),
        "accumulate 32: 32 identities cannot be cut into 32 equal parts of two or more",
    ),
}

SIZES = {
    "resize": (
        a_recipe(dataset="cub200", resize=200),
        "resize is the side of the square that 224×224 is cropped from: at least 224, or 0 for no crop, not 200",
    ),
    "resize and height": (a_recipe(resize=383), "384×128 is cropped from: at least 384"),
    "resize in words": (
        a_recipe(dataset="cub200", resize="big"),
        "resize is a whole number of at least 0, not 'big'",
    ),
    "test_size": (
        a_recipe(dataset="cub200", test_size=15),
        "test_size is the side of the square at test: at least 16, or 0 for 224×224, not 15",
    ),
    "negative test_size": (
        a_recipe(dataset="cub200", test_size=-1),
        "test_size is a whole number of at least 0",
    ),
    "fit": (
        a_recipe(fit="pad"),
        "fit='pad' makes squares, and 384×128 is none: choose `resize`",
    ),
    "test_fit": (
        a_recipe(test_fit="pad"),
        "test_fit='pad' makes squares, and 384×128 is none: choose `test_size`",
    ),
}

LISTS = {
    "part": (
        a_recipe(loss_weights={"drop/ids": 1}),
        "unknown part of a loss weight 'stream/part' 'ids' (did you mean 'id'?)",
    ),
    "stream": (
        a_recipe(loss_weights={"dorp/id": 1}),
        "unknown stream of bdb in loss_weights 'dorp' (did you mean 'drop'?)",
    ),
    "centres": (
        a_recipe("sen", loss_weights={"ms/center": 0.1, "global/center": 0.1}),
        "only one stream can have a centre loss",
    ),
    "no dict": (a_recipe(loss_weights=3), "loss_weights is a dict 'stream/part' -> weight, not 3"),
    "weight": (
        a_recipe(loss_weights={"drop/id": -1}),
        "the loss weight of drop/id is a number of at least 0, not -1",
    ),
    "erase_fill": (a_recipe(erase_fill=0.5), "erase_fill is three numbers"),
}

RECIPES = [
    pytest.param(call, keyword, id=f"{kind}: {name}")
    for kind, table in dict(
        names=NAMES, options=OPTIONS, numbers=NUMBERS, sizes=SIZES, lists=LISTS
    ).items()
    for name, (call, keyword) in table.items()
]


@pytest.mark.parametrize("call, keyword", RECIPES)
def test_recipes(call, keyword):
    refuses(call, ValueError, keyword)


def only(C, K, dim):
    return [Branch("only", C, K, dim=dim)]


def no_list(C, K):
    return Branch("a", C, K)


REGISTRATIONS = {
    "taken": (lambda: register_method("bdb", only), "the name 'bdb' is taken"),
    "taken variant": (
        lambda: register_method("pmm/cutmix", only),
        "the name 'pmm/cutmix' is taken",
    ),
    "letters": (
        lambda: register_method("a/b", only),
        "letters, digits, - and _, not 'a/b'",
    ),
    "option": (
        lambda: register_method("mine", only, {"dmi": 8}),
        "cannot be made with the options {'dmi': 8}",
    ),
    "no list": (
        lambda: register_method("mine", no_list),
        "cannot be made with the options {}",
    ),
    "value": (
        lambda: register_method("mine", only, {"height_ratio": 2}),
        "height_ratio is 2: choose one in (0, 1]",
    ),
    "field's name": (
        lambda: register_method("mine", only, {"lr": 1}),
        "the option 'lr' of mine has the name of a recipe field",
    ),
    "like": (
        lambda: register_method("mine", only, {"dim": 8}, "bd"),
        "unknown method 'bd' (did you mean 'bdb'?)",
    ),
    "no field": (
        lambda: register_method("mine", only, {"dim": 8}, batch=64),
        "unknown recipe field 'batch'",
    ),
    "number": (
        lambda: register_method("mine", only, {"dim": 8}, lr=-1),
        "lr is a number of at least 0, not -1",
    ),
    "released": (
        lambda: recipe("mine", "x", source="released"),
        "does not exist for mine",
    ),
    "stream": (
        lambda: recipe("mine", "x", loss_weights={"drop/id": 1}),
        "unknown stream of mine in loss_weights 'drop': choose one of only",
    ),
}


@pytest.fixture
def mine():
    register_method("mine", only, {"dim": 16})
    yield
    register_method("mine", None)


@pytest.mark.parametrize("call, keyword", REGISTRATIONS.values(), ids=REGISTRATIONS)
def test_registration_refuses_and_changes_nothing(call, keyword, mine):
    refuses(call, ValueError, keyword)
    assert recipe("mine", "x").options == {"dim": 16}


def test_a_forgotten_method_is_unknown(mine):
    register_method("mine", None)
    refuses(lambda: recipe("mine", "x"), ValueError, "unknown method 'mine'")
