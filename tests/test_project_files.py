"""The files of a maintained project agree with each other, and their commands exist."""

import configparser
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import reidnb
from reidnb.__main__ import main as command_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
VERSIONS = ["3.10", "3.11", "3.12", "3.13"]


def settings():
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def read_yaml(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow):
    for job in workflow["jobs"].values():
        yield from job["steps"]


def commands(text):
    "The targets of `make …`, and `reidnb …` as pairs of the command and what follows."
    made = re.findall(r"(?<![\w/-])make ([a-z][a-z-]*|\.venv/installed)", text)
    called = re.findall(r"(?<![\w.-])reidnb ([a-z][a-z-]+)((?: [^\n|`]*)?)", text)
    return made, called


def check_commands(text):
    "Each target is in the Makefile, each subcommand and its options are the command line's."
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    made, called = commands(text)
    for target in made:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.M), f"make {target}"
    for name, rest in called:
        done = CliRunner().invoke(command_line, [name, "--help"])
        assert done.exit_code == 0, f"reidnb {name}"
        for option in re.findall(r" (--[a-z-]+)", rest):
            assert option in done.output, f"reidnb {name} {option}"
    return len(made) + len(called)


def test_one_version_name_and_place_everywhere():
    citation = read_yaml(ROOT / "CITATION.cff")
    ini = settings()
    repository = f"https://github.com/{ini['user']}/{ini['repo']}"
    assert citation["version"] == ini["version"] == reidnb.__version__
    assert citation["repository-code"] == PROJECT["urls"]["Repository"] == repository
    assert (
        citation["url"]
        == PROJECT["urls"]["Homepage"]
        == f"https://{ini['user']}.github.io/{ini['repo']}"
    )
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert citation["authors"][0]["name"] == PROJECT["authors"][0]["name"] == ini["author"]


def test_the_citation_has_what_the_format_asks_for():
    "Required keys of the Citation File Format 1.2.0, and the papers with their authors."
    citation = read_yaml(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert len(citation["references"]) == 5
    papers = (ROOT / "docs" / "guide" / "papers.md").read_text(encoding="utf-8")
    for paper in citation["references"]:
        assert {"type", "title", "authors", "year"} <= set(paper)
        assert paper["title"] in papers
        names = [(a["family-names"], a["given-names"]) for a in paper["authors"]]
        assert len(set(names)) == len(names)
        assert ", ".join(family for family, _ in names) in papers


def test_every_supported_python_is_tested():
    "The lowest is that of the package, and each has a classifier and a job."
    assert PROJECT["requires-python"] == f">={VERSIONS[0]}"
    assert settings()["min_python"] == VERSIONS[0]
    named = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if ":: Python :: 3." in c]
    assert named == VERSIONS
    test = read_yaml(ROOT / ".github" / "workflows" / "test.yml")["jobs"]
    assert test["test"]["strategy"]["matrix"]["python"] == VERSIONS
    assert test["smoke"]["strategy"]["matrix"]["system"] == ["macos-latest", "windows-latest"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_says_when_where_and_what(path):
    "It has a limit on time, the least rights, and commands that exist."
    workflow = read_yaml(path)
    assert {"name", True, "permissions", "jobs"} <= set(workflow)  # YAML reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    assert any("timeout-minutes" in job for job in workflow["jobs"].values())
    n_commands = 0
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
            continue
        for file in re.findall(r"(?:\.ci|tests)/[\w.]+", step["run"]):
            assert (ROOT / file).is_file(), file
        n_commands += check_commands(step["run"])
    assert n_commands or path.stem not in ("site", "release")


def test_the_site_is_published_from_where_it_is_built():
    site = read_yaml(ROOT / ".github" / "workflows" / "site.yml")
    assert site[True]["push"]["branches"] == [settings()["branch"]]
    paths = [s["with"]["path"] for s in steps(site) if "pages-artifact" in s.get("uses", "")]
    assert paths == ["_site"]
    assert 'ROOT / "_site"' in (ROOT / "docs" / "make_site.py").read_text(encoding="utf-8")


def test_the_guide_names_what_there_is():
    "Its commands, its files and its links."
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert check_commands(text) > 6
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / target).exists(), target
    for file in re.findall(r"(?:nbs|tests|docs)/[\w/]+\.(?:ipynb|py)", text):
        assert (ROOT / file).is_file(), file


def test_the_container_and_binder_install_the_project():
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert check_commands(container["postCreateCommand"]) == 1
    assert container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    image = re.search(r"python:(\d\.\d+)", container["image"])[1]
    runtime = (ROOT / "binder/runtime.txt").read_text().strip().removeprefix("python-")
    assert image in VERSIONS and runtime in VERSIONS
    constraints, package = (ROOT / "binder/requirements.txt").read_text().split("\n")[:2]
    assert (ROOT / "binder" / constraints.removeprefix("-c ")).resolve() == ROOT / "constraints.txt"
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", package)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("name", ["fault", "wish"])
def test_an_issue_template_has_a_head_and_few_words(name):
    text = (ROOT / ".github/ISSUE_TEMPLATE" / f"{name}.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    assert {"name", "about"} <= set(yaml.safe_load(head))
    assert len(body.split()) < 60
