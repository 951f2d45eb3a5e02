"""The update rule and the schedules against plain NumPy in float64, and against the rates of the 2012 source."""

import jax
import numpy as np
import optax
import pytest

import optimizer
import update
from common.errors import UserError
from configs import alexnet, alexnet_2012


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
    config.schedule.update(name="steps", factors=((2.0, 0.1),))
    rule, rates = optimizer.build(config), optimizer.Rates(config, steps_per_epoch=1.5)
    params = as_float32(trees())
    state = rule.init(params)
    w, v = trees(), jax.tree.map(np.zeros_like, trees())
    for step in range(6):
        gradients = trees(step + 1)
        now = rates.tree(params, step, np.float32(0.5))
        updates, state = rule.update(as_float32(gradients), state, params, rates=now)
        params = optax.apply_updates(params, updates)
        for layer in w:
            for kind in ("kernel", "bias"):
                rate = 0.01 * 0.5 * (0.1 if step >= 3 else 1) * (2 if kind == "bias" else 1)
                decay = 5e-4 if kind == "kernel" else 0
                v[layer][kind] = 0.9 * v[layer][kind] - decay * rate * w[layer][kind] - rate * gradients[layer][kind]
                w[layer][kind] = w[layer][kind] + v[layer][kind]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, w)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_average_is_of_the_parameters_after_each_update(name):
    """Each update's parameters weigh 0.9 of the next one's, and the initial ones nothing; updates stay as they are."""
    config = alexnet.get_config()
    config.optimizer.name = name
    plain = optimizer.build(config)
    config.optimizer.average = 0.9
    rule, rates = optimizer.build(config), optimizer.Rates(config, 10.0)
    params = as_float32(trees())
    state, other = rule.init(params), plain.init(params)
    after = []
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam mixes dtypes
        for step in range(20):
            of_step = {"rates": rates.tree(params, step)}
            updates, state = rule.update(as_float32(trees(step)), state, params, **of_step, step=np.int32(step))
            without, other = plain.update(as_float32(trees(step)), other, params, **of_step)
            jax.tree.map(np.testing.assert_array_equal, updates, without)
            params = optax.apply_updates(params, updates)
            after.append(params)
    weights = 0.9 ** np.arange(19, -1, -1)
    expected = jax.tree.map(lambda *all_: np.average(np.float64(all_), axis=0, weights=weights), *after)
    whole = update.State(step=np.int32(20), params=params, opt_state=state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole.evaluated, expected)
    assert whole.replace(opt_state=other).evaluated is params


@pytest.mark.parametrize(
    ("epoch", "conv1", "others", "conv1_bias"),
    [
        *((0, 1e-2, 1e-2, 0.02), (24, 1e-2, 1e-2, 0.02), (25, 1e-3, 1e-3, 0.02), (51, 1e-4, 1e-4, 0.02)),
        *((66, 1e-4, 1e-4, 0.02), (67, 1e-5, 1e-4, 0.02), (72, 0, 1e-4, 0), (78, 0, 1e-4, 0)),
        *((79, 0, 1e-5, 0), (90, 0, 1e-5, 0)),
        # The log after the paper: 'longer'.
        *((91, 0, 1e-3, 0), (106, 0, 1e-3, 0), (107, 0, 1e-4, 0), (124, 0, 1e-5, 0), (134, 0, 1e-5, 0)),
    ],
)
def test_rates_of_2012(epoch, conv1, others, conv1_bias):
    """When the log of #145 lowered `epsW`. In layer-params-145.cfg `epsB` stays 0.02; conv1's ends at 0."""
    config = alexnet_2012.get_config("longer" if epoch > 90 else "")
    rates = optimizer.Rates(config, steps_per_epoch=100.0)
    tree = rates.tree(trees(), 100 * epoch)
    np.testing.assert_allclose(tree["conv1"]["kernel"], conv1, rtol=1e-6)
    np.testing.assert_allclose(tree["conv1"]["bias"], conv1_bias, rtol=1e-6)
    np.testing.assert_allclose(tree["fc8"]["kernel"], others, rtol=1e-6)
    np.testing.assert_allclose(tree["fc8"]["bias"], 0.02, rtol=1e-6)


