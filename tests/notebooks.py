"""`nbdev_test` with the same words, and three things besides.

A worker process runs several notebooks. What one of them leaves behind is taken back before the
next one begins: methods given to `use`, a replaced ResNet-18, the variable of `--import`.

Outputs that a notebook keeps are written or compared where REIDNB_OUTPUTS says so (`outputs.py`).

Without `--flags`, as in `make test`, figures that a cell shows are not painted. Painting takes a
fifth of the time, and what goes wrong in it is printed, not raised. `make test-all` and the site
paint all figures, and tests compare the published ones.
"""

import os
import sys

import matplotlib
import matplotlib.pyplot as plt
import nbdev.test
import numpy as np
import outputs
import torch
import torchvision.models
from execnb.shell import CaptureShell
from matplotlib.figure import Figure

PAINTED = "--flags" in sys.argv
IMPORTED = "REIDNB_IMPORT"


def known_methods():
    "The records that the registry holds; none where it was not imported yet."
    registry = sys.modules.get("reidnb.methods.registry")
    return {} if registry is None else registry.METHODS


def restore_methods(before):
    "Take back records that a notebook gave to `use`."
    registry = sys.modules.get("reidnb.methods.registry")
    if registry is None:
        return
    for name in list(registry.METHODS):
        if name not in before:
            registry.forget(name)
    registry.METHODS.update(before)


class CleanShell(CaptureShell):
    "What a notebook's cells run in."

    def __init__(self, path):
        self.path = path
        super().__init__(path, mpl_format="png")
        if not PAINTED:
            self.display_formatter.formatters["image/png"].pop(Figure)

    def run_all(self, nb, exc_stop, preproc):
        for cell in nb.cells:
            if cell.cell_type == "code" and not preproc(cell):
                cell.outputs = []  # a cell that gives nothing would keep what it had
        if os.environ.get(outputs.MODE):
            # a cell that samples without a seed of its own shows the same each time
            torch.manual_seed(0)
            np.random.seed(0)
            # a notebook before this one may have left figures open, or figures switched off
            plt.close("all")
            matplotlib.interactive(True)
        resnet18 = torchvision.models.resnet18
        imported = os.environ.get(IMPORTED)
        methods = dict(known_methods())
        try:
            super().run_all(nb, exc_stop=exc_stop, preproc=preproc)
            outputs.check(self.path, nb)
        except AssertionError as error:
            self.exc = error  # what nbdev prints
            raise
        finally:
            torchvision.models.resnet18 = resnet18
            os.environ.pop(IMPORTED, None)
            if imported is not None:
                os.environ[IMPORTED] = imported
            restore_methods(methods)


nbdev.test.CaptureShell = CleanShell

if __name__ == "__main__":
    nbdev.test.nbdev_test()
