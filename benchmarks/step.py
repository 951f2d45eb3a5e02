"""Images a second of the training step on data that are already on the device: `python -m benchmarks.step`.

    python -m benchmarks.step --compare=torch                   # beside PyTorch (requirements-benchmarks.txt)
    python -m benchmarks.step --compare=layouts --devices=2     # two devices, a tower on each, beside one
    python -m benchmarks.step --compare=fused --dtype=bfloat16  # with and without the kernel of models/fused.py
    python -m benchmarks.step --batch_sizes=16,32,64,128        # time against the batch
    python -m benchmarks.step --widths=0.25,0.5,1               # and against the width
    python -m benchmarks.step --model=cifar                     # another network

The full step of a recipe: forward, backward, update, dropout, response normalisation. The candidates run in turn, round
by round, and between them the machine's own rate of matrix products in the same type.
"""

import argparse
import functools
import statistics
import time
from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import models
import parallel
import update
import views
from benchmarks import measure
from common import backend
from common.errors import UserError, check_ranges, require
from common.exits import fail
from models import cifar, fused, layers


class Step:
    """Our training step, compiled, on the first `devices` devices; 0 takes those of main.py."""

    def __init__(self, config, devices: int, devices_per_network: int):
        layout = parallel.Layout(
            devices_per_network,
            towers=config.model.towers,
            batch_size=config.batch_size,
            fused=config.parallel.fused,
            devices=jax.devices()[:devices] if devices else None,
        )
        self.host_batch, self.mean = _batch(config), np.full((config.input.resize,) * 2 + (3,), 118.0, np.float32)
        merged = jax.device_get(update.init_state(config))
        self.params = merged.params
        self._state, self._batch = layout.shard(merged), layout.put(self.host_batch)
        begun = time.perf_counter()
        step = update.build_step(config, layout, self.mean, measure.rates(config))
        self._step = step.lower(self._state, self._batch, np.float32(1), np.bool_(False)).compile()
        self.compile_seconds = time.perf_counter() - begun
        self._memory = self._step.memory_analysis()
        self._factor = views.factors(config.input)
        self._network = update.build_network(config, layout)
        self._forward, self.layout = layout.map(self._logits), layout

    def _logits(self, params, batch):
        batch = self.layout.gather_rows(batch)
        images = views.to_input(batch["image"], self.mean, self._factor, batch["shift"], batch["gain"])
        return self._network.apply({"params": params}, images)

    def train(self) -> None:
        """One update."""
        self._state, values, _ = self._step(self._state, self._batch, np.float32(1), np.bool_(False))
        jax.block_until_ready(values)

    def forward(self) -> np.ndarray:
        """The logits of the batch, in evaluation."""
        logits = parallel.addressable(jax.block_until_ready(self._forward(self._state.params, self._batch)))
        return np.concatenate(logits[:: self.layout.devices_per_network])

    def peak_memory(self) -> int:
        """Bytes that a device needs: what it counted itself, or else what the compiler has planned."""
        counted = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        planned = self._memory
        return counted or (
            planned.argument_size_in_bytes
            + planned.output_size_in_bytes
            + planned.temp_size_in_bytes
            - planned.alias_size_in_bytes
        )


def _batch(config) -> dict[str, np.ndarray]:
    random, count, crop = np.random.default_rng(0), config.batch_size, config.input.crop
    return {
        "image": random.integers(0, 256, (count, crop, crop, 3)).astype(np.uint8),
        "label": random.integers(0, config.model.num_classes, count).astype(np.int32),
        "shift": random.normal(0, 12, (count, 3)).astype(np.float32),
        "gain": np.ones(count, np.float32),
    }


def training_flops(config) -> int:
    """Floating-point operations of an image in training: forward, and both gradients but that of conv1's input."""
    rows = models.layer_table(config.model, config.input.crop)
    return 2 * (3 * sum(row.multiply_adds for row in rows) - rows[0].multiply_adds)


def parameters_and_maps(config) -> int:
    """Bytes of parameters, velocity and gradients, images, and all layers' maps, of all towers together.

    The maps are those that each activation, normalisation, pooling and dropout returns; a step need not keep all.
    """
    network, found = update.local_network(config), []

    def note(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.method_name in models.STEPS:
            found.append(result)
        return result

    def forward(images, key):
        params = network.init(key, images)
        with flax.linen.intercept_methods(note):
            network.apply(params, images, train=True, rngs={"dropout": key})
        return 3 * [params], images, found

    shape = (config.batch_size, config.input.crop, config.input.crop, 3)
    needed = jax.eval_shape(forward, jax.ShapeDtypeStruct(shape, jnp.float32), jax.random.key(0))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(needed))


