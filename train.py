"""Training: a run in its workdir, the loop over steps, and what is refused before it begins."""

import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import checkpoint
import evaluate
import input_pipeline
import metrics
import models
import optimizer
import parallel
import processes
import update
import workdirs
from configs import alexnet
from errors import UserError, check_ranges, check_type, nearest, shown

# Updates are counted in an int32.
MAX_STEPS = (1 << 31) - 1


@dataclasses.dataclass(frozen=True)
class Durations:
    """A config's durations in steps; 0 is never."""

    steps_per_epoch: float
    num_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int

    @classmethod
    def of(cls, config, num_examples: int) -> "Durations":
        """Converts the epochs of `config` for a training split of `num_examples`.

        Raises:
          UserError: more steps than can be counted.
        """
        steps_per_epoch = num_examples / config.batch_size

        def steps(count, epochs, field):
            found = count or (max(1, round(epochs * steps_per_epoch)) if epochs else 0)
            if found > MAX_STEPS:
                raise UserError(
                    f"{field}={epochs} makes {found:,} steps of batch_size={config.batch_size}; at most {MAX_STEPS:,} "
                    f"can be counted."
                )
            return found

        every = {
            name: steps(config[name].steps, config[name].epochs, f"{name}.epochs")
            for name in ("log_every", "eval_every", "checkpoint_every")
        }
        return cls(steps_per_epoch, steps(config.num_steps, config.num_epochs, "num_epochs"), **every)

    def due(self, every: int, step: int) -> bool:
        """Whether what happens every `every` steps happens after update number `step`; the last always counts."""
        return step == self.num_steps or (every > 0 and step % every == 0)


def state_shapes(config) -> update.State:
    """The merged state's shapes and types, without computing anything.

    Raises:
      UserError: the config, which may be one read from a workdir, cannot work.
    """
    validate(config)
    rule = optimizer.build(config.optimizer, optimizer.Rates(config.optimizer, config.schedule, 1.0))
    return jax.eval_shape(lambda: update.init_state(config, rule))


