"""Each layer, forward and gradient, against NumPy in float64; and the fast forms against XLA's plain ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import reference
from models import layers


def check(layer, expected, expected_gradient, *shapes, dtype=np.float32, tolerance=1e-5, values=None):
    """Compares output and gradients of a layer with the reference's, relative to the largest value of each array."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in shapes] if values is None else values
    arrays = [jnp.asarray(a, dtype) for a in arrays]  # rounded first, so that both sides see the same numbers
    wide = [np.asarray(a, np.float64) for a in arrays]

    @jax.jit
    def both(g, *arrays):
        y, pull = jax.vjp(layer, *arrays)
        return y, pull(g)

    y_expected = expected(*wide)
    g = jnp.asarray(rng.standard_normal(y_expected.shape), dtype)
    y, gradients = both(g, *arrays)
    expected_gradients = expected_gradient(*wide, np.asarray(g, np.float64))
    if not isinstance(expected_gradients, tuple):
        expected_gradients = (expected_gradients,)
    assert y.dtype == dtype
    assert all(d.dtype == dtype for d in gradients)
    for one, other in zip((y, *gradients), (y_expected, *expected_gradients), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=0, atol=tolerance * np.abs(other).max())


LRN = [
    {"k": 2.0, "n": 5, "alpha": 1e-4, "beta": 0.75},
    {"k": 1.0, "n": 3, "alpha": 0.5, "beta": 0.75},
    {"k": 1.0, "n": 4, "alpha": 0.3, "beta": 0.5},  # an even window reaches one map further down than up
    {"k": 0.5, "n": 1, "alpha": 0.2, "beta": 1.25},
    {"k": 2.0, "n": 12, "alpha": 0.1, "beta": 0.75},  # wider than the maps
]


@pytest.mark.parametrize("constants", LRN)
@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (3, 1, 1, 1), (4, 4, 4, 16)])
def test_local_response_normalization(constants, shape):
    check(
        functools.partial(layers.local_response_normalization, **constants),
        functools.partial(reference.lrn, **constants),
        functools.partial(reference.lrn_gradient, **constants),
        shape,
    )


@pytest.mark.parametrize("size,power", [(5, 0.75), (4, 0.75), (3, 0.5), (1, 1.0), (9, 0.75)])
@pytest.mark.parametrize("shape", [(2, 7, 6, 3), (3, 2, 5, 1)])
def test_spatial_response_normalization(size, power, shape):
    constants = {"size": size, "scale": 0.2, "power": power, "constant": 1.5}
    check(
        functools.partial(layers.spatial_response_normalization, **constants),
        functools.partial(reference.srn, **constants),
        functools.partial(reference.srn_gradient, **constants),
        shape,
    )


def test_normalization_of_large_values_in_many_chunks(monkeypatch):
    """Activations reach thousands early in training; and chunks of examples must not be seen."""
    constants = LRN[0]
    monkeypatch.setattr(layers, "_MAPS_BYTES", 2000)
    values = [300 * np.random.default_rng(1).standard_normal((12, 3, 5, 8))]
    check(
        functools.partial(layers.local_response_normalization, **constants),
        functools.partial(reference.lrn, **constants),
        functools.partial(reference.lrn_gradient, **constants),
        values=values,
    )


@pytest.mark.parametrize("constants", LRN)
@pytest.mark.parametrize("groups,maps", [(2, 16), (3, 9), (5, 5)])
def test_groups_of_maps_are_normalized_alone(constants, groups, maps):
    def apart(layer):
        def split(*arrays):
            parts = zip(*(np.split(a, groups, axis=-1) for a in arrays), strict=True)
            return np.concatenate([layer(*part, **constants) for part in parts], axis=-1)

        return split

    check(
        functools.partial(layers.local_response_normalization, **constants, groups=groups),
        apart(reference.lrn),
        apart(reference.lrn_gradient),
        (2, 4, 3, maps),
    )


