"""The six networks and their variants, on a small trunk: sizes, gradients, and what each switch changes."""

import pytest
import torch

from reidnb.core import temporary_seed
from reidnb.methods.registry import (
    METHODS,
    build_model,
    load_released,
    look_up,
    method_names,
    released_names,
)
from reidnb.parts.activations import grad_cam
from reidnb.parts.masks import top_block_mask
from reidnb.parts.mixing import hard_mix

pytestmark = pytest.mark.usefixtures("tiny")

K = 4
x = torch.randn(4, 3, 192, 64, generator=torch.Generator().manual_seed(0))
pids = torch.tensor([0, 0, 3, 3])


def small(name, **options):
    with temporary_seed(0):
        return build_model(name, K, backbone="resnet18", **options)


DIMS = {  # length of the embedding with 512 channels; a variant that is not here has its method's
    "baseline": 512,
    "bdb": 1536,
    "topdb": 1536,
    "stadb": 1536,
    "sen": 1024,
    "pmm": 1536,
    "bdb/drop-only": 1024,
    "topdb/no-drop": 1024,
    "topdb/no-reg": 1536,
    "stadb/global": 512,
    "stadb/drop": 1024,
    "stadb/attention": 1024,
    "stadb/global+drop": 1536,
    "sen/base": 512,
    "sen/bs": 512,
    "sen/ms": 1024,
    "pmm/1-stage": 512,
    "pmm/2-stages": 1024,
}


@pytest.mark.parametrize("name", method_names())
def test_streams_and_embedding(name):
    method, _ = look_up(name)
    model = small(name).train()
    streams = model(x, pids)
    for stream, s in streams.items():
        assert s.name == stream
        assert s.embedding.shape == (4, model.branches[stream].dim)
        assert s.logits.shape == (4, K)

    e = model.eval()(x)
    with torch.no_grad():
        by_hand = model.embedding(model.feature_map(x))
    assert torch.equal(model(x), e) and torch.equal(e, by_hand)
    assert e.std() > 0 and e.shape == (4, model.dim)
    assert model.dim == DIMS.get(name, DIMS[method.name])


def part_of(name):
    "The top-level part that a parameter belongs to; a stream of the branches."
    first, second = name.split(".")[:2]
    return f"{first}.{second}" if first == "branches" else first


def has_gradient(p):
    return p.grad is not None and p.grad.abs().sum() > 0


def reached(model, *streams):
    "Top-level parts that get a gradient from the embeddings and logits of `streams`."
    model.zero_grad(set_to_none=True)
    out = model.train()(x, pids)
    loss = 0
    for s in streams:
        loss = loss + out[s].logits.square().sum() + out[s].embedding.sum()
    loss.backward()
    return {part_of(n) for n, p in model.named_parameters() if has_gradient(p)}


@pytest.mark.parametrize("name", ["baseline", "bdb", "topdb", "stadb", "sen"])
def test_a_streams_loss_reaches_the_trunk_and_its_own_parts(name):
    model = small(name)
    for s, branch in model.branches.items():
        wanted = {"trunk", f"branches.{s}"}
        if branch.on == "shared":
            wanted.add("shared")
        with temporary_seed(3):
            assert reached(model, s) == wanted


def test_the_shift_of_a_neck_stays_zero():
    model = small("topdb")
    reached(model, "global", "drop", "regularizer")
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {f"branches.{s}.neck.bias" for s in model.branches}


@pytest.mark.parametrize("rho, attends", [(1.0, False), (0.0, True)])
def test_stadb_attends_or_drops(rho, attends):
    model = small("stadb", rho=rho)
    reached(model, "local")
    attention = model.branches["local"].mask.attention
    assert any(has_gradient(p) for p in attention.parameters()) == attends


def test_a_later_stage_of_pmm_sends_nothing_through_the_grad_cam():
    model = small("pmm")
    for s in ("stage1", "stage2", "stage3"):
        assert reached(model, s) == {"trunk", f"branches.{s}"}


def test_a_step_of_pmm_runs_the_trunk_once():
    model = small("pmm").train()
    passes = []
    model.trunk.register_forward_hook(lambda *_: passes.append("forward"))
    model.trunk.register_full_backward_hook(lambda *_: passes.append("backward"))
    streams = model(x.clone().requires_grad_(), pids)
    assert passes == ["forward"]  # both Grad-CAMs are taken, and the trunk has not moved
    assert all(p.grad is None for p in model.parameters())
    sum(s.logits.square().sum() for s in streams.values()).backward()
    assert passes == ["forward", "backward"]


