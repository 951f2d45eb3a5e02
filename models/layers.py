"""The layers of the paper, as section 3 defines them: plain functions on maps of shape (N, height, width, channels).

This is what the network computes. Networks call the functions of the same names in `models.ops`, which compute the same
in the form that is fast on the platform. All return the dtype of `x`; normalisation and means sum in float32 at least.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

relu = nn.relu
# Section 3.1, and the two functions that the paper compares ReLU with.
ACTIVATIONS = {"relu": relu, "tanh": jnp.tanh, "sigmoid": nn.sigmoid}


def output_size(size: int, window: int, stride: int) -> int:
    """How many positions a window takes along `size` pixels; the last may run over the edge (cuda-convnet's rule).

    Raises:
      ValueError: the window is larger than the input, or window or stride is less than 1.
    """
    if window < 1 or stride < 1:
        raise ValueError(f"window={window} and stride={stride} must be at least 1")
    if window > size:
        raise ValueError(f"a window of {window} does not fit into {size} pixels")
    # If the stride exceeds the window, a last window could lie outside altogether; it does not count.
    return min(-(-(size - window) // stride), (size - 1) // stride) + 1


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The type in which sums over values of `dtype` are taken."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def _narrowed(dtype, x):
    narrow = jnp.finfo(dtype)
    return lax.reduce_precision(x, narrow.nexp, narrow.nmant)


# What is rounded in the forward pass lets its gradient through as it is, and the other way round: so each product of a
# convolution and of its gradients takes rounded numbers, and each sum of products stays as it is.
_round_value = jax.custom_vjp(_narrowed, nondiff_argnums=(0,))
_round_value.defvjp(lambda dtype, x: (_narrowed(dtype, x), None), lambda dtype, _, g: (g,))
_round_gradient = jax.custom_vjp(lambda dtype, y: y, nondiff_argnums=(0,))
_round_gradient.defvjp(lambda dtype, y: (y, None), lambda dtype, _, g: (_narrowed(dtype, g),))


def rounded(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps and kernel in the dtype of the maps, and rounded to that of the kernel, if it is narrower.

    The gradient by x is not rounded, and that by the kernel gets its dtype.

    Raises:
      ValueError: the dtype of the kernel is another one, and no narrower.
    """
    if kernel.dtype == x.dtype:
        return x, kernel
    if jnp.finfo(kernel.dtype).bits >= jnp.finfo(x.dtype).bits:
        raise ValueError(f"a kernel of {kernel.dtype} cannot convolve maps of {x.dtype}")
    return _round_value(kernel.dtype, x), kernel.astype(x.dtype)


def rounded_back(y: jax.Array, kernel: jax.Array) -> jax.Array:
    """y, whose gradient is rounded to the dtype of the kernel, if that is narrower."""
    return y if kernel.dtype == y.dtype else _round_gradient(kernel.dtype, y)


def conv(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding="VALID", groups: int = 1) -> jax.Array:
    """Convolves (N, H, W, groups · C) with a kernel (height, width, C, F); gives (N, H', W', F).

    Args:
      x: maps.
      kernel: of the dtype of `x`, or of a narrower one, to which then everything is rounded that is multiplied, the
        gradient by the output too; sums of products stay in the dtype of `x`.
      stride: along both axes.
      padding: 'VALID', or pixels of zeros as ((top, bottom), (left, right)).
      groups: the maps are that many groups of equal size, such as the towers here, and each gives its share of F.

    Raises:
      ValueError: the kernel is larger than the padded input, or has another number of channels, or a wider dtype.
    """
    padding = ((0, 0), (0, 0)) if padding == "VALID" else padding
    if x.shape[-1] != groups * kernel.shape[2]:
        channels = f"{groups} × {kernel.shape[2]}" if groups > 1 else kernel.shape[2]
        raise ValueError(f"a kernel of {channels} channels cannot convolve maps of {x.shape[-1]}")
    for size, (before, after), window in zip(x.shape[1:3], padding, kernel.shape[:2], strict=True):
        output_size(size + before + after, window, stride)  # raises
    y = lax.conv_general_dilated(
        *rounded(x, kernel),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return rounded_back(y, kernel)


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Maps (N, C) by a kernel (C, F), rounded to the dtype of `x`, to (N, F)."""
    return x @ kernel.astype(x.dtype)


def local_response_normalization(
    x: jax.Array, *, k: float, n: int, alpha: float, beta: float, groups: int = 1
) -> jax.Array:
    """x / (k + alpha · sum of x² over n adjacent maps)^beta (section 3.3).

    Map i sees the maps i − ⌊n/2⌋ … i − ⌊n/2⌋ + n − 1, as far as they exist. `alpha` is not divided by n. The maps are
    `groups` groups of equal size, such as the towers here, that do not see each other.

    Raises:
      ValueError: n is less than 1, or the groups are not equal.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"{x.shape[-1]} maps cannot be groups={groups} equal groups")
    apart = x.reshape(*x.shape[:-1], groups, -1).astype(sum_dtype(x.dtype))
    sums = lax.reduce_window(
        jnp.square(apart), 0.0, lax.add, (1, 1, 1, 1, n), (1,) * 5, [(0, 0)] * 4 + [(n // 2, n - 1 - n // 2)]
    )
    return (apart / (k + alpha * sums) ** beta).reshape(x.shape).astype(x.dtype)


def spatial_response_normalization(
    x: jax.Array, *, size: int, scale: float, power: float, constant: float = 1.0
) -> jax.Array:
    """x / (constant + scale · sum of x² over size×size pixels of the same map)^power (source: rnorm2b).

    Pixel i sees the pixels i − ⌊size/2⌋ … i − ⌊size/2⌋ + size − 1 along each axis. Those outside count as zero, and
    `scale` is not divided by the number of pixels.

    Raises:
      ValueError: size is less than 1.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    wide = x.astype(sum_dtype(x.dtype))
    around = (size // 2, size - 1 - size // 2)
    sums = _windows(jnp.square(wide), 0.0, lax.add, size, 1, [(0, 0), around, around, (0, 0)])
    return (wide / (constant + scale * sums) ** power).astype(x.dtype)


def max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """Maximum over window×window pixels each `stride` pixels (section 3.4).

    The last window may run over the bottom and right edge, see `output_size`. Of several equal maxima the first one,
    row by row, receives the gradient.

    Raises:
      ValueError: the window is larger than the input.
    """
    return _windows(x, -jnp.inf, lax.max, window, stride, _overhang(x, window, stride))


def avg_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """Mean over those of window×window pixels that lie inside; the windows are those of `max_pool` (source)."""
    wide, padding = x.astype(sum_dtype(x.dtype)), _overhang(x, window, stride)
    sums = _windows(wide, 0.0, lax.add, window, stride, padding)
    inside = _windows(jnp.ones_like(wide), 0.0, lax.add, window, stride, padding)
    return (sums / inside).astype(x.dtype)


def _windows(x, initial, reduce, window, stride, padding):
    return lax.reduce_window(x, initial, reduce, (1, window, window, 1), (1, stride, stride, 1), padding)


def _overhang(x, window, stride):
    """Padding at the bottom and right edge, so that every window of `output_size` is whole."""
    reach = [(output_size(size, window, stride) - 1) * stride + window for size in x.shape[1:3]]
    after = [max(0, end - size) for end, size in zip(reach, x.shape[1:3], strict=True)]
    return [(0, 0), (0, after[0]), (0, after[1]), (0, 0)]
