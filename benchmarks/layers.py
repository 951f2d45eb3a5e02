"""Time of each layer, forward and backward, against its floor: `python -m benchmarks.layers [--model=…]`.

Each part of the network runs alone on data that are on the device, with the shapes that it has in the training step.
Its floor is the longer of two times: that of its operations at the machine's rate of matrix products, and that of the
bytes it must read and write at the rate of a copy, both measured in the same run. A backward pass gives all gradients
but that of the images, and recomputes every forward value that is not passed to it. In the step the update overwrites
its input; here it does not.

With `--dtype=bfloat16` all floors are those of bfloat16 products, also of the layers that CPUs compute in float32 then.

A layer that pools its maps itself, as the CIFAR-10 network's first one on CPUs, is one part with its pooling.

In the step the parts of several towers and of several replicas run side by side; alone, some use one core only. A part
has the whole batch, of which the step on two replicas (see `common.backend`) gives each a half.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import models
import optimizer
import parallel
import update
from benchmarks import measure
from common.errors import UserError, check_ranges
from common.exits import fail


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the training step.

    Attributes:
      name: such as 'conv1' or 'pool1'.
      function: of (params, *inputs).
      params: tree of arrays.
      inputs: trees of shapes.
      flops: floating-point operations of the forward pass that are part of matrix products.
      flops_backward: likewise.
      gradient_of_inputs: whether the backward pass has to give it.
    """

    name: str
    function: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    flops: int = 0
    flops_backward: int = 0
    gradient_of_inputs: bool = True


def parts(config: Any) -> list[Part]:
    """The parts of a config's network in order of computation, with random inputs, and finally the update."""
    towers = config.model.towers
    on_cpu = jax.default_backend() == "cpu"
    placement = parallel.Towers(towers, towers, cores=int(on_cpu), fused=on_cpu)
    network = models.build(config.model, placement, config.input.crop)
    rows = {row.name: row for row in models.layer_table(config.model, config.input.crop)}
    state = update.init_state(config)
    rngs = {"dropout": jax.random.key(0)}
    found, counts = [], {}

    def layer(module, inputs, *options):
        alone, first = module.clone(parent=None, name=None), module.name == next(iter(rows))
        flops = 2 * config.batch_size * rows[module.name].multiply_adds
        return Part(
            module.name,
            lambda params, inputs: alone.apply({"params": params}, inputs, *options),
            state.params[module.name],
            (jax.tree.map(_shape, inputs),),
            flops,
            flops if first else 2 * flops,
            not first,
        )

    def step(method, *args):
        counts[method] = counts.get(method, 0) + 1
        count = sum(isinstance(x, jax.Array) for x in args)  # two of `normalize_pool`, which reads one
        options = args[count:]  # `train` and `rows` of dropout

        def function(_, x):
            return network.apply({}, *count * [x], *options, method=method, rngs=rngs)

        return Part(f"{method}{counts[method]}", function, {}, (_shape(args[0]),))

    def intercept(call, args, kwargs, context):
        module, method = context.module, context.method_name
        if module.name in rows and method == "__call__":
            found.append(layer(module, *args))
        elif method in models.STEPS:
            found.append(step(method, *args))
        return call(*args, **kwargs)

    def forward(images):
        with nn.intercept_methods(intercept):
            return network.apply({"params": state.params}, images, train=True, rngs=rngs)

    crop = config.input.crop
    jax.eval_shape(forward, jax.ShapeDtypeStruct((config.batch_size, crop, crop, 3), jnp.float32))
    rule, rates = optimizer.build(config), measure.rates(config)

    def new_state(state, gradients):
        found = rates.tree(state.params, state.step)
        updates, opt_state = rule.update(gradients, state.opt_state, state.params, rates=found, step=state.step)
        return optax.apply_updates(state.params, updates), opt_state

    found.append(Part("update", new_state, state, (jax.tree.map(_shape, state.params),), gradient_of_inputs=False))
    return found


def _shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _random(tree):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape, np.float32), x.dtype), tree)


def _bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def candidates(part: Part) -> dict[str, tuple[Callable[[], float], int, int]]:
    """What to time of a part, by direction: the candidate, its operations in matrix products, and its bytes."""
    inputs, y = _random(part.inputs), jax.eval_shape(part.function, part.params, *part.inputs)
    forward = jax.jit(part.function)
    given = _bytes((part.params, inputs))
    found = {"forward": (functools.partial(forward, part.params, *inputs), part.flops, given + _bytes(y))}
    if part.name != "update":
        gradient = _random(y)
        wanted = (0, *range(1, 1 + len(inputs))) if part.gradient_of_inputs else (0,)

        @jax.jit
        def backward(gradient, params, *inputs):
            gradients = jax.vjp(part.function, params, *inputs)[1](gradient)
            return [gradients[i] for i in wanted]

        moved = given + _bytes(y) + _bytes([(part.params, *inputs)[i] for i in wanted])
        call = functools.partial(backward, gradient, part.params, *inputs)
        found["backward"] = (call, part.flops_backward, moved)
    return {
        direction: (functools.partial(measure.clock, lambda call=call: jax.block_until_ready(call())), flops, moved)
        for direction, (call, flops, moved) in found.items()
    }


def run(config: Any, rounds: int) -> dict[str, Any]:
    """Measures the parts of a config's step, one after the other, each in `rounds` rounds beside product and copy."""
    product, copy = measure.matrix_product(config.model.dtype), measure.copy()
    rows = []
    for part in parts(config):
        for direction, (candidate, flops, moved) in candidates(part).items():
            candidate(), candidate()
            seconds = measure.interleaved({"part": candidate, "product": product, "copy": copy}, rounds)
            best = {name: min(values) for name, values in seconds.items()}
            floor = max(flops * best["product"], moved * best["copy"])
            name = part.name if part.name == "update" else f"{part.name} {direction}"
            rows.append({"part": name, "milliseconds": 1e3 * best["part"], "floor_milliseconds": 1e3 * floor})
            limit = "product" if flops * best["product"] > moved * best["copy"] else "memory"
            print(f"{name:22} {1e3 * best['part']:8.1f} ms, floor {1e3 * floor:8.1f} ms ({limit})", flush=True)
    totals = {key: sum(row[key] for row in rows) for key in ("milliseconds", "floor_milliseconds")}
    return {"batch_size": config.batch_size, "model": config.model.to_dict(), "rounds": rounds} | {
        "total": totals,
        "parts": rows,
    }


def main() -> None:
    """Parses the flags, measures, and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        choices=tuple(measure.RECIPES),
        default="alexnet",
        help="the network whose layers and update are timed",
    )
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    try:
        check_ranges(vars(args), {"rounds": (1, 1000)}, "--")
        config = measure.recipe(args.model, args.batch_size, args.width, args.dtype)
        measure.report("layers", run(config, args.rounds))
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