def rates_at(steps, steps_per_epoch=10.0, **schedule):
    """The common rate at these steps, of a run of 10 epochs at rate 1."""
    config = alexnet.get_config()
    config.num_epochs, config.optimizer.learning_rate = 10.0, 1.0
    config.schedule.update(schedule)
    found = optimizer.schedule(config, steps_per_epoch)
    return [float(found(step)) for step in steps]


def test_schedules_by_name():
    assert rates_at([0, 50, 99], name="constant") == [1, 1, 1]
    assert rates_at([0, 50, 99], name="plateau") == [1, 1, 1]
    factors = ((2.0, 0.5), (7.0, 0.125))
    assert rates_at([0, 19, 20, 69, 70, 99], name="steps", factors=factors) == [1, 1, 0.5, 0.5, 0.125, 0.125]
    cosine = [0.5 * (1 + np.cos(np.pi * step / 100)) for step in (0, 25, 50, 99, 100)]
    np.testing.assert_allclose(rates_at([0, 25, 50, 99, 100], name="cosine"), cosine, atol=1e-6)


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
def test_every_schedule_warms_up_linearly(name):
    """Two epochs of ten steps: 1/20 at the first, the whole rate from the twentieth on."""
    found = rates_at(range(20), name=name, warmup=2.0)
    np.testing.assert_allclose(found, np.arange(1, 21) / 20, rtol=1e-6)
    without = 0.5 * (1 + np.cos(np.pi * 40 / 80)) if name == "cosine" else 1
    np.testing.assert_allclose(rates_at([60], name=name, warmup=2.0), without, rtol=1e-6)


def test_factors_of_layers_and_kinds_multiply():
    config = alexnet.get_config()
    config.optimizer.update(learning_rate=1.0, bias_rate=2.0)
    config.schedule.update(
        name="steps",
        factors=((1.0, 0.5),),
        layers=(("conv1", ((0.0, 0.25),)), ("bias", ((1.0, 10.0),)), ("conv1/bias", ((2.0, 0.0),))),
    )
    rates = optimizer.Rates(config, steps_per_epoch=10.0)
    rates.check(trees())
    for step, expected in ((0, (0.25, 0.5, 1, 2)), (10, (0.125, 2.5, 0.5, 10)), (20, (0.125, 0, 0.5, 10))):
        tree = rates.tree(trees(), step)
        found = [tree[layer][kind] for layer in ("conv1", "fc8") for kind in ("kernel", "bias")]
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=str(step))


def test_frozen_layer_does_not_move():
    config = alexnet.get_config()
    config.schedule.layers = (("conv1", ((0.0, 0.0),)),)
    rule, params = optimizer.build(config), as_float32(trees())
    rates = optimizer.Rates(config, 10.0).tree(params, 0)
    updates, _ = rule.update(as_float32(trees(1)), rule.init(params), params, rates=rates)
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
    rule, params = optimizer.build(config), as_float32(trees())
    rates = optimizer.Rates(config, 10.0).tree(params, 0)
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam mixes dtypes
        updates, _ = rule.update(as_float32(trees(1)), rule.init(params), params, rates=rates)
    np.testing.assert_allclose(np.abs(updates["fc8"]["kernel"]), 1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optimizer.name": "sdg"}, "did you mean sgd"),
        ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate=nan"),
        ({"optimizer.momentum": 1.0}, "optimizer.momentum"),
        ({"schedule.name": "plato"}, "did you mean plateau"),
        ({"schedule.patience": 0}, "schedule.patience"),
        ({"schedule.warmup": 90.0}, "must be less than num_epochs=90.0"),
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
        optimizer.Rates(config, 1.0).check(trees())
