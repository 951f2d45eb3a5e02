"""A config's `dataset` section: checked, prepared on first use, and opened."""

import itertools
import sys
from typing import Any

from common.errors import UserError, check_ranges, shown
from datasets import overlaps, parts, preparing, sources
from datasets.prepared import Records, summary


def open_records(dataset: Any, options: Any, warn: bool = True) -> Records:
    """Opens the data set of a config, and prepares it on first use.

    Args:
      dataset: the config's `dataset` section.
      options: its `input` section.
      warn: whether to warn on stderr of images that are both in the training split and in one that is evaluated.

    Raises:
      UserError: there is no such data set or split, or the set is damaged.
    """
    validate(dataset)
    try:
        found = preparing.prepare(
            dataset.name,
            data_dir=dataset.data_dir,
            size=options.resize,
            train_split=sources.split_names(dataset.train_split)[0],
            allow_unreadable=dataset.allow_unreadable,
            max_pixels=dataset.max_pixels,
        )
    except UserError as error:
        fields = (f"dataset.{field}={shown(dataset[field])}" for field in ("name", "data_dir", "train_split"))
        raise UserError(f"{', '.join(fields)}: {error}") from error
    records, known = Records.open(found), summary(found)
    for field, split in _splits(dataset).items():
        try:
            records.num_examples(split)
        except UserError as error:
            raise UserError(f"dataset.{field}: {error}") from error
    if warn:
        train, *evaluated = _splits(dataset).items()
        sentences = (overlaps.between(records, known.overlaps, train[1], *each) for each in evaluated)
        for sentence in dict.fromkeys(itertools.chain.from_iterable(sentences)):
            print(sentence, file=sys.stderr, flush=True)
    return parts.of_part(records, dataset.train_split, known.train_split)


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
