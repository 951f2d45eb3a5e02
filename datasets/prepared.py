"""A prepared set on disk: every source becomes, once, square images of one size in TFRecords that TFDS can load too.

DATA_DIR/prepared/NAME-SIZE/1.0.0 holds what TFDS writes and

    statistics.npz   of the training split: mean_image (S, S, 3), principal_std (3,), principal_components (3, 3)
    prepared.json    what was prepared, from where, the files left out, and images that two splits share
    index.npz        where each record lies; see `datasets.tfrecords`

A folder gets this name when everything in it is written. Importing this module does not import TensorFlow.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from common.errors import UserError, check_ranges, nearest, shortened, shown
from datasets import locks, overlaps, sources, statistics, tensorflow, tensorflow_datasets, tfrecords
from datasets.conversion import Conversion
from datasets.images import LOSSLESS_UP_TO
from datasets.progress import progress, quiet

VERSION = "1.0.0"
SIZES = (8, 4096)  # pixels a side


def directory(data_dir: str | pathlib.Path, name: str, size: int) -> pathlib.Path:
    """The folder of a prepared set."""
    return pathlib.Path(data_dir) / "prepared" / f"{name}-{size}" / VERSION


# Reading.


@dataclasses.dataclass(frozen=True)
class Records:
    """A prepared set.

    Attributes:
      directory: its folder.
      class_names: by label.
      mean_image: (S, S, 3) float32, RGB in 0–255.
      principal_std: (3,) float32, standard deviations of RGB along the principal components, largest first.
      principal_components: (3, 3) float32, rows of unit length.
      splits: what TFDS knows of the splits, by name.
      places: where the records of all splits lie.
    """

    directory: pathlib.Path
    class_names: tuple[str, ...]
    mean_image: np.ndarray
    principal_std: np.ndarray
    principal_components: np.ndarray
    splits: Any = None
    places: tfrecords.Index | None = None

    @classmethod
    def open(cls, directory: pathlib.Path) -> "Records":
        """Opens the folder that `prepare` returned; raises `UserError` if something in it is damaged."""
        with _damage(directory, directory):
            features = _features(directory)
            (directory / "label.labels.txt").read_text(encoding="utf-8")  # TFDS would make up what it cannot read
            with quiet():
                info = tensorflow_datasets().builder_from_directory(directory).info
            splits, names, size = info.splits, tuple(info.features["label"].names), info.features["image"].shape[0]
            if len(names) != int(features["label"]["classLabel"]["numClasses"]):
                raise ValueError("label.labels.txt does not name its classes")
            files = {}
            for split in splits.values():
                shards = zip(split.filepaths, split.shard_lengths, strict=True)
                files |= {directory / path.name: count for path, count in shards}
            places = tfrecords.Index.open(files)
        with _damage(directory / "statistics.npz", directory):
            arrays = statistics.load(directory / "statistics.npz", size)
        return cls(directory, names, **arrays, splits=splits, places=places)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Side of the records in pixels."""
        return self.mean_image.shape[0]

    def num_examples(self, split: str) -> int:
        """Size of a split: 'train', or a part of one in TFDS's notation, such as 'train[:90%]'."""
        return self._split(split).num_examples

    def numbers(self, split: str) -> np.ndarray:
        """The numbers of a split's records in `places`, in the order of storage."""
        names, files = [file.name for file in self.places.files], self.places.rows[:, 0]
        numbers = []
        for part in self._split(split).file_instructions:
            start = np.searchsorted(files, names.index(pathlib.Path(part.filename).name)) + part.skip
            numbers.append(np.arange(start, start + part.take))
        return np.concatenate(numbers)

    def index(self, split: str) -> tfrecords.Index:
        """Where the records of a split lie; raises `UserError` if there is no such split, or nothing in it."""
        return tfrecords.Index(self.places.files, self.places.rows[self.numbers(split)])

    def _split(self, split: str):
        try:
            found = self.splits[split]
        except (KeyError, ValueError) as error:
            name = split.partition("[")[0]
            reason = str(error) if name in self.splits else nearest(name, self.splits)
            raise UserError(f"{self.directory.parent.name} has no split {split!r}: {reason}") from None
        if not found.num_examples:
            raise UserError(f"The split {split!r} of {self.directory.parent.name} is empty.")
        return found


