"""Several processes of one run: how they find one another, what they tell one another, and how they end together."""

import contextlib
import faulthandler
import itertools
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import parallel
from common import backend, exits
from common.errors import UserError
from run.watch import GONE, Watch, delay_aborts, store

Tree = Any

# Seconds after which JAX itself ends a process whose company is silent, without a sentence; later than `watch.SILENCE`.
HEARTBEAT_TIMEOUT = 60
# Seconds in which the processes must find one another, and after which one says that it waits.
PATIENCE, NOTICE = 300, 5
# With UNDER_WAY = 1, a process waits for program n − 2 before it dispatches program n. Program n − 2 ends only after
# every process has dispatched it, so no process is more than two programs ahead of another. One that has just passed
# its check may still dispatch a third. All can stop after that one.
AHEAD = parallel.UNDER_WAY + 2


def initialize(coordinator_address: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins this process to the others of a run, before any device is used.

    Without arguments it does nothing in a single process; the tasks of a SLURM step and the hosts of a TPU pod find one
    another. `coordinator_address="auto"` leaves the search to JAX in other clusters.

    It says whom it waits for, and after PATIENCE seconds it ends the process with a sentence. From then on a watch ends
    it when another process is gone.

    Raises:
      UserError: the three are not given together and whole, or the processes do not find one another.
    """
    global _watch
    arguments, awaited = {}, "the other processes of this run"
    if coordinator_address in ("", "auto") and not num_processes and process_id < 0:
        if not coordinator_address and not _in_cluster():
            return
        if os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1":
            # JAX gives each SLURM task a single GPU; a task that has the node to itself should take all of them.
            arguments["local_device_ids"] = []
    elif re.fullmatch(r".+:\d+", coordinator_address) and 0 <= process_id < num_processes:
        arguments = {
            "coordinator_address": coordinator_address,
            "num_processes": num_processes,
            "process_id": process_id,
        }
        others = "process 1" if num_processes == 2 else f"processes 1 to {num_processes - 1}"
        awaited = f"{'process 0' if process_id else others} at {coordinator_address}"
    else:
        raise UserError(
            "Several processes need --coordinator_address=HOST:PORT, --num_processes=N and --process_id=K with "
            f"0 ≤ K < N together; got {coordinator_address!r}, {num_processes} and {process_id}."
        )
    # JAX aborts when another process is gone, and a dump of all stacks would bury the sentence.
    faulthandler.disable()
    # It would take SIGTERM for itself, and a start could not be stopped before it trains; see `Stop`.
    jax.config.update("jax_enable_preemption_service", False)
    delay_aborts()
    try:
        with _patience(awaited):
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=2 * PATIENCE,  # after which JAX would abort
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"The processes of this run did not find one another: {reason}") from error
    if not arguments.get("num_processes"):
        backend.start_devices()
        num_processes, process_id = jax.process_count(), jax.process_index()
    if num_processes > 1:
        _watch = Watch(num_processes, process_id, coordinator_address)


@contextlib.contextmanager
def _patience(awaited: str) -> Iterator[None]:
    """Says after NOTICE seconds whom this process waits for, and gives up after PATIENCE seconds."""
    sentence = f"Waited {PATIENCE} s for {awaited}: start all processes of a run in that time, with the same address."
    timers = (
        threading.Timer(NOTICE, print, [f"Waiting for {awaited}."], {"flush": True}),
        threading.Timer(PATIENCE, exits.fail, [sentence]),
    )
    # While JAX waits, Python would not see Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(signal.SIGINT, before)


def _in_cluster() -> bool:
    """Whether this process is one of several that SLURM or a TPU pod started."""
    slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
    return slurm or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def gather_text(text: str) -> list[str]:
    """The texts of all processes, by process. Waits up to a day, because one of them may be preparing its data."""
    if jax.process_count() == 1:
        return [text]
    client, call = store(), next(_calls)
    client.key_value_set(f"text/{call}/{jax.process_index()}", text)
    day = 86_400_000  # milliseconds
    return [client.blocking_key_value_get(f"text/{call}/{k}", day) for k in range(jax.process_count())]


def from_first(tree: Tree) -> Tree:
    """The NumPy arrays of process 0, in all processes; the others pass arrays of the same shapes and types."""
    if jax.process_count() == 1:
        return tree
    # As bits, because the broadcast is a sum, which loses the sign of −0.
    bits = jax.tree.map(lambda leaf: np.array(leaf).reshape(-1).view(np.uint8), tree)
    sent = multihost_utils.broadcast_one_to_all(bits)
    return jax.tree.map(
        lambda leaf, bits: np.asarray(bits).view(np.asarray(leaf).dtype).reshape(np.shape(leaf)), tree, sent
    )


class Stop:
    """Says when a run stops after a signal: at once in a single process, and after the same program in several.

    Every process calls `check` after each program that it dispatches to the devices: an update, or a batch of an
    evaluation. A process with a signal names the number of a later program, after which all stop, and goes on only when
    all know it. JAX's `reached_preemption_sync_point` does the same for SIGTERM alone.

    Args:
      signals: notes the signals of this process.
      watch: what `company` gives: None in a single process.
    """

    def __init__(self, signals: exits.StopSignal, watch: Watch | None):
        self._signals, self._watch = signals, watch
        self._programs, self._asked = 0, False

    def check(self) -> None:
        """Raises `exits.Stopped` if the run stops here."""
        if not self._watch:
            if self._signals.code:
                raise exits.Stopped(self._signals.code)
            return
        self._programs += 1
        if self._signals.code and not self._asked:
            self._asked = True
            self._watch.ask_to_stop(self._signals.code, self._programs + AHEAD)
        if self._watch.stop and self._programs >= self._watch.stop[1]:
            raise exits.Stopped(self._watch.stop[0])


@contextlib.contextmanager
def company() -> Iterator[Watch | None]:
    """A run, in this process, of one or of several processes: when one of them fails, all of them end with a sentence.

    Yields:
      What `Stop` needs: None in a single process.

    Raises:
      UserError: the devices or the other processes fail; other errors pass through.
    """
    watch = _watch
    try:
        backend.start_devices()
        yield watch
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        if "RESOURCE_EXHAUSTED" in reason:
            sentence = "The devices have too little memory; halve batch_size and eval_batch_size"
        elif watch and (watch.noticed or any(word in reason for word in _EXCHANGES)):
            # An exchange with a process that has ended fails at once, and JAX aborts soon: no time to ask the others.
            raise UserError(f"{watch.noticed or GONE.format('Another process')} ({reason}).") from error
        elif watch:
            sentence = "The devices of this process failed"
        else:
            raise
        if watch:
            watch.close(sentence)
        raise UserError(f"{sentence} ({reason}).") from error
    except BaseException as error:
        if watch:
            watch.close(str(error) or type(error).__name__)
        raise
    if watch:
        watch.close()


_watch: Watch | None = None  # of a process that `initialize` joined to others
_calls = itertools.count()
_EXCHANGES = ("Gloo", "NCCL", "nccl", "onnection", "ocket", "UNAVAILABLE", "DEADLINE_EXCEEDED")  # in JAX's messages
