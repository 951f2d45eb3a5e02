"""The forms of `models.layers` for a platform without better ones.

They differ from the plain forms in their gradients: response normalisation computes its sums again instead of keeping
them, and max-pooling keeps the place of each maximum in its window. Groups of maps are convolved one by one. The tests
hold each to its plain form, forward and backward. A function NAME_gradient takes the gradient of the loss by the output
of NAME, g, back to its inputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from models import layers
from models.layers import output_size, sum_dtype

relu = layers.relu


def relu_gradient(x, g):
    """The gradient of `relu` by x."""
    return jnp.where(x > 0, g, jnp.zeros_like(g))


# Convolution: XLA's own, of each group of maps alone.


def by_groups(function):
    """Lets a function of arrays that lie along their last axis in `groups` take and give the groups side by side."""

    @functools.wraps(function)
    def of_groups(*arrays, groups, **options):
        if groups == 1:
            return function(*arrays, **options)
        parts = zip(*(jnp.split(array, groups, axis=-1) for array in arrays), strict=True)
        return jnp.concatenate([function(*part, **options) for part in parts], axis=-1)

    return of_groups


def input_gradient(layer, x, kernel, g, **options):
    """JAX's own gradient of a layer by x, in its shape."""
    return jax.vjp(lambda x: layer(x, kernel, **options), x)[1](g)[0]


def kernel_gradient(layer, x, kernel, g, **options):
    """JAX's own gradient of a layer by the kernel, in its shape."""
    return jax.vjp(lambda kernel: layer(x, kernel, **options), kernel)[1](g)[0]


conv = by_groups(layers.conv)
conv_input_gradient = by_groups(functools.partial(input_gradient, layers.conv))
conv_kernel_gradient = by_groups(functools.partial(kernel_gradient, layers.conv))

dense = layers.dense
softmax = jax.nn.softmax
dense_input_gradient = functools.partial(input_gradient, layers.dense)
dense_kernel_gradient = functools.partial(kernel_gradient, layers.dense)


# Response normalisation: y = x · s^-power with s = constant + scale · (window sums of x²).


def pad(x, axis, before, after, value=0):
    """Pads one axis with a value."""
    widths = [(before, after, 0) if a == axis else (0, 0, 0) for a in range(x.ndim)]
    return lax.pad(x, jnp.array(value, x.dtype), widths)


def window_sum(x, axis, before, after):
    """Sums over a window along `axis`, from `before` elements before each to `after` behind it, zeros outside."""
    padded = pad(x, axis, before, after)
    shifted = (lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(before + after + 1))
    return functools.reduce(jnp.add, shifted)


def sum_of_maps(x, before, after, *, groups):
    """Sums over a window of maps around each map, within its group.

    All groups are shifted together: a change of shape to (…, groups, maps) would break XLA's fusions.
    """
    axis, count = x.ndim - 1, x.shape[-1]
    padded, share = pad(x, axis, before, after), count // groups

    def shifted(distance):
        values = lax.slice_in_dim(padded, before + distance, before + distance + count, axis=axis)
        seen = (np.arange(count) % share + distance) // share == 0
        return jnp.where(seen, values, jnp.zeros_like(values)) if groups > 1 else values

    return functools.reduce(jnp.add, map(shifted, range(-before, after + 1)))


def sum_of_pixels(x, before, after):
    """Sums over a square window of pixels around each pixel."""
    return window_sum(window_sum(x, 1, before, after), 2, before, after)


def inverse_power(s, power):
    """s^-power."""
    if power == 0.75:  # the paper's; a general power is slower
        return lax.rsqrt(s) * lax.sqrt(lax.rsqrt(s))
    return s**-power


