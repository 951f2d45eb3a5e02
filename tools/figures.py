"""Draws a trained network: `python -m tools.figures --workdir=runs/caltech101`.

Writes the figures of the paper for this run, each as PNG and SVG, and report.html, a single page with all of them, the
results and the config. It takes them from the run's logs, its checkpoint and its data set; without the data set, the
figures with photographs are left out.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from matplotlib.figure import Figure

import input_pipeline
import views
from common import cli, files
from common.errors import UserError
from common.progress import progress
from datasets import prepared, tfrecords
from drawing import canvas, diagram, grids, page, plots
from models.layers import ACTIVATIONS
from predictor import Predictor
from run import metrics, workdirs
from tools import shared

DATA_DIR = flags.DEFINE_string("data_dir", "", "Where prepared/ lies; by default where the run found it.")
OUT = flags.DEFINE_string("out", "", "Folder for the figures; by default figures/ in the workdir.")
shared.define_network()

PHOTOGRAPHS, QUERIES, NEIGHBOURS, VIEWS = 8, 5, 6, 6  # as many as in the paper's figure 4; and of each augmentation
LOOKED_AT = 2000  # test images among which the photographs are chosen
COMPARED = 10_000  # training images among which the nearest are sought


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure with its title, and a sentence that says what it shows."""

    title: str
    caption: str
    figure: Figure


def main(_) -> None:
    """Draws and writes."""
    network = shared.network()
    out = files.folder(workdirs.expanded(OUT.value or network.workdir / "figures", "--out"))
    lines = metrics.read_lines(network.workdir / "metrics.jsonl")
    written, sections = [], [("Results", _results(lines))]
    for name, drawing in _drawings(network, lines):
        for suffix in ("png", "svg"):
            canvas.save(drawing.figure, out / f"{name}.{suffix}")
            written.append(out / f"{name}.{suffix}")
        sections.append((drawing.title, page.picture(name, drawing.caption, out)))
    sections += [("Layers", _layers(network)), ("Config", _config(network.config))]
    with files.replacing(out / "report.html") as partial:
        partial.write_text(page.page(*_head(network), sections), encoding="utf-8", errors="backslashreplace")
    print(*written, out / "report.html", sep="\n")


# The figures.


def _drawings(network: Predictor, lines: list[Mapping[str, Any]]) -> Iterator[tuple[str, Drawing]]:
    """All that can be drawn of this run, by the names of their files; says on stderr what is left out."""
    if lines:
        yield (
            "curves",
            Drawing(
                "Training",
                "Errors and losses against epochs, as in figure 1: of training, in the mean over its steps; of "
                "evaluation, on the centre view; at the end, for the best checkpoint, over ten views (section 4.1).",
                plots.curves(lines),
            ),
        )
    else:
        print("curves is left out: metrics.jsonl has no line.", file=sys.stderr)
    towers, crop = network.config.model.towers, network.config.input.crop
    apart = " Lines that cross are exchanges between the towers." if towers > 1 else ""
    yield (
        "diagram",
        Drawing(
            "Network",
            f"The layers with what they give for one image, before pooling, as in figure 2.{apart}",
            diagram.diagram(network.table, towers, crop),
        ),
    )
    kernel = network.params[network.layers[0]]["kernel"]
    yield "kernels", _kernels(network.layers[0], kernel, towers)
    yield "activations", _activations(network.config.model.get("activation", "relu"))
    try:
        records = network.data(DATA_DIR.value)
    except UserError as error:
        print(f"predictions, neighbours, layers and augmentation are left out: {error}", file=sys.stderr)
        return
    yield from _photographs(network, records)


def _kernels(layer: str, kernel: np.ndarray, towers: int) -> Drawing:
    shares = grids.selectivity(kernel, towers)
    each = (
        " and ".join(f"{share:.2f} in tower {tower}" for tower, share in enumerate(shares))
        if towers > 1
        else f"{shares[0]:.2f}"
    )
    caption = (
        f"The kernels of {layer}, as in figure 3, each scaled by its largest weight. Colour selectivity is {each}: the "
        "share of a kernel's energy that is not grey, 1 − |projection on the grey axis|² / |kernel|² over the RGB of "
        "its pixels, in the mean over the kernels."
    )
    return Drawing("First kernels", caption, plots.kernels(kernel, towers))