class Run:
    """A run in its workdir: what the loop uses, set up or restored, and the parts of the loop.

    Every process of a run makes one, and calls the same methods in the same order. The first process alone reads and
    writes the workdir; the others begin with what it tells them.

    Args:
      signals: notes the signals of this process; see `stop_if_asked`.

    Raises:
      UserError: whatever in the config, the data or the workdir cannot work, in any of the processes.
    """

    def __init__(self, config, workdir: str | pathlib.Path, signals: "StopSignal"):
        self.config, self.workdir = config, workdirs.expanded(workdir)
        self._signals, self._agreed = signals, 0
        self._is_first = jax.process_index() == 0
        validate(config)
        self.layout = parallel.Layout(
            config.parallel.devices_per_network, towers=config.model.towers, batch_size=config.batch_size
        )
        if self._is_first:
            workdirs.check(config, self.workdir)
        self._shapes = state_shapes(config)
        check_memory(config, self._shapes, jax.process_count())
        self.records = input_pipeline.open_records(config.dataset, config.input, warn=self._is_first)
        if self.records.num_classes != config.model.num_classes:
            raise UserError(
                f"model.num_classes={config.model.num_classes}, but {config.dataset.name} has "
                f"{self.records.num_classes} classes; use --config.model.num_classes={self.records.num_classes}."
            )
        self.durations = Durations.of(config, self.records.num_examples(config.dataset.train_split))
        rates = optimizer.Rates(config.optimizer, config.schedule, self.durations.steps_per_epoch)
        rates.tree(self._shapes.params, 0)  # refuses layers that the network does not have
        self._compare_processes()
        rule = optimizer.build(config.optimizer, rates)
        self._train_step = update.build_step(config, self.layout, rule, self.records.mean_image)
        self._evaluators = {}
        self._meter = metrics.Meter(config.batch_size)
        self.plateau, self.evaluated, self.resumed = optimizer.Plateau(), 0, False

        state, known = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._shapes), {}
        if self._is_first:
            state, known = self._open(rule)
        known = json.loads(processes.gather_text(json.dumps(known))[0])
        if known:
            self.resumed = True
            self.plateau, self.evaluated = optimizer.Plateau(**known["plateau"]), known["evaluated"]
            self._meter.restore(known["meter"])
        state = processes.from_first(state)
        self.step = self._saved = int(state.step)
        self.state = self.layout.shard(state)

        self.recorder = metrics.Recorder(
            self.workdir, self.step, self.evaluated, self.durations.num_steps, self._is_first
        )
        self._fetcher = parallel.Fetcher()
        self._under_way = collections.deque()

    def _compare_processes(self) -> None:
        """Refuses processes with other configs or other data than the first one's, in all of them."""
        dataset = self.config.dataset
        mine = {
            "config": workdirs.to_json(self.config),
            "data": {
                "examples": [self.records.num_examples(split) for split in (dataset.train_split, dataset.eval_split)],
                "classes": self.records.class_names,
                "statistics": checkpoint.checksum([self.records.mean_image, self.records.principal_std]),
            },
        }
        first, *others = map(json.loads, processes.gather_text(json.dumps(mine)))
        for number, other in enumerate(others, 1):
            # Where the data lie is a machine's own concern.
            own = ("config.dataset.name", "config.dataset.data_dir", "config.input.threads")
            if differ := workdirs.differences(first, other, own, ("in process 0", f"in process {number}")):
                raise UserError(f"All processes of a run need the same config and data. Different: {differ}.")

    def _open(self, rule: optax.GradientTransformation) -> tuple[update.State, dict[str, Any]]:
        """Opens the workdir; the merged state to begin with, and what a checkpoint knows besides ({} without one)."""
        # Before anything is written, for it may not be there; a run with a checkpoint of its own no longer needs it.
        begun = checkpoint.exists(self.workdir)
        taken_over = pretrained(self.config, self._shapes) if self.config.init_from and not begun else {}

        self._lock = workdirs.lock(self.workdir)
        workdirs.write_config(self.config, self.workdir)
        self.checkpoints = checkpoint.Checkpoints(self.workdir)
        if restored := self.checkpoints.restore_latest(self._shapes):
            return restored
        state = jax.device_get(update.init_state(self.config, rule))
        params = flax.traverse_util.flatten_dict(state.params)
        if taken_over:
            new = sorted("/".join(path) for path in params.keys() - taken_over.keys())
            print(f"From {self.config.init_from}: all parameters" + (f" but {', '.join(new)}." if new else "."))
        params |= taken_over
        return state.replace(params=flax.traverse_util.unflatten_dict(params)), {}

    @property
    def epoch(self) -> float:
        """Passes over the training split so far."""
        return self.step / self.durations.steps_per_epoch

    def train_batches(self):
        """Batches of the training split on the devices, from the present step on."""
        batches = input_pipeline.train_batches(
            self.records,
            self.config.dataset.train_split,
            input=self.config.input,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=self.step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=self.config.input.threads or None,
        )
        return self.layout.prefetch(batches)

    def advance(self, batch: Any) -> None:
        """Dispatches one update, at most one step ahead of the devices."""
        arrived = time.perf_counter()
        self.settle(at_most=1)
        rate_factor = np.float32(self.plateau.rate_factor(self.config.schedule))
        self.state, values = self._train_step(self.state, batch, rate_factor, np.float32(self._signals.code))
        self.step += 1
        self._under_way.append((self.step, arrived, self._fetcher.fetch(values)))

    def settle(self, at_most: int = 0) -> None:
        """Waits until no more than `at_most` steps are under way, and takes in the metrics of the others."""
        while len(self._under_way) > at_most:
            step, arrived, future = self._under_way.popleft()
            values, ready = future.result()
            self._agreed = max(self._agreed, int(values.pop("stop")))
            if not math.isfinite(values["loss"]):
                raise self._diverged(f"The loss of step {step} is {values['loss']}")
            self._meter.add(values, arrived, ready)
            self.recorder.progress(step)

    def _diverged(self, what: str) -> UserError:
        rate = self.config.optimizer.learning_rate
        factor = self.plateau.rate_factor(self.config.schedule)
        return UserError(
            f"{what}, with optimizer.learning_rate={rate:g}{f' × {factor:g}' if factor < 1 else ''}. Nothing of it was "
            f"saved; try a third of the rate, --config.optimizer.learning_rate={rate / 3:.2g}, in a new workdir."
        )

    def stop_if_asked(self) -> None:
        """Raises `Stopped` where a signal came: in a process by itself at once, and of several processes in all of
        them after the same step, which is at most two steps later.
        """
        code = self._signals.code if jax.process_count() == 1 else self._agreed
        if code:
            raise evaluate.Stopped(code)

    def log(self) -> None:
        """Records the training metrics since the last time."""
        self.settle()
        self.recorder.write(self.step, self.epoch, self._meter.read())

    def evaluate(self, params: Any, views: str) -> dict[str, float]:
        """Errors of sharded parameters on the evaluation split; see `evaluate.run`, also for what it raises."""
        if views not in self._evaluators:
            network = update.build_network(self.config, self.layout)
            self._evaluators[views] = evaluate.build(
                network, self.layout, self.records.mean_image, self.config.input, views
            )
        batches = input_pipeline.eval_batches(
            self.records,
            self.config.dataset.eval_split,
            batch_size=-(-self.config.eval_batch_size // self.layout.size) * self.layout.size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return evaluate.run(self._evaluators[views], params, batches, self.layout, lambda: self._signals.code)

    def evaluate_and_save(self) -> None:
        """Evaluates the centre view, tells the plateau rule, and saves if that is due or the error is a new best."""
        self.settle()
        values = self.evaluate(self.state.params, "centre")
        if not math.isfinite(values["loss"]):
            raise self._diverged(f"The evaluation loss of step {self.step} is {values['loss']}")
        self.recorder.write(self.step, self.epoch, {f"eval/{name}": value for name, value in values.items()})
        error = values["top1_error"]
        best = error < self.plateau.best
        if self.durations.eval_every and self.step % self.durations.eval_every == 0:
            # A last evaluation off the cadence does not count, so that an extended run has the same rates.
            self.plateau = self.plateau.after(error, self.config.schedule)
        self.evaluated = self.step
        if best or self.durations.due(self.durations.checkpoint_every, self.step):
            self.save(error)
        self._meter.pause()

    def save(self, error: float | None = None) -> None:
        """Begins to save the present state; `error` is its validation error, if measured."""
        self.settle()
        if drifted := self.layout.drifted(self.state):
            raise UserError(
                f"After step {self.step} the replicas of the network are not the same in {', '.join(drifted[:3])}"
                f"{' …' if len(drifted) > 3 else ''}: a device computes wrongly. Nothing of it was saved."
            )
        if self._is_first:
            state = self.layout.merge(self.state, self._shapes)
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
                raise self._diverged(f"Parameters are not finite after step {self.step}")
            meta = {
                "config": workdirs.to_json(self.config),
                "plateau": self.plateau._asdict(),
                "evaluated": self.evaluated,
                "meter": self._meter.state(),
            }
            self.checkpoints.save(self.step, state, meta, error)
        self._saved = self.step
        self._meter.pause()

    def stop(self, code: int) -> None:
        """Saves the present state, if that was not done, and says so; `code` is the exit code."""
        self.settle()
        if self._saved < self.step:
            self.save()
        if self._is_first:
            self.checkpoints.wait()
        processes.gather_text("saved")  # so that no process says so before it is
        name = next(signals.name for signals in StopSignal.CODES if StopSignal.CODES[signals] == code)
        self.recorder.say(f"Stopped by {name}: step {self.step} is saved, and the same command goes on from there.")

    def finish(self) -> None:
        """Ends the run: ten views of the best checkpoint, and what to do next."""
        tested, best, state = {}, self.step, None
        if self._is_first:
            self.checkpoints.wait()
            for line in metrics.read_lines(self.workdir / "metrics.jsonl"):
                if line["step"] == self.step and "test/top1_error" in line:
                    tested = {name: value for name, value in line.items() if name.startswith("test/")}
            if not tested and self.checkpoints.best_step() not in (None, self.step):
                best, state = self.checkpoints.restore_best(self._shapes) or (self.step, None)
        values, best = json.loads(processes.gather_text(json.dumps((tested, best)))[0])
        if not values:
            params = self.state.params
            if best != self.step:
                if state is None:
                    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._shapes)
                params = self.layout.shard(processes.from_first(state.params))
            values = {f"test/{name}": value for name, value in self.evaluate(params, "ten").items()}
            values["test/step"] = best
            self.recorder.write(self.step, self.epoch, values)
        doubled = f"num_steps={2 * self.step}" if self.config.num_steps else f"num_epochs={2 * self.epoch:.0f}"
        tensorboard = pathlib.Path(sys.executable).with_name("tensorboard")
        self.recorder.say(
            f"""
Done: {self.step} steps, {self.epoch:.1f} epochs. Ten views, with the best checkpoint (step {values["test/step"]}):
top-1 error {values["test/top1_error"]:.2%}, top-5 error {values["test/top5_error"]:.2%}, \
mean class accuracy {values["test/mean_class_accuracy"]:.2%}.

metrics           {self.workdir / "metrics.jsonl"}
checkpoints       {self.workdir / "checkpoints"}
TensorBoard logs  {self.workdir}
to look at them   {tensorboard} --logdir={self.workdir}
to train further  the same command with --config.{doubled}"""
        )

    def greeting(self) -> str:
        """What is about to happen, in a few lines."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self._shapes.params))
        verb = f"Continuing after step {self.step}" if self.resumed else "Training"
        dataset, num_steps = self.config.dataset, self.durations.num_steps
        images = self.records.num_examples(dataset.train_split)
        return (
            f"{verb}: {self.config.model.name} with {count:,} parameters on {dataset.name}, {images:,} training images "
            f"of {self.records.num_classes} classes, to step {num_steps} "
            f"({num_steps / self.durations.steps_per_epoch:.1f} epochs)."
            f"\nDevices: {self.layout}."
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._fetcher.close()
            self.recorder.close()
        finally:
            if self._is_first:
                self.checkpoints.close()
                self._lock.close()


class StopSignal:
    """Notes SIGINT and SIGTERM, for the loop to save and end; a second SIGINT ends at once.

    Attributes:
      code: the exit code to end with, or 0.
    """

    CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # noqa: RUF012 -- a constant

    def __init__(self):
        self.code = 0

    def _note(self, number, _):
        if number == signal.SIGINT and self.code == self.CODES[signal.SIGINT]:
            raise KeyboardInterrupt
        self.code = self.CODES[number]
        print(f"{signal.Signals(number).name}: saving after this step.", file=sys.stderr, flush=True)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.CODES}
        return self

    def __exit__(self, *_):
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> int:
    """Trains, or continues, the run of `config` in `workdir`.

    Returns:
      The exit code: 0 when the run is complete, 130 or 143 when SIGINT or SIGTERM ended it with its state saved.

    Raises:
      UserError: see `Run`; also a loss that is not finite, a disk that is full, another process that has ended.
    """
    signals = StopSignal()
    with processes.company(), Run(config, workdir, signals) as run, signals:
        steps = run.durations
        run.recorder.say(run.greeting())
        try:
            if run.resumed and steps.due(steps.eval_every, run.step) and run.evaluated < run.step:
                run.evaluate_and_save()  # a signal had come between the step and the end of its evaluation
            batches = run.train_batches()
            while run.step < steps.num_steps:
                run.advance(next(batches))
                if steps.due(steps.log_every, run.step):
                    run.log()
                run.stop_if_asked()
                if steps.due(steps.eval_every, run.step):
                    run.evaluate_and_save()
                elif steps.due(steps.checkpoint_every, run.step):
                    run.save()
            run.finish()
        except evaluate.Stopped as stopped:
            run.stop(stopped.code)
            return stopped.code
    return 0


def validate(config) -> None:
    """Refuses a config that cannot work, before anything is read or written; raises `UserError`."""
    _check_fields(config, alexnet.get_config())
    bounds = {
        "batch_size": (1, 1 << 20),
        "eval_batch_size": (1, 1 << 20),
        "num_epochs": (0, 1e6),
        "num_steps": (0, MAX_STEPS),
        "seed": (0, (1 << 31) - 1),
    }
    check_ranges(config, bounds)
    if not config.num_steps and not config.num_epochs:
        raise UserError("num_epochs and num_steps are both 0; one of them must say how long to train.")
    for field in ("log_every", "eval_every", "checkpoint_every"):
        check_ranges(config[field], {"epochs": (0, 1e6), "steps": (0, MAX_STEPS)}, f"{field}.")
    check_ranges(config.parallel, {"devices_per_network": (0, 2)}, "parallel.")
    input_pipeline.validate(config.input)
    input_pipeline.validate_dataset(config.dataset)
    models.build(config.model, None, config.input.crop)
    optimizer.validate(config)


def _check_fields(config, like, section: str = "") -> None:
    """Refuses a config that lacks a field of `like`, or has others, or other types in them; raises `UserError`."""
    # A network has fields of its own, which `models.build` checks; these three all have.
    names = ("name", "num_classes", "towers") if section == "model." else tuple(like)
    if section != "model." and (unknown := sorted(set(config) - set(names))):
        raise UserError(f"The config's {section}{unknown[0]} is no field that is known: {nearest(unknown[0], names)}")
    for name in names:
        field, default = section + name, like[name]
        if name not in config:
            raise UserError(f"The config has no field {field}; configs/alexnet.py has all that there are.")
        if not isinstance(default, ml_collections.ConfigDict):
            check_type(field, config[name], default)
        elif isinstance(config[name], ml_collections.ConfigDict):
            _check_fields(config[name], default, f"{field}.")
        else:
            raise UserError(f"{field}={shown(config[name])} must be a section with the fields {', '.join(default)}.")


def check_memory(config, shapes: update.State, processes: int = 1) -> None:
    """Refuses a run that this machine's memory cannot hold, before anything of it is allocated; raises `UserError`.

    Counted is what one of `processes` hosts holds at least: the state and its gradients, and of either kind of batch
    one in use and one in preparation. Where the devices are the CPU, images in training come with their maps.
    """
    crop, resize = config.input.crop, config.input.resize
    per_view, per_record = 2 * 3 * crop**2, 2 * 3 * resize**2

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    if jax.default_backend() == "cpu":
        apply = functools.partial(
            update.build_network(config).apply, capture_intermediates=True, mutable=["intermediates"]
        )
        image = jax.ShapeDtypeStruct((1, crop, crop, 3), jnp.float32)
        per_view += size(jax.eval_shape(apply, {"params": shapes.params}, image)[1])
    fields = [f for f in ("width", "features", "num_classes", "pool_stride") if f in config.model]
    network = ", ".join(f"model.{field}={shown(config.model[field])}" for field in fields)
    needs = (
        (size(shapes) + size(shapes.params), f"the network, its velocity and gradients ({network}, input.crop={crop})"),
        (
            -(-config.batch_size // processes) * per_view,
            f"training (batch_size={config.batch_size}, input.crop={crop})",
        ),
        (
            -(-config.eval_batch_size // processes) * per_record,
            f"evaluation (eval_batch_size={config.eval_batch_size}, input.resize={resize})",
        ),
    )
    total, memory = sum(need for need, _ in needs), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if total > memory:
        most, what = max(needs)
        raise UserError(
            f"The run needs at least {total / 1e9:,.1f} GB of memory, and this machine has {memory / 1e9:,.1f} GB; "
            f"{most / 1e9:,.1f} GB are for {what}."
        )


def pretrained(config, shapes: update.State) -> dict[tuple[str, ...], np.ndarray]:
    """The parameters of the workdir `config.init_from` that have the shapes of this network's, by path.

    Raises:
      UserError: it is no workdir, or nothing in it fits.
    """
    origin = workdirs.expanded(config.init_from, "init_from")
    try:
        theirs = state_shapes(workdirs.read_config(origin))
    except UserError as error:
        raise UserError(f"init_from={shown(config.init_from)}: {error}") from None
    with checkpoint.Checkpoints(origin, read_only=True) as checkpoints:
        best = checkpoints.best_step()
        restored = checkpoints.restore_latest(theirs) if best is None else checkpoints.restore(best, theirs)
    if not restored:
        raise UserError(f"init_from={config.init_from} has no checkpoint yet.")
    mine = flax.traverse_util.flatten_dict(shapes.params)
    source = flax.traverse_util.flatten_dict(restored[0].params)
    fitting = {path: leaf for path, leaf in source.items() if path in mine and mine[path].shape == leaf.shape}
    if not fitting:
        raise UserError(f"init_from={config.init_from}: no parameter there has the shape of one here.")
    return fitting
