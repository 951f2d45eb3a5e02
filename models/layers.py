"""The layers of 2012 that Flax lacks, and a convolution: plain functions on NHWC arrays.

All return the dtype of `x`; sums of squares and of products are taken in float32 at least. The forms are those that are
fast on CPUs, where XLA's own pooling gradient, convolution with few channels and gradient of a kernel are slow; the
tests hold each to its plain form. Reverse-mode differentiation only.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# On CPUs large arrays go through in chunks of examples, so that what one chunk needs stays in the cache, and the rest
# is not even allocated: a fresh page costs more than the work on it.
_PATCHES_BYTES = 10 << 20
_MAPS_BYTES = 8 << 20


def output_size(size: int, window: int, stride: int) -> int:
    """Positions of a window along `size` pixels, the last of which may run over the edge (cuda-convnet's rule).

    Raises:
      ValueError: the window is larger than the input, or no window or stride at all.
    """
    if window < 1 or stride < 1:
        raise ValueError(f"window={window} and stride={stride} must be at least 1")
    if window > size:
        raise ValueError(f"a window of {window} does not fit into {size} pixels")
    # Where the stride exceeds the window, a last window could lie outside altogether; it does not count.
    return min(-(-(size - window) // stride), (size - 1) // stride) + 1


def _chunk(examples: int, bytes_each: int, limit: int) -> int:
    """The largest divisor of `examples` of which so many stay within `limit` bytes; 1 at least."""
    return max(n for n in range(1, examples + 1) if examples % n == 0 and (n == 1 or n * bytes_each <= limit))


def _wide(dtype):
    """The type of sums."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def _split(x, chunk):
    return x.reshape(-1, chunk, *x.shape[1:])


def _pad(x, axis, before, after, value=0):
    widths = [(before, after, 0) if a == axis else (0, 0, 0) for a in range(x.ndim)]
    return lax.pad(x, jnp.array(value, x.dtype), widths)


# Response normalisation: y = x · s^-power with s = constant + scale · (window sums of x²).


def _window_sum(x, axis, before, after):
    """Sums over a window along `axis` around each element, zeros outside."""
    padded = _pad(x, axis, before, after)
    shifted = (lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(before + after + 1))
    return functools.reduce(jnp.add, shifted)


def _sum_of_neighbours(x, before, after, *, groups):
    """Sums over a window of maps around each, within its group; a product with a band of ones where that is faster."""

    def product(x):
        distance = jnp.arange(x.shape[-1])[:, None] - jnp.arange(x.shape[-1])
        return x @ ((-before <= distance) & (distance <= after)).astype(x.dtype)

    def shifts(x):
        return _window_sum(x, x.ndim - 1, before, after)

    apart = x.reshape(*x.shape[:-1], groups, -1)
    return lax.platform_dependent(apart, cpu=product, default=shifts).reshape(x.shape)


def _sum_of_pixels(x, before, after):
    return _window_sum(_window_sum(x, 1, before, after), 2, before, after)


def _inverse_power(s, power):
    if power == 0.75:  # the paper's; a general power is slower
        return lax.rsqrt(s) * lax.sqrt(lax.rsqrt(s))
    return s**-power


def _normalize_chunk(window_sum, size, constant, scale, power, x):
    wide = x.astype(_wide(x.dtype))
    s = constant + scale * window_sum(jnp.square(wide), size // 2, size - 1 - size // 2)
    return (wide * _inverse_power(s, power)).astype(x.dtype)


def _normalize_chunk_gradient(window_sum, size, constant, scale, power, x, g):
    before, after = size // 2, size - 1 - size // 2
    wide, g = (v.astype(_wide(x.dtype)) for v in (x, g))
    s = constant + scale * window_sum(jnp.square(wide), before, after)
    shrunk = g * _inverse_power(s, power)
    through_s = window_sum(shrunk * wide / s, after, before)  # from all whose windows hold this element
    return (shrunk - 2 * power * scale * wide * through_s).astype(x.dtype)


def _by_examples(function, *arrays):
    """`function` of arrays of one shape, example by example.

    On CPUs some examples at a time, whose results take the last array's place: XLA would fill a new one with zeros.
    """
    x = arrays[-1]
    chunk = _chunk(len(x), math.prod(x.shape[1:]) * x.dtype.itemsize, _MAPS_BYTES)

    def chunks(*arrays):
        *others, overwritten = (_split(v, chunk) for v in arrays)

        def overwrite(i, parts):
            return lax.dynamic_update_index_in_dim(parts, function(*(v[i] for v in others), parts[i]), i, 0)

        return lax.fori_loop(0, len(overwritten), overwrite, overwritten).reshape(x.shape)

    return lax.platform_dependent(*arrays, cpu=chunks, default=function)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _normalize(window_sum, size, constant, scale, power, x):
    return _by_examples(functools.partial(_normalize_chunk, window_sum, size, constant, scale, power), x)


def _normalize_backward(window_sum, size, constant, scale, power, x, g):
    gradient = functools.partial(_normalize_chunk_gradient, window_sum, size, constant, scale, power)
    return (_by_examples(gradient, x, g),)


_normalize.defvjp(lambda *args: (_normalize(*args), args[-1]), _normalize_backward)


def local_response_normalization(
    x: jax.Array, *, k: float, n: int, alpha: float, beta: float, groups: int = 1
) -> jax.Array:
    """x / (k + alpha · sum of x² over n adjacent maps)^beta (section 3.3).

    Map i sees the maps i − ⌊n/2⌋ … i − ⌊n/2⌋ + n − 1, as far as they exist. `alpha` is not divided by n. The maps, on
    the last axis, are `groups` groups of equal size that do not see each other. On CPUs a square that overflows makes
    its whole group NaN, elsewhere its neighbours only.

    Raises:
      ValueError: n is less than 1, or the groups are not equal.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"{x.shape[-1]} maps cannot be groups={groups} equal groups")
    return _normalize(functools.partial(_sum_of_neighbours, groups=groups), n, float(k), float(alpha), float(beta), x)


def spatial_response_normalization(
    x: jax.Array, *, size: int, scale: float, power: float, constant: float = 1.0
) -> jax.Array:
    """x / (constant + scale · sum of x² over size×size pixels of the same map)^power (source: rnorm2b).

    Pixels outside count as zero; `scale` is not divided by the number of pixels.

    Raises:
      ValueError: size is less than 1.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    return _normalize(_sum_of_pixels, size, float(constant), float(scale), float(power), x)


# Pooling takes strided slices in place of windows; maxima and means go along one axis and then the other.


def _slices(x, axis, window, stride, outside):
    """One slice for each place in the window: element i of slice j is x[i · stride + j]."""
    count = output_size(x.shape[axis], window, stride)
    reach = (count - 1) * stride + 1
    x = _pad(x, axis, 0, max(0, reach + window - 1 - x.shape[axis]), outside)
    return [lax.slice_in_dim(x, j, j + reach, stride, axis) for j in range(window)]


def _maxima(x, window, stride):
    rows = functools.reduce(jnp.maximum, _slices(x, 2, window, stride, -jnp.inf))
    return functools.reduce(jnp.maximum, _slices(rows, 1, window, stride, -jnp.inf))


def _maxima_and_places(x, window, stride):
    """The maxima, and where in its window, row by row, each of them stands first."""
    y, last = _maxima(x, window, stride), window**2 - 1
    rows = _slices(x, 1, window, stride, -jnp.inf)
    slices = [part for row in rows for part in _slices(row, 2, window, stride, -jnp.inf)]
    place = jnp.full(y.shape, last, np.min_scalar_type(last))
    for k in reversed(range(last)):
        place = jnp.where(slices[k] == y, jnp.asarray(k, place.dtype), place)
    return y, place


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x, window, stride, shape):
    return _maxima(x, window, stride)


def _max_pool_forward(x, window, stride, shape):
    function = functools.partial(_maxima_and_places, window=window, stride=stride)

    def chunks(x):
        # What leaves a loop is not computed again where it is used, as XLA would do with these.
        chunk = _chunk(len(x), math.prod(x.shape[1:]) * x.dtype.itemsize, _MAPS_BYTES)
        return jax.tree.map(lambda v: v.reshape(len(x), *v.shape[2:]), lax.map(function, _split(x, chunk)))

    return lax.platform_dependent(x, cpu=chunks, default=function)


def _max_pool_backward(window, stride, shape, place, g):
    def spread(row, column):
        """What passes to this place of every window, at that pixel."""
        passed = jnp.where(place == row * window + column, g, 0).astype(_wide(g.dtype))
        widths = [(0, 0, 0)] * g.ndim
        for axis, before in ((1, row), (2, column)):
            reach = (g.shape[axis] - 1) * stride + 1
            widths[axis] = (before, shape[axis] - before - reach, stride - 1)
        return lax.pad(passed, jnp.zeros((), passed.dtype), widths)

    total = functools.reduce(jnp.add, (spread(i, j) for i in range(window) for j in range(window)))
    return (total.astype(g.dtype),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """Maximum over window×window pixels; the last window may run over the bottom and right edge.

    Of several equal maxima the first one, row by row, receives the gradient.

    Raises:
      ValueError: the window is larger than the input.
    """
    return _max_pool(x, window, stride, x.shape)


def avg_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """Mean over window×window pixels, as far as they lie inside; otherwise as `max_pool`."""
    mean = x.astype(_wide(x.dtype))
    for axis in (1, 2):
        size = x.shape[axis]
        starts = np.arange(output_size(size, window, stride)) * stride
        inside = np.minimum(starts + window, size) - starts
        total = functools.reduce(jnp.add, _slices(mean, axis, window, stride, 0))
        mean = total / jnp.asarray(np.expand_dims(inside, [a for a in range(x.ndim) if a != axis]), mean.dtype)
    return mean.astype(x.dtype)


# Convolution.


def _convolve(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _fold(x, window, stride, padding):
    """Pads x and takes each `stride` pixels of a row as one with so many times the channels: a stride down only.

    This is a change of shape, where folding the rows too would move every pixel.
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
    return _pad(kernel, 1, 0, -width % stride).reshape(height, -1, stride * channels, features)


def _chunk_of_patches(x, kernel, output, stride):
    """How many examples' patches (of `_fold`ed pixels) make a chunk."""
    folded = -(-kernel.shape[1] // stride) * stride
    patch = kernel.shape[0] * folded * kernel.shape[2]
    return _chunk(len(x), math.prod(output[1:3]) * patch * x.dtype.itemsize, _PATCHES_BYTES)


def _convolve_folded(x, kernel, stride, padding):
    # XLA gathers the patches of all the examples that it is given before it multiplies them.
    output = jax.eval_shape(functools.partial(_convolve, strides=(stride, stride), padding=padding), x, kernel).shape
    folded_kernel = _fold_kernel(kernel, stride)

    def part(x):
        return _convolve(_fold(x, kernel.shape[1], stride, padding), folded_kernel, (stride, 1), "VALID")

    return lax.map(part, _split(x, _chunk_of_patches(x, kernel, output, stride))).reshape(output)


def _kernel_gradient_by_patches(x, kernel, g, stride, padding):
    """The product of what each output pixel saw with its gradient, some examples at a time."""
    height, width, channels, features = kernel.shape
    blocks = -(-width // stride)
    rows, columns = g.shape[1:3]
    chunk = _chunk_of_patches(x, kernel, g.shape, stride)
    xs, gs = _split(x, chunk), _split(g, chunk)

    def product(i):
        folded = _fold(xs[i], width, stride, padding)
        reach = (rows - 1) * stride + 1
        seen = [folded[:, r : r + reach : stride, b : b + columns] for r in range(height) for b in range(blocks)]
        patches = jnp.concatenate(seen, axis=-1).astype(_wide(x.dtype))
        # Features first, because the left operand is the one that gets transposed, and g is the smaller.
        return lax.dot_general(gs[i].astype(_wide(x.dtype)), patches, (((0, 1, 2),) * 2, ((), ())))

    # The first chunk starts the sum: a zero would not vary over devices under shard_map, and the sum does.
    total = lax.fori_loop(1, len(xs), lambda i, total: total + product(i), product(0))
    total = total.T.reshape(height, blocks * stride, channels, features)[:, :width]
    return total.astype(kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x, kernel, stride, padding):
    plain = functools.partial(_convolve, strides=(stride, stride), padding=padding)
    if stride == 1:
        return plain(x, kernel)
    folded = functools.partial(_convolve_folded, stride=stride, padding=padding)
    return lax.platform_dependent(x, kernel, cpu=folded, default=plain)


def _conv_backward(stride, padding, saved, g):
    x, kernel = saved
    convolve = functools.partial(_convolve, strides=(stride, stride), padding=padding)

    def plain(x, kernel, g):
        return jax.vjp(lambda k: convolve(x, k), kernel)[1](g)[0]

    by_patches = functools.partial(_kernel_gradient_by_patches, stride=stride, padding=padding)
    kernel_gradient = lax.platform_dependent(x, kernel, g, cpu=by_patches, default=plain)
    return jax.vjp(lambda x: convolve(x, kernel), x)[1](g)[0], kernel_gradient


_conv.defvjp(lambda x, kernel, *geometry: (_conv(x, kernel, *geometry), (x, kernel)), _conv_backward)


def conv(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding="VALID") -> jax.Array:
    """Convolves (N, H, W, C) with a kernel (kh, kw, C, F) of the same dtype.

    Args:
      x: maps.
      kernel: of all their channels; there are no groups, for each tower has its own convolution.
      stride: along both axes.
      padding: 'VALID', or zeros as ((top, bottom), (left, right)).

    Raises:
      ValueError: the kernel is larger than the padded input, or has another number of channels.
    """
    padding = ((0, 0), (0, 0)) if padding == "VALID" else tuple((int(a), int(b)) for a, b in padding)
    if x.shape[-1] != kernel.shape[2]:
        raise ValueError(f"a kernel of {kernel.shape[2]} channels cannot convolve maps of {x.shape[-1]}")
    for size, (before, after), window in zip(x.shape[1:3], padding, kernel.shape[:2], strict=True):
        output_size(size + before + after, window, stride)
    return _conv(x, kernel, stride, padding)
