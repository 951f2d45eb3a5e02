"""Measures a trained network on a split: `python -m tools.evaluate --workdir=runs/caltech101`.

    python -m tools.evaluate --workdir=runs/caltech101 --views=centre       # as during training
    python -m tools.evaluate --workdir=runs/caltech101 --split=train        # another split, or a part: 'train[:10%]'
    python -m tools.evaluate --workdir=runs/caltech101 --dataset=photos/    # CLASS/*.jpg or SPLIT/CLASS/*.jpg
    python -m tools.evaluate --workdir=runs/alexnet --dataset=imagenet_v2 --split=test   # a TFDS name
    python -m tools.evaluate --workdir=runs/seed-0 --also=runs/seed-1       # the mean of two networks' probabilities

Prints the errors, the classes that are best and worst, and the most frequent confusions. The folder --out gets
metrics.json, classes.csv, confusion.csv and confusion.png; a row of the matrix is a true class. Exit code 2 if an image
of a folder cannot be read.
"""

import csv
import io
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
from absl import flags

import evaluate
import input_pipeline
from common import cli, exits, files
from common.errors import UserError, nearest, require, shown
from common.progress import progress
from datasets import arguments, prepared, preparing, sources
from drawing import canvas, plots
from predictor import Predictor
from run import workdirs
from tools import shared

SPLIT = flags.DEFINE_string("split", "", "The split; by default that of the errors at the end of the run.")
DATASET = flags.DEFINE_string("dataset", "", "Another data set with the run's classes: a folder, or a TFDS name.")
DATA_DIR = flags.DEFINE_string("data_dir", "", "Where prepared/ lies; by default where the run found it.")
ALSO = flags.DEFINE_multi_string(
    "also", [], "Another run; the probabilities of all are averaged. May be repeated; --step holds for each."
)
OUT = flags.DEFINE_string(
    "out", "", "Folder for the results; by default evaluation/ in the workdir, or evaluation_of_N/ for N networks."
)
JSON = flags.DEFINE_bool("json", False, "Print the errors as one JSON object.")
shared.define_network()

SHOWN = 5  # classes and confusions
NAMES = {
    "loss": "loss",
    "top1_error": "top-1 error",
    "top5_error": "top-5 error",
    "mean_class_accuracy": "mean class accuracy",
}


def main(_) -> int:
    """Evaluates, prints and writes."""
    network = shared.network()
    networks = [network]
    for workdir in ALSO.value:
        networks.append(_other(networks, workdir))
    folder = f"evaluation_of_{len(networks)}" if ALSO.value else "evaluation"
    out = files.folder(workdirs.expanded(OUT.value or network.workdir / folder, "--out"))
    batches, name, images = _batches(networks)
    with progress("evaluate", len(images), sys.stderr) as advance:
        counted = _counted(batches, advance)
        totals = evaluate.totals_of_mean(networks, counted) if ALSO.value else network.totals(counted)
    require(totals, f"No image of {name} can be read.")
    unreadable = len(images) - int(totals["examples"])
    errors, matrix = evaluate.errors(totals), totals["confusion"]
    require(np.isfinite(errors["loss"]), f"The loss is {errors['loss']}, and nothing was written.")
    if network.config.model.num_classes <= 5:
        del errors["top5_error"]  # it is 0
    about = {
        "step": network.step,
        "views": shared.chosen("views"),
        "dataset": name,
        "examples": int(totals["examples"]),
        "unreadable": unreadable,
    }
    if ALSO.value:
        about["also"] = {str(other.workdir): other.step for other in networks[1:]}
    accuracy = _accuracy(totals)
    canvas.save(plots.confusion(matrix, network.labels), out / "confusion.png")
    texts = {
        "classes.csv": _classes_csv(network, matrix, totals, accuracy),
        "confusion.csv": _table([["", *network.labels], *_matrix_rows(network, matrix)]),
        "metrics.json": json.dumps(about | errors, indent=2) + "\n",  # last, so that it tells a whole evaluation
    }
    for file, text in texts.items():
        with files.replacing(out / file) as partial:
            partial.write_text(text, encoding="utf-8")
    print(json.dumps(about | errors) if JSON.value else _report(network, about, errors, matrix, accuracy, out))
    return exits.MISTAKE if unreadable else 0


def _other(networks: list[Predictor], workdir: str) -> Predictor:
    """Loads another run, which must have the classes and the image size of the first of `networks`."""
    network, path = networks[0], workdirs.expanded(workdir, "--also").resolve()
    known = [other.workdir.resolve() for other in networks]
    require(path not in known, f"--also={workdir} is a run that is there already.")
    other = shared.network(workdir)
    require(
        other.records.class_names == network.records.class_names,
        f"--also={workdir} has other classes than {network.workdir}.",
    )
    require(
        other.size == network.size,
        f"--also={workdir} sees images of {other.size} pixels, and {network.workdir} of {network.size}.",
    )
    return other


def _report(network, about, errors, matrix, accuracy, out) -> str:
    head = f"{about['examples']:,} images of {about['dataset']}, {about['views']} views, step {about['step']}"
    head += "".join(f"\nmean with {other}, step {step}" for other, step in about.get("also", {}).items())
    lines = [
        head,
        *(f"{NAMES[name]:<20} {value:{'.4f' if name == 'loss' else '.2%'}}" for name, value in errors.items()),
    ]
    seen = np.flatnonzero(~np.isnan(accuracy))
    order = seen[np.argsort(accuracy[seen], kind="stable")]
    half = min(SHOWN, len(order) // 2)
    for title, labels in (("best classes", order[::-1][:half]), ("worst classes", order[:half])):
        lines += ["", title, *(f"  {accuracy[i]:7.1%}  {network.labels[i]}" for i in labels)] if half else []
    wrong = matrix - np.diag(np.diag(matrix))
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:SHOWN]
    found = [(wrong.flat[i], *np.unravel_index(i, wrong.shape)) for i in pairs if wrong.flat[i] > 0]
    lines += ["", "most frequent confusions"] if found else []
    lines += [
        f"  {count:7.0f}  {network.labels[true]} taken for {network.labels[predicted]}"
        for count, true, predicted in found
    ]
    return "\n".join([*lines, "", f"written to {out}: metrics.json, classes.csv, confusion.csv, confusion.png"])