GEOMETRIES = [  # height, width, window, stride
    (13, 13, 3, 2),
    (12, 9, 3, 2),  # windows over the bottom edge only
    (32, 8, 3, 2),
    (8, 8, 2, 2),
    (7, 9, 2, 2),
    (9, 10, 3, 3),
    (10, 11, 2, 3),
    (11, 4, 1, 4),  # a last window that would lie outside
    (6, 6, 6, 1),
    (9, 9, 5, 2),
    (9, 8, 4, 1),
    (5, 5, 1, 1),
    (10, 7, 7, 3),
]


@pytest.mark.parametrize("height,width,window,stride", GEOMETRIES)
@pytest.mark.parametrize("name", ["max_pool", "avg_pool"])
@pytest.mark.parametrize("chunk_bytes", [8 << 20, 1], ids=["one chunk", "an example at a time"])
def test_pooling(monkeypatch, chunk_bytes, name, height, width, window, stride):
    monkeypatch.setattr(layers, "_MAPS_BYTES", chunk_bytes)
    rng = np.random.default_rng(0)
    shape = (2, height, width, 3)
    check(
        lambda x: getattr(layers, name)(x, window, stride),
        lambda x: getattr(reference, name)(x, window, stride),
        lambda x, g: getattr(reference, f"{name}_gradient")(x, g, window, stride),
        # In whole numbers from −1 to 1 most windows have several maxima, of which the first gets the gradient.
        values=[np.concatenate([rng.standard_normal(shape), rng.integers(-1, 2, shape)])],
    )


