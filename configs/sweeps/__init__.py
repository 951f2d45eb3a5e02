"""Sweeps: one file each; `get_sweep()` returns arms of one recipe, the seeds of each, and what to report of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Lines = Sequence[Mapping[str, float | None]]  # of a metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Arm:
    """A variation of the recipe.

    Attributes:
      overrides: values by field, such as {"model.lrn": False}.
      published: by name of a measure, the difference from the base, or ratio, that the paper or a log of 2012 has.
      reads: by name of a measure, what is read instead. Such an arm has no runs of its own: it takes those of the base.
    """

    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reads: Mapping[str, Callable[[Lines], float | None]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure of a finished run.

    Attributes:
      name: for the reader.
      read: finds it in the lines of a metrics.jsonl; None if it is not there.
      ratio: whether an arm is compared with the base by their ratio. If not, it is a fraction, shown in per cent, and
        compared by the difference.
    """

    name: str
    read: Callable[[Lines], float | None]
    ratio: bool = False


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs of one recipe.

    Attributes:
      config: FILE or FILE:VARIANT of the recipe.
      arms: by name. The first is the base with which the others are compared.
      measures: what is reported of each run.
      seeds: each arm runs once with each. Differences are paired by seed.
      overrides: values by field, for all arms.
      curve: a metric to draw against epochs, or ''.
    """

    config: str
    arms: Mapping[str, Arm]
    measures: Sequence[Measure]
    seeds: Sequence[int] = (0, 1, 2)
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    curve: str = ""


def error(metric: str, name: str) -> Measure:
    """The error of the best checkpoint with ten views; `metric` is 'top1' or 'top5'."""
    return Measure(name, last(f"test/{metric}_error"))


def last(metric: str) -> Callable[[Lines], float | None]:
    """Reads the last value of a metric."""

    def read(lines):
        return next((line[metric] for line in reversed(lines) if metric in line), None)

    return read


def epochs_to(metric: str, bound: float) -> Callable[[Lines], float | None]:
    """Reads the epoch at which a metric is first at or below a bound; None if it never is."""

    def read(lines):
        recorded = (line for line in lines if line.get(metric) is not None)
        return next((line["epoch"] for line in recorded if line[metric] <= bound), None)

    return read
