"""What the data notebooks refuse, and what the message says: the type of the error and one keyword.

The cases are calls of one argument: a folder that the fixture above the table has filled."""

import gzip
import re
import shutil
import stat
import tarfile
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
from commands import reidnb
from PIL import Image

from reidnb.data.augment import augment, cutout, random_crop
from reidnb.data.batches import pk_batches
from reidnb.data.corrupt import corrupt, image_seeds, occlude, rows_of_others
from reidnb.data.dataset import parse_name, read_list, read_mat
from reidnb.data.doctor import doctor, unpack
from reidnb.data.fixtures import write_fixture
from reidnb.data.images import ImageStore, cut_box, read_image
from reidnb.data.load import load_dataset


def refuses(call, error, keyword):
    "The call raises this error, and its message has the keyword."
    with pytest.raises(error, match=re.escape(keyword)):
        call()


def messages(cases):
    "Parametrise by (call, error, keyword)."
    return pytest.mark.parametrize(
        "call, error, keyword", cases, ids=[f"{i}-{case[2]}" for i, case in enumerate(cases)]
    )


# --- pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "noise.png of 50 × 30 pixels, three upright pictures, and files that cannot be decoded."
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype="uint8")).save(folder / "noise.png")
    for i in range(3):
        picture = rng.integers(0, 256, (64, 32, 3), dtype="uint8")
        Image.fromarray(picture).save(folder / f"{i}.png")
    (folder / "short.png").write_bytes((folder / "noise.png").read_bytes()[:400])
    (folder / "none.png").write_bytes(b"")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    (folder / "worse.jpg").write_bytes(b"no")
    return folder


def with_box(*box):
    return lambda d: read_image(d / "noise.png", (8, 8), "pad", box)


def noise(d, **options):
    return read_image(d / "noise.png", (8, 8), **options)


def store(d, *names, size=(24, 24), **options):
    return ImageStore([d / name for name in names], size, **options)


OUTSIDE = "noise.png is 50 wide and 30 high, but its box (left, top, right, bottom) = ("


@messages(
    [
        (with_box(60, 0, 70, 10), ValueError, OUTSIDE),
        (with_box(-5, 0, 0, 10), ValueError, OUTSIDE),
        (with_box(10, 10, 10, 20), ValueError, OUTSIDE),
        (with_box(20, 10, 10, 20), ValueError, OUTSIDE),
        (with_box(0, 0, 50, float("nan")), ValueError, OUTSIDE),
        (lambda d: noise(d, box=(1, 2, 3)), ValueError, "noise.png: a box is (left, top, right"),
        (lambda d: noise(d, box=(1, 2, 3)), ValueError, "in pixels, not (1, 2, 3)"),
        (lambda d: noise(d, box="1 2 3 4"), ValueError, "not ('1 2 3 4',)"),
        (
            lambda d: cut_box(Image.new("L", (2, 2)), (2, 0, 3, 1)),
            ValueError,
            "the image is 2 wide",
        ),
        (lambda d: read_image(d / "short.png", (8, 8)), OSError, "short.png cannot be read as"),
        (lambda d: read_image(d / "none.png", (8, 8)), OSError, "none.png cannot be read as"),
        (lambda d: read_image(d / "gone.png", (8, 8)), OSError, "gone.png cannot be read as"),
        (lambda d: store(d, "gone.png", keep=False)[[0]], OSError, "gone.png cannot be read as"),
        (lambda d: store(d, "broken.jpg")[[0]], OSError, "broken.jpg cannot be read as an image"),
        (
            lambda d: store(d, "1.png", size=(24, 12), fit="pad"),
            ValueError,
            "fit='pad' makes squares, but 24×12 is not one",
        ),
        (
            lambda d: store(d, "1.png", fit="padd"),
            ValueError,
            "unknown fit 'padd' (did you mean 'pad'?)",
        ),
        (
            lambda d: store(d, "0.png", "1.png", "2.png", boxes=[None, None]),
            ValueError,
            "there are 3 images and 2 boxes",
        ),
        (
            lambda d: store(d, "1.png", "2.png", boxes=[(40, 0, 99, 9)] * 2)[[1]],
            ValueError,
            "2.png is 32 wide and 64 high, but its box",
        ),
    ]
)
def test_pictures(pictures, call, error, keyword):
    refuses(lambda: call(pictures), error, keyword)