def stages_by_hand(model, F, pids, clean):
    maps = [F]
    streams = [model.branches["stage1"](F)]
    for name in ("stage2", "stage3"):
        scores = torch.stack([streams[-1].logits[i, y] for i, y in enumerate(pids.tolist())])
        m = top_block_mask(grad_cam(maps[-1], scores), 2, (3, 2))
        maps.append(hard_mix(F if clean else maps[-1], m, pids))
        streams.append(model.branches[name](maps[-1]))
    return streams


@pytest.mark.parametrize("stage3_from", ["mixed", "clean"])
def test_pmm_stage_by_stage(stage3_from):
    model = small("pmm", blocks=2, stage3_from=stage3_from).train()
    F = model.feature_map(x)
    with temporary_seed(5):
        here = list(model.streams(F, pids).values())
    with temporary_seed(5):
        by_hand = stages_by_hand(model, F, pids, clean=stage3_from == "clean")
    for a, b in zip(here, by_hand):
        torch.testing.assert_close(a.logits, b.logits)


@pytest.mark.parametrize("name", ["pmm/cutmix", "pmm/a-cutmix"])
def test_mixed_images_carry_soft_labels(name):
    model = small(name).train()
    with temporary_seed(2):
        streams = model(x, pids)
    t = streams["stage1"].targets
    assert all(torch.equal(s.targets, t) for s in streams.values())
    torch.testing.assert_close(t.sum(1), torch.ones(4))
    assert (t >= 0).all()
    plain = small("pmm").train()
    plain(x, pids)
    # the heat map of attentive CutMix leaves the running statistics alone
    assert model.trunk[1].num_batches_tracked == plain.trunk[1].num_batches_tracked
    assert model.trunk.training


def test_cutmix_mixes_labels_and_cutout_does_not():
    largest = []  # a random partner is now and then of the same identity, then nothing is mixed
    for _ in range(5):
        t = small("pmm/cutmix").train()(x, pids)["stage1"].targets
        largest.append(t.max(1).values.min())
    assert min(largest) < 1
    assert all(s.targets is None for s in small("pmm/cutout").train()(x, pids).values())


@pytest.mark.parametrize("name", ["pmm/cutout", "pmm/1-stage"])
def test_passes_that_need_no_identities(name):
    assert small(name).train()(x)


@pytest.mark.parametrize("name", list(METHODS))
def test_half_precision(name):
    with torch.autocast("cpu", torch.bfloat16):
        streams = small(name).train()(x, pids)
    assert all(s.logits.isfinite().all() for s in streams.values())


def shapes(model):
    return {k: v.shape for k, v in model.state_dict().items()}


def trained_streams(model):
    with temporary_seed(7):
        return model.train()(x, pids)


def effect(method, fixed, **option):
    "The streams that change in training; whether the embedding does; whether the set of weights does."
    a = small(method, **fixed)
    b = small(method, **fixed | option)
    if shapes(a) != shapes(b):
        return "", False, True
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        retrieval_changes = not torch.equal(a.eval()(x), b.eval()(x))

    before, after = trained_streams(a), trained_streams(b)
    changed = []
    for name in after:
        u, v = before[name], after[name]
        if not (torch.equal(u.embedding, v.embedding) and torch.equal(u.logits, v.logits)):
            changed.append(name)
    return ", ".join(changed), retrieval_changes, False


def trains(streams):
    "The effect of a switch that acts in training only."
    return streams, False, False


