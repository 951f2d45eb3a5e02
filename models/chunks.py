"""What the forms for CPUs share: chunks of examples that stay in the cache, and pixels folded into channels."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from common import host
from models import default

# Of a chunk. It stays in the second cache of a core, or nearly; chunks smaller than half a megabyte cost more than they
# save. That was measured with devices of one and two cores, and not with more. The order of a gradient's sums, and its
# last bits, depend on the cache.
MAPS_BYTES = max(host.second_cache() // 2, 1 << 19)
# With fewer channels XLA's convolution is slow.
LEAST_CHANNELS = 8


def chunk_of(examples: int, bytes_each: int, limit: int) -> int:
    """The largest divisor of `examples` of which so many stay within `limit` bytes; 1 at least."""
    if is_symbolic_dim(examples):  # a program that is exported for batches of any size
        return 1
    return max(n for n in range(1, examples + 1) if examples % n == 0 and (n == 1 or n * bytes_each <= limit))


def two_at_least(chunk: int, examples: int) -> int:
    """Two examples where the chunk is one, for products that are small with one."""
    return chunk if chunk > 1 or is_symbolic_dim(examples) else math.gcd(2, examples)


def split(x: jax.Array, chunk: int) -> jax.Array:
    """Chunks of `chunk` examples along a new first axis."""
    return x.reshape(-1, chunk, *x.shape[1:])


class Folding:
    """Merges the neighbouring pixels of a row into blocks, so that a convolution sees fewer pixels with more channels.

    With a stride, a block has `stride` pixels, and the convolution strides down only. With stride 1 and few channels,
    it has two pixels and gives both outputs. Merging along a row is a change of shape; across rows it would move
    pixels.

    Attributes:
      block: pixels in a block.
      outputs: outputs of a block along the row.
      seen: blocks that one block of outputs sees.
    """

    def __init__(self, kernel, output, stride, padding):
        self._shape, self._stride, self._padding = kernel.shape, stride, padding
        few = stride == 1 and kernel.shape[2] < LEAST_CHANNELS and output[2] % 2 == 0
        self.block = 2 if few else stride
        self.outputs = self.block // stride
        self.seen = -(-(kernel.shape[1] + self.block - stride) // self.block)

    def pixels(self, x, columns):
        """Pads x and merges its pixels, for so many `columns` of output."""
        (top, bottom), (left, _) = self._padding
        n, height, width, channels = x.shape
        reach = columns // self.outputs - 1 + self.seen  # blocks that some window sees
        widths = ((0, 0, 0), (top, bottom, 0), (left, reach * self.block - width - left, 0), (0, 0, 0))
        x = lax.pad(x, jnp.zeros((), x.dtype), widths)
        return x.reshape(n, height + top + bottom, reach, self.block * channels)

    def kernel(self, kernel):
        """A kernel for these pixels, with the features of each output of a block: zeros fill its blocks."""
        height, width, channels, features = kernel.shape
        fill = self.seen * self.block - width
        copies = [default.pad(kernel, 1, at, fill - at) for at in range(0, self.block, self._stride)]
        return jnp.stack(copies, 3).reshape(height, self.seen, self.block * channels, self.outputs * features)

    def unfold(self, total):
        """From the gradient by such a kernel, (height, seen · block, C, outputs, F), to that by the kernel."""
        width = self._shape[1]
        starts = range(0, self.block, self._stride)
        return functools.reduce(jnp.add, (total[:, at : at + width, :, i] for i, at in enumerate(starts)))

    def chunk(self, x, output):
        """How many examples' patches make a chunk."""
        patch = self._shape[0] * self.seen * self.block * self._shape[2]
        each = math.prod(output[1:3]) // self.outputs * patch * x.dtype.itemsize
        return two_at_least(chunk_of(x.shape[0], each, MAPS_BYTES), x.shape[0])
