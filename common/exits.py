"""How a process ends: its exit codes, and the signals that ask for it.

    0      done
    1      a defect of this code, with a traceback
    2      a mistake of the user's, in one sentence
    129    SIGHUP (the terminal or the connection has gone)
    130    SIGINT (Ctrl-C)
    141    the reader of a tool's output has gone, such as `head`
    143    SIGTERM

Once training has begun, a run saves its state before it ends with 129, 130 or 143, but for a second Ctrl-C.
"""

import contextlib
import fcntl
import io
import os
import signal
import sys
import threading
from typing import NoReturn

DEFECT, MISTAKE, NO_READER = 1, 2, 141
SIGNALS = {signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGTERM: 143}


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


class _Outliving(io.FileIO):
    """A stream of the process whose output goes nowhere from the first failure on."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            _send_nowhere(self.fileno())
            if self.fileno() != 2 and sys.stderr:
                print(f"warning: stdout takes no more ({error.strerror}); the run goes on.", file=sys.stderr)
            return len(data)


def _send_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def outlive_readers() -> None:
    """Lets the process go on when nobody can read its output any more: `head`, a lost connection, a full disk.

    What libraries in C++ write on stdout, such as Gloo's line for each connection, goes nowhere.
    """
    for name in ("stdout", "stderr"):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # it is closed, or no file
            stream = getattr(sys, name)
            stream.flush()
            descriptor = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3) if stream.fileno() == 1 else stream.fileno()
            raw = _Outliving(descriptor, "w", closefd=False)
            options = dict(encoding=stream.encoding, errors=stream.errors, line_buffering=True)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **options))
            if descriptor not in (1, 2):
                _send_nowhere(1)


class StopSignal:
    """A context that notes the SIGNALS, so that the loop can save and end. A second SIGINT ends without saving.

    SIGHUP stays ignored if it was, by `nohup`.

    Attributes:
      code: the exit code that a signal asked for, or 0.
    """

    def __init__(self):
        self.code = 0

    def _note(self, number, _):
        if number == signal.SIGINT and self.code == SIGNALS[signal.SIGINT]:
            raise KeyboardInterrupt
        self.code = SIGNALS[number]
        # Not by print: a signal may come while one is under way. stderr may be closed, or its reader may have gone.
        with contextlib.suppress(OSError):
            os.write(2, f"{signal.Signals(number).name}: saving soon.\n".encode())

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            taken = [number for number in SIGNALS if number != signal.SIGHUP or not ignored]
            self._before = {number: signal.signal(number, self._note) for number in taken}
        return self

    def __exit__(self, *_):
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)
