"""ImageNet's archives of 2012, read where they lie.

ILSVRC2012_img_train.tar holds a tar archive of each class, and ILSVRC2012_img_val.tar the validation images. TFDS knows
the labels; it would copy the archives first, which takes 144 GB and hours.
"""

import functools
import io
import pathlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from common.errors import UserError
from datasets import tensorflow_datasets
from datasets.portions import File, Portion, divide
from datasets.progress import printable

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
BYTES_PER_IMAGE = 115_440  # 147,897,477,120 bytes of the training archive hold 1,281,167 images
BLOCK = 512  # bytes; an entry of a tar archive begins with a header of one, and an archive ends with one of zeros


def portions(folder: pathlib.Path, class_names: Sequence[str]) -> list[Portion]:
    """The classes of the training archive, in its order, and the validation images.

    Args:
      folder: where the archives lie.
      class_names: WordNet ids, by label.

    Raises:
      UserError: one of them is damaged, or something else.
    """
    try:
        return [*_train(folder / TRAIN, class_names), *_validation(folder / VALIDATION, class_names)]
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}.") from None


def state(folder: pathlib.Path) -> str:
    """What changes when an archive does; see `portions.Source`."""
    found = [(folder / name).stat() for name in (TRAIN, VALIDATION)]
    return " ".join(f"{archive.st_size} {archive.st_mtime_ns}" for archive in found)


def _train(path: pathlib.Path, class_names: Sequence[str]) -> Iterator[Portion]:
    labels, found = {f"{name}.tar": label for label, name in enumerate(class_names)}, {}
    with path.open("rb") as archive:
        for name, at, size in _entries(archive, 0, path.stat().st_size, str(path)):
            if name not in labels:
                raise UserError(f"{path} holds {printable(name)}, and not an archive of each of ImageNet's classes.")
            found[name] = at, size
    if lacking := [name for name in labels if name not in found]:
        more = f" and {len(lacking) - 1:,} more" * (len(lacking) > 1)
        raise UserError(f"{path} lacks {lacking[0]}{more} of the archives of ImageNet's {len(labels):,} classes.")
    for name, (at, size) in found.items():
        files = functools.partial(_of_class, path, name, labels[name], at, size)
        yield Portion(f"train-{name.removesuffix('.tar')}", "train", max(1, round(size / BYTES_PER_IMAGE)), files)


def _of_class(path: pathlib.Path, name: str, label: int, at: int, size: int) -> Iterator[File]:
    with path.open("rb") as archive:
        for image, begin, length in _entries(archive, at, at + size, f"{name} in {path}"):
            if not re.fullmatch(rf"{name.removesuffix('.tar')}_\d+\.JPEG", image, re.ASCII):
                raise UserError(f"{name} in {path} holds {printable(image)}, which is no image of that class.")
            yield from _files(archive, "train", [(image, begin, length, label)])


def _validation(path: pathlib.Path, class_names: Sequence[str]) -> list[Portion]:
    known = tensorflow_datasets().core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    labels = {name: label for label, name in enumerate(class_names)}
    entries = []
    with path.open("rb") as archive:
        for name, at, size in _entries(archive, 0, path.stat().st_size, str(path)):
            match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name, re.ASCII)
            if not match or not 1 <= int(match[1]) <= len(known):
                raise UserError(f"{path} holds {printable(name)}, which is no validation image of ImageNet.")
            entries.append((name, at, size, labels[known[int(match[1]) - 1]]))
    if not entries:
        raise UserError(f"{path} is empty.")
    return divide(
        "validation", len(entries), lambda start, stop: functools.partial(_of_validation, path, entries[start:stop])
    )


def _of_validation(path: pathlib.Path, entries: Sequence[tuple[str, int, int, int]]) -> Iterator[File]:
    with path.open("rb") as archive:
        yield from _files(archive, "validation", entries)


def _files(archive: BinaryIO, split: str, entries: Iterator[tuple[str, int, int, int]]) -> Iterator[File]:
    for name, at, size, label in entries:
        archive.seek(at)
        yield File(f"{split}/{name}", label, functools.partial(io.BytesIO, archive.read(size)))


def _entries(archive: BinaryIO, at: int, end: int, name: str) -> Iterator[tuple[str, int, int]]:
    """The name, place and size in bytes of each file in the archive that lies between the bytes `at` and `end`.

    Python's reader takes a damaged header for the end of an archive, and would leave the rest out without a word.

    Raises:
      UserError: it is damaged, cut short, or no tar archive; `name` says which one.
    """
    while True:
        archive.seek(at)
        header = archive.read(min(BLOCK, max(0, end - at)))
        if header == bytes(BLOCK):
            return
        if len(header) < BLOCK:
            raise UserError(f"{name} is cut short: it has no end.")
        try:
            entry = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise UserError(f"{name} is damaged, or no tar archive ({error} at byte {at:,}).") from None
        if entry.isreg():
            yield entry.name, at + BLOCK, entry.size
        at += BLOCK + -(-entry.size // BLOCK) * BLOCK
