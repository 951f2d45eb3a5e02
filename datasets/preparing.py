"""Preparing: every source becomes, once, a prepared set. Its folder gets its name when everything in it is written."""

import json
import os
import pathlib
import shutil

import numpy as np

from common.errors import UserError, nearest
from datasets import locks, overlaps, sources, tensorflow, tensorflow_datasets
from datasets.conversion import Conversion
from datasets.images import LOSSLESS_UP_TO
from datasets.prepared import VERSION, Records, directory, summary
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
        np.savez(written / "statistics.npz", **conversion.statistics.arrays())
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
