"""Random access to TFRecord files: records are read by number.

A record is its length (uint64), a checksum (4 bytes), the data, and a checksum (4 bytes). The lengths alone say where
every record lies, so they are stored beside the files in index.npz, as one int64 array by file name. To find them again
costs one small read a record: minutes for ImageNet on a disk, at every start.
"""

import contextlib
import dataclasses
import os
import pathlib
import secrets
from collections.abc import Sequence

import numpy as np

from datasets import tensorflow

NAME = "index.npz"
HEADER, FRAME = 12, 16  # bytes before the data of a record; bytes around it


@dataclasses.dataclass(frozen=True)
class Index:
    """Where records lie.

    Attributes:
      files: the TFRecord files.
      rows: (N, 3) int64, of each record its file's number, and its data's offset and length in bytes.
    """

    files: tuple[pathlib.Path, ...]
    rows: np.ndarray

    @classmethod
    def open(cls, files: Sequence[pathlib.Path]) -> "Index":
        """Opens the index of all TFRecord files of a folder; makes and stores it if there is none.

        Raises:
          ValueError, OSError or what NumPy raises: the index or a file is damaged, or they do not fit together.
        """
        path = files[0].with_name(NAME)
        if path.exists():
            with path.open("rb") as stored, np.load(stored, allow_pickle=False) as arrays:  # pickles can run code
                lengths = [arrays[file.name] for file in files]
        else:
            lengths = [scan(file) for file in files]
            _store(path, {file.name: array for file, array in zip(files, lengths, strict=True)})
        rows = [np.empty((0, 3), np.int64)]
        for number, (file, array) in enumerate(zip(files, lengths, strict=True)):
            size = file.stat().st_size
            ends = np.cumsum(array + FRAME)
            if (end := ends[-1] if len(ends) else 0) != size:
                raise ValueError(f"{file.name} is {'cut short' if size < end else 'too long'}")
            rows.append(np.stack([np.full_like(ends, number), ends - array + HEADER - FRAME, array], axis=1))
        return cls(tuple(files), np.concatenate(rows))

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


def _store(path: pathlib.Path, lengths: dict[str, np.ndarray]) -> None:
    """Writes the index whole or, in a folder that cannot be written, not at all."""
    partial = path.with_name(f".{NAME}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        try:
            with partial.open("wb") as file:
                np.savez(file, **lengths)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def fingerprint(label, record):
    """A hash of a record and its label that tells damage: tensors, or an int and bytes, to an int64 tensor.

    TFRecords carry a CRC-32C, which neither Python nor an operation of TensorFlow computes. TensorFlow promises that
    this hash will never change.
    """
    tf = tensorflow()
    return tf.strings.to_hash_bucket_fast(tf.strings.join([tf.strings.as_string(label), ":", record]), 1 << 62)
