"""What a run measures and records: the meter, metrics.jsonl, TensorBoard, a progress line, and a trace."""

import concurrent.futures
import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import flax
import jax
import numpy as np
import rich.console
import rich.progress

import parallel
from common.errors import UserError, reason
from datasets import tensorflow
from datasets.progress import printable

# First and last step of a trace, counted from the start: after compilation, and few because a trace is large.
PROFILED = (10, 14)


class Fetcher:
    """Fetches results from the devices in a thread, so that dispatch never waits for them."""

    def __init__(self):
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="fetch")

    def fetch(self, tree: Any) -> concurrent.futures.Future:
        """A future of (the first device's values, the `time.perf_counter()` at which they were ready)."""

        def wait():
            jax.block_until_ready(tree)
            ready = time.perf_counter()
            return parallel.first(tree), ready

        return self._thread.submit(wait)

    def close(self) -> None:
        """Ends the thread without waiting for it: after a failure some steps may never end."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class Meter:
    """Means over the steps since the last reading, and how fast they were.

    Times are passed in. A stretch of steps is timed from the end of its first step on, so that neither compilation nor
    an evaluation counts; `pause` ends a stretch.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._previous = None
        self._reset()

    def _reset(self):
        self._sums, self._steps, self._timed, self._seconds, self._waited = {}, 0, 0, 0.0, 0.0

    def add(self, values: dict[str, float], arrived: float, ready: float) -> None:
        """Counts a step: its metrics, when its batch was there, and when the devices had finished it (seconds)."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._steps += 1
        if self._previous is not None:
            self._timed += 1
            self._seconds += ready - self._previous
            self._waited += max(0.0, arrived - self._previous)
        self._previous = ready

    def pause(self) -> None:
        """Ends a timed stretch."""
        self._previous = None

    def state(self) -> dict[str, Any]:
        """The sums since the last reading, in JSON's types; times are not kept."""
        return {"sums": dict(self._sums), "steps": self._steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on with sums that `state` gave."""
        self._sums, self._steps = dict(state["sums"]), state["steps"]

    def read(self) -> dict[str, float]:
        """The means since the last reading, under `train/`; rates are left out where no step was timed."""
        values = {f"train/{name}": total / self._steps for name, total in self._sums.items()}
        if self._seconds > 0:
            values["train/images_per_second"] = self._timed * self._batch_size / self._seconds
            values["train/input_wait"] = min(1.0, self._waited / self._seconds)
        self._reset()
        return values


class Recorder:
    """Writes the metrics of a run to its workdir, and a progress line to the terminal.

    Args:
      workdir: folder of the run.
      step, evaluated: the step from which the run goes on, and the step of its last evaluation. Later lines of
        metrics.jsonl come from before a crash. The run writes them again, so they are dropped, in TensorBoard as well.
      num_steps: the step at which the run ends.
      active: False in all processes but the first; those write nothing.
    """

    def __init__(self, workdir: pathlib.Path, step: int, evaluated: int, num_steps: int, active: bool = True):
        self.active = active
        if not active:
            return
        from clu import metric_writers  # imports TensorFlow

        self._path = workdir / "metrics.jsonl"
        before = read_lines(self._path)
        lines = [
            line
            for line in before
            if line["step"] <= (evaluated if any(name.startswith("eval/") for name in line) else step)
        ]
        partial = self._path.with_suffix(".tmp")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        partial.replace(self._path)
        if len(lines) < len(before):
            _forget(workdir, step + 1)
        self._file = self._path.open("a")
        self._tensorboard = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))
        self._start = (step, time.monotonic())
        self._console = rich.console.Console()
        self._bar, self._rate = None, ""
        if self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.description}"),
                rich.progress.TimeRemainingColumn(),
                console=self._console,
                speed_estimate_period=120,
            )
            self._task = self._bar.add_task("compiling", total=num_steps, completed=step)
            self._bar.start()
        self._num_steps = num_steps

    def write(self, step: int, epoch: float, values: dict[str, float], details: dict[str, float] | None = None) -> None:
        """Records values at a step: a line of metrics.jsonl, TensorBoard scalars, and a line for the reader.

        `details` are further values, which the line for the reader leaves out.
        """
        if not self.active:
            return
        recorded = values | (details or {})
        finite = {name: value if math.isfinite(value) else None for name, value in recorded.items()}
        with self._explained():
            self._file.write(json.dumps({"step": step, "epoch": round(epoch, 4)} | finite) + "\n")
            self._file.flush()
            self._tensorboard.write_scalars(step, recorded)
        if "train/images_per_second" in values:
            self._rate = f"{values['train/images_per_second']:,.0f} images/s"
        self.say(f"step {step:>6}  epoch {epoch:6.2f}  {describe(values)}{self._left(step)}")

    def show(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Puts images, (N, H, W, 3) uint8 by name, into TensorBoard."""
        if self.active:
            with self._explained():
                self._tensorboard.write_images(step, images)

    def hparams(self, config: dict[str, Any]) -> None:
        """Puts a nested config into TensorBoard's HPARAMS tab, each field by its path; what it cannot take is text."""
        if self.active:
            flat = flax.traverse_util.flatten_dict(config, sep=".")
            texts = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in flat.items()}
            # TensorBoard takes UTF-8, and a folder may have any name.
            fields = {k: printable(v) if isinstance(v, str) else v for k, v in texts.items()}
            with self._explained():
                self._tensorboard.write_hparams(fields)

    def progress(self, step: int) -> None:
        """Moves the progress bar."""
        if self.active and self._bar:
            self._bar.update(self._task, completed=step, description=self._rate)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self.active:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _left(self, step: int) -> str:
        begun, since = self._start
        if self._bar or step <= begun or step >= self._num_steps:
            return ""
        seconds = (time.monotonic() - since) / (step - begun) * (self._num_steps - step)
        minutes, seconds = divmod(round(seconds), 60)
        return f"  {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"

    def close(self) -> None:
        """Ends the progress bar and closes the files."""
        if not self.active:
            return
        if self._bar:
            self._bar.stop()
        with self._file, self._explained():
            self._tensorboard.close()
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except Exception as error:  # clu and TensorFlow raise exceptions of their own for what they cannot write
            raise UserError(
                f"{self._path.parent} cannot take the metrics: {reason(error)}; the run can go on from its last "
                f"checkpoint."
            ) from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Trace:
    """A trace of the steps PROFILED of this process, counted from its first, for XProf.

    Args:
      workdir: where it goes, into plugins/profile.
      step: the step from which the run goes on.
      say: prints a line.
    """

    def __init__(self, workdir: pathlib.Path, step: int, say: Callable[[str], None]):
        self._workdir, self._say = workdir, say
        self._first, self._last = (step + number for number in PROFILED)
        self._under_way, self._done = False, False

    def due(self, step: int) -> bool:
        """Whether it begins or ends before this step: a moment at which no other step should be under way."""
        return step in (self._first, self._last + 1)

    def before(self, step: int) -> None:
        """Begins or ends the trace if that is due before this step."""
        if step == self._first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of Python would hide the steps, and take a minute to write
            jax.profiler.start_trace(str(self._workdir), profiler_options=options)
            self._under_way = True
        elif self._under_way and step > self._last:
            self._end(self._last)

    def close(self, step: int) -> None:
        """Ends a trace under way; `step` is the last of this process."""
        if self._under_way:
            self._end(step)
        elif not self._done:
            self._say(f"No trace: --profile begins with step {self._first}, and this ended after step {step}.")

    def _end(self, last: int) -> None:
        jax.profiler.stop_trace()
        self._under_way, self._done = False, True
        self._say(
            f"Trace of steps {self._first} to {last}: {self._workdir / 'plugins/profile'}; to look at it, "
            f"`pip install xprof` and `xprof --logdir={self._workdir}`."
        )


