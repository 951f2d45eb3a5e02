"""Evaluation against NumPy: views, sums and ties, on one device and on a grid."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import evaluate
import parallel
import recipes
import update
import views

SIZE, CROP, CLASSES = 12, 9, 7
INPUT = ml_collections.ConfigDict(dict(crop=CROP, scale=0.25, channel_std=(0.25, 0.5, 1.0)))


class Pixels(nn.Module):
    """Logits that depend on where each pixel is, so that views and reflections differ."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(CLASSES, name="fc", kernel_init=nn.initializers.normal(0.02))(images.reshape(len(images), -1))


@pytest.fixture(scope="module")
def case():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (50, SIZE, SIZE, 3)).astype(np.uint8)
    labels = random.integers(0, CLASSES - 1, 50).astype(np.int32)  # the last class has no examples
    params = Pixels().init(jax.random.key(0), jnp.zeros((1, CROP, CROP, 3)))["params"]
    return images, labels, recipes.mean_image(SIZE), jax.device_get(params)


def batches(images, labels, size):
    for start in range(0, len(images), size):
        picked = np.minimum(np.arange(start, start + size), len(images) - 1)
        mask = (np.arange(start, start + size) < len(images)).astype(np.float32)
        yield {"image": images[picked], "label": labels[picked], "mask": mask}


def expected(case, which):
    images, labels, mean, params = case
    places = [(1, 1)] if which == "centre" else [(0, 0), (0, 3), (3, 0), (3, 3), (1, 1)]
    total = 0
    for top, left in places:
        view = images[:, top : top + CROP, left : left + CROP].astype(np.float64) - mean[1 : 1 + CROP, 1 : 1 + CROP]
        view = view * [1.0, 0.5, 0.25]  # INPUT.scale / INPUT.channel_std
        for side in (view,) if which == "centre" else (view, view[:, :, ::-1]):
            logits = side.reshape(len(side), -1) @ params["fc"]["kernel"].astype(np.float64) + params["fc"]["bias"]
            e = np.exp(logits - logits.max(1, keepdims=True))
            total = total + e / e.sum(1, keepdims=True)
    p = total / total.sum(1, keepdims=True)
    order = np.argsort(-p, axis=1)
    right = order[:, 0] == labels
    return {
        "loss": -np.log(p[np.arange(len(p)), labels]).mean(),
        "top1_error": 1 - right.mean(),
        "top5_error": 1 - (order[:, :5] == labels[:, None]).any(1).mean(),
        "mean_class_accuracy": np.mean([right[labels == c].mean() for c in range(CLASSES - 1)]),
    }


@pytest.mark.parametrize("which", views.VIEWS)
@pytest.mark.parametrize(("devices", "size"), [(1, 7), (1, 64), (4, 16), (2, 50)])
def test_every_example_counts_once(case, which, devices, size):
    images, labels, mean, params = case
    layout = parallel.Layout(1, devices=jax.devices()[:devices])
    step = evaluate.build(Pixels(), layout, mean, INPUT, which)
    values = evaluate.run(step, layout.shard(params), batches(images, labels, size), layout)
    for name, value in expected(case, which).items():
        assert values[name] == pytest.approx(value, rel=1e-5), name


def test_two_towers_evaluate_as_one_device():
    config = recipes.narrow()
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (10, 80, 80, 3)).astype(np.uint8)
    labels = random.integers(0, 7, 10).astype(np.int32)
    params = None
    seen = []
    for devices, per_network in ((1, 1), (4, 2)):
        layout = parallel.Layout(per_network, devices=jax.devices()[:devices])
        if params is None:
            params = jax.device_get(update.init_state(config)).params
        network = update.build_network(config, layout)
        step = evaluate.build(network, layout, recipes.mean_image(), config.input, "ten")
        seen.append(evaluate.run(step, layout.shard(params), batches(images, labels, 8), layout))
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)


def test_a_network_that_says_nothing_is_never_right(case):
    images, labels, mean, params = case
    layout = parallel.Layout(1, devices=jax.devices()[:1])
    for bad in (0.0, np.nan):
        constant = jax.tree.map(lambda leaf, bad=bad: np.full_like(leaf, bad), params)
        step = evaluate.build(Pixels(), layout, mean, INPUT, "centre")
        values = evaluate.run(step, layout.shard(constant), batches(images, labels, 25), layout)
        assert values["top1_error"] == values["top5_error"] == 1