def normalize(x, *, sums, size, constant, scale, power):
    """Response normalisation with `sums(values, before, after)` over windows of `size`."""
    wide = x.astype(sum_dtype(x.dtype))
    s = constant + scale * sums(jnp.square(wide), size // 2, size - 1 - size // 2)
    return (wide * inverse_power(s, power)).astype(x.dtype)


def normalize_gradient(x, g, *, sums, size, constant, scale, power, sums_back=None):
    """The gradient of `normalize` by x; `sums_back` takes the second sums, if not `sums`."""
    before, after = size // 2, size - 1 - size // 2
    wide, g = (v.astype(sum_dtype(x.dtype)) for v in (x, g))
    s = constant + scale * sums(jnp.square(wide), before, after)
    shrunk = g * inverse_power(s, power)
    through_s = (sums_back or sums)(shrunk * wide / s, after, before)  # from all whose windows hold this element
    return (shrunk - 2 * power * scale * wide * through_s).astype(x.dtype)


def across_maps(function, *arrays, sums, k, n, alpha, beta, **others):
    """`normalize` or its gradient, with the paper's names of the constants."""
    return function(*arrays, sums=sums, size=n, constant=k, scale=alpha, power=beta, **others)


def local_response_normalization(x, *, groups, **constants):
    """See `layers.local_response_normalization`."""
    return across_maps(normalize, x, sums=functools.partial(sum_of_maps, groups=groups), **constants)


def local_response_normalization_gradient(x, g, *, groups, **constants):
    """The gradient by x."""
    return across_maps(normalize_gradient, x, g, sums=functools.partial(sum_of_maps, groups=groups), **constants)


spatial_response_normalization = functools.partial(normalize, sums=sum_of_pixels)
spatial_response_normalization_gradient = functools.partial(normalize_gradient, sums=sum_of_pixels)


# Pooling: strided slices instead of windows. Maxima and means go along one axis and then along the other.


def _slices(x, axis, window, stride, outside):
    """One slice for each place in the window: element i of slice j is x[i · stride + j]."""
    count = output_size(x.shape[axis], window, stride)
    reach = (count - 1) * stride + 1
    x = pad(x, axis, 0, max(0, reach + window - 1 - x.shape[axis]), outside)
    return [lax.slice_in_dim(x, j, j + reach, stride, axis) for j in range(window)]


def max_pool(x, *, window, stride):
    """See `layers.max_pool`."""
    rows = functools.reduce(jnp.maximum, _slices(x, 2, window, stride, -jnp.inf))
    return functools.reduce(jnp.maximum, _slices(rows, 1, window, stride, -jnp.inf))


def place_dtype(window):
    """The type of the number of a place in a window."""
    return np.min_scalar_type(window**2 - 1)


def max_pool_and_places(x, *, window, stride):
    """The maxima, and the number of the place in its window, row by row, at which each first stands."""
    y, last = max_pool(x, window=window, stride=stride), window**2 - 1
    rows = _slices(x, 1, window, stride, -jnp.inf)
    slices = [part for row in rows for part in _slices(row, 2, window, stride, -jnp.inf)]
    place = jnp.full(y.shape, last, place_dtype(window))
    for k in reversed(range(last)):
        place = jnp.where(slices[k] == y, jnp.asarray(k, place.dtype), place)
    return y, place


def max_pool_gradient(x, place, g, *, window, stride):
    """The gradient of `max_pool` by x, from the places of the maxima."""

    def spread(row, column):
        """The part of g whose maximum stands at (row, column) of its window, moved to that pixel of the input."""
        passed = jnp.where(place == row * window + column, g, 0).astype(sum_dtype(g.dtype))
        widths = [(0, 0, 0)] * g.ndim
        for axis, before in ((1, row), (2, column)):
            reach = (g.shape[axis] - 1) * stride + 1
            widths[axis] = (before, x.shape[axis] - before - reach, stride - 1)
        return lax.pad(passed, jnp.zeros((), passed.dtype), widths)

    total = functools.reduce(jnp.add, (spread(i, j) for i in range(window) for j in range(window)))
    return total.astype(g.dtype)


# Response normalisation and max-pooling of what a ReLU gave.


def normalize_pool(x, *, window, stride, **lrn):
    """`max_pool` of `local_response_normalization`."""
    return max_pool(local_response_normalization(x, **lrn), window=window, stride=stride)


def normalize_pool_and_places(x, *, window, stride, **lrn):
    """The same, and the places of the maxima."""
    return max_pool_and_places(local_response_normalization(x, **lrn), window=window, stride=stride)


def normalize_pool_gradient(x, place, g, *, window, stride, **lrn):
    """The gradient by what the ReLU took, from what it gave, x."""
    g = max_pool_gradient(x, place, g, window=window, stride=stride)
    return relu_gradient(x, local_response_normalization_gradient(x, g, **lrn))


def avg_pool(x, *, window, stride):
    """See `layers.avg_pool`; its gradient is JAX's own."""
    mean = x.astype(sum_dtype(x.dtype))
    for axis in (1, 2):
        size = x.shape[axis]
        starts = np.arange(output_size(size, window, stride)) * stride
        inside = np.minimum(starts + window, size) - starts
        total = functools.reduce(jnp.add, _slices(mean, axis, window, stride, 0))
        mean = total / jnp.asarray(np.expand_dims(inside, [a for a in range(x.ndim) if a != axis]), mean.dtype)
    return mean.astype(x.dtype)
