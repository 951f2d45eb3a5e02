"""The networks by name, built from a config's `model` section."""

import dataclasses

import flax.linen as nn

from errors import UserError, nearest
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
    name = fields.pop("name")
    if name not in MODELS:
        raise UserError(f"model.name={name!r} is not known: {nearest(name, MODELS)}")
    if "init" in fields:
        fields["initial_weights"] = fields.pop("init")  # `init` is a method of every Flax module
    known = {field.name for field in dataclasses.fields(MODELS[name])} - {"parent", "name", "placement"}
    for field in fields:
        if field not in known:
            raise UserError(f"model.{field} is no field of {name}: {nearest(field, known)}")
    for field in ("exchange", "without", "features"):
        if field in fields:
            # JSON has no tuples, and a string would pass for a tuple of letters.
            value = fields[field]
            fields[field] = (value,) if isinstance(value, str) else tuple(value)
    network = MODELS[name](**fields, placement=placement or Towers(fields["towers"], fields["towers"]))
    network.validate(image_size)
    return network