def compare_networks(config, peer) -> None:
    """Refuses a PyTorch form, in the module `peer`, that computes something else; raises `UserError`.

    With the initial weights, which are small, neither biases nor normalisation would show in the logits.
    """
    random, network = np.random.default_rng(0), update.local_network(config)
    state = jax.eval_shape(lambda: update.init_state(config))

    def lively(leaf):
        fan_in = np.prod(leaf.shape[-4:-1]) if len(leaf.shape) in (2, 4, 6) else 1
        return random.normal(0, (2 / fan_in) ** 0.5, leaf.shape).astype(np.float32)

    params = jax.tree.map(lively, state.params)
    images = random.normal(0, 60, (8, config.input.crop, config.input.crop, 3)).astype(np.float32)
    ours = np.asarray(jax.jit(network.apply)({"params": params}, images))
    theirs = peer.logits(config.model.name, params, images)
    difference = np.abs(ours - theirs).max() / np.abs(ours).max()
    if not difference < tolerance(config):
        raise UserError(f"PyTorch computes another network: its logits differ by {difference:.1e} of the largest.")


def check_kernel(config) -> None:
    """Refuses `parallel.fused` where the kernel is not used, or computes something else; raises `UserError`."""
    require(parallel.fuses(jax.devices()[0]), "The fused kernel needs an NVIDIA GPU.")
    random, worst, most = np.random.default_rng(0), 0.0, 1e-5 if config.model.dtype == "float32" else 5e-2
    towers, rows = config.model.towers, models.layer_table(config.model, config.input.crop)[:2]
    for row in rows:
        fits = fused.fits((1, *row.output), groups=towers, window=config.model.get("pool_window", cifar.POOL[0]))
        require(fits, f"{row.name} has {row.output[-1] // towers} maps in a tower, more than the fused kernel takes.")
    network = models.build(config.model, parallel.Towers(towers, towers, fused=True), config.input.crop)

    def kernel(x):
        return network.apply({}, x, layers.relu(x), method="normalize_pool")

    def apart(x):
        return network.apply({}, network.apply({}, layers.relu(x), method="normalize"), method="pool")

    def with_gradient(form, x):
        y, pull = jax.vjp(form, x)
        return y, *pull(y)

    for row in rows:
        # So large that the sums of squares count.
        x = jnp.asarray(random.normal(0, 60, (16, *row.output)), config.model.dtype)
        found, wanted = (jax.jit(functools.partial(with_gradient, form))(x) for form in (kernel, apart))
        for one, other in zip(found, wanted, strict=True):
            one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
            worst = max(worst, float(np.abs(one - other).mean() / np.abs(other).mean()))
    print(f"values and gradients of the fused kernel differ from those of the steps apart by {worst:.1e} in the mean")
    require(worst < most, "The fused kernel computes something else.")


def tolerance(config) -> float:
    """By how much of the largest one logits of the same network may differ here."""
    # GPUs compute float32 products in TF32, whose mantissa is hardly longer than bfloat16's.
    return 1e-4 if jax.default_backend() == "cpu" and config.model.dtype == "float32" else 5e-2


