"""Random access to TFRecord files: records are read by number.

A record is its length (uint64), a checksum (4 bytes), the data, and a checksum (4 bytes). The lengths alone say where
every record lies, so they are stored beside the files in index.npz, as one int64 array by file name. Reading them from
the files instead costs one small read a record, at every start: minutes for ImageNet if the files are not cached.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from common import files
from datasets import tensorflow

NAME = "index.npz"
HEADER, FRAME = 12, 16  # bytes before the data of a record; bytes around it


@dataclasses.dataclass(frozen=True)
class Index:
    """Where records lie.

    Attributes:
      files: the TFRecord files.
      rows: (N, 3) int64; for each record the number of its file, and the offset and length of its data in bytes.
    """

    files: tuple[pathlib.Path, ...]
    rows: np.ndarray

    @classmethod
    def open(cls, counts: Mapping[pathlib.Path, int]) -> "Index":
        """Opens the index of all TFRecord files of a folder; makes and stores it if there is none that fits them.

        Args:
          counts: the number of records of each file.

        Raises:
          ValueError, OSError: a file is damaged, or has another number of records.
        """
        stored = next(iter(counts)).with_name(NAME)
        try:
            with stored.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:  # pickles can run code
                return cls(tuple(counts), _rows(counts, {file: arrays[file.name] for file in counts}))
        except Exception:  # NumPy raises anything; a missing or damaged index costs a scan, and no more
            lengths = {file: scan(file) for file in counts}
        rows = _rows(counts, lengths)
        files.store_arrays(stored, {file.name: array for file, array in lengths.items()})
        return cls(tuple(counts), rows)

    def __len__(self) -> int:
        return len(self.rows)

    def reader(self) -> "Reader":
        """Opens the files."""
        return Reader(self)


class Reader:
    """Reads records by number; use as a context."""

    def __init__(self, index: Index):
        self._rows = index.rows
        self._files = {n: os.open(index.files[n], os.O_RDONLY) for n in np.unique(index.rows[:, 0]).tolist()}

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """The serialised examples of these numbers, as an array of bytes objects."""
        # Plain ints, because unpacking a row of NumPy integers costs more than os.pread.
        found = [os.pread(self._files[file], size, at) for file, at, size in self._rows[numbers].tolist()]
        return np.array(found, dtype=object)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in self._files.values():
            os.close(file)


def _rows(counts: Mapping[pathlib.Path, int], lengths: Mapping[pathlib.Path, np.ndarray]) -> np.ndarray:
    """`Index.rows` for the lengths of the records of each file; raises `ValueError` if they do not fit the files."""
    rows = []
    for number, (file, array) in enumerate(lengths.items()):
        if array.shape != (counts[file],) or array.dtype != np.int64 or array.min(initial=0) < 0:
            raise ValueError(f"{file.name} has {len(array):,} records, not {counts[file]:,}")
        ends, size = np.cumsum(array + FRAME), file.stat().st_size
        if (end := ends[-1] if len(ends) else 0) != size:
            raise ValueError(f"{file.name} is {'cut short' if size < end else 'too long'}")
        rows.append(np.stack([np.full_like(ends, number), ends - array + HEADER - FRAME, array], axis=1))
    return np.concatenate(rows)


def scan(file: pathlib.Path) -> np.ndarray:
    """The lengths of the records of a file, (N,) int64, from their headers; raises `ValueError` if it is cut short."""
    lengths, at, end = [], 0, file.stat().st_size
    with file.open("rb", buffering=0) as data:
        while at < end:
            lengths.append(int.from_bytes(os.pread(data.fileno(), 8, at), "little"))
            at += lengths[-1] + FRAME
    if at != end:
        raise ValueError(f"{file.name} is cut short")
    return np.array(lengths, np.int64)


def fingerprint(label, record):
    """A hash of each record and its label that tells damage: (N,) integers and strings to an (N,) int64 tensor.

    TFRecords carry a CRC-32C, which neither Python nor an operation of TensorFlow computes. TensorFlow promises that
    this hash will never change.
    """
    tf = tensorflow()
    return tf.strings.to_hash_bucket_fast(tf.strings.join([tf.strings.as_string(label), ":", record]), 1 << 62)


def serialize(images: Sequence[bytes], labels: Sequence[int], file_names: Sequence[bytes]) -> Iterator[bytes]:
    """The serialised examples of encoded images, as `parse` and TFDS read them."""
    train = tensorflow().train
    hashes = fingerprint(np.array(labels), np.array(images, object)).numpy().tolist()
    for image, label, file_name, hashed in zip(images, labels, file_names, hashes, strict=True):
        texts = {"image": image, "file_name": file_name}
        numbers = {"label": label, "fingerprint": hashed}
        features = {key: train.Feature(bytes_list=train.BytesList(value=[value])) for key, value in texts.items()}
        features |= {key: train.Feature(int64_list=train.Int64List(value=[value])) for key, value in numbers.items()}
        yield train.Example(features=train.Features(feature=features)).SerializeToString(deterministic=True)


def parse(serialized, num_classes: int):
    """Encoded images and labels of serialised examples: (N,) strings to (N,) strings and (N,) int32 tensors.

    The image of a damaged example is empty, which cannot be decoded.
    """
    tf = tensorflow()
    number = functools.partial(tf.io.FixedLenFeature, [], tf.int64)
    # Sets of earlier versions have no fingerprints.
    features = {"image": tf.io.FixedLenFeature([], tf.string), "label": number(), "fingerprint": number(-1)}
    example = tf.io.parse_example(serialized, features)
    image, label, expected = example["image"], example["label"], example["fingerprint"]
    sound = (expected < 0) | (expected == fingerprint(label, image))
    sound &= (label >= 0) & (label < num_classes)
    return tf.where(sound, image, ""), tf.cast(label, tf.int32)
