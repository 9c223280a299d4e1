"""What the methods' rooms refuse, and in which words: the type of the error and a keyword of its sentence."""

import re
from dataclasses import replace

import pytest
import torch

from reidnb.core import temporary_seed
from reidnb.methods.bdb import BDB
from reidnb.methods.method import Interval, Method, Switch, Whole, lr_at
from reidnb.methods.registry import (
    METHODS,
    SHIPPED,
    build_model,
    check_known_elsewhere,
    forget,
    load_released,
    recipe,
    released_names,
    use,
)
from reidnb.parts.branches import Branch, Network

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
    "no options": (lambda: build_model("baseline", 10, height_ratio=0.3), "choose one of init"),
    "source": (lambda: build_model("bdb", 10, source="program"), "unknown source 'program'"),
    "unreleased": (
        lambda: build_model("sen", 10, source="released"),
        "does not exist for sen",
    ),
    "classes": (lambda: build_model("bdb", 0), "number of training identities, at least 1, not 0"),
    "height_ratio": (
        lambda: small("bdb", height_ratio=1.3),
        "height_ratio is a number in (0, 1], not 1.3",
    ),
    "r1": (lambda: small("sen", r1=0.0), "r1 is a number in (0, 1), not 0.0"),
    "blocks": (lambda: small("pmm", blocks=0), "blocks is a whole number of at least 1, not 0"),
    "block": (
        lambda: small("pmm", block=3),
        "block is 2 whole numbers of at least 1: rows and columns, not 3",
    ),
    "p": (lambda: small("sen", p=0), "p is a number above 0, not 0"),
    "rho": (lambda: small("stadb", rho=2), "rho is a number in [0, 1], not 2"),
    "alpha": (lambda: small("stadb", alpha=-1), "alpha is a number in [0, 1], not -1"),
    "stages": (lambda: small("pmm", stages=4), "stages is a whole number from 1 to 3, not 4"),
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
        "unknown name in streams 'gobal' (did you mean 'global'?)",
    ),
    "no retrieval": (
        lambda: small("sen", streams="bs"),
        "none of the streams (bs) serves retrieval",
    ),
    "no choice": (lambda: small("stadb", streams="global+drop"), "rho must be 1.0, not 0.25"),
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
    back = [(ours, theirs) for theirs, ours in released_names()["bdb"].items()]
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
    "profile": (a_recipe(profile="phone"), "choose one of paper, study, laptop, smoke"),
    "another method's option": (
        a_recipe("topdb", rho=0.5),
        "unknown recipe field or option of topdb 'rho'",
    ),
    "batch": (a_recipe(batch=64), "a batch is ids_per_batch × images_per_id"),
    "misspelt": (
        a_recipe(heigth=3),
        "unknown recipe field or option of bdb 'heigth' (did you mean 'height'?)",
    ),
    "no options": (a_recipe("baseline", height_ratio=0.3), "option of baseline"),
    "backbone": (a_recipe(backbone="vit"), "unknown backbone 'vit'"),
    "schedule": (a_recipe(schedule="poly"), "unknown schedule 'poly'"),
    "for tests alone": (
        a_recipe(dataset="market1501+partial-reid"),
        "partial-reid has no training images: train on another set, such as market1501, and test",
    ),
    "fit": (a_recipe(dataset="cub200", fit="padd"), "unknown fit 'padd' (did you mean 'pad'?)"),
    "test_fit": (a_recipe(dataset="cub200", test_fit="crop"), "unknown test_fit 'crop'"),
    "metric_loss": (
        a_recipe(dataset="cub200", metric_loss="contrastive"),
        "unknown metric_loss 'contrastive': choose one of triplet, lifted, margin, histogram",
    ),
}