TEST = ("", True, False)
WEIGHTS = ("", False, True)
START = ("", False, False)  # with the same weights nothing differs; see the tests of it below
SWITCHES = {  # (method, option, another value) -> its effect
    ("bdb", "height_ratio", 0.5): trains("drop"),
    ("bdb", "width_ratio", 0.5): trains("drop"),
    ("bdb", "drop", "dropout"): trains("drop"),
    ("bdb", "drop_pool", "avg"): ("drop", True, False),
    ("baseline", "init", "program"): START,
    ("bdb", "init", "program"): START,
    ("topdb", "init", "program"): START,
    ("topdb", "neck_trains", "weight+shift"): START,
    ("stadb", "init", "program"): START,
    ("stadb", "neck_trains", "nothing"): START,
    ("pmm", "init", "program"): START,
    ("topdb", "height_ratio", 0.5): trains("drop"),
    ("topdb", "mask_from", "bottlenecks"): trains("drop"),
    ("topdb", "score", "max"): trains("drop"),
    ("topdb", "p", 8): trains("drop"),
    ("topdb", "test_neck", True): TEST,
    ("stadb", "alpha", 0.5): trains("local"),
    ("stadb", "rho", 0.0): trains("local"),
    ("stadb", "inclusive", True): trains("local"),
    ("stadb", "test_map", "raw"): TEST,
    ("stadb", "shared_conv", True): WEIGHTS,
    ("stadb", "attention_reduction", 4): WEIGHTS,
    ("stadb", "attention_kernel", 3): WEIGHTS,
    ("stadb", "attention", "se"): WEIGHTS,
    ("stadb", "global_head", "reduction"): WEIGHTS,
    ("stadb", "neck", True): WEIGHTS,
    ("stadb", "bottleneck_first", True): WEIGHTS,
    ("sen", "r1", 0.3): trains("bs"),
    ("sen", "r2", 0.5): trains("ms"),
    ("sen", "p", 1): trains("bs, ms"),
    ("sen", "test_neck", False): TEST,
    ("pmm", "blocks", 1): trains("stage2, stage3"),
    ("pmm", "block", (6, 2)): trains("stage2, stage3"),
    ("pmm", "stage3_from", "clean"): trains("stage3"),
    ("pmm", "mix", "cutout"): trains("stage2, stage3"),
    ("pmm", "bottleneck_first", True): WEIGHTS,
}
TOGETHER = {  # where a switch acts only together with others
    ("stadb", "alpha"): dict(rho=1.0),
    ("stadb", "rho"): dict(rho=1.0),
    ("stadb", "inclusive"): dict(rho=1.0, alpha=1.0),
}


@pytest.mark.parametrize("method, option, value", SWITCHES, ids=str)
def test_a_switch_changes_what_it_should_and_nothing_else(method, option, value):
    found = effect(method, TOGETHER.get((method, option), {}), **{option: value})
    assert found == SWITCHES[method, option, value]


def test_every_switch_is_tested():
    "`streams` and `stages` are the variants above; pmm's `height_ratio` acts with cutout alone."
    there = {(m, o) for m, method in METHODS.items() for o in method.options}
    not_tested = there - {(m, o) for m, o, _ in SWITCHES}
    elsewhere = {(m, "streams") for m in ("bdb", "topdb", "stadb", "sen")}
    assert not_tested == elsewhere | {("pmm", "stages"), ("pmm", "height_ratio")}


def count(module):
    return sum(p.numel() for p in module.parameters())


def linear(a, b):
    return a * b + b


def reduced(d, c=2048):
    "A reduction to d numbers, its BatchNorm, and a classifier."
    return linear(c, d) + 2 * d + linear(d, 751)


def test_sizes_at_751_identities_by_hand():
    trunk = 25_557_032 - (2048 * 1000 + 1000)  # ResNet-50 without its classifier
    block = 2048 * 512 + 9 * 512**2 + 512 * 2048 + 2 * (512 + 512 + 2048)
    regularizer = 2 * 2048 + linear(2048, 751)  # a neck and a classifier
    cbam = linear(2048, 128) + linear(128, 2048) + 2 * (49 + 1)
    first_layer = linear(2048, 2048) + 2 * 2048  # of STADB's global stream
    by_hand = {
        "baseline": reduced(512),
        "bdb": reduced(512) + block + reduced(1024),
        "topdb": reduced(512) + 2 * 512 + 2 * block + reduced(1024) + 2 * 1024 + regularizer,
        "stadb": first_layer + reduced(512) + reduced(1024) + cbam,
        "sen": 3 * (2 * 2048 + linear(2048, 751)) + 2 * block,
        "pmm": 3 * reduced(512),
    }
    with torch.device("meta"):  # sizes only
        sizes = {method: count(build_model(method, 751)) for method in METHODS}
        pmm_released = count(build_model("pmm", 751, source="released"))
    assert sizes == {method: trunk + heads for method, heads in by_hand.items()}
    assert round(sizes["bdb"] / 1e6, 3) == 32.276  # the released program's
    # with its program's bottleneck PMM has about as many as BDB, as its text says
    assert pmm_released == trunk + block + 3 * reduced(512)
    assert abs(pmm_released / sizes["bdb"] - 1) < 0.01


class Heads(torch.nn.Identity):
    "A trunk of 2,048 channels that is never called."

    out_channels = 2048


