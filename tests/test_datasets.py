"""The published counts of every data set, from full-size folders of one-pixel files.

And the doctor's and the loader's speed.
"""

import os
import time

import numpy as np
import pytest
from children import python_m
from PIL import Image

from reidnb.data.dataset import TEST_SETS
from reidnb.data.doctor import doctor
from reidnb.data.fixtures import write_fixture
from reidnb.data.load import DATA_SOURCES, load_dataset
from reidnb.methods.registry import recipe
from reidnb.training.loop import train as train_run
from reidnb.training.testing import references, test_on


class Files:
    "Many files of one pixel: each a link to one that is, so that a hundred thousand cost seconds."

    def __init__(self, root):
        self.root, self.n, self.made = root, 0, set()

    def __call__(self, path):
        if self.n % 20_000 == 0:
            for kind in ("jpg", "png"):
                Image.new("RGB", (1, 1), (self.n // 20_000, 0, 0)).save(
                    self.root / f"pixel{self.n // 20_000}.{kind}"
                )
        path = str(path)
        folder = os.path.dirname(path)
        kind = "png" if path.endswith("png") else "jpg"
        if folder not in self.made:
            os.makedirs(folder, exist_ok=True)
            self.made.add(folder)
        os.link(self.root / f"pixel{self.n // 20_000}.{kind}", path)
        self.n += 1


def people(pids, images):
    return [
        (pids[i % len(pids)], i // len(pids)) for i in range(images)
    ]  # image i: the next person, round and round


def market(put, d):
    for sub, pids, n in (
        ("bounding_box_train", range(1, 1502, 2), 12936),
        ("query", range(2, 1501, 2), 3368),
        ("bounding_box_test", range(2, 1501, 2), 13115),
    ):
        for i, (p, turn) in enumerate(people(pids, n)):
            put(d / "Market-1501-v15.09.15" / sub / f"{p:04d}_c{1 + turn % 6}s1_{i:06d}_00.jpg")
    for i in range(2798):
        put(d / "Market-1501-v15.09.15/bounding_box_test" / f"0000_c1s1_{i:06d}_01.jpg")
    for i in range(3819):
        put(d / "Market-1501-v15.09.15/bounding_box_test" / f"-1_c1s1_{i:06d}_01.jpg")


def duke(put, d):
    for sub, pids, n in (
        ("bounding_box_train", range(1, 703), 16522),
        ("query", range(1001, 1703), 2228),
        ("bounding_box_test", range(1001, 2111), 17661),
    ):
        for i, (p, turn) in enumerate(people(pids, n)):
            put(d / "DukeMTMC-reID" / sub / f"{p:04d}_c{1 + turn % 8}_f{i:07d}.jpg")


def cuhk(put, d):
    for kind, train, gallery in (("labeled", 7368, 5328), ("detected", 7365, 5332)):
        for sub, pids, n in (
            ("bounding_box_train", range(1, 768), train),
            ("query", range(768, 1468), 1400),
            ("bounding_box_test", range(768, 1468), gallery),
        ):
            for p, turn in people(pids, n):
                put(d / "cuhk03-np" / kind / sub / f"{p:04d}_c{1 + turn % 2}_{1 + turn}.png")


def msmt(put, d):
    d = d / "MSMT17_V1"
    d.mkdir()
    for n, (name, sub, ids, count) in enumerate(
        (
            ("train", "train", 1041, 30248),
            ("val", "train", 1041, 2373),
            ("query", "test", 3060, 11659),
            ("gallery", "test", 3060, 82161),
        )
    ):
        names = [
            f"{p:04d}/{p:04d}_{turn:03d}_{1 + turn % 15:02d}_0303morning_{n}{i:06d}_0.jpg"
            for i, (p, turn) in enumerate(people(range(ids), count))
        ]
        (d / f"list_{name}.txt").write_text("".join(f"{x} {int(x[:4])}\n" for x in names))
        for x in names:
            put(d / sub / x)


def celeb(put, d):
    for sub, ids, n in (("train", 632, 20208), ("query", 420, 2972), ("gallery", 420, 11006)):
        for p, turn in people(range(1, ids + 1), n):
            put(d / "Celeb-reID" / sub / f"{p}_{turn + 1}_0.jpg")


def occluded_duke(put, d):
    for sub, pids, n in (
        ("bounding_box_train", range(1, 703), 15618),
        ("query", range(1001, 1520), 2210),
        ("bounding_box_test", range(1001, 2111), 17661),
    ):
        for i, (p, turn) in enumerate(people(pids, n)):
            put(d / "Occluded_Duke" / sub / f"{p:04d}_c{1 + turn % 8}_f{i:07d}.jpg")


def occluded_reid(put, d):
    for sub in ("occluded", "whole"):
        for p, turn in people(range(1, 201), 1000):
            folder = d / "Occluded_REID" / f"{sub}_body_images" / f"{p:03d}"
            put(folder / f"{p:03d}_{turn + 1:02d}.tif")


def partial_reid(put, d):
    for sub in ("occluded", "partial", "whole"):
        for p, turn in people(range(1, 61), 300):
            folder = d / "Partial-REID_Dataset" / f"{sub}_body_images"
            put(folder / f"{p:03d}_{turn + 1:03d}.jpg")


def grocery(put, d):
    "As many photographs of training and test products by visit as the repository's lists have."
    d = d / "GroceryStoreDataset" / "dataset"
    d.mkdir(parents=True)
    names = [f"Packages/Juice/Product-{n}" for n in range(1, 32)]
    head = "Class ID (int),Iconic Image Path (str)\n"
    rows = [f"{n},/iconic-images-and-descriptions/{name}/x.jpg\n" for n, name in enumerate(names)]
    (d / "classes.csv").write_text(head + "".join(rows) + "31,/iconic/Fruit/Apple/x.jpg\n")
    for visit, train, test in (("train", 429, 435), ("val", 55, 45), ("test", 383, 398)):
        lines = ["train/Fruit/Apple/Apple_001.jpg, 31, 7\n"]
        for products, images in ((range(16), train), (range(16, 31), test)):
            for p, turn in people(products, images):
                path = f"{visit}/{names[p]}/{turn:03d}.jpg"
                put(d / path)
                lines.append(f"{path}, {p}, 0\n")
        (d / f"{visit}.txt").write_text("".join(lines))


def cub(put, d):
    d = d / "CUB_200_2011"
    d.mkdir()
    classes = [
        p
        for half, n in ((range(1, 101), 5864), (range(101, 201), 5924))
        for p, _ in people(half, n)
    ]
    names = [f"{p:03d}.Bird/Bird_{i:04d}.jpg" for i, p in enumerate(classes)]
    for f, column in (
        ("images", names),
        ("image_class_labels", classes),
        ("bounding_boxes", ["0.0 0.0 1.0 1.0"] * len(names)),
    ):
        (d / f"{f}.txt").write_text("".join(f"{i} {c}\n" for i, c in enumerate(column, 1)))
    for x in names:
        put(d / "images" / x)


def cars(put, d):
    import scipy.io

    d = d / "cars196"
    d.mkdir()
    classes = [
        p for half, n in ((range(1, 99), 8054), (range(99, 197), 8131)) for p, _ in people(half, n)
    ]
    rows = np.zeros(
        (1, len(classes)),
        [
            (f, object)
            for f in (
                "relative_im_path",
                "bbox_x1",
                "bbox_y1",
                "bbox_x2",
                "bbox_y2",
                "class",
                "test",
            )
        ],
    )
    for i, p in enumerate(classes):
        rows[0, i] = (f"car_ims/{i + 1:06d}.jpg", 1, 1, 1, 1, p, 0)
        put(d / "car_ims" / f"{i + 1:06d}.jpg")
    scipy.io.savemat(d / "cars_annos.mat", {"annotations": rows})


def sop(put, d):
    d = d / "Stanford_Online_Products"
    d.mkdir()
    for name, pids, n in (("train", range(1, 11319), 59551), ("test", range(11319, 22635), 60502)):
        lines = [(p, f"mug_final/{p}_{turn}.JPG") for p, turn in people(pids, n)]
        (d / f"Ebay_{name}.txt").write_text(
            "image_id class_id super_class_id path\n"
            + "".join(f"{i} {p} 1 {x}\n" for i, (p, x) in enumerate(lines, 1))
        )
        for _, x in lines:
            put(d / x)


def inshop(put, d):
    d = d / "In-shop Clothes Retrieval Benchmark"
    lines = []
    for split, ids, n in (
        ("train", range(1, 3998), 25882),
        ("query", range(3998, 7983), 14218),
        ("gallery", range(3998, 7983), 12612),
    ):
        lines += [
            f"img/WOMEN/Dresses/id_{p:08d}/{split}_{turn}.jpg id_{p:08d} {split}"
            for p, turn in people(ids, n)
        ]
    for x in lines:
        put(d / "Img" / x.split()[0])
    (d / "Eval").mkdir()
    (d / "Eval/list_eval_partition.txt").write_text(
        f"{len(lines)}\nimage_name item_id evaluation_status\n" + "\n".join(lines) + "\n"
    )


WRITERS = {
    "market1501": market,
    "dukemtmc": duke,
    "cuhk03-labeled": cuhk,
    "cuhk03-detected": cuhk,
    "msmt17": msmt,
    "celeb-reid": celeb,
    "occluded-dukemtmc": occluded_duke,
    "occluded-reid": occluded_reid,
    "partial-reid": partial_reid,
    "cub200": cub,
    "cars196": cars,
    "sop": sop,
    "inshop": inshop,
    "grocery": grocery,
}


def test_all_sets_are_here():
    assert set(WRITERS) == {name for name, source in DATA_SOURCES.items() if source.published}


LARGE = ("msmt17", "sop")  # more than 100,000 files each


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in WRITERS]
)
def test_published_counts(name, tmp_path):
    WRITERS[name](Files(tmp_path), tmp_path)
    data = load_dataset(name, tmp_path)
    stats = data.stats()
    assert (
        (stats.ids == stats["published ids"]).all()
        and (stats.images == stats["published images"]).all()
        and not len(data.problems)
    )
    assert {s: tuple(v) for s, v in stats[["ids", "images"]].iterrows()} == DATA_SOURCES[
        name
    ].published
    if name == "market1501":
        assert (seconds := min(_timed(name, tmp_path) for _ in range(3))) < 1, (
            f"a Market-size folder took {seconds:.2f} s to load"
        )


