"""What a recipe holds, by method, source, data set and profile: the tables of wanted values."""

import json

import numpy as np
import pytest

from reidnb.core import project_root
from reidnb.data.batches import pk_batches
from reidnb.methods.method import GIVEN, METRIC_NAMES, SOURCES, Recipe, lr_at, settings_of
from reidnb.methods.registry import METHODS, look_up, method_names, recipe
from reidnb.parts.losses import METRIC_LOSSES
from reidnb.training.checkpoints import as_recipe


def between(a, b):
    "The fields and options in which two recipes differ."
    a, b = a.json(), b.json()
    differ = {k for k in a if k not in ("source", "options") and a[k] != b[k]}
    return differ | {k for k in a["options"] if a["options"][k] != b["options"][k]}


def pictures(r):
    "How images become pictures in training and at test."
    return r.train_shape, (r.height, r.width), r.fit, r.test_shape, r.test_fit, r.cropped


def blocks(dataset, **how):
    return recipe("pmm", dataset, **how).options["blocks"]


# Printed

CUB = (
    "images    cut to the boxes, padded to a square, 256×256, random crop 224×224, flip p 0.5\n",
    "test      cut to the boxes, padded to a square, 256×256; flip averaging off",
    "nearly all images",
    "1 · batch-hard triplet (soft margin), on",
    "100 epochs, Adam, lr 0.001 (warmup50)",
    "epochs 30, 60, 100",
)
CARS = (
    "test      cut to the boxes, 256×256; flip",
    "Random Erasing p 0.5",
    "1 · lifted structure on embeddings as they come, on every stream",
)
PERSON = (
    "resnet50, weights imagenet",
    "384×128",
    "soft margin",
    "test      flip averaging off",
)
SOP = ("images    padded to a square, 256×256, random crop 224×224", "triplet (margin 0.3)")
PROGRAM = ("Cutout 64×64 p 0.5", "label smoothing 0.1")


@pytest.mark.parametrize(
    "method, dataset, how, sentences",
    [
        ("bdb", "market1501", {}, PERSON),
        ("bdb", "market1501", {"source": "released"}, PROGRAM),
        ("bdb", "cub200", {}, CUB),
        ("bdb", "cars196", {"source": "released", "metric_loss": "lifted"}, CARS),
        ("sen", "sop", {}, SOP),
    ],
)
def test_printed(method, dataset, how, sentences):
    text = str(recipe(method, dataset, **how))
    for sentence in sentences:
        assert sentence in text


def test_what_is_not_printed():
    assert "boxes" not in str(recipe("sen", "sop"))
    cub = str(recipe("bdb", "cub200"))
    for name in METRIC_NAMES.values():  # the kind of margin comes after the name
        assert f"{name}, on every" not in cub


# Options, schedules and variants

PERSON_SETS = ("market1501", "dukemtmc", "cuhk03-labeled", "cuhk03-detected")
BLOCKS = {  # PMM's K, by data set
    "paper": ({}, [3, 6, 8, 8]),
    "released": ({"source": "released"}, [3, 3, 3, 3]),
    "laptop": ({"profile": "laptop"}, [1, 2, 2, 2]),  # 3, 6, 8 of 32 blocks become those of 8
}


@pytest.mark.parametrize("how, wanted", BLOCKS.values(), ids=BLOCKS)
def test_blocks_of_pmm(how, wanted):
    assert [blocks(d, **how) for d in PERSON_SETS] == wanted


def test_blocks_that_are_given_or_scaled():
    assert blocks("dukemtmc", blocks=5) == 5
    assert blocks("market1501", profile="smoke") == 1
    # 14×14 cells have 7·7 blocks of 2×2
    assert blocks("cub200", block=(2, 2)) == round(3 * 7 * 7 / 32)
    with pytest.raises(ValueError, match="224×224 have a grid of 14×14 cells, which cannot be cut"):
        recipe("pmm", "cub200")


def test_images_of_sen_on_a_laptop():
    r = recipe("sen", "x", profile="laptop")
    assert (r.height, r.width) == (128, 64)


@pytest.mark.parametrize("name", method_names())
def test_a_variant_is_its_method_but_for_what_it_says(name):
    base, settings = look_up(name)
    a, b = (recipe(n, "x", profile="laptop") for n in (base.name, name))
    of_the_profile = {"ids_per_batch", "lr"}
    assert between(a, b) - {"method"} == set(settings_of(settings, "paper")) - of_the_profile


