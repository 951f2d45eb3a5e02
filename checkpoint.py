"""Checkpoints: what a run needs to go on, written by Orbax in the background.

A checkpoint holds the merged state (see `parallel`), which does not depend on the devices that wrote it, and a record
in JSON: `meta` (the config, and what the loop knows besides the state), the validation error, the versions that wrote
it, and checksums of the state and of the record itself. Nothing is pickled. Only the first of several processes reads
and writes checkpoints.

A folder `checkpoints/STEP` is complete: it gets its name when everything in it is written, and nothing in it changes
afterwards. STEP.damaged could not be read; STEP.replaced and STEP.surplus exist for a moment only, the second
because a removal may be cut short.
"""

import concurrent.futures
import contextlib
import errno
import importlib.metadata
import json
import pathlib
import shutil
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from common.errors import UserError, reason, system_error

VERSIONS = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
# What says that files are damaged, found by changing every byte of a checkpoint: exceptions of Orbax, TensorStore and
# JSON, and reasons of the system. Others, such as a lack of memory or of file descriptors, say nothing of the files.
DAMAGE = (ValueError, LookupError, EOFError, OSError)
REASONS = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)


class Checkpoints:
    """The checkpoints of a workdir: the latest two, and the one with the lowest validation error.

    With two, a run goes on even if its newest checkpoint was damaged after it was written.

    Args:
      workdir: folder of the run; the checkpoints lie in `checkpoints/` in it.
      read_only: creates and cleans nothing.

    Raises:
      UserError: the folder is missing (`read_only`), or cannot be written.
    """

    def __init__(self, workdir: str | pathlib.Path, read_only: bool = False):
        self.directory = pathlib.Path(workdir).resolve() / "checkpoints"
        self._read_only, self._saving, self._saved = read_only, None, None
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        if read_only and not self.directory.is_dir():
            raise UserError(f"{workdir} is not the folder of a run of main.py: it holds no checkpoints.")
        if not read_only:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._tidy()
            except OSError as error:
                raise UserError(f"{self.directory} cannot be written: {error.strerror}.") from None
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("state", "record"),
            options=ocp.CheckpointManagerOptions(
                read_only=read_only,
                create=False,
                cleanup_tmp_directories=not read_only,
                # Only the first of several processes comes here, and it must not wait for the others.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=jax.process_index(), active_processes={jax.process_index()}
                ),
            ),
        )
        self._read_records()

    def _read_records(self) -> None:
        self._errors = {}  # validation errors by step, of the checkpoints that have one
        self._damaged = {}  # why the record of a step, and so its error, cannot be read
        for step in self.steps():
            try:
                self._errors[step] = self._record(step)["error"]
            except _Damaged as error:
                self._damaged[step] = error

    def save(self, step: int, state: Any, meta: dict[str, Any], error: float | None = None) -> None:
        """Begins to save, and returns once the arrays are copied.

        Args:
          step: the number of updates done. An older checkpoint of this step stays until the new one is complete.
          state: merged tree of NumPy arrays, which must not change afterwards.
          meta: JSON values.
          error: validation error of exactly this state, if it was measured.

        Raises:
          UserError: this checkpoint or the one before it cannot be written.
        """
        self.wait()
        record = {
            "meta": meta,
            "error": error,
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
            "checksum": checksum(state),
        }
        self._saving, self._errors[step] = step, error
        with self._explained():
            if step in self.steps():  # the same state, saved before it was evaluated
                self._path(step).rename(self._path(f"{step}.replaced"))
                self._manager.reload()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record | {"seal": _seal(record)})
                ),
                force=True,
            )
            self._saved = self._thread.submit(self._finish)

    def wait(self) -> None:
        """Returns when the save under way is on disk.

        Raises:
          UserError: it cannot be written; the checkpoints before it are still there.
        """
        if self._saving is None:
            return
        with self._explained():
            saved, self._saved = self._saved, None
            try:
                saved.result() if saved else self._finish()
            finally:
                with contextlib.suppress(Exception):
                    self._manager.wait_until_finished()  # Orbax raises once in each thread; `close` would raise again
        self._saving = None

    def _finish(self) -> None:
        """Waits for Orbax, and removes what the new checkpoint makes surplus."""
        self._manager.wait_until_finished()
        self._remove_surplus()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            step, self._saving = self._saving, None
            for unfinished in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._tidy()
            if system_error(error) is None and not isinstance(error, OSError):
                raise  # a defect, of this code or of Orbax
            there = [int(path.name) for path in self.directory.glob("[0-9]*") if path.name.isdigit()]
            raise UserError(
                f"The checkpoint of step {step} cannot be written to {self.directory}: {reason(error)}. "
                + (f"The run can go on from step {max(there)}." if there else "There is none before it.")
            ) from error

    def _tidy(self) -> None:
        """Removes what is surplus, and a replaced checkpoint; that one is put back if the new one is not complete."""
        for old in [*self.directory.glob("*.surplus"), *self.directory.glob("*.replaced")]:
            if old.suffix == ".surplus" or old.with_suffix("").is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(old.with_suffix(""))

    def steps(self) -> list[int]:
        """The steps that can be restored, in order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the lowest validation error, if any was measured."""
        return _best({step: self._errors.get(step) for step in self.steps()})

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads (merged state, meta) of a step; `like` gives the expected structure, shapes and types.

        Raises:
          UserError: the checkpoint has other shapes, or is damaged.
        """
        try:
            return self._restore(step, like)
        except _Damaged as error:
            raise UserError(f"The checkpoint of step {step} in {self.directory} cannot be read: {error}.") from error

    def _record(self, step: int) -> dict[str, Any]:
        if (self._path(step) / "meta").is_dir():
            raise UserError(
                f"The checkpoint of step {step} in {self.directory} was written by an earlier version of this code; "
                f"use that version, or take another --workdir."
            )
        with self._reading(step):
            record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
            if not isinstance(record, dict):
                raise ValueError("its record has no fields")
            seal = record.pop("seal")
        if seal != _seal(record):
            raise _Damaged("its record is not the one that was saved")
        return record

    def _restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        record = self._record(step)
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
        with self._reading(step):
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
        state = restored["state"]
        found = jax.tree.map(lambda leaf, target: leaf.shape == target.shape, state, like)
        if not all(jax.tree.leaves(found)):  # Orbax returns the shapes that were saved
            raise UserError(f"The checkpoint of step {step} in {self.directory} is of a network of other sizes.")
        if record["checksum"] != checksum(state):
            raise _Damaged("its arrays are not those that were saved")
        return state, record["meta"]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Tells damage, `_Damaged`, from a system that cannot read just now, a `UserError`; defects pass through."""
        try:
            yield
        except DAMAGE as error:
            if system_error(error) in REASONS:
                raise _Damaged(reason(error)) from error
            raise UserError(
                f"The checkpoint of step {step} in {self.directory} cannot be read now: {reason(error)}. It stays as "
                f"it is; start again when that is mended."
            ) from error

    def restore_best(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Reads (step, merged state, meta) of the readable checkpoint with the lowest validation error, or gives None.

        Warns of those that cannot be read and may be better, and sets them aside, as `restore_latest` does.
        """
        while (step := self.best_step()) is not None:
            self._set_damaged_aside()
            try:
                return step, *self._restore(step, like)
            except _Damaged as error:
                if not self._removed(step):
                    self._set_aside(step, error)
        return None

    def restore_latest(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Reads (merged state, meta) of the newest readable checkpoint; None if there are no checkpoints.

        Warns of newer ones that cannot be read, and sets them aside as STEP.damaged (not with `read_only`).

        Raises:
          UserError: there are checkpoints, but none can be read.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                restored = self._restore(step, like)
            except _Damaged as error:
                if self._removed(step):
                    return self.restore_latest(like)
                damaged[step] = error
                continue
            for newer, error in damaged.items():
                self._set_aside(newer, error)
            self._set_damaged_aside()  # the removal of surplus checkpoints would take them
            if not self._read_only:
                self._remove_surplus()
            return restored
        if damaged:
            cure = ("" if self._read_only else "delete it to start afresh, or ") + "restore it from a copy"
            raise UserError(
                f"No checkpoint in {self.directory} can be read (step {max(damaged)}: {damaged[max(damaged)]}); {cure}."
            )
        return None

    def _set_damaged_aside(self) -> None:
        for step, error in list(self._damaged.items()):
            if not self._removed(step):
                self._set_aside(step, error)

    def _removed(self, step: int) -> bool:
        """Whether the run beside this reader has replaced or removed a step; then the others are listed anew."""
        if not self._read_only or self._path(step).is_dir():
            return False
        self._manager.reload()
        self._read_records()
        return step not in self.steps()

    def _set_aside(self, step: int, error: Exception) -> None:
        if not self._read_only:
            aside = self._path(f"{step}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            self._path(step).rename(aside)
            self._manager.reload()
        self._errors.pop(step, None), self._damaged.pop(step, None)
        print(f"warning: the checkpoint of step {step} cannot be read, another is taken: {error}", file=sys.stderr)

    def _remove_surplus(self) -> None:
        """Removes what should not be kept. A run killed during a save leaves some, and may never save again."""
        steps = self.steps()
        with contextlib.suppress(OSError):  # what cannot be removed stays
            for step in set(steps) - self._kept(steps):
                self._path(step).rename(self._path(f"{step}.surplus"))
        self._tidy()
        self._manager.reload()

    def _kept(self, steps: list[int]) -> set[int]:
        """Which of these steps stay: the latest two and the best."""
        # Orbax would tell the best by a file of metrics, whose damage would block every start.
        return {*steps[-2:], _best({step: self._errors.get(step) for step in steps})}

    def _path(self, name: int | str) -> pathlib.Path:
        return self.directory / str(name)

    def close(self) -> None:
        """Waits for the save under way, and releases the folder."""
        with self._thread, contextlib.closing(self._manager):
            self.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Damaged(Exception):
    """The checkpoint cannot be read; the message says why."""


def checksum(state: Any) -> int:
    """CRC-32 of all arrays of a merged tree, in the tree's order."""
    crc = 0
    for leaf in jax.tree.leaves(state):
        crc = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), crc)
    return crc


def exists(workdir: pathlib.Path) -> bool:
    """Whether a workdir has a complete checkpoint."""
    names = (path.name.removesuffix(".replaced") for path in (workdir / "checkpoints").glob("*"))
    return any(name.isdigit() for name in names)


def _best(errors: dict[int, float | None]) -> int | None:
    """The step with the lowest error; of equal ones the last."""
    measured = {step: error for step, error in errors.items() if error is not None}
    return min(measured, key=lambda step: (measured[step], -step)) if measured else None


def _seal(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
