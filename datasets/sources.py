"""Where images come from: a folder of photographs, a TFDS data set, or a set generated here.

A source yields files as they are, encoded; `datasets.records` makes records of them.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

from errors import UserError, nearest

# Other files in a class folder (Thumbs.db, .DS_Store, notes) are not images and are left alone.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclasses.dataclass(frozen=True)
class File:
    """One image of a source: its name, its label, and a function that reads its bytes."""

    name: str
    label: int
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class Source:
    """Images to prepare.

    Attributes:
      origin: what the images come from, as a person and `prepared.json` name it.
      class_names: by label.
      counts: number of files by split.
      files: yields the files of a split, always in the same order.
    """

    origin: str
    class_names: tuple[str, ...]
    counts: dict[str, int]
    files: Callable[[str], Iterator[File]]


def is_folder(name: str) -> bool:
    """Whether a data set's name is a folder, and not the name of a TFDS or generated set."""
    return "/" in name or "\\" in name or pathlib.Path(name).is_dir()


def prepared_name(name: str) -> str:
    """The name under which a set is prepared: a folder's last part, or the name of the set."""
    return pathlib.Path(name).resolve().name if is_folder(name) else name.replace("/", "-").replace(":", "-")


def open_source(name: str, data_dir: str, manual_dir: str = "", train_split: str = "train") -> Source:
    """Opens a source by name.

    Args:
      name: a folder ROOT that holds ROOT/SPLIT/CLASS/*.jpg, a TFDS name, or 'shapes'.
      data_dir: where TFDS keeps and finds its data sets.
      manual_dir: where archives lie that TFDS cannot download, such as ILSVRC2012_img_train.tar.
      train_split: the split whose class folders number the classes.

    Raises:
      UserError: nothing of this name, or nothing in it.
    """
    if is_folder(name):
        return _folder(pathlib.Path(name), train_split)
    return _tfds(name, data_dir, manual_dir)


def _folder(root: pathlib.Path, train_split: str) -> Source:
    if not root.is_dir():
        raise UserError(f"The data folder {root} does not exist; it should hold SPLIT/CLASS/*.jpg.")
    classes = {
        split.name: sorted(folder.name for folder in split.iterdir() if folder.is_dir())
        for split in sorted(root.iterdir())
        if split.is_dir() and not split.name.startswith(".")
    }
    classes = {split: names for split, names in classes.items() if names}
    if not classes:
        raise UserError(f"The data folder {root} holds no SPLIT/CLASS folders; it should hold SPLIT/CLASS/*.jpg.")
    if train_split not in classes:
        raise UserError(f"{root} has no split {train_split!r}: {nearest(train_split, classes)}")
    names = classes[train_split]
    for split, others in classes.items():
        if strangers := sorted(set(others) - set(names)):
            raise UserError(f"{root / split / strangers[0]} is a class that {root / train_split} does not have.")

    def list_files(split):
        found = []
        for label, name in enumerate(names):
            folder = root / split / name
            if folder.is_dir():
                files = (
                    f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")
                )
                found += [File(str(file.relative_to(root)), label, file.read_bytes) for file in sorted(files)]
        return found

    listed = {split: list_files(split) for split in classes}
    for split, files in listed.items():
        if not files:
            raise UserError(f"{root / split} holds no image files ({' '.join(IMAGE_SUFFIXES)}).")
    return Source(str(root.resolve()), tuple(names), {s: len(f) for s, f in listed.items()}, lambda s: iter(listed[s]))


def _tfds(name: str, data_dir: str, manual_dir: str) -> Source:
    import tensorflow_datasets as tfds

    from datasets.shapes import Shapes

    directory = pathlib.Path(data_dir).resolve()
    try:
        builder = Shapes(data_dir=directory) if name == Shapes.name else tfds.builder(name, data_dir=directory)
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError):
        known = [Shapes.name, *tfds.list_builders(with_community_datasets=False)]
        raise UserError(
            f"{name!r} is neither a folder here nor a TFDS data set: {_few(nearest(name, known))}"
        ) from None
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise UserError(f"The TFDS data set {name} is not for image classification: it has {', '.join(features)}.")
    config = tfds.download.DownloadConfig(manual_dir=manual_dir or None)
    try:
        builder.download_and_prepare(download_config=config, file_format=None)
    except (AssertionError, OSError, tfds.core.download.DownloadError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"TFDS could not get {name} ready: {reason}") from error

    def files(split):
        examples = builder.as_dataset(split=split, decoders={"image": tfds.decode.SkipDecoding()}, shuffle_files=False)
        key = next((key for key in ("file_name", "filename", "image/filename", "id") if key in features), None)
        for number, example in enumerate(examples.as_numpy_iterator()):
            identity = example[key] if key else f"{split}-{number}"
            identity = identity.decode(errors="replace") if isinstance(identity, bytes) else str(identity)
            data = example["image"]
            yield File(f"{split}/{identity}", int(example["label"]), lambda data=data: data)

    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    # Contests publish test images without labels, as −1; nothing can be measured on those.
    labelled = {split: count for split, count in counts.items() if count and next(files(split)).label >= 0}
    return Source(f"TFDS {builder.info.full_name}", tuple(features["label"].names), labelled, files)


def _few(sentence: str) -> str:
    return sentence if len(sentence) < 200 else "https://www.tensorflow.org/datasets/catalog lists them."