@messages(
    [
        (["1.png", "broken.jpg", "2.png", "worse.jpg"], ValueError, "2 of 4 images cannot be used"),
        (["worse.jpg"], ValueError, "worse.jpg cannot be read as an image"),
        (["gone.jpg"], OSError, "gone.jpg cannot be read"),
    ]
)
def test_a_cache_of_pictures_that_cannot_be_decoded(pictures, tmp_path, call, error, keyword):
    "All of them are named, and no file is left."
    refuses(lambda: store(pictures, *call, cache=tmp_path / "cache"), error, keyword)
    left = [p.suffix for p in tmp_path.rglob("*") if p.is_file()]
    assert ".npy" not in left
    assert ".part" not in left


LABELS = np.repeat([0, 1, 2, 3, 4], [4, 4, 9, 2, 8])
FEW = "a batch of 16 identities needs as many in training, but there are 5"


@messages(
    [
        (lambda: pk_batches(LABELS, 16), ValueError, FEW),
        (lambda: pk_batches(LABELS, 2, epoch_over="all"), ValueError, "unknown epoch_over 'all'"),
        (
            lambda: cutout(torch.zeros(1, 3, 48, 16), 32),
            ValueError,
            "cutout of 32 pixels does not fit into images of 48×16",
        ),
        (
            lambda: random_crop(torch.zeros(1, 3, 192, 64), (224, 224)),
            ValueError,
            "a crop of 224×224 pixels does not fit into images of 192×64",
        ),
        (
            lambda: random_crop(torch.zeros(1, 3, 20, 10), (20, 11)),
            ValueError,
            "a crop of 20×11 pixels does not fit",
        ),
        (lambda: augment(torch.zeros(1, 3, 20, 10), crop=(21, 1)), ValueError, "a crop of 21×1"),
    ]
)
def test_batches(call, error, keyword):
    refuses(call, error, keyword)


# --- covered pictures

PICTURES = torch.zeros(2, 3, 8, 4, dtype=torch.uint8)
TWO = image_seeds(["a.jpg", "b.jpg"])


@messages(
    [
        (lambda: occlude(PICTURES, 0.3, TWO, "middle"), ValueError, "unknown side 'middle'"),
        (lambda: occlude(PICTURES, 0, TWO, "top", "gray"), ValueError, "did you mean 'grey'"),
        (lambda: occlude(PICTURES, 1, TWO), ValueError, "share=1: cover 0 to below 1"),
        (lambda: occlude(PICTURES, -0.1, TWO), ValueError, "share=-0.1: cover"),
        (lambda: occlude(PICTURES, 0.3, TWO, "box", "crop"), ValueError, "a box is not one"),
        (lambda: occlude(PICTURES.float(), 0.3, TWO), ValueError, "before they are normalised"),
        (lambda: occlude(PICTURES, 0.3, TWO[:1]), ValueError, "2 images and 1 seeds"),
        (lambda: occlude(PICTURES, 0.3, TWO, "top", "patch"), ValueError, "needs `others`"),
        (lambda: corrupt(PICTURES, "fog", 1, TWO), ValueError, "unknown corruption 'fog'"),
        (lambda: rows_of_others(TWO, [1, 2], [2, 2]), ValueError, "no picture of another person"),
    ]
)
def test_cover(call, error, keyword):
    refuses(call, error, keyword)


# --- one's own pictures


def person(folder, n_images=4, first_camera=2):
    "Pictures of one person: two from camera 1, the others from camera 2."
    folder.mkdir(parents=True)
    for n in range(n_images):
        colour = (sum(folder.name.encode()) % 256, 60 * n, 9)
        name = f"cam{1 if n < first_camera else 2}_{n}.jpg"
        Image.new("RGB", (8, 16), colour).save(folder / name)


