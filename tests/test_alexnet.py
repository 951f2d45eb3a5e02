"""The network against the NumPy reference, and its sizes against the published ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import models
import optimizer
import parallel
import recipes
import reference
import update
from common.errors import UserError
from configs import alexnet
from models.alexnet import LAYERS


def as_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def close(mine, theirs, what=""):
    """1e-5 of the largest value: single elements near 0 carry the rounding of the sums that made them."""
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * scale, err_msg=what)


def layer_table(variant=""):
    config = alexnet.get_config(variant)
    return models.layer_table(config.model, config.input.crop)


@functools.cache
def initial(exchange):
    network = update.build_network(recipes.narrow(exchange=exchange))
    return jax.device_get(jax.jit(network.init)(jax.random.key(1), jnp.zeros((1, 67, 67, 3))))["params"]


def case(order="paper", exchange=("conv3", "fc6", "fc7")):
    config = recipes.narrow(order=order, exchange=exchange)
    random = np.random.default_rng(3)
    images = random.normal(0, 60, (6, 67, 67, 3)).astype(np.float32)
    labels = random.integers(0, 7, 6)
    network, params = update.build_network(config), initial(exchange)
    # Weights twice as wide as the recipe's: every layer then matters for the loss of so narrow a network.
    params = jax.tree.map(lambda leaf: (2 * leaf).astype(np.float32), params)
    return config, network, params, images, labels


@pytest.mark.parametrize(
    ("order", "exchange"),
    [("paper", ("conv3", "fc6", "fc7")), ("2012", ()), ("paper", ("conv2", "conv4", "conv5", "fc7"))],
)
def test_logits_are_the_references(order, exchange):
    _, network, params, images, _ = case(order, exchange)
    logits, _ = reference.forward(params, images, exchange=exchange, order=order)
    assert np.std(logits, axis=0).max() > 1e-4, "the network says the same of every image"
    close(jax.jit(network.apply)({"params": params}, images), logits)


@pytest.mark.parametrize("order", ["paper", "2012"])
def test_three_updates_with_dropout_are_the_references(order):
    """Losses, gradients and parameters over three updates at a rate at which they change."""
    config, network, params, images, labels = case(order)
    config.optimizer.bias_rate = 2.0
    rule, of_config = optimizer.build(config), optimizer.Rates(config, 10.0)
    opt_state = rule.init(params)
    exact, velocity = as_float64(params), jax.tree.map(np.zeros_like, as_float64(params))
    rates = {name: {"kernel": 0.02, "bias": 0.04} for name in params}

    @jax.jit
    def loss_and_gradients(params, key):
        def loss(params):
            logits, seen = network.apply(
                {"params": params}, images, train=True, rngs={"dropout": key}, mutable=["intermediates"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)).mean()
            return loss, seen["intermediates"]

        return jax.value_and_grad(loss, has_aux=True)(params)

    for step in range(3):
        (loss, seen), gradients = loss_and_gradients(params, jax.random.key(step))
        # What was kept can be read off the input of the layer above; where ReLU gave 0, dropping changes nothing.
        masks = {name: np.asarray(seen[f"{above}_joined"][0]) != 0 for name, above in (("fc6", "fc7"), ("fc7", "fc8"))}
        assert 0.2 < masks["fc7"].mean() < 0.6
        exact_loss, exact_gradients = reference.loss_and_gradients(exact, images, labels, order=order, masks=masks)
        assert float(loss) == pytest.approx(exact_loss, rel=1e-5)
        for name in params:
            for kind in params[name]:
                close(gradients[name][kind], exact_gradients[name][kind], f"gradient of {name}/{kind}, step {step}")
        updates, opt_state = rule.update(gradients, opt_state, params, rates=of_config.tree(params, step))
        params = optax.apply_updates(params, updates)
        exact, velocity = reference.update(exact, velocity, exact_gradients, rates)
        for name in params:
            for kind in params[name]:
                close(params[name][kind], exact[name][kind], f"{name}/{kind} after step {step}")


@pytest.mark.parametrize(
    ("variant", "parameters", "multiply_adds", "exchange"),
    [
        ("", 60_965_224, 724_406_816, 30_336),
        ("ungrouped", 62_378_344, 1_135_256_096, 0),
        ("one_gpu", 59_798_312, 391_514_384, 0),
        ("no_exchange", 60_714_408, None, 2_048),
    ],
)
def test_published_sizes(variant, parameters, multiply_adds, exchange):
    rows = layer_table(variant)
    assert sum(row.parameters for row in rows) == parameters
    assert sum(row.exchange for row in rows) == exchange
    if multiply_adds:
        assert sum(row.multiply_adds for row in rows) == multiply_adds


def test_layer_table_of_the_paper():
    """Sizes of the maps and of the weights, layer by layer, and where the towers meet."""
    rows = {row.name: row for row in layer_table()}
    assert list(rows) == list(LAYERS)
    assert [rows[name].output for name in LAYERS[:5]] == [
        (55, 55, 96),
        (27, 27, 256),
        (13, 13, 384),
        (13, 13, 384),
        (13, 13, 256),
    ]
    assert rows["conv2"].kernel == (5, 5, 48, 256)
    assert rows["fc6"].kernel == (9216, 4096)
    assert {name: row.exchange for name, row in rows.items() if row.exchange} == {
        "conv3": 21_632,
        "fc6": 4_608,
        "fc7": 2_048,
        "fc8": 2_048,
    }


def test_towers_do_not_see_each_other_but_where_they_exchange():
    """Without exchange, the other tower's kernels change nothing before fc8."""
    _, network, params, images, _ = case(exchange=())
    params["fc8"]["kernel"][params["fc8"]["kernel"].shape[0] // 2 :] = 0  # fc8 reads tower 0 alone
    forward = jax.jit(network.apply)
    before = forward({"params": params}, images)
    for name in LAYERS[:-1]:
        for leaf in params[name].values():
            leaf[..., leaf.shape[-1] // 2 :] += 1
    np.testing.assert_array_equal(forward({"params": params}, images), before)


@pytest.mark.parametrize("name", LAYERS[1:-1])
def test_any_middle_layer_can_be_left_out(name):
    """The layers that are left see as many pixels as before."""
    rows, whole = (models.layer_table(recipes.narrow(without=without).model, 67) for without in ((name,), ()))
    assert [(row.name, row.output) for row in rows] == [(row.name, row.output) for row in whole if row.name != name]
    maps = {row.name: row.kernel[-2] for row in rows}
    below = LAYERS[LAYERS.index(name) - 1]
    seen = next(row.output[-1] for row in rows if row.name == below)
    above = LAYERS[LAYERS.index(name) + 1]
    assert maps[above] == (seen if above in ("conv3", "fc6", "fc7", "fc8") else seen // 2)


def test_initial_weights():
    """The paper's deviations and biases, the source's, and He's, on the full-width layers."""

    def params(init):
        config = alexnet.get_config()
        config.model.init = init
        config.model.features = (96, 256, 384, 384, 256, 512, 512)
        network = update.build_network(config)
        return jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 67, 67, 3)))["params"]

    for init, conv4 in (("paper", 0.01), ("2012", 0.03)):
        tree = params(init)
        assert float(tree["conv4"]["kernel"].std()) == pytest.approx(conv4, rel=0.02)
        assert float(tree["conv2"]["kernel"].std()) == pytest.approx(0.01, rel=0.02)
        biases = {name: np.unique(leaves["bias"]).tolist() for name, leaves in tree.items()}
        ones = {"conv2", "conv4", "conv5", "fc6", "fc7"}
        assert biases == {name: [1.0 if name in ones else 0.0] for name in LAYERS}
    tree = params("he")
    assert float(tree["conv4"]["kernel"].std()) == pytest.approx(np.sqrt(2 / (9 * 192)), rel=0.02)
    assert not any(np.any(leaves["bias"]) for leaves in tree.values())


