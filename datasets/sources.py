"""Where images come from: a folder of photographs, ImageNet's archives, or a TFDS builder, such as `datasets.shapes`.

A source yields encoded image files as they are; `datasets.conversion` makes records of them.
"""

import functools
import io
import os
import pathlib
import re
import socket
import tarfile
import urllib.parse
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO

from common.errors import UserError, nearest, shortened, shown
from common.files import is_full
from datasets import archives, folders, tensorflow, tensorflow_datasets
from datasets.portions import File, Source, divide
from datasets.progress import printable, progress, quiet

IMAGENET = "imagenet2012"  # TFDS cannot download its archives; they are read without TFDS
FILES_PER_PROCESS = 512  # see `portions.Source`
TFDS_FILES_PER_PROCESS = 8192  # of a TFDS set: each process takes seconds to import TensorFlow


def is_folder(name: str) -> bool:
    """Whether a data set's name means a folder, existing or not, instead of a TFDS builder."""
    if name.startswith((".", "/", "~")) or os.path.isdir(name):  # noqa: PTH112 -- a Path raises on too long a name
        return True
    # What has a slash is a path, or a TFDS builder with its config, such as imagenette/320px-v2.
    return "/" in name and name.partition("/")[0] not in _tfds_names()


def prepared_name(name: str) -> str:
    """The name of the prepared set: a folder's last part, or the builder's name."""
    found = printable(pathlib.Path(name).resolve().name if is_folder(name) else re.sub("[/:]", "-", name))
    if len(found.encode()) > 200:  # a file system takes 255 bytes
        raise UserError(f"{shown(name)} is too long a name for a data set.")
    return found