@pytest.fixture
def own(tmp_path):
    "A folder per person: seven people, of whom kim was in one camera only."
    folder = tmp_path / "my_pictures"
    for who in ("ana", "ben", "eve", "joe", "kim", "person 10", "person 2"):
        person(folder / who, first_camera=4 if who == "kim" else 2)
    return folder


def load(folder, **options):
    return load_dataset("folder", folder, **options)


def above(folder):
    return shutil.copytree(folder, folder.parent / "above" / "team").parent


@messages(
    [
        (
            lambda d: load(d, camera="view(.)"),
            ValueError,
            "fits none of the 28 file names, such as 'cam1_0.jpg'",
        ),
        (lambda d: load(d, camera="cam"), ValueError, "has 0 groups"),
        (lambda d: load(d, camera="("), ValueError, "not a regular expression"),
        (lambda d: load(d, test_share=1), ValueError, "test_share is 1"),
        (lambda d: load(d, test_share="half"), ValueError, "test_share is half"),
        (
            lambda d: load(above(d)),
            ValueError,
            "contain folders of pictures, not pictures: are the people one level down",
        ),
        (lambda d: load(d / "ana"), FileNotFoundError, "has no folder with pictures"),
        (lambda d: load(d.parent / "nowhere"), FileNotFoundError, "does not exist"),
        (lambda d: load(d).subset(0), ValueError, "at least one identity"),
    ]
)
def test_own_folders(own, call, error, keyword):
    refuses(lambda: call(own), error, keyword)


@messages(
    [
        (b"file,pid\na.jpg,1\n", ValueError, "has the columns file, pid: it needs path and pid"),
        (b"path,pid\na.jpg,1\nb.jpg,\n", ValueError, "line 3: pid is empty"),
        (
            b"path , pid,camid\nana/cam1_0.jpg, 0 ,1\nana/cam1_1.jpg,0,\n",
            ValueError,
            "line 3: camid is empty",
        ),
        ("path,pid\nä.jpg,1\n".encode("latin-1"), ValueError, "images.csv cannot be read as a"),
        (b"", ValueError, "cannot be read as a table"),
        (b"path,pid,split\na.jpg,1,val\n", ValueError, "unknown split in"),
    ]
)
def test_own_tables(own, call, error, keyword):
    (own / "images.csv").write_bytes(call)
    refuses(lambda: load(own), error, keyword)


def test_paths_are_relative_to_the_table(own):
    rows = [(f"{who}/cam1_{n}.jpg", who) for who in ("ana", "ben", "eve") for n in range(2)]
    lines = "".join(f"{path},{who},train\n" for path, who in rows)
    (own.parent / "mine.csv").write_text("path,pid,split\n" + lines)
    refuses(
        lambda: load(own.parent / "mine.csv"),
        FileNotFoundError,
        "has no image for folder's train",
    )


def test_a_person_may_be_called_na(own):
    "pandas would take NA for a missing value."
    lines = ["path,pid"]
    for who, pid in (("ana", "NA"), ("ben", "ben"), ("eve", "eve")):
        for n in range(4):
            lines.append(f"{who}/cam{1 if n < 2 else 2}_{n}.jpg, {pid}")
    (own / "images.csv").write_text("\n".join(lines) + "\n")
    assert load(own).attributes.name.tolist() == ["NA", "ben", "eve"]


def test_three_people_are_enough(tmp_path):
    "With two pictures each: two people to train on, the others to test on."
    for n, who in enumerate(("ana", "ben", "eve", "joe"), 1):
        person(tmp_path / who)
        if n == 2:
            few = "2 people, 2 of them with two pictures or more: these are too few"
            refuses(lambda: load(tmp_path), ValueError, few)
        if n > 2:
            data = load(tmp_path)
            assert (data.num_classes, data.query.pid.nunique()) == (2, n - 2)


def test_a_person_without_a_picture_that_can_be_used(own):
    "A link to a folder is a person like any other."
    few = own.parent / "few"
    for who in ("ana", "ben", "eve", "joe"):
        shutil.copytree(own / who, few / who)
    (few / "zoe").mkdir()
    (few / "zoe" / "IMG_1.heic").touch()
    (few / "link").symlink_to(own / "kim")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = load(few)
    assert data.attributes.name.tolist() == ["ana", "ben", "eve", "joe", "link"]
    assert data.problems.path.tolist() == [str(few / "zoe")]
    assert "this person is left out" in data.problems.problem[0]


