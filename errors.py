"""Mistakes of the user's: one exception, raised anywhere, printed once by `cli.run`; and checks of single values."""

import contextlib
import difflib
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn


class UserError(Exception):
    """What the user asked for cannot be done; the message says why in one clear sentence."""


def fail(sentence: str) -> NoReturn:
    """Ends the process with one sentence and exit code 2."""
    with contextlib.suppress(OSError):  # of a full disk on which the output is kept
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    leave(2)


def leave(code: int) -> NoReturn:
    """Ends the process at once: at its ordinary end JAX waits for other processes, which may wait for this one."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def nearest(name: str, known: Iterable[str]) -> str:
    """Ends an error sentence with the known names nearest to `name`, or with all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known are {', '.join(known)}."


def shown(value: Any) -> str:
    """A value in an error sentence: as Python writes it, without its middle where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no integers of more than 4,300 digits
        text = "…"
    return shortened(text)


def shortened(text: str) -> str:
    """A text without its middle, where it is long."""
    return text if len(text) <= 400 else f"{text[:300]} … {text[-90:]}"


def check_type(field: str, value: Any, like: Any) -> None:
    """Refuses a value of another type than `like`; an integer is a number too, and JSON has lists for tuples."""
    kinds, name = {
        bool: (bool, "True or False"),
        int: (int, "an integer"),
        float: ((int, float), "a number"),
        str: (str, "text"),
        tuple: ((tuple, list), "a tuple"),
    }[type(like)]
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(like, bool):
        raise UserError(f"{field}={shown(value)} must be {name}.")


def check_ranges(values: Mapping[str, Any], bounds: Mapping[str, tuple[float, float]], prefix: str = "") -> None:
    """Refuses numbers outside of their bounds, not-a-number among them.

    Args:
      values: a config or a section of one.
      bounds: (lowest, highest) by field, both finite.
      prefix: of the fields' names, as 'model.'.
    """
    for field, (low, high) in bounds.items():
        if not low <= values[field] <= high:
            raise UserError(f"{prefix}{field}={shown(values[field])} must lie between {low} and {high}.")


def check_name(field: str, value: str, known: Iterable[str]) -> None:
    """Refuses a name that is not one of `known`."""
    if value not in known:
        raise UserError(f"{field}={shown(value)} is not known: {nearest(value, known)}")
