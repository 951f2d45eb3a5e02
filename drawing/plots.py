"""Pictures of a network in Matplotlib: each function takes arrays and names, and returns a figure.

None of them keeps a state or needs a display. Sizes are in inches.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from drawing import grids
from drawing.canvas import (
    GREY,
    INK,
    LINES,
    PALE,
    RIGHT,
    TOWERS,
    WRONG,
    extent,
    fitted,
    place,
    sheet,
    styled,
    write,
)

PHOTO, GAP = 1.7, 0.25


@styled
def predictions(
    squares: Sequence[np.ndarray],
    answers: Sequence[Sequence[tuple[str, float]]],
    truths: Sequence[str | None],
) -> Figure:
    """Photographs with what the network says (figure 4, left): the label below, then a bar for each answer.

    Args:
      squares: (S, S, 3) uint8 each, at least one.
      answers: for each photograph (label, probability), the most probable first.
      truths: for each its label, or None. An answer with this label has a colour of its own.
    """
    bars = max(map(len, answers))
    columns = min(8, grids.columns_of(len(squares)))
    rows = -(-len(squares) // columns)
    high = PHOTO + 0.25 + 0.19 * bars + GAP
    figure = sheet(columns * (PHOTO + GAP) + GAP, rows * high + GAP)
    for number, (square, answer, truth) in enumerate(zip(squares, answers, truths, strict=True)):
        left, top = GAP + number % columns * (PHOTO + GAP), GAP + number // columns * high
        place(figure, left, top, PHOTO, PHOTO).imshow(square, aspect="auto")
        if truth is not None:
            title = fitted(truth, PHOTO, 9)
            write(figure, left + PHOTO / 2, top + PHOTO + 0.05, title, ha="center", fontsize=9)
        axes = place(figure, left, top + PHOTO + 0.25, PHOTO, 0.19 * bars)
        axes.set(xlim=(0, 1), ylim=(bars - 0.5, -0.5))
        for place_of, (label, probability) in enumerate(answer):
            colour = RIGHT if label == truth else WRONG
            axes.barh(place_of, probability, 0.84, color=colour)
            axes.text(0.02, place_of, fitted(label, PHOTO - 0.4, 7), fontsize=7, va="center", color=INK)
            axes.text(1, place_of, f"{probability:.0%}", fontsize=6, va="center", ha="right", color=GREY)
    return figure


LABEL, LARGEST = 0.125, 13.0  # the height of a line, and the longest side of a matrix


@styled
def confusion(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """True class × predicted class, as shares of each true class; a class without examples has an empty row.

    Args:
      matrix: (classes, classes) counts; `matrix[i, j]` of class i were taken for class j.
      names: of the classes. If there are more than fit, every other, third, … is written.
    """
    count = len(names)
    totals = matrix.sum(1, keepdims=True)
    shares = np.ma.masked_invalid(np.divide(matrix, totals, out=np.full(matrix.shape, np.nan), where=totals > 0))
    side = min(LARGEST, max(3.0, count * (0.5 if count <= 12 else LABEL)))
    every = -(-count // int(side / LABEL))
    shown, size = range(0, count, every), 8 if count <= 12 else 6.5
    labels = [fitted(names[number], 1.6, size) for number in shown]
    margin = max(extent(label, size) for label in labels) + 0.45
    figure = sheet(margin + side + 0.9, side + margin + 0.2)
    axes = place(figure, margin, 0.2, side, side, frame=True)
    axes.set_facecolor("#eeeeee")
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks(shown, labels, rotation=90, fontsize=size)
    axes.set_yticks(shown, labels, fontsize=size)
    axes.tick_params(length=2)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    if count <= 12:
        for row, column in np.argwhere(~np.ma.getmaskarray(shares) & (matrix > 0)):
            share = shares[row, column]
            colour = "white" if share > 0.6 else INK
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour)
    scale = place(figure, margin + side + 0.15, 0.2, 0.12, min(side, 3.0), frame=True)
    bar = figure.colorbar(picture, cax=scale, format=lambda share, _: f"{share:.0%}")
    bar.outline.set_visible(False)
    scale.tick_params(length=2)
    return figure


@styled
def layers(photo: np.ndarray, values: Mapping[str, np.ndarray], towers: int) -> Figure:
    """A photograph, and below it what each layer makes of it: the maps of each tower side by side.

    Args:
      photo: (S, S, 3) uint8.
      values: by layer, in order of computation: (H, W, maps) or, for a fully-connected layer, (units,) float.
      towers: how many towers; the first has the first half of the maps.
    """
    margin, whole = 1.15, 9.0
    wide = (whole - GAP * (towers - 1)) / towers
    rows = []
    for name, array in values.items():
        flat = array.ndim == 1
        parts = grids.maps(array, towers, aspect=(16 if flat else 4) / towers)
        rows.append((name, array.shape, parts, max(wide * part.shape[0] / part.shape[1] for part in parts)))
    above = PHOTO + 2 * GAP + (0.2 if towers > 1 else 0)
    figure = sheet(margin + whole + GAP, above + sum(high + GAP for *_, high in rows))
    place(figure, margin, GAP, PHOTO, PHOTO).imshow(photo, aspect="auto")
    write(figure, GAP, GAP, "input", weight="bold")
    write(figure, GAP, GAP + 0.15, "×".join(map(str, photo.shape)), fontsize=7, color=GREY)
    if towers > 1:
        for tower in range(towers):
            left = margin + tower * (wide + GAP)
            write(figure, left, above - 0.2, f"tower {tower}", color=TOWERS[tower], weight="bold")
    top = above
    for name, shape, parts, high in rows:
        write(figure, GAP, top, fitted(name, margin - GAP), weight="bold")
        write(figure, GAP, top + 0.15, "×".join(map(str, shape)), fontsize=7, color=GREY)
        for tower, part in enumerate(parts):
            left = margin + tower * (wide + GAP)
            axes = place(figure, left, top, wide, wide * part.shape[0] / part.shape[1], frame=True)
            axes.imshow(part, aspect="auto", interpolation="nearest" if len(shape) == 1 else None)
            axes.set(xticks=(), yticks=())
            axes.spines[:].set(visible=True, color=PALE)  # the highest value is as white as the paper
        top += high + GAP
    return figure


@styled
def curves(lines: Sequence[Mapping[str, float | None]]) -> Figure:
    """Errors and losses against epochs (the form of figure 1).

    Args:
      lines: of metrics.jsonl. The test of the best checkpoint is a point at the epoch of that checkpoint.
    """
    figure = sheet(8.6, 3.2)
    series = {
        "error": {
            "train/top1_error": ("training, top-1", LINES[0], "-"),
            "eval/top1_error": ("evaluation, top-1", LINES[1], "-"),
            "eval/top5_error": ("evaluation, top-5", LINES[1], ":"),
        },
        "loss": {"train/loss": ("training", LINES[0], "-"), "eval/loss": ("evaluation", LINES[1], "-")},
    }
    for column, (title, known) in enumerate(series.items()):
        axes = place(figure, 0.7 + column * 4.3, 0.2, 3.5, 2.5, frame=True)
        for name, (label, colour, style) in known.items():
            points = [(line["epoch"], line[name]) for line in lines if line.get(name) is not None]
            marker = "o" if len(points) < 10 else ""
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label, lw=1.5, marker=marker, ms=3)
        if title == "error":
            _tests(axes, lines)
            axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        highest = max((y for line in axes.lines for y in line.get_ydata()), default=0) or 1
        axes.set(xlabel="epochs", ylabel=title, xlim=(0, None), ylim=(0, 1.08 * highest))
        axes.grid(color=PALE, lw=0.5)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
    return figure


def _tests(axes, lines):
    """The errors of ten views, at the epochs of the checkpoints that they are of."""
    for name, marker in (("top1_error", "D"), ("top5_error", "d")):
        points = [
            (line["epoch"] * line.get("test/step", 0) / max(1, line["step"]), line[f"test/{name}"])
            for line in lines
            if line.get(f"test/{name}") is not None
        ]
        if points:
            label = f"ten views, top-{name[3]}"
            axes.plot(*zip(*points, strict=True), marker, color=LINES[2], ms=4, label=label, ls="")


@styled
def kernels(kernel: np.ndarray, towers: int) -> Figure:
    """The kernels of the first layer, each tower's apart, with the tower's colour selectivity (figure 3).

    Args:
      kernel: (height, width, 3, features) float.
      towers: how many towers; the first has the first half of the kernels.
    """
    # With two towers of 48 kernels, the paper's three rows of 16 each.
    parts = grids.kernels(kernel, towers, aspect=16 / 6 * towers)
    wide, head = min(8.0, 0.1 * parts[0].shape[1]), 0.25
    heights = [wide * part.shape[0] / part.shape[1] for part in parts]
    figure = sheet(max(wide, 2.5) + 2 * GAP, sum(heights) + towers * (head + GAP) + GAP)
    top = GAP
    for tower, (part, share) in enumerate(zip(parts, grids.selectivity(kernel, towers), strict=True)):
        name = f"tower {tower}" if towers > 1 else "kernels"
        write(figure, GAP, top, name, color=TOWERS[tower] if towers > 1 else INK, weight="bold")
        write(figure, GAP + 0.65, top, f"colour selectivity {share:.2f}", color=GREY)
        axes = place(figure, GAP, top + head, wide, heights[tower])
        axes.imshow(part, aspect="auto", interpolation="nearest")
        top += head + heights[tower] + GAP
    return figure


@styled
def neighbours(
    queries: Sequence[tuple[np.ndarray, str]], found: Sequence[Sequence[tuple[np.ndarray, str, float]]]
) -> Figure:
    """Test images on the left, and beside each the training images nearest to it (figure 4, right).

    Args:
      queries: (S, S, 3) uint8 and label.
      found: for each query its neighbours, the nearest first: (S, S, 3) uint8, label and distance. The labels that are
        the query's have a colour of their own.
    """
    side, high = 1.25, 1.25 + 0.3
    columns = max(map(len, found))
    figure = sheet((columns + 1) * (side + 0.1) + 0.5, len(queries) * high + 0.45)
    write(figure, 0.15, 0.12, "query", color=GREY)
    write(figure, 0.15 + side + 0.3, 0.12, "nearest training images, with their distances", color=GREY)
    for row, ((square, truth), others) in enumerate(zip(queries, found, strict=True)):
        top = 0.35 + row * high
        place(figure, 0.15, top, side, side).imshow(square, aspect="auto")
        write(figure, 0.15, top + side + 0.04, fitted(truth, side / 1.15, 7), fontsize=7, weight="bold")
        for column, (image, label, distance) in enumerate(others):
            left = 0.15 + side + 0.3 + column * (side + 0.1)
            place(figure, left, top, side, side).imshow(image, aspect="auto")
            colour = LINES[1] if label == truth else GREY
            write(figure, left, top + side + 0.04, fitted(label, side - 0.45, 7), fontsize=7, color=colour)
            far = f"{distance:.3g}"
            write(figure, left + side, top + side + 0.04, far, fontsize=6, color=GREY, ha="right")
    return figure


@styled
def augmentation(photo: np.ndarray, rows: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """A photograph, and rows of its training views (section 4.1).

    Args:
      photo: (S, S, 3) uint8.
      rows: by title, (crop, crop, 3) uint8 each.
    """
    side, gap, margin = 1.2, 0.1, 1.15
    columns = max(map(len, rows.values()))
    figure = sheet(margin + columns * (side + gap) + GAP, (len(rows) + 1) * (side + gap) + 2 * GAP)
    write(figure, GAP, GAP, "photograph", weight="bold")
    whole = place(figure, margin, GAP, side, side)
    whole.imshow(photo, aspect="auto")
    for row, (title, images) in enumerate(rows.items(), 1):
        top = GAP + row * (side + gap)
        write(figure, GAP, top, title, weight="bold")
        for column, image in enumerate(images):
            place(figure, margin + column * (side + gap), top, side, side).imshow(image, aspect="auto")
    return figure


@styled
def activations(functions: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], used: str) -> Figure:
    """Activation functions and their gradients (section 3.1).

    Args:
      functions: by name, (points,) float each: the inputs, the values and the gradients.
      used: the name of the one that the network has, which is drawn stronger.
    """
    figure = sheet(8.6, 3.0)
    for column, title in enumerate(("value", "gradient")):
        axes = place(figure, 0.7 + column * 4.3, 0.2, 3.5, 2.3, frame=True)
        for colour, (name, (inputs, *results)) in zip(LINES, functions.items(), strict=False):
            strong = {"lw": 2.5, "label": f"{name} (this network)"} if name == used else {"lw": 1.2, "label": name}
            axes.plot(inputs, results[column], color=colour, **strong)
        axes.set(xlabel="input", ylabel=title)
        axes.grid(color=PALE, lw=0.5)
    axes.legend(frameon=False, fontsize=7)
    return figure
