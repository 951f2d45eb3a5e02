"""The networks of 2012's example-layers against the float64 functions of `reference`, and what their recipes say."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import optimizer
import reference
from common.errors import UserError
from configs import cifar10
from models import cifar, towers
from parallel import Towers

AROUND = ((2, 2), (2, 2))


def local(x, kernel, bias):
    """A kernel for each place, written out place by place."""
    _, height, width, channels = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.empty((len(x), height, width, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            window = padded[:, i : i + 3, j : j + 3].reshape(len(x), 9 * channels)
            y[:, i, j] = window @ kernel[i, j].reshape(9 * channels, -1) + bias[i, j]
    return y


def convolutional(p, x, lrn):
    def normalized(x):
        return reference.srn(x, size=3, scale=5e-5 / 9, power=0.75, constant=1.0) if lrn else x

    x = normalized(reference.relu(reference.max_pool(reference.conv(x, *p["conv1"], 1, AROUND), 3, 2)))
    x = normalized(reference.avg_pool(reference.relu(reference.conv(x, *p["conv2"], 1, AROUND)), 3, 2))
    return reference.avg_pool(reference.relu(reference.conv(x, *p["conv3"], 1, AROUND)), 3, 2)


def convolutional_local(p, x, lrn):
    def normalized(x):
        return reference.lrn(x, k=1.0, n=5, alpha=0.001 / 5, beta=0.75) if lrn else x

    for name in ("conv1", "conv2"):
        x = reference.max_pool(normalized(reference.relu(reference.conv(x, *p[name], 1, AROUND))), 3, 2)
    for name in ("local3", "local4"):
        x = reference.relu(local(x, *p[name]))
    return x


REFERENCES = {"cifar": convolutional, "cifar_local": convolutional_local}


# Plain, and as one and two cores of a CPU, which computes some steps in one, and with two cores in halves.
PLACEMENTS = [None, Towers(1, 1, cores=1, fused=True), Towers(1, 1, cores=2, fused=True)]


def case(name, lrn, placement=None):
    """A network, parameters of some size, and images; the maps are large enough that normalisation counts."""
    model = cifar10.get_config("18pct" if name == "cifar" else "11pct").model.to_dict() | {"lrn": lrn}
    random, side = np.random.default_rng(1), 32 if name == "cifar" else 24
    images = random.normal(0, 60, (4, side, side, 3))
    network = models.build(model, placement, side)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.float32(images)))["params"]
    params = jax.tree.map(lambda leaf: random.normal(0, 0.05, leaf.shape), shapes)
    return network, params, images


def logits_of(name, params, images, lrn):
    pairs = {layer: (leaves["kernel"], leaves["bias"]) for layer, leaves in params.items()}
    kernel, bias = pairs["fc10"]
    return REFERENCES[name](pairs, images, lrn).reshape(len(images), -1) @ kernel + bias


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
@pytest.mark.parametrize("lrn", [False, True])
@pytest.mark.parametrize("name", REFERENCES)
def test_logits_are_the_references(name, lrn, placement):
    network, params, images = case(name, lrn, placement)
    found = network.apply({"params": jax.tree.map(np.float32, params)}, jnp.float32(images))
    expected = logits_of(name, params, images, lrn)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    other = logits_of(name, params, images, not lrn)
    assert np.abs(other - expected).max() > 1e-3 * np.abs(expected).max(), "normalisation that does not count"


@pytest.mark.parametrize(("name", "lrn"), [("cifar", False), ("cifar", True), ("cifar_local", True)])
def test_steps_in_one_have_the_same_gradients(name, lrn):
    found, programs = [], []
    for placement in PLACEMENTS:
        network, params, images = case(name, lrn, placement)
        arguments = jax.tree.map(np.float32, (params, images))

        @jax.jit
        def gradient(params, images, network=network):
            return jax.grad(lambda *a: (network.apply({"params": a[0]}, a[1]) ** 2).sum(), (0, 1))(params, images)

        programs.append(str(jax.make_jaxpr(gradient)(*arguments)))
        found.append(jax.tree.leaves(gradient(*arguments)))
    assert programs[0] not in programs[1:]
    for plain, *others in zip(*found, strict=True):
        for other in others:
            np.testing.assert_allclose(other, plain, rtol=0, atol=1e-5 * np.abs(plain).max())


def test_gradients_of_a_local_layer_are_the_references():
    """Along random directions; the square of a linear layer has exact differences."""
    random = np.random.default_rng(2)
    values = {"x": (2, 4, 5, 3), "kernel": (4, 5, 3, 3, 3, 6), "bias": (4, 5, 6)}
    values = {name: random.normal(size=shape) for name, shape in values.items()}
    layer = cifar.LocalLayer(6, 3, nn.initializers.zeros, "float32")

    def loss(values):
        params = {name: values[name] for name in ("kernel", "bias")}
        return (layer.apply({"params": params}, values["x"]) ** 2).sum()

    gradient = jax.grad(loss)(jax.tree.map(np.float32, values))
    for name, value in values.items():
        direction = random.normal(size=value.shape)
        below, above = ((local(**{**values, name: value + sign * direction}) ** 2).sum() for sign in (-1, 1))
        assert np.vdot(gradient[name], direction) == pytest.approx((above - below) / 2, rel=1e-4), name


@pytest.mark.parametrize("change", [dict(stride=2), dict(groups=2), dict(kernel_size=0)])
def test_other_layers_do_not_pool(change):
    values = dict(features=4, kernel_size=3, stride=1, padding=1, groups=1, towers=Towers(1, 1), dtype="float32")
    layer = towers.TowerLayer(
        **values | change, kernel_init=nn.initializers.ones, bias_init=nn.initializers.zeros, name="conv1"
    )
    with pytest.raises(ValueError, match="conv1: only a convolution of stride 1"):
        layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 4)), cifar.POOL)


def test_sizes_are_those_of_2012():
    """Maps of 32 → 16 → 8 → 4 pixels and of 24 → 12 → 6; kernels, multiply-adds and initial weights."""
    shapes = {
        variant: {row.name: row.kernel for row in models.layer_table(config.model, config.input.crop)}
        for variant in ("", "18pct", "11pct", "13pct")
        for config in (cifar10.get_config(variant),)
    }
    assert shapes[""] == shapes["18pct"]
    assert shapes[""] == {
        "conv1": (5, 5, 3, 32),
        "conv2": (5, 5, 32, 32),
        "conv3": (5, 5, 32, 64),
        "fc10": (1024, 10),
    }
    assert shapes["11pct"] == shapes["13pct"]
    assert shapes["11pct"] == {
        "conv1": (5, 5, 3, 64),
        "conv2": (5, 5, 64, 64),
        "local3": (6, 6, 3, 3, 64, 32),
        "local4": (6, 6, 3, 3, 32, 32),
        "fc10": (1152, 10),
    }
    rows = {row.name: row for row in models.layer_table(cifar10.get_config("11pct").model, 24)}
    assert rows["conv2"].multiply_adds == 12 * 12 * 25 * 64 * 64
    assert rows["local3"].multiply_adds == 36 * 9 * 64 * 32
    assert rows["local3"].parameters == 36 * (9 * 64 + 1) * 32
    for variant, deviations in (("18pct", {"conv1": 1e-4, "fc10": 0.01}), ("11pct", {"conv1": 1e-4, "local4": 0.04})):
        config = cifar10.get_config(variant)
        network, side = models.build(config.model, None, config.input.crop), config.input.crop
        params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
        for layer, deviation in deviations.items():
            assert float(params[layer]["kernel"].std()) == pytest.approx(deviation, rel=0.05), layer


def test_rates_and_epochs_are_those_of_layer_params():
    """layer-params-18pct.cfg lowers all rates after 120 epochs and after ten more; the other's lowers `epsW` alone."""
    expected = {
        "18pct": (140, {0: (1e-3, 2e-3), 119: (1e-3, 2e-3), 120: (1e-4, 2e-4), 130: (1e-5, 2e-5)}),
        "11pct": (470, {0: (1e-3, 2e-3), 449: (1e-3, 2e-3), 450: (1e-4, 2e-3), 460: (1e-5, 2e-3)}),
    }
    for variant, (epochs, rates) in expected.items():
        config = cifar10.get_config(variant)
        assert (config.num_epochs, config.optimizer.momentum, config.batch_size) == (epochs, 0.9, 128)
        found = optimizer.Rates(config, 10.0)
        for epoch, pair in rates.items():
            tree = found.tree({"conv1": {"kernel": 0, "bias": 0}}, 10 * epoch)["conv1"]
            assert (float(tree["kernel"]), float(tree["bias"])) == pytest.approx(pair), (variant, epoch)


