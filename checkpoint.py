"""Checkpoints: what a run needs to go on, written by Orbax in the background.

A checkpoint holds the merged state (see `parallel`), so that it is the same whatever devices wrote it, and a record
`meta` in JSON: the config, what the loop knows besides the state, a checksum of the state, and the versions that wrote
it. Nothing is pickled. Of several processes the first alone reads and writes checkpoints.

A folder `checkpoints/STEP` is complete: it gets its name when everything in it is written, and nothing in it is ever
changed. Beside such folders there may be STEP.damaged, which could not be read, and for a moment STEP.replaced.
"""

import contextlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from errors import UserError

VERSIONS = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


class Checkpoints:
    """The checkpoints of a workdir: the latest two, and the one with the lowest validation error.

    Two, so that a run whose newest checkpoint was damaged after it was written goes on from the one before.

    Args:
      workdir: folder of the run; the checkpoints lie in `checkpoints/` in it.
      read_only: for tools, which neither create nor clean anything.

    Raises:
      UserError: the folder is not there (`read_only`), or cannot be written.
    """

    def __init__(self, workdir: str | pathlib.Path, read_only: bool = False):
        self.directory = pathlib.Path(workdir).resolve() / "checkpoints"
        self._read_only, self._saving = read_only, None
        if read_only and not self.directory.is_dir():
            raise UserError(f"{workdir} holds no checkpoints; --workdir names the folder of a run of main.py.")
        if not read_only:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._put_back()
            except OSError as error:
                raise UserError(f"{self.directory} cannot be written: {error.strerror}.") from None
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(2),
                checkpoint_managers.BestN(
                    get_metric_fn=_error, reverse=True, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                best_fn=_error,
                best_mode="min",
                preservation_policy=keep,
                read_only=read_only,
                create=False,
                cleanup_tmp_directories=not read_only,
                # Of several processes only the first comes here, and waits for none of the others.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=jax.process_index(), active_processes={jax.process_index()}
                ),
            ),
        )

    def save(self, step: int, state: Any, meta: dict[str, Any], error: float | None = None) -> None:
        """Begins to save; returns once the arrays are copied.

        Args:
          step: the number of updates done. A checkpoint of this step stays until the new one is complete.
          state: merged tree of NumPy arrays, which must not be changed afterwards.
          meta: JSON values.
          error: validation error of this very state, if it was measured.

        Raises:
          UserError: this one or the one before cannot be written.
        """
        self.wait()
        meta = meta | {
            "checksum": checksum(state),
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        }
        self._saving = step
        with self._explained():
            if step in self.steps():  # the same state, saved before it was evaluated
                self._path(step).rename(self._path(f"{step}.replaced"))
                self._manager.reload()
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
                metrics=None if error is None else {"error": float(error)},
                force=True,
            )

    def wait(self) -> None:
        """Returns when what was begun is on disk.

        Raises:
          UserError: it cannot be written; what was there before is still there.
        """
        if self._saving is None:
            return
        with self._explained():
            self._manager.wait_until_finished()
            self._put_back()
        self._saving = None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise anything where a file cannot be written
            step, self._saving = self._saving, None
            for unfinished in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._put_back()
            there = [int(path.name) for path in self.directory.glob("[0-9]*") if path.name.isdigit()]
            raise UserError(
                f"The checkpoint of step {step} cannot be written to {self.directory}: {_reason(error)}. "
                + (f"The run can go on from step {max(there)}." if there else "There is none before it.")
            ) from error

    def _put_back(self) -> None:
        """Ends what `save` began with a checkpoint that was there: the old one goes if the new one has come."""
        for old in self.directory.glob("*.replaced"):
            if old.with_suffix("").is_dir():
                shutil.rmtree(old)
            else:
                old.rename(old.with_suffix(""))

    def steps(self) -> list[int]:
        """The steps that can be restored, in order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the lowest validation error, if any was measured."""
        return self._manager.best_step()

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads (merged state, meta) of a step; `like` gives the structure, shapes and types that are expected.

        Raises:
          UserError: the shapes are others, or the checkpoint is damaged.
        """
        try:
            return self._restore(step, like)
        except _Damaged as error:
            raise UserError(f"The checkpoint of step {step} in {self.directory} cannot be read: {error}.") from error

    def _restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
            )
        except Exception as error:  # Orbax raises anything on a damaged folder
            raise _Damaged(_reason(error)) from error
        state, meta = restored["state"], restored["meta"]
        found = jax.tree.map(lambda leaf, target: leaf.shape == target.shape, state, like)
        if not all(jax.tree.leaves(found)):  # Orbax goes by what was saved
            raise UserError(f"The checkpoint of step {step} in {self.directory} is of a network of other sizes.")
        if meta.get("checksum") != checksum(state):
            raise _Damaged("its arrays are not those that were saved")
        return state, meta

    def restore_latest(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole, or None where there is none.

        Those after it cannot be read; they are warned of, and set aside as STEP.damaged (not with `read_only`).

        Raises:
          UserError: there are checkpoints, but none of them can be read.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                restored = self._restore(step, like)
            except _Damaged as error:
                damaged[step] = error
                continue
            for newer, error in damaged.items():
                self._set_aside(newer, error)
            return restored
        if damaged:
            raise UserError(
                f"No checkpoint in {self.directory} can be read (step {max(damaged)}: {damaged[max(damaged)]}); "
                f"delete the folder to start afresh, or restore it from a copy."
            )
        return None

    def _set_aside(self, step: int, error: Exception) -> None:
        warning = f"warning: the checkpoint of step {step} cannot be read, the one before is taken: {error}"
        if not self._read_only:
            aside = self._path(f"{step}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            self._path(step).rename(aside)
            self._manager.reload()
        print(warning, file=sys.stderr)

    def _path(self, name: int | str) -> pathlib.Path:
        return self.directory / str(name)

    def close(self) -> None:
        """Waits for saves under way and lets go of the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Damaged(Exception):
    """A checkpoint that cannot be read; the message says why."""


def checksum(state: Any) -> int:
    """CRC-32 of all arrays of a merged tree, in the tree's order."""
    crc = 0
    for leaf in jax.tree.leaves(state):
        crc = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), crc)
    return crc


def _reason(error: Exception) -> str:
    """What the system said, or else the first line of the error, cut to a sentence's length."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's long messages end with it
        return os.strerror(int(code[1]))
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.rstrip(".")[:300]


def _error(metrics: dict[str, float]) -> float:
    return metrics["error"]
