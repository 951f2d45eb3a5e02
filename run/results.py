"""The figures of a sweep: means over seeds, and differences from the base, or ratios, with their intervals.

Differences are paired by seed, because runs with one seed share their order of images, and most of them their initial
weights and their views. Three pairs alone say little of their spread. So it is taken from all arms that were trained: a
value is the sum of an effect of its arm, one of its seed, and noise that is the same for all (analysis of variance, two
ways without replication). With two arms the interval is that of Student's paired test. An arm that spreads more than
the others has too narrow an interval, and widens theirs: look at the deviations beside the means.
"""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats

from common.errors import UserError
from configs.sweeps import Lines, Measure, Sweep

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Row:
    """A measure of an arm.

    Attributes:
      values: by seed.
      finished: how many runs have come to their end, also those without a value, such as an epoch of 25 % error.
      mean: over the values; None without values.
      deviation: the standard deviation over the seeds, of a sample; None with fewer than two.
      compared: for each seed that the base has too arm minus base, or arm / base if the measure is compared by ratio.
        Nothing is, if a run of either ended without a value: those that have one would be the better ones.
      difference: the mean of `compared`; None if it is empty.
      margin: half of the interval of `difference` (CONFIDENCE, Student's t); None if too few runs say how they spread.
        Ratios, and arms that read the base's runs, have the spread of their own pairs.
      published: that of the paper or a log of 2012, or None.
    """

    arm: str
    measure: Measure
    values: Mapping[int, float]
    finished: int
    mean: float | None
    deviation: float | None
    compared: Sequence[float]
    difference: float | None
    margin: float | None
    published: float | None


def rows(sweep: Sweep, finished: Mapping[tuple[str, int], Lines]) -> list[Row]:
    """A row for each measure of each arm.

    Args:
      sweep: its first arm is the base.
      finished: the lines of metrics.jsonl by (arm, seed); arms or seeds may be missing.

    Raises:
      UserError: a measure cannot be read from a run.
    """
    base, *_ = sweep.arms
    found = []
    for measure in sweep.measures:
        values, ended = {}, {}
        for name, arm in sweep.arms.items():
            read, trained = arm.reads.get(measure.name, measure.read), base if arm.reads else name
            of_arm = {seed: lines for (of, seed), lines in sorted(finished.items()) if of == trained}
            found_in = {seed: _read(measure, read, lines, f"{trained}/seed-{seed}") for seed, lines in of_arm.items()}
            values[name] = {seed: value for seed, value in found_in.items() if value is not None}
            ended[name] = len(found_in)
        noise, freedom = _noise([values[name] for name, arm in sweep.arms.items() if not arm.reads])
        for name, arm in sweep.arms.items():
            whole = all(len(values[of]) == ended[of] for of in (name, base))
            pairs = _compared(measure, values[name], values[base]) if whole and name != base else []
            mean, deviation = _spread(list(values[name].values()))
            difference, own = _spread(pairs)
            pooled = not (measure.ratio or arm.reads)
            spread, degrees = (math.sqrt(2) * noise, freedom) if pooled else (own, len(pairs) - 1)
            margin = None
            if difference is not None and degrees > 0:
                margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees)) * spread / math.sqrt(len(pairs))
            published = arm.published.get(measure.name)
            row = Row(name, measure, values[name], ended[name], mean, deviation, pairs, difference, margin, published)
            found.append(row)
    return found


def to_draw(sweep: Sweep, found: Sequence[Row], measure: Measure) -> tuple[str, list[tuple]]:
    """The title and the arms for `comparisons.differences`; fractions are in points."""
    scale = 1 if measure.ratio else 100

    def scaled(value):
        return None if value is None else scale * value

    base, *_ = sweep.arms
    drawn = [
        (
            row.arm,
            scaled(row.difference),
            scaled(row.margin),
            scaled(row.published),
            [scale * value for value in row.compared],
        )
        for row in found
        if row.measure is measure and row.arm != base
    ]
    return f"{measure.name}{' /' if measure.ratio else ', points −'} that of {base}", drawn


