"""The outputs that notebooks keep, so that a reader on a code host sees them without running anything.

`make outputs` runs the notebooks of `KEPT` and writes their outputs into them. `make test-all`
runs every notebook anyway: there the outputs are compared with the kept ones. Text must be equal.
Pictures must show the same, because other fonts and other processors move single pixels.
"""

import base64
import html
import json
import os
import re
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("parts", "methods", "one_page.ipynb")  # folders and notebooks of nbs/
MODE = "REIDNB_OUTPUTS"  # the variable that says what to do: "write", "compare" or nothing
WIDTH = 900  # pixels: a wider picture is made smaller
NARROWEST = 420
# bytes of one picture: the first number is taken with which the notebook is small enough
PICTURE_BYTES = (60_000, 45_000, 35_000, 28_000, 22_000, 17_000, 13_000)
COLOURS = 64  # of a picture's palette
BLOCK = 24  # pixels: the mean colours of such blocks are compared
DIFFERENCE = 0.4  # largest difference of a block in two equal pictures, in shares of white
NOTEBOOK_BYTES = 400_000  # of a notebook's outputs
ALL_BYTES = 6_000_000


def keeps_outputs(path):
    "Does this notebook keep its outputs?"
    below = Path(path).resolve().relative_to(ROOT / "nbs")
    return below.parts[0] in KEPT


def palette(image):
    """The few colours that a picture is kept with: white, and the best for the rest.

    A colour counts by the square root of its pixels. So thin lines keep the colours by which a
    legend tells them apart.
    """
    pixels = np.asarray(image).reshape(-1, 3)
    _, group, n = np.unique(pixels >> 3, axis=0, return_inverse=True, return_counts=True)
    group = group.ravel()
    means = [np.bincount(group, pixels[:, channel]) / n for channel in range(3)]
    means = np.stack(means, axis=1).round().astype(np.uint8)
    weighted = Image.fromarray(np.repeat(means, np.ceil(np.sqrt(n)).astype(int), axis=0)[None])
    few = weighted.quantize(COLOURS - 1, method=Image.Quantize.MEDIANCUT, kmeans=2)
    colours = np.array(few.getpalette()[: 3 * (COLOURS - 1)]).reshape(-1, 3)
    colours[(colours > 247).all(axis=1)] = 255  # the ground stays white
    chosen = Image.new("P", (1, 1))
    chosen.putpalette([*colours.ravel().tolist(), 255, 255, 255])
    return chosen


def small_png(image, width, colours):
    "An image as PNG with the colours of a palette, made smaller to this width where it is wider."
    if image.width > width:
        height = round(image.height * width / image.width)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    image = image.quantize(palette=colours, dither=Image.Dither.NONE)
    file = BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def joined(text):
    "A text that a notebook keeps as lines or as one string."
    return text if isinstance(text, str) else "".join(text)


def without_times(text):
    "What a cell printed, without progress bars, and with … in place of seconds and speeds."
    lines = [line.rsplit("\r", 1)[-1] for line in text.split("\n")]
    lines = [line for line in lines if not re.search(r"\d+%\|", line)]
    text = "\n".join(line.rstrip() for line in lines).strip("\n")
    text = re.sub(r"\b\d+(\.\d+)?( ?(s|ms|min|minutes|seconds|images/s))\b", r"…\2", text)
    return text + "\n" if text.strip() else ""


def as_lines(text):
    return text.splitlines(keepends=True)


def alt_text(source):
    "What a cell's line `#| fig-alt:` says about its picture; an empty text where it has none."
    found = re.search(r"^#\| fig-alt: (.+)$", source, re.M)
    return found[1] if found else ""


def kept_form(output, alt=""):
    "One output as it is kept, a picture with its alt text; None where nothing of it is."
    if output["output_type"] == "stream":
        if output.get("name") != "stdout":
            return None
        text = joined(output["text"])
        return {"name": "stdout", "output_type": "stream", "text": as_lines(text)}
    if output["output_type"] not in ("display_data", "execute_result"):
        return None
    data = output["data"]
    metadata = {}
    if "image/png" in data:
        # a picture of `show` says itself what it is; any other, only that it is a figure
        said = joined(data.get("text/plain", ""))
        if not alt and not said.startswith("<"):
            alt = html.unescape(said)
        if alt:
            metadata = {"image/png": {"alt": alt}}
        data = {"image/png": joined(data["image/png"])}
    elif "text/markdown" in data:
        data = {"text/markdown": as_lines(joined(data["text/markdown"]))}
    elif "text/html" in data and "<script" not in joined(data["text/html"]):
        # a styled table has a random name in each cell
        text = re.sub(r"T_[0-9a-f]{5,}", "T_table", joined(data["text/html"]))
        data = {"text/html": as_lines(text)}
    else:
        text = re.sub(r" at 0x[0-9a-f]+>", ">", joined(data.get("text/plain", "")))
        data = {"text/plain": as_lines(text)}
    return {"data": data, "metadata": metadata, "output_type": "display_data"}


