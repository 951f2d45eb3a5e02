"""A convolution of few channels and the max-pooling behind it, in one loop over examples that stays in the cache.

The pixels of 2×2 lie side by side, a *block*, so that (N, H, W, C) becomes (N, H/2, W/2, 4 · C). A convolution over
blocks gives the four outputs of a block, its *phases*, as four shares of its features. Pooling of 3×3 pixels with
stride 2 then takes maxima of whole shares, and its gradient by a phase is a sum of four, two or one of its terms.
Nothing skips pixels, the products are wide, and neither the maps before pooling nor their gradient are stored, if only
the kernel's gradient is asked for. For kernels of an odd side s the zeros that fill the blocks make the multiplications
(s + 1)² / s² times as many.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from models import chunks, default
from models.layers import sum_dtype

POOL = (3, 2)  # window and stride


def fits(x_shape: tuple, kernel_shape: tuple, padding, pool: tuple[int, int]) -> bool:
    """Whether a convolution of stride 1 with these shapes, and the pooling behind it, are computed here."""
    height, width = _output(x_shape, kernel_shape, padding)
    even = height % 2 == width % 2 == 0 and min(height, width) >= POOL[0]
    square = kernel_shape[0] == kernel_shape[1]
    return pool == POOL and even and square and kernel_shape[2] < chunks.LEAST_CHANNELS


def conv_pool(x: jax.Array, kernel: jax.Array, padding) -> jax.Array:
    """`max_pool` of `conv`, for what `fits`."""
    return _forward(x, kernel, padding, lambda phases: _maxima(phases)[0])


def conv_pool_and_places(x: jax.Array, kernel: jax.Array, padding) -> tuple[jax.Array, jax.Array]:
    """The same, and the places of the maxima, as `default.max_pool_and_places` numbers them."""
    return _forward(x, kernel, padding, _maxima_and_places)


def kernel_gradient(x: jax.Array, place: jax.Array, g: jax.Array, side: int, padding) -> jax.Array:
    """The gradient by the kernel, (side, side, C, F), from the places of the maxima and the gradient by these."""
    rows, columns, features = g.shape[1:]
    channels, seen = x.shape[-1], _seen(side)
    chunk = _chunk(x, seen, rows, columns, features)
    xs, places, gs = (chunks.split(v, chunk) for v in (x, place, g))

    def product(i):
        blocks = _blocks(xs[i], padding, rows, columns, seen)
        slices = [blocks[:, r : r + rows, c : c + columns] for r in range(seen) for c in range(seen)]
        patches = jnp.concatenate(slices, axis=-1).astype(sum_dtype(x.dtype))
        phases = _gradients(places[i], gs[i].astype(sum_dtype(x.dtype)))
        # One product for each phase: XLA would first copy all of them side by side.
        return jnp.stack([lax.dot_general(patches, phase, (((0, 1, 2),) * 2, ((), ()))) for phase in phases])

    # The first chunk starts the sum: a zero would not vary over devices under shard_map, and the sum does.
    total = lax.fori_loop(1, len(xs), lambda i, total: total + product(i), product(0))
    total = total.reshape(2, 2, seen, seen, 2, 2, channels, features).transpose(0, 1, 2, 4, 3, 5, 6, 7)
    total = total.reshape(2, 2, 2 * seen, 2 * seen, channels, features)
    whole = (total[a, b, a : a + side, b : b + side] for a in range(2) for b in range(2))
    return functools.reduce(jnp.add, whole).astype(x.dtype)


def _output(x_shape, kernel_shape, padding):
    """Height and width of what the convolution gives."""
    return [
        size + sum(around) - side + 1
        for size, around, side in zip(x_shape[1:3], padding, kernel_shape[:2], strict=True)
    ]


def _seen(side):
    """How many blocks along one axis a block of outputs sees."""
    return side // 2 + 1


def _chunk(x, seen, rows, columns, features):
    """How many examples' patches and phases make a chunk, for pooled maps of this size."""
    each = rows * columns * 4 * (seen**2 * x.shape[-1] + features) * x.dtype.itemsize
    return chunks.chunk_of(x.shape[0], each, chunks.MAPS_BYTES)


