"""The site's front page, its guide, and the links of figures and runs.

The front page is the beginning of nbs/index.ipynb with the table of symbols. The rest of the index
is a page of its own. The pages of docs/guide stand beside it, in the order of GUIDE.
"""

import json
import re
from pathlib import PurePosixPath
from urllib.parse import quote

import nbformat

GUIDE = (  # the pages of docs/guide in reading order; those that are not named stand behind them
    "training",
    "your-pictures",
    "data-sets",
    "evaluation",
    "figures",
    "tables",
    "robustness",
    "gpus",
    "symbols",
    "glossary",
    "papers",
)
FIRST_OF_REST = "## Install"  # the index from here on is the page REST
REST = "install-and-results"
RUN = re.compile(r"`(reports/published/runs/[\w./+-]+-s\d+)`")
FIGURE = re.compile(
    r"(?<!\[)!\[[^\]]*\]\((?P<stem>[^)\s]*reports/published/figures/(?P<name>[\w-]+))\.png\)"
)
HEADING = re.compile(r"^#{2,4} (.+)$", re.M)

# --- the front page


def guide_pages(root):
    "Return the files of docs/guide, in reading order."
    files = (root / "docs" / "guide").glob("*.md")
    order = {name: place for place, name in enumerate(GUIDE)}
    return sorted(files, key=lambda p: (order.get(p.stem, len(order)), p.stem))


def new_cell(text):
    "Return a Markdown cell."
    return nbformat.v4.new_markdown_cell(text)


def toctree(entries):
    "Return the front group of the side bar; entries are (label, page)."
    lines = [f"{label} <{page}>" for label, page in entries]
    return "\n".join(["```{toctree}", ":hidden:", ":caption: Begin", *lines, "```"])


def heading_of(text):
    "Return a page's first heading."
    return re.search(r"^# (.+)$", text, re.M)[1]


def split(
    index,  # the index as a notebook; it becomes the front page
    symbols,  # the table of symbols in Markdown, "" where there is none
    guide,  # (heading, page) of the guide's pages
):
    """Leave the front page in `index`, and return the rest as a notebook.

    An index without the heading FIRST_OF_REST stays as it is, and None is returned.
    """
    begins = [i for i, c in enumerate(index.cells) if c.source.startswith(FIRST_OF_REST)]
    if not begins:
        return None
    front, rest = index.cells[: begins[0]], index.cells[begins[0] :]
    entries = [("Install, train, results", REST), *guide]
    index.cells = [*front, new_cell(symbols), new_cell(toctree(entries))]
    page = nbformat.v4.new_notebook(metadata=index.metadata)
    page.cells = [new_cell("# Install, train, results"), *rest]
    return page


# --- runs and figures


def link_runs(
    text,  # Markdown
    at,  # where the page is in the site, relative to its top
    root,  # of the project
    wanted,  # files and folders that the site has to hold; what is linked is added
):
    "Return Markdown in which the names of published runs are links to their pages."

    def one(found):
        folder = root / found[1]
        if not (folder / "run.json").is_file():
            return found[0]
        wanted.append(folder)
        up = "../" * (len(PurePosixPath(at).parts) - 1)
        return f"[{found[0]}]({up}{quote(found[1], safe='/+')}/index.md)"

    return RUN.sub(one, text)


def link_figures(
    text,  # Markdown with links as in the site
    root,  # of the project
    wanted,  # files and folders that the site has to hold; what is linked is added
):
    "Return Markdown in which a published figure leads to its caption, and so to its runs and its cell."

    def one(found):
        caption = root / "reports" / "published" / "figures" / f"{found['name']}.md"
        if not caption.is_file():
            return found[0]
        wanted.append(caption)
        return f"[{found[0]}]({found['stem']}.md)"

    return FIGURE.sub(one, text)


def run_files(folder):
    "Return the files of a run that its page links."
    names = ("run.json", "metrics.csv", "queries.csv", "references.csv", "localisation.csv")
    return [folder / name for name in names if (folder / name).is_file()]


def run_page(folder):
    "Return a page about one run: what it reached, its recipe, and its files."
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    recipe = info["recipe"]
    method, dataset, seed = recipe["method"], recipe["dataset"], info["seed"]
    words = f"make train METHOD={method} DATASET={dataset} SEED={seed}"
    metrics = info.get("metrics") or {}
    lines = [
        f"# {method}, {dataset}, seed {seed}",
        "",
        f"A run of the profile `{recipe['profile']}`, in {folder.name}. Its status is *{info['status']}*.",
        "This command trains it again. Fields of the recipe below can differ from the profile's.",
        "",
        "```sh",
        f"{words} ARGS='-p profile {recipe['profile']} -p source {recipe['source']}'",
        "```",
        "",
        "| measure | % |",
        "|---|---|",
        *(f"| {name} | {100 * value:.1f} |" for name, value in metrics.items()),
        "",
        "## Files",
        "",
        *(f"- [{file.name}]({file.name})" for file in run_files(folder)),
        "",
        "## Recipe",
        "",
        "```json",
        json.dumps(recipe, indent=1),
        "```",
    ]
    return "\n".join(lines) + "\n"


def shown_in(
    name,  # of a figure, as topdb-fig6
    pages,  # path of a notebook -> the notebook
    nbs,  # the folder of the notebooks
):
    "Return (notebook, heading) of the cells that make or show a figure, those of papers first."
    quoted = re.compile(rf"[\"'/]{re.escape(name)}(\.png|[\"'])")
    found = []
    for path, nb in pages.items():
        to = path.relative_to(nbs).as_posix()
        if not to.startswith(("methods/", "results/")):
            continue
        heading = ""
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                heading = (HEADING.findall(cell.source) or [heading])[-1]
            if quoted.search(cell.source) and (to, heading) not in found:
                found.append((to, heading))
    return sorted(found, key=lambda place: not place[0].startswith("methods/"))[:4]


def anchored(
    to,  # a notebook, as methods/topdb.ipynb
    heading,  # in it, or ""
    up,  # the way to the site's top, as "../"
):
    "Return a link to a heading of a notebook."
    if not re.fullmatch(r"[\w ,.:'-]+", heading):
        return f"[{to}]({up}{to})"  # mathematics or code in a heading make no plain anchor
    return f"[{to}, {heading}]({up}{to}#{heading.replace(' ', '-')})"


def figure_page(
    name,  # of a published figure
    caption,  # its text, in which runs are links
    pages,  # path of a notebook -> the notebook
    nbs,  # the folder of the notebooks
    depth,  # how many folders below the site's top
):
    "Return the page of a published figure: the picture, its caption, and the cells that make it."
    alt = re.sub(r"[*`\[\]]", "", caption.removeprefix(f"**{name}.**").strip().split("\n")[0])
    cells = [anchored(to, heading, "../" * depth) for to, heading in shown_in(name, pages, nbs)]
    lines = [f"# {name}", "", f"![{alt}]({name}.png)", "", caption.strip(), ""]
    lines += ["## Its cell", "", f"`make figure FIGURE={name}` plots it again.", ""]
    lines += [f"- {cell}" for cell in cells]
    return "\n".join(lines) + "\n"
