"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping

import numpy as np

from common.errors import UserError


@contextlib.contextmanager
def replacing(path: pathlib.Path, name: str = "partial") -> Iterator[pathlib.Path]:
    """Yields a path to write to; what is written there takes the place of `path` in one step, if nothing fails.

    `name` ends the name of what is written; processes that may write at once need names of their own.

    Raises:
      UserError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{name}")
    try:
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from None


def store_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Stores arrays that can be computed again, with `np.savez`; not at all in a folder that cannot be written.

    Several processes may do so at once.
    """
    with contextlib.suppress(UserError), replacing(path, secrets.token_hex(4)) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that a disk is full. Libraries wrap that in their own."""
    full = ("No space left on device", "Not enough disk space", "Disk quota exceeded")
    while error:
        if any(text in str(error) for text in full):
            return True
        error = error.__cause__ or error.__context__
    return False


def expanded(path: str | pathlib.Path, field: str) -> pathlib.Path:
    """The path, with ~ as the user's home; raises `UserError`, which names `field`, if that is nobody's."""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{field}={path} cannot be a path: {error}") from None


def check(path: pathlib.Path) -> pathlib.Path:
    """The path, if a file could be written there; raises `UserError` before work is done for nothing."""
    if path.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder.")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {path.parent}.")
    _check_access(path, path.parent)
    return path


def folder(path: pathlib.Path) -> pathlib.Path:
    """Makes a folder if it is not there; raises `UserError` if that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
    _check_access(path, path)
    return path


def _check_access(path: pathlib.Path, folder: pathlib.Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: nothing can be added to the folder {folder}.")