# --- benchmarks


def test_names_of_another_form():
    assert parse_name("0002_c1s1_000451_03.png") is None


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    "A data root with small copies of several sets; nobody changes it."
    folder = tmp_path_factory.mktemp("sets").resolve()
    for name in ("market1501", "msmt17", "sop", "cuhk03-labeled", "occluded-reid", "grocery"):
        write_fixture(name, folder)
    packed = folder / "packed"
    packed.mkdir()
    market = "Market-1501-v15.09.15"
    shutil.make_archive(str(packed / market), "zip", folder, market)
    shutil.make_archive(str(packed / "m"), "gztar", folder, market)
    return folder


MARKET = "Market-1501-v15.09.15"


@messages(
    [
        (lambda d: load_dataset("market-1501", d), ValueError, "did you mean 'market1501'"),
        (
            lambda d: load_dataset("mnist", d),
            ValueError,
            "choose one of synthped-mini, synthped-small, synthped-market, market1501, dukemtmc",
        ),
        (lambda d: load_dataset("market1501+market1501", d), ValueError, "names a data set twice"),
        (lambda d: load_dataset("market1501+mnist", d), ValueError, "unknown dataset 'mnist'"),
        (
            lambda d: load_dataset("market1501+sop", d),
            ValueError,
            "only sets of people can be joined, and sop is not one",
        ),
        (lambda d: load_dataset("market1501+folder", d), ValueError, "cannot be joined"),
        (
            lambda d: load_dataset("market1501+occluded-reid", d),
            ValueError,
            "occluded-reid has no training images: train on another set",
        ),
        (
            lambda d: load_dataset("occluded-reid", d).num_classes,
            ValueError,
            "test on this one (-p test_dataset occluded-reid, or reidnb evaluate RUN --on",
        ),
        (
            lambda d: load_dataset("market1501+grocery", d),
            ValueError,
            "only sets of people can be joined, and grocery is not one",
        ),
        (
            lambda d: load_dataset("market1501+msmt17", d, camera="x"),
            ValueError,
            "cannot be joined",
        ),
        (
            lambda d: load_dataset("synthped-mini", d, camera="x"),
            ValueError,
            "camera is for the data set 'folder'",
        ),
        (lambda d: load_dataset("market1501", d).subset(0), ValueError, "at least one identity"),
        (
            lambda d: load_dataset("market1501", d / "packed" / "m.tar.gz"),
            FileNotFoundError,
            "is not unpacked yet: reidnb unpack",
        ),
        (
            lambda d: load_dataset("market1501", d / "packed"),
            FileNotFoundError,
            "is not unpacked yet: reidnb unpack",
        ),
        (
            lambda d: load_dataset("folder", d / "packed" / "m.tar.gz"),
            ValueError,
            "is an archive: unpack it first",
        ),
        (
            lambda d: load_dataset("market1501", d / "nowhere"),
            FileNotFoundError,
            "which does not exist",
        ),
        (lambda d: load_dataset("market1501", d / "nowhere"), FileNotFoundError, f"{MARKET}/"),
        (
            lambda d: load_dataset("market1501", d / "nowhere"),
            FileNotFoundError,
            "bounding_box_train/  MISSING",
        ),
        (
            lambda d: load_dataset("market1501", d / "nowhere"),
            FileNotFoundError,
            'load_dataset("synthped-small")',
        ),
        (  # too high
            lambda d: load_dataset("market1501", d.parent),
            FileNotFoundError,
            f"{MARKET}: give that folder as the root.",
        ),
        (  # too low
            lambda d: load_dataset("market1501", d / MARKET / "query"),
            FileNotFoundError,
            f"{MARKET}: give that folder as the root.",
        ),
        (
            lambda d: load_dataset("cuhk03-detected", d / "cuhk03-np" / "detected"),
            FileNotFoundError,
            "give that folder as the root",
        ),
    ]
)
def test_names_and_roots(sets, call, error, keyword):
    refuses(lambda: call(sets), error, keyword)


