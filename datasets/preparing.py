"""Preparing: every source becomes, once, a prepared set. Its folder gets its name when everything in it is written."""

import contextlib
import hashlib
import json
import os
import pathlib
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import PIL

from common import files
from common.errors import UserError, require
from datasets import conversion, locks, overlaps, sources, tensorflow
from datasets.merging import merge
from datasets.portions import Source
from datasets.prepared import LABELS, VERSION, Records, Summary, checksum, directory, summary
from datasets.progress import progress
from datasets.statistics import Statistics

FORMAT = 2  # of converted portions; another number, when code makes other records, and none before is used


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
    check: Callable[[Source], None] = lambda source: None,
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
                count = f"{'about ' * source.estimated}{source.total:,}"
                print(f"Preparing {count} images of {source.origin} in {final}, once.", flush=True)
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
    source: Source, final: pathlib.Path, size: int, train_split: str, allow_unreadable: int, max_pixels: int
) -> None:
    """Writes the records of a source into the folder `final`, whole or not at all; see `prepare`.

    What an interrupted preparation of the same source with the same settings has converted is used.
    """
    tf, partial = tensorflow(), _partial(final)
    settings = conversion.Settings(source.origin, len(source.class_names), size, train_split, max_pixels)
    done, written = partial / _digest(source, settings), partial / "new" / VERSION
    try:
        _clear(partial, done)
        written.mkdir(parents=True)
        done.mkdir(exist_ok=True)
        left = [portion for portion in source.portions if not conversion.is_converted(done, portion)]
        before = len(source.portions) - len(left)
        if before:
            print(f"{before:,} of its {len(source.portions):,} portions were prepared before.", flush=True)
        with progress(final.parent.name.rpartition("-")[0], source.total) as advance:
            if before:
                advance(source.total - sum(portion.count for portion in left))
            conversion.convert(left, settings, done, source.files_per_process, advance)
            converted = {split: [] for split in source.counts}
            for portion in source.portions:
                converted[portion.split].append(conversion.Converted.load(done, portion))
            unreadable = _unreadable(converted, allow_unreadable)
            description = f"{source.origin} as {size}×{size} images."
            merge(converted, written, class_names=source.class_names, size=size, description=description)
        statistics = Statistics.total(portion.statistics() for portion in converted[train_split])
        np.savez(written / "statistics.npz", **statistics.arrays())
        hashes = {split: np.concatenate([portion.hashes for portion in of]) for split, of in converted.items()}
        overlap, overlap_as = overlaps.find(source, hashes, train_split)
        content = {
            "origin": source.origin,
            "size": size,
            "train_split": train_split,
            "examples": {split: sum(len(portion.lengths) for portion in of) for split, of in converted.items()},
            "unreadable": unreadable,
            "labels": checksum(written / LABELS),
            "contents": dict(source.contents),
            "overlap": overlap,
            "overlap_as": overlap_as,
        }
        (written / "prepared.json").write_text(json.dumps(content, indent=2) + "\n")
        Records.open(written)  # shows that the set can be read
        if final.is_dir():
            _check_unread(final)
        _replace(final.parent, written.parent, _partial(final, "old"))
        shutil.rmtree(partial, ignore_errors=True)
    except Exception as error:  # TensorFlow wraps what the system raises, and TFDS what TensorFlow raises
        if files.is_full(error):
            raise UserError(f"{final.parents[2]} cannot take the prepared records: its disk is full.") from error
        if isinstance(error, OSError | tf.errors.OpError):
            raise UserError(f"{final.parents[2]} cannot take the prepared records: {error}.") from error
        raise
    finally:
        _clear(partial, done)
        for folder in (done, partial):
            with contextlib.suppress(OSError):
                folder.rmdir()  # which fails if something in it is done


def _replace(folder: pathlib.Path, new: pathlib.Path, old: pathlib.Path) -> None:
    """Puts `new` in the place of a folder, which may be there and goes to `old`; or leaves it as it is."""
    there = folder.exists()
    try:
        if there:
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if there and not folder.exists():
            old.rename(folder)
        raise


def _digest(source: Source, settings: conversion.Settings) -> str:
    """Differs between what cannot have a converted portion in common."""
    portions = [(portion.name, portion.count) for portion in source.portions]
    text = repr((FORMAT, PIL.__version__, settings, source.class_names, portions, dict(source.contents), source.state))
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _clear(partial: pathlib.Path, done: pathlib.Path) -> None:
    """Removes what an interrupted preparation leaves, but the portions that it has finished, in the folder `done`."""
    for path in [*partial.glob("*"), *done.glob(".*")]:
        if path.is_dir() and path != done:
            shutil.rmtree(path, ignore_errors=True)
        elif path != done:
            path.unlink(missing_ok=True)


def _unreadable(converted: Mapping[str, Sequence[conversion.Converted]], allowed: int) -> list[dict[str, str]]:
    """The files without a usable image; raises `UserError` if there are too many, or no others in a split."""
    found, total = [], 0
    for split, portions in converted.items():
        of_split = [item for portion in portions for item in portion.unreadable]
        if not sum(len(portion.lengths) for portion in portions):
            raise UserError(f"No file of the split {split!r} can be read:{_listed(of_split)}")
        found += of_split
        total += sum(len(portion.hashes) for portion in portions)
    if len(found) > allowed:
        raise UserError(
            f"{len(found)} of {total} files cannot be read, {allowed} are allowed; remove them, or use "
            f"--allow_unreadable={len(found)} (--config.dataset.allow_unreadable in main.py):{_listed(found)}"
        )
    return found


def _listed(unreadable: Sequence[Mapping[str, str]]) -> str:
    """A line for each unreadable file."""
    return "".join(f"\n  {item['file']}: {item['reason']}" for item in unreadable)
