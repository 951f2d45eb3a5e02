"""torchvision's `alexnet`: between its state_dict and our parameters. Source: torchvision/models/alexnet.py."""

from collections.abc import Mapping

import numpy as np

from configs import torchvision as recipe
from models.torchvision import LAYERS, SIDE
from weights import naming

# Layer: its name in the state_dict.
NAMES = {
    "conv1": "features.0",
    "conv2": "features.3",
    "conv3": "features.6",
    "conv4": "features.8",
    "conv5": "features.10",
    "fc6": "classifier.1",
    "fc7": "classifier.4",
    "fc8": "classifier.6",
}
# What torchvision subtracts from RGB in 0–255; configs/torchvision.py has what it divides by.
MEAN = 255 * np.array([0.485, 0.456, 0.406])


def read(file: str, tensors: Mapping[str, np.ndarray]) -> naming.Weights:
    """The network of a state_dict, at any width and with any number of classes.

    Raises:
      UserError: the tensors are not those of torchvision's AlexNet.
    """
    config = recipe.get_config()
    first, last = (tensors.get(f"{NAMES[layer]}.bias", np.zeros(0)) for layer in ("conv1", "fc8"))
    config.model.width = first.size / LAYERS["conv1"][0] or 1.0
    config.model.num_classes = last.size or 1000
    naming.check(file, tensors, _shapes(config.model), "torchvision's AlexNet")
    params = {}
    for layer, name in NAMES.items():
        kernel = naming.from_rows(tensors[f"{name}.weight"], _maps_below(layer, params))
        params[layer] = {"kernel": kernel, "bias": tensors[f"{name}.bias"]}
    return naming.Weights(config, params, MEAN.astype(np.float32))


def write(params: naming.Params) -> dict[str, np.ndarray]:
    """The state_dict of a network of configs/torchvision.py."""
    tensors = {}
    for layer, name in NAMES.items():
        tensors[f"{name}.weight"] = naming.to_rows(params[layer]["kernel"], _maps_below(layer, params))
        tensors[f"{name}.bias"] = params[layer]["bias"]
    return tensors


def _maps_below(layer, params):
    return len(params["conv5"]["bias"]) if layer == "fc6" else 0


def _shapes(model):
    shapes, seen = {}, 3
    for layer, name in NAMES.items():
        features, size, _, _ = LAYERS[layer]
        features = max(1, round(features * model.width)) if features else model.num_classes
        inputs = seen * SIDE**2 if layer == "fc6" else seen
        shapes[f"{name}.weight"] = (features, inputs, *((size, size) if size else ()))
        shapes[f"{name}.bias"] = (features,)
        seen = features
    return shapes
