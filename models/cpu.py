"""The forms of `models.layers` for CPUs.

XLA's convolution with few channels, its gradient of a kernel and window sums over maps are slow there. Large arrays go
through in chunks of examples. A chunk fits into the cache, and nothing larger is allocated, because a fresh page costs
more than the work on it. What this module lacks is fast enough in `models.default`. The tests hold each form to its
plain one.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from models import default, layers
from models.layers import sum_dtype

# Of a chunk.
PATCHES_BYTES = 10 << 20
MAPS_BYTES = 8 << 20


def _chunk(examples: int, bytes_each: int, limit: int) -> int:
    """The largest divisor of `examples` of which so many stay within `limit` bytes; 1 at least."""
    return max(n for n in range(1, examples + 1) if examples % n == 0 and (n == 1 or n * bytes_each <= limit))


def _split(x, chunk):
    return x.reshape(-1, chunk, *x.shape[1:])


def _chunk_of_maps(x):
    return _chunk(len(x), math.prod(x.shape[1:]) * x.dtype.itemsize, MAPS_BYTES)


# Convolution.


def _fold(x, window, stride, padding):
    """Pads x and merges every `stride` neighbouring pixels of a row into one pixel with stride · C channels.

    The convolution then strides down only. Merging along a row is a change of shape; across rows it would move pixels.
    """
    (top, bottom), (left, right) = padding
    n, height, width, channels = x.shape
    reach = (width + left + right - window) // stride - (-window // stride)  # blocks that some window sees
    x = lax.pad(
        x, jnp.zeros((), x.dtype), ((0, 0, 0), (top, bottom, 0), (left, reach * stride - width - left, 0), (0, 0, 0))
    )
    return x.reshape(n, height + top + bottom, reach, stride * channels)


def _fold_kernel(kernel, stride):
    """A kernel for what `_fold` returns: zeros fill its last block."""
    height, width, channels, features = kernel.shape
    return default.pad(kernel, 1, 0, -width % stride).reshape(height, -1, stride * channels, features)


def _chunk_of_patches(x, kernel, output, stride):
    """How many examples' patches (of `_fold`ed pixels) make a chunk."""
    folded = -(-kernel.shape[1] // stride) * stride
    patch = kernel.shape[0] * folded * kernel.shape[2]
    return _chunk(len(x), math.prod(output[1:3]) * patch * x.dtype.itemsize, PATCHES_BYTES)


@default.by_groups
def conv(x, kernel, *, stride, padding):
    """`layers.conv`; with a stride, pixels are folded into channels."""
    plain = functools.partial(layers.conv, stride=stride, padding=padding)
    if stride == 1:
        return plain(x, kernel)
    # XLA gathers the patches of all the examples that it is given before it multiplies them.
    output = jax.eval_shape(plain, x, kernel).shape
    folded_kernel = _fold_kernel(kernel, stride)

    def part(x):
        folded = _fold(x, kernel.shape[1], stride, padding)
        return lax.conv_general_dilated(
            folded, folded_kernel, (stride, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return lax.map(part, _split(x, _chunk_of_patches(x, kernel, output, stride))).reshape(output)


@default.by_groups
def conv_kernel_gradient(x, kernel, g, *, stride, padding):
    """The gradient by the kernel: products of what each output pixel saw with its g, some examples at a time."""
    height, width, channels, features = kernel.shape
    blocks = -(-width // stride)
    rows, columns = g.shape[1:3]
    chunk = _chunk_of_patches(x, kernel, g.shape, stride)
    xs, gs = _split(x, chunk), _split(g, chunk)

    def product(i):
        folded = _fold(xs[i], width, stride, padding)
        reach = (rows - 1) * stride + 1
        seen = [folded[:, r : r + reach : stride, b : b + columns] for r in range(height) for b in range(blocks)]
        patches = jnp.concatenate(seen, axis=-1).astype(sum_dtype(x.dtype))
        # Features first, because the left operand is the one that gets transposed, and g is the smaller.
        return lax.dot_general(gs[i].astype(sum_dtype(x.dtype)), patches, (((0, 1, 2),) * 2, ((), ())))

    # The first chunk starts the sum: a zero would not vary over devices under shard_map, and the sum does.
    total = lax.fori_loop(1, len(xs), lambda i, total: total + product(i), product(0))
    total = total.T.reshape(height, blocks * stride, channels, features)[:, :width]
    return total.astype(kernel.dtype)


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
    *others, overwritten = (_split(v, chunk) for v in arrays)

    def overwrite(i, parts):
        return lax.dynamic_update_index_in_dim(parts, function(*(v[i] for v in others), parts[i]), i, 0)

    return lax.fori_loop(0, len(overwritten), overwrite, overwritten).reshape(x.shape)


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
    found = lax.map(function, _split(x, _chunk_of_maps(x)))
    return jax.tree.map(lambda v: v.reshape(len(x), *v.shape[2:]), found)


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
