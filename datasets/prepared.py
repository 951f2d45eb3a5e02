"""A prepared set on disk: the images of any source as squares of one size, in TFRecords that TFDS can load too.

DATA_DIR/prepared/NAME-SIZE/1.0.0 holds what TFDS writes and

    statistics.npz   of the training split: mean_image (S, S, 3), principal_std (3,), principal_components (3, 3)
    prepared.json    what was prepared, from where, the files left out, and images that two splits share
    index.npz        where each record lies; see `datasets.tfrecords`
    statistics-….npz of a part of the training split, once a run has asked for it; see `datasets.parts`

`datasets.preparing` writes it, and this module reads it. Importing it does not import TensorFlow.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from common.errors import UserError, shortened
from datasets import folders, overlaps, sources, statistics, tensorflow_datasets, tfrecords
from datasets.progress import quiet

VERSION = "1.0.0"
LABELS = "label.labels.txt"  # where TFDS keeps the names of the classes
SIZES = (8, 4096)  # pixels a side


def directory(data_dir: str | pathlib.Path, name: str, size: int) -> pathlib.Path:
    """The folder of a prepared set."""
    return pathlib.Path(data_dir) / "prepared" / f"{name}-{size}" / VERSION


@dataclasses.dataclass(frozen=True)
class Records:
    """A prepared set.

    Attributes:
      directory: its folder; `Path()` for the weights of another program, whose set is not known.
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
        known = summary(directory)
        with _damage(directory, directory):
            features = _features(directory)
            (directory / LABELS).read_text(encoding="utf-8")  # TFDS would make up what it cannot read
            if known.labels and known.labels != checksum(directory / LABELS):
                raise ValueError(f"{LABELS} has changed")
            with quiet():
                info = tensorflow_datasets().builder_from_directory(directory).info
            splits, names, size = info.splits, tuple(info.features["label"].names), info.features["image"].shape[0]
            if len(names) != int(features["label"]["classLabel"]["numClasses"]):
                raise ValueError(f"{LABELS} does not name its classes")
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

    def damaged(self) -> UserError:
        """What to raise for a record that cannot be decoded."""
        return UserError(f"A record of {self.directory} is damaged; {cure(self.directory)}")

    def _split(self, split: str):
        return find_split(self.splits, split, self.directory.parent.name)


def find_split(splits: Any, split: str, origin: str) -> Any:
    """What TFDS knows of a split, or of parts in its notation; `splits` are those of `origin`.

    Raises:
      UserError: there is no such split, the notation is wrong, or nothing is in it.
    """
    sources.check_split(split, [*splits, "all"], origin)  # TFDS takes 'all' for all together
    try:
        found = splits[split]
    except (KeyError, ValueError, NotImplementedError) as error:
        raise UserError(f"{origin} has no split {split!r}: {error}") from None
    if found.num_examples <= 0:  # TFDS counts backwards where a part ends before it begins
        raise UserError(f"The split {split!r} of {origin} is empty.")
    return found


def splits_of(counts: Mapping[str, int]) -> Any:
    """What TFDS will know of splits of so many examples; `find_split` takes it."""
    tfds = tensorflow_datasets()
    return tfds.core.splits.SplitDict(
        [
            tfds.core.splits.SplitInfo(
                name=split,
                shard_lengths=[count],
                num_bytes=0,
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir="", dataset_name="records", split=split, filetype_suffix="tfrecord"
                ),
            )
            for split, count in counts.items()
        ]
    )


@dataclasses.dataclass(frozen=True)
class Summary:
    """What prepared.json says.

    Attributes:
      origin: the folder or TFDS name that the images come from.
      splits: the names of its splits.
      train_split: the split whose statistics were taken.
      labels: the `checksum` of the names of the classes; '' in sets of earlier versions.
      contents: of the folder that it was prepared from; see `folders.contents`. Empty for TFDS sets.
      unreadable: a line for each file that was left out, with the reason.
      overlaps: by (split, training split) that share images, a sentence that warns of it.
      lacking: by split that has no images of some classes, a sentence that warns of it.
    """

    origin: str
    splits: tuple[str, ...]
    train_split: str
    labels: str
    contents: dict[str, str]
    unreadable: list[str]
    overlaps: dict[tuple[str, str], str]
    lacking: dict[str, str]


def summary(directory: pathlib.Path) -> Summary:
    """Reads prepared.json of a prepared set; raises `UserError` if it is missing or damaged."""
    file = directory / "prepared.json"
    with _damage(file, directory):
        found = json.loads(file.read_text(encoding="utf-8"))
        # Sets of earlier versions say nothing about labels, contents and overlaps.
        contents = {folder: str(held) for folder, held in found.get("contents", {}).items()}
        return Summary(
            origin=found["origin"],
            splits=tuple(found["examples"]),
            train_split=found["train_split"],
            labels=found.get("labels", ""),
            contents=contents,
            unreadable=[f"{item['file']}: {item['reason']}" for item in found["unreadable"]],
            overlaps=overlaps.sentences(found.get("overlap", {}), found.get("overlap_as", {})),
            lacking=folders.lacking(contents, found["train_split"]),
        )


def checksum(path: pathlib.Path) -> str:
    """What tells whether a file has changed."""
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


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
