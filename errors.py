"""Mistakes of the user's: one exception, raised anywhere, printed once by `cli.run`."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What the user asked for cannot be done; the message says why in one clear sentence."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Ends an error sentence with the known names nearest to `name`, or with all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known are {', '.join(known)}."
