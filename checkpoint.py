"""Checkpoints: what a run needs to go on, written by Orbax in the background.

A checkpoint holds the merged state (see `parallel`), so that it is the same whatever devices wrote it, and a record
`meta` in JSON: the config, what the loop knows besides the state, and the versions that wrote it. Nothing is pickled.
"""

import importlib.metadata
import pathlib
import sys
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
    """

    def __init__(self, workdir: str | pathlib.Path, read_only: bool = False):
        self.directory = pathlib.Path(workdir).resolve() / "checkpoints"
        if read_only and not self.directory.is_dir():
            raise UserError(f"{workdir} holds no checkpoints; --workdir names the folder of a run of main.py.")
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
                create=not read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )

    def save(self, step: int, state: Any, meta: dict[str, Any], error: float | None = None) -> None:
        """Begins to save; returns once the arrays are copied.

        Args:
          step: the number of updates done.
          state: merged tree of NumPy arrays, which must not be changed afterwards.
          meta: JSON values.
          error: validation error of this very state, if it was measured.
        """
        if step in self.steps():
            self._manager.delete(step)  # the same state, saved before it was evaluated
        meta = meta | {"versions": {name: importlib.metadata.version(name) for name in VERSIONS}}
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
            metrics=None if error is None else {"error": float(error)},
            force=True,
        )

    def wait(self) -> None:
        """Returns when what was begun is on disk; raises what went wrong."""
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """The steps that can be restored, in order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the lowest validation error, if any was measured."""
        return self._manager.best_step()

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads (merged state, meta) of a step; `like` gives the structure, shapes and types that are expected.

        Raises:
          UserError: the shapes are others; a damaged folder raises whatever Orbax makes of it.
        """
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
        )
        found = jax.tree.map(lambda leaf, target: leaf.shape == target.shape, restored["state"], like)
        if not all(jax.tree.leaves(found)):  # Orbax goes by what was saved
            raise UserError(f"The checkpoint of step {step} in {self.directory} is of a network of other sizes.")
        return restored["state"], restored["meta"]

    def restore_latest(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole, or None where there is none.

        Raises:
          UserError: there are checkpoints, but none of them can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.restore(step, like)
            except UserError:
                raise
            except Exception as error:  # Orbax raises anything on a damaged folder
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                print(
                    f"warning: the checkpoint of step {step} cannot be read, it is passed over: {reason}",
                    file=sys.stderr,
                )
        if steps:
            raise UserError(
                f"No checkpoint in {self.directory} can be read (steps {', '.join(map(str, steps))}); "
                f"delete the folder to start afresh, or restore it from a copy."
            )
        return None

    def close(self) -> None:
        """Waits for saves under way and lets go of the folder."""
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _error(metrics: dict[str, float]) -> float:
    return metrics["error"]