def _activations(used: str) -> Drawing:
    inputs = np.linspace(-4, 4, 801, dtype=np.float32)
    functions = {
        name: (inputs, np.asarray(function(inputs)), np.asarray(jax.vmap(jax.grad(function))(inputs)))
        for name, function in ACTIVATIONS.items()
    }
    caption = "Activation functions and their gradients (section 3.1): only ReLU's does not vanish for large inputs."
    return Drawing("Activation", caption, plots.activations(functions, used))


# Figures with photographs.


@dataclasses.dataclass(frozen=True)
class _Part(prepared.Records):
    """Some records of a split."""

    chosen: np.ndarray | None = None

    def index(self, split: str) -> tfrecords.Index:
        whole = super().index(split)
        return tfrecords.Index(whole.files, whole.rows[self.chosen])


def images(records: prepared.Records, split: str, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """The records of these numbers in a split: (S, S, 3) uint8 and label."""
    part = _Part(**vars(records), chosen=numbers)
    for batch in input_pipeline.eval_batches(part, split, batch_size=min(64, len(numbers))):
        real = batch["mask"] > 0
        yield from zip(batch["image"][real], batch["label"][real].tolist(), strict=True)


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers below `count`, evenly spaced."""
    return np.arange(min(count, most)) * count // min(count, most)


def choose(labels: np.ndarray, most: int) -> np.ndarray:
    """At most `most` positions in `labels`, evenly over the classes, of each the first, in the order of labels."""
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.empty(len(labels), int)
    ranks[order] = np.arange(len(labels)) - np.repeat(starts, sizes)
    ordered = np.lexsort((labels, ranks))
    found = ordered[evenly(len(starts), most)] if most < len(starts) else ordered[:most]
    return found[np.argsort(labels[found], kind="stable")]


def nearest(query: np.ndarray, vectors: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The numbers of the `count` rows of (N, D) vectors that are nearest to (D,), with their Euclidean distances."""
    distances = np.linalg.norm(vectors - query, axis=1)
    return [(int(number), float(distances[number])) for number in np.argsort(distances, kind="stable")[:count]]


def _photographs(network: Predictor, records: prepared.Records) -> Iterator[tuple[str, Drawing]]:
    split = workdirs.test_split(network.config)
    looked_at = evenly(records.num_examples(split), LOOKED_AT)
    labels = np.empty(len(looked_at), int)
    with progress(f"classes of {split}", len(looked_at), sys.stderr) as advance:
        for number, (_, label) in enumerate(images(records, split, looked_at)):
            labels[number] = label
            advance()
    photographs = list(images(records, split, looked_at[choose(labels, PHOTOGRAPHS)]))
    squares, truths = [square for square, _ in photographs], [network.labels[label] for _, label in photographs]
    answers = [network.top(row) for row in network.probabilities(squares)]
    yield (
        "predictions",
        Drawing(
            "Predictions",
            f"Images of {split} with the most probable labels, the right one in another colour, as in figure 4 (left).",
            plots.predictions(squares, answers, truths),
        ),
    )
    queries = list(images(records, split, looked_at[choose(labels, QUERIES)]))
    yield "neighbours", _neighbours(network, records, queries)
    values = next(network.features(squares[:1], network.layers))
    caption = (
        "What each layer makes of the centre view of an image, after its activation; white is strong. The last layer "
        "gives the logits (section 3.5)."
    )
    yield (
        "layers",
        Drawing("Layers of an image", caption, plots.layers(squares[0], values, network.config.model.towers)),
    )
    rows = augmented(squares[0], network.records, network.config.input)
    if rows:
        shown = "; ".join(rows)
        caption = f"Views of an image as training draws them (section 4.1): {shown}."
        yield "augmentation", Drawing("Augmentation", caption, plots.augmentation(squares[0], rows))
    else:
        print("augmentation is left out: this recipe trains on the centre view of each image.", file=sys.stderr)


def _neighbours(network: Predictor, records: prepared.Records, queries: list[tuple[np.ndarray, int]]) -> Drawing:
    layer = "fc7" if "fc7" in network.layers else network.layers[-2]
    split = network.config.dataset.train_split
    count = records.num_examples(split)
    compared = evenly(count, COMPARED)

    def vectors(squares):
        return np.stack([row[layer].ravel() for row in network.features(squares, [layer])])

    with progress(f"{layer} of {split}", len(compared), sys.stderr) as advance:

        def squares():
            for square, _ in images(records, split, compared):
                advance()
                yield square

        known = vectors(squares())
    found = []
    for query in vectors(square for square, _ in queries):
        numbers, distances = zip(*nearest(query, known, NEIGHBOURS), strict=True)
        near = images(records, split, compared[list(numbers)])
        found.append(
            [(square, network.labels[label], far) for (square, label), far in zip(near, distances, strict=True)]
        )
    sample = f"an even sample of {len(compared):,} of the {count:,}" if len(compared) < count else f"the {count:,}"
    caption = (
        f"Images of {workdirs.test_split(network.config)} and the nearest of {sample} images of {split}, by the "
        f"Euclidean distance of their features in {layer}, as in figure 4 (right)."
    )
    return Drawing(
        "Nearest neighbours",
        caption,
        plots.neighbours([(square, network.labels[label]) for square, label in queries], found),
    )


def augmented(photo: np.ndarray, records: prepared.Records, options: Any) -> dict[str, list[np.ndarray]]:
    """Training views of a photograph, (crop, crop, 3) uint8: each augmentation of one image that is on, and all."""
    kinds = {
        "crops": {
            "random_crop": options.random_crop and bool(options.crop_area or options.crop < records.image_size),
            "crop_area": options.crop_area,
        },
        "reflections": {"reflect": options.reflect},
        "lighting": {"lighting_std": options.lighting_std},
    }
    off = {"random_crop": False, "crop_area": (), "reflect": False, "lighting_std": 0.0}
    on = {title: change for title, change in kinds.items() if any(change.values())}
    alone = {title: dict(options) | off | change for title, change in on.items()}
    together = {"together": dict(options)} if len(on) > 1 else {}
    return {
        title: list(_views(photo, records, ml_collections.ConfigDict(changed)))
        for title, changed in (alone | together).items()
    }


def _views(photo: np.ndarray, records: prepared.Records, options: Any) -> Iterator[np.ndarray]:
    """The first views of a stream of this photograph alone, with the mean image added again."""
    mean = views.center(records.mean_image, options.crop)
    drawn = input_pipeline.draw_views(records, options, VIEWS, 0, np.arange(VIEWS))
    for (top, left, side), reflect, shift, gain in zip(*drawn, strict=True):
        view = photo[top : top + side, left : left + side]
        if side != options.crop:
            view = input_pipeline.resize(view, options.crop).numpy()
        view = view[:, ::-1] if reflect else view
        seen = views.to_input(view[None], records.mean_image, 1.0, shift[None], gain[None])
        yield np.clip(np.round(np.asarray(seen)[0] + mean), 0, 255).astype(np.uint8)


# The tables of the page.


def _head(network: Predictor) -> tuple[str, str]:
    config = network.config
    count = sum(leaf.size for leaf in jax.tree.leaves(network.params))
    towers = f"{config.model.towers} towers" if config.model.towers > 1 else "one tower"
    return (
        f"{network.workdir.resolve().name}: {config.model.name} on {pathlib.Path(config.dataset.name).name}",
        f"A network of {count:,} parameters in {towers} that tells {len(network.labels):,} classes apart, trained on "
        f"{config.dataset.name} ({config.dataset.train_split}). The parameters are those of step {network.step:,}.",
    )


def _results(lines: list[Mapping[str, Any]]) -> str:
    last = {
        group: next((line for line in reversed(lines) if f"{group}/loss" in line), {"step": None})
        for group in ("eval", "test")
    }
    measures = [name.removeprefix("eval/") for name in last["eval"] if name.startswith("eval/")]

    def text(group, measure):
        value = last[group].get(f"{group}/{measure}")
        if value is None:
            return "–"
        return f"{value:.2%}" if measure.endswith(("error", "accuracy")) else f"{value:.4f}"

    rows = [(measure.replace("_", " "), text("eval", measure), text("test", measure)) for measure in measures]
    tested = last["test"].get("test/step", last["test"]["step"])
    rows.append(("step", *("–" if step is None else f"{step:,}" for step in (last["eval"]["step"], tested))))
    return page.table(("", "centre view", "ten views"), rows, numbers=(1, 2))


def _layers(network: Predictor) -> str:
    return page.table(page.LAYERS, page.layers(network.table, network.config.model.towers), numbers=(3, 4, 6))


def _config(config: Any) -> str:
    fields = [(name, repr(value)) for name, value in cli.field_names(config) if not hasattr(value, "items")]
    return page.table(("field", "value"), fields, long=1)


if __name__ == "__main__":
    cli.run(main)
