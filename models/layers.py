"""The layers of 2012 that Flax lacks, and a convolution: plain functions on NHWC arrays.

All compute in the dtype of `x`; sums of squares are taken in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax


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


def _overhang(x, window, stride):
    """Pixels by which the last window of each axis runs over the edge, as padding of (N, H, W, C)."""
    sizes = [(output_size(size, window, stride) - 1) * stride + window - size for size in x.shape[1:3]]
    return ((0, 0), *((0, max(0, over)) for over in sizes), (0, 0))


def local_response_normalization(x: jax.Array, *, k: float, n: int, alpha: float, beta: float) -> jax.Array:
    """x / (k + alpha · sum of x² over n adjacent maps)^beta."""
    squares = jnp.square(x.astype(jnp.float32))
    before = n // 2
    sums = lax.reduce_window(
        squares, 0.0, lax.add, (1, 1, 1, n), (1, 1, 1, 1), ((0, 0),) * 3 + ((before, n - 1 - before),)
    )
    return (x * (k + alpha * sums) ** -beta).astype(x.dtype)


def spatial_response_normalization(
    x: jax.Array, *, size: int, scale: float, power: float, constant: float = 1.0
) -> jax.Array:
    """x / (constant + scale · sum of x² over size×size pixels of the same map)^power."""
    squares = jnp.square(x.astype(jnp.float32))
    edge = (size // 2, size - 1 - size // 2)
    sums = lax.reduce_window(squares, 0.0, lax.add, (1, size, size, 1), (1, 1, 1, 1), ((0, 0), edge, edge, (0, 0)))
    return (x * (constant + scale * sums) ** -power).astype(x.dtype)


def max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """Maximum over window×window pixels; the last window may run over the bottom and right edge."""
    padding = _overhang(x, window, stride)
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), padding)


def avg_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """Mean over window×window pixels, as far as they lie inside."""
    padding = _overhang(x, window, stride)

    def sums(v):
        return lax.reduce_window(v, 0.0, lax.add, (1, window, window, 1), (1, stride, stride, 1), padding)

    return (sums(x.astype(jnp.float32)) / sums(jnp.ones((1, *x.shape[1:3], 1)))).astype(x.dtype)


def conv(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding="VALID") -> jax.Array:
    """Convolves (N, H, W, C) with (kh, kw, C, F)."""
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
