"""Grids of small images as one array: the kernels of a layer, its maps, the inputs of a batch."""

import math

import numpy as np


def tile(images: np.ndarray, columns: int, gap: int = 1, background: int = 255) -> np.ndarray:
    """Puts (N, H, W, 3) uint8 images side by side, row by row, `gap` pixels apart."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), background, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def columns_of(count: int) -> int:
    """How many columns make a grid of `count` images about twice as wide as high."""
    return max(1, min(count, math.ceil(math.sqrt(2 * count))))


def kernels(kernel: np.ndarray, towers: int) -> list[np.ndarray]:
    """The kernels of the first layer as RGB (figure 3 of the paper): a grid of uint8 for each tower.

    Args:
      kernel: (height, width, 3, features) float; the first tower has the first half of the features.
      towers: how many towers.

    Returns:
      A grid each. 0 is grey, and every kernel is scaled by its own largest weight.
    """
    most = np.maximum(np.abs(kernel).max((0, 1, 2)), np.finfo(np.float32).tiny)
    pixels = np.moveaxis(np.round(127.5 + 127.5 * kernel / most).astype(np.uint8), -1, 0)
    parts = np.array_split(pixels, towers)
    return [tile(part, columns_of(len(part))) for part in parts]


def maps(values: np.ndarray, towers: int) -> list[np.ndarray]:
    """The maps of a layer in grey: a grid of uint8 for each tower.

    Args:
      values: (height, width, features) float; or (features,), which are shown as maps of one pixel.
      towers: how many towers.

    Returns:
      A grid each, (rows, columns, 3). The lowest value of the layer is black and the highest white.
    """
    values = values[None, None] if values.ndim == 1 else values
    low, high = float(values.min()), float(values.max())
    grey = np.round(255 * (values - low) / max(high - low, np.finfo(np.float32).tiny)).astype(np.uint8)
    pixels = np.repeat(np.moveaxis(grey, -1, 0)[..., None], 3, -1)
    gap = 1 if values.shape[0] > 1 else 0
    return [tile(part, columns_of(len(part)), gap) for part in np.array_split(pixels, towers)]


def stack(grids: list[np.ndarray], gap: int = 4, background: int = 255) -> np.ndarray:
    """Puts grids of equal width one above the other; narrower ones are filled up on the right."""
    width = max(grid.shape[1] for grid in grids)
    rows = []
    for number, grid in enumerate(grids):
        padded = np.full((grid.shape[0] + gap * (number > 0), width, 3), background, np.uint8)
        padded[padded.shape[0] - grid.shape[0] :, : grid.shape[1]] = grid
        rows.append(padded)
    return np.concatenate(rows)
