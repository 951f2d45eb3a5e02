"""What happens before the first step: checks, devices, data, and the state to begin with, new or restored."""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from typing import IO, Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

import checkpoint
import models
import optimizer
import parallel
import update
from common.errors import UserError, require, shown
from datasets import locks, opening, prepared
from run import processes, schema, workdirs


@dataclasses.dataclass
class Run:
    """A run, set up.

    Attributes:
      config, workdir, layout, records, durations, rates: what the run is made of; these do not change.
      shapes: the merged state's shapes and types.
      state: the merged state to begin with, as NumPy arrays; the trainer takes it away.
      known: what a checkpoint knows besides the state, {} for a new run: 'config', 'plateau' (of `optimizer.Plateau`),
        'evaluated' (the step of the last evaluation) and 'meter' (of `metrics.Meter`).
      checkpoints, lock: in the first process only; None in the others, which touch nothing in the workdir.
      reading: keeps the prepared set from being replaced.
    """

    config: Any
    workdir: pathlib.Path
    layout: parallel.Layout
    records: prepared.Records
    durations: schema.Durations
    rates: optimizer.Rates
    shapes: update.State
    state: update.State | None = None
    known: dict[str, Any] = dataclasses.field(default_factory=dict)
    checkpoints: checkpoint.Checkpoints | None = None
    lock: IO | None = None
    reading: locks.Reading | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for held in (self.checkpoints, self.lock, self.reading):
            if held:
                held.close()


def set_up(config, workdir: str | pathlib.Path) -> Run:
    """Checks everything, opens the data and the workdir, and restores or initialises the state.

    Every process of a run calls it. The first alone reads and writes the workdir, and sends the state to the others.

    Raises:
      UserError: something in the config, the data or the workdir cannot work, in any of the processes.
    """
    is_first = jax.process_index() == 0
    workdir = workdirs.expanded(workdir)
    schema.validate(config)
    layout = parallel.Layout(
        config.parallel.devices_per_network,
        towers=config.model.towers,
        batch_size=config.batch_size,
        fused=config.parallel.fused,
    )
    require(
        not config.mixup or config.batch_size // layout.networks % 2 == 0,
        f"batch_size={config.batch_size} gives {config.batch_size // layout.networks} images to each of "
        f"{layout.networks} replicas of the network; mixup={config.mixup} pairs them, which needs an even number.",
    )
    if is_first:
        workdirs.check(config, workdir)
    shapes = state_shapes(config)
    on_cpu = layout.local_devices[0].platform == "cpu"
    copies = len(layout.local_devices) // layout.devices_per_network if on_cpu else 1
    check_memory(config, shapes, jax.process_count(), copies)
    records = opening.open_records(config.dataset, config.input, num_classes=config.model.num_classes, warn=is_first)
    durations = schema.Durations.of(config, records.num_examples(config.dataset.train_split))
    rates = optimizer.Rates(config, durations.steps_per_epoch)
    rates.check(shapes.params)
    _compare_processes(config, records)
    warmup = optimizer.to_steps(config.schedule.warmup, durations.steps_per_epoch)
    if is_first and warmup > durations.num_steps:
        print(
            f"warning: the learning rate does not reach its value: schedule.warmup={config.schedule.warmup} epochs are "
            f"{warmup:,} steps, and the run has {durations.num_steps:,}.",
            file=sys.stderr,
        )
    run = Run(config, workdir, layout, records, durations, rates, shapes)
    run.reading = locks.Reading(records.directory)
    run.state = blank(shapes)
    if is_first:
        _open_workdir(run)
    run.known = json.loads(processes.gather_text(json.dumps(run.known))[0])
    run.state = processes.from_first(run.state)
    return run


def state_shapes(config) -> update.State:
    """The merged state's shapes and types, without computing anything.

    Raises:
      UserError: the config, which may come from a workdir, cannot work.
    """
    schema.validate(config)
    return jax.eval_shape(lambda: update.init_state(config))


def blank(shapes: update.State) -> update.State:
    """A merged state of zeros, which `processes.from_first` replaces."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def _compare_processes(config, records: prepared.Records) -> None:
    """Refuses processes whose config or data differ from the first one's, in all of them."""
    dataset = config.dataset
    mine = {
        "config": workdirs.to_json(config),
        "data": {
            "examples": [
                records.num_examples(split)
                for split in (dataset.train_split, dataset.eval_split, workdirs.test_split(config))
            ],
            "classes": records.class_names,
            "statistics": checkpoint.checksum([records.mean_image, records.principal_std]),
        },
    }
    first, *others = map(json.loads, processes.gather_text(json.dumps(mine)))
    # Each machine may keep the data in its own place.
    own = ("config.dataset.name", "config.dataset.data_dir", "config.input.threads")
    for number, other in enumerate(others, 1):
        if differ := workdirs.differences(first, other, own, ("in process 0", f"in process {number}")):
            raise UserError(f"All processes of a run need the same config and data. Different: {differ}.")


