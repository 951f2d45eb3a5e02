"""The statistics are those of the pixels, exactly."""

import numpy as np
import pytest

from datasets import statistics


def test_statistics_are_those_of_the_pixels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3)).astype(np.uint8)
    images[..., 1] = images[..., 0] // 2 + images[..., 1] // 3  # correlated colours
    sums = statistics.Statistics.empty(16)
    for image in images:
        sums.add(image, statistics.outer_product(image))
    np.savez(tmp_path / "statistics.npz", **sums.arrays())
    found = statistics.load(tmp_path / "statistics.npz", 16)
    pixels = images.astype(np.float64)
    np.testing.assert_allclose(found["mean_image"], pixels.mean(0), rtol=1e-6)
    check_components(found["principal_std"], found["principal_components"], pixels)


def check_components(std, components, pixels):
    """Compares with the covariance of all pixels."""
    covariance = np.cov(pixels.reshape(-1, 3).T, bias=True)
    np.testing.assert_allclose(components @ components.T, np.eye(3), atol=1e-5)
    assert std[0] >= std[1] >= std[2] > 0
    np.testing.assert_allclose(components.T @ np.diag(std.astype(np.float64) ** 2) @ components, covariance, rtol=1e-3)


@pytest.mark.parametrize("size", [8, 255, 1100])  # less than a block, no whole number of blocks, two parts
@pytest.mark.parametrize("least", [0, 255])
def test_outer_products_are_exact(size, least):
    pixels = np.random.default_rng(0).integers(least, 256, (size, size, 3), np.uint8)
    rgb = pixels.reshape(-1, 3).astype(np.int64)
    np.testing.assert_array_equal(statistics.outer_product(pixels), rgb.T @ rgb)
