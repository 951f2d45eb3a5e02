"""This project's AlexNet for PyTorch: the state_dict of the grouped module in docs/weights.md, which takes pixels."""

from typing import Any

import numpy as np

import views
from common.errors import require, shown
from models.alexnet import LAYERS
from weights import naming

# What the module can be; it takes the other fields as arguments.
FIELDS = {
    "activation": ("relu",),
    "lrn": (True,),
    "pool_window": (3,),
    "pool_stride": (2,),
    "towers": (2,),
    "exchange": (("conv3", "fc6", "fc7"),),
    "without": ((),),
    "order": ("paper", "caffenet"),
}


def write(params: naming.Params, config: Any, mean_image: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors: weight and bias of conv1 … fc8, 'mean' (3, crop, crop), and 'factor' (1 or 3, 1, 1).

    Args:
      params: the merged parameters.
      config: of the run; `model` and `input` are used.
      mean_image: (S, S, 3) float32.

    Raises:
      UserError: the module cannot be this network.
    """
    check(config.model)
    tensors = {
        "mean": np.ascontiguousarray(views.center(mean_image, config.input.crop).transpose(2, 0, 1)),
        "factor": views.factors(config.input)[:, None, None],
    }
    for layer in LAYERS:
        maps = len(params["conv5"]["bias"]) if layer == "fc6" else 0
        tensors[f"{layer}.weight"] = naming.to_rows(params[layer]["kernel"], maps)
        tensors[f"{layer}.bias"] = params[layer]["bias"]
    return tensors


def check(model: Any) -> None:
    """Refuses a config's `model` section that the module cannot be; raises `UserError`."""
    for field, known in FIELDS.items():
        value = tuple(model[field]) if isinstance(model[field], list) else model[field]
        choices = " or ".join(map(shown, known))
        require(
            value in known, f"The module for PyTorch needs model.{field}={choices}; this network has {shown(value)}."
        )


def arguments(model: Any) -> str:
    """The arguments of the module after the state_dict, as Python."""
    numbers = {name: model[f"lrn_{name}"] for name in ("k", "n", "alpha", "beta")} | {"dropout": model.dropout_rate}
    across, first = model.get("lrn_across_towers", False), model.order == "caffenet"
    return ", ".join(f"{name}={value!r}" for name, value in (numbers | dict(across=across, pool_first=first)).items())
