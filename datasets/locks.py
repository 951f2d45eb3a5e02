"""A lock file, by which one process at a time does something."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator

from common.errors import UserError


@contextlib.contextmanager
def hold(path: pathlib.Path) -> Iterator[None]:
    """Holds the lock file `path`, and removes it afterwards; waits while another process holds it.

    The system frees the lock of a process that dies.

    Raises:
      UserError: the folder cannot be written, or its file system has no locks.
    """
    try:
        file = _locked(path)
    except OSError as error:
        raise UserError(f"{path.parent} cannot take prepared records: {error.strerror}.") from None
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is held, so that it removes no other's


def _locked(path: pathlib.Path):
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another process prepares {path.stem[1:]}; waiting for it.", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        # The process before may have removed the file, and another may hold a lock on a new one.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