@dataclasses.dataclass(frozen=True)
class Summary:
    """What prepared.json says.

    Attributes:
      origin: the folder or TFDS name that the images come from.
      train_split: the split whose statistics were taken.
      unreadable: a line for each file that was left out, with the reason.
      overlaps: by (split, training split) that share images, a sentence that warns of it.
    """

    origin: str
    train_split: str
    unreadable: list[str]
    overlaps: dict[tuple[str, str], str]


def summary(directory: pathlib.Path) -> Summary:
    """Reads prepared.json of a prepared set; raises `UserError` if it is missing or damaged."""
    file = directory / "prepared.json"
    with _damage(file, directory):
        found = json.loads(file.read_text(encoding="utf-8"))
        return Summary(
            origin=found["origin"],
            train_split=found["train_split"],
            unreadable=[f"{item['file']}: {item['reason']}" for item in found["unreadable"]],
            # Sets of earlier versions say nothing about overlaps.
            overlaps=overlaps.sentences(found.get("overlap", {}), found.get("overlap_as", {})),
        )


def cure(directory: pathlib.Path) -> str:
    """Ends a sentence about a damaged set."""
    return f"delete {directory.parent} and prepare the data set again."


@contextlib.contextmanager
def _damage(path: pathlib.Path, directory: pathlib.Path) -> Iterator[None]:
    """Turns any reading error into a UserError."""
    try:
        yield
    except Exception as error:  # the readers of JSON, NumPy and TFDS raise anything on damaged files
        text = " ".join(str(error).split())
        reason = f"no {text}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or text
        reason = shortened(reason or type(error).__name__)
        raise UserError(f"{path} cannot be used ({reason}); {cure(directory)}") from error


def _features(directory: pathlib.Path) -> dict[str, Any]:
    """Reads features.json. TFDS would import any module that it names, and so run a stranger's code."""

    def known(item):
        for key in ("type", "pythonClassName", "python_class_name"):
            if not str(item.get(key, "tensorflow_datasets.")).startswith("tensorflow_datasets."):
                raise ValueError(f"a feature is of the class {item[key]}")
        return item

    content = json.loads((directory / "features.json").read_text(encoding="utf-8"), object_hook=known)
    return content["featuresDict"]["features"]


# A config's `dataset` section.


def open_records(dataset: Any, options: Any, warn: bool = True) -> Records:
    """Opens the data set of a config, and prepares it on first use.

    Args:
      dataset: the config's `dataset` section.
      options: its `input` section.
      warn: whether to warn on stderr of images that are in both the training and the evaluation split.

    Raises:
      UserError: there is no such data set or split, or the set is damaged.
    """
    validate(dataset)
    try:
        found = prepare(
            dataset.name,
            data_dir=dataset.data_dir,
            size=options.resize,
            train_split=dataset.train_split.partition("[")[0],
            allow_unreadable=dataset.allow_unreadable,
            max_pixels=dataset.max_pixels,
        )
    except UserError as error:
        fields = (f"dataset.{field}={shown(dataset[field])}" for field in ("name", "data_dir", "train_split"))
        raise UserError(f"{', '.join(fields)}: {error}") from error
    records = Records.open(found)
    for field in ("train_split", "eval_split"):
        try:
            records.num_examples(dataset[field])
        except UserError as error:
            raise UserError(f"dataset.{field}: {error}") from error
    if warn:
        for sentence in overlaps.between(records, summary(found).overlaps, dataset.train_split, dataset.eval_split):
            print(sentence, file=sys.stderr, flush=True)
    return records


def validate(dataset: Any) -> None:
    """Refuses values of a config's `dataset` section that cannot work; raises `UserError`."""
    check_ranges(dataset, {"allow_unreadable": (0, 1 << 40), "max_pixels": (1, 1 << 40)}, "dataset.")
    for field in ("name", "data_dir", "train_split", "eval_split"):
        if not dataset[field].strip() or "\0" in dataset[field]:
            raise UserError(f"dataset.{field}={shown(dataset[field])} is empty, or holds a zero byte.")


# Writing.


