"""The notebooks as a static site: run, their links made links between pages, every link checked.

python docs/make_site.py                 # into _site/; a notebook is run again only when its code,
                                         # the package or the runs it reads have changed
python docs/make_site.py --no-execute    # seconds: outputs only where they are known from before, and the page says so
"""

import argparse
import configparser
import contextlib
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import front
import nbformat
import public_names
import sentences

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r'(\]\(|<img[^>]*?\ssrc=")([^)\s"]+)')
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.S | re.M)

# --- what is shown, and where


def notebooks():
    "Every notebook of nbs/, in order of path."
    return sorted(
        p
        for p in (ROOT / "nbs").rglob("*.ipynb")
        if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)
    )


def place(path):
    """Where a file of the repository lies in the site.

    What is in nbs/ at the top, docs/guide as guide/, the rest as it lies; a folder as a page that
    lists it.
    """
    to = path.relative_to(ROOT)
    if to.as_posix() == f"docs/guide/{HELP}":
        return Path(HELP)  # it ends with every sentence that the package says
    if to.parts[0] in ("nbs", "docs"):
        to = to.relative_to(to.parts[0])
    return to / "index.md" if path.is_dir() else to


def relink(text, at, wanted, broken):
    """Markdown of the file `at` with its links as they are in the site.

    Notes the files they want, and those that are not there.
    """

    def one(m):
        target, _, fragment = m[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return m[0]
        path = (at.parent / unquote(target)).resolve()
        if not path.exists() or ROOT not in path.parents:
            broken.append(f"{at.relative_to(ROOT)}: {m[2]}")
            return m[0]
        wanted.append(path)
        return (
            m[1]
            + quote(Path(os.path.relpath(place(path), place(at).parent)).as_posix())
            + (f"#{fragment}" if fragment else "")
        )

    return "".join(
        part if i % 2 else LINK.sub(one, part) for i, part in enumerate(CODE.split(text))
    )


def anchor(heading):
    return heading.replace(" ", "-")  # as Jupyter makes them; conf.py names this function


# --- notebooks: run, and stripped of what only nbdev reads


def directives(source):
    "A cell's `#|` lines, without the mark, and the rest of it."
    lines = source.splitlines()
    n = next((i for i, line in enumerate(lines) if not re.match(r"\s*#\s*\|", line)), len(lines))
    return [line.split("|", 1)[1].strip() for line in lines[:n]], "\n".join(lines[n:]).strip("\n")


def digest(*paths):
    "One hash of the names and contents of files."
    h = hashlib.sha256()
    for p in sorted(paths):
        h.update(f"{p.relative_to(ROOT)}\0".encode() + p.read_bytes() + b"\0")
    return h.hexdigest()


@functools.cache
def surroundings(reads_runs):
    "A hash of what a notebook's outputs depend on beside its own code."
    runs = []
    if reads_runs:
        kinds = (".csv", ".json", ".md", ".npz")
        runs = [p for p in (ROOT / "reports/published").rglob("*") if p.suffix in kinds]
    data = [*(ROOT / "data").glob("*.csv"), *(ROOT / "data").glob("*.yaml")]
    data += (ROOT / "data/tables").glob("*.yaml")
    packages = ("torch", "torchvision", "numpy", "pandas", "matplotlib", "ipykernel")
    versions = [f"{name} {version(name)}" for name in packages]
    package = digest(*(ROOT / "reidnb").rglob("*.py"), *data, *runs)
    return "\0".join([package, sys.version, *versions])


def kept(path, nb):
    "Where the outputs of this code are kept: build/executed/, by notebook and hash."
    code = [c.source for c in nb.cells if c.cell_type == "code"]
    reads_runs = any("reports" in s and "export" not in directives(s)[0] for s in code)
    key = hashlib.sha256("\0".join([*code, surroundings(reads_runs)]).encode()).hexdigest()[:16]
    return ROOT / "build" / "executed" / f"{'-'.join(place(path).with_suffix('').parts)}.{key}.json"


def environment():
    """As under nbdev_test, where the papermill notebooks take seconds.

    `reidnb` is the one beside nbs/.
    """
    return os.environ | {
        "IN_TEST": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def run(path):
    """Runs a notebook in its own folder, as nbdev_test does, unless its outputs are kept.

    Answers what went wrong.
    """
    from nbclient import NotebookClient

    nb = nbformat.read(path, 4)
    to = kept(path, nb)
    began = time.time()
    if to.is_file():
        return None
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    flags = {"eval: false", *ini["DEFAULT"]["tst_flags"].split()}
    for c in nb.cells:
        if c.cell_type == "code" and flags & set(directives(c.source)[0]):
            c.metadata.tags = ["skip-execution"]
    try:
        NotebookClient(
            nb,
            timeout=3600,
            kernel_name="python3",
            store_widget_state=False,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": str(path.parent)}},
        ).execute(env=environment())
    except Exception as e:
        where = next(
            (
                c.source
                for c in nb.cells
                if any(o.output_type == "error" for o in c.get("outputs", []))
            ),
            "",
        )
        return (
            f"{path.relative_to(ROOT)}: {getattr(e, 'ename', type(e).__name__)}: {getattr(e, 'evalue', e)}"
            + f", in the cell\n{where}" * bool(where)
        )
    for old in to.parent.glob(to.name.split(".")[0] + ".*"):
        old.unlink()
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_suffix(".part")
    part.write_text(json.dumps([c.outputs for c in nb.cells if c.cell_type == "code"]))
    part.replace(to)
    print(f"ran {path.relative_to(ROOT)} in {time.time() - began:.0f} s", flush=True)


def run_all(paths, processes=2):
    "Runs what has to be run, the largest first; stops with the names of those that fail."
    with ThreadPoolExecutor(processes) as pool:
        failed = [f for f in pool.map(run, sorted(paths, key=lambda p: -p.stat().st_size)) if f]
    if failed:
        sys.exit("no site: these notebooks fail\n" + "\n".join(failed))


def shown(nb):
    "The notebook without hidden cells and `#|` lines."
    cells = []
    for c in nb.cells:
        if c.cell_type == "code":
            said, c.source = directives(c.source)
            c.metadata.tags = []
            if any(
                d in ("hide", "include: false") or d.startswith("default_exp") for d in said
            ) or not (c.source or c.outputs):
                continue
            if {"echo: false", "hide_input"} & set(said):
                c.metadata.tags = ["remove-input"]
            for line in said:
                if line.startswith("fig-alt: "):
                    alt = line.removeprefix("fig-alt: ")
                    c.metadata.mystnb = {"image": {"alt": alt}}
            for o in c.outputs:
                o.get("data", {}).pop(
                    "application/vnd.jupyter.widget-view+json", None
                )  # a widget is nothing without its kernel
        cells.append(c)
    nb.cells = cells
    nb.metadata.language_info = {"name": "python", "pygments_lexer": "ipython3"}
    return nb


def page(path, wanted, broken):
    "A notebook as Sphinx gets it: outputs put in, directives taken out, links as in the site."
    nb = nbformat.read(path, 4)
    code = [c for c in nb.cells if c.cell_type == "code"]
    known = kept(path, nb)
    if known.is_file():
        for c, outputs in zip(code, json.loads(known.read_text())):
            c.outputs = [nbformat.from_dict(o) for o in outputs]
    missing = code and not known.is_file() and not any(c.outputs for c in code)
    nb = shown(nb)
    for c in nb.cells:
        if c.cell_type == "markdown":
            c.source = relink(c.source, path, wanted, broken)
            c.source = front.link_figures(c.source, ROOT, wanted)
        for o in c.get("outputs", []):
            if "text/markdown" in o.get("data", {}):
                text = relink(o.data["text/markdown"], path, wanted, broken)
                o.data["text/markdown"] = front.link_runs(text, place(path), ROOT, wanted)
    if missing:
        nb.cells.insert(
            1,
            nbformat.v4.new_markdown_cell(
                ":::{note}\nBuilt without running the notebook: its outputs are missing here. `make docs` runs it.\n:::"
            ),
        )
    return nb


# --- the sources of the site, in a folder of their own


def listing(folder, wanted):
    """A page that lists a folder: its Markdown files as pages, its pictures, the rest to download.

    A run's folder is a page about the run.
    """
    if (folder / "run.json").is_file():
        wanted += front.run_files(folder)
        return front.run_page(folder)
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != ".")
    wanted += files
    pages = [p.stem for p in files if p.suffix == ".md"]
    lines = [
        f"# {folder.relative_to(ROOT)}",
        "",
        *(f"- [{p.name}]({quote(p.name)})" for p in files),
        "",
        *(pictured(p, pages) for p in files if p.suffix == ".png"),
    ]
    return "\n".join(lines + (["```{toctree}", ":hidden:", *pages, "```"] if pages else [])) + "\n"


def folder_name(folder):
    "What the side bar calls a folder that has a page."
    to = folder.relative_to(ROOT)
    return f"Published {to.name}" if "published" in to.parts else to.as_posix()


def pictured(picture, captions):
    "A picture, which leads to its caption where it has one."
    image = f"![{picture.stem}]({quote(picture.name)})"
    if picture.stem in captions:
        image = f"[{image}]({quote(picture.stem)}.md)"
    return image + "\n"


def markdown_page(path, pages, wanted, broken):
    "A Markdown file as a page; a figure's caption with its picture, its runs and its cell."
    text = relink(path.read_text(), path, wanted, broken)
    text = front.link_runs(text, place(path), ROOT, wanted)
    text = front.link_figures(text, ROOT, wanted)
    if path.with_suffix(".png").is_file():
        wanted.append(path.with_suffix(".png"))
        depth = len(place(path).parts) - 1
        return front.figure_page(path.stem, text, pages, ROOT / "nbs", depth)
    if not re.search("^# ", text, re.M):
        text = f"# {path.stem}\n\n{text}"
    return text


def title(path, nb):
    "A notebook's first heading."
    for c in nb.cells:
        if c.cell_type == "markdown" and (m := re.match(r"# (.+)", c.source)):
            return m[1]
    sys.exit(
        f"no site: {path.relative_to(ROOT)} has no title; begin it with a Markdown cell `# Name`"
    )


HELP = "when-something-is-wrong.md"
NAMES = "every-public-name.md"


GROUPS = {  # folder of nbs/, or a notebook in none -> its heading in the side bar
    "one_page.ipynb": "Read first",
    "methods": "The five papers and their methods",
    "parts": "Parts of a network",
    "data": "Data",
    "evaluation": "Evaluation",
    "training": "Training",
    "results": "Tables and figures",
    "deploy": "Use",
    "bench": "Measurements",
}
PAGES, FRONT = "To run with parameters", "Core, interface, command line"


def group_of(path, to):
    "The heading under which a notebook stands."
    folder = Path(to).parts[0]  # or the notebook, where it is in none
    if folder in GROUPS:
        return GROUPS[folder]
    nb = nbformat.read(path, 4)
    if any("parameters" in c.metadata.get("tags", []) for c in nb.cells):
        return PAGES
    return FRONT


def toctree(heading, entries):
    "A group of the side bar as MyST wants it; entries are (label, page)."
    lines = [f"```{{toctree}}\n:hidden:\n:caption: {heading}"]
    for label, to in entries:
        page = to.rsplit(".", 1)[0]
        lines.append(f"{label} <{page}>" if label else page)
    return "\n".join([*lines, "```\n"])


def sidebar(paths, pages, others, help_pages=()):
    """The groups of the side bar.

    Notebooks stand in the order in which the index links them first, those that it does not link behind them. The five
    papers have the short names that the index gives them.
    """
    cells = pages[ROOT / "nbs" / "index.ipynb"].cells
    index = "".join(c.source for c in cells if c.cell_type == "markdown")
    links = re.findall(r"\[([^\]]+)\]\(([\w/]+\.ipynb)", index)
    order = list(dict.fromkeys(to for _, to in links))
    named = {
        to: text for text, to in reversed(links) if to.startswith("methods/") and text[0].isupper()
    }

    groups = {heading: [] for heading in (*GROUPS.values(), FRONT, PAGES)}
    for path in paths:
        to = place(path).as_posix()
        if to != "index.ipynb":
            label = named.get(to) or title(path, pages[path])
            groups[group_of(path, to)].append((label, to))
    for entries in groups.values():
        entries.sort(key=lambda e: order.index(e[1]) if e[1] in order else len(order))
    groups["More"] = [*help_pages]
    groups["Data and results"] = others
    return "\n".join(toctree(heading, found) for heading, found in groups.items() if found)


def sources(src):
    "Writes all pages, and what they link, under src; stops with the links that lead nowhere."
    wanted, broken, done, others, paths = front.guide_pages(ROOT), [], set(), [], notebooks()
    pages = {p: page(p, wanted, broken) for p in paths}
    while wanted:
        p = wanted.pop(0)
        to = src / place(p)
        if p in done or p in pages:
            continue
        done.add(p)
        to.parent.mkdir(parents=True, exist_ok=True)
        listed = to.parent.name and (p.parent in done)
        if p.is_dir():
            to.write_text(listing(p, wanted))
        elif p.suffix == ".md":
            to.write_text(markdown_page(p, pages, wanted, broken))
        else:
            shutil.copy(p, to)
        in_guide = p.parent == ROOT / "docs" / "guide"
        is_run = (p / "run.json").is_file()
        if to.suffix == ".md" and not (listed or in_guide or is_run):
            others.append((folder_name(p) if p.is_dir() else "", place(p).as_posix()))
    if broken:
        sys.exit("no site: these links lead nowhere\n" + "\n".join(broken))
    folders = {place(p).parent for p in done if p.is_dir()}  # they have a list of their pages
    others = [
        o for o in others if Path(o[1]).name == "index.md" or Path(o[1]).parent not in folders
    ]
    help_pages = []
    for label, to, text in (
        ("Every public name", NAMES, public_names.page(ROOT)),
        ("When something is wrong", HELP, sentences.page(ROOT)),
    ):
        if text:
            (src / to).write_text(text, encoding="utf-8")
            help_pages.append((label, to))
    pages[ROOT / "nbs" / "index.ipynb"].cells.append(
        nbformat.v4.new_markdown_cell(sidebar(paths, pages, sorted(others), help_pages))
    )
    split_front(src, pages)
    for p, nb in pages.items():
        (src / place(p)).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, src / place(p))