def test_half_a_set(sets, tmp_path):
    own = shutil.copytree(sets / MARKET, tmp_path / MARKET)
    shutil.rmtree(own / "query")
    for keyword in (
        "is incomplete",
        "lacks query",
        "query/               MISSING",
        "bounding_box_test/   found",
    ):
        refuses(lambda: load_dataset("market1501", tmp_path), FileNotFoundError, keyword)
    (own / "query").mkdir()
    (own / "query" / "IMG_1.jpg").touch()
    refuses(
        lambda: load_dataset("market1501", own),
        FileNotFoundError,
        "has no image for market1501's query (1 were left out",
    )


def test_another_size_of_synthped_is_not_touched(mini, tmp_path):
    shutil.copytree(mini / "synthped-mini", tmp_path / "synthped-small")
    for keyword in ("contains SynthPed mini", "not small"):
        refuses(lambda: load_dataset("synthped-small", tmp_path), FileExistsError, keyword)
    assert any((tmp_path / "synthped-small" / "query").iterdir())
    shutil.rmtree(tmp_path / "synthped-small" / "query")
    (tmp_path / "synthped-small").rename(tmp_path / "synthped-mini")
    refuses(lambda: load_dataset("synthped-mini", tmp_path), FileNotFoundError, "lacks query")


@messages(
    [
        ("0000/0000_000_01_0303morning_0008_0.jpg\n", ValueError, "list_val.txt, line 1: expected"),
        ("0000/0000_000_01_0303morning_0008_9.jpg x\n", ValueError, "is not a valid pid"),
    ]
)
def test_a_broken_list(sets, tmp_path, call, error, keyword):
    own = shutil.copytree(sets / "MSMT17_V1", tmp_path / "MSMT17_V1")
    (own / "list_val.txt").write_text(call)
    refuses(lambda: load_dataset("msmt17", own), error, keyword)


def test_what_a_list_should_have(tmp_path):
    (tmp_path / "list.txt").write_text("a b c\n")
    refuses(
        lambda: read_list(tmp_path / "list.txt", "path pid"),
        ValueError,
        "list.txt, line 1: expected 'path pid', found 'a b c'",
    )


def test_listed_images_that_are_not_there(sets, tmp_path):
    own = shutil.copytree(sets / "MSMT17_V1", tmp_path / "MSMT17_V1")
    (own / "list_val.txt").write_text("0000/0000_000_01_0303morning_9999_9.jpg 0\n")
    found = doctor("msmt17", own)
    assert not found.sound
    assert "listed images that are missing" in set(found.findings.what)
    with pytest.warns(UserWarning, match="listed, but missing"):
        data = load_dataset("msmt17", own)
    assert data.problems.problem.tolist() == ["listed, but missing: left out"]


@pytest.mark.parametrize(
    "file, old, new, keyword",
    [
        ("classes.csv", "Class ID (int)", "ID", "has no column Class ID (int)"),
        ("classes.csv", ",2,Juice", ",99,Juice", "no packaged product of the class of train/"),
        ("val.txt", ", 4, ", ", four, ", "'four' is not a valid class, which is an integer"),
        ("val.txt", ", 4, ", " ", "val.txt, line 3: expected 'path class coarse'"),
    ],
)
def test_lists_of_groceries(sets, tmp_path, file, old, new, keyword):
    own = shutil.copytree(sets / "GroceryStoreDataset", tmp_path / "GroceryStoreDataset")
    text = (own / "dataset" / file).read_text()
    assert old in text
    (own / "dataset" / file).write_text(text.replace(old, new))
    refuses(lambda: load_dataset("grocery", own), ValueError, keyword)


def test_a_grocery_that_is_not_there(sets, tmp_path):
    own = shutil.copytree(sets / "GroceryStoreDataset", tmp_path / "GroceryStoreDataset")
    lost = next((own / "dataset" / "val" / "Packages").rglob("*.jpg"))
    lost.unlink()
    found = doctor("grocery", tmp_path)
    assert not found.sound
    assert lost.name in str(found)
    assert "listed images that are missing" in set(found.findings.what)
    shutil.rmtree(own / "dataset" / "test")
    with pytest.warns(UserWarning, match="listed, but missing"):
        assert load_dataset("grocery", own).stats().cameras.tolist() == [2, 2, 2]