def test_variants_by_hand():
    no_triplet = recipe("bdb/no-triplet", "x")
    assert no_triplet.triplet_weight == 0.0
    assert no_triplet.options == recipe("bdb", "x").options
    assert recipe("topdb/baseline", "x").batch == 64


SCHEDULES_OF = {
    "baseline": ("warmup50", 1e-3, 400),
    "bdb": ("warmup50", 1e-3, 400),
    "topdb": ("warmup50", 5e-4, 400),
    "stadb": ("ramp50", 1e-3, 600),
    "sen": ("sen", 4.5e-4, 210),
    "pmm": ("warmup50", 1e-3, 400),
}


def test_schedules_rates_and_epochs():
    found = {}
    for method in METHODS:
        r = recipe(method, "market1501")
        found[method] = (r.schedule, r.lr, r.epochs)
    assert found == SCHEDULES_OF
    sen = recipe("sen", "market1501")
    assert [lr_at(sen, e) for e in (1, 11, 210)] == pytest.approx([4.5e-5, 4.5e-4, 4.5e-6])


KEPT = [  # method, data set, overrides -> kept checkpoints
    ("bdb", "market1501", {"epochs": 40}, (12, 24, 40)),
    ("bdb", "synthped-small", {"epochs": 20, "profile": "laptop"}, (7, 13, 20)),
    ("bdb", "inshop", {}, (18, 36, 60)),
    ("sen", "cub200", {}, (52, 76, 100)),
    ("bdb", "cub200", {"epochs": 50}, (15, 30, 50)),
    ("bdb", "cub200", {"epochs": 50, "checkpoint_epochs": (7,)}, (7,)),
]


@pytest.mark.parametrize("method, dataset, how, kept", KEPT)
def test_kept_checkpoints_follow_the_epochs(method, dataset, how, kept):
    r = recipe(method, dataset, **how)
    assert r.checkpoint_epochs == kept
    if r.profile == "laptop":
        assert (r.schedule, r.lr) == ("onecycle", 6e-3)


# Retrieval sets

SIDES = {"paper": (256, 224), "laptop": (128, 112), "smoke": (64, 56)}  # before and after the crop


def every_kind():
    "Each method and variant in each source and profile."
    for name in method_names():
        for source in SOURCES if look_up(name)[0].has_program else ("paper",):
            for profile in SIDES:
                yield name, source, profile


def get(name, dataset, source, profile):
    fitting = {"block": (1, 1), "blocks": 2} if look_up(name)[0].name == "pmm" else {}
    return recipe(name, dataset, source=source, profile=profile, **fitting)


@pytest.mark.parametrize("name, source, profile", list(every_kind()))
def test_pictures_of_retrieval_sets(name, source, profile):
    "BDB §4.2.1 in numbers, and the squares of the profiles; on a person set none of it."
    large, small = SIDES[profile]
    sop_test = 224 if source == "released" and profile == "paper" else large
    square, crop = (large, large), (small, small)
    wanted = {
        "cub200": (square, crop, "pad", square, "pad", True),
        "cars196": (square, crop, "pad", square, "stretch", True),
        "inshop": (square, crop, "pad", square, "pad", False),
        "sop": (square, crop, "pad", (sop_test, sop_test), "pad", False),
    }
    for dataset, picture in wanted.items():
        assert pictures(get(name, dataset, source, profile)) == picture
    person = get(name, "market1501", source, profile)
    size = (person.height, person.width)
    assert pictures(person) == (size, size, "stretch", size, "stretch", False)
    assert person.metric_loss == "triplet"


@pytest.mark.parametrize("name, source, profile", list(every_kind()))
def test_groceries(name, source, profile):
    "Squares as for products; batches that 16 products fill, and epochs of more than two steps."
    r = get(name, "grocery", source, profile)
    large, small = SIDES[profile]
    assert pictures(r) == ((large, large), (small, small), "pad", (large, large), "pad", False)
    assert r.ids_per_batch <= 16
    assert r.epoch_over == "images"
    person = get(name, "market1501", source, profile)
    assert r.epochs == (100 if profile == "paper" else person.epochs)


@pytest.mark.parametrize("name, source, profile", list(every_kind()))
def test_training_on_retrieval_sets(name, source, profile):
    "Epochs and batches, beside those of a person set."
    person = get(name, "market1501", source, profile)
    for dataset, epochs in {"cub200": 100, "cars196": 100, "sop": 60, "inshop": 60}.items():
        r = get(name, dataset, source, profile)
        if profile == "paper":
            assert (r.epochs, r.epoch_over) == (epochs, "images")
        else:
            assert (r.epochs, r.epoch_over) == (person.epochs, "identities")
        assert (r.lr, r.schedule, r.batch) == (person.lr, person.schedule, person.batch)
        assert r.checkpoint_epochs[-1] == r.epochs
        assert r.cutout_size * 2 < SIDES[profile][1]
        assert r.ids_per_batch == person.ids_per_batch