def prepare(
    dataset_name: str,
    *,
    data_dir: str,
    manual_dir: str = "",
    size: int = 256,
    train_split: str = "train",
    allow_unreadable: int = 0,
    max_pixels: int = 100_000_000,
) -> pathlib.Path:
    """Prepares a data set, with a progress bar, unless that is done already; returns its folder.

    Args:
      dataset_name: a folder that holds SPLIT/CLASS/*.jpg, or the name of a TFDS builder, such as 'shapes'.
      data_dir: TFDS keeps its sets here; the records go to data_dir/prepared/NAME-SIZE.
      manual_dir: where archives lie that TFDS cannot download.
      size: pixels a side of the records.
      train_split: the split whose statistics are taken.
      allow_unreadable: how many unreadable files may be left out.
      max_pixels: larger images are not decoded, and count as unreadable.

    Raises:
      UserError: there is no such data set, more files than allowed are unreadable, the folder cannot be written, or it
        has records of something else.
    """
    try:
        if dataset_name.startswith("~"):
            dataset_name = str(pathlib.Path(dataset_name).expanduser())
        data_dir, manual_dir = (str(pathlib.Path(path).expanduser()) if path else "" for path in (data_dir, manual_dir))
        data_dir.encode()  # TensorFlow's paths are UTF-8
    except (RuntimeError, UnicodeError) as error:
        raise UserError(f"{dataset_name}, {data_dir}: {error}") from None
    name = sources.prepared_name(dataset_name)
    final = directory(data_dir, name, size)
    if not os.path.isdir(final):  # noqa: PTH112 -- a Path raises where it may not look
        with locks.hold(pathlib.Path(data_dir) / "prepared" / f".{name}.lock"):
            if not final.is_dir():  # another process may have prepared it meanwhile
                source = sources.open_source(dataset_name, data_dir, manual_dir, train_split)
                print(f"Preparing {source.total:,} images of {source.origin} in {final}, once.", flush=True)
                if others := source.passed_over:
                    suffixes = ", ".join(sorted(others))
                    print(f"passed over: {sum(others.values()):,} files with other suffixes ({suffixes})")
                _write(source, final, size, train_split, allow_unreadable, max_pixels)
    found = summary(final)
    if not sources.is_origin(found.origin, dataset_name) or found.train_split != train_split:
        raise UserError(
            f"{final.parent} was prepared from {found.origin} with the mean image of {found.train_split!r}, not from "
            f"{dataset_name} with that of {train_split!r}; delete it, or rename one of the two data sets."
        )
    return final


def _write(
    source: sources.Source, final: pathlib.Path, size: int, train_split: str, allow_unreadable: int, max_pixels: int
) -> None:
    """Writes the records of a source into the folder `final`, whole or not at all; see `prepare`."""
    tf, tfds = tensorflow(), tensorflow_datasets()
    if train_split not in source.counts:
        raise UserError(f"{source.origin} has no split {train_split!r}: {nearest(train_split, source.counts)}")
    partial = final.parent.with_name(f".{final.parent.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # an interrupted preparation leaves one
    features = {
        "image": tfds.features.Image(shape=(size, size, 3), encoding_format="jpeg" if size > LOSSLESS_UP_TO else "png"),
        "label": tfds.features.ClassLabel(names=list(source.class_names)),
        "file_name": tfds.features.Text(),
        "fingerprint": tfds.features.Scalar(np.int64),
    }
    try:
        partial.mkdir(parents=True)
        with progress(final.parent.name.rpartition("-")[0], source.total) as advance:
            conversion = Conversion(source, size, train_split, max_pixels, advance)
            builder = tfds.dataset_builders.AdhocBuilder(
                name="records",  # a folder's name may have characters that TFDS does not take
                version=VERSION,
                description=f"{source.origin} as {size}×{size} images.",
                features=tfds.features.FeaturesDict(features),
                split_datasets={split: conversion.examples(split) for split in source.counts},
                data_dir=partial,
                file_format="tfrecord",
            )
            builder.download_and_prepare()
        if (count := len(conversion.unreadable)) > allow_unreadable:
            raise UserError(
                f"{count} of {source.total} files cannot be read, {allow_unreadable} are allowed; remove them, or use "
                f"--allow_unreadable={count} (--config.dataset.allow_unreadable in main.py):{conversion.listed()}"
            )
        written = pathlib.Path(builder.data_path)
        conversion.statistics.save(written / "statistics.npz")
        overlap, overlap_as = overlaps.find(source, conversion.hashes, train_split)
        content = {
            "origin": source.origin,
            "size": size,
            "train_split": train_split,
            "examples": {split: info.num_examples for split, info in builder.info.splits.items()},
            "unreadable": conversion.unreadable,
            "overlap": overlap,
            "overlap_as": overlap_as,
        }
        (written / "prepared.json").write_text(json.dumps(content, indent=2) + "\n")
        Records.open(written)  # stores the index, and shows that the set can be read
        shutil.rmtree(final.parent, ignore_errors=True)
        written.parent.rename(final.parent)
    except (OSError, tf.errors.OpError) as error:
        raise UserError(f"{final.parents[2]} cannot take the prepared records: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
