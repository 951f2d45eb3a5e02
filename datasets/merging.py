"""Merging: the examples of all portions become the shuffled shards of a set that TFDS can load.

The examples of a split are in the order in which TFDS's own writer puts them, and divided into as many shards.
"""

import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from common import files
from datasets import tensorflow, tensorflow_datasets, tfrecords
from datasets.conversion import Converted, in_order
from datasets.images import LOSSLESS_UP_TO

NAME = "records"  # a folder's name may have characters that TFDS does not take
SHARD = 1 << 26  # bytes, at least
MOST_SHARDS = 512  # all are open while they are read, and many systems allow 1,024 files
EXAMPLE = 150  # bytes of an example beside its image, about
AT_ONCE = 256  # images that are read and hashed together


def merge(
    converted: Mapping[str, Sequence[Converted]],
    directory: pathlib.Path,
    *,
    class_names: Sequence[str],
    size: int,
    description: str,
) -> None:
    """Writes the records of all splits with their index, and what TFDS needs to load them.

    Args:
      converted: the portions of each split, in order.
      directory: takes the set; named after the version.
      class_names: by label.
      size: pixels a side of the records.
      description: of the set.

    Raises:
      OSError: a file fails.
    """
    tfds = tensorflow_datasets()
    infos, lengths = [], {}
    for split, portions in converted.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name=NAME, split=split, filetype_suffix="tfrecord"
        )
        rows, names = _rows(portions), [name for portion in portions for name in portion.names]
        order = _order(split, portions)
        count = _shards(rows)
        bounds = [round(len(order) * shard / count) for shard in range(count + 1)]
        paths = [pathlib.Path(template.sharded_filepath(shard_index=i, num_shards=count)) for i in range(count)]
        shards = [(path, order[a:b]) for path, (a, b) in zip(paths, itertools.pairwise(bounds), strict=True)]
        sources = [portion.path for portion in portions]
        write = functools.partial(_write_shard, sources=sources, rows=rows, names=names)
        for (path, _), found in zip(shards, in_order(write, shards, len(shards)), strict=True):
            lengths[path.name] = found
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(lengths[path.name]) for path in paths],
                num_bytes=int(sum(lengths[path.name].sum() for path in paths)),
                filename_template=template,
            )
        )
    files.store_arrays(directory / tfrecords.NAME, lengths)
    features = {
        "image": tfds.features.Image(shape=(size, size, 3), encoding_format="jpeg" if size > LOSSLESS_UP_TO else "png"),
        "label": tfds.features.ClassLabel(names=list(class_names)),
        "file_name": tfds.features.Text(),
        "fingerprint": tfds.features.Scalar(np.int64),
    }
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=tfds.features.FeaturesDict(features),
        split_infos=infos,
        description=description,
        check_data=False,
    )


def _order(split: str, portions: Sequence[Converted]) -> list[int]:
    """The order of a split's examples. TFDS sorts them by the MD5 of the split's name and their key.

    The key is the place of the file in the split, so a file without an image leaves a gap.
    """
    starts = itertools.accumulate((len(portion.hashes) for portion in portions), initial=0)
    keys = np.concatenate([start + portion.places for start, portion in zip(starts, portions, strict=False)]).tolist()
    salted, digests = hashlib.md5(split.encode()), []
    for key in keys:
        digest = salted.copy()
        digest.update(b"%d" % key)
        digests.append(digest.digest())
    return sorted(range(len(keys)), key=digests.__getitem__)


def _rows(portions: Sequence[Converted]) -> np.ndarray:
    """For each image the number of its portion, its offset and length there in bytes, and its label: (N, 4) int64."""
    rows = []
    for number, portion in enumerate(portions):
        offsets = np.cumsum(portion.lengths) - portion.lengths
        rows.append(np.stack([np.full_like(offsets, number), offsets, portion.lengths, portion.labels], axis=1))
    return np.concatenate(rows)


def _shards(rows: np.ndarray) -> int:
    """The number of shards: a power of two, as in TFDS."""
    most = min(MOST_SHARDS, len(rows), (int(rows[:, 2].sum()) + len(rows) * EXAMPLE) // SHARD)
    return 1 << max(0, most.bit_length() - 1)


def _write_shard(
    shard: tuple[pathlib.Path, Sequence[int]],
    sources: Sequence[pathlib.Path],
    rows: np.ndarray,
    names: Sequence[str],
) -> np.ndarray:
    """Writes a TFRecord file.

    Args:
      shard: the file, and the numbers of its images.
      sources: the file of each portion.
      rows: see `_rows`.
      names: of the files that the images come from.

    Returns:
      The length of each record.
    """
    path, numbers = shard
    lengths = []
    with tensorflow().io.TFRecordWriter(str(path)) as writer:
        for start in range(0, len(numbers), AT_ONCE):
            chosen = numbers[start : start + AT_ONCE]
            images, labels = [], []
            for source, at, length, label in rows[chosen].tolist():
                # Opened each time: a process may not have as many open files as ImageNet has classes.
                with sources[source].open("rb", buffering=0) as file:
                    images.append(os.pread(file.fileno(), length, at))
                labels.append(label)
            for example in tfrecords.serialize(images, labels, [os.fsencode(names[number]) for number in chosen]):
                writer.write(example)
                lengths.append(len(example))
    return np.array(lengths, np.int64)
