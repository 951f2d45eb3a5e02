"""Each layer, plain and in every platform's form, forward and gradient, against NumPy in float64."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import reference
from common import host
from models import amx, chunks, cpu, fused, layers, ops, phases, winograd

# A form runs on any platform, so all are tested here: by the name, what `ops` takes for the forms of CPUs.
FORMS = {"default": {}, **{module.__name__: {"cpu": module} for module in ops.PLATFORMS.values()}}


def implementations():
    """(name, module with the layers) of the plain functions and of each platform's forms, which `ops` has meanwhile."""
    yield "plain", layers
    for name, platforms in FORMS.items():
        with mock.patch.object(ops, "PLATFORMS", platforms):
            yield name, ops


def rectified(x, **options):
    """`ops.normalize_pool` of x alone."""
    return ops.normalize_pool(x, ops.relu(x), **options)


def apart(x, *, window, stride, **options):
    """The three steps of `ops.normalize_pool`, plain."""
    return layers.max_pool(layers.local_response_normalization(layers.relu(x), **options), window, stride)


def check(name, arrays, expected, expected_gradients, dtype=jnp.float32, tolerance=1e-5, **options):
    """Compares layer `name` with the reference and with its plain form, relative to the largest value of each array.

    Args:
      name: of the layer, or the plain form and others as pairs of a name and a function.
      arrays: inputs of the layer, or their shapes.
      expected, expected_gradients: the reference, of float64 arrays, and of those and the gradient of the output.
      options: of the layer, by name.
    """
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(a) if isinstance(a, tuple) else a for a in arrays]
    arrays = [jnp.asarray(a, dtype) for a in arrays]  # rounded first, so that both sides see the same numbers
    wide = [np.asarray(a, np.float64) for a in arrays]
    y_expected = expected(*wide)
    g = jnp.asarray(rng.standard_normal(y_expected.shape), dtype)
    gradients = expected_gradients(*wide, np.asarray(g, np.float64))
    wanted = (y_expected, *(gradients if isinstance(gradients, tuple) else (gradients,)))

    @jax.jit
    def all_forms(g, *arrays):
        found = {}
        named = ((form, getattr(module, name)) for form, module in implementations()) if isinstance(name, str) else name
        for form, layer in named:
            y, pull = jax.vjp(functools.partial(layer, **options), *arrays)
            found[form] = (y, *pull(g))
        return found

    found = all_forms(g, *arrays)
    for form, values in found.items():
        for one, plain, other in zip(values, found["plain"], wanted, strict=True):
            assert one.dtype == dtype
            assert one.shape == other.shape
            for theirs in (other, plain):
                theirs = np.asarray(theirs, np.float64)
                atol = tolerance * np.abs(theirs).max()
                np.testing.assert_allclose(np.asarray(one, np.float64), theirs, rtol=0, atol=atol, err_msg=form)


def in_groups(layer, groups):
    """A layer, or the gradients of one, that sees each of some groups of maps alone."""

    def apart(*arrays):
        parts = zip(*(np.split(a, groups, axis=-1) for a in arrays), strict=True)
        found = [layer(*part) for part in parts]
        if isinstance(found[0], tuple):
            return tuple(np.concatenate(values, axis=-1) for values in zip(*found, strict=True))
        return np.concatenate(found, axis=-1)

    return apart


PAPER = {"k": 2.0, "n": 5, "alpha": 1e-4, "beta": 0.75}
STRONG = {"k": 1.0, "n": 3, "alpha": 0.5, "beta": 0.75}
LRN = [  # shape, groups, constants
    ((2, 5, 3, 7), 1, PAPER),
    ((4, 4, 4, 16), 2, PAPER),
    ((3, 1, 1, 1), 1, STRONG),
    ((2, 4, 3, 9), 3, STRONG),
    ((2, 5, 3, 7), 1, {"k": 1.0, "n": 4, "alpha": 0.3, "beta": 0.5}),  # an even window reaches further down than up
    ((2, 4, 3, 16), 2, {"k": 1.0, "n": 4, "alpha": 0.3, "beta": 0.5}),
    ((2, 4, 3, 5), 5, {"k": 0.5, "n": 1, "alpha": 0.2, "beta": 1.25}),
    ((2, 4, 3, 16), 2, {"k": 2.0, "n": 12, "alpha": 0.1, "beta": 0.75}),  # wider than the maps
]


def check_lrn(array, groups, constants, **options):
    expected = in_groups(functools.partial(reference.lrn, **constants), groups)
    gradient = in_groups(functools.partial(reference.lrn_gradient, **constants), groups)
    check("local_response_normalization", [array], expected, gradient, groups=groups, **constants, **options)


