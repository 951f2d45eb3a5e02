"""Convolutions with bfloat16 products, for CPUs whose cores multiply bfloat16 in matrix units (Intel's AMX).

Maps are float32; they and the kernel are rounded to bfloat16 when they are multiplied, and the sums are float32. XLA
uses the units for products of matrices, and for no convolution. With bfloat16 it computes everything else, slices too,
by way of float32. What is only moved is therefore moved as 16-bit integers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from common import host
from models import chunks, layers

# With fewer features patches cost more to gather than float32 products do, those of 3×3 and 5×5 by Winograd.
LEAST_FEATURES = {3: 64, 5: 96}
_OTHERWISE = 32
# Bytes of a chunk: more of them make larger products, and fewer of them fit into the cache.
CHUNK_BYTES = 3 * chunks.MAPS_BYTES


def pays(x: jax.Array, kernel: jax.Array, features: int) -> bool:
    """Whether these maps and this kernel are multiplied here, for so many output maps of the product.

    That is known when a program is traced, of the machine that traces it.
    """
    mixed = x.dtype == jnp.float32 and kernel.dtype == jnp.bfloat16
    enough = features >= LEAST_FEATURES.get(kernel.shape[0], _OTHERWISE)
    return mixed and enough and host.multiplies_bfloat16()


def conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding) -> jax.Array:
    """`layers.conv` of float32 maps with a bfloat16 kernel, in one group."""
    output = jax.eval_shape(functools.partial(layers.conv, stride=stride, padding=padding), x, kernel).shape
    folding = chunks.Folding(kernel, output, stride, padding)
    rows, columns = output[1], output[2] // folding.outputs
    folded = folding.kernel(kernel)
    height, seen, channels, features = folded.shape
    # The rows of the kernel one by one have smaller patches, and what lies side by side is gathered once for all.
    by_rows = folding.block == 1

    def part(x):
        pixels = folding.pixels(_bits(x, kernel.dtype), output[2])
        if not by_rows:
            return _product(_patches(pixels, 1, (height, seen), (rows, columns), stride), folded)
        beside = lax.optimization_barrier(_patches(pixels, 1, (1, seen), (pixels.shape[1], columns), 1))
        return functools.reduce(jnp.add, (_product(beside[:, r : r + rows], folded[r]) for r in range(height)))

    patch, products = (seen * channels, height) if by_rows else (height * seen * channels, 1)
    chunk = _chunk(x, rows * columns * (2 * patch + 4 * products * features))
    return lax.map(part, chunks.split(x, chunk)).reshape(output)


def conv_kernel_gradient(x: jax.Array, kernel: jax.Array, g: jax.Array, *, stride: int, padding) -> jax.Array:
    """The gradient of `conv` by its kernel, in the dtype of that; g is the gradient by its output."""
    height, _, channels, features = kernel.shape
    folding = chunks.Folding(kernel, g.shape, stride, padding)
    rows, columns = g.shape[1], g.shape[2] // folding.outputs
    chunk = _chunk(x, 2 * rows * columns * height * folding.seen * folding.block * channels)
    xs, gs = chunks.split(x, chunk), chunks.split(g.reshape(-1, rows, columns, folding.outputs * features), chunk)

    def product(i):
        pixels = folding.pixels(_bits(xs[i], kernel.dtype), g.shape[2])
        # Channels first: a left operand that is transposed costs more than the product.
        maps = lax.optimization_barrier(jnp.moveaxis(pixels, -1, 0))
        beside = lax.optimization_barrier(_patches(maps, 2, (1, folding.seen), (maps.shape[2], columns), 1))
        patches = _patches(beside, 2, (height, 1), (rows, columns), stride)
        return _product(patches.reshape(len(patches), -1), gs[i].astype(kernel.dtype))

    # The first chunk starts the sum: a zero would not vary over devices under shard_map, and the sum does.
    total = lax.fori_loop(1, len(xs), lambda i, total: total + product(i), product(0))
    total = total.reshape(height, -1, channels, folding.outputs, features)
    return folding.unfold(total).astype(kernel.dtype)


def _chunk(x, bytes_each):
    return chunks.two_at_least(chunks.chunk_of(x.shape[0], bytes_each, CHUNK_BYTES), x.shape[0])


def _bits(x, dtype):
    """x rounded to a type of 16 bits, as integers."""
    return lax.bitcast_convert_type(x.astype(dtype), jnp.uint16)


def _patches(pixels, axis, window, size, stride):
    """What a window of rows and blocks sees for outputs of this size, joined along the axis of the channels.

    Rows are on `axis`, and blocks on the next; the channels are on the last one, or before the examples if axis is 2.
    """
    reach = (size[0] - 1) * stride + 1
    rows = [lax.slice_in_dim(pixels, r, r + reach, stride, axis) for r in range(window[0])]
    seen = [lax.slice_in_dim(row, b, b + size[1], axis=axis + 1) for row in rows for b in range(window[1])]
    return jnp.concatenate(seen, axis=0 if axis == 2 else -1)


def _product(bits, operand):
    """The float32 product of patches, (…, K), with an operand of a type of 16 bits, (…, F), whose other axes are K."""
    left = lax.bitcast_convert_type(bits, operand.dtype)
    right = operand.reshape(-1, operand.shape[-1])
    return lax.dot_general(left, right, (((left.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