def test_occluded_pictures_of_another_form(sets, tmp_path):
    own = shutil.copytree(sets / "Occluded_REID", tmp_path / "Occluded_REID")
    first, second = sorted(own.joinpath("occluded_body_images").glob("00*/*.tif"))[:2]
    shutil.copy(first, second.with_name("photo.tif"))  # beside a picture that is read
    shutil.copy(first, second.with_name("photo.bmp"))
    found = doctor("occluded-reid", tmp_path)
    assert not found.sound
    said = found.findings.set_index("what")
    misnamed = said.loc["names of another form than the set's"]
    assert (misnamed.kind, misnamed["count"]) == ("fault", 1)
    assert "photo.tif" in misnamed.examples[0]
    other_kind = said.loc["image files of a kind that is not read"]
    assert "photo.bmp" in other_kind.examples[0] and other_kind["count"] == 1
    assert other_kind.advice == "convert them: only .jpg, .jpeg, .png, .tif, .tiff are read"
    for path in own.joinpath("occluded_body_images").rglob("*.tif"):
        path.rename(path.with_suffix(".bmp"))
    for keyword in (
        "has no image for occluded-reid's query",
        "Only .jpg, .jpeg, .png, .tif, .tiff are read. Images are named like 001/001_01.tif",
    ):
        refuses(lambda: load_dataset("occluded-reid", own), FileNotFoundError, keyword)


def test_matlab_files(tmp_path):
    own = write_fixture("cars196", tmp_path)
    (own / "cars_annos.mat").write_bytes(b"MATLAB 5.0 no")
    refuses(lambda: load_dataset("cars196", own), ValueError, "cannot be read as a MATLAB file")
    scipy.io.savemat(own / "cars_annos.mat", {"other": 1})
    refuses(lambda: load_dataset("cars196", own), ValueError, "has no annotations with")
    assert "other" in read_mat(own / "cars_annos.mat")


@pytest.mark.parametrize("form", ["mat5", "hdf5"])
def test_cuhk03_from_its_matlab_files(tmp_path, form):
    "By the package, not in the notebook, whose cells have more names than the package."
    own = write_fixture("cuhk03-labeled", tmp_path, form=form)
    data = load_dataset("cuhk03-labeled", tmp_path)
    assert data.root == own
    assert not len(data.problems)
    assert Image.open(data.train.path[0]).mode == "RGB"


def test_a_config_file_of_the_other_kind(tmp_path):
    "It names a picture that this kind has not: nothing is written."
    own = write_fixture("cuhk03-labeled", tmp_path, form="mat5")
    config = next(tmp_path.rglob("cuhk03_new_protocol_config_labeled.mat"))
    variables = {k: v for k, v in scipy.io.loadmat(config).items() if k[0] != "_"}
    first_query = int(variables["query_idx"].ravel()[0])
    variables["filelist"][first_query - 1, 0][:] = "1_999_1_01.png"
    scipy.io.savemat(config, variables)
    found = doctor("cuhk03-labeled", tmp_path)
    assert not found.sound
    lost = "1 pictures of cuhk03_new_protocol_config_labeled.mat are not among the labeled ones"
    assert lost in str(found)
    assert "config file of the other kind" in str(found)
    assert not (own / "cuhk03-np").exists()


@pytest.mark.parametrize(
    "words, keyword",
    [
        (["--camera", "("], "camera='(' is not a regular expression"),
        (["--camera", "("], "put one pair of parentheses around the camera"),
        (["--camera", "cam"], "camera='cam' has 0 groups: put one pair of parentheses"),
        (["--test-share", 3], "test_share is 3.0: give a share of the people, above 0 and"),
    ],
)
def test_the_doctor_blames_an_option_and_not_the_files(own, words, keyword):
    called = reidnb("doctor", "folder", own, *words)
    assert called.status == 2
    assert called.stderr.startswith("error: ")
    assert keyword in called.stderr
    assert called.stdout == ""