def test_max_pool_is_xlas():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 27, 27, 4)), jnp.float32)

    def plain(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")

    np.testing.assert_array_equal(layers.max_pool(x, 3, 2), plain(x))
    gradients = [
        jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in (plain, lambda x: layers.max_pool(x, 3, 2))
    ]
    np.testing.assert_allclose(*gradients, atol=1e-6)


def test_max_pool_keeps_nan():
    x = jnp.ones((1, 5, 5, 1)).at[0, 1, 1, 0].set(jnp.nan)
    np.testing.assert_array_equal(jnp.isnan(layers.max_pool(x, 3, 2)).ravel(), [True, False, False, False])


@pytest.mark.parametrize("size,window,stride,expected", [
    (224, 11, 4, 55), (55, 3, 2, 27), (27, 3, 2, 13), (13, 3, 2, 6), (32, 3, 2, 16), (16, 3, 2, 8), (8, 3, 2, 4),
    (4, 1, 4, 1), (5, 1, 4, 2), (3, 3, 7, 1),
])  # fmt: skip
def test_output_size(size, window, stride, expected):
    assert layers.output_size(size, window, stride) == expected


CONVOLUTIONS = [  # bytes of patches in a chunk, batch, height, width, channels, kernel, features, stride, padding
    (40_000, 2, 64, 67, 3, 11, 8, 4, ((0, 3), (0, 0))),
    (1, 6, 23, 27, 3, 11, 4, 4, ((0, 0), (0, 0))),
    (40_000, 3, 9, 9, 4, 5, 6, 1, ((2, 2), (2, 2))),
    (1, 5, 6, 7, 4, 3, 5, 1, ((1, 1), (1, 1))),
    (40_000, 2, 9, 8, 2, 3, 5, 2, ((1, 0), (0, 2))),
    (1 << 24, 2, 7, 8, 3, 1, 4, 3, ((0, 0), (0, 0))),
    (40_000, 2, 8, 10, 3, 2, 4, 3, ((0, 0), (1, 0))),
    (1, 1, 5, 5, 1, 5, 1, 1, ((0, 0), (0, 0))),
    (40_000, 7, 20, 20, 3, 8, 4, 4, ((2, 2), (2, 2))),
]


@pytest.mark.parametrize("chunk_bytes,n,height,width,channels,window,features,stride,padding", CONVOLUTIONS)
def test_conv(monkeypatch, chunk_bytes, n, height, width, channels, window, features, stride, padding):
    monkeypatch.setattr(layers, "_PATCHES_BYTES", chunk_bytes)

    def expected(x, kernel):
        return reference.conv(x, kernel, 0, stride, padding)

    def expected_gradient(x, kernel, g):
        return reference.conv_gradient(x, kernel, g, stride, padding)[:2]

    check(
        lambda x, kernel: layers.conv(x, kernel, stride=stride, padding=padding),
        expected,
        expected_gradient,
        (n, height, width, channels),
        (window, window, channels, features),
    )


def test_conv_by_patches_is_xlas_on_the_networks_first_layer():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 224, 224, 3)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((11, 11, 3, 8)), jnp.float32)
    padding = ((0, 3), (0, 3))

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, (4, 4), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def fast(x, kernel):
        return layers.conv(x, kernel, stride=4, padding=padding)

    y, pull = jax.vjp(plain, x, kernel)
    y_fast, pull_fast = jax.vjp(fast, x, kernel)
    assert y_fast.shape == (3, 55, 55, 8)
    g = jnp.asarray(rng.standard_normal(y.shape), jnp.float32)
    for one, other in zip((y_fast, *pull_fast(g)), (y, *pull(g)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("size", [(8, 8), (6, 9)])
def test_kernel_other_than_square(size):
    check(
        lambda x, kernel: layers.conv(x, kernel, stride=2),
        lambda x, kernel: reference.conv(x, kernel, 0, 2, ((0, 0), (0, 0))),
        lambda x, kernel, g: reference.conv_gradient(x, kernel, g, 2, ((0, 0), (0, 0)))[:2],
        (2, *size, 3),
        (5, 2, 3, 4),
    )


def stack(x, kernel):
    """Every layer once, as a scalar."""
    y = layers.conv(x, kernel, stride=2, padding=((0, 1), (0, 1)))
    y = layers.local_response_normalization(y, **LRN[1])
    y = layers.conv(layers.max_pool(y, 3, 2), jnp.tile(kernel[:3, :3, :1], (1, 1, 4, 1)), padding=((1, 1), (1, 1)))
    y = layers.spatial_response_normalization(y, size=3, scale=0.1, power=0.75)
    return jnp.sum(jnp.square(layers.avg_pool(y, 2, 2).astype(jnp.float32)))


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)])
def test_layers_in_bfloat16(dtype, tolerance):
    lrn, pool = LRN[1], (3, 2)
    check(
        functools.partial(layers.local_response_normalization, **lrn),
        functools.partial(reference.lrn, **lrn),
        functools.partial(reference.lrn_gradient, **lrn),
        (4, 5, 5, 8),
        dtype=dtype,
        tolerance=tolerance,
    )
    for name in ("max_pool", "avg_pool"):
        check(
            lambda x, name=name: getattr(layers, name)(x, *pool),
            lambda x, name=name: getattr(reference, name)(x, *pool),
            lambda x, g, name=name: getattr(reference, f"{name}_gradient")(x, g, *pool),
            (2, 8, 9, 3),
            dtype=dtype,
            tolerance=tolerance,
        )
    for stride in (1, 2):
        check(
            lambda x, kernel, stride=stride: layers.conv(x, kernel, stride=stride),
            lambda x, kernel, stride=stride: reference.conv(x, kernel, 0, stride, ((0, 0), (0, 0))),
            lambda x, kernel, g, stride=stride: reference.conv_gradient(x, kernel, g, stride, ((0, 0), (0, 0)))[:2],
            (4, 9, 9, 3),
            (3, 3, 3, 8),
            dtype=dtype,
            tolerance=tolerance,
        )


@pytest.mark.parametrize("transform", ["pmap", "shard_map"])
def test_gradients_on_several_devices(transform):
    """Each device computes its own examples; the sums over them are the gradients of the whole batch."""
    devices = jax.device_count()
    assert devices > 1
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2 * devices, 17, 17, 3)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((5, 5, 3, 4)), jnp.float32)
    value, gradients = jax.value_and_grad(stack, (0, 1))(x, kernel)
    if transform == "pmap":
        parts = x.reshape(devices, 2, *x.shape[1:])
        values, (dx, dkernel) = jax.pmap(jax.value_and_grad(stack, (0, 1)), in_axes=(0, None))(parts, kernel)
    else:
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"))
        def step(x, kernel):
            value, gradients = jax.value_and_grad(stack, (0, 1))(x, kernel[0])
            return jax.tree.map(lambda v: v[None], (value, gradients))

        values, (dx, dkernel) = jax.jit(step)(x, jnp.stack([kernel] * devices))
    np.testing.assert_allclose(values.sum(), value, rtol=1e-5)
    np.testing.assert_allclose(dx.reshape(x.shape), gradients[0], atol=1e-4 * np.abs(gradients[0]).max())
    np.testing.assert_allclose(dkernel.sum(0), gradients[1], atol=1e-4 * np.abs(gradients[1]).max())


