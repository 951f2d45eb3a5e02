"""Prints a config's network layer by layer: `python -m tools.describe --config=configs/alexnet.py[:VARIANT]`.

All figures are read off the network itself, as JAX traces it for one image; nothing is computed or loaded.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

import cli
import models


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer: its output for one image, merged kernel, parameters, multiply-adds, and the floats each tower sends
    to the other before it."""

    name: str
    output: tuple[int, ...]
    kernel: tuple[int, ...]
    parameters: int
    multiply_adds: int
    exchange: int


def layer_table(config) -> list[Row]:
    """The layers with parameters, in order of computation."""
    network = models.build(config.model, None, config.input.crop)
    images = jnp.zeros((1, config.input.crop, config.input.crop, 3))

    def trace(key):
        variables = network.init(key, images)
        _, seen = network.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])
        return variables["params"], seen["intermediates"]

    params, seen = jax.eval_shape(trace, jax.random.key(0))
    rows, towers = [], config.model.towers
    for name, leaves in params.items():
        output = seen[name]["__call__"][0].shape[1:]
        kernel = leaves["kernel"]
        joined = seen.get(f"{name}_joined")
        sent = math.prod(joined[0].shape[1:]) // towers if joined and towers > 1 else 0
        rows.append(
            Row(
                name=name,
                output=output,
                kernel=kernel.shape,
                parameters=sum(math.prod(leaf.shape) for leaf in leaves.values()),
                multiply_adds=math.prod(output[:-1]) * math.prod(kernel.shape),
                exchange=sent,
            )
        )
    return rows


def render(rows: list[Row], towers: int) -> str:
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
    print(render(layer_table(config), config.model.towers))
    print("\nPer image. Exchange: floats that each tower sends to the other before the layer.")


if __name__ == "__main__":
    cli.run(main)