@pytest.mark.parametrize("shape,groups,constants", LRN)
def test_local_response_normalization(shape, groups, constants):
    check_lrn(shape, groups, constants)


def test_normalization_of_large_values_in_many_chunks(monkeypatch):
    """Activations reach thousands early in training; and chunks of examples must not be seen."""
    monkeypatch.setattr(chunks, "MAPS_BYTES", 2000)
    check_lrn(300 * np.random.default_rng(1).standard_normal((12, 3, 5, 8)), 1, PAPER)


def check_fused(values, groups, constants, window, stride, **options):
    """All forms of `ops.normalize_pool` against the three steps of the reference, forward and backward."""
    steps = {"window": window, "stride": stride}

    def normalized(x):
        return in_groups(functools.partial(reference.lrn, **constants), groups)(np.maximum(x, 0))

    def gradient(x, g):
        g = reference.max_pool_gradient(normalized(x), g, **steps)
        back = in_groups(functools.partial(reference.lrn_gradient, **constants), groups)
        return np.where(x > 0, back(np.maximum(x, 0), g), 0)

    def expected(x):
        return reference.max_pool(normalized(x), **steps)

    def forms():
        yield "plain", apart
        yield "kernel", functools.partial(rectified, kernel=True)
        for form, module in implementations():
            if module is ops:
                yield form, rectified

    check(forms(), [values], expected, gradient, groups=groups, **constants, **steps, **options)


@pytest.mark.parametrize("shape,groups,constants,window,stride", [
    ((3, 7, 9, 12), 2, PAPER, 3, 2),  # a group of 6 maps, whose block of 16 has others behind it
    ((2, 6, 8, 16), 1, STRONG, 3, 2),  # a last window over both edges
    ((2, 5, 5, 33), 1, {"k": 1.0, "n": 4, "alpha": 0.3, "beta": 0.5}, 2, 2),  # several programs, the last in part
    ((2, 6, 7, 9), 3, STRONG, 2, 3),  # pixels that no window sees
    ((2, 5, 5, 8), 2, PAPER | {"n": 12}, 3, 1),
])  # fmt: skip
def test_the_kernel_for_relu_normalization_and_pooling(monkeypatch, shape, groups, constants, window, stride):
    monkeypatch.setattr(fused, "INTERPRET", True)
    monkeypatch.setattr(fused, "ELEMENTS", 1024)
    rng = np.random.default_rng(0)
    # Whole numbers have equal maxima, and negative ones windows without any that ReLU passes.
    values = np.concatenate([3 * rng.standard_normal(shape), rng.integers(-2, 2, shape)])
    check_fused(values, groups, constants, window, stride)


def test_the_kernel_in_bfloat16(monkeypatch):
    monkeypatch.setattr(fused, "INTERPRET", True)
    check_fused((2, 7, 7, 16), 2, PAPER | {"alpha": 0.01}, 3, 2, dtype=jnp.bfloat16, tolerance=0.03)


def test_the_kernel_keeps_nan(monkeypatch):
    monkeypatch.setattr(fused, "INTERPRET", True)
    x = jnp.ones((1, 5, 5, 16)).at[0, 1, 1, 3].set(jnp.nan)
    found = np.isnan(rectified(x, window=3, stride=2, kernel=True, groups=2, **PAPER))
    assert found[0, 0, 0, :8].all(), "the sums of its group, by a product with ones and zeros"
    assert found.sum() == 8, "neither another window nor another group"


@pytest.mark.parametrize("shape,groups,window", [
    ((1, 4, 4, 258), 2, 3), ((1, 6, 6, 4), 2, 5), ((1 << 12, 64, 64, 128), 1, 3),
])  # fmt: skip
def test_what_the_kernel_does_not_take_stays_apart(shape, groups, window):
    assert not fused.fits(shape, groups=groups, window=window)
    assert fused.fits((1, 6, 6, 256), groups=2, window=4)
    step = functools.partial(rectified, kernel=True, window=window, stride=2, groups=groups, **PAPER)
    assert "pallas_call" not in str(jax.make_jaxpr(step)(jax.ShapeDtypeStruct(shape, jnp.float32)))


