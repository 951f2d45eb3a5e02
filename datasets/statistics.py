"""The statistics of a training split: its mean image, and the principal components of its colours."""

import dataclasses
import pathlib
from collections.abc import Iterable

import numpy as np

# Of what `load` returns; None stands for the side of the images in pixels.
SHAPES = {"mean_image": (None, None, 3), "principal_std": (3,), "principal_components": (3, 3)}


@dataclasses.dataclass
class Statistics:
    """Sums over the images of a training split. They are exact: whole numbers.

    Attributes:
      count: images so far.
      image_sum: (S, S, 3), the sum of the images: uint32, which takes 2^24 images, or float64.
      outer_sum: (3, 3) float64, the sum of their outer products.
    """

    count: int
    image_sum: np.ndarray
    outer_sum: np.ndarray

    @classmethod
    def empty(cls, size: int) -> "Statistics":
        """The sums before the first image; `size` is the side in pixels."""
        return cls(0, np.zeros((size, size, 3), np.uint32), np.zeros((3, 3)))

    @classmethod
    def total(cls, parts: Iterable["Statistics"]) -> "Statistics":
        """The sums over all images of one or more parts."""
        parts = iter(parts)
        first = next(parts)
        found = cls(first.count, first.image_sum.astype(np.float64), first.outer_sum)
        for part in parts:
            found.count += part.count
            found.image_sum += part.image_sum
            found.outer_sum = found.outer_sum + part.outer_sum
        return found

    def add(self, pixels: np.ndarray, outer: np.ndarray) -> None:
        """Adds one image, (S, S, 3) uint8, and its `outer_product`."""
        self.count += 1
        self.image_sum += pixels
        self.outer_sum += outer

    def arrays(self) -> dict[str, np.ndarray]:
        """The mean image and the principal components (paper, section 4.1), as `load` returns them."""
        mean_image = self.image_sum / self.count
        mean = mean_image.mean((0, 1))
        covariance = self.outer_sum / (self.count * mean_image[..., 0].size) - np.outer(mean, mean)
        variances, vectors = np.linalg.eigh(covariance)
        arrays = {
            "mean_image": mean_image,
            "principal_std": np.sqrt(np.maximum(variances[::-1], 0)),
            "principal_components": vectors.T[::-1],
        }
        return {name: array.astype(np.float32) for name, array in arrays.items()}


def load(path: pathlib.Path, size: int) -> dict[str, np.ndarray]:
    """Reads stored `Statistics.arrays` of images of side `size`, in float32.

    Returns:
      mean_image (S, S, 3), RGB in 0–255; principal_std (3,), the standard deviation along each component, largest
      first; principal_components (3, 3), rows of unit length.

    Raises:
      ValueError or what NumPy raises: the file is damaged.
    """
    shapes = {name: tuple(side or size for side in shape) for name, shape in SHAPES.items()}
    # Pickles can run code. A file that `np.load` itself opens stays open if it is damaged.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in shapes}
    for name, array in arrays.items():
        if (array.shape, array.dtype) != (shapes[name], np.float32) or not np.isfinite(array).all():
            raise ValueError(f"{name} is not {shapes[name]} finite float32 numbers")
    return arrays


def outer_product(pixels: np.ndarray) -> np.ndarray:
    """The sum over pixels of RGB's outer product with itself: (H, W, 3) uint8 to (3, 3) float64, without rounding."""
    # A sum of 256 products is at most 256 · 255², a whole number that float32 holds exactly. Batching eight pixels
    # makes the product worth the call; only its diagonal 3×3 blocks are kept.
    values, sums = pixels.ravel(), np.zeros((24, 24))
    step = 512 * 256 * 24  # values; a large image in one piece would take 200 MB
    for part in np.split(values, range(step, len(values), step)):
        together = np.zeros((-(-len(part) // (256 * 24)), 256, 24), np.float32)
        together.reshape(-1)[: len(part)] = part
        sums += (together.transpose(0, 2, 1) @ together).sum(0, dtype=np.float64)
    return np.einsum("aiaj->ij", sums.reshape(8, 3, 8, 3))