@pytest.mark.parametrize("method", ["baseline", "bdb"])
def test_random_erasing_takes_cutouts_place_in_the_program(method):
    paper = recipe(method, "sop")
    program = recipe(method, "sop", source="released")
    person = recipe(method, "market1501", source="released")
    assert [(r.cutout_prob, r.erase_prob) for r in (paper, program, person)] == [
        (0, 0),
        (0, 0.5),
        (0.5, 0),
    ]
    assert program.test_shape == (224, 224)


def test_blocks_and_erasing_on_retrieval_sets():
    cars = recipe("bdb", "cars196", source="released", metric_loss="lifted")
    for r in (recipe("bdb", "cub200"), cars):
        assert (r.options["height_ratio"], r.options["width_ratio"]) == (0.5, 0.5)
    assert [recipe(m, "sop").erase_prob for m in ("topdb", "sen", "stadb")] == [0.5, 0.5, 0]


RATES = {  # of BDB: data set -> epoch -> rate
    "cub200": {
        1: 1e-3 * 1 / 12.5,
        12.5: 1e-3,
        13: 1e-3,
        50: 1e-3,
        51: 1e-4,
        75: 1e-4,
        76: 1e-5,
        100: 1e-5,
    },
    "sop": {1: 1e-3 / 7.5, 8: 1e-3, 30: 1e-3, 31: 1e-4, 45: 1e-4, 46: 1e-5},
}


@pytest.mark.parametrize("dataset", RATES)
def test_rates_on_retrieval_sets(dataset):
    r = recipe("bdb", dataset)
    found = {e: lr_at(r, e) for e in RATES[dataset]}
    assert found == pytest.approx(RATES[dataset])


def steps(classes, images):
    "Batches of 32 × 4 in an epoch of nearly all images, if each class had its share."
    return len(pk_batches(np.arange(images) % classes, 32, epoch_over="images"))


