"""Are the notebooks clean, and does everything that follows from them follow?

The package is the notebooks' export, README.md is nbs/index.ipynb, and the package's copies of
data files are equal to them. The check compares with a fresh export, and names what differs.

    python tests/in_step.py            # check; exit status 1 when something is out of step
    python tests/in_step.py --write    # write README.md and the copies of data files
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = (
    "claims.yaml",
    "paper_results.csv",
    "tables",
)  # files and folders of data/ that the package reads


def readme(root=ROOT):
    "README.md: the index notebook without its code, its links seen from the project's root."
    import nbformat
    from nbconvert import MarkdownExporter

    nb = nbformat.read(root / "nbs" / "index.ipynb", 4)
    nb.cells = [c for c in nb.cells if not c.source.startswith("#| default_exp")]
    exporter = MarkdownExporter(exclude_input=True, exclude_output_prompt=True)
    text, _ = exporter.from_notebook_node(nb)
    text = re.sub(r"(\]\(|src=\")\.\./", r"\1", text)  # ../reports/x.png -> reports/x.png
    text = re.sub(r"\]\(([\w/]+\.ipynb)\)", r"](nbs/\1)", text)  # core.ipynb -> nbs/core.ipynb
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def copies():
    "Pairs of a data file and the package's copy of it."
    for name in SHIPPED:
        source = ROOT / "data" / name
        for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
            yield file, ROOT / "reidnb" / "shipped" / file.relative_to(ROOT / "data")


def write():
    "Write what follows from the notebooks and is no export."
    (ROOT / "README.md").write_text(readme())
    shutil.rmtree(ROOT / "reidnb" / "shipped", ignore_errors=True)
    for file, copy in copies():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def same(a, b):
    return a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()


def run(module, function, cwd):
    "Call a function of nbdev in a process of its own."
    code = f"from nbdev.{module} import {function}; {function}()"
    p = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    if p.returncode:
        sys.exit(f"{function} failed:\n{p.stdout}{p.stderr}")


def written(base):
    "The notebooks and modules below a folder, as paths relative to it."
    for pattern in ("nbs/**/*.ipynb", "reidnb/**/*.py"):
        for file in base.glob(pattern):
            if ".ipynb_checkpoints" not in file.parts:
                yield file.relative_to(base)


def differing():
    "Names of files that cleaning and exporting would change, add or leave behind."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "copy"
        (copy / "reidnb").mkdir(parents=True)
        for name in ("settings.ini", "pyproject.toml", "reidnb/__init__.py", "reidnb/__main__.py"):
            shutil.copy(ROOT / name, copy / name)
        ignored = shutil.ignore_patterns(".ipynb_checkpoints")
        shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=ignored)
        run("clean", "nbdev_clean", cwd=copy)
        run("doclinks", "nbdev_export", cwd=copy)
        names = {*written(ROOT), *written(copy)}
        return sorted(str(name) for name in names if not same(ROOT / name, copy / name))


def main():
    wrong = differing()
    if not (ROOT / "README.md").is_file() or (ROOT / "README.md").read_text() != readme():
        wrong.append("README.md")
    expected = dict((copy, file) for file, copy in copies())
    found = {p for p in (ROOT / "reidnb" / "shipped").rglob("*") if p.is_file()}
    for copy in sorted(found | set(expected)):
        if copy not in expected or not same(copy, expected[copy]):
            wrong.append(str(copy.relative_to(ROOT)))
    if wrong:
        sys.exit(
            f"out of step with the notebooks: {', '.join(wrong)}\n"
            "run `make export`, look at the difference, and commit it"
        )
    print("notebooks are clean; reidnb/ and README.md are in step with them")


if __name__ == "__main__":
    if "--write" in sys.argv:
        write()
    else:
        main()
