"""The watch of one of several processes: it notices when another one has failed, is gone or is silent, and says so."""

import contextlib
import ctypes
import itertools
import signal
import socket
import threading
import time

import jax
from orbax.checkpoint import multihost

from common import exits

# Seconds without a sign of life after which a process counts as gone.
SILENCE = 20
# Seconds without an answer after which the watch asks whether process 0 is there at all; see `delay_aborts`.
DOUBT = 3
GONE = (
    "{} of this run has ended or is out of reach; start all of them again, and the run goes on from its last checkpoint"
)


def store():
    """JAX's store of keys and values, which all processes of a run share; process 0 keeps it."""
    return multihost.get_jax_distributed_client()


def delay_aborts() -> None:
    """Makes an abort of this process wait for six seconds.

    JAX aborts at once when process 0 is gone. The watch can say so only when it gets Python's lock, which an import may
    hold for seconds, and when it no longer waits for an answer of JAX, which does not come any more.
    """
    libc = ctypes.CDLL(None)
    # A handler is called with the number of its signal: sleep(6), which is safe in a handler. Then the abort goes on.
    libc.signal(int(signal.SIGABRT), libc.sleep)


class Watch:
    """Shows the other processes that this one is alive, and ends it when one of them has failed or is silent.

    Works in a thread, because a process that waits for the devices of another can wait for ever.

    Args:
      count, index: how many processes there are, and the number of this one.
      address: HOST:PORT of process 0, if it is known.

    Attributes:
      noticed: that another process has failed, as a sentence; or ''.
      stop: (exit code, number of the program after which all stop), or None.
    """

    def __init__(self, count: int, index: int, address: str):
        self.noticed, self.stop = "", None
        self._address = address.rpartition(":")[::2] if ":" in address else None
        self._client, self._index = store(), index
        self._others = [k for k in range(count) if k != index]
        self._closed, self._all_know = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def ask_to_stop(self, code: int, program: int) -> None:
        """Tells all processes when to stop, and returns when they know; of several that ask, the first decides."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another has asked
            self._client.key_value_set("stop/0", f"{code} {program}")
        self._all_know.wait()

    def _watch(self):
        heard, silent, before = dict.fromkeys(self._others, ""), dict.fromkeys(self._others, 0.0), time.monotonic()
        for beat in itertools.count():
            answered = threading.Event()
            if self._index:
                threading.Thread(target=self._doubt, args=[answered], daemon=True).start()
            try:
                self._set("alive", str(beat))
                alive, failed = self._get("alive"), self._get("failed")
                self._hear_stop(alive)
                self._pause()
            except jax.errors.JaxRuntimeError:
                alive, failed = {}, {0: GONE.format("Process 0")}
            answered.set()
            if self._closed.is_set():
                return
            # A longer time is one in which this process was suspended, perhaps together with the others.
            passed, before = min(time.monotonic() - before, 2), time.monotonic()
            for k in self._others:
                now = alive.get(k, "")
                silent[k] = 0 if now != heard[k] or now == "ended" else silent[k] + passed
                heard[k] = now
                if k in failed:
                    self.noticed = failed[k] if not alive else f"Process {k}: {failed[k].rstrip('.')}"
                elif silent[k] > SILENCE:
                    self.noticed = GONE.format(f"Process {k}")
            if self.noticed:
                if self._index == 0:
                    self._linger()
                exits.fail(f"{self.noticed}.")

    def _doubt(self, answered):
        """Ends this process if process 0 does not answer and refuses connections, or does not answer for SILENCE s."""
        # Counted, because a clock also runs while this process is suspended.
        for waits in itertools.count(1):
            if answered.wait(DOUBT):
                return
            if self._refused() or waits * DOUBT >= SILENCE:
                exits.fail(f"{GONE.format('Process 0')}.")

    def _refused(self):
        try:
            if self._address:
                socket.create_connection(self._address, timeout=1).close()
        except ConnectionError:
            return True
        except OSError:  # a host that cannot be reached now may come back
            return False
        return False

    def _hear_stop(self, alive):
        """Notes that the run shall stop, says so, and notes when all processes know."""
        if not self.stop and (asked := self._get("stop")):
            self.stop = tuple(map(int, asked[0].split()))
            self._set("knows", "stop")
        if self.stop and not self._all_know.is_set():
            know = self._get("knows")
            if all(k in know or alive.get(k) == "ended" for k in self._others):
                self._all_know.set()

    def _pause(self):
        """Waits for a second, for news of a stop, or until process 0 is gone: JAX itself aborts only a moment later."""
        milliseconds = 1000 if self._all_know.is_set() or not self.stop else 50
        try:
            self._client.blocking_key_value_get("nothing" if self.stop else "stop/0", milliseconds)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise

    def _set(self, key, value):
        self._client.key_value_set(f"{key}/{self._index}", value, allow_overwrite=True)

    def _get(self, key):
        """What the processes have set, by process."""
        return {int(path.rpartition("/")[2]): value for path, value in self._client.key_value_dir_get(f"{key}/")}

    def _linger(self):
        """Gives the others time to read before exchanges with this process fail and the store ends with process 0."""
        time.sleep(6 if self._index == 0 else 3)

    def close(self, failure: str = "") -> None:
        """Ends the watch; `failure` tells the others why this process cannot go on."""
        if failure:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._set("failed", failure)
                self._linger()
        self._closed.set()
        self._thread.join(SILENCE)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._set("alive", "ended")
