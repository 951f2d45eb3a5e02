"""Training: the state, one step, and the loop over steps."""

import collections
import dataclasses
import math
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
import workdirs
from errors import UserError


@flax.struct.dataclass
class State:
    """What an update changes: the number of updates done, parameters, and the optimizer's velocity."""

    step: Any
    params: Any
    opt_state: Any


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
        """Converts the epochs of `config` for a training split of `num_examples`."""
        steps_per_epoch = num_examples / config.batch_size

        def every(duration):
            if duration.steps:
                return duration.steps
            return max(1, round(duration.epochs * steps_per_epoch)) if duration.epochs else 0

        return cls(
            steps_per_epoch=steps_per_epoch,
            num_steps=config.num_steps or max(1, round(config.num_epochs * steps_per_epoch)),
            log_every=every(config.log_every),
            eval_every=every(config.eval_every),
            checkpoint_every=every(config.checkpoint_every),
        )

    def due(self, every: int, step: int) -> bool:
        """Whether what happens every `every` steps happens after update number `step`; the last always counts."""
        return step == self.num_steps or (every > 0 and step % every == 0)


def build_network(config, layout: parallel.Layout | None = None):
    """The network of a config: as merged trees hold it, or as a device of `layout` sees it."""
    placement = layout.towers(config.model.towers) if layout else None
    return models.build(config.model, placement, config.input.crop)


def init_state(config, rule: optax.GradientTransformation) -> State:
    """The merged state before the first update, a function of `config.seed` alone."""
    network = build_network(config)

    def init(key):
        images = jnp.zeros((1, config.input.crop, config.input.crop, 3))
        params = network.init(key, images)["params"]
        return State(step=jnp.int32(0), params=params, opt_state=rule.init(params))

    return jax.jit(init)(jax.random.key(config.seed))


def state_shapes(config) -> State:
    """The merged state's shapes and types, without computing anything."""
    rule = optimizer.build(config.optimizer, optimizer.Rates(config.optimizer, config.schedule, 1.0))
    return jax.eval_shape(lambda: init_state(config, rule))


