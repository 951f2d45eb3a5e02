"""The interface of a network, held by each one in the registry."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from common.errors import UserError
from configs import alexnet, cifar10, torchvision
from models import chunks, fused
from parallel import Towers

# The recipe of each network, and the smallest images that tests run it on.
RECIPES = {
    "alexnet": (alexnet.get_config(), 67),
    "cifar": (cifar10.get_config(), 32),
    "cifar_local": (cifar10.get_config("11pct"), 24),
    "torchvision": (torchvision.get_config(), 67),
}


def model(recipe, **changes):
    found = RECIPES[recipe][0].model.to_dict()
    return found | ({"width": 0.0625} if "width" in found else {}) | changes


def build(recipe, towers=None, **changes):
    return models.build(model(recipe, **changes), towers, RECIPES[recipe][1])


def images(name, count=1):
    side = RECIPES[name][1]
    return np.random.default_rng(0).normal(0, 1, (count, side, side, 3)).astype(np.float32)


def test_every_network_has_a_recipe_here():
    assert set(RECIPES) == set(models.MODELS)


@pytest.mark.parametrize(("cores", "dtype"), [(0, "bfloat16"), (1, "float32")])
@pytest.mark.parametrize("name", RECIPES)
def test_maps_in_bfloat16_are_float32_on_cpus(name, cores, dtype):
    towers, found = model(name)["towers"], {}
    network = build(name, Towers(towers, towers, cores=cores), dtype="bfloat16")

    def note(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.method_name == "activate":
            found.setdefault(str(result.dtype), []).append(context.module.name)
        return result

    with nn.intercept_methods(note):
        jax.eval_shape(network.init, jax.random.key(0), images(name, 2))
    assert list(found) == [dtype]


@pytest.mark.parametrize("name", RECIPES)
def test_call_parameters_and_steps(name):
    network, seen = build(name, num_classes=7, dtype="bfloat16"), set()

    def note(call, args, kwargs, context):
        if isinstance(context.module, models.MODELS[name]):
            seen.add(context.method_name)
        return call(*args, **kwargs)

    def run(key, images):
        variables = network.init(key, images)
        with nn.intercept_methods(note):
            logits = network.apply(variables, images, train=True, rows=jnp.arange(2) + 5, rngs={"dropout": key})
        return logits, variables

    logits, variables = jax.eval_shape(run, jax.random.key(0), images(name, 2))
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    assert set(variables) == {"params"}
    assert all(set(leaves) == {"kernel", "bias"} for leaves in variables["params"].values())
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert {"activate", "pool"} <= seen & set(models.STEPS)
    optional = {"convolutional", "fully_connected", "maps", "validate", "setup", "__call__"}
    public = {method for method in seen if not method.startswith("_")}
    assert public <= set(models.STEPS) | optional, "a step whose name is not in models.STEPS"


@pytest.mark.parametrize("name", RECIPES)
def test_the_config_has_every_number(name):
    """A recipe without a line for a field is refused, unless the field was added later."""
    fields = [field for field in dataclasses.fields(models.MODELS[name]) if field.name not in ("parent", "name")]
    later = {field.name for field in fields if field.default is not dataclasses.MISSING}
    assert later == ({"lrn_across_towers"} if name == "alexnet" else set())
    fields = [field for field in fields if field.name not in later]
    whole = model(name)
    assert {"num_classes", "towers", "dtype"} < set(whole)
    assert len(whole) == len(fields), "the config has a name, and no placement"
    for field in set(whole) - {"name"}:
        without = {key: value for key, value in whole.items() if key != field}
        with pytest.raises(UserError, match=rf"The config has no field model\.{field}"):
            models.build(without, None, RECIPES[name][1])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(num_classes=1), "model.num_classes=1 must lie between"),
        (dict(num_classes=10.0), "model.num_classes=10.0 must be an integer"),
        (dict(dtype="float16"), "model.dtype='float16' is not known"),
        (dict(towers=3), "model.towers=3"),
        (dict(tower=1), "model.tower is no field of .*did you mean towers"),
        (dict(placement=None), "model.placement is no field"),
        (dict(name="nothing_alike"), "model.name='nothing_alike' is not known"),
        (dict(name=3), "model.name=3 must be text"),
    ],
)
def test_what_cannot_work_is_refused(name, change, says):
    with pytest.raises(UserError, match=says):
        models.build(model(name) | change, None, RECIPES[name][1])


def test_json_and_integers_pass():
    """JSON has lists instead of tuples, and writes 1.0 as 1 where a user did."""
    network = build("alexnet", exchange=["conv3"], width=1, without="conv4")
    assert (network.exchange, network.width, network.without) == (("conv3",), 1, ("conv4",))


@pytest.mark.parametrize("count", [6, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_an_even_batch_goes_in_halves_if_there_are_cores(name, count, monkeypatch):
    monkeypatch.setattr(chunks, "MAPS_BYTES", 1 << 30)  # a chunk of the first layer could be half of the batch too
    towers, x = model(name)["towers"], images(name, count)
    for cores in (1, 2):
        network = build(name, Towers(towers, towers, cores=cores))
        text = str(jax.make_jaxpr(network.init_with_output)(jax.random.key(0), x))
        split = cores == 2 and count == 6 and hasattr(models.MODELS[name], "convolutional")
        assert (f"f32[{count // 2},{x.shape[1]},{x.shape[1]},3]" in text) == split


def test_activations_are_seen_though_one_kernel_computes_more(monkeypatch):
    monkeypatch.setattr(fused, "INTERPRET", True)
    found, x = [], images("alexnet")
    params = jax.eval_shape(build("alexnet").init, jax.random.key(0), x)["params"]
    for placement in (Towers(2, 2), Towers(2, 2, fused=True)):
        network = build("alexnet", placement)
        assert ("pallas_call" in str(jax.make_jaxpr(network.apply)({"params": params}, x))) == placement.fused
        found.append(jax.eval_shape(functools.partial(models.activations, network), params, x)[1])
    assert found[0] == found[1]
    assert set(found[0]) == {"conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"}


@pytest.mark.parametrize(
    "changes", [dict(activation="tanh"), dict(order="caffenet"), dict(lrn=False), dict(lrn_across_towers=True)]
)
def test_other_steps_stay_apart(changes):
    network = build("alexnet", Towers(2, 2, fused=True), **changes)
    text = str(jax.make_jaxpr(network.init_with_output)(jax.random.key(0), images("alexnet")))
    assert "pallas_call" not in text


def test_layer_table_is_in_order_of_computation(monkeypatch):
    class Backwards(nn.Module):
        towers: int
        num_classes: int
        dtype: str
        placement: Towers

        def setup(self):
            self.b, self.a = nn.Dense(4), nn.Dense(self.num_classes)

        def __call__(self, images, *, train=False, rows=None):
            x = self.b(images.mean((1, 2)))
            self.sow("intermediates", "a_joined", x)
            return self.a(x)

        def validate(self, image_size):
            pass

    monkeypatch.setitem(models.MODELS, "backwards", Backwards)
    rows = models.layer_table(dict(name="backwards", num_classes=5, towers=2, dtype="float32"), 8)
    assert rows == [models.Row("b", (4,), (3, 4), 16, 12, 0, False), models.Row("a", (5,), (4, 5), 25, 20, 2, True)]
