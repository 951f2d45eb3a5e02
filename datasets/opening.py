"""A config's `dataset` section: checked, prepared on first use, and opened."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from common.errors import UserError, check_ranges, require, shown
from datasets import overlaps, parts, prepared, preparing, sources
from datasets.prepared import Records


def open_records(dataset: Any, options: Any, num_classes: int | None = None, warn: bool = True) -> Records:
    """Opens the data set of a config, and prepares it on first use.

    Args:
      dataset: the config's `dataset` section.
      options: its `input` section.
      num_classes: how many classes the set must have; None takes any number.
      warn: whether to warn on stderr of files that could not be read, of images that are both in the training split and
        in one that is evaluated, and of classes that the latter lacks.

    Raises:
      UserError: there is no such data set or split, it has another number of classes, its photographs have changed, or
        the set is damaged. What can be known before images are converted is said before.
    """
    validate(dataset)
    splits = _splits(dataset)

    def check(source):
        for field, split in splits.items():
            with _named(f"dataset.{field}"):
                sources.check_split(split, [*source.counts, "all"], source.origin)
        _check_classes(dataset, len(source.class_names), num_classes)
        known = prepared.splits_of(source.counts)
        for field, split in splits.items():
            with _named(f"dataset.{field}"):
                prepared.find_split(known, split, source.origin)

    with _named(", ".join(f"dataset.{field}={shown(dataset[field])}" for field in ("name", "data_dir", "train_split"))):
        found = preparing.prepare(
            dataset.name,
            data_dir=dataset.data_dir,
            size=options.resize,
            train_split=sources.split_names(dataset.train_split)[0],
            allow_unreadable=dataset.allow_unreadable,
            max_pixels=dataset.max_pixels,
            check=check,
        )
    records, known = Records.open(found), prepared.summary(found)
    for field, split in splits.items():
        with _named(f"dataset.{field}"):
            records.num_examples(split)
    _check_classes(dataset, records.num_classes, num_classes)
    if warn:
        for sentence in _warnings(records, known, splits):
            print(sentence, file=sys.stderr, flush=True)
    return parts.of_part(records, dataset.train_split, known.train_split)


@contextlib.contextmanager
def _named(field: str) -> Iterator[None]:
    """Begins the sentence of a UserError with the field that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{field}: {error}") from error


def _check_classes(dataset: Any, found: int, num_classes: int | None) -> None:
    require(
        num_classes in (found, None),
        f"model.num_classes={num_classes}, but {dataset.name} has {found} classes; use "
        f"--config.model.num_classes={found}.",
    )


def _warnings(records: Records, known: prepared.Summary, splits: Mapping[str, str]) -> Iterable[str]:
    """What is left out, and what makes errors look too low, or say less than they seem to; each sentence once."""
    train, *evaluated = splits.items()
    found = {}  # in order
    if count := len(known.unreadable):
        found[
            f"warning: {count:,} files of {known.origin} could not be read and are left out, such as "
            f"{known.unreadable[0]}."
        ] = None
    for field, split in evaluated:
        found |= dict.fromkeys(overlaps.between(records, known.overlaps, train[1], field, split))
        found |= {known.lacking[name]: None for name in sources.split_names(split) if name in known.lacking}
    return found


def validate(dataset: Any) -> None:
    """Refuses values of a config's `dataset` section that cannot work; raises `UserError`."""
    check_ranges(dataset, {"allow_unreadable": (0, 1 << 40), "max_pixels": (1, 1 << 40)}, "dataset.")
    for field, value in {"name": dataset.name, "data_dir": dataset.data_dir, **_splits(dataset)}.items():
        if not value.strip() or "\0" in value:
            raise UserError(f"dataset.{field}={shown(value)} is empty, or holds a zero byte.")


def _splits(dataset: Any) -> dict[str, str]:
    """The splits that a config uses, by field, the training split first."""
    test = {} if dataset.test_split in ("", dataset.eval_split) else {"test_split": dataset.test_split}
    return {"train_split": dataset.train_split, "eval_split": dataset.eval_split, **test}