def test_dropout_masks_follow_the_example_not_its_place():
    _, network, params, _, _ = case()
    maps = np.random.default_rng(0).normal(size=(6, 1, 1, 32)).astype(np.float32)

    def logits(maps, key, rows=None):
        rngs = {"dropout": jax.random.key(key)}
        return network.apply({"params": params}, maps, True, rows, method="fully_connected", rngs=rngs)

    together = logits(maps, 0)
    close(logits(maps[2:4], 0, jnp.array([2, 3])), together[2:4])
    assert not np.allclose(logits(maps, 1), together)


@pytest.mark.parametrize("cores", [0, 1, 2])
def test_bfloat16_is_near(cores):
    config, _, params, images, _ = case()
    config.model.dtype = "bfloat16"
    network = models.build(config.model, parallel.Towers(2, 2, cores=cores), config.input.crop)
    logits = jax.jit(network.apply)({"params": params}, images)
    exact, _ = reference.forward(params, images)
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(name="alexnot"), "did you mean alexnet"),
        (dict(activation="rleu"), "did you mean relu"),
        (dict(without=("conv1",)), "takes layers of conv2"),
        (dict(exchange=("conv9",)), r"model.exchange=\('conv9',\) takes layers of conv2"),
        (dict(without="conv4x"), "with its comma"),
        (dict(towers=3), "model.towers=3"),
        (dict(width=0.0), "model.width=0.0"),
        (dict(width=float("nan")), "model.width=nan"),
        (dict(dropout_rate=1.0), "model.dropout_rate"),
        (dict(pool_window=9, pool_stride=4), "input.crop=67 is too small .* it takes 620 or more"),
        (dict(pool_window=16, pool_stride=16), "too small .*; take smaller ones"),
        (dict(features=(1, 2)), "7 counts"),
        (dict(init="pape"), "did you mean paper"),
        (dict(dtype="float16"), "bfloat16"),
        (dict(lnr=True), "model.lnr is no field"),
        (dict(num_classes=1), "model.num_classes=1"),
    ],
)
def test_what_cannot_work_is_refused(change, says):
    model = dict(recipes.narrow().model) | change
    with pytest.raises(UserError, match=says):
        models.build(model, None, 67)
