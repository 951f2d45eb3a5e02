"""The networks by name, and the interface that they share.

A network is a Flax module that knows nothing of training, data or devices; `parallel.Towers` tells it which of its
towers are on this device. To add one: a module here, a line in MODELS, a config, a test.

**Call.** `network(images, train=False, rows=None)` → logits. `images` is (N, H, W, 3), RGB with the mean subtracted.
`train` draws dropout masks from the rng 'dropout', by `rows`: (N,) numbers of the examples in the global batch, which
are 0 … N − 1 by default. The logits are (N, num_classes) float32, the same on every device of a network.

**Fields.** Dataclass fields without defaults, because each number stands once, in the config: the section `model` has a
line for every field. Only a field that is added to a published network has a default: the value that changes nothing,
for configs that were stored before. All networks have `num_classes`, `towers` (how many the network has), `dtype`
('float32' or 'bfloat16', of the computation; maps have the dtype `placement.maps_dtype(dtype)`) and `placement` (a
`parallel.Towers`, not in the config). A field `initial_weights` is `model.init` in the config, because `init` is a
method of every Flax module. The types are bool, int, float, str and tuple. `validate(image_size)` raises `UserError`
for values that cannot work.

**Parameters.** {layer: {'kernel', 'bias'}}, float32. A kernel is (C, F), (h, w, C, F), or (H, W, h, w, C, F) with one
for each place of the maps. They are initialised with all towers in one place. Every leaf is sharded on its last axis:
with the towers on two devices, tower 0 holds the first half of the output maps and tower 1 the second.
The last layer gives the logits.

**Towers.** Before a layer whose input is the maps of all towers, the network calls `placement.join` and records the
result with `sow('intermediates', f'{layer}_joined', …)`; as `f'{layer}_across'`, if all towers' maps are for its
normalisation alone.

**Steps.** What happens between the layers are methods with the names in STEPS, of one array (`dropout` takes `train`
and `rows` as well), so that a tool can intercept them. `activate` is called once after each layer but the last. If
`placement.fused`, `normalize_pool` may take the place of `normalize` and `pool`; it takes two arrays. And a layer may
pool its maps itself, so that `pool` is not called behind it.

**convolutional(images)** is optional: the layers whose examples do not depend on one another and that have no dropout.
On a CPU device with several cores it runs on the two halves of a batch.
"""

import dataclasses
import math
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.errors import check_name, check_ranges, check_type, nearest, require
from models import cpu
from models.alexnet import AlexNet
from models.cifar import CifarLocalNet, CifarNet
from models.torchvision import TorchvisionAlexNet
from parallel import Towers

MODELS = {"alexnet": AlexNet, "cifar": CifarNet, "cifar_local": CifarLocalNet, "torchvision": TorchvisionAlexNet}
STEPS = ("activate", "normalize", "normalize_spatially", "pool", "normalize_pool", "average", "dropout")


def build(model, placement: Towers | None = None, image_size: int = 224) -> nn.Module:
    """Builds the network that a config's `model` section describes.

    Args:
      model: mapping with `name` and every field of that network.
      placement: which towers are on this device; by default all of them, the form in which parameters are merged.
      image_size: side of the images it will see, `input.crop`.

    Raises:
      UserError: an unknown network or field, a missing field, or a value that cannot work.
    """
    fields = dict(model)
    name = fields.pop("name", None)
    check_type("model.name", name, str)
    check_name("model.name", name, MODELS)
    network_class = MODELS[name]
    known = _config_fields(network_class)
    for field, value in fields.items():
        require(field in known, f"model.{field} is no field of {name}: {nearest(field, known)}")
        kind = typing.get_origin(known[field].type) or known[field].type
        if kind is tuple and isinstance(value, str):
            value = (value,)  # it would pass for a tuple of letters
        check_type(f"model.{field}", value, kind)
        fields[field] = tuple(value) if kind is tuple else value
    for field, declared in known.items():
        given = field in fields or declared.default is not dataclasses.MISSING
        require(given, f"The config has no field model.{field}, which {name} needs.")
    check_name("model.dtype", fields["dtype"], ("float32", "bfloat16"))
    check_ranges(fields, {"num_classes": (2, 1 << 20)}, "model.")
    if "init" in fields:
        fields["initial_weights"] = fields.pop("init")
    placement = placement or Towers(fields["towers"], fields["towers"])
    if placement.cores >= 2 and hasattr(network_class, "convolutional"):
        network_class = cpu.in_halves(network_class)
    network = network_class(**fields, placement=placement)
    network.validate(image_size)
    return network


def _config_fields(network_class) -> dict[str, dataclasses.Field]:
    """The fields that a config gives a network, by their names there."""
    fields = {field.name: field for field in dataclasses.fields(network_class)}
    for internal in ("parent", "name", "placement"):
        del fields[internal]
    return {"init" if name == "initial_weights" else name: field for name, field in fields.items()}


def activations(
    network: nn.Module, params: Any, images: jax.Array, **options
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the logits, and for each layer what `activate` makes of it; for the last layer, the logits.

    Args:
      network, params: the network, and its parameters on this device.
      images, options: arguments of the call, see `models`; `rngs` as well.

    Returns:
      The logits, and {layer: (N, …, maps of the towers here)} in order of computation.
    """
    found, layer = {}, None

    def note(call, args, kwargs, context):
        nonlocal layer
        result = call(*args, **kwargs)
        if context.method_name == "__call__" and len(context.module.path) == 1:
            layer = context.module.name
        elif context.method_name == "activate":
            found.setdefault(layer, []).append(result)  # twice if `cpu.in_halves` computes the batch in two halves
        return result

    with nn.intercept_methods(note):
        logits = network.apply({"params": params}, images, **options)
    return logits, {name: jnp.concatenate(parts) for name, parts in found.items()} | {layer: logits}


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer: its output for one image, merged kernel, parameters, multiply-adds, the floats each tower sends to the
    other for it, and whether its input is the maps of both.
    """

    name: str
    output: tuple[int, ...]
    kernel: tuple[int, ...]
    parameters: int
    multiply_adds: int
    exchange: int
    joined: bool


def layer_table(model, image_size: int) -> list[Row]:
    """The layers with parameters, in order of computation, for a config's `model` section; nothing is computed."""
    network = build(model, None, image_size)
    images = jnp.zeros((1, image_size, image_size, 3))
    names = []

    def trace(key):
        variables = network.init(key, images)
        names.extend(variables["params"])  # in order of computation; JAX sorts the keys of what is returned
        _, seen = network.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])
        return variables["params"], seen["intermediates"]

    params, seen = jax.eval_shape(trace, jax.random.key(0))
    rows = []
    for name in names:
        output, kernel = seen[name]["__call__"][0].shape[1:], params[name]["kernel"].shape
        joined, across = (
            seen.get(f"{name}_{record}", ()) if network.towers > 1 else () for record in ("joined", "across")
        )
        rows.append(
            Row(
                name=name,
                output=output,
                kernel=kernel,
                parameters=sum(math.prod(leaf.shape) for leaf in params[name].values()),
                # With a kernel for each place, the kernel's size counts the places.
                multiply_adds=math.prod(kernel) * (1 if len(kernel) == 6 else math.prod(output[:-1])),
                exchange=sum(math.prod(x.shape[1:]) // network.towers for x in (*joined, *across)),
                joined=bool(joined),
            )
        )
    return rows