@pytest.mark.parametrize("size,power,shape", [
    (5, 0.75, (2, 7, 6, 3)), (4, 0.75, (2, 7, 6, 3)), (3, 0.5, (3, 2, 5, 1)), (1, 1.0, (2, 7, 6, 3)),
    (9, 0.75, (3, 2, 5, 1)),
])  # fmt: skip
def test_spatial_response_normalization(size, power, shape):
    constants = {"size": size, "scale": 0.2, "power": power, "constant": 1.5}
    expected = functools.partial(reference.srn, **constants)
    gradient = functools.partial(reference.srn_gradient, **constants)
    check("spatial_response_normalization", [shape], expected, gradient, **constants)


WINDOWS = [  # bytes of a chunk, height, width, window, stride
    (8 << 20, 13, 13, 3, 2),
    (1, 12, 9, 3, 2),  # windows over the bottom edge only
    (8 << 20, 32, 8, 3, 2),
    (1, 8, 8, 2, 2),
    (8 << 20, 7, 9, 2, 2),
    (1, 9, 10, 3, 3),
    (8 << 20, 10, 11, 2, 3),
    (1, 11, 4, 1, 4),  # a last window that would lie outside
    (8 << 20, 6, 6, 6, 1),
    (1, 9, 9, 5, 2),
    (8 << 20, 9, 8, 4, 1),
    (1, 5, 5, 1, 1),
    (8 << 20, 10, 7, 7, 3),
]


def check_pool(name, array, window, stride, **options):
    def expected(x):
        return getattr(reference, name)(x, window, stride)

    def gradient(x, g):
        return getattr(reference, f"{name}_gradient")(x, g, window, stride)

    check(name, [array], expected, gradient, window=window, stride=stride, **options)


@pytest.mark.parametrize("chunk_bytes,height,width,window,stride", WINDOWS)
def test_max_pool(monkeypatch, chunk_bytes, height, width, window, stride):
    monkeypatch.setattr(chunks, "MAPS_BYTES", chunk_bytes)
    rng, shape = np.random.default_rng(0), (2, height, width, 3)
    # In whole numbers from −1 to 1 most windows have several maxima, of which the first gets the gradient.
    values = np.concatenate([rng.standard_normal(shape), rng.integers(-1, 2, shape)])
    check_pool("max_pool", values, window, stride)


@pytest.mark.parametrize("height,width,window,stride", [row[1:] for row in WINDOWS])
def test_avg_pool(height, width, window, stride):
    check_pool("avg_pool", (2, height, width, 3), window, stride)


def test_max_pool_keeps_nan():
    x = jnp.ones((1, 5, 5, 1)).at[0, 1, 1, 0].set(jnp.nan)
    for form, module in implementations():
        found = jnp.isnan(module.max_pool(x, 3, 2)).ravel()
        np.testing.assert_array_equal(found, [True, False, False, False], err_msg=form)


@pytest.mark.parametrize("size,window,stride,expected", [
    (224, 11, 4, 55), (55, 3, 2, 27), (27, 3, 2, 13), (13, 3, 2, 6), (32, 3, 2, 16), (16, 3, 2, 8), (8, 3, 2, 4),
    (4, 1, 4, 1), (5, 1, 4, 2), (3, 3, 7, 1),
])  # fmt: skip
def test_output_size(size, window, stride, expected):
    assert layers.output_size(size, window, stride) == expected


def test_relu():
    check("relu", [(3, 4, 5)], lambda x: np.maximum(x, 0), lambda x, g: np.where(x > 0, g, 0))


def test_relu_of_zero_and_nan():
    x = jnp.asarray([0.0, jnp.nan, -1.0, 1.0])
    for form, module in implementations():
        y, pull = jax.vjp(module.relu, x)
        np.testing.assert_array_equal(y, [0, np.nan, 0, 1], err_msg=form)
        np.testing.assert_array_equal(pull(jnp.ones_like(x))[0], [0, 0, 0, 1], err_msg=form)


def check_dense(**options):
    check("dense", [(5, 7), (7, 4)], np.matmul, lambda x, kernel, g: (g @ kernel.T, x.T @ g), **options)


def test_dense():
    check_dense()


def test_dense_rounds_the_kernel_and_not_its_gradient():
    x, kernel = jnp.ones((2, 1), jnp.bfloat16), jnp.asarray([[1 + 2**-9]], jnp.float32)
    for form, module in implementations():
        y, pull = jax.vjp(module.dense, x, kernel)
        assert (y.dtype, pull(y)[1].dtype) == (jnp.bfloat16, jnp.float32), form
        np.testing.assert_array_equal(np.asarray(y, np.float32), 1, err_msg=form)


