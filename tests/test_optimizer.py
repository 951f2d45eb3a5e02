"""The update rule and the schedules against plain NumPy in float64, and against the rates of the 2012 source."""

import jax
import numpy as np
import optax
import pytest

import optimizer
from configs import alexnet, alexnet_2012
from errors import UserError


def trees(seed=0):
    random = np.random.default_rng(seed)
    return {
        layer: {"kernel": random.normal(size=(3, 4)), "bias": random.normal(size=4)}
        for layer in ("conv1", "conv2", "fc8")
    }


def as_float32(tree):
    return jax.tree.map(np.float32, tree)


def test_rule_is_the_papers():
    """v ← 0.9 v − 5e-4·ε·w − ε·g; w ← w + v, with ε changing on the way and no decay on biases."""
    config = alexnet.get_config()
    config.optimizer.bias_rate = 2.0
    config.schedule.factors = ((2.0, 0.1),)
    rates = optimizer.Rates(config.optimizer, config.schedule, steps_per_epoch=1.5)
    rule = optimizer.build(config.optimizer, rates)
    params = as_float32(trees())
    state = rule.init(params)
    w, v = trees(), jax.tree.map(np.zeros_like, trees())
    for step in range(6):
        gradients = trees(step + 1)
        updates, state = rule.update(as_float32(gradients), state, params, step=step, rate_factor=np.float32(0.5))
        params = optax.apply_updates(params, updates)
        for layer in w:
            for kind in ("kernel", "bias"):
                rate = 0.01 * 0.5 * (0.1 if step >= 3 else 1) * (2 if kind == "bias" else 1)
                decay = 5e-4 if kind == "kernel" else 0
                v[layer][kind] = 0.9 * v[layer][kind] - decay * rate * w[layer][kind] - rate * gradients[layer][kind]
                w[layer][kind] = w[layer][kind] + v[layer][kind]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, w)


@pytest.mark.parametrize(
    ("epoch", "conv1", "others"),
    [(0, 1e-2, 1e-2), (24, 1e-2, 1e-2), (25, 1e-3, 1e-3), (51, 1e-4, 1e-4), (66, 1e-4, 1e-4), (67, 1e-5, 1e-4)]
    + [(72, 0, 1e-4), (78, 0, 1e-4), (79, 0, 1e-5), (90, 0, 1e-5)],
)
def test_rates_of_2012(epoch, conv1, others):
    """The epochs at which layer-params-145.cfg changed its rates, and biases at twice the rate."""
    config = alexnet_2012.get_config()
    rates = optimizer.Rates(config.optimizer, config.schedule, steps_per_epoch=100.0)
    tree = rates.tree(trees(), 100 * epoch)
    np.testing.assert_allclose(tree["conv1"]["kernel"], conv1, rtol=1e-6)
    np.testing.assert_allclose(tree["conv1"]["bias"], 2 * conv1, rtol=1e-6)
    np.testing.assert_allclose(tree["fc8"]["kernel"], others, rtol=1e-6)


def test_frozen_layer_does_not_move():
    config = alexnet.get_config()
    config.schedule.layers = (("conv1", ((0.0, 0.0),)),)
    rule = optimizer.build(config.optimizer, optimizer.Rates(config.optimizer, config.schedule, 10.0))
    params = as_float32(trees())
    updates, _ = rule.update(as_float32(trees(1)), rule.init(params), params, step=0, rate_factor=np.float32(1))
    assert not np.any(updates["conv1"]["kernel"]) and np.all(updates["conv2"]["kernel"])


def test_plateau_divides_three_times():
    schedule = alexnet.get_config().schedule
    schedule.patience, state, factors = 2, optimizer.Plateau(), []
    for error in [0.9, 0.8, 0.8, 0.81, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]:
        state = state.after(error, schedule)
        factors.append(state.rate_factor(schedule))
    expected = [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.001, 0.001]
    np.testing.assert_allclose(factors, expected)
    assert state.best == 0.7
    schedule.name = "steps"
    assert state.rate_factor(schedule) == 1


def test_adam_moves_every_parameter_by_its_rate():
    """Adam's first step is the learning rate in size, whatever the gradient."""
    config = alexnet.get_config()
    config.optimizer.update(name="adam", learning_rate=1e-3, weight_decay=0.0)
    rule = optimizer.build(config.optimizer, optimizer.Rates(config.optimizer, config.schedule, 10.0))
    params = as_float32(trees())
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam mixes dtypes
        updates, _ = rule.update(as_float32(trees(1)), rule.init(params), params, step=0, rate_factor=np.float32(1))
    np.testing.assert_allclose(np.abs(updates["fc8"]["kernel"]), 1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optimizer.name": "sdg"}, "did you mean sgd"),
        ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate=nan"),
        ({"optimizer.momentum": 1.0}, "optimizer.momentum"),
        ({"schedule.name": "plato"}, "did you mean plateau"),
        ({"schedule.patience": 0}, "schedule.patience"),
        ({"schedule.name": "steps", "schedule.factors": ((5.0, 0.1), (2.0, 0.01))}, "in order of the epochs"),
        ({"schedule.name": "steps", "schedule.factors": (30.0, 0.1)}, "with its comma"),
        ({"schedule.factors": ((5.0, 0.1),)}, "goes with schedule.name='steps'"),
        ({"schedule.layers": ("conv1", ((5.0, 0.1),))}, "with its commas"),
        ({"schedule.layers": (("conv1", ((-1.0, 0.1),)),)}, "schedule.layers"),
    ],
)
def test_bad_values_are_refused(change, says):
    config = alexnet.get_config()
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=says):
        optimizer.validate(config)


def test_rates_of_a_layer_that_is_not_there():
    config = alexnet.get_config()
    config.schedule.layers = (("conv9", ((1.0, 0.1),)),)
    with pytest.raises(UserError, match="conv9"):
        optimizer.Rates(config.optimizer, config.schedule, 1.0).tree(trees(), 0)