def _open_workdir(run: Run) -> None:
    """Opens the workdir, and restores the newest checkpoint or initialises the state."""
    # Read before anything is written, because it may be missing. A run that has a checkpoint no longer needs it.
    begun = checkpoint.exists(run.workdir)
    taken_over = (
        pretrained(run.config, run.shapes, run.records.class_names) if run.config.init_from and not begun else {}
    )

    run.lock = workdirs.lock(run.workdir)
    workdirs.check(run.config, run.workdir)  # again: another run may have begun here since the first check
    workdirs.check_dataset(run.records, run.workdir)
    run.checkpoints = checkpoint.Checkpoints(run.workdir)
    if restored := run.checkpoints.restore_latest(run.shapes):
        run.state, run.known = restored
        workdirs.check_checkpoint(run.known, run.config, run.records, run.workdir)
        begun, here = run.known.get("examples"), run.records.num_examples(run.config.dataset.train_split)
        require(
            begun in (None, here),  # checkpoints of earlier versions do not say
            f"{run.workdir} was begun on {begun} training images, and now there are {here}; take a new --workdir.",
        )
    workdirs.write_config(run.config, run.workdir)
    workdirs.write_dataset(run.records, run.workdir)
    if restored:
        return
    state = jax.device_get(update.init_state(run.config))
    if taken_over:
        params = flax.traverse_util.flatten_dict(state.params)
        new = sorted("/".join(path) for path in params.keys() - taken_over.keys())
        print(f"From {run.config.init_from}: all parameters" + (f" but {', '.join(new)}." if new else "."))
        state = jax.device_get(update.begin(run.config, flax.traverse_util.unflatten_dict(params | taken_over)))
    run.state = state


def pretrained(config, shapes: update.State, class_names: tuple[str, ...]) -> dict[tuple[str, ...], np.ndarray]:
    """The parameters of the workdir `config.init_from` that have the shapes of this network's, by path.

    The last layer counts only if that run had the same classes, `class_names`. Runs of earlier versions do not tell.

    Raises:
      UserError: it is no workdir, or nothing in it fits.
    """
    origin = workdirs.expanded(config.init_from, "init_from")
    try:
        theirs = state_shapes(workdirs.read_config(origin))
    except UserError as error:
        raise UserError(f"init_from={shown(config.init_from)}: {error}") from None
    with checkpoint.Checkpoints(origin, read_only=True) as checkpoints:
        best = checkpoints.restore_best(theirs)
        latest = None if best else checkpoints.restore_latest(theirs)
    if not (best or latest):
        raise UserError(f"init_from={config.init_from} has no checkpoint yet.")
    state = best[1] if best else latest[0]
    mine = flax.traverse_util.flatten_dict(shapes.params)
    source = flax.traverse_util.flatten_dict(state.evaluated)
    fitting = {path: leaf for path, leaf in source.items() if path in mine and mine[path].shape == leaf.shape}
    if (origin / "dataset.npz").exists() and workdirs.read_dataset(origin).class_names != class_names:
        last = models.layer_table(config.model, config.input.crop)[-1].name
        fitting = {path: leaf for path, leaf in fitting.items() if path[0] != last}
    if not fitting:
        raise UserError(f"init_from={config.init_from}: no parameter there has the shape of one here.")
    return fitting


def write_new(config, records: prepared.Records, workdir: pathlib.Path, params: Any = None) -> None:
    """Writes the workdir of a run before its first step; config.json comes last, so that an unfinished one is none.

    Args:
      params: the merged parameters; the initial ones by default.

    Raises:
      UserError: the config cannot work, or the folder cannot be written.
    """
    schema.validate(config)
    state = jax.device_get(update.begin(config, params) if params else update.init_state(config))
    with checkpoint.Checkpoints(workdir) as checkpoints:
        meta = {"config": workdirs.to_json(config), "classes": workdirs.classes_checksum(records)}
        checkpoints.save(0, state, meta)
    workdirs.write_dataset(records, workdir)
    workdirs.write_config(config, workdir)


def check_memory(config, shapes: update.State, process_count: int = 1, copies: int = 1) -> None:
    """Refuses a run that this machine's memory cannot hold, before anything of it is allocated; raises `UserError`.

    The count is a lower bound for one of `process_count` hosts: the state and its gradients, of which the host's memory
    holds `copies`, and two batches each of training and of evaluation. On a CPU it adds the layers' maps of a training
    batch.
    """
    crop, resize = config.input.crop, config.input.resize
    per_view, per_record = 2 * 3 * crop**2, 2 * 3 * resize**2

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    if jax.default_backend() == "cpu":
        apply = functools.partial(
            update.local_network(config).apply, capture_intermediates=True, mutable=["intermediates"]
        )
        image = jax.ShapeDtypeStruct((1, crop, crop, 3), jnp.float32)
        per_view += size(jax.eval_shape(apply, {"params": shapes.params}, image)[1])
    sizes = [f for f in ("width", "features", "num_classes", "pool_stride") if f in config.model]
    network = ", ".join(f"model.{field}={shown(config.model[field])}" for field in sizes)
    needs = (
        (
            copies * (size(shapes) + size(shapes.params)),
            f"the network, the optimizer's state and gradients ({network}, input.crop={crop})"
            + (f", in {copies} copies" if copies > 1 else ""),
        ),
        (
            -(-config.batch_size // process_count) * per_view,
            f"training (batch_size={config.batch_size}, input.crop={crop})",
        ),
        (
            -(-config.eval_batch_size // process_count) * per_record,
            f"evaluation (eval_batch_size={config.eval_batch_size}, input.resize={resize})",
        ),
    )
    total, memory = sum(need for need, _ in needs), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if total > memory:
        most, what = max(needs)
        raise UserError(
            f"The run needs at least {total / 1e9:,.1f} GB of memory, and this machine has {memory / 1e9:,.1f} GB; "
            f"{most / 1e9:,.1f} GB are for {what}."
            + (f" With --cpu_devices=1 it holds one network in place of {copies}." if copies > 1 else "")
        )
