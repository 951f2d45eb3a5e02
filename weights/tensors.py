"""Files of tensors by name: PyTorch's, which needs PyTorch, and safetensors."""

import io
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from common import files
from common.errors import UserError, require, shortened

TORCH, SAFE = (".pth", ".pt"), (".safetensors",)


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a state_dict as float32 arrays; nothing in the file is executed.

    Raises:
      UserError: it is missing, damaged, or holds something else.
    """
    require(path.is_file(), f"{path} is not there, or is no file.")
    try:
        with warnings.catch_warnings(action="ignore"):  # the sentence says what counts
            return _read_torch(path) if path.suffix in TORCH else _read_safe(path)
    except UserError:
        raise
    except Exception as error:  # both libraries raise anything on damaged files
        raise UserError(f"{path} cannot be read, or is damaged: {_reason(error)}.") from None


def write(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state_dict, whole or not at all; the suffix says which kind of file.

    Raises:
      UserError: it cannot be written, or PyTorch is missing.
    """
    if path.suffix in TORCH:
        torch, content = _torch(), io.BytesIO()
        torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, content)
        content = content.getbuffer()
    else:
        content = safetensors.numpy.save(dict(tensors))
    with files.replacing(path) as partial:  # both libraries have errors of their own for a full disk
        partial.write_bytes(content)


def _read_torch(path):
    torch = _torch()
    if zipfile.is_zipfile(path):  # PyTorch compares no checksums
        with zipfile.ZipFile(path) as archive:
            require(archive.testzip() is None, f"{path} is damaged: a checksum in it is wrong.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))  # what PyTorch goes on to advise would execute the file
        raise UserError(
            f"{path} is damaged, or holds more than tensors{f' ({asked[1]})' if asked else ''}. Nothing in it was "
            f"executed. Store `network.state_dict()` alone."
        ) from None
    tensors = found if isinstance(found, dict) else {}
    fits = tensors and all(isinstance(value, torch.Tensor) for value in tensors.values())
    require(fits, f"{path} is no state_dict, but {_kind(found)}. Store `network.state_dict()` alone.")
    for name, tensor in tensors.items():
        _check_type(path, name, tensor.dtype, tensor.is_floating_point())
    return {str(name): tensor.detach().float().numpy() for name, tensor in tensors.items()}


def _read_safe(path):
    tensors = safetensors.numpy.load_file(path)
    for name, array in tensors.items():
        _check_type(path, name, array.dtype, jnp.issubdtype(array.dtype, np.floating))
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def _check_type(path, name, kind, floating):
    require(floating, f"{path}: {name} holds {kind}, and must hold floating-point numbers.")


def _torch():
    try:
        import torch
    except ImportError:
        raise UserError(
            "Files of PyTorch need PyTorch, which this project does without: `pip install torch`, or use .safetensors."
        ) from None
    return torch


def _kind(found) -> str:
    if isinstance(found, dict):
        return f"a dictionary of {shortened(', '.join(map(str, found))) or 'nothing'}"
    return f"a {type(found).__name__}"


def _reason(error: Exception) -> str:
    first, *_ = " ".join(str(error).split()).split(". ")  # PyTorch's next ones advise to execute the file
    return shortened(first).rstrip(".") or type(error).__name__