def build_step(config, layout: parallel.Layout, rule: optax.GradientTransformation, mean_image: np.ndarray):
    """Builds the update on all devices.

    Args:
      rule: of `optimizer.build`.
      mean_image: (S, S, 3) float32; its central crop is subtracted from every view, as in the source of 2012.

    Returns:
      A function of (sharded state, sharded batch, rate factor) giving (the next state, {'loss', 'top1_error'}), both
      means over the global batch. It consumes the state.
    """
    network = build_network(config, layout)
    mean = evaluate.center(mean_image, config.input.crop)

    def step(state, batch, rate_factor):
        batch = layout.gather_rows(batch)
        images = batch["image"].astype(jnp.float32) - mean + batch["shift"][:, None, None, :]
        images = images * batch["gain"][:, None, None, None]
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def loss_of(params):
            logits = network.apply(
                {"params": params},
                images,
                train=True,
                rows=layout.row_numbers(len(images)),
                rngs={"dropout": key},
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
            top1_error = jnp.mean(jnp.argmax(logits, -1) != batch["label"])
            # Both devices of a network compute this loss, and the transpose of the exchange adds their gradients up.
            return loss / layout.devices_per_network, {"loss": loss, "top1_error": top1_error}

        gradients, values = jax.grad(loss_of, has_aux=True)(state.params)
        gradients, values = layout.mean((gradients, values))
        updates, opt_state = rule.update(
            gradients, state.opt_state, state.params, step=state.step, rate_factor=rate_factor
        )
        params = optax.apply_updates(state.params, updates)
        return State(step=state.step + 1, params=params, opt_state=opt_state), values

    return layout.map(step, donate=(0,), broadcast=(2,))


class Run:
    """A run in its workdir: what the loop uses, set up or restored, and the parts of the loop.

    Raises:
      UserError: whatever in the config, the data or the workdir cannot work.
    """

    def __init__(self, config, workdir: str | pathlib.Path):
        validate(config)
        self.config, self.workdir = config, pathlib.Path(workdir).expanduser()
        self.layout = parallel.Layout(
            config.parallel.devices_per_network, towers=config.model.towers, batch_size=config.batch_size
        )
        workdirs.check(config, self.workdir)
        self.records = input_pipeline.open_records(config.dataset, config.input)
        if self.records.num_classes != config.model.num_classes:
            raise UserError(
                f"model.num_classes={config.model.num_classes}, but {config.dataset.name} has "
                f"{self.records.num_classes} classes; use --config.model.num_classes={self.records.num_classes}."
            )
        self.durations = Durations.of(config, self.records.num_examples(config.dataset.train_split))
        rates = optimizer.Rates(config.optimizer, config.schedule, self.durations.steps_per_epoch)
        rule = optimizer.build(config.optimizer, rates)
        self._train_step = build_step(config, self.layout, rule, self.records.mean_image)
        self._shapes = state_shapes(config)
        rates.tree(self._shapes.params, 0)  # refuses layers that the network does not have, before anything is written
        self._evaluators = {}

        # Before anything is written, for it may not be there; a run with a checkpoint of its own no longer needs it.
        begun = any((self.workdir / "checkpoints").glob("[0-9]*"))
        taken_over = pretrained(config, self._shapes) if config.init_from and not begun else {}

        writes = jax.process_index() == 0
        if writes:
            workdirs.write_config(config, self.workdir)
        self.checkpoints = checkpoint.Checkpoints(self.workdir)
        restored = self.checkpoints.restore_latest(self._shapes)
        self.resumed = restored is not None
        if restored:
            state, meta = restored
            self.plateau, self.evaluated = optimizer.Plateau(**meta["plateau"]), meta["evaluated"]
        else:
            state = jax.device_get(init_state(config, rule))
            params = flax.traverse_util.flatten_dict(state.params)
            if taken_over and jax.process_index() == 0:
                new = sorted("/".join(path) for path in params.keys() - taken_over.keys())
                print(f"From {config.init_from}: all parameters" + (f" but {', '.join(new)}." if new else "."))
            params |= taken_over
            state = state.replace(params=flax.traverse_util.unflatten_dict(params))
            self.plateau, self.evaluated = optimizer.Plateau(), 0
        self.step = int(state.step)
        self.state = self.layout.shard(state)

        self.recorder = metrics.Recorder(self.workdir, self.step, self.durations.num_steps, writes)
        self._meter = metrics.Meter(config.batch_size)
        self._fetcher = parallel.Fetcher()
        self._under_way = collections.deque()

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
        self.state, values = self._train_step(self.state, batch, rate_factor)
        self.step += 1
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

    def _diverged(self, what: str) -> UserError:
        rate = self.config.optimizer.learning_rate
        factor = self.plateau.rate_factor(self.config.schedule)
        return UserError(
            f"{what}, with optimizer.learning_rate={rate:g}{f' × {factor:g}' if factor < 1 else ''}. Nothing of it was "
            f"saved; try a third of the rate, --config.optimizer.learning_rate={rate / 3:.2g}, in a new workdir."
        )

    def log(self) -> None:
        """Records the training metrics since the last time."""
        self.settle()
        self.recorder.write(self.step, self.epoch, self._meter.read())

    def evaluate(self, params: Any, views: str) -> dict[str, float]:
        """Errors of sharded parameters on the evaluation split; see `evaluate.run`."""
        if views not in self._evaluators:
            network = build_network(self.config, self.layout)
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
        return evaluate.run(self._evaluators[views], params, batches, self.layout)

    def evaluate_and_save(self) -> None:
        """Evaluates the centre view, tells the plateau rule, and saves if that is due or the error is a new best."""
        self.settle()
        values = self.evaluate(self.state.params, "centre")
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
        state = self.layout.merge(self.state, self._shapes)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)):
            raise self._diverged(f"Parameters are not finite after step {self.step}")
        meta = {
            "config": workdirs.to_json(self.config),
            "plateau": self.plateau._asdict(),
            "evaluated": self.evaluated,
        }
        self.checkpoints.save(self.step, state, meta, error)
        self._meter.pause()

    def finish(self) -> None:
        """Ends the run: ten views of the best checkpoint, and what to do next."""
        self.checkpoints.wait()
        lines = metrics.read_lines(self.workdir / "metrics.jsonl")
        tested = [line for line in lines if "test/top1_error" in line and line["step"] == self.step]
        if tested:
            values = {name: value for name, value in tested[-1].items() if name.startswith("test/")}
        else:
            best = self.checkpoints.best_step() or self.step
            params = self.state.params
            if best != self.step:
                params = self.layout.shard(self.checkpoints.restore(best, self._shapes)[0].params)
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
checkpoints       {self.checkpoints.directory}
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
        self._fetcher.close()
        self.recorder.close()
        self.checkpoints.close()


