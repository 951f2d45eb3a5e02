"""Training: the loop, and the parts of which it is made."""

import collections
import json
import math
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np

import evaluate
import input_pipeline
import models
import optimizer
import parallel
import update
import views
from common import exits
from common.errors import UserError
from drawing import grids
from run import metrics, processes, report, setup, workdirs


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path, *, profile: bool = False) -> int:
    """Trains, or continues, the run of `config` in `workdir`; `profile` adds a trace, see `metrics.Trace`.

    Returns:
      The exit code: 0 when the run is complete, or that of a signal that ended it, with its state saved; see `exits`.

    Raises:
      UserError: see `setup.set_up`; also a loss that is not finite, a full disk, another process that has ended.
    """
    signals = exits.StopSignal()
    with (
        processes.company() as watch,
        setup.set_up(config, workdir) as run,
        Trainer(run, processes.Stop(signals, watch), profile) as trainer,
        signals,
    ):
        steps = run.durations
        trainer.recorder.say(report.greeting(run, trainer.step, bool(run.known)))
        try:
            if run.known and steps.due(steps.eval_every, trainer.step) and trainer.evaluated < trainer.step:
                trainer.evaluate_and_save()  # a signal came between this step and the end of its evaluation
            batches = trainer.train_batches()
            while trainer.step < steps.num_steps:
                trainer.advance(next(batches))
                if steps.due(steps.log_every, trainer.step):
                    trainer.log()
                trainer.stop.check()
                if steps.due(steps.eval_every, trainer.step):
                    trainer.evaluate_and_save()
                elif steps.due(steps.checkpoint_every, trainer.step):
                    trainer.save()
            trainer.finish()
        except exits.Stopped as stopped:
            trainer.save_and_stop(stopped.code)
            return stopped.code
    return 0


