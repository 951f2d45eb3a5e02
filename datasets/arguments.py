"""The images that the arguments of a command mean."""

import os
import pathlib
import re
import sys
from collections.abc import Iterable

from common.errors import UserError, require, shortened
from datasets import folders, images


def find(names: Iterable[str]) -> list[str | bytes]:
    """The images that are meant by names: files as they are, and in folders all with an image's suffix, sorted.

    '-' is stdin: one image, given as its content in bytes, or the names of files and folders, one a line or with zero
    bytes between them.

    Raises:
      UserError: something is not there, or there is no image.
    """
    found = []
    for name in names:
        if name == "-":
            content = sys.stdin.buffer.read() if sys.stdin else b""
            require(content, "stdin is empty: it should hold an image, or names of files, one a line.")
            if images.is_image(content):
                found.append(content)
                continue
            # Names have no control characters, but images do; and what begins with '<' is a page of the web.
            names_files = content[:1] != b"<" and not re.search(rb"[\x01-\x08\x0e-\x1f]", content)
            require(names_files, "stdin is neither an image that can be read nor names of files.")
            listed = list(filter(None, re.split("[\0\n]", os.fsdecode(content))))
            require(listed, "stdin names no file: it should hold an image, or names of files, one a line.")
            found += find(listed)
            continue
        try:
            path = pathlib.Path(name).expanduser()
        except RuntimeError as error:  # the home of a user who is not there
            raise UserError(f"{name}: {error}") from None
        require(path.exists(), f"{shortened(str(name))} is not there.")
        inside = _inside(path) if path.is_dir() else [str(path)]
        require(inside, f"{name} holds no image files ({' '.join(folders.IMAGE_SUFFIXES)}).")
        found += inside
    return found


def _inside(folder: pathlib.Path) -> list[str]:
    """The files with an image's suffix in a folder and those below it, links followed, but what is hidden."""
    found, seen = [], set()
    for where, below, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in seen:  # a link to a folder above
            below.clear()
            continue
        seen.add(real)
        below[:] = [name for name in below if not name.startswith(".")]
        names = [name for name in names if not name.startswith(".")]  # as preparation does
        found += [os.path.join(where, name) for name in names if name.lower().endswith(folders.IMAGE_SUFFIXES)]  # noqa: PTH118 -- a Path takes ten times as long
    return sorted(found)