CONVOLUTIONS = [  # bytes of patches in a chunk, shape of the maps, of the kernel, stride, padding
    (10 << 20, (3, 224, 224, 3), (11, 11, 3, 8), 4, ((0, 3), (0, 3))),  # the network's first layer
    (40_000, (2, 64, 67, 3), (11, 11, 3, 8), 4, ((0, 3), (0, 0))),
    (1, (6, 23, 27, 3), (11, 11, 3, 4), 4, ((0, 0), (0, 0))),
    (40_000, (3, 9, 9, 4), (5, 5, 4, 6), 1, ((2, 2), (2, 2))),
    (1, (5, 6, 7, 4), (3, 3, 4, 5), 1, ((1, 1), (1, 1))),
    (40_000, (2, 9, 8, 2), (3, 3, 2, 5), 2, ((1, 0), (0, 2))),
    (1 << 24, (2, 7, 8, 3), (1, 1, 3, 4), 3, "VALID"),
    (40_000, (2, 8, 10, 3), (2, 2, 3, 4), 3, ((0, 0), (1, 0))),
    (1, (1, 5, 5, 1), (5, 5, 1, 1), 1, "VALID"),
    (40_000, (7, 20, 20, 3), (8, 8, 3, 4), 4, ((2, 2), (2, 2))),
    (40_000, (2, 8, 8, 3), (5, 2, 3, 4), 2, "VALID"),  # a kernel that is not square
    (40_000, (2, 6, 9, 3), (5, 2, 3, 4), 2, "VALID"),
    (40_000, (4, 9, 8, 3), (5, 5, 3, 4), 1, ((2, 2), (2, 2))),  # two outputs in a block
    (1, (2, 9, 9, 3), (2, 3, 3, 4), 1, ((0, 1), (2, 1))),
    (1, (6, 13, 12, 18), (3, 3, 18, 17), 1, ((1, 1), (1, 1))),  # by Winograd, this one and those below
    (1, (2, 12, 27, 20), (5, 5, 20, 16), 1, ((2, 2), (2, 2))),
    (1, (2, 10, 12, 16), (5, 5, 16, 16), 1, ((0, 3), (4, 1))),
    (1, (1, 14, 6, 16), (3, 3, 16, 16), 1, "VALID"),
]


@pytest.mark.parametrize("side", sorted(winograd.TILES))
def test_winograds_matrices_convolve(side):
    across, of_kernel, of_data = winograd.matrices(side)
    rng = np.random.default_rng(side)
    kernel, data = rng.standard_normal(side), rng.standard_normal(len(of_data))
    wanted = np.correlate(data, kernel, "valid")
    np.testing.assert_allclose(across @ ((of_kernel @ kernel) * (of_data @ data)), wanted, atol=1e-12)


def check_conv(x, kernel, stride, padding, groups=1, **options):
    pixels = ((0, 0), (0, 0)) if padding == "VALID" else padding

    def expected(x, kernel):
        return reference.conv(x, kernel, 0, stride, pixels)

    def gradient(x, kernel, g):
        return reference.conv_gradient(x, kernel, g, stride, pixels)[:2]

    both = in_groups(expected, groups), in_groups(gradient, groups)
    check("conv", [x, kernel], *both, stride=stride, padding=padding, groups=groups, **options)


@pytest.mark.parametrize("chunk_bytes,x,kernel,stride,padding", CONVOLUTIONS)
def test_conv(monkeypatch, chunk_bytes, x, kernel, stride, padding):
    monkeypatch.setattr(chunks, "MAPS_BYTES", chunk_bytes)
    monkeypatch.setattr(cpu, "LEAST_EXAMPLES", {3: 1, 5: 1})
    check_conv(x, kernel, stride, padding)


def as_bfloat16(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def check_mixed(layer, expected, gradients, x, kernel):
    """float32 maps and a bfloat16 kernel: what is multiplied is rounded, g too; the sums are float32."""
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.standard_normal(x), jnp.float32), jnp.asarray(rng.standard_normal(kernel), jnp.bfloat16)
    y, pull = jax.vjp(jax.jit(layer), x, kernel)
    g = jnp.asarray(rng.standard_normal(y.shape), jnp.float32)
    found = (y, *pull(g))
    assert [v.dtype for v in found] == [jnp.float32, jnp.float32, jnp.bfloat16]
    rounded = as_bfloat16(x), as_bfloat16(kernel)
    wanted = (expected(*rounded), *gradients(*rounded, as_bfloat16(g)))
    for one, other, tolerance in zip(found, wanted, (2e-5, 2e-5, 4e-3), strict=True):
        atol = tolerance * np.abs(other).max()
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=0, atol=atol)


