"""Views and the arithmetic on pixels against NumPy."""

import numpy as np
import pytest

import recipes
import views


def test_ten_views_are_the_papers():
    assert views.offsets(256, 224, "ten").tolist() == [[0, 0], [0, 32], [32, 0], [32, 32], [16, 16]]
    assert views.offsets(256, 224, "centre").tolist() == [[16, 16]]


@pytest.mark.parametrize(("size", "crop", "first"), [(8, 4, 2), (9, 4, 2), (8, 5, 1), (7, 7, 0)])
def test_the_odd_pixel_of_a_margin_falls_to_the_right_and_bottom(size, crop, first):
    image = np.arange(size * size * 3).reshape(size, size, 3)
    np.testing.assert_array_equal(views.center(image, crop), image[first : first + crop, first : first + crop])
    np.testing.assert_array_equal(views.cut(image[None], (first, first), crop)[0], views.center(image, crop))


def test_the_input_is_gain_times_scale_times_image_less_mean_plus_shift():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, 6, 6, 3)).astype(np.uint8)
    mean, shift = recipes.mean_image(9), random.normal(0, 12, (3, 3)).astype(np.float32)
    gain = np.array([1, 1 / 1.1, 0.5], np.float32)
    # The odd pixel of the mean image's margin falls to the right and bottom.
    plain = images.astype(np.float64) - mean[1:7, 1:7]
    np.testing.assert_allclose(views.to_input(images, mean, 0.25), plain / 4, rtol=1e-5)
    full = (plain + shift[:, None, None]) * (0.25 * gain.astype(np.float64))[:, None, None, None]
    found = views.to_input(images, mean, 0.25, shift, gain)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, full, rtol=1e-5, atol=1e-5)
