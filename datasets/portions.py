"""What a source is: image files in portions, the units in which they are prepared."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

FILES = 256  # of a portion; what an interrupted preparation loses at most, for each process


@dataclasses.dataclass(frozen=True)
class File:
    """One image file of a source: its name, its label, and a function that opens it for reading."""

    name: str
    label: int
    open: Callable[[], BinaryIO]


@dataclasses.dataclass(frozen=True)
class Portion:
    """Consecutive files of a split. It can be pickled, and read in another process.

    Attributes:
      name: 'train-00003', or 'train-n01440764' of a class in an archive; no other portion has it.
      split: its split.
      count: number of files; of a class in an archive, which tells it only when it is read, an estimate.
      files: yields the files, always in the same order.
    """

    name: str
    split: str
    count: int
    files: Callable[[], Iterator[File]]


@dataclasses.dataclass(frozen=True)
class Source:
    """Images to prepare.

    Attributes:
      origin: the folder or TFDS name that the images come from.
      class_names: by label.
      portions: those of a split follow one another.
      files_per_process: so many files make it worth while to start a process for them.
      contents: of a folder, see `folders.contents`.
      passed_over: number of files that have no image suffix, by suffix.
      state: differs after a change that neither the other attributes nor the portions' names and counts show.
      estimated: the portions' counts are estimates.
    """

    origin: str
    class_names: tuple[str, ...]
    portions: tuple[Portion, ...]
    files_per_process: int
    contents: Mapping[str, str] = dataclasses.field(default_factory=dict)
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict)
    state: str = ""
    estimated: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """The number of files by split."""
        groups = itertools.groupby(self.portions, lambda portion: portion.split)
        return {split: sum(portion.count for portion in group) for split, group in groups}

    @property
    def total(self) -> int:
        """The number of files of all splits."""
        return sum(self.counts.values())

    def files(self, split: str) -> Iterator[File]:
        """The files of a split, always in the same order."""
        for portion in self.portions:
            if portion.split == split:
                yield from portion.files()


def divide(split: str, count: int, files: Callable[[int, int], Callable[[], Iterator[File]]]) -> list[Portion]:
    """Divides the `count` files of a split; `files(start, stop)` makes `Portion.files` of some of them."""
    stops = [min(start + FILES, count) for start in range(0, count, FILES)]
    return [
        Portion(f"{split}-{number:05d}", split, stop - number * FILES, files(number * FILES, stop))
        for number, stop in enumerate(stops)
    ]