@pytest.fixture(params=[True, False], ids=["AMX", "no AMX"])
def unit(request, monkeypatch):
    """A unit for bfloat16 is used whatever the number of features; yields (form, shape of the kernel) of its calls."""
    calls = set()

    def noted(form):
        def call(x, kernel, *args, **options):
            calls.add((form.__name__, kernel.shape))
            return form(x, kernel, *args, **options)

        return call

    monkeypatch.setattr(host, "multiplies_bfloat16", lambda: request.param)
    monkeypatch.setattr(amx, "LEAST_FEATURES", dict.fromkeys(range(12), 1))
    monkeypatch.setattr(cpu, "LEAST_EXAMPLES", {3: 1, 5: 1})
    for form in (amx.conv, amx.conv_kernel_gradient):
        monkeypatch.setattr(amx, form.__name__, noted(form))
    yield calls
    assert bool(calls) is request.param


@pytest.mark.parametrize("chunk_bytes,x,kernel,stride,padding", CONVOLUTIONS)
def test_conv_of_float32_maps_with_a_bfloat16_kernel(unit, monkeypatch, chunk_bytes, x, kernel, stride, padding):
    monkeypatch.setattr(amx, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(chunks, "MAPS_BYTES", chunk_bytes)
    pixels = ((0, 0), (0, 0)) if padding == "VALID" else padding
    check_mixed(
        functools.partial(ops.conv, stride=stride, padding=padding),
        lambda *arrays: reference.conv(*arrays, 0, stride, pixels),
        lambda *arrays: reference.conv_gradient(*arrays, stride, pixels)[:2],
        x,
        kernel,
    )
    if unit:
        turned = ("conv", (*kernel[:2], kernel[3], kernel[2]))
        below = {turned} if stride == 1 else set()  # with a stride it is XLA's
        assert unit == {("conv", kernel), ("conv_kernel_gradient", kernel)} | below


def test_the_same_in_groups(unit):
    around = ((1, 1), (1, 1))
    check_mixed(
        functools.partial(ops.conv, padding=around, groups=2),
        in_groups(lambda *arrays: reference.conv(*arrays, 0, 1, around), 2),
        in_groups(lambda *arrays: reference.conv_gradient(*arrays, 1, around)[:2], 2),
        (3, 9, 8, 8),
        (3, 3, 4, 6),
    )
    assert unit in (set(), {("conv", (3, 3, 4, 3)), ("conv", (3, 3, 3, 4)), ("conv_kernel_gradient", (3, 3, 4, 3))})


def test_the_same_for_batches_of_any_size(unit):
    kernel = jnp.ones((3, 3, 2, 5), jnp.bfloat16)
    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 6, 6, 2"), jnp.float32)
    program = jax.export.export(jax.jit(lambda x: ops.conv(x, kernel)))(batch)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6, 6, 2)), jnp.float32)
    np.testing.assert_allclose(program.call(x), layers.conv(x, kernel), atol=1e-4)


@pytest.mark.parametrize("form", ["plain", *FORMS])
def test_the_same_on_every_platform(form):
    around = ((1, 1), (1, 1))
    with mock.patch.object(ops, "PLATFORMS", FORMS.get(form, {})):
        check_mixed(
            functools.partial(layers.conv if form == "plain" else ops.conv, padding=around),
            lambda *arrays: reference.conv(*arrays, 0, 1, around),
            lambda *arrays: reference.conv_gradient(*arrays, 1, around)[:2],
            (2, 9, 9, 8),
            (3, 3, 8, 6),
        )


@pytest.mark.parametrize("size", [8, 9])
def test_the_same_with_pooling(size):
    """In the loop of `phases`, whose pooled gradient is rounded, and apart."""
    around, (window, stride) = ((1, 1), (1, 1)), phases.POOL
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, size, size, 3)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 4)), jnp.bfloat16)
    y, pull = jax.vjp(lambda *arrays: ops.conv_pool(*arrays, window, stride, padding=around), x, kernel)
    maps, pull_maps = jax.vjp(lambda *arrays: layers.conv(*arrays, padding=around), x, kernel)
    pooled, pull_pooled = jax.vjp(lambda maps: layers.max_pool(maps, window, stride), maps)
    g = jnp.asarray(rng.standard_normal(y.shape), jnp.float32)
    np.testing.assert_allclose(y, pooled, atol=1e-5 * np.abs(pooled).max())
    for found, wanted in zip(pull(g), pull_maps(*pull_pooled(jnp.asarray(as_bfloat16(g), jnp.float32))), strict=True):
        wanted = np.asarray(wanted, np.float64)
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0, atol=6e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("conv", [layers.conv, ops.conv])
def test_a_kernel_of_a_wider_type_is_refused(conv):
    with pytest.raises(ValueError, match="a kernel of float32 cannot convolve maps of bfloat16"):
        conv(jnp.ones((1, 3, 3, 1), jnp.bfloat16), jnp.ones((3, 3, 1, 1)))