def kept_forms(outputs, alt=""):
    "A cell's outputs as they are kept, texts that follow each other as one."
    forms = []
    for output in outputs:
        form = kept_form(output, alt)
        if form is None:
            continue
        if forms and form["output_type"] == forms[-1]["output_type"] == "stream":
            forms[-1]["text"] = as_lines(joined(forms[-1]["text"]) + joined(form["text"]))
        else:
            forms.append(form)
    for form in forms:
        if form["output_type"] == "stream":
            form["text"] = as_lines(without_times(joined(form["text"])))
    return [form for form in forms if form.get("text", True)]


def picture(form):
    "The image of an output that is one."
    png = base64.b64decode(joined(form["data"]["image/png"]))
    return Image.open(BytesIO(png)).convert("RGB")


def is_picture(form):
    return "image/png" in form.get("data", {})


def same_output(kept, fresh):
    "Does a kept output show what a fresh one shows?"
    if not is_picture(kept) or not is_picture(fresh):
        return kept == fresh
    if kept.get("metadata", {}) != fresh.get("metadata", {}):
        return False
    kept = picture(kept)
    fresh = picture(fresh)
    if abs(kept.width / kept.height - fresh.width / fresh.height) > 0.02:
        return False
    # a layout can move by a pixel from call to call, so blocks of pixels are compared
    size = (max(1, kept.width // BLOCK), max(1, kept.height // BLOCK))
    kept = np.asarray(kept.resize(size, Image.Resampling.BOX), dtype=float)
    fresh = np.asarray(fresh.resize(size, Image.Resampling.BOX), dtype=float)
    return abs(kept - fresh).max() / 255 <= DIFFERENCE


def same_outputs(kept, fresh):
    return len(kept) == len(fresh) and all(same_output(*pair) for pair in zip(kept, fresh))


def with_smaller_pictures(form, largest):
    "An output whose picture, if it is one, is made narrower until it has at most `largest` bytes."
    if not is_picture(form):
        return form
    image = picture(form)
    colours = palette(image)
    width = min(image.width, WIDTH)
    png = small_png(image, width, colours)
    while len(png) > largest and width > NARROWEST:
        width = round(0.9 * width)
        png = small_png(image, width, colours)
    return form | {"data": {"image/png": base64.b64encode(png).decode()}}


def with_outputs(notebook, fresh, largest):
    "A notebook with fresh outputs in the named cells, their pictures made smaller."
    cells = []
    for cell in notebook["cells"]:
        if cell["id"] in fresh:
            forms = [with_smaller_pictures(form, largest) for form in fresh[cell["id"]]]
            cell = cell | {"outputs": forms}
        cells.append(cell)
    return notebook | {"cells": cells}


def bytes_of_outputs(notebook):
    return sum(len(json.dumps(cell.get("outputs", []))) for cell in notebook["cells"])


def fresh_outputs(nb, sources):
    "What the cells of an executed notebook gave, by cell id; hidden cells keep nothing."
    fresh = {}
    for cell in nb.cells:
        if cell.cell_type == "code":
            hidden = "hide" in getattr(cell, "directives_", {})
            alt = alt_text(sources[cell["id"]])
            fresh[cell["id"]] = [] if hidden else kept_forms(cell.outputs, alt)
    return fresh


def check(path, executed):
    "Write or compare the outputs of a notebook that was executed, as the variable MODE says."
    mode = os.environ.get(MODE)
    if not mode or not keeps_outputs(path):
        return
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    # the executed cells have lost their lines that begin with #|
    fresh = fresh_outputs(executed, {cell["id"]: joined(cell["source"]) for cell in code})
    differing = [c["id"] for c in code if not same_outputs(c["outputs"], fresh[c["id"]])]
    if not differing:
        return
    if mode != "write":
        raise AssertionError(
            f"{path.name}: the outputs of cells {', '.join(differing)} are not those that the "
            "notebook keeps: run `make outputs`, look at the difference, and commit it"
        )
    new = {name: fresh[name] for name in differing}
    for largest in PICTURE_BYTES:
        smaller = with_outputs(notebook, new, largest)
        if bytes_of_outputs(smaller) <= NOTEBOOK_BYTES:
            break
    else:
        raise AssertionError(
            f"{path.name}: its outputs have more than {NOTEBOOK_BYTES:,} bytes with the smallest "
            "pictures too: show less, or take all its outputs away and run `make outputs` again"
        )
    text = json.dumps(smaller, sort_keys=True, indent=1, ensure_ascii=False)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)
    print(f"{path.name}: {len(differing)} cells have new outputs")