def _forget(workdir: pathlib.Path, step: int) -> None:
    """Writes a file of events that tells TensorBoard to drop what it has from `step` on.

    It is read after the files of earlier starts and before the one that the summary writer begins now, because
    TensorBoard sorts them by name.
    """
    tf = tensorflow()
    start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
    again = {"step": step, "session_log": start}  # twice, because the first that TensorBoard sees drops nothing
    events = {"file_version": "brain.Event:2"}, again, again
    now = time.time()
    with tf.io.TFRecordWriter(str(workdir / f"events.out.tfevents.{int(now)}")) as file:
        for event in events:
            file.write(tf.compat.v1.Event(wall_time=now, **event).SerializeToString())


def read_lines(path: str | pathlib.Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, {name: number or None}. Skips malformed lines; a missing file gives []."""
    path = pathlib.Path(path)
    objects = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if _is_line(values):
                objects.append(values)
    return objects


def _is_line(values: Any) -> bool:
    def is_number(value):
        return isinstance(value, int | float) and math.isfinite(value)

    return (
        isinstance(values, dict)
        and isinstance(values.get("step"), int)
        and is_number(values.get("epoch"))
        and all(value is None or is_number(value) for value in values.values())
    )


def describe(values: dict[str, float]) -> str:
    """Metrics for a reader: errors and fractions in per cent."""
    parts = []
    for key, value in values.items():
        group, _, name = key.partition("/")
        label = name.replace("_", " ") if group == "train" else f"{group} {name.replace('_', ' ')}"
        if name.endswith(("error", "accuracy", "wait")):
            parts.append(f"{label} {value:.1%}")
        elif name == "images_per_second":
            parts.append(f"{value:,.0f} images/s")
        else:
            parts.append(f"{label} {value}" if isinstance(value, int) else f"{label} {value:.4g}")
    return "  ".join(parts)