def run(config, args) -> dict[str, Any]:
    """Measures one config."""
    if config.parallel.fused:
        check_kernel(config)
    steps = {"jax": Step(config, args.devices, args.devices_per_network)}
    candidates = {}
    if args.compare == "layouts":
        if steps["jax"].layout.size == 1:
            raise UserError("--compare=layouts compares one device with one: it needs --devices=2.")
        steps["one device"] = Step(config, 1, 1)
    if args.compare == "fused":
        plain = ml_collections.ConfigDict(config)
        plain.parallel.fused = False
        steps["plain"] = Step(plain, args.devices, args.devices_per_network)
    if args.compare == "torch":
        try:
            from benchmarks import torch_networks
        except ImportError as error:
            raise UserError(f"{error}; `pip install -r requirements-benchmarks.txt` installs PyTorch.") from None
        ours = steps["jax"]
        compare_networks(config, torch_networks)
        for name, compiled in (("torch", False), ("compiled torch", True))[: 1 + args.torch_compile]:
            steps[name] = torch_networks.Step(
                config,
                ours.params,
                ours.host_batch,
                views.center(ours.mean, config.input.crop),
                views.factors(config.input),
                device="cpu" if jax.default_backend() == "cpu" else "cuda",
                compiled=compiled,
            )
        difference = np.abs(ours.forward() - steps["torch"].forward()).max() / np.abs(ours.forward()).max()
        print(f"the logits of both differ by {difference:.1e} of the largest")
        if not difference < tolerance(config):
            raise UserError("PyTorch computes something else, so that there is nothing to compare.")
    for name, step in steps.items():
        step.train(), step.forward()
        candidates[f"{name} training"] = functools.partial(measure.clock, step.train, args.seconds)
        candidates[f"{name} forward"] = functools.partial(measure.clock, step.forward, args.seconds)
    candidates["product"] = measure.matrix_product(config.model.dtype)
    seconds = measure.interleaved(candidates, args.rounds)

    batch, flops, on_cpu = config.batch_size, training_flops(config), jax.default_backend() == "cpu"
    rows = models.layer_table(config.model, config.input.crop)
    fractions = [
        batch * flops * product / step
        for product, step in zip(seconds["product"], seconds["jax training"], strict=True)
    ]
    best = {name: min(values) for name, values in seconds.items()}
    values = {
        "batch_size": batch,
        "width": config.model.get("width", 1.0),
        "dtype": config.model.dtype,
        "fused": config.parallel.fused,
        "devices": steps["jax"].layout.size,
        "images_per_second": batch / best["jax training"],
        "forward_images_per_second": batch / best["jax forward"],
        "flops_per_second": batch * flops / best["jax training"],
        "product_flops_per_second": 1 / best["product"],
        "fraction_of_product_rate": statistics.median(fractions),
        "fraction_best": batch * flops * best["product"] / best["jax training"],
        # A CPU's devices share its memory.
        "peak_memory_bytes": steps["jax"].peak_memory() * (steps["jax"].layout.size if on_cpu else 1),
        "parameters_and_maps_bytes": parameters_and_maps(config),
        "compile_seconds": steps["jax"].compile_seconds,
        "multiply_adds": sum(row.multiply_adds for row in rows),
        "rounds": args.rounds,
    }
    for name in set(steps) - {"jax"}:
        values[f"{name.replace(' ', '_')}_images_per_second"] = batch / best[f"{name} training"]
        for what in ("training", "forward"):
            values[f"{what}_times_{name.replace(' ', '_')}"] = measure.ratio(seconds, f"{name} {what}", f"jax {what}")
    return values


def _numbers(kind: type):
    """Reads numbers separated by commas."""

    def numbers(text):
        return [kind(part) for part in text.split(",")]

    return numbers


def main() -> None:
    """Parses the flags, measures, and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=tuple(measure.RECIPES), default="alexnet", help="the network whose step is timed"
    )
    parser.add_argument("--batch_sizes", type=_numbers(int), default=[128])
    parser.add_argument("--widths", type=_numbers(float), default=[1.0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--devices",
        type=int,
        default=0,
        help="devices of the training step, simulated on a CPU; 0: a GPU or TPU, and of a CPU what main.py takes",
    )
    parser.add_argument("--devices_per_network", type=int, choices=(0, 1, 2), default=0)
    parser.add_argument("--compare", choices=("torch", "layouts", "fused"))
    parser.add_argument(
        "--fused", action="store_true", help="parallel.fused=True: normalise and pool in one kernel, on GPUs"
    )
    parser.add_argument(
        "--torch_compile", action="store_true", help="beside torch.compile too, which needs a C++ compiler on CPUs"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="at least so long for one measurement")
    args = parser.parse_args()
    try:
        check_ranges(vars(args), {"devices": (0, 1024), "rounds": (1, 1000), "seconds": (0, 3600)}, "--")
        if args.torch_compile and args.compare != "torch":
            raise UserError("--torch_compile goes with --compare=torch.")
        on_cpu = jax.config.jax_platforms in (None, "", "cpu")
        if args.devices and on_cpu and jax.config.jax_num_cpu_devices < args.devices:
            jax.config.update("jax_num_cpu_devices", args.devices)
        backend.start_devices()
        if not args.devices and jax.default_backend() != "cpu":
            args.devices = 1
        if args.devices > len(jax.devices()):
            raise UserError(f"--devices={args.devices}, but there are {len(jax.devices())}.")
        results = []
        for width in args.widths:
            for batch_size in args.batch_sizes:
                config = measure.recipe(
                    args.model, batch_size, width, args.dtype, args.fused or args.compare == "fused"
                )
                config.optimizer.learning_rate = 1e-4  # stays finite on noise
                results.append({"model": args.model} | run(config, args))
                print(", ".join(f"{name} {value}" for name, value in results[-1].items()))
        measure.report("step", results[0] if len(results) == 1 else {"runs": results})
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