@pytest.mark.parametrize("groups,x,kernel,stride", [
    (2, (3, 9, 9, 8), (5, 5, 4, 6), 1), (2, (2, 12, 11, 6), (3, 3, 3, 4), 2), (3, (2, 6, 7, 3), (3, 3, 1, 9), 1),
])  # fmt: skip
def test_conv_in_groups(groups, x, kernel, stride):
    check_conv(x, kernel, stride, ((1, 1), (1, 1)), groups)


def check_conv_pool(x, kernel, padding, window=3, stride=2, **options):
    """All forms of `ops.conv_pool` against the reference."""
    steps = {"window": window, "stride": stride}

    def expected(x, kernel):
        return reference.max_pool(reference.conv(x, kernel, 0, 1, padding), **steps)

    def gradient(x, kernel, g):
        g = reference.max_pool_gradient(reference.conv(x, kernel, 0, 1, padding), g, **steps)
        return reference.conv_gradient(x, kernel, g, 1, padding)[:2]

    def plain(x, kernel, *, padding):
        return layers.max_pool(layers.conv(x, kernel, padding=padding), **steps)

    def forms():
        yield "plain", plain
        for form, module in implementations():
            if module is ops:
                yield form, functools.partial(module.conv_pool, **steps)

    check(forms(), [x, kernel], expected, gradient, padding=padding, **options)


@pytest.mark.parametrize("chunk_bytes,x,kernel,padding", [
    (1 << 20, (4, 32, 32, 3), (5, 5, 3, 8), ((2, 2), (2, 2))),  # the CIFAR-10 network's first layer
    (1, (3, 8, 10, 3), (5, 5, 3, 4), ((2, 2), (2, 2))),
    (1, (2, 4, 6, 2), (3, 3, 2, 5), ((1, 1), (1, 1))),
    (1 << 20, (2, 6, 8, 2), (3, 3, 2, 5), ((0, 0), (0, 0))),
    (1 << 20, (4, 8, 6, 1), (4, 4, 1, 3), ((0, 3), (3, 2))),
    (1 << 20, (2, 4, 4, 7), (1, 1, 7, 2), ((0, 0), (0, 0))),
])  # fmt: skip
def test_conv_and_pooling_in_one_loop(monkeypatch, chunk_bytes, x, kernel, padding):
    assert phases.fits(x, kernel, padding, (3, 2))
    monkeypatch.setattr(chunks, "MAPS_BYTES", chunk_bytes)
    check_conv_pool(x, kernel, padding)
    # Whole numbers have equal maxima; windows behind the last column hold one place less, all of them negative.
    rng = np.random.default_rng(1)
    check_conv_pool(rng.integers(-2, 3, x), rng.integers(-2, 2, kernel), padding)
    check_conv_pool(np.ones(x), -np.ones(kernel), padding)