STDS = {  # method -> layer -> standard deviation by the program, 2,048 channels and 751 identities
    "bdb": {
        "branches.global.classify.weight": (2 / 751) ** 0.5,
        "branches.drop.classify.weight": (2 / 751) ** 0.5,
        "branches.global.reduce.0.weight": (2 / 2048) ** 0.5,
        "branches.drop.reduce.0.weight": (2 / 1024) ** 0.5,
        "branches.global.reduce.1.weight": 0.02,
        "branches.drop.reduce.1.weight": 0.02,
        "branches.drop.before.conv1.weight": 0.0128,
        "branches.drop.before.conv2.weight": 0.0085,
        "branches.drop.before.conv3.weight": 0.0255,
    },
    "pmm": {
        "branches.stage1.classify.weight": (2 / 751) ** 0.5,
        "branches.stage3.classify.weight": (2 / 751) ** 0.5,
        "branches.stage1.reduce.0.weight": (2 / 2048) ** 0.5,
        "branches.stage2.reduce.0.weight": (2 / 512) ** 0.5,
        "branches.stage3.reduce.1.weight": 0.02,
        "shared.conv1.weight": 0.0128,
        "shared.conv2.weight": 0.0085,
        "shared.conv3.weight": 0.0255,
    },
    "stadb": {
        "branches.global.classify.weight": (2 / 751) ** 0.5,
        "branches.global.reduce.0.weight": (2 / 2048) ** 0.5,
        "branches.global.reduce.1.weight": 0.02,
    },
    "topdb": {
        "branches.global.classify.weight": 0.01,
        "branches.drop.classify.weight": 0.01,
        "branches.regularizer.classify.weight": 0.01,
        "branches.global.reduce.0.weight": (2 / 512) ** 0.5,
        "branches.drop.reduce.0.weight": 0.01,
        "shared.0.conv1.weight": 0.0624,
        "shared.1.conv2.weight": 0.0208,
        "shared.0.conv3.weight": 0.0313,
    },
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", STDS)
def test_the_programs_initial_weights(method, seed):
    record = METHODS[method]
    with temporary_seed(seed):
        network = record.build(Heads(), 751, **record.values("released"))
    state = network.state_dict()
    for name, std in STDS[method].items():
        tolerance = 0.08 if state[name].ndim == 1 else 0.03
        assert abs(state[name].std().item() / std - 1) < tolerance, name
    biases = [v for k, v in state.items() if k.endswith("bias") and ".mask." not in k]
    assert all(not b.any() for b in biases)


def test_our_initial_weights_are_others():
    record = METHODS["bdb"]
    with temporary_seed(0):
        state = record.build(Heads(), 751, **record.values("paper")).state_dict()
    assert abs(state["branches.global.classify.weight"].std() - 0.001) < 1e-4
    assert abs(state["branches.global.reduce.0.weight"].std() - 0.0625) < 2e-3
    assert (state["branches.global.reduce.1.weight"] == 1).all()


@pytest.mark.parametrize(
    "name, source, weight, shift",
    [
        ("topdb", "paper", True, False),
        ("topdb", "released", True, True),
        ("stadb", "released", False, False),
        ("sen", "paper", True, False),
    ],
)
def test_what_training_changes_in_a_neck(name, source, weight, shift):
    for branch in small(name, source=source).branches.values():
        assert branch.neck.weight.requires_grad == weight
        assert branch.neck.bias.requires_grad == shift


def test_released_weights_of_the_ablations_of_top_db_net():
    "The program's no-reg network holds a neck that nothing uses; its no-drop network has other names."
    for name, first in {
        "topdb/no-reg": "batch_drop.",
        "topdb/no-drop": "reduction_regularization.",
    }.items():
        model = small(name, source="released")
        names = {ours: theirs for theirs, ours in released_names()[name].items() if ours}
        state = {}
        for key, tensor in model.state_dict().items():
            ours = max((n for n in names if key.startswith(n)), key=len)
            state[names[ours] + key.removeprefix(ours)] = tensor.clone()
        assert any(key.startswith(first) for key in state)
        if name == "topdb/no-reg":
            state["bottleneck_drop_bottleneck_features.weight"] = torch.ones(2048)
        other = small(name, source="released")
        for p in other.parameters():
            p.data.zero_()
        load_released(other, name, state)
        for a, b in zip(other.state_dict().values(), model.state_dict().values()):
            assert torch.equal(a, b)
