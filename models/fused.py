"""Response normalisation and max-pooling behind a ReLU in one kernel for NVIDIA GPUs, written with Pallas.

XLA writes normalised maps to memory and reads them again. Here nothing but the pooled maxima and their places leaves
the kernel, and the backward pass takes the places, the gradient and the rectified maps; what is read several times
comes from the cache. The kernels were compiled for an H100, and run in Pallas's interpreter, where the tests hold them
to the plain layers. No GPU has run them yet.

A program of the kernel has some pixels of one image or of several, and the maps of one group. It sums over windows of
maps by a product with a band of ones, because a Triton array cannot be shifted.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from models.default import inverse_power, place_dtype
from models.layers import output_size

# Elements of an array in a program's registers, 16 for each thread of four warps, and its pixels at most.
ELEMENTS, PIXELS = 2048, 128
# Maps of a group in a product: Triton's least, and what fits into registers.
LEAST, MOST = 16, 128
# Larger windows would make the backward pass, which is unrolled, too long a program.
LARGEST_WINDOW = 4
# Whether Pallas's interpreter computes it, slowly and on any platform: for tests.
INTERPRET = False


def fits(shape: tuple[int, ...], *, groups: int, window: int) -> bool:
    """Whether the kernel takes maps of this shape, and windows of this side.

    The maps of a group must be few enough for a product in registers, and elements have 32-bit numbers.
    """
    return shape[-1] // groups <= MOST and window <= LARGEST_WINDOW and math.prod(shape) < 1 << 31


def normalize_pool(x, **options):
    """`default.normalize_pool` of maps that `fits` accepts, float32 or bfloat16."""
    return _call(_forward, options, (x,), [_pooled(x, **options)])[0]


def normalize_pool_and_places(x, **options):
    """`default.normalize_pool_and_places`."""
    pooled = _pooled(x, **options)
    return _call(_forward, options, (x,), [pooled, jax.ShapeDtypeStruct(pooled.shape, place_dtype(options["window"]))])


def normalize_pool_gradient(x, place, g, **options):
    """`default.normalize_pool_gradient`."""
    return _call(_backward, options, (x, place, g), [jax.ShapeDtypeStruct(x.shape, x.dtype)])[0]


def _pooled(x, *, window, stride, **_):
    """The shape and type of the pooled maxima."""
    height, width = (output_size(size, window, stride) for size in x.shape[1:3])
    return jax.ShapeDtypeStruct((len(x), height, width, x.shape[-1]), x.dtype)


def _call(kernel: Callable, options, arrays, results) -> list[jax.Array]:
    """Runs a kernel with a program for each block of pixels of its first result, and for each group of maps."""
    from jax.experimental import pallas as pl  # 0.1 s, which other platforms save
    from jax.experimental.pallas import triton

    share = arrays[0].shape[-1] // options["groups"]
    maps = max(LEAST, 1 << (share - 1).bit_length())
    pixels = min(ELEMENTS // maps, PIXELS)
    images, height, width, _ = results[0].shape
    call = pl.pallas_call(
        functools.partial(kernel, **options, maps=maps, pixels=pixels),
        grid=(pl.cdiv(images * height * width, pixels), options["groups"]),
        out_shape=results,
        compiler_params=None if INTERPRET else triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=INTERPRET,
    )
    return call(*arrays)


class _Block:
    """The pixels and maps of this program, of an array of (N, H, W, maps)."""

    def __init__(self, shape, groups, maps, pixels):
        from jax.experimental import pallas as pl

        images, height, width, channels = shape
        number = pl.program_id(0) * pixels + jnp.arange(pixels, dtype=jnp.int32)
        self.inside = number < images * height * width
        self.column, row = lax.rem(number, width), lax.div(number, width)
        self.image, self.row = lax.div(row, height), lax.rem(row, height)
        share, of_group = channels // groups, jnp.arange(maps, dtype=jnp.int32)
        self.seen, self.maps = of_group < share, pl.program_id(1) * share + of_group

    def load(self, ref, row, column, inside):
        """The values at these rows and columns in the image of each pixel, (pixels, maps), 0 where not `inside`."""
        from jax.experimental.pallas import triton

        mask = inside[:, None] & self.seen[None, :]
        return triton.load(ref.at[self._at(row, column)], mask=mask, other=0)

    def store(self, ref, values):
        """Writes the values of this program's pixels."""
        from jax.experimental.pallas import triton

        mask = self.inside[:, None] & self.seen[None, :]
        triton.store(ref.at[self._at(self.row, self.column)], values.astype(ref.dtype), mask=mask)

    def _at(self, row, column):
        return self.image[:, None], row[:, None], column[:, None], self.maps[None, :]


