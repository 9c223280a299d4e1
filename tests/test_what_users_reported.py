"""Situations that users of comparable software reported, one kind after the other.

Each is answered rightly, or by one sentence.
"""

import errno
import os
import shutil
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image

import reidnb.core
import reidnb.training.checkpoints as checkpoints
import reidnb.training.loop as training
from reidnb.__main__ import _recipe_of
from reidnb.__main__ import train as train_command
from reidnb.core import NO_LOCKS, exclusive, project_root
from reidnb.data.doctor import copies_of_queries, doctor, inspect, without_copies
from reidnb.data.images import colour_histogram_features, pixel_features
from reidnb.data.load import load_dataset
from reidnb.evaluation.embeddings import load_features
from reidnb.methods.registry import recipe
from reidnb.parts.backbones import build_trunk
from reidnb.results.panels import draw_cell
from reidnb.results.style import save_figure
from reidnb.training.checkpoints import is_trained, read_run
from reidnb.training.loop import train
from reidnb.training.testing import test_on as run_on


def picture(person, view):
    colours = np.random.default_rng(person).integers(0, 255, (3, 3))
    noise = np.random.default_rng([person, view]).integers(-20, 20, (64, 32, 3))
    return Image.fromarray(
        np.clip(colours[np.arange(64) * 3 // 64][:, None] + noise, 0, 255).astype("uint8")
    )


def people(folder, names=8, views=4):
    "A folder per person, with pictures of blocks of colour."
    for person, name in enumerate(
        names if isinstance(names, list) else [f"p{i}" for i in range(names)]
    ):
        place = os.path.join(
            os.fsencode(folder), name if isinstance(name, bytes) else name.encode()
        )
        os.makedirs(place)
        for view in range(views):
            picture(person, view).save(os.path.join(os.fsdecode(place), f"{view}.jpg"))
    return folder


def table(folder, camera):
    "The same with images.csv, in which half of the people are tested; `camera` gives a view's."
    people(folder)
    rows = [
        (f"p{p}/{v}.jpg", p, camera(v), "train" if p < 4 else "query" if v == 0 else "gallery")
        for p in range(8)
        for v in range(4)
    ]
    pd.DataFrame(rows, columns=["path", "pid", "camid", "split"]).to_csv(
        folder / "images.csv", index=False
    )
    return folder


# --- a test that cannot be answered


def test_a_test_without_an_answer_is_refused_before_the_first_step(tmp_path):
    data = load_dataset("folder", table(tmp_path / "set", camera=lambda view: 0))
    steps = []
    with pytest.raises(
        ValueError,
        match="none of the 4 queries of folder can be answered: all test images have one camera",
    ):
        train(
            recipe("bdb", "folder", profile="smoke"),
            data,
            tmp_path / "runs",
            device="cpu",
            on_epoch=steps.append,
        )
    assert not steps and not list(tmp_path.rglob("run.json"))
    assert not doctor("folder", tmp_path / "set").sound


def test_a_test_on_too_few_people_is_refused(tmp_path):
    data = load_dataset("folder", table(tmp_path / "set", camera=lambda view: view))
    data.gallery.loc[data.gallery.pid == data.query.pid.min(), "camid"] = (
        0  # the first person alone has no answer
    )
    with pytest.raises(ValueError, match="none of the 1 queries"):
        train(
            recipe("bdb", "folder", profile="smoke", test_ids=1),
            data,
            tmp_path / "runs",
            device="cpu",
        )


@pytest.mark.usefixtures("tiny")
def test_a_failed_test_loses_no_network(tmp_path, monkeypatch, capsys):
    "The run is kept as trained; the same call tests it, and other pages take it."
    data = load_dataset("folder", table(tmp_path / "set", camera=lambda view: view))
    r = recipe("bdb", "folder", profile="smoke", steps=2)

    def broken(*args):
        raise ValueError("a picture has gone")

    with monkeypatch.context() as m:
        m.setattr(training, "record_test", broken)
        run = train(r, data, tmp_path / "runs", device="cpu")
    info = read_run(run)
    assert info["status"] == "trained, not tested: a picture has gone" and is_trained(info)
    assert "The network is kept." in capsys.readouterr().out
    assert 0 < run_on(run, data, "cpu")["metrics"]["mAP"] <= 1
    step = torch.load(run / "last.pt", weights_only=True)["step"]
    mended = load_dataset("folder", tmp_path / "set")
    mended.gallery["camid"] += 1  # cameras were put right meanwhile: training never read them
    assert train(r, mended, tmp_path / "runs", device="cpu") == run
    assert (
        read_run(run)["status"] == "finished"
        and torch.load(run / "last.pt", weights_only=True)["step"] == step
    )


@pytest.mark.usefixtures("tiny")
def test_a_test_that_a_gpu_does_not_hold_loses_no_network(tmp_path, monkeypatch):
    data = load_dataset("folder", table(tmp_path / "set", camera=lambda view: view))
    r = recipe("bdb", "folder", profile="smoke", steps=2)

    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "record_test", too_large)
    with pytest.raises(RuntimeError, match="the trained weights are in"):
        train(r, data, tmp_path / "runs", device="cpu")
    run = tmp_path / "runs" / r.directory
    assert read_run(run)["status"] == "trained, not tested: out of GPU memory"
    assert 0 < run_on(run, data, "cpu")["metrics"]["mAP"] <= 1


# --- copies that answer themselves


def test_copies_are_counted_and_left_out(tmp_path):
    people(tmp_path / "set", 12, 3)
    for f in sorted((tmp_path / "set").rglob("*.jpg")):
        shutil.copy(f, f.with_name(f"{f.stem} - Copy.jpg"))
    data = load_dataset("folder", tmp_path / "set")
    found = doctor("folder", tmp_path / "set").findings.set_index("what")
    assert found["count"]["queries with a copy in the gallery"] == len(data.query)
    files = inspect(data.query.path)
    alone, left_out = without_copies(data)
    assert left_out == len(data.gallery) / 2 == len(alone.gallery) and len(alone.query) == len(
        alone.gallery
    )
    assert not len(copies_of_queries(alone, dict(zip(files.path, files.digest))))


@pytest.mark.parametrize("spelling", ["./p4/0.jpg", "p4//0.jpg", "p4\\0.jpg", "p5/../p4/0.jpg"])
def test_a_path_has_one_spelling(tmp_path, spelling):
    "A file that is listed twice is noticed, whatever its path looks like."
    people(tmp_path / "set")
    rows = [
        (f"p{p}/{v}.jpg", p, "train" if p < 4 else "test") for p in range(8) for v in range(4)
    ] + [(spelling, 4, "test")]
    pd.DataFrame(rows, columns=["path", "pid", "split"]).to_csv(
        tmp_path / "set/images.csv", index=False
    )
    assert doctor("folder", tmp_path / "set").findings.what.str.contains("listed").any()


# --- weight files

RESNET = torchvision.models.resnet18(weights=None).state_dict()
GOOD = {
    "no batch counters": {k: v for k, v in RESNET.items() if "num_batches" not in k},
    "no classifier": {k: v for k, v in RESNET.items() if not k.startswith("fc.")},
    "another classifier": RESNET | {"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)},
    "a tensor more": RESNET | {"extra": torch.zeros(1)},
    "module.": {f"module.{k}": v for k, v in RESNET.items()},
    "wrapped": {"state_dict": RESNET, "epoch": 90},
    "wrapped, another name, another prefix": {
        "model": {f"backbone.{k}": v for k, v in RESNET.items()}
    },
}


@pytest.mark.parametrize("name", GOOD)
def test_weights_that_fit_are_loaded(tmp_path, name, capsys):
    torch.save(GOOD[name], tmp_path / "w.pth")
    assert torch.equal(
        build_trunk("resnet18", tmp_path / "w.pth")[0].weight, RESNET["conv1.weight"]
    )
    assert ("left out, first 'extra'" in capsys.readouterr().out) == (name == "a tensor more")


def as_bytes(x, folder):
    torch.save(x, folder / "x")
    return (folder / "x").read_bytes()


BAD = {
    "is empty": lambda d: b"",
    "is a web page": lambda d: b"\n<!DOCTYPE html><title>x</title>",
    "is a pointer of Git LFS": lambda d: b"version https://git-lfs.github.com/spec/v1\n",
    "is cut short or damaged": lambda d: as_bytes(RESNET, d)[:1_000_000],
    "holds a whole pickled object": lambda d: as_bytes(torchvision.models.resnet18(), d),
    "holds a dict of 'epoch', 'lr', not a state dict": lambda d: as_bytes(
        {"epoch": 3, "lr": 0.1}, d
    ),
    "does not hold a resnet18": lambda d: as_bytes({"conv1.weight": torch.zeros(1)}, d),
}


@pytest.mark.parametrize("sentence", BAD)
def test_what_holds_no_weights_is_named(tmp_path, sentence):
    (tmp_path / "w.pth").write_bytes(BAD[sentence](tmp_path))
    with pytest.raises(ValueError, match=f"w.pth {sentence}"):
        build_trunk("resnet18", tmp_path / "w.pth")


# --- an error that is lost while it is written down


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "stopped, kept",
    [
        (KeyboardInterrupt("at step 2"), "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), "failed: the disk is full"),
        (FloatingPointError("the loss became nan"), "failed: the loss became nan"),
    ],
)
def test_the_reason_survives_a_full_disk(tmp_path, monkeypatch, stopped, kept):
    "Not even run.json can be written anew; its status is put into the blocks that it has."
    data = load_dataset("folder", people(tmp_path / "set"))
    r = recipe("bdb", "folder", profile="smoke", steps=2)
    written = training.write_run

    def full(run, **changes):
        if set(changes) == {"status"}:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(run, **changes)

    def stop(*args, **kwargs):
        raise stopped

    monkeypatch.setattr(training, "write_run", full)
    monkeypatch.setattr(checkpoints, "write_run", full)
    monkeypatch.setattr(training, "train_step", stop)
    expected = "the disk is full: .* make room" if isinstance(stopped, OSError) else str(stopped)
    with pytest.raises(type(stopped), match=expected):
        train(r, data, tmp_path / "runs", device="cpu")
    assert read_run(tmp_path / "runs" / r.directory)["status"] == kept


# --- names that people have


def test_names_are_data(tmp_path):
    names = [b"Ren\xe9", b"Ren\xe8", "①", "٣", "m²", "a\nb", "007", "NaN", "$x$_{"]
    data = load_dataset("folder", people(tmp_path / "set", names))
    assert set(data.attributes.name) == {
        os.fsdecode(n) if isinstance(n, bytes) else n for n in names
    }
    assert doctor("folder", tmp_path / "set").sound


@pytest.mark.parametrize("name", ["a$_{$b", "$", r"\$\frac", "100 % & #1"])
def test_a_name_is_no_formula(tmp_path, name):
    fig, ax = plt.subplots()
    draw_cell(ax, np.zeros((4, 4, 3), "uint8"), name, title=name)
    save_figure(fig, tmp_path / "f.png")
    plt.close(fig)
    assert ax.get_xlabel() == name


# --- encodings


@pytest.mark.parametrize(
    "text",
    [
        b"lib_name = reidnb_extras\n",
        "lib_name = reidnb".encode("utf-16"),
        b"\xff\xfe\x00",
        b"# lib_name = reidnb\n",
    ],
)
def test_another_programs_settings_are_not_ours(tmp_path, monkeypatch, text):
    (tmp_path / "settings.ini").write_bytes(text)
    (tmp_path / "below").mkdir()
    monkeypatch.delenv("REIDNB_ROOT", raising=False)
    monkeypatch.chdir(tmp_path / "below")
    assert project_root() == tmp_path / "below"


# --- clusters and shared folders


@pytest.mark.skipif(sys.platform == "win32", reason="flock is POSIX's")
@pytest.mark.parametrize("number", [*NO_LOCKS, errno.EIO])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    "A file stands in for the lock; another error stays one."
    import fcntl

    def no_flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            with exclusive(tmp_path / "x", timeout=0):
                pass
        return
    from filelock import Timeout

    with exclusive(tmp_path / "x"):
        with pytest.raises(Timeout):
            with exclusive(tmp_path / "x", timeout=0):
                pass
    with exclusive(tmp_path / "x", timeout=0):
        pass


def test_a_long_wait_is_explained(tmp_path, capsys):
    from filelock import Timeout

    with exclusive(tmp_path / "x"):
        with pytest.raises(Timeout):
            with exclusive(tmp_path / "x", timeout=0.3, patience=0.1):
                pass
    said = capsys.readouterr().out
    assert "waiting for another process" in said and "x.lock" in said


def test_a_cache_of_somebody_elses(tmp_path, monkeypatch, capsys):
    "Images are decoded to a folder of one's own, and that is said."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    data = load_dataset("folder", people(tmp_path / "set"))
    (tmp_path / "set/.reidnb").write_text(
        "no folder can be made here, as if it might not be written"
    )
    store = training.checked_store(recipe("bdb", "folder", profile="smoke"), data)
    assert store.ready.all() and list((tmp_path / "mine").rglob("*.npy"))
    assert "cannot be written, so its files are kept in" in capsys.readouterr().out


# --- a script without a main guard


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_no_process_is_started_where_it_would_run_the_script_again(monkeypatch, platform):
    class Elsewhere:
        pass

    Elsewhere.platform = platform
    monkeypatch.setattr(reidnb.core, "sys", Elsewhere)
    monkeypatch.setattr(
        reidnb.core.mp, "get_context", lambda *args: pytest.fail("a process was started")
    )
    with reidnb.core.worker_map(2) as run:
        assert sorted(run(abs, [-3, -1, -2])) == [1, 2, 3]


# --- pictures at the edge


def test_twelve_bits_in_sixteen_are_noticed(tmp_path):
    for p in range(8):
        (tmp_path / f"p{p}").mkdir()
        for v in range(4):
            grey = np.asarray(picture(p, v).convert("L")).astype("uint16")
            Image.fromarray(grey * 16).save(tmp_path / f"p{p}" / f"{v}.png")
    found = doctor("folder", tmp_path).findings.set_index("what")["count"]
    assert found["16-bit pictures with small values only, which are read as nearly black"] == 32


@pytest.mark.parametrize("form", ["16 bits", "lying"])
def test_baselines_see_what_the_network_sees(tmp_path, form):
    "Raw pixels of a 16-bit or a lying picture are those of the ordinary one."
    ordinary = picture(0, 0).convert("L") if form == "16 bits" else picture(0, 0)
    ordinary.save(tmp_path / "a.png")
    if form == "16 bits":
        Image.fromarray(np.asarray(ordinary).astype("uint16") * 257).save(tmp_path / "b.png")
    else:
        exif = Image.Exif()
        exif[274] = 6
        ordinary.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    for features in (pixel_features, colour_histogram_features):
        a, b = features([tmp_path / "a.png", tmp_path / "b.png"])
        assert np.array_equal(a, b) and a.std() > 0


def test_a_huge_picture_is_named(tmp_path, monkeypatch):
    data = load_dataset("folder", people(tmp_path / "set"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # a picture has 2,048
    with pytest.raises(ValueError, match=r"0\.jpg cannot be read as an image .*scale it down"):
        training.checked_store(recipe("bdb", "folder", profile="smoke"), data)
    assert not list(tmp_path.rglob("*.part"))


# --- files of features

FEATURES = dict(
    qf=np.eye(3, 4),
    gf=np.eye(6, 4),
    q_pids=np.arange(3),
    g_pids=np.arange(6) % 3,
    q_camids=np.zeros(3, int),
    g_camids=np.ones(6, int),
)


def saved(file, **changes):
    with open(file, "wb") as f:
        given = FEATURES | changes
        scipy.io.savemat(f, given) if file.suffix.lower() == ".mat" else np.savez(f, **given)
    return file


@pytest.mark.parametrize(
    "name, changes",
    [
        ("a.MAT", {}),
        ("A.NPZ", {}),
        ("big-endian.npz", dict(qf=FEATURES["qf"].astype(">f4"))),
        ("imaginary.mat", dict(qf=FEATURES["qf"] + 0j)),
        ("doubles.npz", dict(q_pids=np.arange(3.0))),
        ("bytes.npz", dict(q_paths=np.array([b"a.jpg", b"b.jpg", b"c.jpg"]))),
    ],
)
def test_features_that_are_read(tmp_path, name, changes):
    found = load_features(saved(tmp_path / name, **changes), paths=True)
    assert np.array_equal(found["qf"], FEATURES["qf"]) and found["q_pids"].tolist() == [0, 1, 2]
    assert "q_paths" not in changes or found["q_paths"][0] == str(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(q_pids=np.array([0, np.inf, 2])), "inf is no whole number"),
        (dict(q_pids=np.array([0, 1e26, 2])), "1e\\+26 is no whole number"),
        (dict(q_pids=np.array(["a", "b", "c"])), "not numbers"),
        (dict(qf=FEATURES["qf"] + 1j), "imaginary parts"),
        (dict(g_pids=np.array([0, 0.5, 1, 1, 2, 2])), "0.5 is no whole"),
        (dict(q_paths=np.array(["a", "b", "c"], object)), "an array of Python objects"),
    ],
)
def test_features_that_are_refused(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=f"x.npz.*{sentence}"):
        load_features(saved(tmp_path / "x.npz", **changes), paths=True)


def command_recipe(words):
    "The recipe of `reidnb train bdb synthped-mini` with more words."
    c = train_command.make_context("train", ["bdb", "synthped-mini", *words.split()]).params
    source, profile, seed, fields = c["source"], c["profile"], c["seed"], c["fields"]
    return _recipe_of("bdb", "synthped-mini", source, profile, seed, fields, torch.device("cpu"))


@pytest.mark.parametrize(
    "words, asked",
    [
        ("-p source released", dict(source="released")),
        ("-p profile smoke", dict(profile="smoke")),
        ("-p seed 3 --profile study", dict(seed=3, profile="study")),
    ],
)
def test_an_option_may_be_written_as_a_parameter(words, asked):
    r = command_recipe(words)
    assert {name: getattr(r, name) for name in asked} == asked


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("-p source released --source released", "the source is given twice, by --source and"),
        ("-p profile smoke --profile study", "the profile is given twice, by --profile and"),
        ("-p seed 3 --seed 0", "the seed is given twice, by --seed and by -p seed"),
        ("-p method topdb", "the method stands after the command"),
        ("-p dataset market1501", "the dataset stands after the command"),
    ],
)
def test_a_parameter_beside_its_option_is_refused(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        command_recipe(words)
