"""Conversion: the files of a source become examples with square images, in threads and in order."""

import array
import collections
import concurrent.futures
import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from common import host
from common.errors import UserError
from datasets import tfrecords
from datasets.images import Budget, Unreadable, to_record
from datasets.progress import printable
from datasets.sources import File, Source
from datasets.statistics import Statistics, outer_product

BYTES_PER_PIXEL = 8  # of the largest file: uncompressed 16-bit RGBA
AHEAD = 1 << 28  # bytes of finished records that may wait to be written


class Conversion:
    """Converts the files of a source, split by split.

    On any number of cores, files in memory take up to BYTES_PER_PIXEL · max_pixels bytes, decoding takes about
    16 · max_pixels, and finished records about AHEAD.

    Args:
      source: where the files come from.
      size: pixels a side of the records.
      train_split: the split whose statistics are taken.
      max_pixels: larger images are not decoded, and count as unreadable.
      advance: called after each file.

    Attributes:
      statistics: of the training split so far.
      unreadable: {'file': …, 'reason': …} of each file without a usable image.
      hashes: a hash of the pixels of each file, by split; 0 for an unreadable file.
    """

    def __init__(self, source: Source, size: int, train_split: str, max_pixels: int, advance: Callable[[], None]):
        self._source, self._train_split, self._advance = source, train_split, advance
        self._ahead = AHEAD // (3 * size**2)
        reading, decoding = Budget(most_bytes(max_pixels)), Budget(max_pixels)
        self._convert = functools.partial(
            _convert, size=size, max_pixels=max_pixels, reading=reading, decoding=decoding
        )
        self.statistics = Statistics.empty(size)
        self.unreadable: list[dict[str, str]] = []
        self.hashes = {split: array.array("Q") for split in source.counts}

    def examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the key and the features of each example, as TFDS takes them.

        Raises:
          UserError: a label is out of range, or no file of the split is readable.
        """
        classes = len(self._source.class_names)
        for number, made in enumerate(in_order(self._convert, self._source.files(split), self._ahead)):
            self._advance()
            self.hashes[split].append(made.hash)
            if made.reason:
                self.unreadable.append({"file": printable(made.file.name), "reason": made.reason})
                continue
            if not 0 <= made.file.label < classes:
                name = f"{printable(made.file.name)} of {self._source.origin}"
                raise UserError(f"{name} has the label {made.file.label}; it should be one of 0 … {classes - 1}.")
            if split == self._train_split:
                self.statistics.add(made.pixels, made.outer)
            yield number, made.example
        if not any(self.hashes[split]):
            raise UserError(f"No file of the split {split!r} can be read:{self.listed()}")

    def listed(self) -> str:
        """A line for each unreadable file."""
        return "".join(f"\n  {item['file']}: {item['reason']}" for item in self.unreadable)


class _Made(NamedTuple):
    """What became of a file: an example with its pixels, their outer product and hash, or the reason why not."""

    file: File
    example: dict[str, Any] | None = None
    pixels: np.ndarray | None = None
    outer: np.ndarray | None = None
    hash: int = 0
    reason: str = ""


def most_bytes(max_pixels: int) -> int:
    """The longest file in which an image of so many pixels is looked for."""
    return BYTES_PER_PIXEL * max_pixels + (1 << 20)


def _convert(file: File, size: int, max_pixels: int, reading: Budget, decoding: Budget) -> _Made:
    try:
        with file.open() as stream:
            length = stream.seek(0, os.SEEK_END)
            if length > most_bytes(max_pixels):
                raise Unreadable(f"it has {length:,} bytes, more than an image of {max_pixels:,} pixels needs")
            with reading.hold(length):
                stream.seek(0)
                record, pixels = to_record(stream.read(length), size, max_pixels, decoding)
    except (Unreadable, OSError) as error:
        return _Made(file, reason=getattr(error, "strerror", None) or str(error))
    example = {
        "image": io.BytesIO(record),
        "label": file.label,
        "file_name": os.fsencode(file.name),
        "fingerprint": int(tfrecords.fingerprint(file.label, record)),
    }
    digest = hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=8).digest()
    return _Made(file, example, pixels, outer_product(pixels), hash=int.from_bytes(digest, "little"))


def in_order(function: Callable, items: Iterable, ahead: int) -> Iterator:
    """Maps in threads, at most `ahead` results in advance. Pillow decodes without holding the interpreter's lock."""
    workers = host.cores()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        under_way = collections.deque()
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) > min(4 * workers, ahead):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
