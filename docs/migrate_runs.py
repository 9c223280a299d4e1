"""Give older runs the new names of a recipe's fields, and the directories that follow from them.

python docs/migrate_runs.py reports/runs
python docs/migrate_runs.py reports/published/runs --texts reports/published

Weights, metrics, queries and maps stay as they are, byte for byte. Two files hold a recipe and are rewritten: run.json,
and what evolution.npz says about itself. The second form also replaces the directories in captions and lists. Runs that
have the new names stay as they are, so the program can be stopped and started again. A run that cannot be moved is
named, and the others are moved.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from reidnb.core import atomic_write, publishing
from reidnb.training.checkpoints import as_recipe

RENAMED = {  # field of a recipe: its old name -> its new one
    "flip": "flip_prob",
    "shift": "max_shift",
    "cut": "cutout_prob",
    "cut_size": "cutout_size",
    "erase": "erase_prob",
    "zoom": "zoom_prob",
    "identities": "ids_per_batch",
    "instances": "images_per_id",
    "epoch": "epoch_over",
    "half": "half_size_share",
    "smoothing": "label_smoothing",
    "keep_epochs": "checkpoint_epochs",
}
OLD_DEFAULTS = {  # what the old hash left out: field -> its value in the oldest runs
    "zoom": 0.0,
    "erase_fill": [0.0, 0.0, 0.0],
    "loss_weights": {},
    "center_lr": 0.5,
    "metric_loss": "triplet",
    "fit": "stretch",
    "test_fit": "stretch",
    "resize": 0,
    "test_size": 0,
    "cropped": False,
    "accumulate": 1,
}
BDB_OPTIONS = {"streams": "global+drop", "drop": "batch-dropblock"}  # the same for options
BDB_METHODS = ("bdb", "topdb/baseline")  # whose oldest runs lack those options


def renamed(
    recipe: dict,  # as in a run.json
) -> dict:  # the same values in the same order, under the new names
    "Rename the fields of a recipe, and add the two options that BDB's oldest runs lack."
    new = {RENAMED.get(name, name): value for name, value in recipe.items()}
    method = recipe["method"]
    if method in BDB_METHODS or method.startswith("bdb/"):
        new["options"] = {**BDB_OPTIONS, **recipe["options"]}
    return new


def old_hash(
    recipe: dict,  # as in a run.json, under new or old names
) -> str:  # 10 hexadecimal digits
    "Compute the hash that a recipe had under the old names."
    back = {new: old for old, new in RENAMED.items()}
    values = {back.get(name, name): value for name, value in recipe.items() if name != "seed"}
    values = {k: v for k, v in values.items() if k not in OLD_DEFAULTS or OLD_DEFAULTS[k] != v}
    options = values["options"]
    values["options"] = {k: v for k, v in options.items() if BDB_OPTIONS.get(k) != v}
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def rewrite_evolution(file: Path):
    "Rename the recipe in evolution.npz; its arrays stay as they are."
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    about = json.loads(str(arrays["about"]))
    if about["recipe"] == renamed(about["recipe"]):
        return
    about["recipe"] = renamed(about["recipe"])
    arrays["about"] = np.array(json.dumps(about))
    with atomic_write(file) as temporary:
        with open(temporary, "wb") as opened:
            np.savez_compressed(opened, **arrays)


def migrate_run(
    run: Path,  # a run's directory
    folder: Path,  # of all runs
) -> Path:  # where the run is now
    "Rename a run's fields, then move it to the directory of its recipe."
    info = json.loads((run / "run.json").read_text())
    old = info["recipe"]
    info["recipe"] = renamed(old)
    target = folder / as_recipe(info["recipe"]).directory
    if target != run and target.exists():
        raise ValueError(f"{target} exists: keep one of the two")
    if (run / "evolution.npz").is_file():
        rewrite_evolution(run / "evolution.npz")
    if info["recipe"] != old:
        with atomic_write(run / "run.json") as temporary:
            temporary.write_text(json.dumps(info, indent=1) + "\n")
    if target != run:
        target.parent.mkdir(parents=True, exist_ok=True)
        run.rename(target)
    return target


def migrate(
    folder: Path,  # of runs
) -> tuple[dict[str, str], dict[str, str]]:  # place below it -> new place; place -> why it stayed
    "Migrate all runs of a folder; a run that cannot be migrated stays as it is."
    moved, failed = {}, {}
    for file in sorted(folder.rglob("run.json")):
        run = file.parent
        place = run.relative_to(folder).as_posix()
        try:
            target = migrate_run(run, folder)
        except (OSError, ValueError, TypeError, KeyError) as e:
            failed[place] = f"{type(e).__name__}: {e}"
            continue
        if target != run:
            moved[place] = target.relative_to(folder).as_posix()
    return moved, failed


def old_hashes(
    folder: Path,  # of migrated runs
) -> dict[str, str]:  # old hash -> new hash
    "Return the hashes of all runs under the old and the new names."
    found = {}
    for file in sorted(folder.rglob("run.json")):
        try:
            recipe = json.loads(file.read_text())["recipe"]
            found[old_hash(recipe)] = as_recipe(recipe).hash
        except (ValueError, TypeError, KeyError):
            continue  # `migrate` has named it
    return found


def replace_in_texts(
    folder: Path,  # of captions and lists
    hashes: dict[str, str],  # old -> new
) -> int:  # how many files changed
    "Replace the hashes of runs in captions and lists."
    changed = 0
    for file in sorted(folder.rglob("*")):
        if file.suffix not in (".md", ".csv", ".tex") or file.name in (
            "metrics.csv",
            "queries.csv",
        ):
            continue
        text = file.read_text()
        new = text
        for before, after in hashes.items():
            new = new.replace(before, after)
        if new != text:
            with atomic_write(file) as temporary:
                temporary.write_text(new)
            changed += 1
    return changed


def main(words=None):
    "Migrate the runs of a folder, and say what was moved and what was not."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of runs")
    parser.add_argument("--texts", type=Path, help="a folder whose captions and lists name runs")
    given = parser.parse_args(words)
    if not given.folder.is_dir():
        sys.exit(f"error: {given.folder} is no folder: name one that holds runs")
    with publishing():  # the published runs, too
        moved, failed = migrate(given.folder)
        changed = replace_in_texts(given.texts, old_hashes(given.folder)) if given.texts else 0
    for before, after in moved.items():
        print(f"{before} -> {after}")
    print(f"{len(moved)} runs moved; {changed} texts name them anew")
    for place, why in failed.items():
        print(f"not moved: {place}: {why}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