def test_the_doctor_refuses_an_option_of_another_set(sets):
    called = reidnb("doctor", "market1501", sets, "--camera", "c(.)")
    assert called.status == 2
    assert "camera is for the data set 'folder', not for market1501" in called.stderr


def test_the_doctor_names_an_archive(sets):
    found = doctor("market1501", sets / "packed")
    assert not found.sound
    assert "is not unpacked yet: reidnb unpack" in str(found)
    assert f"{MARKET}.zip" in str(found)


# --- archives


@pytest.fixture
def packed(sets, tmp_path):
    "Whole archives, and an empty folder to unpack into."
    target = tmp_path / "target"
    target.mkdir()
    return SimpleNamespace(whole=sets / "packed", folder=tmp_path, target=target)


@pytest.mark.parametrize(
    "name", ["../out.txt", "/out.txt", "a/../../out.txt", "C:\\out.txt", "..\\out.txt"]
)
def test_an_archive_that_would_write_elsewhere(packed, name):
    with zipfile.ZipFile(packed.folder / "evil.zip", "w") as z:
        z.writestr("good.txt", "x")
        z.writestr(name, "x")
    refuses(
        lambda: unpack(packed.folder / "evil.zip", packed.target),
        ValueError,
        "nothing was unpacked",
    )
    assert not any(packed.target.iterdir())
    assert not (packed.folder / "out.txt").exists()


def test_links_in_archives(packed):
    with tarfile.open(packed.folder / "evil.tar", "w") as t:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        t.addfile(link)
    with zipfile.ZipFile(packed.folder / "evil.zip", "w") as z:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        z.writestr(info, "/etc")
    for name in ("evil.tar", "evil.zip"):
        with pytest.raises(ValueError, match="a link or a device"):
            unpack(packed.folder / name, packed.target)
    assert not any(packed.target.iterdir())


def test_backslashes_in_archives(packed):
    "As some programs for Windows write them."
    with zipfile.ZipFile(packed.folder / "windows.zip", "w") as z:
        info = zipfile.ZipInfo("x")
        info.filename = "set\\query\\a.jpg"
        z.writestr(info, "x")
    unpack(packed.folder / "windows.zip", packed.target)
    assert (packed.target / "set" / "query" / "a.jpg").is_file()


def damaged(name, packed):
    "A part of an archive, or one with a wrong byte."
    whole = (packed.whole / "m.tar.gz").read_bytes()
    plain = gzip.decompress(whole)
    members = [k for k in range(512 * 9, len(plain), 512) if plain[k + 257 : k + 262] == b"ustar"]
    middle = members[5]
    return {
        "half.tar.gz": whole[: len(whole) // 2],
        "half.tar": plain[:middle],
        "holed.tar": plain[:middle] + b"?" * 512 + plain[middle + 512 :],
        "flipped.tar.gz": whole[:-8] + b"12345678",
        "half.zip": (packed.whole / f"{MARKET}.zip").read_bytes()[:9000],
    }[name]


@pytest.mark.parametrize(
    "name", ["half.tar.gz", "half.tar", "holed.tar", "flipped.tar.gz", "half.zip"]
)
def test_damaged_archives(packed, name):
    (packed.folder / name).write_bytes(damaged(name, packed))
    refuses(lambda: unpack(packed.folder / name, packed.target), ValueError, "fetch it again")
    assert not any(packed.target.iterdir())


def test_what_is_no_archive(packed):
    (packed.folder / "x.rar").write_bytes(b"Rar!")
    refuses(
        lambda: unpack(packed.folder / "x.rar", packed.target),
        ValueError,
        "not a zip or tar archive",
    )
    refuses(
        lambda: unpack(packed.folder / "no.zip", packed.target), FileNotFoundError, "is not there"
    )


def test_what_is_there_already(packed):
    for name in (f"{MARKET}.zip", "m.tar.gz"):
        place = packed.target / name
        unpack(packed.whole / name, place)
        with pytest.raises(FileExistsError, match="exists already"):
            unpack(packed.whole / name, place)
