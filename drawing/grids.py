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


def columns_of(count: int, aspect: float = 2) -> int:
    """How many columns make a grid of `count` square images about `aspect` times as wide as high, with few gaps."""
    ideal = math.sqrt(aspect * count)
    near = range(min(count, math.ceil(ideal / 1.42)), min(count, math.ceil(ideal * 1.42)) + 1)
    return min(near, key=lambda columns: (-count % columns, abs(columns - ideal)))


def kernels(kernel: np.ndarray, towers: int, aspect: float = 2) -> list[np.ndarray]:
    """The kernels of the first layer as RGB (figure 3 of the paper): a grid of uint8 for each tower.

    Args:
      kernel: (height, width, 3, features) float; the first tower has the first half of the features.
      towers: how many towers.
      aspect: width of a grid by its height, about.

    Returns:
      A grid each. 0 is grey, and every kernel is scaled by its own largest weight.
    """
    most = np.maximum(np.abs(kernel).max((0, 1, 2)), np.finfo(np.float32).tiny)
    pixels = np.moveaxis(np.round(127.5 + 127.5 * kernel / most).astype(np.uint8), -1, 0)
    parts = np.array_split(pixels, towers)
    return [tile(part, columns_of(len(part), aspect)) for part in parts]


def selectivity(kernel: np.ndarray, towers: int) -> list[float]:
    """The colour selectivity of each tower's kernels: 0 if all are grey, 1 if none has any grey.

    Of a kernel it is the share of its energy, the sum of its squared weights, that is left when the RGB of each pixel
    has lost its projection on the grey axis (1, 1, 1) / √3. A tower has the mean over its kernels; zeros count as grey.

    Args:
      kernel: (height, width, 3, features) float; the first tower has the first half of the features.
      towers: how many towers.
    """
    wide = kernel.astype(np.float64)
    energy, grey = np.square(wide).sum((0, 1, 2)), np.square(wide.sum(2)).sum((0, 1)) / 3
    shares = np.where(energy > 0, 1 - grey / np.where(energy > 0, energy, 1), 0)
    return [float(part.mean()) for part in np.array_split(shares, towers)]


SMALLEST = 24  # pixels a side of a map in a grid, so that a gap is narrow beside it


def maps(values: np.ndarray, towers: int, aspect: float = 2) -> list[np.ndarray]:
    """The maps of a layer in grey: a grid of uint8 for each tower.

    Args:
      values: (height, width, features) float; or (features,), which are shown as maps of one pixel.
      towers: how many towers.
      aspect: width of a grid by its height, about.

    Returns:
      A grid each, (rows, columns, 3). The lowest value of the layer is black, and the highest half per cent are white.
      Pixels of small maps are repeated.
    """
    flat = values.ndim == 1
    values = values[None, None] if flat else values
    low, high = float(values.min()), float(np.quantile(values, 0.995))
    high = high if high > low else float(values.max())
    grey = np.clip(255 * (values - low) / max(high - low, np.finfo(np.float32).tiny), 0, 255).round().astype(np.uint8)
    times = 1 if flat else -(-SMALLEST // min(SMALLEST, *values.shape[:2]))
    pixels = np.repeat(np.moveaxis(grey, -1, 0)[..., None], 3, -1).repeat(times, 1).repeat(times, 2)
    return [tile(part, columns_of(len(part), aspect), 0 if flat else 1) for part in np.array_split(pixels, towers)]


def stack(grids: list[np.ndarray], gap: int = 4, background: int = 255) -> np.ndarray:
    """Puts grids of equal width one above the other; narrower ones are filled up on the right."""
    width = max(grid.shape[1] for grid in grids)
    rows = []
    for number, grid in enumerate(grids):
        padded = np.full((grid.shape[0] + gap * (number > 0), width, 3), background, np.uint8)
        padded[padded.shape[0] - grid.shape[0] :, : grid.shape[1]] = grid
        rows.append(padded)
    return np.concatenate(rows)