def split_front(src, pages):
    "Make the front page of the index, and write the rest of the index as a page."
    guide = [
        (front.heading_of(p.read_text()), place(p).with_suffix("").as_posix())
        for p in front.guide_pages(ROOT)
        if p.name != HELP
    ]
    symbols, file = "", ROOT / "docs" / "guide" / "symbols.md"
    index = ROOT / "nbs" / "index.ipynb"
    if file.is_file():
        symbols = relink(file.read_text(), file, [], [])
        symbols = re.sub(r"^# ", "## ", symbols.replace("](../", "]("), flags=re.M)
    groups = pages[index].cells.pop()  # the side bar stays on the front page
    rest = front.split(pages[index], symbols, guide)
    pages[index].cells.append(groups)
    if rest is not None:
        nbformat.write(rest, src / f"{front.REST}.ipynb")


# --- links


class Page(HTMLParser):
    "The ids of an HTML page, and what it links."

    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a.get("id"), a.get("name")} - {None}
        self.links += [a[k] for k in ("href", "src") if a.get(k) is not None]


def broken_links(site):
    """`page.

    Link` for every link of the site whose file, or place in a page, is not there; of links to
    elsewhere, only their form is looked at.
    """
    pages = {
        p: Page(p.read_text()) for p in sorted(site.rglob("*.html")) if "_static" not in p.parts
    }
    wrong = []
    for p, here in pages.items():
        for link in here.links:
            u = urlsplit(link)
            if u.scheme in ("data", "mailto", "javascript"):
                continue
            if u.scheme or u.netloc:
                ok = u.scheme in ("http", "https") and "." in u.netloc
            else:
                to = (p.parent / unquote(u.path)).resolve() if u.path else p
                ok = (
                    not u.path.startswith("/")
                    and to.is_file()
                    and (not u.fragment or to not in pages or unquote(u.fragment) in pages[to].ids)
                )
            if not ok:
                wrong.append(f"{p.relative_to(site)}: {link}")
    return sorted(set(wrong))


