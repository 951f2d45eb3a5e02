"""The networks by name, built from a config's `model` section."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from errors import UserError, check_name, check_type, nearest
from models.alexnet import AlexNet
from models.cifar import CifarNet
from parallel import Towers

MODELS = {"alexnet": AlexNet, "cifar": CifarNet}


def build(model, placement: Towers | None = None, image_size: int = 224) -> nn.Module:
    """Builds the network that a config's `model` section describes.

    Args:
      model: mapping with `name` and the fields of that network.
      placement: which towers are on this device; all of them by default, the form in which parameters are merged.
      image_size: side of the images it will see, `input.crop`.

    Raises:
      UserError: an unknown network or field, or a value that cannot work.
    """
    fields = dict(model)
    name = fields.pop("name", None)
    check_type("model.name", name, "")
    check_name("model.name", name, MODELS)
    known = {field.name: field.default for field in dataclasses.fields(MODELS[name])}
    for internal in ("parent", "name", "placement"):
        del known[internal]
    if "initial_weights" in known:
        known["init"] = known.pop("initial_weights")  # `init` is a method of every Flax module
    for field, value in fields.items():
        if field not in known:
            raise UserError(f"model.{field} is no field of {name}: {nearest(field, known)}")
        if isinstance(known[field], tuple):
            value = (value,) if isinstance(value, str) else value  # it would pass for a tuple of letters
            check_type(f"model.{field}", value, ())
            fields[field] = tuple(value)
        else:
            check_type(f"model.{field}", value, known[field])
    fields = known | fields
    if "init" in fields:
        fields["initial_weights"] = fields.pop("init")
    network = MODELS[name](**fields, placement=placement or Towers(fields["towers"], fields["towers"]))
    network.validate(image_size)
    return network


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer: its output for one image, merged kernel, parameters, multiply-adds, and the floats each tower sends
    to the other before it."""

    name: str
    output: tuple[int, ...]
    kernel: tuple[int, ...]
    parameters: int
    multiply_adds: int
    exchange: int


def layer_table(model, image_size: int) -> list[Row]:
    """The layers with parameters, in order of computation, for a config's `model` section; nothing is computed."""
    network = build(model, None, image_size)
    images = jnp.zeros((1, image_size, image_size, 3))

    def trace(key):
        variables = network.init(key, images)
        _, seen = network.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])
        return variables["params"], seen["intermediates"]

    params, seen = jax.eval_shape(trace, jax.random.key(0))
    rows, towers = [], model.towers
    for name, leaves in params.items():
        output = seen[name]["__call__"][0].shape[1:]
        kernel = leaves["kernel"]
        joined = seen.get(f"{name}_joined")
        sent = math.prod(joined[0].shape[1:]) // towers if joined and towers > 1 else 0
        rows.append(
            Row(
                name=name,
                output=output,
                kernel=kernel.shape,
                parameters=sum(math.prod(leaf.shape) for leaf in leaves.values()),
                multiply_adds=math.prod(output[:-1]) * math.prod(kernel.shape),
                exchange=sent,
            )
        )
    return rows