class StopSignal:
    """Notes SIGINT and SIGTERM, for the loop to save and end; a second SIGINT ends at once."""

    CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # noqa: RUF012 -- a constant

    def __init__(self):
        self.code, self.name = 0, ""

    def _note(self, number, _):
        if number == signal.SIGINT and self.code:
            raise KeyboardInterrupt
        self.code, self.name = self.CODES[number], signal.Signals(number).name
        print(f"{self.name}: saving after this step.", file=sys.stderr, flush=True)

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
      UserError: see `Run`; also a loss that is not finite.
    """
    with Run(config, workdir) as run:
        with StopSignal() as stop:
            steps = run.durations
            run.recorder.say(run.greeting())
            if run.resumed and steps.due(steps.eval_every, run.step) and run.evaluated < run.step:
                run.evaluate_and_save()  # a signal had come between the step and its evaluation
            batches = run.train_batches()
            while run.step < steps.num_steps:
                run.advance(next(batches))
                if steps.due(steps.log_every, run.step):
                    run.log()
                if stop.code:
                    run.settle()
                    run.save()
                    run.checkpoints.wait()
                    run.recorder.say(
                        f"Stopped by {stop.name}: step {run.step} is saved, and the same command goes on from there."
                    )
                    return stop.code
                if steps.due(steps.eval_every, run.step):
                    run.evaluate_and_save()
                elif steps.due(steps.checkpoint_every, run.step):
                    run.settle()
                    run.save()
        run.finish()
    return 0


def validate(config) -> None:
    """Refuses values that cannot work, before anything is read or written; raises `UserError`."""
    for field, low, high in (
        ("batch_size", 1, 1 << 20),
        ("eval_batch_size", 1, 1 << 20),
        ("num_epochs", 0, 1e6),
        ("num_steps", 0, 1 << 40),
        ("seed", 0, (1 << 31) - 1),
    ):
        if not low <= config[field] <= high:
            raise UserError(f"{field}={config[field]} must lie between {low} and {high}.")
    if not config.num_steps and not config.num_epochs:
        raise UserError("num_epochs and num_steps are both 0; one of them must say how long to train.")
    for field in ("log_every", "eval_every", "checkpoint_every"):
        if not (0 <= config[field].epochs <= 1e6 and 0 <= config[field].steps <= 1 << 40):
            raise UserError(f"{field}.epochs and {field}.steps must not be negative; 0 and 0 is never.")
    models.build(config.model, None, config.input.crop)
    optimizer.validate(config)


def pretrained(config, shapes: State) -> dict[tuple[str, ...], np.ndarray]:
    """The parameters of the workdir `config.init_from` that have the shapes of this network's, by path.

    Raises:
      UserError: it is no workdir, or nothing in it fits.
    """
    theirs = state_shapes(workdirs.read_config(config.init_from))
    with checkpoint.Checkpoints(config.init_from, read_only=True) as checkpoints:
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
