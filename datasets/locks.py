"""Locks between processes: one process at a time does something, and nobody replaces a folder under its readers."""

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


class Reading:
    """Keeps a folder from being replaced, until it is closed or the process ends; see `is_read`."""

    def __init__(self, folder: pathlib.Path):
        self._descriptor = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def close(self) -> None:
        """Lets it go."""
        os.close(self._descriptor)


def is_read(folder: pathlib.Path) -> bool:
    """Whether a `Reading` holds this folder, in any process of this machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


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
