"""Conversion: the files of a source become square images, a portion at a time, in worker processes.

Each portion becomes two files, PORTION.images with the encoded images, one after another, and PORTION.npz with what
else is known of them. The second is written last, whole or not at all: where it is there, the portion is complete.

The processes do not import TensorFlow, unless the source does: it takes seconds and some 400 MB in each.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.dummy
import os
import pathlib
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from common import files, host
from common.errors import UserError
from datasets.images import Budget, Unreadable, to_record
from datasets.portions import File, Portion
from datasets.progress import printable
from datasets.statistics import Statistics, outer_product

BYTES_PER_PIXEL = 8  # of the largest file: uncompressed 16-bit RGBA
AHEAD = 1 << 28  # bytes of finished records that may wait to be written


class Settings(NamedTuple):
    """What decides on a record, beside its file.

    Attributes:
      origin, num_classes: of the source.
      size: pixels a side of the records.
      train_split: the split whose statistics are taken.
      max_pixels: larger images are not decoded, and count as unreadable.
    """

    origin: str
    num_classes: int
    size: int
    train_split: str
    max_pixels: int


@dataclasses.dataclass(frozen=True)
class Converted:
    """A portion that was converted. It has N images, and the files that they come from may be more.

    Attributes:
      path: the file with its images.
      lengths: (N,) int64, the bytes of each.
      labels: (N,) int64.
      names: of their files.
      places: (N,) int64, the places of their files in the portion.
      hashes: (files,) uint64, a hash of the pixels of each file; 0 for an unreadable file.
      unreadable: {'file': …, 'reason': …} of each file without a usable image.
    """

    path: pathlib.Path
    lengths: np.ndarray
    labels: np.ndarray
    names: list[str]
    places: np.ndarray
    hashes: np.ndarray
    unreadable: list[dict[str, str]]

    @classmethod
    def load(cls, folder: pathlib.Path, portion: Portion) -> "Converted":
        """Reads a portion; raises anything if it is not there, or not whole."""
        path = _path(folder, portion)
        with path.with_suffix(".npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ("lengths", "labels", "places", "hashes")}
            text = json.loads(str(stored["text"]))
        if arrays["lengths"].sum() != path.stat().st_size:
            raise ValueError(f"{path} has another size")
        return cls(path, **arrays, **text)

    def statistics(self) -> Statistics:
        """The sums over its images, if it is of the training split."""
        with self.path.with_suffix(".npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return Statistics(int(stored["count"]), stored["image_sum"], stored["outer_sum"])


def _path(folder: pathlib.Path, portion: Portion) -> pathlib.Path:
    return folder / f"{portion.name}.images"


def is_converted(folder: pathlib.Path, portion: Portion) -> bool:
    """Whether a portion is in the folder, and whole.

    One with an unreadable file is converted again: a file that is mended may keep its name and size.
    """
    try:
        return not Converted.load(folder, portion).unreadable
    except Exception:  # NumPy raises anything
        return False


def convert(
    portions: Sequence[Portion],
    settings: Settings,
    folder: pathlib.Path,
    files_per_process: int,
    advance: Callable[..., None],
) -> None:
    """Converts portions on all cores, and stores them in a folder.

    On any number of cores, files in memory take up to BYTES_PER_PIXEL · max_pixels bytes, decoding takes about
    16 · max_pixels, and finished records about AHEAD.

    Args:
      portions: those to convert.
      settings: what decides on a record.
      folder: takes the files of each portion.
      files_per_process: see `portions.Source`.
      advance: called after files have been converted, with their number.

    Raises:
      UserError: a label is out of range, or a file of the source or of the folder fails.
    """
    cores = host.cores()
    processes = min(cores, len(portions), sum(portion.count for portion in portions) // files_per_process)
    if processes < 2:
        _join(settings, folder, cores, AHEAD, Budgets.of(settings.max_pixels, multiprocessing.dummy))
        for portion in portions:
            _convert_portion(portion, advance)
        return
    # Processes, because a third of what is done to an image holds the interpreter's lock. Not forked, because
    # TensorFlow and JAX have threads.
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    joined = settings, folder, 1, AHEAD // processes, Budgets.of(settings.max_pixels, context)
    with concurrent.futures.ProcessPoolExecutor(processes, context, _join_apart, joined) as pool:
        try:
            with _without_program():
                under_way = [pool.submit(_convert_apart, portion) for portion in portions]
            for done in concurrent.futures.as_completed(under_way):
                advance(done.result())
        except BaseException as error:
            # The pool itself would wait for the portions under way.
            for process in set(multiprocessing.active_children()) - set(others):
                process.kill()
            if isinstance(error, concurrent.futures.process.BrokenProcessPool):
                raise UserError("A process that converted photographs was killed; memory may be short.") from None
            raise


@contextlib.contextmanager
def _without_program() -> Iterator[None]:
    """Processes that start meanwhile do not import the program that runs, which may import JAX or be a script."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


