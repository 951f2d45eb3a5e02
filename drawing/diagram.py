"""The diagram of a network (the paper's figure 2): a block for what each layer gives in each tower."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from drawing.canvas import GREY, INK, TOWERS, fitted, place, sheet, styled

HIGH, HEAD = 0.82, 0.45  # inches of a layer, and above the first
INPUT = "#999999"


@styled
def diagram(rows: Sequence[Any], towers: int, image_size: int) -> Figure:
    """The layers from top to bottom, the towers side by side; lines that cross are maps of both towers.

    A block's face is the map, its depth the number of maps, and a bar is a fully-connected layer, all by square roots.

    Args:
      rows: of `models.layer_table`.
      towers: 1 or 2.
      image_size: side of the network's input in pixels.
    """
    centres, width = ((2.05, 3.7), 5.75) if towers == 2 else ((1.2,), 4.0)
    figure = sheet(width, HEAD + HIGH * (len(rows) + 1))
    axes = place(figure, 0, 0, *figure.get_size_inches())
    axes.set(xlim=(0, width), ylim=(figure.get_figheight(), 0))
    middle = sum(centres) / len(centres)
    largest = max(row.output[-1] for row in rows)
    _block(axes, (middle, HEAD), (image_size, image_size, 3), image_size, largest, INPUT)
    _label(axes, middle + 0.75, HEAD, "left", "input", f"{image_size}×{image_size}×3")
    for number, row in enumerate(rows, 1):
        y = HEAD + number * HIGH
        for tower, x in enumerate(centres):
            colour = TOWERS[tower]
            # The first tower has the odd one of a number of classes that does not divide.
            share = (row.output[-1] + towers - 1 - tower) // towers
            shape = (*row.output[:-1], share)
            above = [middle] if number == 1 else centres if row.joined else [x]
            for start in above:
                crossing = towers > 1 and number > 1 and start != x
                line = TOWERS[centres.index(start)] if number > 1 else INPUT
                axes.plot([start, x], [y - HIGH, y], color=line, lw=1, ls=(0, (3, 2)) if crossing else "-", zorder=0)
            _block(axes, (x, y), shape, image_size, largest, colour)
            seen = "×".join(map(str, row.kernel[-4:-1]))  # with a kernel for each place, the places come before
            side = "right" if towers == 2 and tower == 0 else "left"
            at = x - 0.75 if side == "right" else x + 0.75
            _label(axes, at, y, side, row.name, "×".join(map(str, shape)), f"kernels {seen}")
    if towers == 2:
        for tower, x in enumerate(centres):
            at = x + (0.75 if tower else -0.75)
            side = "left" if tower else "right"
            axes.text(at, HEAD + 0.45, f"tower {tower}", color=TOWERS[tower], ha=side, va="center", weight="bold")
    return figure


def _label(axes: Axes, x: float, y: float, side: str, name: str, *lines: str) -> None:
    axes.text(x, y - 0.1, fitted(name, 1.8), ha=side, va="bottom", weight="bold", color=INK)
    for number, line in enumerate(lines):
        axes.text(x, y + 0.05 + 0.15 * number, line, ha=side, va="center", fontsize=7, color=(INK, GREY)[number])


def _block(
    axes: Axes, at: tuple[float, float], shape: Sequence[int], image_size: int, largest: int, colour: str
) -> None:
    """Draws what a layer gives of `shape` around `at`, in inches; `largest` is the highest number of maps."""
    x, y = at
    deep = 0.08 + 0.5 * math.sqrt(shape[-1] / largest)
    high = 0.07 + 0.4 * math.sqrt(shape[0] / image_size) if len(shape) == 3 else 0.06
    wide = high if len(shape) == 3 else 2 * deep
    deep = deep if len(shape) == 3 else 0.06
    across, up = 0.8 * deep, 0.4 * deep
    left, top = x - (wide + across) / 2, y - (high - up) / 2
    right, bottom = left + wide, top + high
    faces = {
        0.45: [(left, top), (right, top), (right, bottom), (left, bottom)],
        0.25: [(left, top), (left + across, top - up), (right + across, top - up), (right, top)],
        0.65: [(right, top), (right + across, top - up), (right + across, bottom - up), (right, bottom)],
    }
    for strength, corners in faces.items():
        tint = [1 - strength * (1 - part) for part in to_rgb(colour)]
        axes.add_patch(Polygon(corners, closed=True, facecolor=tint, edgecolor=colour, lw=0.8, joinstyle="round"))