# --- all of it


def build(out):
    """The site of the notebooks at hand.

    Built beside `out`, checked, and only then put in its place.
    """
    from sphinx.cmd.build import build_main as sphinx

    if out.exists() and not (out / "objects.inv").is_file():
        sys.exit(f"{out} is no site of ours and is left alone: remove it, or give another --out")
    with tempfile.TemporaryDirectory(prefix=".site-", suffix=".tmp", dir=out.parent) as tmp:
        src, new, old = (Path(tmp) / n for n in ("src", "new", "old"))
        src.mkdir()
        sources(src)
        args = [
            "-q",
            "-W",
            "--keep-going",
            "-c",
            Path(__file__).parent,
            "-d",
            Path(tmp) / "doctrees",
            src,
            new,
        ]
        with contextlib.redirect_stderr(io.StringIO()) as said:
            failed = sphinx([str(a) for a in args])
        if failed:
            sys.exit("no site: Sphinx says\n" + said.getvalue().replace(f"{src}/", ""))
        if wrong := broken_links(new):
            sys.exit("no site: these links lead nowhere\n" + "\n".join(wrong))
        if out.exists():
            out.rename(old)
        new.rename(out)


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--no-execute", action="store_true", help="run nothing")
    ap.add_argument("--out", type=Path, default=ROOT / "_site")
    ap.add_argument("--processes", type=int, default=2)
    a = ap.parse_args()
    if not a.no_execute:
        run_all(notebooks(), a.processes)
    build(a.out.resolve())
    without = [
        str(p.relative_to(ROOT)) for p in notebooks() if not kept(p, nbformat.read(p, 4)).is_file()
    ]
    if without:
        print(f"not run, outputs missing: {', '.join(without)}")
    print(f"site: {a.out}/index.html")


if __name__ == "__main__":
    main()
