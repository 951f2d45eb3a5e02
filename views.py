"""Pixels on the device: the views of an image, and the arithmetic that makes them the input of a network.

Every user of pixels comes here: training, evaluation, the benchmarks, and the tools.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VIEWS = ("centre", "ten")


def center(image: Any, size: int) -> Any:
    """The central size×size part of (…, S, S, 3) images; the odd pixel of a margin falls to the right and bottom."""
    top = (image.shape[-3] - size) // 2
    left = (image.shape[-2] - size) // 2
    return image[..., top : top + size, left : left + size, :]


def offsets(image_size: int, crop: int, views: str) -> np.ndarray:
    """Where the views begin, as rows of (top, left): the centre, after the four corners for 'ten' (section 4.1)."""
    margin = image_size - crop
    middle = (margin // 2, margin // 2)
    if views == "centre":
        return np.array([middle])
    return np.array([(0, 0), (0, margin), (margin, 0), (margin, margin), middle])


def cut(images: jax.Array, place: jax.Array, crop: int) -> jax.Array:
    """The crop×crop parts of (N, S, S, 3) images that begin at `place` = (top, left), which may be traced."""
    return jax.lax.dynamic_slice(images, (0, place[0], place[1], 0), (images.shape[0], crop, crop, 3))


def factors(options: Any) -> np.ndarray:
    """What the pixels are multiplied by after the mean is subtracted, of a config's `input` section.

    Returns:
      float32 of shape (1,), or (3,) if the channels differ.
    """
    found = options.scale / np.array(options.channel_std)
    return (found if np.ptp(found) else found[:1]).astype(np.float32)


@jax.named_scope("images")
def to_input(
    images: jax.Array,
    mean_image: np.ndarray,
    factor: np.ndarray,
    shift: jax.Array | None = None,
    gain: jax.Array | None = None,
) -> jax.Array:
    """What the network sees: gain · factor · (images − mean + shift).

    Args:
      images: (N, crop, crop, 3) uint8, RGB in 0–255.
      mean_image: (S, S, 3) float32, S ≥ crop. Its central crop is subtracted from every view, wherever the view was
        taken, as in the source of 2012.
      factor: see `factors`.
      shift: (N, 3) float32, the lighting of each image (section 4.1).
      gain: (N,) float32, a factor for each image.

    Returns:
      (N, crop, crop, 3) float32.
    """
    pixels = images.astype(jnp.float32) - center(mean_image, images.shape[1])
    if shift is not None:
        pixels = pixels + shift[:, None, None, :]
    # Gain and factor are joined first: one pass over the pixels instead of two.
    return pixels * (factor if gain is None else (gain[:, None] * factor)[:, None, None, :])