def gradient_of_normalization(x, kernel):
    return jax.vjp(lambda x: layers.local_response_normalization(x, **LRN[0]), x)[1](x)[0]


@pytest.mark.parametrize("layer,fast", [
    (lambda x, kernel: layers.conv(x, kernel, stride=2), "stride = [2, 1]"),
    (lambda x, kernel: jax.vjp(lambda k: layers.conv(x, k), kernel)[1](jnp.ones((4, 13, 13, 4)))[0], "stablehlo.while"),
    (lambda x, kernel: layers.local_response_normalization(x, **LRN[0]), "stablehlo.dot"),
    (gradient_of_normalization, "stablehlo.dot"),
    (lambda x, kernel: jax.vjp(lambda x: layers.max_pool(x, 3, 2), x)[0], "stablehlo.while"),
])  # fmt: skip
def test_other_platforms_get_plain_forms(monkeypatch, layer, fast):
    """What is fast on a CPU is not on a GPU, so the choice belongs to the platform that the program is lowered for."""
    monkeypatch.setattr(layers, "_PATCHES_BYTES", 1)
    monkeypatch.setattr(layers, "_MAPS_BYTES", 1)
    traced = jax.jit(layer).trace(jnp.ones((4, 17, 17, 3)), jnp.ones((5, 5, 3, 4)))
    found = {
        platform: fast in traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda", "tpu")
    }
    assert found == {"cpu": True, "cuda": False, "tpu": False}


def test_memory_of_the_first_layer():
    """The patches of a batch of 128 would fill a gigabyte; chunks of it do not."""
    x, kernel = (
        jax.ShapeDtypeStruct((128, 224, 224, 3), jnp.float32),
        jax.ShapeDtypeStruct((11, 11, 3, 96), jnp.float32),
    )

    def loss(kernel, x):
        return jnp.sum(jnp.square(layers.conv(x, kernel, stride=4, padding=((0, 3), (0, 3)))))

    memory = jax.jit(jax.grad(loss)).lower(kernel, x).compile().memory_analysis()
    output = 128 * 55 * 55 * 96 * 4
    assert memory.temp_size_in_bytes < 2 * output + (128 << 20)


@pytest.mark.parametrize("call,message", [
    (lambda: layers.max_pool(jnp.ones((1, 4, 5, 1)), 5, 2), "a window of 5 does not fit into 4 pixels"),
    (lambda: layers.avg_pool(jnp.ones((1, 5, 4, 1)), 5, 2), "a window of 5 does not fit into 4 pixels"),
    (lambda: layers.max_pool(jnp.ones((1, 4, 5, 1)), 2, 0), "stride=0"),
    (lambda: layers.conv(jnp.ones((1, 4, 4, 2)), jnp.ones((5, 5, 2, 3))), "a window of 5 does not fit into 4 pixels"),
    (lambda: layers.conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 3))), "1 channels cannot convolve maps of 2"),
    (lambda: layers.local_response_normalization(jnp.ones((1, 1, 1, 2)), k=1, n=0, alpha=1, beta=1), "n=0"),
    (
        lambda: layers.local_response_normalization(jnp.ones((1, 1, 1, 3)), k=1, n=1, alpha=1, beta=1, groups=2),
        "3 maps cannot be groups=2 equal groups",
    ),
    (lambda: layers.spatial_response_normalization(jnp.ones((1, 1, 1, 2)), size=0, scale=1, power=1), "size=0"),
])  # fmt: skip
def test_impossible_geometry_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
