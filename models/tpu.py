"""The forms of `models.layers` for TPUs, chosen by the estimates of XLA's compiler (benchmarks/README.md has them).

A product costs little there, and a change of shape or a pass over memory much. A barrier decides what XLA keeps from
the forward pass for the backward pass. What this module lacks is as good in `models.default`. The tests hold each form
to its plain one.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from models import default, layers
from models.layers import sum_dtype

# Convolution: one for all groups.

conv = layers.conv
conv_input_gradient = functools.partial(default.input_gradient, layers.conv)
conv_kernel_gradient = functools.partial(default.kernel_gradient, layers.conv)


# Fully connected.


def dense_input_gradient(x, kernel, g):
    """The gradient by x.

    Without the barrier XLA keeps the rounded kernel from the forward pass. To write it and read it twice costs more
    than to read the kernel itself again.
    """
    return default.dense_input_gradient(x, lax.optimization_barrier(kernel), g)


# Response normalisation.


def _sum_of_maps(x, before, after, *, groups, dtype):
    """`default.sum_of_maps` of values rounded to `dtype`, as a product with a band of ones for each group."""
    number = jnp.arange(x.shape[-1])  # in the program: as a constant, the band of a million maps would not fit
    distance, group = number[:, None] - number, number // (len(number) // groups)
    band = (-before <= distance) & (distance <= after) & (group[:, None] == group)
    wide = sum_dtype(dtype)
    return jnp.matmul(x.astype(dtype), band.astype(dtype), precision=lax.Precision.HIGHEST, preferred_element_type=wide)


def local_response_normalization(x, *, groups, **constants):
    """See `layers.local_response_normalization`."""
    sums = functools.partial(_sum_of_maps, groups=groups, dtype=x.dtype)
    return default.across_maps(default.normalize, x, sums=sums, **constants)


def local_response_normalization_gradient(x, g, *, groups, **constants):
    """The gradient by x, for which XLA keeps the sums of squares from the forward pass, in the dtype of `x`."""
    sums = functools.partial(_sum_of_maps, groups=groups, dtype=x.dtype)

    def kept(squares, before, after):
        found = sums(squares, before, after)
        return lax.optimization_barrier(found.astype(x.dtype)).astype(found.dtype)

    return default.across_maps(default.normalize_gradient, x, g, sums=kept, sums_back=sums, **constants)


# Pooling: XLA's own windows, forward and backward.


def max_pool(x, *, window, stride):
    """See `layers.max_pool`."""
    return layers.max_pool(x, window, stride)


def max_pool_and_places(x, *, window, stride):
    """The maxima, and zeros for their places, which `max_pool_gradient` does not take."""
    y = layers.max_pool(x, window, stride)
    return y, jnp.zeros_like(y, default.place_dtype(window))


def max_pool_gradient(x, place, g, *, window, stride):
    """The gradient of `max_pool` by x."""
    return jax.vjp(lambda x: layers.max_pool(x, window, stride), x)[1](g)[0]
