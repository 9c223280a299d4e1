"Sphinx's settings for the site that make_site.py makes."

import importlib.util
import shutil
import sys
from pathlib import Path

from docutils.nodes import Text, math_block

sys.path.insert(0, str(Path(__file__).parent))  # for make_site.anchor
MATHJAX = (
    Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
)

project = html_title = "reidnb"
author = copyright = "reidnb contributors"
extensions = ["myst_nb", "sphinx_copybutton"]
suppress_warnings = [
    "myst.header",
    "myst.xref_missing",
    "toc.not_included",
]  # make_site.py names links that lead nowhere

nb_execution_mode = "off"  # make_site.py has run them
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables and mathematics in outputs too
myst_enable_extensions = ["dollarmath", "amsmath", "html_image", "colon_fence"]
myst_heading_anchors = 4
myst_heading_slug_func = "make_site.anchor"

html_theme = "sphinx_book_theme"
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navbar_persistent": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "github-dark",
}
html_context = {"default_mode": "auto"}
html_copy_source = html_show_sourcelink = False
html_static_path, html_css_files = ["style"], ["reidnb.css"]
mathjax_path = "mathjax/tex-chtml.js"  # ours, not a CDN's: the site works offline
copybutton_exclude = ".linenos, .gp, .go"


def add_mathjax(app, failed):
    "MathJax and its fonts into the site: a tenth of what the package holds."
    to = Path(app.outdir) / "_static" / "mathjax"
    if failed or not to.parent.is_dir():
        return
    for part in ("tex-chtml.js", "output/chtml/fonts"):
        (to / part).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (MATHJAX / part).is_dir() else shutil.copy)(MATHJAX / part, to / part)


def as_in_jupyter(app, doctree):
    r"$$…$$ is \[…\]; Sphinx would put a split around it, in which \tag and \\ mean something else."
    for node in doctree.findall(math_block):
        if not (node.get("no-wrap") or node.get("nowrap")):
            node["nowrap"] = True
            node[:] = [Text(rf"\[{node.astext()}\]")]


def setup(app):
    app.connect("doctree-read", as_in_jupyter)
    app.connect("build-finished", add_mathjax)


smartquotes = False  # what is shown is what was said, so that it can be searched for
