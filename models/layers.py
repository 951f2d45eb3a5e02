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

# On CPUs large arrays go through in chunks of examples, so that what one chunk needs stays in the cache.
_PATCHES_BYTES = 12 << 20
_MAPS_BYTES = 4 << 20


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


def _window_sum(x, windows):
    """Sums over windows (axis, before, after) around each element, zeros outside."""
    for axis, before, after in windows:
        padded = _pad(x, axis, before, after)
        shifted = (lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(before + after + 1))
        x = functools.reduce(jnp.add, shifted)
    return x


def _inverse_power(s, power):
    if power == 0.75:  # the paper's; a general power is slower
        return lax.rsqrt(s) * lax.sqrt(lax.rsqrt(s))
    return s**-power


def _normalize_chunk(windows, constant, scale, power, x):
    wide = x.astype(_wide(x.dtype))
    s = constant + scale * _window_sum(jnp.square(wide), windows)
    return (wide * _inverse_power(s, power)).astype(x.dtype)


def _normalize_chunk_gradient(windows, constant, scale, power, x, g):
    wide, g = (v.astype(_wide(x.dtype)) for v in (x, g))
    s = constant + scale * _window_sum(jnp.square(wide), windows)
    shrunk = g * _inverse_power(s, power)
    mirrored = [(axis, after, before) for axis, before, after in windows]
    through_s = _window_sum(shrunk * wide / s, mirrored)
    return (shrunk - 2 * power * scale * wide * through_s).astype(x.dtype)


def _by_examples(function, *arrays):
    """`function` of arrays of one shape, example by example; on CPUs some examples at a time."""
    x = arrays[0]
    chunk = _chunk(len(x), math.prod(x.shape[1:]) * x.dtype.itemsize, _MAPS_BYTES)

    def mapped(*arrays):
        return lax.map(lambda parts: function(*parts), tuple(_split(v, chunk) for v in arrays)).reshape(x.shape)

    return lax.platform_dependent(*arrays, cpu=mapped, default=function)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _normalize(windows, constant, scale, power, x):
    return _by_examples(functools.partial(_normalize_chunk, windows, constant, scale, power), x)


def _normalize_backward(windows, constant, scale, power, x, g):
    return (_by_examples(functools.partial(_normalize_chunk_gradient, windows, constant, scale, power), x, g),)


_normalize.defvjp(lambda *args: (_normalize(*args), args[-1]), _normalize_backward)


