"""The forms of `models.layers` for CPUs.

XLA's convolution with few channels, its gradient of a kernel and window sums over maps are slow there. Large arrays go
through in chunks of examples. A chunk fits into the cache, and nothing larger is allocated, because a fresh page costs
more than the work on it. Maps of float32 and kernels of bfloat16 go to `models.amx` where it is faster; otherwise they
are rounded, and multiplied in float32. What this module lacks is fast enough in `models.default`. The tests hold each
form to its plain one.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from models import amx, chunks, default, layers, winograd
from models.layers import sum_dtype

# With fewer maps Winograd's transforms cost more than the products that they save.
LEAST_MAPS = 16
# With fewer examples neither, by the side of the kernel; measured at the sizes of AlexNet.
LEAST_EXAMPLES = {3: 16, 5: 4}


def _chunk_of_maps(x):
    return chunks.chunk_of(x.shape[0], math.prod(x.shape[1:]) * x.dtype.itemsize, chunks.MAPS_BYTES)


# Convolution.


def _in_tiles(x, kernel, output, stride, limit) -> int:
    """How many examples a chunk of Winograd's form of a convolution has; 0 where it would not be faster.

    Their transformed tiles stay within `limit` bytes.
    """
    side, _, channels, features = kernel.shape
    square = stride == 1 and kernel.shape[1] == side and side in winograd.TILES and x.dtype == sum_dtype(x.dtype)
    if not square or min(channels, features) < LEAST_MAPS or winograd.multiplications(output, side) > 0.6:
        return 0
    examples = x.shape[0]
    if not is_symbolic_dim(examples) and examples < LEAST_EXAMPLES[side]:
        return 0
    each = winograd.elements(output, side, channels, features) * x.dtype.itemsize
    return chunks.chunk_of(examples, each, limit)


@default.by_groups
def conv(x, kernel, *, stride, padding):
    """`layers.conv`: by Winograd, or with pixels folded into channels if there are few of these."""
    if amx.pays(x, kernel, kernel.shape[3]):
        return amx.conv(x, kernel, stride=stride, padding=padding)
    x, kernel = layers.rounded(x, kernel)
    plain = functools.partial(layers.conv, stride=stride, padding=padding)
    output = jax.eval_shape(plain, x, kernel).shape
    if chunk := _in_tiles(x, kernel, output, stride, chunks.MAPS_BYTES):
        return winograd.conv(x, kernel, padding, chunk)
    folding = chunks.Folding(kernel, output, stride, padding)
    if folding.block == 1:
        return plain(x, kernel)
    # XLA gathers the patches of all the examples that it is given before it multiplies them.
    folded_kernel = folding.kernel(kernel)

    def part(x):
        folded = folding.pixels(x, output[2])
        return lax.conv_general_dilated(
            folded, folded_kernel, (stride, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return lax.map(part, chunks.split(x, folding.chunk(x, output))).reshape(output)


@default.by_groups
def conv_input_gradient(x, kernel, g, *, stride, padding):
    """The gradient by x: a convolution of g with the kernel turned about, by Winograd if it pays."""
    around = [tuple(size - 1 - zeros for zeros in sides) for size, sides in zip(kernel.shape[:2], padding, strict=True)]
    if stride == 1 and amx.pays(x, kernel, kernel.shape[2]):
        return amx.conv(g, kernel[::-1, ::-1].swapaxes(2, 3), stride=1, padding=around)
    g, kernel = layers.rounded(g, kernel)
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    if chunk := _in_tiles(g, turned, x.shape, stride, chunks.MAPS_BYTES):
        return winograd.conv(g, turned, around, chunk)
    return default.input_gradient(layers.conv, x, kernel, g, stride=stride, padding=padding)


@default.by_groups
def conv_kernel_gradient(x, kernel, g, *, stride, padding):
    """The gradient by the kernel: products of what each output pixel saw with its g, some examples at a time."""
    if amx.pays(x, kernel, kernel.shape[3]):
        return amx.conv_kernel_gradient(x, kernel, g, stride=stride, padding=padding)
    height, _, channels, features = kernel.shape
    (x, _), (g, _) = layers.rounded(x, kernel), layers.rounded(g, kernel)
    # Each chunk adds to a sum of the size of the transformed kernel.
    if chunk := _in_tiles(x, kernel, g.shape, stride, 2 * chunks.MAPS_BYTES):
        gradient = winograd.kernel_gradient(x, g, height, padding, chunks.two_at_least(chunk, x.shape[0]))
        return gradient.astype(kernel.dtype)
    folding = chunks.Folding(kernel, g.shape, stride, padding)
    rows, columns = g.shape[1], g.shape[2] // folding.outputs
    chunk = folding.chunk(x, g.shape)
    xs, gs = chunks.split(x, chunk), chunks.split(g.reshape(len(g), rows, columns, -1), chunk)

    def product(i):
        folded = folding.pixels(xs[i], g.shape[2])
        reach = (rows - 1) * stride + 1
        seen = [folded[:, r : r + reach : stride, b : b + columns] for r in range(height) for b in range(folding.seen)]
        patches = jnp.concatenate(seen, axis=-1).astype(sum_dtype(x.dtype))
        # Features first, because the left operand is the one that gets transposed, and g is the smaller.
        return lax.dot_general(gs[i].astype(sum_dtype(x.dtype)), patches, (((0, 1, 2),) * 2, ((), ())))

    # The first chunk starts the sum: a zero would not vary over devices under shard_map, and the sum does.
    total = lax.fori_loop(1, len(xs), lambda i, total: total + product(i), product(0))
    total = total.T.reshape(height, -1, channels, folding.outputs, features)
    return folding.unfold(total).astype(kernel.dtype)


# Response normalisation.


def _sum_of_maps(x, before, after, *, groups):
    """`default.sum_of_maps` as a product with a band of ones; a sum that overflows makes its whole group NaN."""
    apart = x.reshape(*x.shape[:-1], groups, -1)
    distance = jnp.arange(apart.shape[-1])[:, None] - jnp.arange(apart.shape[-1])
    return (apart @ ((-before <= distance) & (distance <= after)).astype(x.dtype)).reshape(x.shape)


def _by_chunks(function, *arrays):
    """`function` of arrays of one shape, some examples at a time.

    The results take the place of the last array: XLA would fill a new one with zeros.
    """
    x = arrays[-1]
    chunk = _chunk_of_maps(x)
    *others, overwritten = (chunks.split(v, chunk) for v in arrays)

    def overwrite(i, parts):
        return lax.dynamic_update_index_in_dim(parts, function(*(v[i] for v in others), parts[i]), i, 0)

    return lax.fori_loop(0, overwritten.shape[0], overwrite, overwritten).reshape(x.shape)


def _across_maps(function, *arrays, k, n, alpha, beta, groups):
    sums = functools.partial(_sum_of_maps, groups=groups)
    part = functools.partial(function, sums=sums, size=n, constant=k, scale=alpha, power=beta)
    return _by_chunks(part, *arrays)


def _across_pixels(function, *arrays, **constants):
    return _by_chunks(functools.partial(function, sums=default.sum_of_pixels, **constants), *arrays)


local_response_normalization = functools.partial(_across_maps, default.normalize)
local_response_normalization_gradient = functools.partial(_across_maps, default.normalize_gradient)
spatial_response_normalization = functools.partial(_across_pixels, default.normalize)
spatial_response_normalization_gradient = functools.partial(_across_pixels, default.normalize_gradient)


# Pooling.


def max_pool_and_places(x, *, window, stride):
    """`default.max_pool_and_places`, some examples at a time."""
    # The loop materialises its outputs; otherwise XLA would recompute them.
    function = functools.partial(default.max_pool_and_places, window=window, stride=stride)
    found = lax.map(function, chunks.split(x, _chunk_of_maps(x)))
    return jax.tree.map(lambda v: v.reshape(len(x), *v.shape[2:]), found)


def max_pool_gradient(x, place, g, *, window, stride):
    """`default.max_pool_gradient` of a g that is complete; else XLA computes it again for each place of the window."""
    # XLA does not join a padding with what reads it many times. The barrier keeps XLA from cancelling the padding
    # against the slice, and is gone when XLA joins operations.
    place, g = (v[:, :-1] for v in lax.optimization_barrier([default.pad(v, 1, 0, 1) for v in (place, g)]))
    return default.max_pool_gradient(x, place, g, window=window, stride=stride)


# Both, of what a ReLU gave: the normalised maps, and their gradient, stay in the cache.


def normalize_pool(x, *, window, stride, **lrn):
    """`default.normalize_pool`: where nothing is kept, the normalised maps take the place of x."""
    return default.max_pool(local_response_normalization(x, **lrn), window=window, stride=stride)


def normalize_pool_and_places(x, *, window, stride, groups, **lrn):
    """`default.normalize_pool_and_places`, some examples at a time."""
    sums = functools.partial(_sum_of_maps, groups=groups)

    def part(x):
        y = default.across_maps(default.normalize, x, sums=sums, **lrn)
        y = lax.optimization_barrier(default.pad(y, 1, 0, 1))[:, :-1]  # complete, as in `max_pool_gradient`
        return default.max_pool_and_places(y, window=window, stride=stride)

    # Slices of x as it is: for an x in another shape XLA would compute the ReLU once more.
    chunk = _chunk_of_maps(x)
    found = lax.map(lambda i: part(lax.dynamic_slice_in_dim(x, i * chunk, chunk)), jnp.arange(len(x) // chunk))
    return jax.tree.map(lambda v: v.reshape(len(x), *v.shape[2:]), found)


def normalize_pool_gradient(x, place, g, *, window, stride, groups, **lrn):
    """`default.normalize_pool_gradient`, some examples at a time, in the place of x."""
    sums, chunk = functools.partial(_sum_of_maps, groups=groups), _chunk_of_maps(x)

    def overwrite(i, whole):
        x, here, above = (lax.dynamic_slice_in_dim(v, i * chunk, chunk) for v in (whole, place, g))
        below = max_pool_gradient(x, here, above, window=window, stride=stride)
        below = default.across_maps(default.normalize_gradient, x, below, sums=sums, **lrn)
        return lax.dynamic_update_slice_in_dim(whole, default.relu_gradient(x, below), i * chunk, 0)

    return lax.fori_loop(0, len(x) // chunk, overwrite, x)


def softmax(logits):
    """Example by example: XLA joins the fully-connected layers and a softmax of the whole batch into one slow function,
    for batches of five to eight.
    """
    return lax.map(jax.nn.softmax, logits)


# The whole network.


@functools.cache
def in_halves(network_class):
    """A network whose convolutional layers take an even batch as two halves, which run side by side.

    XLA runs each of its smaller operations on one core; two halves keep two cores busy.
    """

    class InHalves(network_class):
        def convolutional(self, images):
            convolutional = super().convolutional
            halves = jnp.split(images, math.gcd(2, len(images)))
            return jnp.concatenate([convolutional(half) for half in halves])

    InHalves.__name__ = InHalves.__qualname__ = network_class.__name__
    return InHalves
