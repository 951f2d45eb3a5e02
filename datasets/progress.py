"""What a person sees while a data set is prepared: one bar on a terminal, otherwise a line now and then."""

import contextlib
import io
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import rich.console
import rich.progress
from absl import logging

from datasets import tensorflow_datasets

SECONDS_BETWEEN_LINES = 30


@contextlib.contextmanager
def progress(doing: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Shows the progress of a task. What others print meanwhile is dropped.

    Args:
      doing: the name of the task.
      total: the number of images, if it is known.

    Yields:
      A function to call after each image.
    """
    console = rich.console.Console(file=sys.stdout)
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        *([rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn()] if total else []),
        rich.progress.TimeElapsedColumn(),
        console=console,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    )
    task = bar.add_task(doing, total=total)
    done, last = 0, time.monotonic()

    def advance():
        nonlocal done, last
        done += 1
        bar.update(task, completed=done)
        if bar.disable and time.monotonic() > last + SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(f"{doing}: {done:,} of {total:,} images", soft_wrap=True, highlight=False, markup=False)

    with quiet(), contextlib.redirect_stdout(io.StringIO()), bar:
        yield advance


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences TFDS, absl and Pillow's warnings; works as a context and as a decorator."""
    tensorflow_datasets().disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def printable(name: str) -> str:
    """A file's name for messages and JSON: control characters and bytes that are not UTF-8 become escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
