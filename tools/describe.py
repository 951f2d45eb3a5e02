"""Prints a config's network layer by layer: `python -m tools.describe --config=configs/alexnet.py[:VARIANT]`.

    python -m tools.describe --config=configs/alexnet.py --plot=network.svg    # draws it as well

All figures are read off the network itself, as JAX traces it for one image; nothing is computed or loaded.
"""

from absl import flags

import models
from common import cli
from common.errors import UserError
from drawing import canvas, diagram, page

ALIGN = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.ljust, str.rjust)


def render(rows: list[models.Row], towers: int) -> str:
    """The table as text, with totals."""
    lines = [page.LAYERS, *page.layers(rows, towers)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(align(cell, width) for align, cell, width in zip(ALIGN, line, widths, strict=True)).rstrip()
        for line in lines
    ]
    rule = "─" * max(map(len, text))
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


CONFIG = cli.define_config()
PLOT = flags.DEFINE_string("plot", "", "Draw the network into this .png, .svg or .pdf.")


def main(_) -> None:
    """Prints the table and draws the diagram."""
    if CONFIG.value is None:
        raise UserError("Name a recipe: --config=configs/alexnet.py.")
    if PLOT.value:
        canvas.check(PLOT.value)
    towers, crop = CONFIG.value.model.towers, CONFIG.value.input.crop
    rows = models.layer_table(CONFIG.value.model, crop)
    print(render(rows, towers))
    print("\nPer image. Exchange: floats that each tower sends to the other for the layer.")
    if PLOT.value:
        canvas.save(diagram.diagram(rows, towers, crop), PLOT.value)


if __name__ == "__main__":
    cli.run(main)