def test_only_whole_images_or_random_crops_of_24():
    """And which of the networks normalise."""
    of = {variant: cifar10.get_config(variant) for variant in ("18pct", "13pct", "11pct")}
    assert [of[variant].model.lrn for variant in of] == [True, False, True]
    assert [of[variant].model.name for variant in of] == ["cifar", "cifar_local", "cifar_local"]
    views = {variant: (c.input.crop, c.input.random_crop, c.input.reflect) for variant, c in of.items()}
    assert views == {"18pct": (32, False, False), "13pct": (24, True, True), "11pct": (24, True, True)}


def test_decay_is_that_of_layer_params():
    """wc of layer-params-18pct.cfg and layer-params-conv-local-11pct.cfg; none for biases."""
    for variant, expected in (
        ("18pct", {"conv1": 0.004, "conv2": 0.004, "conv3": 0.004, "fc10": 1}),
        ("11pct", {"conv1": 0, "conv2": 0, "local3": 0.004, "local4": 0.004, "fc10": 0.004}),
    ):
        config = cifar10.get_config(variant)
        rule, rates = optimizer.build(config), optimizer.Rates(config, 390.0)
        params = {layer: {"kernel": np.ones(3, np.float32), "bias": np.ones(1, np.float32)} for layer in expected}
        rates.check(params)
        zeros = jax.tree.map(np.zeros_like, params)
        updates, _ = rule.update(zeros, rule.init(params), params, rates=rates.tree(params, 0))
        for layer, decay in expected.items():
            np.testing.assert_allclose(updates[layer]["kernel"], -0.001 * decay, rtol=1e-6, err_msg=layer)
            np.testing.assert_array_equal(updates[layer]["bias"], 0)


def test_a_layer_that_is_not_there_has_no_decay():
    config = cifar10.get_config("18pct")
    config.optimizer.layer_decay = (("fc1", 1.0),)
    with pytest.raises(UserError, match=r"optimizer\.layer_decay names 'fc1', .*did you mean fc10"):
        optimizer.Rates(config, 390.0).check({"conv1": {"kernel": 0, "bias": 0}, "fc10": {"kernel": 0, "bias": 0}})
