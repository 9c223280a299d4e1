"""Are the notebooks clean, is reidnb/ their export, is README.md nbs/index.ipynb? Compares with a
fresh copy and names what differs.

python tests/in_step.py            # check, exit status 1 when something is out of step
python tests/in_step.py --write    # write README.md from nbs/index.ipynb
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def readme(root=ROOT):
    "README.md: the index notebook without its code, its links seen from the project's root."
    import nbformat
    from nbconvert import MarkdownExporter

    nb = nbformat.read(root / "nbs" / "index.ipynb", 4)
    nb.cells = [c for c in nb.cells if not c.source.startswith("#| default_exp")]
    text, _ = MarkdownExporter(exclude_input=True, exclude_output_prompt=True).from_notebook_node(
        nb
    )
    text = re.sub(r"(\]\(|src=\")\.\./", r"\1", text)  # ../reports/x.png -> reports/x.png
    text = re.sub(
        r"\]\(([\w/]+\.ipynb)\)", r"](nbs/\1)", text
    )  # 06_masks.ipynb  -> nbs/06_masks.ipynb
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def run(*args, cwd):
    p = subprocess.run(
        [sys.executable, "-c", f"from nbdev.{args[0]} import {args[1]}; {args[1]}()"],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    if p.returncode:
        sys.exit(f"{args[1]} failed:\n{p.stdout}{p.stderr}")


def differing():
    "Names of files that cleaning and exporting would change, add or leave behind."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "copy"
        copy.mkdir()
        for f in ("settings.ini", "pyproject.toml"):
            shutil.copy(ROOT / f, copy / f)
        shutil.copytree(
            ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints")
        )
        (copy / "reidnb").mkdir()
        shutil.copy(ROOT / "reidnb" / "__init__.py", copy / "reidnb")
        run("clean", "nbdev_clean", cwd=copy)
        run("doclinks", "nbdev_export", cwd=copy)
        names = {
            p.relative_to(base)
            for base in (ROOT, copy)
            for pat in ("nbs/**/*.ipynb", "reidnb/*.py")
            for p in base.glob(pat)
            if ".ipynb_checkpoints" not in p.parts
        }
        return sorted(
            str(n)
            for n in names
            if not (
                (ROOT / n).is_file()
                and (copy / n).is_file()
                and (ROOT / n).read_bytes() == (copy / n).read_bytes()
            )
        )


if __name__ == "__main__":
    if "--write" in sys.argv:
        (ROOT / "README.md").write_text(readme())
        sys.exit()
    wrong = differing()
    if not (ROOT / "README.md").is_file() or (ROOT / "README.md").read_text() != readme():
        wrong.append("README.md")
    if wrong:
        sys.exit(
            "out of step with the notebooks: "
            + ", ".join(wrong)
            + "\nrun `make export`, look at the difference, and commit it"
        )
    print("notebooks are clean; reidnb/ and README.md are in step with them")
