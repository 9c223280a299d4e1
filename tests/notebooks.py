"""`nbdev_test` with the same words, and two things besides.

A worker process runs several notebooks. What one of them leaves behind is taken back before the
next one begins: methods given to `use`, a replaced ResNet-18, the variable of `--import`.

Without `--flags`, as in `make test`, figures that a cell shows are not painted. Painting takes a
fifth of the time, and what goes wrong in it is printed, not raised. `make test-all` and the site
paint all figures, and tests compare the published ones.
"""

import os
import sys

import nbdev.test
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
        super().__init__(path, mpl_format="retina" if PAINTED else "png")
        if not PAINTED:
            self.display_formatter.formatters["image/png"].pop(Figure)

    def run_all(self, *args, **kwargs):
        resnet18 = torchvision.models.resnet18
        imported = os.environ.get(IMPORTED)
        methods = dict(known_methods())
        try:
            return super().run_all(*args, **kwargs)
        finally:
            torchvision.models.resnet18 = resnet18
            os.environ.pop(IMPORTED, None)
            if imported is not None:
                os.environ[IMPORTED] = imported
            restore_methods(methods)


nbdev.test.CaptureShell = CleanShell

if __name__ == "__main__":
    nbdev.test.nbdev_test()
