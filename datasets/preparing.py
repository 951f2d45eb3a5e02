"""Preparing: every source becomes, once, a prepared set. Its folder gets its name when everything in it is written."""

import json
import os
import pathlib
import shlex
import shutil
from collections.abc import Callable

import numpy as np

from common import files
from common.errors import UserError, require
from datasets import locks, overlaps, sources, tensorflow, tensorflow_datasets
from datasets.conversion import Conversion
from datasets.images import LOSSLESS_UP_TO
from datasets.prepared import LABELS, VERSION, Records, Summary, checksum, directory, summary
from datasets.progress import progress


def prepare(
    dataset_name: str,
    *,
    data_dir: str,
    manual_dir: str = "",
    size: int = 256,
    train_split: str = "train",
    allow_unreadable: int = 0,
    max_pixels: int = 100_000_000,
    again: bool = False,
    check: Callable[[sources.Source], None] = lambda source: None,
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
      again: prepare though it is done already; the new set takes the place of the old one when it is complete.
      check: called with the source before anything is converted; it may raise `UserError`.

    Raises:
      UserError: there is no such data set, more files than allowed are unreadable, the folder cannot be written, it has
        records of something else, or the photographs have changed since.
    """
    require(data_dir, "The folder for the prepared set has no name: --data_dir= is empty.")
    try:
        if dataset_name.startswith("~"):
            dataset_name = str(pathlib.Path(dataset_name).expanduser())
        data_dir, manual_dir = (str(pathlib.Path(path).expanduser()) if path else "" for path in (data_dir, manual_dir))
        data_dir.encode()  # TensorFlow's paths are UTF-8
    except (RuntimeError, UnicodeError) as error:
        raise UserError(f"{dataset_name}, {data_dir}: {error}") from None
    name = sources.prepared_name(dataset_name)
    final = directory(data_dir, name, size)
    if again or not os.path.isdir(final):  # noqa: PTH112 -- a Path raises where it may not look
        with locks.hold(pathlib.Path(data_dir) / "prepared" / f".{name}.lock"):
            if not final.is_dir() and _partial(final, "old").is_dir():  # a kill between the two renames of `_write`
                _partial(final, "old").rename(final.parent)
            if again and final.is_dir():
                _check_origin(summary(final), final, dataset_name)
                _check_unread(final)
            if again or not final.is_dir():  # another process may have prepared it meanwhile
                source = sources.open_source(dataset_name, data_dir, manual_dir, train_split)
                sources.check_split(train_split, source.counts, source.origin)
                check(source)
                print(f"Preparing {source.total:,} images of {source.origin} in {final}, once.", flush=True)
                if others := source.passed_over:
                    suffixes = ", ".join(sorted(others))
                    print(f"passed over: {sum(others.values()):,} files with other suffixes ({suffixes})")
                _write(source, final, size, train_split, allow_unreadable, max_pixels)
                return final
    found = summary(final)
    _check_origin(found, final, dataset_name)
    flags = dict(dataset=dataset_name, data_dir=data_dir, size=size, train_split=train_split)
    command = shlex.join(["python", "-m", "tools.prepare", *(f"--{flag}={value}" for flag, value in flags.items())])
    if changes := sources.changes(dataset_name, found.contents):
        raise UserError(
            f"{found.origin} has changed since {final.parent} was prepared from it: {changes}. Undo that, or prepare "
            f"it again: {command} --again"
        )
    sources.check_split(train_split, found.splits, found.origin)
    if found.train_split != train_split:
        raise UserError(
            f"{final.parent} has the mean image of {found.train_split!r}, not of {train_split!r}; prepare it again: "
            f"{command} --again"
        )
    return final


def _partial(final: pathlib.Path, name: str = "") -> pathlib.Path:
    """The folder, or something in it, where a set is written before it gets its name."""
    return final.parent.with_name(f".{final.parent.name}.partial") / name


def _check_origin(found: Summary, final: pathlib.Path, dataset_name: str) -> None:
    """Refuses a set that was prepared from another data set of the same name."""
    if not sources.is_origin(found.origin, dataset_name):
        raise UserError(
            f"{final.parent} was prepared from {found.origin}, not from {dataset_name}; delete it, or rename one of "
            f"the two data sets."
        )


def _check_unread(final: pathlib.Path) -> None:
    """Refuses to replace a set under a run, which would read the new files by the old index; raises `UserError`."""
    require(not locks.is_read(final), f"{final.parent} is read by a run of main.py; wait for its end, or stop it.")


def _write(
    source: sources.Source, final: pathlib.Path, size: int, train_split: str, allow_unreadable: int, max_pixels: int
) -> None:
    """Writes the records of a source into the folder `final`, whole or not at all; see `prepare`."""
    tf, tfds = tensorflow(), tensorflow_datasets()
    partial = _partial(final)
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
        np.savez(written / "statistics.npz", **conversion.statistics.arrays())
        overlap, overlap_as = overlaps.find(source, conversion.hashes, train_split)
        content = {
            "origin": source.origin,
            "size": size,
            "train_split": train_split,
            "examples": {split: info.num_examples for split, info in builder.info.splits.items()},
            "unreadable": conversion.unreadable,
            "labels": checksum(written / LABELS),
            "contents": dict(source.contents),
            "overlap": overlap,
            "overlap_as": overlap_as,
        }
        (written / "prepared.json").write_text(json.dumps(content, indent=2) + "\n")
        Records.open(written)  # stores the index, and shows that the set can be read
        if final.parent.exists():
            _check_unread(final)
            final.parent.rename(_partial(final, "old"))
        written.parent.rename(final.parent)
    except Exception as error:  # TFDS wraps some of what TensorFlow raises
        if files.is_full(error):
            raise UserError(f"{final.parents[2]} cannot take the prepared records: its disk is full.") from error
        if isinstance(error, OSError | tf.errors.OpError):
            raise UserError(f"{final.parents[2]} cannot take the prepared records: {error}.") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