def _sum_of_maps(values, before, after, dtype):
    """`default.sum_of_maps` of one group, of values rounded to `dtype`; those outside of the group must be 0."""
    number = jnp.arange(values.shape[-1], dtype=jnp.int32)
    distance = number[:, None] - number[None, :]
    band = (-before <= distance) & (distance <= after)
    precision = None
    if dtype == jnp.float32:
        # Three products in TF32 lose nothing but the last bits, because a band is exact in it. Triton makes so long a
        # program of products in float32 that its compiler takes minutes. The interpreter knows no TF32.
        precision = lax.Precision.HIGHEST if INTERPRET else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jnp.dot(values.astype(dtype), band.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def _forward(x_ref, y_ref, *place_ref, k, n, alpha, beta, groups, window, stride, maps, pixels):
    height, width = x_ref.shape[1:3]
    block = _Block(y_ref.shape, groups, maps, pixels)

    def see(number, found):
        best, place = found
        row = block.row * stride + lax.div(number, window)
        column = block.column * stride + lax.rem(number, window)
        inside = block.inside & (row < height) & (column < width)
        x = block.load(x_ref, row, column, inside).astype(jnp.float32)
        s = k + alpha * _sum_of_maps(jnp.square(x), n // 2, n - 1 - n // 2, x_ref.dtype)
        # Rounded before they are compared, so that the first of equal maxima counts, as in the plain form.
        y = (x * inverse_power(s, beta)).astype(y_ref.dtype).astype(jnp.float32)
        better = (y > best) | jnp.isnan(y)  # outside of the image there are zeros, which ReLU does not fall below
        return jnp.where(better, y, best), jnp.where(better, number, place)

    nothing = jnp.full((pixels, maps), -jnp.inf, jnp.float32), jnp.zeros((pixels, maps), jnp.int32)
    best, place = lax.fori_loop(0, window**2, see, nothing)  # a loop, because to unroll it takes minutes to compile
    block.store(y_ref, best)
    if place_ref:
        block.store(place_ref[0], place)


def _backward(x_ref, place_ref, g_ref, dx_ref, *, k, n, alpha, beta, groups, window, stride, maps, pixels):
    height, width = g_ref.shape[1:3]
    block = _Block(x_ref.shape, groups, maps, pixels)
    g = jnp.zeros((pixels, maps), jnp.float32)
    for above in range(-(-window // stride)):  # the windows that hold a pixel start in its row or above, and so on
        for left in range(-(-window // stride)):
            row, column = lax.div(block.row, stride) - above, lax.div(block.column, stride) - left
            i, j = block.row - row * stride, block.column - column * stride
            inside = block.inside & (row >= 0) & (row < height) & (i < window)
            inside &= (column >= 0) & (column < width) & (j < window)
            place = block.load(place_ref, row, column, inside).astype(jnp.int32)
            passed = block.load(g_ref, row, column, inside).astype(jnp.float32)
            g += jnp.where(place == (i * window + j)[:, None], passed, 0)
    x = block.load(x_ref, block.row, block.column, block.inside).astype(jnp.float32)
    before, after = n // 2, n - 1 - n // 2
    s = k + alpha * _sum_of_maps(jnp.square(x), before, after, x_ref.dtype)
    shrunk = g * inverse_power(s, beta)
    through_s = _sum_of_maps(shrunk * x / s, after, before, x_ref.dtype)
    dx = shrunk - 2 * beta * alpha * x * through_s
    block.store(dx_ref, jnp.where(x > 0, dx, 0))