def _accuracy(totals) -> np.ndarray:
    """By class; not a number for a class without examples."""
    examples = totals["class_examples"]
    return np.where(examples > 0, 1 - totals["class_errors"] / np.maximum(examples, 1), np.nan)


def _classes_csv(network, matrix, totals, accuracy) -> str:
    rows = [["class", "label", "examples", "accuracy", "most frequent mistake", "its count"]]
    for i, (name, label) in enumerate(zip(network.records.class_names, network.labels, strict=True)):
        mistakes = matrix[i].copy()
        mistakes[i] = 0
        most = int(np.argmax(mistakes))
        worst = [network.labels[most], int(mistakes[most])] if mistakes[most] else ["", 0]
        share = "" if np.isnan(accuracy[i]) else round(float(accuracy[i]), 6)
        rows.append([name, label, int(totals["class_examples"][i]), share, *worst])
    return _table(rows)


def _matrix_rows(network, matrix) -> Iterator[list]:
    for label, row in zip(network.labels, matrix.astype(int).tolist(), strict=True):
        yield [label, *row]


def _table(rows) -> str:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue()


def _counted(batches, advance):
    for batch in batches:
        yield batch
        for _ in range(int(batch["mask"].sum())):
            advance()


# The images to evaluate on: each function returns batches as `evaluate.totals` takes them, a name, and the list of all.


def _batches(networks: list[Predictor]):
    network, config = networks[0], networks[0].config
    name, split = DATASET.value or config.dataset.name, SPLIT.value or workdirs.test_split(config)
    if DATASET.value and sources.is_folder(name):
        require(
            not DATA_DIR.value, "--data_dir says where a prepared data set lies; a folder of photographs needs none."
        )
        return _of_folder(network, workdirs.expanded(name, "--dataset"))
    records = network.data(DATA_DIR.value) if name == config.dataset.name else _other_records(network, name, split)
    if name == config.dataset.name:
        _warn(networks, records, split)
    batches = input_pipeline.eval_batches(records, split, batch_size=network.batch_size)
    return batches, f"{name} {split}", records.numbers(split)


def _warn(networks: list[Predictor], records: prepared.Records, split: str) -> None:
    """Says which of the other runs have learned from images of the split that the first run has not learned from."""
    first, *others = (network.config.dataset for network in networks)
    unseen = np.setdiff1d(records.numbers(split), records.numbers(first.train_split))
    for network, dataset in zip(networks[1:], others, strict=True):
        same = dataset.name == first.name
        if count := np.intersect1d(unseen, records.numbers(dataset.train_split)).size if same else 0:
            print(f"Warning: {network.workdir} was trained on {count:,} of the images of {split}.", file=sys.stderr)


def _other_records(network: Predictor, name: str, split: str) -> prepared.Records:
    """The records of a TFDS set with the same classes, prepared on first use."""
    data_dir = str(workdirs.expanded(DATA_DIR.value or network.config.dataset.data_dir, "--data_dir"))
    directory = prepared.directory(data_dir, sources.prepared_name(name), network.size)
    if not directory.is_dir():
        # Some sets for evaluation have no training split.
        train = sources.split_names(network.config.dataset.train_split)[0]
        known = sources.open_source(name, data_dir).counts
        directory = preparing.prepare(
            name,
            data_dir=data_dir,
            size=network.size,
            train_split=train if train in known else sources.split_names(split)[0],
        )
    records = prepared.Records.open(directory)
    require(records.class_names == network.records.class_names, f"{name} has other classes than {network.workdir}.")
    return records


def _of_folder(network: Predictor, root: pathlib.Path):
    """The photographs of ROOT/CLASS or ROOT/SPLIT/CLASS as they are; nothing is prepared."""
    names = network.records.class_names

    def classes_in(folder):
        return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))

    try:
        folders = classes_in(root)
        if flat := set(folders) & set(names):
            require(not SPLIT.value, f"--split={SPLIT.value}, but {root} holds the class {min(flat)} itself.")
        else:
            split = SPLIT.value or workdirs.test_split(network.config)
            require(split in folders, f"{root} has neither a class of {network.workdir} nor a split {shown(split)}.")
            root, folders = root / split, classes_in(root / split)
    except OSError as error:
        raise UserError(f"--dataset={root} cannot be listed: {error.strerror}.") from None
    for folder in folders:
        require(folder in names, f"{root / folder} is no class of {network.workdir}: {nearest(folder, names)}")
    label_of = {file: names.index(folder) for folder in folders for file in arguments.find([root / folder])}
    photographs = shared.Photographs(network, label_of)

    def batches():
        examples = ((photograph.pixels, label_of[photograph.file]) for photograph in photographs.readable())
        while batch := list(itertools.islice(examples, network.batch_size)):
            yield _batch(batch, network.batch_size)

    return batches(), str(root), photographs.files


def _batch(examples, size):
    pixels, labels = zip(*examples, strict=True)
    padding = size - len(examples)
    return {
        "image": np.stack([*pixels, *[pixels[0]] * padding]),
        "label": np.array([*labels, *[0] * padding], np.int32),
        "mask": np.array([1.0] * len(examples) + [0.0] * padding, np.float32),
    }


if __name__ == "__main__":
    cli.run(main)
