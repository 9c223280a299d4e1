"""What SynthPed and the fixtures refuse, and what they leave behind when they are interrupted."""

import json

import pytest
from commands import reidnb
from scipy.io import loadmat

from reidnb.data import fixtures
from reidnb.data.fixtures import Fixture, write_fixture
from reidnb.data.synthped import build_synthped, whole_folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "Folders that are taken: a SynthPed and three fixtures, a reader's own picture, a real data set."
    root = tmp_path_factory.mktemp("taken")
    build_synthped(root / "mini", "mini", workers=1)
    (root / "photos").mkdir()
    (root / "photos" / "me.jpg").touch()
    write_fixture("msmt17", root / "keep")
    write_fixture("folder", root / "keep")
    write_fixture("cuhk03-labeled", root / "hdf5", form="hdf5")
    (root / "real" / "CUB_200_2011").mkdir(parents=True)
    (root / "real" / "CUB_200_2011" / "images.txt").write_text("the real thing")
    return root


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


REFUSED = {
    "another seed": (
        lambda root: build_synthped(root / "mini", "mini", seed=3),
        FileExistsError,
        "pass overwrite=True to replace it",
    ),
    "no SynthPed": (
        lambda root: build_synthped(root / "photos", "mini"),
        FileExistsError,
        "is not a SynthPed set",
    ),
    "no SynthPed, not even with overwrite": (
        lambda root: build_synthped(root / "photos", "mini", overwrite=True),
        FileExistsError,
        "is not a SynthPed set",
    ),
    "size": (
        lambda root: build_synthped(root / "new", "smal"),
        ValueError,
        "did you mean 'small'",
    ),
    "fixture of another seed": (
        lambda root: write_fixture("msmt17", root / "keep", seed=1),
        FileExistsError,
        "remove it or choose another root",
    ),
    "fixture of another form": (
        lambda root: write_fixture("folder", root / "keep", form="csv"),
        FileExistsError,
        "'form': 'folders'",
    ),
    "no fixture": (
        lambda root: write_fixture("cub200", root / "real"),
        FileExistsError,
        "contains something that is not a fixture",
    ),
    "name": (
        lambda root: write_fixture("cub", root / "new"),
        ValueError,
        "did you mean 'cub200'",
    ),
    "form": (
        lambda root: write_fixture("msmt17", root / "new", form="v2"),
        ValueError,
        "unknown form of msmt17 'v2'",
    ),
    "form where there is one only": (
        lambda root: write_fixture("sop", root / "new", form="V1"),
        ValueError,
        "unknown form of sop",
    ),
    "SciPy knows MATLAB 7.3 by its header": (
        lambda root: loadmat(root / "hdf5" / "cuhk03" / "cuhk03_release" / "cuhk-03.mat"),
        NotImplementedError,
        "HDF",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_there_is_refused_and_left_alone(case, root):
    call, error, keyword = REFUSED[case]
    before = contents(root)
    with pytest.raises(error) as e:
        call(root)
    assert keyword in str(e.value)
    assert contents(root) == before
    assert not (root / "new").exists()


def test_a_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        with whole_folder(tmp_path / "broken") as folder:
            (folder / "half").touch()
            raise RuntimeError("power cut")
    assert not list(tmp_path.iterdir())


def test_a_fixture_is_whole_or_absent(tmp_path, monkeypatch):
    def power_cut(folder, seed, form):
        (folder / "half").touch()
        raise RuntimeError("power cut")

    monkeypatch.setitem(fixtures.FIXTURES, "sop", Fixture(power_cut, {"": "sop"}))
    with pytest.raises(RuntimeError, match="power cut"):
        write_fixture("sop", tmp_path / "x")
    assert not [p for p in tmp_path.rglob("*") if p.is_file() or p.name != "x"]


def test_the_command_line_reports_an_error(tmp_path):
    assert reidnb("fixture", "folder", tmp_path).status == 0
    assert json.loads((tmp_path / "my-photos" / "fixture.json").read_text())["fixture"] == "folder"
    called = reidnb("fixture", "duke", tmp_path)
    assert called.status == 2
    assert "did you mean 'dukemtmc'" in called.stderr


@pytest.mark.parametrize(
    "name, keyword",
    [
        ("cub200", "unknown form of cub200 'V9': it has one form only, so leave form out"),
        ("msmt17", "unknown form of msmt17 'V9': choose one of V1, V2"),
    ],
)
def test_a_form_that_a_set_has_not(tmp_path, name, keyword):
    called = reidnb("fixture", name, tmp_path, "--form", "V9")
    assert called.status == 2
    assert keyword in called.stderr
    assert not list(tmp_path.iterdir())
