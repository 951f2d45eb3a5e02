"""The progress of a preparation, without the notices of TFDS."""

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator

from absl import logging

from common import progress as bars
from datasets import tensorflow_datasets


@contextlib.contextmanager
def progress(doing: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Shows the progress of a task on stdout, see `common.progress`. What others print meanwhile is dropped."""
    shown = sys.stdout
    with quiet(), contextlib.redirect_stdout(io.StringIO()), bars.progress(doing, total, shown) as advance:
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
