"""How a process ends: its exit codes, and the signals that ask for it.

    0      done
    1      a defect of this code, with a traceback
    2      a mistake of the user's, in one sentence
    130    SIGINT (Ctrl-C)
    141    the reader of a tool's output has gone, such as `head`
    143    SIGTERM

Once training has begun, a run saves its state before it ends with 130 or 143, but for a second Ctrl-C.
"""

import contextlib
import os
import signal
import sys
import threading
from typing import NoReturn

DEFECT, MISTAKE, NO_READER = 1, 2, 141
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Stopped(Exception):
    """A signal asked the run to stop, and all its processes have agreed on when; `code` is the exit code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def fail(sentence: str) -> NoReturn:
    """Ends the process with one sentence and the exit code of a mistake."""
    with contextlib.suppress(OSError):  # stderr may lie on a full disk
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    leave(MISTAKE)


def leave(code: int) -> NoReturn:
    """Ends the process at once. JAX's ordinary shutdown waits for other processes, which may wait for this one."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class StopSignal:
    """A context that notes SIGINT and SIGTERM, so that the loop can save and end. A second SIGINT ends without saving.

    Attributes:
      code: the exit code that a signal asked for, or 0.
    """

    def __init__(self):
        self.code = 0

    def _note(self, number, _):
        if number == signal.SIGINT and self.code == SIGNALS[signal.SIGINT]:
            raise KeyboardInterrupt
        self.code = SIGNALS[number]
        with contextlib.suppress(OSError):  # stderr may lie on a full disk, or its reader may have gone
            print(f"{signal.Signals(number).name}: saving soon.", file=sys.stderr, flush=True)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)