def curves(sweep: Sweep, finished: Mapping[tuple[str, int], Lines]) -> dict[str, list[tuple[list, list]]]:
    """The metric `sweep.curve` against epochs, for `comparisons.curves`."""
    found = {name: [] for name in sweep.arms}
    for (name, _), lines in sorted(finished.items()):
        known = [(line["epoch"], line[sweep.curve]) for line in lines if line.get(sweep.curve) is not None]
        if name in found and known:
            found[name].append(tuple(map(list, zip(*known, strict=True))))
    return found


def _read(measure: Measure, read: Callable[[Lines], float | None], lines: Lines, run: str) -> float | None:
    try:
        value = read(lines)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{value} is no number")
    except Exception as error:  # a function of the sweep's file
        raise UserError(f"The measure {measure.name!r} of {run}: {type(error).__name__}: {error}.") from error
    return value


def _compared(measure, values, base):
    """Arm minus base, or their ratio, of each seed that both have; there is no ratio to 0."""
    pairs = [(value, base[seed]) for seed, value in values.items() if seed in base]
    if measure.ratio:
        pairs = [pair for pair in pairs if pair[1]]
    return [value / zero if measure.ratio else value - zero for value, zero in pairs]


def _noise(arms: Sequence[Mapping[int, float]]) -> tuple[float, int]:
    """How values, {seed: value} by arm, spread about the sum of an effect of the arm and one of the seed.

    Returns:
      The standard deviation, and its degrees of freedom: how many runs there are beyond those that fix the effects.
      Without such runs both are 0.
    """
    runs = [(arm, seed, value) for arm, values in enumerate(arms) for seed, value in values.items()]
    if not runs:
        return 0.0, 0
    of_arm, of_seed, found = map(np.array, zip(*runs, strict=True))
    effects = np.hstack([of_arm[:, None] == np.unique(of_arm), of_seed[:, None] == np.unique(of_seed)]).astype(float)
    fitted, _, rank, _ = np.linalg.lstsq(effects, found)
    freedom = len(runs) - int(rank)
    return (math.sqrt(np.sum((found - effects @ fitted) ** 2) / freedom), freedom) if freedom else (0.0, 0)


def _spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean and the standard deviation of a sample, as far as they exist."""
    return (
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def to_csv(found: Sequence[Row]) -> str:
    """The rows as CSV, in the units of the metrics; `values` are SEED:VALUE."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    heads = ("mean", "deviation", "difference", "low", "high", "published", "values", "finished")
    writer.writerow(["arm", "measure", *heads])
    for row in found:
        low = high = None
        if row.margin is not None:
            low, high = row.difference - row.margin, row.difference + row.margin
        values = " ".join(f"{seed}:{value!r}" for seed, value in row.values.items())
        numbers = [row.mean, row.deviation, row.difference, low, high, row.published]
        writer.writerow([row.arm, row.measure.name, *numbers, values, row.finished])
    return file.getvalue()


def to_markdown(sweep: Sweep, found: Sequence[Row]) -> str:
    """A table for each measure; fractions are in per cent and their differences in points."""
    parts = []
    for measure in sweep.measures:
        unit, compared = ("", "ratio") if measure.ratio else (" (%)", "difference")
        lines = [
            f"| arm | runs | {measure.name}{unit} | {compared}, {CONFIDENCE:.0%} interval | published | overrides |",
            "|---|---|---|---|---|---|",
        ]
        for row in found:
            if row.measure is measure:
                overrides = " ".join(f"`{field}={value}`" for field, value in sweep.arms[row.arm].overrides.items())
                overrides = overrides.replace("|", "\\|")
                runs = f"{len(row.values)} of {row.finished}" if len(row.values) < row.finished else str(row.finished)
                cells = [row.arm, runs, *cells_of(row), overrides]
                lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def cells_of(row: Row) -> tuple[str, str, str]:
    """The mean, the difference from the base or ratio, and the published one as text; '–' where there is none."""
    ratio = row.measure.ratio

    def number(value, sign=""):
        if value is None:
            return "–"
        return f"{value:.2f}" if ratio else f"{100 * value:{sign}.1f}"

    def compared(value):
        return f"× {number(value)}" if ratio and value is not None else number(value, "+")

    def within(middle, margin):
        return middle if margin is None else f"{middle} ± {number(margin)}"

    return (
        within(number(row.mean), row.deviation),
        within(compared(row.difference), row.margin),
        compared(row.published),
    )
