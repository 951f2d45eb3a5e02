"""The reference's own gradients, against finite differences."""

import numpy as np
import pytest

import reference

MAPS = (4, 6, 8, 8, 6, 10, 8)


@pytest.mark.parametrize("order", ["paper", "2012"])
@pytest.mark.parametrize("exchange", [("conv3", "fc6", "fc7"), (), ("conv2", "fc7")])
def test_gradients_are_those_of_the_loss(order, exchange):
    rng = np.random.default_rng(0)
    params = reference.random_params(rng, MAPS, classes=5, pixels=1, exchange=exchange, deviation=0.3)
    images = rng.standard_normal((2, 64, 66, 3))
    labels = np.array([1, 4])
    options = {
        "exchange": exchange,
        "order": order,
        "masks": {name: rng.integers(0, 2, (2, width)) for name, width in (("fc6", 10), ("fc7", 8))},
        "lrn": {"k": 1.0, "n": 3, "alpha": 0.1, "beta": 0.75},
    }
    # A dead network would pass every check.
    for name in ("fc6", "fc7"):
        params[name]["bias"] += 1.0
    _, grads = reference.loss_and_gradients(params, images, labels, **options)
    for name, layer in params.items():
        for key, value in layer.items():
            direction = rng.standard_normal(value.shape)
            losses = []
            for step in (1e-6, -1e-6):
                moved = {**params, name: {**layer, key: value + step * direction}}
                losses.append(reference.loss_and_gradients(moved, images, labels, **options)[0])
            expected = (losses[0] - losses[1]) / 2e-6
            assert expected != 0
            np.testing.assert_allclose(
                (grads[name][key] * direction).sum(), expected, rtol=1e-4, atol=1e-8, err_msg=f"{name}/{key}"
            )


def test_sizes_of_the_paper():
    rng = np.random.default_rng(0)
    params = reference.random_params(rng, MAPS, classes=5, pixels=36)
    logits, cache = reference.forward(params, rng.standard_normal((1, 224, 224, 3)))
    assert logits.shape == (1, 5)
    sizes = {name: saved[0].shape[1] for step, name, saved, _ in cache if step == "conv"}
    assert sizes == {"conv1": 224, "conv2": 27, "conv3": 13, "conv4": 13, "conv5": 13}


def test_update_is_the_papers_rule():
    params, velocity, grads = ({"fc8": {"kernel": np.array([v]), "bias": np.array([v])}} for v in (2.0, 0.5, 3.0))
    params, velocity = reference.update(params, velocity, grads, {"fc8": {"kernel": 0.01, "bias": 0.02}})
    np.testing.assert_allclose(velocity["fc8"]["kernel"], 0.9 * 0.5 - 5e-4 * 0.01 * 2 - 0.01 * 3, rtol=1e-12)
    np.testing.assert_allclose(velocity["fc8"]["bias"], 0.9 * 0.5 - 0.02 * 3, rtol=1e-12)
    np.testing.assert_allclose(params["fc8"]["kernel"], 2 + velocity["fc8"]["kernel"], rtol=1e-12)


def test_hand_computed_layers():
    x = np.array([1.0, 2.0, 3.0]).reshape(1, 1, 1, 3)
    # Windows of 3 maps, cut at the ends: 1+4, 1+4+9, 4+9.
    np.testing.assert_allclose(reference.lrn(x, 2, 3, 1, 1).ravel(), [1 / 7, 2 / 16, 3 / 15])
    ramp = np.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(reference.max_pool(ramp, 3, 2).ravel(), [10, 11, 14, 15])
    np.testing.assert_array_equal(reference.avg_pool(ramp, 3, 2).ravel(), [5, 6.5, 11, 12.5])
    ones = np.ones((1, 3, 3, 1))
    sums = reference.conv(ones, np.ones((3, 3, 1, 1)), 0.5, 1, ((1, 1), (1, 1)))
    np.testing.assert_array_equal(sums.ravel(), np.array([4, 6, 4, 6, 9, 6, 4, 6, 4]) + 0.5)