class Budgets(NamedTuple):
    """What all threads of all processes may hold at once: bytes of files, and pixels that are decoded."""

    reading: Budget
    decoding: Budget

    @classmethod
    def of(cls, max_pixels: int, context: Any) -> "Budgets":
        """Enough for one file of the largest size."""
        return cls(Budget(most_bytes(max_pixels), context), Budget(max_pixels, context))


def _join(settings: Settings, folder: pathlib.Path, threads: int, ahead: int, budgets: Budgets) -> None:
    global _joined
    _joined = settings, folder, threads, ahead // (3 * settings.size**2), budgets


def _join_apart(*joined: Any) -> None:
    """Begins a process of a pool. It ends with its parent, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _join(*joined)


def _convert_apart(portion: Portion) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's
        return _convert_portion(portion, lambda: None)


def _convert_portion(portion: Portion, advance: Callable[..., None]) -> int:
    """Converts and stores a portion; returns the number of its files."""
    settings, folder, threads, ahead, budgets = _joined
    statistics, kept, hashes, unreadable = Statistics.empty(settings.size), [], [], []
    make = functools.partial(_convert, settings=settings, budgets=budgets)
    path = _path(folder, portion)
    with files.replacing(path, str(os.getpid())) as partial, partial.open("wb") as images:
        for place, made in enumerate(in_order(make, portion.files(), ahead, threads)):
            name, label = printable(made.file.name), made.file.label
            hashes.append(made.hash)
            if made.reason:
                unreadable.append({"file": name, "reason": made.reason})
            elif not 0 <= label < settings.num_classes:
                raise UserError(
                    f"{name} of {settings.origin} has the label {label}; it should be one of 0 … "
                    f"{settings.num_classes - 1}."
                )
            else:
                images.write(made.record)
                kept.append((len(made.record), label, place, made.file.name))
                if portion.split == settings.train_split:
                    statistics.add(made.pixels, made.outer)
            advance()
    lengths, labels, places, names = zip(*kept, strict=True) if kept else ((), (), (), ())
    numbers = dict(lengths=lengths, labels=labels, places=places)
    arrays = {name: np.array(values, np.int64) for name, values in numbers.items()}
    arrays |= dict(
        hashes=np.array(hashes, np.uint64), text=np.array(json.dumps({"names": names, "unreadable": unreadable}))
    )
    if portion.split == settings.train_split:
        arrays |= dataclasses.asdict(statistics)
    with files.replacing(path.with_suffix(".npz"), str(os.getpid())) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
    return len(hashes)


class _Made(NamedTuple):
    """What became of a file: a record with its pixels, their outer product and hash, or the reason why not."""

    file: File
    record: bytes = b""
    pixels: np.ndarray | None = None
    outer: np.ndarray | None = None
    hash: int = 0
    reason: str = ""


def most_bytes(max_pixels: int) -> int:
    """The longest file in which an image of so many pixels is looked for."""
    return BYTES_PER_PIXEL * max_pixels + (1 << 20)


def length_of(stream: BinaryIO, max_pixels: int) -> int:
    """The bytes of a file at its beginning; raises `Unreadable` if no image of so many pixels has as many."""
    length = stream.seek(0, os.SEEK_END)
    if length > most_bytes(max_pixels):
        raise Unreadable(f"it has {length:,} bytes, more than an image of {max_pixels:,} pixels needs")
    stream.seek(0)
    return length


def _convert(file: File, settings: Settings, budgets: Budgets) -> _Made:
    try:
        with file.open() as stream:
            length = length_of(stream, settings.max_pixels)
            with budgets.reading.hold(length):
                data = stream.read(length)
                record, pixels = to_record(data, settings.size, settings.max_pixels, budgets.decoding)
    except (Unreadable, OSError) as error:
        return _Made(file, reason=getattr(error, "strerror", None) or str(error))
    digest = hashlib.sha1(np.ascontiguousarray(pixels)).digest()  # the fastest that has 64 bits or more
    return _Made(file, record, pixels, outer_product(pixels), hash=int.from_bytes(digest[:8], "little"))


def in_order(function: Callable, items: Iterable, ahead: int, threads: int = 0) -> Iterator:
    """Maps in threads, at most `ahead` results in advance. Pillow decodes without holding the interpreter's lock.

    `threads` is their number; 0 takes one for each core.
    """
    workers = threads or host.cores()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        under_way = collections.deque()
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) > min(4 * workers, ahead):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
