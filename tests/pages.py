"""The notebooks that papermill runs, in this process.

Papermill's own injection of parameters, without the seconds that a kernel takes.
"""

import os
import warnings
from contextlib import contextmanager
from pathlib import Path

from execnb.nbio import dict2nb
from execnb.shell import CaptureShell
from matplotlib.figure import Figure
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

ROOT = Path(__file__).resolve().parent.parent

HIDDEN = (
    DeprecationWarning,
    PendingDeprecationWarning,
    ImportWarning,
    ResourceWarning,
)  # what Python itself does not show a reader


@contextmanager
def working_in(folder):
    "The block's working directory."
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def new_shell(pictures=False):
    """What a notebook's cells run in.

    Without pictures, a figure that is shown is not painted for it (what is saved is).
    """
    shell = CaptureShell(mpl_format="png")
    if not pictures:
        shell.display_formatter.formatters["image/png"].pop(Figure)
    return shell


def run_cells(shell, cells):
    "Execute cells one after the other, up to a SystemExit; what one raises is raised."
    for cell in cells:
        shell.cell(cell)
        if isinstance(shell.exc, SystemExit):
            return
        if shell.exc:
            raise shell.exc


def load_page(name, parameters):
    "nbs/NAME.ipynb with parameters injected, not executed."
    page = load_notebook_node(str(ROOT / "nbs" / f"{name}.ipynb"))
    return dict2nb(parameterize_notebook(page, parameters))


def run_page(name, parameters, cwd=ROOT, pictures=False):
    """Execute nbs/NAME.ipynb; the notebook with its outputs.

    A warning, or anything else on stderr, is an error: the reader would see it.
    """
    page = load_page(name, parameters)
    with working_in(cwd), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        for hidden in HIDDEN:
            warnings.simplefilter("ignore", hidden)
        run_cells(new_shell(pictures), page.cells)
    assert not warned, [str(w) for w in warned]
    for output in outputs(page):
        assert output.get("name") != "stderr", output["text"]
    return page


def outputs(page):
    "All outputs of an executed notebook."
    return [o for c in page.cells for o in c.get("outputs", [])]


def printed(page):
    "What it printed."
    return "".join("".join(o["text"]) for o in outputs(page) if o.get("name") == "stdout")
