"""What is measured of a step, against the float64 network of `reference`, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import optimizer
import parallel
import recipes
import reference
import update

STEPS, RATE_FACTOR = 2, 0.5
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


def measured(config, devices, per_network):
    """The metrics of the last of STEPS, and the merged state before it."""
    layout = parallel.Layout(per_network, devices=jax.devices()[:devices])
    step = update.build_step(config, layout, recipes.mean_image(), optimizer.Rates(config, 5.0))
    merged = jax.device_get(update.init_state(config))
    state = layout.shard(merged)
    for number in range(STEPS):
        before = layout.merge(state, merged)
        batch, measure = layout.put(recipes.batch(config, number)), number == STEPS - 1
        state, _, found = step(state, batch, np.float32(RATE_FACTOR), np.bool_(measure))
        if not measure:
            assert not any(map(any, layout.of_network(found)["dead_units"].values()))
    return update.measurements(layout.of_network(found | update.build_weigh(layout)(state))), before


def applied(config, devices, per_network):
    """The values of the last of STEPS, the merged state before it, and its gradients, read off the velocities."""
    config.optimizer.update(momentum=0.0, weight_decay=0.0, learning_rate=1.0)
    config.schedule.name = "steps"
    config.schedule.factors = ()
    layout = parallel.Layout(per_network, devices=jax.devices()[:devices])
    step = update.build_step(config, layout, recipes.mean_image(), optimizer.Rates(config, 5.0))
    before = jax.device_get(update.init_state(config)).replace(step=np.int32(STEPS - 1))
    batch = layout.put(recipes.batch(config, STEPS - 1))
    state, values, _ = step(layout.shard(before), batch, np.float32(1), np.bool_(False))
    after = layout.merge(state, before)
    gradient = jax.tree.map(lambda velocity: -np.float64(velocity), after.opt_state[-1].trace)
    return parallel.first(values), before, gradient


def norm(*arrays):
    return np.sqrt(sum(np.sum(np.float64(array) ** 2) for array in arrays))


@pytest.mark.parametrize(("devices", "per_network"), [(1, 1), (2, 2), (4, 2)])
def test_what_is_measured_is_what_the_step_does(devices, per_network):
    config = recipes.narrow(dropout_rate=0.0, init="he")
    config.input.scale = 0.0156
    config.optimizer.bias_rate = 2.0
    metrics, before = measured(config, devices, per_network)
    params, batch = before.params, recipes.batch(config, STEPS - 1)
    mean = recipes.mean_image()[6:73, 6:73]
    images = (batch["image"] - np.float64(mean) + batch["shift"][:, None, None]) * batch["gain"][:, None, None, None]
    masks = {name: np.ones((len(images), params[name]["bias"].size)) for name in ("fc6", "fc7")}
    options = {"masks": masks, "rate": 0.0}
    _, gradients = reference.loss_and_gradients(params, images * 0.0156, batch["label"], **options)
    assert metrics.pop("gradient_norm") == pytest.approx(
        norm(*(leaf for layer in gradients.values() for leaf in layer.values())), rel=1e-4
    )

    rates = {name: {"kernel": 0.02 * RATE_FACTOR, "bias": 0.04 * RATE_FACTOR} for name in LAYERS}
    after, velocity = reference.update(params, before.opt_state[-1].trace, gradients, rates)
    for name in LAYERS:
        expected = norm(velocity[name]["kernel"]) / norm(after[name]["kernel"])
        assert metrics.pop(f"update_to_weight/{name}") == pytest.approx(expected, rel=1e-4), name

    rows = len(images) * per_network // devices  # those of the first network
    _, steps = reference.forward(params, images[:rows] * 0.0156, rate=0.0)
    for _, name, towers, _ in (step for step in steps if step[0] == "relu"):
        dead = np.mean(np.concatenate(towers, -1) <= 0)
        assert 0 < dead < 1
        assert metrics.pop(f"dead_units/{name}") == pytest.approx(dead, abs=1e-3), name
    assert not metrics


@pytest.mark.parametrize(("devices", "per_network"), [(1, 1), (2, 2), (4, 2)])
def test_mixup_has_the_gradients_of_mixed_images_and_targets(devices, per_network):
    """Against float64 with written-out targets, smoothed too; the shares are the same in every layout."""
    config = recipes.narrow(dropout_rate=0.0, init="he")
    config.input.scale = 0.0156
    config.mixup = 0.7
    config.label_smoothing = 0.1
    values, before, gradient = applied(config, devices, per_network)
    batch, mean = recipes.batch(config, STEPS - 1), recipes.mean_image()[6:73, 6:73]
    images = (batch["image"] - np.float64(mean) + batch["shift"][:, None, None]) * batch["gain"][:, None, None, None]
    count = len(images)
    neighbour = np.arange(count) ^ 1
    key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), STEPS - 1))[1]
    share = np.float64(update.mixture_of(0.7, key, jnp.arange(count))(jnp.ones(count), jnp.zeros(count)))
    own = share[:, None, None, None]
    images = (own * images + (1 - own) * images[neighbour]) * 0.0156
    targets = 0.9 * np.eye(7)[batch["label"]] + 0.1 / 7
    targets = share[:, None] * targets + (1 - share[:, None]) * targets[neighbour]
    masks = {name: np.ones((count, before.params[name]["bias"].size)) for name in ("fc6", "fc7")}
    logits, cache = reference.forward(before.params, images, masks=masks, rate=0.0)
    softmax = np.exp(logits - logits.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    expected = reference.backward(before.params, cache, (softmax - targets) / count, ("conv3", "fc6", "fc7"))
    for name in LAYERS:
        for kind in ("kernel", "bias"):
            error = norm(gradient[name][kind] - expected[name][kind])
            assert error <= 1e-4 * norm(expected[name][kind]), (name, kind)
    assert values["loss"] == pytest.approx(-np.mean(np.log(softmax[np.arange(count), batch["label"]])), rel=1e-4)
    assert values["top1_error"] == pytest.approx(np.mean(np.argmax(logits, -1) != batch["label"]))


def test_shares_follow_the_beta_distribution():
    rows, key = jnp.arange(20_000), jax.random.key(3)
    share = np.array(update.mixture_of(0.5, key, rows)(jnp.ones(len(rows)), jnp.zeros(len(rows))))
    folded = lambda x: scipy.stats.beta.cdf(x, 0.5, 0.5) - scipy.stats.beta.cdf(1 - x, 0.5, 0.5)  # noqa: E731
    assert share.min() >= 0.5 and scipy.stats.kstest(share, folded).pvalue > 0.01
    np.testing.assert_array_equal(update.swapped(jnp.arange(6)), [1, 0, 3, 2, 5, 4])


def test_smoothed_targets_are_shared_out():
    """Against the sum over a written-out target in float64."""
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(6, 5)) * 3, random.integers(0, 5, 6)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for smoothing in (0.0, 0.1, 0.6):
        targets = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
        plain, smoothed = update.cross_entropy(jnp.float32(logits), jnp.int32(labels), smoothing)
        np.testing.assert_allclose(smoothed, -(targets * log).sum(-1), rtol=1e-5)
        np.testing.assert_allclose(plain, -log[np.arange(6), labels], rtol=1e-5)


def test_a_kernel_of_zeros_has_no_ratio():
    sums = {"gradients": {"a": [9.0, 16.0]}, "updates": {"a": [4.0, 0.0]}, "kernels": {"a": [0.0, 0.0]}}
    found = update.measurements(sums | {"dead_units": {"b": [0.25, 0.75]}})
    assert found == {
        "gradient_norm": 5.0,
        "update_to_weight/a": pytest.approx(np.nan, nan_ok=True),
        "dead_units/b": 0.5,
    }
