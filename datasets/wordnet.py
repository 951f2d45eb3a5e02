"""Words for the WordNet ids with which ImageNet names its classes: 'n01440764' is 'tench, Tinca tinca'."""

import ast
import functools
import importlib.util
import pathlib
import re
from collections.abc import Sequence


def words(class_names: Sequence[str]) -> tuple[str, ...]:
    """The class names, with words in place of the WordNet ids of ImageNet's 1,000 classes; others stay as they are."""
    if not any(re.fullmatch(r"n\d{8}", name) for name in class_names):
        return tuple(class_names)
    known = _synsets()
    return tuple(known.get(name, name) for name in class_names)


@functools.cache
def ids() -> tuple[str, ...]:
    """The ids of ImageNet's 1,000 classes in the order of their labels; () where TFDS is not installed."""
    return tuple(_synsets())


@functools.cache
def _synsets() -> dict[str, str]:
    """The words of ImageNet's classes by id, from two files of TFDS that list the classes in the same order.

    TFDS itself, whose import takes seconds, is not imported. Where it is not installed, nothing is known.
    """
    found = importlib.util.find_spec("tensorflow_datasets")
    if not found:
        return {}
    folder = pathlib.Path(found.submodule_search_locations[0]) / "datasets"
    try:
        ids = (folder / "imagenet2012" / "labels.txt").read_text().split()
        tree = ast.parse((folder / "siscore" / "labels.py").read_text())
    except OSError:  # another version of TFDS
        return {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "IMAGENET_LABELS_LIST":
            names = ast.literal_eval(node.value)
            return dict(zip(ids, names, strict=True)) if len(ids) == len(names) else {}
    return {}