@pytest.mark.parametrize("x,kernel,window,stride", [
    ((2, 7, 8, 3), (5, 5, 3, 4), 3, 2), ((2, 8, 8, 8), (5, 5, 8, 4), 3, 2), ((2, 8, 8, 3), (5, 5, 3, 4), 2, 2),
    ((2, 8, 8, 3), (5, 5, 3, 4), 3, 3), ((2, 2, 2, 3), (1, 1, 3, 4), 2, 1), ((2, 8, 8, 3), (5, 3, 3, 4), 3, 2),
])  # fmt: skip
def test_other_layers_are_pooled_apart(x, kernel, window, stride):
    padding = tuple((side // 2, side // 2) for side in kernel[:2])
    assert not phases.fits(x, kernel, padding, (window, stride))
    check_conv_pool(x, kernel, padding, window, stride)


def test_conv_and_pooling_in_bfloat16():
    check_conv_pool((3, 8, 8, 3), (5, 5, 3, 6), ((2, 2), (2, 2)), dtype=jnp.bfloat16, tolerance=0.03)


def test_conv_and_pooling_keep_nan():
    x = jnp.ones((1, 8, 8, 3)).at[0, 1, 1, 0].set(jnp.nan)
    kernel, around = jnp.ones((3, 3, 3, 4)), ((1, 1), (1, 1))
    apart = ops.max_pool(ops.conv(x, kernel, padding=around), 3, 2)
    np.testing.assert_array_equal(ops.conv_pool(x, kernel, 3, 2, padding=around), apart)
    assert 0 < np.isnan(apart).sum() < apart.size


@pytest.mark.parametrize("form", FORMS)
def test_softmax(form):
    logits = np.random.default_rng(0).normal(0, 30, (5, 7))
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    with mock.patch.object(ops, "PLATFORMS", FORMS[form]):
        found = jax.jit(lambda logits: ops.softmax(logits))(logits.astype(np.float32))
    np.testing.assert_allclose(found, odds / odds.sum(-1, keepdims=True), rtol=1e-5, atol=1e-12)


def test_layers_in_bfloat16():
    options = {"dtype": jnp.bfloat16, "tolerance": 0.02}
    check_lrn((4, 5, 5, 8), 2, STRONG, **options)
    check_pool("max_pool", (2, 8, 9, 3), 3, 2, **options)
    check_pool("avg_pool", (2, 8, 9, 3), 3, 2, **options)
    for stride in (1, 2):
        check_conv((4, 9, 9, 3), (3, 3, 3, 8), stride, "VALID", **options)
    check_conv((4, 9, 9, 6), (3, 3, 3, 8), 1, "VALID", 2, **options)


def stack(x, kernel):
    """Every layer once, as a scalar; convolutions with a bfloat16 kernel too."""
    narrow = ops.conv(x, kernel.astype(jnp.bfloat16), padding=((2, 2), (2, 2)))
    pooled = ops.conv_pool(x, kernel, 3, 2, padding=((1, 2), (1, 2)))
    y = ops.relu(ops.conv(x, kernel, stride=2, padding=((0, 1), (0, 1))))
    y = ops.local_response_normalization(y, **STRONG, groups=2)
    y = ops.conv(y, jnp.tile(kernel[:3, :3, :2], (1, 1, 1, 2)), padding=((1, 1), (1, 1)), groups=2)
    y = ops.conv(ops.max_pool(y, 3, 2), jnp.tile(kernel[:3, :3, :1], (1, 1, 8, 1)), padding=((1, 1), (1, 1)))
    y = ops.spatial_response_normalization(y, size=3, scale=0.1, power=0.75)
    y = ops.dense(ops.avg_pool(y, 2, 2)[:, 0, 0], kernel[0, 0].T)
    return jnp.sum(jnp.square(y)) + jnp.sum(jnp.square(pooled)) + 1e-3 * jnp.sum(jnp.square(narrow))


@pytest.mark.parametrize("transform", ["pmap", "shard_map"])
def test_gradients_on_several_devices(unit, transform):
    """Each device computes its own examples; the sums over them are the gradients of the whole batch."""
    devices = jax.device_count()
    assert devices > 1
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2 * devices, 17, 17, 3)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((5, 5, 3, 4)), jnp.float32)
    value, gradients = jax.jit(jax.value_and_grad(stack, (0, 1)))(x, kernel)
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


def gradient(layer, argument=0):
    """The gradient of a layer of (x, kernel) by one of them."""
    return lambda *arrays: jax.vjp(layer, *arrays)[1](jax.tree.map(jnp.ones_like, layer(*arrays)))[argument]


def normalize(x, kernel):
    return ops.local_response_normalization(x, **PAPER)


@pytest.mark.parametrize("layer,text,platforms", [
    (lambda x, kernel: ops.conv(x, kernel, stride=2), "stride = [2, 1]", {"cpu"}),
    (gradient(ops.conv, 1), "stablehlo.while", {"cpu"}),
    (lambda x, kernel: ops.conv(jnp.tile(x, 2), kernel, groups=2), "feature_group_count = 2", {"cuda", "tpu"}),
    (normalize, "stablehlo.dot", {"cpu", "tpu"}),
    (gradient(normalize), "stablehlo.dot", {"cpu", "tpu"}),
    (gradient(normalize), "optimization_barrier", {"cuda", "tpu"}),
    (gradient(lambda x, kernel: ops.max_pool(x, 3, 2)), "stablehlo.while", {"cpu"}),
    (gradient(lambda x, kernel: ops.max_pool(x, 3, 2)), "stablehlo.select_and_scatter", {"tpu"}),
    (gradient(lambda x, kernel: ops.relu(x)), "optimization_barrier", {"cuda"}),
    (gradient(lambda x, kernel: ops.dense(x[0, 0], kernel[0, 0])), "optimization_barrier", {"tpu"}),
])  # fmt: skip
def test_other_platforms_get_other_forms(monkeypatch, layer, text, platforms):
    """What is fast on a CPU is not on a GPU, so the choice belongs to the platform that the program is lowered for."""
    monkeypatch.setattr(chunks, "MAPS_BYTES", 1)
    traced = jax.jit(layer).trace(jnp.ones((4, 17, 17, 3)), jnp.ones((5, 5, 3, 4)))
    lowered = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")}
    assert {name for name, program in lowered.items() if text in program} == platforms


