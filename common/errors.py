"""Mistakes of the user: one exception, raised anywhere and printed once by `cli.run`; and checks of single values."""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

# What a value of a field's type may be, and its name in a sentence. JSON has lists instead of tuples.
KINDS = {
    bool: (bool, "True or False"),
    int: (int, "an integer"),
    float: ((int, float), "a number"),
    str: (str, "text"),
    tuple: ((tuple, list), "a tuple"),
}


class UserError(Exception):
    """What the user asked for cannot be done; the message says why in one clear sentence."""


def require(condition: Any, sentence: str) -> None:
    """Raises `UserError` with this sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def nearest(name: str, known: Iterable[str]) -> str:
    """Ends an error sentence with the known names nearest to `name`, or with all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}."


def shown(value: Any) -> str:
    """A value in an error sentence: its Python form, shortened if it is long."""
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):  # Python writes no integers of more than 4,300 digits
        return "…"


def shortened(text: str) -> str:
    """A text without its middle if it is long."""
    return text if len(text) <= 400 else f"{text[:300]} … {text[-90:]}"


def system_error(error: Exception) -> int | None:
    """The number with which the system refused a file, also inside one of TensorStore's long messages; else None."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else getattr(error, "errno", None)


def reason(error: Exception) -> str:
    """What the system said, or else the first line of the error, cut to a sentence's length, or its kind."""
    if code := system_error(error):
        return os.strerror(code)
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.rstrip(".")[:300]


def check_type(field: str, value: Any, kind: type) -> None:
    """Refuses a value that is not of `kind`; an integer passes as a number, and a list as a tuple."""
    allowed, name = KINDS[kind]
    matches = isinstance(value, allowed) and isinstance(value, bool) == (kind is bool)
    require(matches, f"{field}={shown(value)} must be {name}.")


def check_ranges(values: Mapping[str, Any], bounds: Mapping[str, tuple[float, float]], prefix: str = "") -> None:
    """Refuses numbers outside of their bounds, and NaN.

    Args:
      values: a config or a section of one.
      bounds: (lowest, highest) by field, both finite.
      prefix: of the fields' names, such as 'model.'.
    """
    for field, (low, high) in bounds.items():
        value = values[field]
        require(low <= value <= high, f"{prefix}{field}={shown(value)} must lie between {low} and {high}.")


def check_name(field: str, value: str, known: Iterable[str]) -> None:
    """Refuses a name that is not one of `known`."""
    if value not in known:
        raise UserError(f"{field}={shown(value)} is not known: {nearest(value, known)}")
