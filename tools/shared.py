"""What the tools on a trained network share: the flags that choose it, and the photographs that they are given."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from absl import flags

import predictor
from common import exits, host
from common.progress import progress
from datasets import arguments
from datasets.progress import printable

# The flags below belong to the tool that calls for them, so that its --help lists them.
flags.disclaim_key_flags()

FILES = "FILE|FOLDER|- …"


def define_network(views: bool = True, batches: bool = True) -> None:
    """Defines the flags with which `network` chooses a trained network.

    Args:
      views: whether the tool predicts.
      batches: whether the tool computes.
    """
    flags.DEFINE_string("workdir", None, "Folder of a run of main.py; required.", required=True)
    flags.DEFINE_string("step", "best", "The checkpoint: best, latest, or the number of its step.")
    if batches:
        flags.DEFINE_integer("batch_size", 64, "Images that are computed at once.", lower_bound=1)
    if views:
        flags.DEFINE_enum("views", "ten", ["ten", "centre"], "The paper's ten views of each image, or the centre one.")


def network(workdir: str | None = None) -> predictor.Predictor:
    """Loads the network that the flags choose, or that of another workdir as they choose it."""
    host.keep_freed_memory()
    options = {flag: chosen(flag) for flag in ("views", "batch_size") if flag in flags.FLAGS}
    return predictor.Predictor(chosen("workdir") if workdir is None else workdir, step=chosen("step"), **options)


def chosen(flag: str) -> str:
    """The value of one of the flags."""
    return flags.FLAGS[flag].value


class Photographs:
    """The photographs that a tool is given, read while the network computes, with their progress on stderr.

    Args:
      loaded: the network that sees them.
      names: files, folders, or '-' for stdin; see `arguments.find`.

    Attributes:
      files: their names.
      unreadable: how many have been passed over, with a sentence each on stderr.
    """

    def __init__(self, loaded: predictor.Predictor, names: Iterable[str]):
        self._network, self.unreadable = loaded, 0
        self.files = arguments.find(names)

    def through(
        self, function: Callable[[Iterable[Any]], Iterator[Any]], doing: str, prints: bool = False
    ) -> Iterator[tuple[predictor.Photograph, Any]]:
        """Yields each readable photograph with what `function`, of squares, yields for it.

        Shows a progress bar, unless the caller `prints` answers to a terminal, which tell how far it is.
        """
        shown = len(self.files) > 1 and not (prints and sys.stdout.isatty())
        bar = progress(doing, len(self.files), sys.stderr) if shown else contextlib.nullcontext(lambda: None)
        with bar as advance:
            ahead, behind = itertools.tee(self.readable(advance))
            yield from zip(behind, function(photograph.pixels for photograph in ahead), strict=True)

    def readable(self, advance: Callable[[], None] = lambda: None) -> Iterator[predictor.Photograph]:
        """Yields those that can be read; calls `advance` after each file, and notes the others."""
        for photograph in self._network.read(self.files):
            advance()
            if photograph.pixels is None:
                self.unreadable += 1
                print(f"{printable(photograph.file)}: {photograph.reason}", file=sys.stderr)
            else:
                yield photograph

    def exit_code(self) -> int:
        """0, or that of a mistake if photographs could not be read."""
        return exits.MISTAKE if self.unreadable else 0
