"""The mean image and the principal components of a part of a set, such as 'train[:90%]', and of nothing held out."""

import contextlib
import dataclasses
import functools
import hashlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from common import files
from common.errors import UserError
from datasets import statistics, tfrecords
from datasets.conversion import AHEAD, in_order
from datasets.prepared import Records
from datasets.progress import progress

ROWS = 256  # records that are read at once


def of_part(records: Records, split: str, whole: str) -> Records:
    """The set with the statistics of `split`, which are computed at first use and stored beside the records.

    `prepare` takes those of the whole training split from the pixels before they are encoded. Those of a part come
    from the decoded records. These are the same up to LOSSLESS_UP_TO pixels a side; above, JPEG changes a mean by a
    fraction of a level. Sums are exact, so every process gets the same numbers.

    Args:
      records: the prepared set.
      split: a part of its training split, or a union of splits and parts.
      whole: the split whose statistics `records` has.

    Raises:
      UserError: there is no such split, or a record is damaged.
    """
    numbers = np.sort(records.numbers(split))
    if np.array_equal(numbers, records.numbers(whole)):
        return records
    # The numbers of the records, and not the name of the part, say what the file is about.
    digest = hashlib.blake2b(numbers.astype("<i8"), digest_size=8).hexdigest()
    path = records.directory / f"statistics-{digest}.npz"
    size = records.image_size
    # NumPy raises anything; a missing or damaged file costs a pass over the records, and no more.
    with contextlib.suppress(Exception):
        return dataclasses.replace(records, **statistics.load(path, size))
    sums = statistics.Statistics.empty(size)
    with progress(f"mean of {split}", len(numbers)) as advance:
        decode = functools.partial(_decoded, size=size)
        for found in in_order(decode, _encoded(records, numbers), AHEAD // (3 * size**2)):
            if not found:
                raise records.damaged()
            sums.add(*found)
            advance()
    arrays = sums.arrays()
    files.store_arrays(path, arrays)
    return dataclasses.replace(records, **arrays)


def _encoded(records: Records, numbers: np.ndarray) -> Iterator[bytes]:
    index = tfrecords.Index(records.places.files, records.places.rows[numbers])
    try:
        with index.reader() as reader:
            for start in range(0, len(index), ROWS):
                rows = reader.read(np.arange(start, min(start + ROWS, len(index))))
                yield from tfrecords.parse(rows, records.num_classes)[0].numpy()
    except OSError as error:
        raise UserError(f"The records of {records.directory} cannot be read: {error.strerror}.") from error


def _decoded(record: bytes, size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The pixels and their outer product, or None for a damaged record."""
    try:
        with Image.open(io.BytesIO(record)) as image:
            pixels = np.asarray(image)
    except Exception:  # Pillow's decoders raise anything
        return None
    return (pixels, statistics.outer_product(pixels)) if pixels.shape == (size, size, 3) else None