def visible(batch: dict[str, np.ndarray], mean_image: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """What the network sees of a batch of `input_pipeline.train_batches`, unmixed, as (N, crop, crop, 3) uint8 pixels.

    Without lighting these are the pixels of the views; with it, they are its shift and gain about the mean image.
    """
    seen = views.to_input(batch["image"], mean_image, factor, batch["shift"], batch["gain"])
    pixels = np.asarray(seen) / factor + views.center(mean_image, seen.shape[1])
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


class Trainer:
    """What the loop calls, and the state that changes while it runs.

    Every process of a run makes one, and calls the same methods in the same order.

    Args:
      run: the run, set up.
      stop: says when to stop; checked after everything that is dispatched to the devices.
      profile: whether the first process traces a few steps.

    Attributes:
      state: the sharded state.
      step: the number of updates dispatched.
      evaluated: the step of the last evaluation.
      plateau: what the plateau rule knows of the validation error.
    """

    def __init__(self, run: setup.Run, stop: processes.Stop, profile: bool = False):
        self.run, self.stop = run, stop
        self.step = self._saved = int(run.state.step)
        # Half a gigabyte on the host would otherwise stay for the whole run.
        self.state, run.state = run.layout.shard(run.state), None
        self.evaluated, self.plateau = 0, optimizer.Plateau()
        self._meter = metrics.Meter(run.config.batch_size)
        if run.known:
            self.evaluated, self.plateau = run.known["evaluated"], optimizer.Plateau(**run.known["plateau"])
            self._meter.restore(run.known["meter"])
        self._train_step = update.build_step(run.config, run.layout, run.records.mean_image, run.rates)
        self._weigh = update.build_weigh(run.layout)
        self._schedule = optimizer.schedule(run.config, run.durations.steps_per_epoch)
        self._evaluators = {}
        self._under_way = collections.deque()
        is_first = jax.process_index() == 0
        self.recorder = metrics.Recorder(run.workdir, self.step, self.evaluated, run.durations.num_steps, is_first)
        self._fetcher = metrics.Fetcher()
        self._trace = metrics.Trace(run.workdir, self.step, self.recorder.say) if profile and is_first else None
        self._first_layer = models.layer_table(run.config.model, run.config.input.crop)[0].name
        self._batch = self._measured = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._fetcher.close()
        if self._trace:
            self._trace.close(self.step)
        self.recorder.close()

    @property
    def epoch(self) -> float:
        """Passes over the training split so far."""
        return self.step / self.run.durations.steps_per_epoch

    def train_batches(self):
        """Batches of the training split on the devices, from the present step on."""
        config = self.run.config
        batches = input_pipeline.train_batches(
            self.run.records,
            config.dataset.train_split,
            options=config.input,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=self.step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=config.input.threads or None,
        )
        return self.run.layout.prefetch(batches)

    def advance(self, batch: Any) -> None:
        """Dispatches one update, at most one step ahead of the devices."""
        arrived = time.perf_counter()
        if self._trace and self._trace.due(self.step + 1):
            self.settle()
            self._trace.before(self.step + 1)
        self.settle(at_most=parallel.UNDER_WAY)
        measure = self.run.durations.due(self.run.durations.log_every, self.step + 1)
        self.state, values, self._measured = self._train_step(
            self.state, batch, np.float32(self._rate_factor()), np.bool_(measure)
        )
        self.step, self._batch = self.step + 1, batch
        self._under_way.append((self.step, arrived, self._fetcher.fetch(values)))

    def settle(self, at_most: int = 0) -> None:
        """Waits until no more than `at_most` steps are under way, and takes in the metrics of the others."""
        while len(self._under_way) > at_most:
            step, arrived, future = self._under_way.popleft()
            values, ready = future.result()
            if not math.isfinite(values["loss"]):
                raise self._diverged(f"The loss of step {step} is {values['loss']}")
            self._meter.add(values, arrived, ready)
            self.recorder.progress(step)

    def _rate_factor(self) -> float:
        return self.plateau.rate_factor(self.run.config.schedule)

    def _diverged(self, what: str) -> UserError:
        rate, factor = self.run.config.optimizer.learning_rate, self._rate_factor()
        return UserError(
            f"{what}, with optimizer.learning_rate={rate:g}{f' × {factor:g}' if factor < 1 else ''}. Nothing of it was "
            f"saved; try a third of the rate, --config.optimizer.learning_rate={rate / 3:.2g}, in a new workdir."
        )

    def log(self) -> None:
        """Records the training metrics since the last time, and what was measured of the last step alone."""
        self.settle()
        # A scheduled rate is a function of the number of updates before the step.
        rate = np.float32(self._schedule(self.step - 1)) * np.float32(self._rate_factor())
        measured = self.run.layout.of_network(self._measured | self._weigh(self.state))
        details = {f"train/{name}": value for name, value in update.measurements(measured).items()}
        self.recorder.write(self.step, self.epoch, self._meter.read() | {"train/learning_rate": float(rate)}, details)

    def errors(self, params: Any, split: str, which: str, step: int) -> dict[str, float]:
        """Errors of sharded parameters, those of `step`, on a split; `which` views: 'centre' or 'ten'."""
        run, config = self.run, self.run.config
        if which not in self._evaluators:
            network = update.build_network(config, run.layout)
            self._evaluators[which] = evaluate.build(network, run.layout, run.records.mean_image, config.input, which)
        batches = input_pipeline.eval_batches(
            run.records,
            split,
            batch_size=-(-config.eval_batch_size // run.layout.size) * run.layout.size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=config.input.threads or None,
        )
        values = evaluate.run(self._evaluators[which], params, batches, run.layout, after_batch=self.stop.check)
        if not all(map(math.isfinite, values.values())):
            raise self._diverged(f"The evaluation loss of step {step} is {values['loss']}")
        return values

    def pictures(self) -> dict[str, np.ndarray]:
        """The kernels of the first layer, and some inputs of the last training batch as the network saw them,
        but not yet mixed by mixup.

        Returns:
          {name: (N, H, W, 3) uint8}; without inputs before the first step of this process.
        """
        config, layout, first = self.run.config, self.run.layout, self._first_layer
        kernel = layout.merge(self.state.evaluated[first]["kernel"], self.run.shapes.params[first]["kernel"])
        found = {f"kernels/{first}": grids.stack(grids.kernels(kernel, config.model.towers))[None]}
        if self._batch:
            rows = {name: np.concatenate(parallel.addressable(leaf))[:8] for name, leaf in self._batch.items()}
            found["inputs"] = visible(rows, self.run.records.mean_image, views.factors(config.input))
        return found

    def evaluate_and_save(self) -> None:
        """Evaluates the centre view, tells the plateau rule, and saves if that is due or the error is a new best."""
        self.settle()
        values = self.errors(self.state.evaluated, self.run.config.dataset.eval_split, "centre", self.step)
        self.recorder.write(self.step, self.epoch, {f"eval/{name}": value for name, value in values.items()})
        if self.recorder.active:
            self.recorder.show(self.step, self.pictures())
        error, durations = values["top1_error"], self.run.durations
        best = error < self.plateau.best
        if durations.eval_every and self.step % durations.eval_every == 0:
            # A last evaluation off the cadence does not count, so that an extended run has the same rates.
            self.plateau = self.plateau.after(error, self.run.config.schedule)
        self.evaluated = self.step
        if best or durations.due(durations.checkpoint_every, self.step):
            self.save(error)
        self._meter.pause()

    def save(self, error: float | None = None) -> None:
        """Begins to save the present state; `error` is its validation error, if measured."""
        self.settle()
        run = self.run
        if drifted := run.layout.drifted(self.state):
            raise UserError(
                f"After step {self.step} the replicas of the network are not the same in {', '.join(drifted[:3])}"
                f"{' …' if len(drifted) > 3 else ''}: a device computes wrongly. Nothing of it was saved."
            )
        if run.checkpoints:
            state = run.layout.merge(self.state, run.shapes)
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
                raise self._diverged(f"Parameters are not finite after step {self.step}")
            known = {"plateau": self.plateau._asdict(), "evaluated": self.evaluated, "meter": self._meter.state()}
            about = {
                "config": workdirs.to_json(run.config),
                "classes": workdirs.classes_checksum(run.records),
                "examples": run.records.num_examples(run.config.dataset.train_split),
            }
            run.checkpoints.save(self.step, state, about | known, error)
        self._saved = self.step
        self._meter.pause()

    def save_and_stop(self, code: int) -> None:
        """Saves the present state unless that was done, and says so; `code` is the exit code."""
        self.settle()
        if self._saved < self.step:
            self.save()
        if self.run.checkpoints:
            self.run.checkpoints.wait()
        processes.gather_text("saved")  # no process says so before it is true
        name = next(number.name for number, known in exits.SIGNALS.items() if known == code)
        self.recorder.say(f"Stopped by {name}: step {self.step} is saved, and the same command goes on from there.")

    def finish(self) -> None:
        """Ends the run: the errors of the best checkpoint, unless that was done, and what to do next."""
        run = self.run
        tested, best, state = {}, self.step, None
        if run.checkpoints:
            run.checkpoints.wait()
            for line in metrics.read_lines(run.workdir / "metrics.jsonl"):
                found = {name: value for name, value in line.items() if name.startswith("test/")}
                # A value that was not finite is stored as None, by earlier versions.
                if line["step"] == self.step and found and None not in found.values():
                    tested = found
            if not tested and run.checkpoints.best_step() not in (None, self.step):
                best, state, _ = run.checkpoints.restore_best(run.shapes) or (self.step, None, None)
        values, best = json.loads(processes.gather_text(json.dumps((tested, best)))[0])
        if not values:
            params = self.state.evaluated
            if best != self.step:
                params = run.layout.shard(processes.from_first((state or setup.blank(run.shapes)).evaluated))
            split = workdirs.test_split(run.config)
            ten, centre = (self.errors(params, split, which, best) for which in ("ten", "centre"))
            values = {f"test/{name}": value for name, value in ten.items()} | {"test/step": best}
            values |= {f"test/centre_{name}": value for name, value in centre.items()}
            self.recorder.write(self.step, self.epoch, values)
            self.recorder.hparams(run.config.to_dict())
        self.recorder.say(report.farewell(run, self.step, values))


if __name__ == "__main__":
    exits.fail("This file is no command; `python main.py --config=FILE --workdir=FOLDER` trains.")