def test_memory_of_the_first_layer():
    """The patches of a batch of 128 would fill a gigabyte; chunks of it do not."""
    x = jax.ShapeDtypeStruct((128, 224, 224, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((11, 11, 3, 96), jnp.float32)

    def loss(kernel, x):
        return jnp.sum(jnp.square(ops.conv(x, kernel, stride=4, padding=((0, 3), (0, 3)))))

    memory = jax.jit(jax.grad(loss)).lower(kernel, x).compile().memory_analysis()
    output = 128 * 55 * 55 * 96 * 4
    assert memory.temp_size_in_bytes < 2 * output + (128 << 20)


def test_pooling_refuses_channels_that_differ():
    with pytest.raises(ValueError, match="3 channels cannot convolve maps of 2"):
        ops.conv_pool(jnp.ones((1, 8, 8, 2)), jnp.ones((3, 3, 3, 4)), 3, 2)


def test_conv_and_pooling_of_any_number_of_examples():
    x, kernel = (np.random.default_rng(0).standard_normal(s).astype(np.float32) for s in ((3, 8, 8, 3), (3, 3, 3, 4)))
    (count,) = jax.export.symbolic_shape("n")

    @jax.jit
    def layer(x):
        return ops.conv_pool(x, kernel, 3, 2)

    exported = jax.export.export(layer)(jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype))
    np.testing.assert_allclose(exported.call(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", [layers, ops])
@pytest.mark.parametrize("name,shapes,options,message", [
    ("max_pool", [(1, 4, 5, 1)], {"window": 5, "stride": 2}, "a window of 5 does not fit into 4 pixels"),
    ("avg_pool", [(1, 5, 4, 1)], {"window": 5, "stride": 2}, "a window of 5 does not fit into 4 pixels"),
    ("max_pool", [(1, 4, 5, 1)], {"window": 2, "stride": 0}, "stride=0"),
    ("conv", [(1, 4, 4, 2), (5, 5, 2, 3)], {}, "a window of 5 does not fit into 4 pixels"),
    ("conv", [(1, 4, 4, 2), (3, 3, 1, 3)], {}, "1 channels cannot convolve maps of 2"),
    ("conv", [(1, 4, 4, 3), (3, 3, 1, 2)], {"groups": 2}, "2 × 1 channels cannot convolve maps of 3"),
    ("local_response_normalization", [(1, 1, 1, 2)], PAPER | {"n": 0}, "n=0"),
    ("local_response_normalization", [(1, 1, 1, 3)], PAPER | {"groups": 2}, "3 maps cannot be groups=2 equal groups"),
    ("spatial_response_normalization", [(1, 1, 1, 2)], {"size": 0, "scale": 1, "power": 1}, "size=0"),
])  # fmt: skip
def test_impossible_geometry_is_named(module, name, shapes, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(module, name)(*map(jnp.ones, shapes), **options)


@pytest.mark.parametrize(
    ("content", "size"), [("512K\n", 1 << 19), ("2048K\n", 1 << 21), ("1M", 1 << 20), ("", 1 << 20), ("x", 1 << 20)]
)
def test_the_second_cache_is_what_linux_says(tmp_path, monkeypatch, content, size):
    monkeypatch.setattr(host, "_CACHE", tmp_path / "size")
    assert host.second_cache() == 1 << 20, "no such file"
    (tmp_path / "size").write_text(content)
    assert host.second_cache() == size


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("flags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx512_bf16 xamx_bf16\n", False),
        ("", False),
    ],
)
def test_a_unit_for_bfloat16_is_what_linux_says(tmp_path, monkeypatch, content, found):
    monkeypatch.setattr(host, "_PROCESSORS", tmp_path / "cpuinfo")
    assert not host.multiplies_bfloat16.__wrapped__(), "no such file"
    (tmp_path / "cpuinfo").write_text(f"model name\t: amx_bf16\n{content}")
    assert host.multiplies_bfloat16.__wrapped__() is found
