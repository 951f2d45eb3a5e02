"""torchvision's AlexNet: published sizes, and a forward pass written for this test in NumPy, float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import models
import parallel
import reference
from common.errors import UserError
from configs import torchvision

# Kernel, stride, padding, and whether max-pooling follows: of torchvision/models/alexnet.py.
FEATURES = [(11, 4, 2, True), (5, 1, 2, True), (3, 1, 1, False), (3, 1, 1, False), (3, 1, 1, True)]


def narrow(**changes):
    return torchvision.get_config().model.to_dict() | dict(num_classes=7, width=0.125) | changes


@functools.cache
def initial():
    network = models.build(narrow(), None, 63)
    return jax.device_get(jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 63, 63, 3))))["params"]


def case(side, count=4):
    images = np.random.default_rng(0).normal(0, 1, (count, side, side, 3)).astype(np.float32)
    return models.build(narrow(), None, side), initial(), images


def adaptive_average(x, count=6):
    """PyTorch's AdaptiveAvgPool2d."""
    bounds = [[(i * n // count, -(-(i + 1) * n // count)) for i in range(count)] for n in x.shape[1:3]]
    return np.stack([np.stack([x[:, t:b, s:e].mean((1, 2)) for s, e in bounds[1]], 1) for t, b in bounds[0]], 1)


def forward(params, images):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = images.astype(np.float64)
    for i, (_, stride, pad, pooled) in enumerate(FEATURES, 1):
        x = reference.conv(x, params[f"conv{i}"]["kernel"], params[f"conv{i}"]["bias"], stride, ((pad, pad),) * 2)
        x = np.maximum(x, 0)
        if pooled:
            height, width = ((n - 3) // 2 * 2 + 3 for n in x.shape[1:3])  # floor mode: whole windows only
            x = reference.max_pool(x[:, :height, :width], 3, 2)
    x = adaptive_average(x).reshape(len(x), -1)
    for name in ("fc6", "fc7", "fc8"):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = x if name == "fc8" else np.maximum(x, 0)
    return x


@pytest.mark.parametrize("side", [63, 90, 224, 300])  # maps of 1, 2, 6 and 8 pixels before the adaptive pooling
def test_logits_are_the_references(side):
    network, params, images = case(side, count=2)
    expected = forward(params, images)
    assert np.std(expected, axis=0).max() > 1e-4, "the network says the same of every image"
    logits = jax.jit(network.apply)({"params": params}, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_published_sizes():
    config = torchvision.get_config()
    rows = models.layer_table(config.model, config.input.crop)
    assert sum(row.parameters for row in rows) == 61_100_840
    assert sum(row.multiply_adds for row in rows) == 714_188_480
    assert [row.output[-1] for row in rows] == [64, 192, 384, 256, 256, 4096, 4096, 1000]
    assert [row.output[0] for row in rows[:5]] == [55, 27, 13, 13, 13]
    assert not any(row.exchange for row in rows)


def test_initial_weights_are_pytorchs():
    """Kernels and biases are uniform within 1/√fan-in."""
    _, params, _ = case(63)
    for name, leaves in params.items():
        bound = np.prod(leaves["kernel"].shape[:-1]) ** -0.5
        for kind, leaf in leaves.items():
            assert np.abs(leaf).max() <= bound
            if leaf.size > 100:
                assert leaf.std() == pytest.approx(bound / np.sqrt(3), rel=0.1), (name, kind)
                assert np.abs(leaf).max() > 0.95 * bound


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    network, params, _ = case(63)
    rngs = {"dropout": jax.random.key(0)}
    x = jnp.ones((4, 1000))
    dropped = network.apply({}, x, True, None, method="dropout", rngs=rngs)
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert float(dropped.mean()) == pytest.approx(1, abs=0.1)
    np.testing.assert_array_equal(network.apply({}, x, False, None, method="dropout"), x)

    maps = np.random.default_rng(0).normal(size=(4, 6, 6, 32)).astype(np.float32)

    def logits(network, train, key=0):
        rngs = {"dropout": jax.random.key(key)}
        return network.apply({"params": params}, maps, train, None, method="fully_connected", rngs=rngs)

    assert not np.allclose(logits(network, True), logits(network, True, key=1))
    without = models.build(narrow(dropout_rate=0.0), None, 63)
    np.testing.assert_array_equal(logits(without, True), logits(network, False))


@pytest.mark.slow
def test_one_device_and_two_learn_alike(monkeypatch):
    """Data parallel, with dropout by the number of the example: the mean gradients are those of the whole batch.

    The one device computes them from the plain layers, by XLA's own gradients, and takes the batch in halves.
    """
    _, params, images = case(63)
    labels = np.arange(4, dtype=np.int32)

    def gradients(devices):
        layout = parallel.Layout(1, towers=1, devices=jax.devices()[:devices])
        placement = dataclasses.replace(layout.towers(1), cores=2 if devices == 1 else 1)
        network = models.build(narrow(), placement, 63)

        def step(params, batch):
            def loss(params):
                rows, rngs = layout.row_numbers(len(batch["image"])), {"dropout": jax.random.key(2)}
                logits = network.apply({"params": params}, batch["image"], train=True, rows=rows, rngs=rngs)
                return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

            return layout.mean(jax.grad(loss)(params))

        found = layout.map(step)(layout.shard(params), layout.put({"image": images, "label": labels}))
        return layout.merge(found, params)

    two = gradients(2)
    for module in (models.towers, models.torchvision):
        monkeypatch.setattr(module, "ops", models.layers)
    one = gradients(1)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max(), err_msg=jax.tree_util.keystr(path))


def test_what_cannot_work_is_refused():
    for change, side, says in ((dict(towers=2), 224, "model.towers=2"), ({}, 62, "input.crop=62 must lie between 63")):
        with pytest.raises(UserError, match=says):
            models.build(narrow(**change), None, side)
    models.build(narrow(), None, 63)
