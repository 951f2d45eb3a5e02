"""What a person sees of a long task: one bar on a terminal, otherwise a line now and then."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import rich.console
import rich.progress

SECONDS_BETWEEN_LINES = 30


@contextlib.contextmanager
def progress(doing: str, total: int | None, file: TextIO) -> Iterator[Callable[..., None]]:
    """Shows the progress of a task on images, with the time left.

    Args:
      doing: the name of the task.
      total: the number of images, if it is known.
      file: where to, such as sys.stderr.

    Yields:
      A function to call after images, with their number, 1 by default.
    """
    console = rich.console.Console(file=file)
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

    def advance(count=1):
        nonlocal done, last
        done += count
        bar.update(task, completed=done)
        if bar.disable and time.monotonic() > last + SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            of = f" of {total:,}" if total else ""
            console.print(f"{doing}: {done:,}{of} images", soft_wrap=True, highlight=False, markup=False)

    with bar:
        yield advance