def local_response_normalization(x: jax.Array, *, k: float, n: int, alpha: float, beta: float) -> jax.Array:
    """x / (k + alpha · sum of x² over n adjacent maps)^beta (section 3.3).

    Map i sees the maps i − ⌊n/2⌋ … i − ⌊n/2⌋ + n − 1, as far as they exist. `alpha` is not divided by n.

    Raises:
      ValueError: n is less than 1.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    return _normalize(((x.ndim - 1, n // 2, n - 1 - n // 2),), float(k), float(alpha), float(beta), x)


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
    around = (size // 2, size - 1 - size // 2)
    return _normalize(((1, *around), (2, *around)), float(constant), float(scale), float(power), x)


# Pooling goes along one axis and then the other, with strided slices in place of windows.


def _slices(x, axis, window, stride, outside):
    """One slice for each place in the window: element i of slice j is x[i · stride + j]."""
    count = output_size(x.shape[axis], window, stride)
    reach = (count - 1) * stride + 1
    x = _pad(x, axis, 0, max(0, reach + window - 1 - x.shape[axis]), outside)
    return [lax.slice_in_dim(x, j, j + reach, stride, axis) for j in range(window)]


def _max(x, axis, window, stride):
    return functools.reduce(jnp.maximum, _slices(x, axis, window, stride, -jnp.inf))


def _max_gradient(x, y, g, axis, window, stride):
    """Gathers for each x[q · stride + phase] what the windows q, q − 1, … pass to their first maximum."""
    later = (window - 1) // stride
    phases = [jnp.zeros_like(_pad(g, axis, 0, later)) for _ in range(stride)]
    taken = False
    for j, part in enumerate(_slices(x, axis, window, stride, -jnp.inf)):
        equal = part == y
        passed = jnp.where(equal & ~taken if j else equal, g, 0)
        taken = taken | equal
        phases[j % stride] += _pad(passed, axis, j // stride, later - j // stride)
    gradient = jnp.stack(phases, axis + 1).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
    size = x.shape[axis]
    gradient = _pad(gradient, axis, 0, max(0, size - gradient.shape[axis]))
    return lax.slice_in_dim(gradient, 0, size, axis=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """Maximum over window×window pixels; the last window may run over the bottom and right edge.

    Of several equal maxima the first one, row by row, receives the gradient.

    Raises:
      ValueError: the window is larger than the input.
    """
    return _max(_max(x, 2, window, stride), 1, window, stride)


def _max_pool_forward(x, window, stride):
    rows = _max(x, 2, window, stride)
    y = _max(rows, 1, window, stride)
    return y, (x, rows, y)


def _max_pool_backward(window, stride, saved, g):
    x, rows, y = saved
    # The first maximum of the first row that has one is the first in row order, as XLA and PyTorch have it.
    return (_max_gradient(x, rows, _max_gradient(rows, y, g, 1, window, stride), 2, window, stride),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


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


def _convolve(x, kernel, stride, padding):
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _patches(x, kernel_shape, stride, padding):
    """(N, output height, output width, kh · kw · C): what each output pixel sees."""
    kh, kw, channels = kernel_shape[:3]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    h, w = ((size - k) // stride + 1 for size, k in zip(x.shape[1:3], (kh, kw), strict=True))
    # A row of a patch is made of whole blocks of `stride` pixels, and the start of one more.
    blocks = -(-kw // stride)
    width = (w + blocks - 1) * stride
    x = _pad(x[:, :, :width], 2, 0, max(0, width - x.shape[2])).reshape(*x.shape[:2], -1, stride * channels)
    x = jnp.concatenate([x[:, :, b : b + w, : (kw - b * stride) * channels] for b in range(blocks)], axis=-1)
    return jnp.concatenate([x[:, i : i + (h - 1) * stride + 1 : stride] for i in range(kh)], axis=-1)


def _patches_chunk(x, kernel, stride, padding):
    y = jax.eval_shape(functools.partial(_patches, kernel_shape=kernel.shape, stride=stride, padding=padding), x[:1])
    return _chunk(len(x), y.size * x.dtype.itemsize, _PATCHES_BYTES)


def _convolve_by_patches(x, kernel, stride, padding):
    matrix = kernel.reshape(-1, kernel.shape[-1])
    parts = _split(x, _patches_chunk(x, kernel, stride, padding))
    y = lax.map(lambda part: _patches(part, kernel.shape, stride, padding) @ matrix, parts)
    return y.reshape(-1, *y.shape[2:])


def _kernel_gradient_by_patches(x, kernel, g, stride, padding):
    chunk = _patches_chunk(x, kernel, stride, padding)
    xs, gs = _split(x, chunk), _split(g, chunk)
    wide = _wide(x.dtype)

    def product(i):
        patches = _patches(xs[i], kernel.shape, stride, padding)
        return lax.dot_general(patches, gs[i], (((0, 1, 2),) * 2, ((), ())), preferred_element_type=wide)

    # The first chunk starts the sum: a zero would not vary over devices under shard_map, and the sum does.
    total = lax.fori_loop(1, len(xs), lambda i, total: total + product(i), product(0))
    return total.reshape(kernel.shape).astype(kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x, kernel, stride, padding):
    plain = functools.partial(_convolve, stride=stride, padding=padding)
    if stride == 1:
        return plain(x, kernel)
    by_patches = functools.partial(_convolve_by_patches, stride=stride, padding=padding)
    return lax.platform_dependent(x, kernel, cpu=by_patches, default=plain)


def _conv_backward(stride, padding, saved, g):
    x, kernel = saved
    convolve = functools.partial(_convolve, stride=stride, padding=padding)

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
