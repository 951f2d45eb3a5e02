"""Names what photographs show: `python -m tools.predict --workdir=runs/caltech101 photo.jpg folder/ …`.

    python -m tools.predict --workdir=runs/caltech101 photo.jpg                 # five labels with their probabilities
    python -m tools.predict --workdir=runs/caltech101 --json folder/            # one JSON object a line
    curl -s https://example.org/a.jpg | python -m tools.predict --workdir=runs/caltech101 -
    find . -name '*.png' | python -m tools.predict --workdir=runs/caltech101 -
    python -m tools.predict --workdir=runs/caltech101 --plot=answers.png a.jpg b.jpg

A photograph in a folder with the name of a class counts as one of that class. Exit code 2 if a file cannot be read.
"""

import json
import pathlib
import sys

import rich.console
import rich.table
import rich.text
from absl import flags

from common import cli
from common.errors import require
from datasets.progress import printable
from drawing import canvas, plots
from predictor import ranked
from tools import shared

TOP = flags.DEFINE_integer("top", 5, "How many labels.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "One JSON object a line, for programs.")
PLOT = flags.DEFINE_string("plot", "", "Draw the photographs with their answers into this .png, .svg or .pdf.")
shared.define_network()

MOST_DRAWN, MOST_BARS = 60, 10
BAR = 30  # characters of a probability of 1


def main(arguments: list[str]) -> int:
    """Prints and draws the answers."""
    require(len(arguments) > 1, "Name photographs: files, folders, or - for stdin.")
    if PLOT.value:
        canvas.check(PLOT.value)
    network = shared.network()
    photographs = shared.Photographs(network, arguments[1:])
    console = rich.console.Console()
    drawn = []
    for photograph, row in photographs.through(network.probabilities, "predict", prints=True):
        answers, truth = network.top(row, TOP.value), _truth(network, photograph.file)
        if JSON.value:
            _print_json(network, photograph.file, row, truth)
        else:
            _print(console, photograph.file, answers, truth)
        if PLOT.value and len(drawn) < MOST_DRAWN:
            drawn.append((photograph.pixels, answers[:MOST_BARS], truth))
    if PLOT.value and drawn:
        if (readable := len(photographs.files) - photographs.unreadable) > MOST_DRAWN:
            print(f"{PLOT.value} shows the first {MOST_DRAWN} of {readable}.", file=sys.stderr)
        canvas.save(plots.predictions(*zip(*drawn, strict=True)), PLOT.value)
    return photographs.exit_code()


def _truth(network, file: str) -> str | None:
    """The label of the class whose folder holds the file, if there is one."""
    names = network.records.class_names
    folder = pathlib.Path(file).absolute().parent.name
    return network.labels[names.index(folder)] if folder in names else None


def _print(console, file, answers, truth):
    table = rich.table.Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for label, probability in answers:
        text = rich.text.Text(label, style="bold green" if label == truth else "")
        table.add_row(f"{probability:7.2%}", text, rich.text.Text("█" * round(BAR * probability), style="blue"))
    with console.capture() as captured:  # Rich itself would end the program if nobody reads
        console.print(rich.text.Text(printable(file), style="bold"), soft_wrap=True)
        console.print(table)
    print(captured.get(), end="", flush=True)


def _print_json(network, file, row, truth):
    predictions = [
        {"class": network.records.class_names[i], "label": network.labels[i], "probability": float(row[i])}
        for i in ranked(row, TOP.value)
    ]
    print(json.dumps({"file": file, "true_label": truth, "predictions": predictions}), flush=True)


if __name__ == "__main__":
    cli.run(main, takes=shared.FILES)