def test_a_set_for_tests_alone(tmp_path, tiny):
    "A network that was trained elsewhere is tested on it; it cannot be trained on."
    for name in ("market1501", *TEST_SETS):
        write_fixture(name, tmp_path)
    r = recipe("bdb", "market1501", profile="smoke", epochs=1, steps=1)
    run = train_run(r, load_dataset("market1501", tmp_path), tmp_path / "runs", device="cpu")
    for name in TEST_SETS:
        data = load_dataset(name, tmp_path)
        found = test_on(run, data, "cpu")
        assert found["tested"]["queries"] == len(data.query) > 0
        assert found["tested"]["left_out"] == 0
        assert 0 < found["metrics"]["mAP"] <= 1
        with pytest.raises(ValueError, match=f"{name} has no training images"):
            references(r, data)


def _timed(name, root):
    start = time.perf_counter()
    load_dataset(name, root)
    return time.perf_counter() - start


def test_the_doctor_as_a_command(tmp_path):
    "Exit status and verdict line; what the command is given when it makes no sense."
    assert python_m("reidnb", "fixture", "market1501", tmp_path).returncode == 0
    well = python_m("reidnb", "doctor", "market1501", tmp_path)
    assert well.returncode == 0
    assert well.stdout.splitlines()[-1].startswith("verdict: sound")
    victim = sorted((tmp_path / "Market-1501-v15.09.15/query").glob("*.jpg"))[0]
    victim.write_bytes(victim.read_bytes()[:200])
    ill = python_m("reidnb", "doctor", "market1501", tmp_path / "Market-1501-v15.09.15")
    assert ill.returncode == 1
    assert victim.name in ill.stdout
    assert ill.stdout.splitlines()[-1].startswith("verdict: NOT SOUND")
    unknown = python_m("reidnb", "doctor", "mnist", tmp_path)
    assert unknown.returncode == 2
    assert "Traceback" not in unknown.stderr


@pytest.mark.slow
def test_a_full_size_set_through_the_doctor(tmp_path):
    """36,000 files.

    The counts are the published ones, so nothing but the copies of one pixel is remarked upon.
    """
    market(Files(tmp_path), tmp_path)
    start = time.perf_counter()
    found = doctor("market1501", tmp_path, workers=2)
    seconds = time.perf_counter() - start
    assert (
        "counts that are not the published ones" not in set(found.findings.what)
        and len(found.files) == 12936 + 3368 + 15913
    )
    assert seconds < 60, (
        f"{seconds:.0f} s"
    )  # on a quiet machine with two cores it is a third of that; see data/README.md