def split_names(split: str) -> list[str]:
    """The splits that are in `split`, in TFDS's notation: ['train', 'test'] for 'train[:90%]+test'."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def check_split(split: str, known: Collection[str], origin: str) -> None:
    """Refuses what takes parts of splits that are not `known`, the splits of `origin`; raises `UserError`."""
    for name in split_names(split):
        if name not in known:
            raise UserError(f"{origin} has no split {name!r}: {nearest(name, known)}")


def is_origin(origin: str, name: str) -> bool:
    """Whether a prepared set of this `Source.origin` was made from the data set `name`. A folder may be gone by now."""
    if str(origin).startswith("TFDS "):
        return not is_folder(name) and origin.startswith(f"TFDS {re.split('[/:]', name)[0]}/")
    if not is_folder(name) and re.split("[/:]", name)[0] in _tfds_names():
        return False
    return origin == printable(str(pathlib.Path(name).resolve()))


def changes(name: str, before: Mapping[str, str]) -> str:
    """Says how the contents of a folder differ from those `before`; '' if they do not, are gone, or are not known."""
    try:
        now = folders.contents(pathlib.Path(name)) if before and is_folder(name) else {}
    except OSError:  # a set can be used when its photographs are gone
        now = {}
    return folders.changes(before, now) if now else ""


def open_source(name: str, data_dir: str, manual_dir: str = "", train_split: str = "train") -> Source:
    """Opens a source by name.

    Args:
      name: a folder ROOT that holds ROOT/SPLIT/CLASS/*.jpg, or the name of a TFDS builder.
      data_dir: where TFDS keeps its data sets.
      manual_dir: where archives lie that TFDS cannot download, such as ILSVRC2012_img_train.tar.
      train_split: the split whose class folders number the classes.

    Raises:
      UserError: there is nothing of this name, or it holds no labelled images.
    """
    if is_folder(name):
        try:
            return _folder(pathlib.Path(name), train_split)
        except OSError as error:
            raise UserError(f"{printable(str(error.filename or name))} cannot be listed: {error.strerror}.") from None
        except UserError as error:  # it may quote the names of files
            raise UserError(printable(str(error))) from None
    return _tfds(name, data_dir, manual_dir)


def open_file(file: pathlib.Path) -> BinaryIO:
    """Opens a regular file for reading; raises `OSError` for anything else."""
    if file.exists() and not file.is_file():  # opening a pipe would wait forever
        raise OSError("it is not a regular file")
    return file.open("rb")


def _folder(root: pathlib.Path, train_split: str) -> Source:
    found = folders.listing(root, train_split)
    portions = []
    for split, names in found.files.items():
        portions += divide(split, len(names), lambda a, b, names=names: functools.partial(_files, root, names[a:b]))
    origin = printable(str(root.resolve()))
    return Source(origin, found.class_names, tuple(portions), FILES_PER_PROCESS, found.contents, found.passed_over)


def _files(root: pathlib.Path, names: list[tuple[str, int]]) -> Iterator[File]:
    for name, label in names:
        yield File(name, label, functools.partial(open_file, root / name))


@quiet()
def _tfds(name: str, data_dir: str, manual_dir: str) -> Source:
    tf, tfds = tensorflow(), tensorflow_datasets()
    directory = pathlib.Path(data_dir).resolve()
    if (base := re.split("[/:]", name)[0]) not in _tfds_names():
        raise UserError(f"{name!r} is neither a folder here nor a TFDS data set: {_few(nearest(name, _tfds_names()))}")
    try:
        builder = tfds.builder(name, data_dir=directory)
    except ImportError as error:
        raise UserError(f"TFDS cannot open {name}: {error}") from None
    except Exception as error:
        if name == base or not isinstance(error, tfds.core.DatasetNotFoundError | AssertionError | ValueError):
            raise _damaged(name, directory / base, error) from error
        configs = [f"{base}/{config}" for config in tfds.builder_cls(base).builder_configs]
        raise UserError(f"TFDS has {base}, but not as {name!r}: {_few(nearest(name, [base, *configs]))}") from None
    features = builder.info.features
    kinds = {key: type(feature).__name__ for key, feature in features.items()}
    if (kinds.get("image"), kinds.get("label")) != ("Image", "ClassLabel"):
        has = ", ".join(f"{key} ({kind})" for key, kind in kinds.items())
        raise UserError(f"The TFDS data set {name} has no image (Image) with a label (ClassLabel): it has {has}.")
    try:
        if not builder.is_prepared():
            manual = pathlib.Path(manual_dir or directory / "downloads" / "manual").expanduser()
            if base == IMAGENET:
                return _archives(builder, manual)
            _check_at_hand(builder, directory / "downloads")
            config = tfds.download.DownloadConfig(manual_dir=manual if manual_dir else None, try_download_gcs=False)
            print(f"TFDS prepares {name} in {builder.data_path}, once.", flush=True)
            with progress(f"TFDS: {name}"):
                builder.download_and_prepare(download_config=config, file_format=None)
    except Exception as error:  # TFDS wraps some of what TensorFlow raises
        if is_full(error):
            raise UserError(f"TFDS could not get {name} ready in {directory}: its disk is full.") from error
        if isinstance(
            error, AssertionError | OSError | tarfile.TarError | tf.errors.OpError | tfds.core.download.DownloadError
        ):
            raise UserError(f"TFDS could not get {name} ready: {' '.join(str(error).split())}") from error
        raise

    portions = []
    for split, info in builder.info.splits.items():
        # Contests publish test images without labels, which TFDS sets to −1. Nothing can be measured on those.
        count = info.num_examples
        if count and next(_examples(name, builder, split, 0, 1)).label >= 0:
            portions += divide(
                split, count, lambda a, b, split=split: functools.partial(_examples, name, builder, split, a, b)
            )
    names = tuple(features["label"].names)
    return Source(f"TFDS {builder.info.full_name}", names, tuple(portions), TFDS_FILES_PER_PROCESS)


def _examples(name: str, builder: Any, split: str, start: int, stop: int) -> Iterator[File]:
    """The examples start … stop − 1 of a split of a TFDS builder, in the order of storage."""
    tfds = tensorflow_datasets()
    try:
        features = builder.info.features
        key = next((key for key in ("file_name", "filename", "image/filename", "id") if key in features), None)
        examples = builder.as_dataset(
            split=f"{split}[{start}:{stop}]",
            decoders={"image": tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(interleave_cycle_length=1),
        )
        for number, example in enumerate(examples.as_numpy_iterator(), start):
            identity = example[key] if key else f"{split}-{number}"
            identity = identity.decode(errors="replace") if isinstance(identity, bytes) else str(identity)
            yield File(f"{split}/{identity}", int(example["label"]), functools.partial(io.BytesIO, example["image"]))
    except Exception as error:
        raise _damaged(name, builder.data_path, error) from error


def _damaged(name: str, folder: pathlib.Path, error: Exception) -> UserError:
    """What to raise for a TFDS set that was prepared and cannot be read: TFDS raises anything on damaged files."""
    reason = shortened(" ".join(str(error).split()) or type(error).__name__)
    return UserError(f"TFDS cannot read {name} in {folder} ({reason}); delete that folder, and TFDS prepares it again.")


def _archives(builder: Any, folder: pathlib.Path) -> Source:
    if missing := [name for name in (archives.TRAIN, archives.VALIDATION) if not (folder / name).is_file()]:
        raise UserError(
            f"{builder.name} needs {' and '.join(missing)} in {folder}; get them from {builder.info.homepage}, or name "
            f"their folder with --manual_dir of python -m tools.prepare."
        )
    names = tuple(builder.info.features["label"].names)
    found = archives.portions(folder, names)
    state = archives.state(folder)
    return Source(f"TFDS {builder.info.full_name}", names, tuple(found), FILES_PER_PROCESS, state=state, estimated=True)


def _check_at_hand(builder: Any, downloads: pathlib.Path) -> None:
    """Refuses at once what TFDS would find out late: there is no network."""
    downloaded = any(file.is_file() for file in downloads.glob("*"))
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS or downloaded or urllib.request.getproxies():
        return
    for url in builder.url_infos or ():
        host = urllib.parse.urlsplit(url).hostname
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            raise UserError(f"{builder.name} cannot be downloaded, {host} is not found: {error.strerror}.") from None


def _tfds_names() -> list[str]:
    return tensorflow_datasets().list_builders(with_community_datasets=False)


def _few(sentence: str) -> str:
    return sentence if len(sentence) < 200 else "https://www.tensorflow.org/datasets/catalog lists them."