OPTIONS = {
    "rho": (a_recipe("stadb", rho=1.5), "rho is a number in [0, 1], not 1.5"),
    "height_ratio": (
        a_recipe("topdb", height_ratio="a"),
        "height_ratio is a number in (0, 1), not 'a'",
    ),
    "blocks": (a_recipe("pmm", blocks=0), "blocks is a whole number of at least 1, not 0"),
    "block": (
        a_recipe("pmm", block=(0, 2)),
        "block is 2 whole numbers of at least 1: rows and columns, not (0, 2)",
    ),
    "too many blocks": (
        a_recipe("pmm", blocks=99),
        "blocks 99, block 3×2: images of 384×128 have a grid of 24×8 cells, which has only 32 such blocks",
    ),
    "blocks and grid": (a_recipe("pmm", height=200), "13×8 cells, which cannot be cut"),
}

NUMBERS = {
    "epochs": (a_recipe(epochs=0), "epochs is a whole number of at least 1, not 0"),
    "epochs in words": (
        a_recipe(epochs="five"),
        "epochs is a whole number of at least 1, not 'five'",
    ),
    "cutout_prob": (a_recipe(cutout_prob=64), "cutout_prob is a number in [0, 1], not 64"),
    "ids_per_batch": (
        a_recipe(ids_per_batch=1),
        "ids_per_batch is a whole number of at least 2, not 1",
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
    "checkpoint_epochs": (
        a_recipe(checkpoint_epochs=(7, 401)),
        "checkpoint_epochs are epochs from 1 to 400",
    ),
    "checkpoint_epochs, a number": (
        a_recipe(checkpoint_epochs=1),
        "as a list such as [1] or [1, 400], not 1",
    ),
    "cutout_size": (
        a_recipe(cutout_prob=0.5, cutout_size=200),
        "cutout_size 200 does not fit into images of 384×128",
    ),
    "margin": (
        a_recipe(dataset="cub200", metric_loss="lifted", margin=0.2),
        "margin 0.2 belongs to the triplet loss, and the lifted loss has its own constants",
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


def build_only(trunk, num_classes, dim):
    return Network(trunk, [Branch("only", trunk.out_channels, num_classes, dim=dim)])


def build_no_network(trunk, num_classes):
    return [Branch("a", trunk.out_channels, num_classes)]


MINE = Method(
    name="mine",
    title="A method of a test",
    build=build_only,
    options=dict(dim=Switch(16, allowed=Whole(1))),
    recipe=BDB.recipe,
    has_program=False,
)


def using(**changes):
    return lambda: use(replace(MINE, **changes))


def without(name):
    return {k: v for k, v in BDB.recipe.items() if k != name}


RECORDS = {
    "letters": (using(name="a/b"), "letters, digits, - and _, not 'a/b'"),
    "option": (using(options=dict(dmi=8)), "cannot be built with the options {'dmi': 8}"),
    "no network": (
        using(build=build_no_network, options={}),
        "cannot be built with the options {}",
    ),
    "value": (
        using(options=dict(dim=Switch(0, allowed=Whole(1)))),
        "dim is a whole number of at least 1, not 0",
    ),
    "released value": (
        using(recipe=BDB.recipe | dict(lr=Switch(1e-3, released=-1)), has_program=True),
        "lr is a number of at least 0, not -1",
    ),
    "field's name": (
        using(options=dict(lr=1)),
        "the option 'lr' of mine has the name of a recipe field",
    ),
    "no field": (using(recipe=BDB.recipe | dict(batch=64)), "unknown recipe field of mine 'batch'"),
    "no fields": (using(recipe={}), "the recipe of mine lacks 'backbone'"),
    "a missing field": (using(recipe=without("margin")), "the recipe of mine lacks 'margin'"),
    "number": (using(recipe=BDB.recipe | dict(lr=-1)), "lr is a number of at least 0, not -1"),
    "schedule": (using(recipe=BDB.recipe | dict(schedule="flat")), "unknown schedule 'flat'"),
    "variant": (
        using(variants={"wide": dict(dmi=64)}),
        "unknown setting of mine/wide 'dmi' (did you mean 'dim'?)",
    ),
    "variant's value": (using(variants={"thin": dict(dim=0)}), "dim is a whole number"),
    "variant's folder": (using(variants={"../x": dict(dim=2)}), "a variant's name is made of"),
    "variant of all": (using(variants={"no-triplet": dict(dim=2)}), "which every method has"),
    "variant's method": (
        using(variants={"other": dict(method="bdn")}),
        "unknown method 'bdn' (did you mean 'bdb'?)",
    ),
    "profile": (using(profiles={"lap": dict(epochs=2)}), "unknown profile of mine 'lap'"),
    "profile's field": (
        using(profiles={"laptop": dict(epoch=2)}),
        "unknown setting of mine in the profile laptop 'epoch'",
    ),
    "data set's setting": (
        using(datasets={"cub200": dict(height_ration=0.5)}),
        "unknown setting of mine on cub200 'height_ration' (did you mean 'height_ratio'?)",
    ),
    "data set's value": (using(datasets={"cub200": dict(dim=0)}), "dim is a whole number"),
}
ASKED = {
    "released": (
        lambda: recipe("mine", "x", source="released"),
        "does not exist for mine",
    ),
    "stream": (
        lambda: recipe("mine", "x", loss_weights={"drop/id": 1}),
        "unknown stream of mine in loss_weights 'drop': choose one of only",
    ),
    "another process": (
        lambda: check_known_elsewhere("mine"),
        "call import_methods('my_method.py')",
    ),
}


@pytest.fixture
def mine():
    use(MINE)
    yield
    forget("mine")


@pytest.mark.parametrize("call, keyword", RECORDS.values(), ids=RECORDS)
def test_use_refuses_and_changes_nothing(call, keyword, mine):
    refuses(call, ValueError, keyword)
    assert recipe("mine", "x").options == {"dim": 16}


@pytest.mark.parametrize("call, keyword", ASKED.values(), ids=ASKED)
def test_what_a_record_cannot_be_asked_for(call, keyword, mine):
    refuses(call, ValueError, keyword)


def test_a_forgotten_method_is_unknown(mine):
    forget("mine")
    refuses(lambda: recipe("mine", "x"), ValueError, "unknown method 'mine'")


def test_a_shipped_name_gets_its_record_back():
    ratio = Switch(0.9, allowed=Interval(0, 1, "(]"))
    use(replace(BDB, options=BDB.options | dict(height_ratio=ratio)))
    assert recipe("bdb", "x").options["height_ratio"] == 0.9
    forget("bdb")
    assert recipe("bdb", "x").options["height_ratio"] == 0.3
    names = list(METHODS)
    use(BDB)
    forget("bdb")
    assert list(METHODS) == names == [method.name for method in SHIPPED]  # the order of tables


def flat(e, E, b):
    return b


def test_a_schedule_belongs_to_its_record(mine):
    ours = BDB.recipe | dict(schedule="flat")
    use(replace(MINE, recipe=ours, schedules={"flat": flat, "warmup50": flat}))
    assert lr_at(recipe("mine", "x"), 1) == 1e-3
    assert lr_at(recipe("bdb", "x"), 1) == 1e-3 / 50  # its own warm-up
    forget("mine")
    refuses(lambda: recipe("bdb", "x", schedule="flat"), ValueError, "unknown schedule 'flat'")


def test_a_build_may_look_at_its_trunk(mine):
    def build_early(trunk, num_classes, dim):
        trunk[:7]  # a ResNet up to stage 3
        return build_only(trunk, num_classes, dim)

    use(replace(MINE, build=build_early))
    assert recipe("mine", "x").options == {"dim": 16}


def test_the_hash_leaves_a_later_option_out():
    later = Switch("max", older="max", allowed=("max", "avg"))
    before = recipe("bdb", "x")
    use(replace(BDB, options=BDB.options | dict(drop_pool=later)))
    try:
        fewer = {k: v for k, v in before.options.items() if k != "drop_pool"}
        assert replace(before, options=fewer).hash == recipe("bdb", "x").hash
        assert recipe("bdb", "x", drop_pool="avg").hash != recipe("bdb", "x").hash
    finally:
        forget("bdb")
    assert recipe("bdb", "x").hash == before.hash
