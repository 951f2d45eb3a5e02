"""Pictures of a sweep: differences from the base with their intervals, and curves of all arms."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

from drawing.canvas import GREY, LINES, PALE, extent, place, sheet, styled, write

ROW = 0.24  # inches


@styled
def differences(
    title: str,
    arms: Sequence[tuple[str, float | None, float | None, float | None, Sequence[float]]],
    neutral: float = 0,
) -> Figure:
    """A line for each arm: its difference from the base, the interval about it, each seed, and what was published.

    Args:
      title: what differs, with its unit.
      arms: (name, difference, half of the interval, published difference, differences by seed), each None if there is
        none.
      neutral: where an arm is as the base.
    """
    left = max([extent(name) for name, *_ in arms], default=0) + 0.3
    figure = sheet(left + 4.4, ROW * len(arms) + 0.9)
    axes = place(figure, left, 0.35, 4.2, ROW * len(arms) + 0.05, frame=True)
    axes.axvline(neutral, color=PALE, linewidth=1)
    for row, (_, difference, margin, published, seeds) in enumerate(arms):
        axes.plot(seeds, [row] * len(seeds), "|", color=GREY, markersize=5, markeredgewidth=0.7)
        if difference is not None:
            axes.errorbar(difference, row, xerr=margin, fmt="o", color=LINES[0], markersize=4, linewidth=1.2)
        if published is not None:
            axes.plot(published, row, "D", color=LINES[1], markersize=4, fillstyle="none")
    axes.set(ylim=(len(arms) - 0.5, -0.5), yticks=range(len(arms)), yticklabels=[name for name, *_ in arms])
    axes.tick_params(axis="y", length=0)
    write(figure, 0.1, 0.08, title)
    legend = "● mean and 95 % interval   | seeds   ◇ published"
    write(figure, left, figure.get_figheight() - 0.2, legend, fontsize=7, color=GREY)
    return figure


@styled
def curves(label: str, arms: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """A metric against epochs, a thin line for each seed; an arm has one colour.

    Args:
      label: of the vertical axis.
      arms: by name, (epochs, values) of each seed.
    """
    wide = max([extent(name) for name in arms], default=0) + 0.5
    figure = sheet(5.2 + wide, 3.4)
    axes = place(figure, 0.6, 0.2, 4.4, 2.7, frame=True)
    colours = LINES if len(arms) <= len(LINES) else matplotlib.colormaps["tab20"].colors
    for number, (name, runs) in enumerate(arms.items()):
        for count, (epochs, values) in enumerate(runs):
            colour = colours[number % len(colours)]
            axes.plot(epochs, values, color=colour, linewidth=0.9, label=name if not count else None)
    axes.set(xlabel="epochs", ylabel=label)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    if any(arms.values()):
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False)
    return figure
