"""Prints a config's network layer by layer: `python -m tools.describe --config=configs/alexnet.py[:VARIANT]`.

All figures are read off the network itself, as JAX traces it for one image; nothing is computed or loaded.
"""

import cli
import models


def render(rows: list[models.Row], towers: int) -> str:
    """The table as text, with totals."""
    header = ("layer", "output", "kernel", "parameters", "multiply-adds", "maps by tower", "exchange")
    lines = [header]
    for row in rows:
        by_tower = " | ".join([str(row.output[-1] // towers)] * towers)
        if row is rows[-1] and towers > 1:
            by_tower = f"{row.output[-1]} joined"
        lines.append(
            (
                row.name,
                "×".join(map(str, row.output)),
                "×".join(map(str, row.kernel)),
                f"{row.parameters:,}",
                f"{row.multiply_adds:,}",
                by_tower,
                f"{row.exchange:,}" if row.exchange else "",
            )
        )
    lines.append(
        (
            "total",
            "",
            "",
            f"{sum(row.parameters for row in rows):,}",
            f"{sum(row.multiply_adds for row in rows):,}",
            "",
            f"{sum(row.exchange for row in rows):,}",
        )
    )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = (False, False, False, True, True, False, True)

    def align(line):
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        return "  ".join(cells).rstrip()

    text = [align(line) for line in lines]
    rule = "─" * max(map(len, text))
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


CONFIG = cli.define_config()


def main(_) -> None:
    """Prints the table."""
    if CONFIG.value is None:
        raise cli.UserError("Name a recipe: --config=configs/alexnet.py.")
    config = CONFIG.value
    print(render(models.layer_table(config.model, config.input.crop), config.model.towers))
    print("\nPer image. Exchange: floats that each tower sends to the other before the layer.")


if __name__ == "__main__":
    cli.run(main)