def _blocks(x, padding, rows, columns, seen):
    """The blocks of x, padded for so many blocks of outputs: (N, rows + seen − 1, columns + seen − 1, 4 · C)."""
    n, height, width, channels = x.shape
    (top, _), (left, _) = padding
    down, across = rows + seen - 1, columns + seen - 1
    widths = ((0, 0, 0), (top, 2 * down - height - top, 0), (left, 2 * across - width - left, 0), (0, 0, 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), widths)
    return x.reshape(n, down, 2, across, 2, channels).swapaxes(2, 3).reshape(n, down, across, 4 * channels)


def _forward(x, kernel, padding, pooled):
    """`pooled` of the four phases, some examples at a time."""
    side, _, channels, features = kernel.shape
    seen = _seen(side)
    rows, columns = (size // 2 for size in _output(x.shape, kernel.shape, padding))
    fill = 2 * seen - side
    # For each phase, over all the pixels that its block of outputs sees.
    copies = [default.pad(default.pad(kernel, 0, a, fill - a), 1, b, fill - b) for a in range(2) for b in range(2)]
    blocks = jnp.stack(copies, 3).reshape(seen, 2, seen, 2, channels, 4 * features)
    blocks = blocks.swapaxes(1, 2).reshape(seen, seen, 4 * channels, 4 * features)

    def part(x):
        maps = lax.conv_general_dilated(
            _blocks(x, padding, rows, columns, seen),
            blocks,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return pooled(jnp.split(maps, 4, axis=-1))

    found = lax.map(part, chunks.split(x, _chunk(x, seen, rows, columns, features)))
    return jax.tree.map(lambda v: v.reshape(-1, rows, columns, features), found)


def _next(x, axis):
    """What follows each element along an axis; behind the last stands the lowest number."""
    return default.pad(lax.slice_in_dim(x, 1, x.shape[axis], axis=axis), axis, 0, 1, -jnp.inf)


def _maxima(phases):
    """The pooled maps, and the nine places of the windows, row by row, as whole maps of that size."""
    rows = [(first, second, _next(first, 2)) for first, second in (phases[:2], phases[2:])]
    # The third row of a window is the first one of the window below; so is its maximum, which costs less that way.
    across = [functools.reduce(jnp.maximum, row) for row in rows]
    y = functools.reduce(jnp.maximum, (*across, _next(across[0], 1)))
    return y, [*rows[0], *rows[1], *(_next(x, 1) for x in rows[0])]


def _maxima_and_places(phases):
    y, seen = _maxima(phases)
    place = jnp.full(y.shape, 8, default.place_dtype(3))
    for k in reversed(range(8)):
        place = jnp.where(seen[k] == y, jnp.asarray(k, place.dtype), place)
    return y, place


def _gradients(place, g):
    """The gradient by each phase, from the places of the maxima and the gradient by these."""
    # Padded once, in front: padding inside XLA's loops keeps these from being vectorised.
    place, g = (default.pad(default.pad(v, 1, 1, 0), 2, 1, 0) for v in (place, g))
    rows, columns = (size - 1 for size in g.shape[1:3])

    def term(row, column):
        """What goes to place (row, column) of a window, at the block in which that place is."""
        down, right = row // 2, column // 2
        at = (slice(None), slice(1 - down, 1 - down + rows), slice(1 - right, 1 - right + columns))
        return jnp.where(place[at] == 3 * row + column, g[at], 0)

    return [
        functools.reduce(jnp.add, (term(row, column) for row in range(a, 3, 2) for column in range(b, 3, 2)))
        for a in range(2)
        for b in range(2)
    ]
