"""Prints a config's network layer by layer: `python -m tools.describe --config=configs/alexnet.py[:VARIANT]`.

All figures are read off the network itself, as JAX traces it for one image; nothing is computed or loaded.
"""

import models
from common import cli
from common.errors import UserError

HEADER = ("layer", "output", "kernel", "parameters", "multiply-adds", "maps by tower", "exchange")
ALIGN = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.ljust, str.rjust)


def render(rows: list[models.Row], towers: int) -> str:
    """The table as text, with totals."""
    lines = [HEADER]
    for row in rows:
        maps = row.output[-1]
        # A number of classes that does not divide gives the first tower one more.
        by_tower = " | ".join(str((maps + towers - 1 - tower) // towers) for tower in range(towers))
        output, kernel = ("×".join(map(str, shape)) for shape in (row.output, row.kernel))
        exchange = f"{row.exchange:,}" if row.exchange else ""
        lines.append((row.name, output, kernel, f"{row.parameters:,}", f"{row.multiply_adds:,}", by_tower, exchange))
    totals = (f"{sum(getattr(row, name) for row in rows):,}" for name in ("parameters", "multiply_adds", "exchange"))
    parameters, multiply_adds, exchange = totals
    lines.append(("total", "", "", parameters, multiply_adds, "", exchange))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(align(cell, width) for align, cell, width in zip(ALIGN, line, widths, strict=True)).rstrip()
        for line in lines
    ]
    rule = "─" * max(map(len, text))
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


CONFIG = cli.define_config()


def main(_) -> None:
    """Prints the table."""
    if CONFIG.value is None:
        raise UserError("Name a recipe: --config=configs/alexnet.py.")
    config = CONFIG.value
    print(render(models.layer_table(config.model, config.input.crop), config.model.towers))
    print("\nPer image. Exchange: floats that each tower sends to the other before the layer.")


if __name__ == "__main__":
    cli.run(main)
