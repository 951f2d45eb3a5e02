"""Images that a training split shares, pixel for pixel, with another split: they make errors look too low."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from datasets.portions import Source
from datasets.progress import printable

PAIRS_NAMED = 3  # of the images that two splits share


def find(
    source: Source, hashes: Mapping[str, Sequence[int]], train_split: str
) -> tuple[dict[str, int], dict[str, list[list[str]]]]:
    """Compares the images of each split with those of the training split.

    Args:
      source: where the images come from.
      hashes: a hash of the pixels of each file, by split, in the source's order; 0 for a file that cannot be read.
      train_split: the training split.

    Returns:
      How many images are shared, {'test/train': 12}, and the names of a few, {'test/train': [['test/a/1.jpg',
      'train/b/7.jpg'], …]}. Splits that share nothing are absent.
    """
    train = np.array(hashes[train_split], np.uint64)
    order = np.argsort(train, kind="stable")
    counts, pairs = {}, {}
    for split in sorted(hashes.keys() - {train_split}):
        others = np.array(hashes[split], np.uint64)
        shared = np.flatnonzero(np.isin(others, train) & (others != 0))
        if len(shared):
            # Naming an image means listing the source again up to it, so the pairs nearest to the start are named.
            places = order[np.searchsorted(train, others[shared], sorter=order)]
            first = np.argsort(places, kind="stable")[:PAIRS_NAMED]
            names = _names(source, split, shared[first]), _names(source, train_split, places[first])
            counts[f"{split}/{train_split}"] = len(shared)
            pairs[f"{split}/{train_split}"] = [list(pair) for pair in zip(*names, strict=True)]
    return counts, pairs


def _names(source: Source, split: str, places: np.ndarray) -> list[str]:
    """The names of the files at these places of a split."""
    wanted, names = set(places.tolist()), {}
    for place, file in enumerate(source.files(split)):
        if place in wanted:
            names[place] = printable(file.name)
            if len(names) == len(wanted):
                break
    return [names[place] for place in places.tolist()]


def sentences(counts: Mapping[str, int], pairs: Mapping[str, Sequence]) -> dict[tuple[str, str], str]:
    """A warning for each entry of what `find` returned, by (split, training split)."""
    found = {}
    for key, count in counts.items():
        split, train = key.split("/")
        named = [f"{one} is {other}" for one, other in pairs[key]] + ["…"] * (count > len(pairs[key]))
        found[split, train] = sentence(count, repr(split), f"{train!r} ({', '.join(named)})")
    return found


def sentence(count: int, split: str, train: str) -> str:
    """Warns of `count` images that are in both splits."""
    return f"warning: {count:,} images of {split} are also in {train}: errors measured on it will look too low."


def between(
    records: Any, known: Mapping[tuple[str, str], str], train_split: str, field: str, evaluated: str
) -> Iterator[str]:
    """Warnings of images that are in both splits, as the same record or as a copy.

    Args:
      records: a `prepared.Records`.
      known: its `sentences`.
      train_split: a split, or a part of one.
      field: 'eval_split' or 'test_split'.
      evaluated: the split, or part of one, that the field names.
    """
    train, evaluation = records.numbers(train_split), records.numbers(evaluated)
    if shared := len(np.intersect1d(train, evaluation)):
        yield sentence(shared, f"{field}={evaluated!r}", f"train_split={train_split!r}")
    for (split, trained), warning in known.items():
        if np.isin(records.numbers(split), evaluation).any() and np.isin(records.numbers(trained), train).any():
            yield warning