def test_steps_of_an_epoch():
    "By Table 6's counts, and by the sampler."
    at_most = [images // 128 for images in (5864, 8054, 25882, 59551)]
    assert at_most == [45, 62, 202, 465]
    assert (100 // 32, 98 // 32) == (3, 3)
    epochs_and_steps = zip((100, 100, 60, 60, 400), (*at_most, 23))
    assert [e * s for e, s in epochs_and_steps] == [4500, 6200, 12120, 27900, 9200]
    assert 40 <= steps(100, 5864) <= 45
    assert 55 <= steps(98, 8054) <= 62
    assert 120 <= steps(3997, 25882) <= 202


# Several sets in one name


def test_joined_person_sets_keep_what_is_common():
    both = "cuhk03-labeled+cuhk03-detected"
    assert (blocks(both), recipe("pmm", both).dataset) == (8, both)
    assert blocks("market1501+msmt17") == 3
    assert blocks("dukemtmc+market1501") == 3
    assert blocks("market1501+dukemtmc") == 3
    assert blocks("dukemtmc+dukemtmc") == 6
    joined = recipe("bdb", "market1501+msmt17")
    assert between(recipe("bdb", "market1501"), joined) == {"dataset"}
    assert joined.directory.split("/")[0] == "market1501+msmt17"


def test_joined_retrieval_sets_keep_what_is_common():
    r = recipe("bdb", "cub200+cars196")
    assert pictures(r) == ((256, 256), (224, 224), "pad", (256, 256), "stretch", True)
    assert (r.epochs, r.options["height_ratio"]) == (100, 0.5)
    r = recipe("bdb", "cub200+sop")
    assert (r.epochs, r.cropped) == (400, False)
    assert recipe("bdb", "sop+cub200", profile="laptop").train_shape == (128, 128)
    person = recipe("bdb", "market1501", profile="laptop")
    mixed = recipe("bdb", "market1501+cub200", profile="laptop")
    assert between(person, mixed) == {"dataset"}


# Hashes and directories


def test_any_difference_is_another_hash():
    r = recipe("bdb", "market1501")
    assert recipe("bdb", "market1501").directory == r.directory
    assert recipe("bdb", "market1501", seed=3).hash == r.hash
    assert recipe("bdb", "market1501", seed=3).directory.endswith("-s3")
    changed = dict(
        source="released",
        profile="laptop",
        epochs=7,
        height_ratio=0.5,
        weights=None,
        precision="bf16",
        steps=2,
        margin=0.3,
        triplet_weight=0.0,
    )
    hashes = {recipe("bdb", "market1501", **{k: v}).hash for k, v in changed.items()}
    assert len(hashes | {r.hash}) == len(changed) + 1


def test_options_in_json():
    assert json.loads(json.dumps(recipe("bdb", "market1501").json()))["options"] == {
        "streams": "global+drop",
        "drop": "batch-dropblock",
        "height_ratio": 0.3,
        "width_ratio": 1.0,
        "drop_pool": "max",
        "init": "ours",
    }


HASHES = [  # of runs that are older than the later fields
    ("bdb", {}, "d65f8218fc"),
    ("baseline", {"epochs": 15, "half_size_share": 0.34}, "429cfbf948"),
]


@pytest.mark.parametrize("method, how, wanted", HASHES)
def test_older_runs_keep_their_hash(method, how, wanted):
    assert recipe(method, "synthped-small", profile="laptop", **how).hash == wanted


def test_runs_keep_their_directory():
    "The recipe that each run holds still gives the name of its directory."
    files = list((project_root() / "reports/published/runs").rglob("run.json"))
    assert files
    for file in files:
        held = json.loads(file.read_text())["recipe"]
        again = Recipe(**held)
        assert f"{again.hash}-s{again.seed}" == file.parent.name
        given = {k: v for k, v in held.items() if k not in GIVEN} | held["options"]
        named = recipe(held["method"], held["dataset"], held["source"], held["profile"], **given)
        assert named.hash == again.hash


# A switch changes what it should and nothing else

BETWEEN_SOURCES = {  # method -> what differs between paper and released program
    "baseline": {"cutout_prob", "label_smoothing", "schedule", "flip_test", "init"},
    "bdb": {"cutout_prob", "label_smoothing", "schedule", "flip_test", "height_ratio", "init"},
    "topdb": {
        "erase_fill",
        "schedule",
        "height_ratio",
        "mask_from",
        "score",
        "test_neck",
        "neck_trains",
        "init",
        "zoom_corner",
    },
    "stadb": {
        "cutout_prob",
        "label_smoothing",
        "schedule",
        "flip_test",
        "epochs",
        "checkpoint_epochs",
        "rho",
        "inclusive",
        "attention_reduction",
        "attention_kernel",
        "shared_conv",
        "global_head",
        "neck",
        "neck_trains",
        "init",
        "test_map",
    },
    "pmm": {
        "cutout_prob",
        "label_smoothing",
        "schedule",
        "ids_per_batch",
        "stage3_from",
        "bottleneck_first",
        "height_ratio",
        "init",
    },
}


def test_every_released_program_is_compared():
    assert set(BETWEEN_SOURCES) == {m.name for m in METHODS.values() if m.has_program}


@pytest.mark.parametrize("method", BETWEEN_SOURCES)
def test_between_the_sources(method):
    paper, program = (recipe(method, "market1501", source=source) for source in SOURCES)
    assert between(paper, program) == BETWEEN_SOURCES[method]


FIELDS = dict(  # field or option -> another value than STADB's
    flip_prob=0.0,
    max_shift=2,
    cutout_prob=0.3,
    erase_prob=0.1,
    zoom_prob=0.2,
    erase_fill=(1.0, 1.0, 1.0),
    ids_per_batch=2,
    images_per_id=3,
    epoch_over="images",
    triplet_weight=0.5,
    id_weight=2.0,
    margin=0.7,
    label_smoothing=0.2,
    schedule="sen",
    lr=1.0,
    weight_decay=0.0,
    flip_test=True,
    center_lr=0.1,
    loss_weights={"local/id": 0.5},
    alpha=0.6,
    rho=0.5,
    inclusive=True,
    neck=True,
    test_map="raw",
    metric_loss="lifted",
    resize=512,
    test_size=128,
    cropped=True,
)


@pytest.mark.parametrize("name", FIELDS)
def test_an_override_changes_itself_alone(name):
    plain = recipe("stadb", "x")
    assert between(plain, recipe("stadb", "x", **{name: FIELDS[name]})) == {name}


@pytest.mark.parametrize("name", ["fit", "test_fit"])
def test_padding_changes_itself_alone(name):
    square = recipe("stadb", "x", height=128)
    assert between(square, recipe("stadb", "x", height=128, **{name: "pad"})) == {name}


def test_later_fields_and_the_hash():
    square = recipe("stadb", "x", height=128)
    others = [{"fit": "pad"}, {"test_fit": "pad"}, {"resize": 128}, {"test_size": 128}]
    others += [{"cropped": True}, *({"metric_loss": loss} for loss in METRIC_LOSSES[1:])]
    hashes = {recipe("stadb", "x", height=128, **o).hash for o in others}
    assert len(hashes | {square.hash}) == len(others) + 1
    older = dict(
        metric_loss="triplet",
        fit="stretch",
        test_fit="stretch",
        resize=0,
        test_size=0,
        cropped=False,
    )
    assert recipe("stadb", "x", **older).hash == recipe("stadb", "x").hash


MARGINS = [  # overrides of SEN's recipe -> its margin, which is the triplet loss's
    ({}, 0.3),
    ({"metric_loss": "triplet"}, 0.3),
    ({"margin": 0.5}, 0.5),
    ({"metric_loss": "histogram"}, None),
    ({"metric_loss": "margin", "margin": None}, None),
]


@pytest.mark.parametrize("how, margin", MARGINS)
def test_a_margin_goes_with_the_triplet_loss(how, margin):
    assert recipe("sen", "cub200", **how).margin == margin


def test_sizes_that_are_given():
    assert recipe("bdb", "market1501", resize=384).train_shape == (384, 384)
    assert recipe("bdb", "market1501", fit="pad", resize=384).fit == "pad"
    assert recipe("bdb", "cub200", test_size=16).test_shape == (16, 16)
    uncropped = recipe("bdb", "cub200", resize=0, test_size=0)
    assert pictures(uncropped) == ((224, 224), (224, 224), "pad", (224, 224), "pad", True)


# What the released programs set


def test_top_db_nets_own_baseline():
    paper, released = recipe("topdb/baseline", "x"), recipe("topdb/baseline", "x", "released")
    assert (paper.margin, paper.zoom_prob, paper.erase_prob, paper.epoch_over) == (
        None,
        0.0,
        0.0,
        "identities",
    )
    assert (released.margin, released.zoom_prob, released.erase_prob) == (0.3, 0.5, 0.5)
    assert released.erase_fill == (0.4914, 0.4822, 0.4465)
    assert (released.epoch_over, released.flip_test, released.cutout_prob) == ("images", False, 0.0)
    assert (released.batch, released.lr, released.label_smoothing) == (64, 5e-4, 0.1)


def test_stairs_stay_where_they_are_in_a_longer_run():
    long = recipe("stadb", "market1501", source="released", epochs=600)
    short = recipe("stadb", "market1501", source="released", epochs=40)
    assert [lr_at(long, e) for e in (49, 50, 199, 200, 299, 300, 600)] == [
        1e-4 * 10,
        1e-3,
        1e-3,
        1e-4,
        1e-4,
        1e-5,
        1e-5,
    ]
    assert lr_at(short, 25) == 1e-4  # as epoch 250 of 400


@pytest.mark.parametrize("method", ["baseline", "bdb", "stadb", "stadb/global", "pmm"])
def test_random_erasing_on_the_retrieval_sets_of_the_program(method):
    blocks = {"block": (1, 1), "blocks": 2} if method == "pmm" else {}
    r = recipe(method, "cub200", source="released", **blocks)
    assert (r.cutout_prob, r.erase_prob) == (0.0, 0.5)
    r = recipe(method, "cub200", **blocks)
    assert (r.cutout_prob, r.erase_prob) == (0.0, 0.0)


def test_a_run_that_is_older_than_an_option_is_read_with_its_older_value():
    r = recipe("topdb", "x")
    held = r.json()
    for option in ("neck_trains", "init"):
        del held["options"][option]
    again = as_recipe(held)
    assert again == r and list(again.options) == list(r.options) and again.hash == r.hash


def test_the_programs_lifted_loss_takes_embeddings_as_they_come():
    paper, released = (recipe("bdb", "cub200", s, metric_loss="lifted") for s in SOURCES)
    assert paper.lifted_unit and not released.lifted_unit
    assert "embeddings as they come" in str(released) and "as they come" not in str(paper)
    assert recipe("bdb", "cub200", "released").lifted_unit  # another loss does not look at it


def test_the_programs_zoom():
    paper, released = (recipe("topdb", "x", source) for source in SOURCES)
    assert (paper.zoom_corner, released.zoom_corner) == ("uniform", "rounded")
