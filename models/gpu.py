"""The forms of `models.layers` for GPUs, chosen by the bytes that XLA's compiled program moves (benchmarks/README.md).

A barrier decides what XLA keeps from the forward pass for the backward pass. What this module lacks is as good in
`models.default`. The tests hold each form to its plain one.
"""

import functools

from jax import lax

from models import default, layers

# Convolution: one for all groups.

conv = layers.conv
conv_input_gradient = functools.partial(default.input_gradient, layers.conv)
conv_kernel_gradient = functools.partial(default.kernel_gradient, layers.conv)


def relu_gradient(x, g):
    """The gradient of `relu` by x, from its output: without the barrier XLA keeps both."""
    return default.relu_gradient(lax.optimization_barrier(layers.relu(x)), g)


def local_response_normalization_gradient(x, g, *, groups, **constants):
    """The gradient by x in two passes: the first writes the terms of the second sum, in the dtype of `x`.

    The barrier on x keeps XLA from storing the sums of squares, in float32, in the forward pass.
    """
    sums = functools.partial(default.sum_of_maps, groups=groups)

    def sums_back(terms, before, after):
        written = lax.optimization_barrier(terms.astype(x.dtype))
        return sums(written.astype(terms.dtype), before, after)

    x = lax.optimization_barrier(x)
    return default.across_maps(default.normalize_gradient, x, g, sums=sums, sums_back=sums_back, **constants)
