"""What both ways share: tensors with checked names and shapes, and how PyTorch's and Caffe's layouts become ours."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from common.errors import UserError, require, shortened

# {layer: {'kernel', 'bias'}}
Params = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Weights:
    """A network of another program.

    Attributes:
      config: the recipe that describes it here.
      params: its parameters in the merged form; see `models`.
      mean: (3,) or (S, S, 3) float32, what is subtracted from RGB in 0–255.
    """

    config: Any
    params: Params
    mean: np.ndarray


def check(file: str, found: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], network: str) -> None:
    """Refuses tensors that are not those of a network; the sentence names the first that differs.

    Args:
      file: where they come from.
      found: the tensors by name.
      expected: the shapes by name.
      network: what it is called in the sentence.

    Raises:
      UserError: a tensor is missing, is too many, has another shape, or is not finite.
    """
    for name, shape in expected.items():
        there = shortened(", ".join(found)) or "nothing"
        require(name in found, f"{file} is not {network}: there is no tensor {name}. It has {there}.")
        given = found[name].shape
        require(given == shape, f"{file} is not {network}: {name} is {_sizes(given)}, and must be {_sizes(shape)}.")
        require(np.isfinite(found[name]).all(), f"{file}: {name} holds numbers that are not finite.")
    if more := [name for name in found if name not in expected]:
        raise UserError(f"{file} is not {network}: it has a tensor {more[0]} as well, {_sizes(found[more[0]].shape)}.")


def _sizes(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a single number"


def from_rows(weight: np.ndarray, maps: int = 0) -> np.ndarray:
    """A weight with its outputs first, as PyTorch and Caffe have it, in our layout.

    Args:
      weight: (F, C, height, width) of a convolution, or (F, inputs) of a fully-connected layer.
      maps: of the layer below if it is a convolution: the inputs are then flattened (maps, height, width).

    Returns:
      (height, width, C, F), or (inputs, F) with inputs flattened (height, width, maps).
    """
    if weight.ndim == 4:
        return np.ascontiguousarray(weight.transpose(2, 3, 1, 0))
    features, inputs = weight.shape
    if maps:
        weight = weight.reshape(features, maps, inputs // maps).transpose(0, 2, 1).reshape(features, inputs)
    return np.ascontiguousarray(weight.T)


def to_rows(kernel: np.ndarray, maps: int = 0) -> np.ndarray:
    """The inverse of `from_rows`."""
    if kernel.ndim == 4:
        return np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
    inputs, features = kernel.shape
    if maps:
        kernel = kernel.reshape(inputs // maps, maps, features).transpose(1, 0, 2).reshape(inputs, features)
    return np.ascontiguousarray(kernel.T)
