"""Convolutions of stride 1 by Winograd's minimal filtering, with few multiplications (Lavin and Gray 2015).

A tile of m×m outputs takes (m + r − 1)² multiplications for each pair of maps in place of m²r², r being the side of the
kernel. Input, kernel and output are transformed by constant matrices: along one axis,
output = Aᵀ((G kernel) · (Bᵀ input)). The products of all tiles with one element of the transformed kernel are a matrix
product. The matrices are those of Toom and Cook: polynomials are multiplied by their values at some points.

The rounding errors are larger than those of a plain convolution: in float32 by some 1.5 times with kernels of 3×3, and
some 15 times, to 1e-5 of the largest output, with those of 5×5.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Outputs of a tile along one axis, and the points besides infinity, by the side of the kernel.
TILES = {3: (2, (0, 1, -1)), 5: (4, (0, 1, -1, 2, -2, 1 / 2, -1 / 2))}


@functools.cache
def matrices(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Aᵀ (m, t), G (t, side) and Bᵀ (t, t) in float64 for kernels of `side` elements, with t = m + side − 1."""
    outputs, points = TILES[side]
    size = outputs + side - 1

    def values(count):  # of a polynomial with so many coefficients, at the points; at infinity, its last coefficient
        return np.vstack([np.vander(points, count, increasing=True), np.eye(1, count, count - 1)])

    kernel, data = values(side), np.linalg.inv(values(size)).T
    scale = np.array([1 / np.abs(row[np.abs(row) > 1e-9]).min() for row in data])  # makes integers of what is added up
    data = np.round(data * scale[:, None], 6)
    return values(outputs).T, kernel / scale[:, None], data


def multiplications(shape: tuple[int, ...], side: int) -> float:
    """The share of a plain convolution's multiplications that is left, for outputs of (N, height, width, F)."""
    outputs, _ = TILES[side]
    tiles = math.prod(-(-size // outputs) for size in shape[1:3])
    return tiles * (outputs + side - 1) ** 2 / (math.prod(shape[1:3]) * side**2)


def elements(shape: tuple[int, ...], side: int, channels: int, features: int) -> int:
    """How many numbers the transformed tiles of one example have, of its input and of its output of this shape."""
    outputs, _ = TILES[side]
    tiles = math.prod(-(-size // outputs) for size in shape[1:3])
    return tiles * (outputs + side - 1) ** 2 * (channels + features)


def conv(x: jax.Array, kernel: jax.Array, padding, chunk: int) -> jax.Array:
    """`layers.conv` of stride 1, `chunk` examples at a time; `padding` is ((top, bottom), (left, right))."""
    side, _, _, features = kernel.shape
    across, of_kernel, _ = matrices(side)
    height, width = (size + sum(around) - side + 1 for size, around in zip(x.shape[1:3], padding, strict=True))
    constants = 2 * [jnp.asarray(of_kernel, x.dtype)]
    transformed = jnp.einsum("ip,jq,pqcf->jicf", *constants, kernel, precision=lax.Precision.HIGHEST)
    transformed = transformed.reshape(-1, *kernel.shape[2:])

    def part(x):
        tiled, (rows, columns) = _tiles(x, padding, (height, width), side)
        products = lax.dot_general(tiled, transformed, (((2,), (1,)), ((0,), (0,))))
        products = products.reshape(len(of_kernel), len(of_kernel), -1, rows, columns, features)
        across_columns = _combine(across, list(products), 4)
        pixels = _combine(across, list(across_columns), 2)  # (N, rows, m, columns, m, F)
        return pixels.reshape(-1, rows * len(across), columns * len(across), features)[:, :height, :width]

    return lax.map(part, x.reshape(-1, chunk, *x.shape[1:])).reshape(-1, height, width, features)


def kernel_gradient(x: jax.Array, g: jax.Array, side: int, padding, chunk: int) -> jax.Array:
    """The gradient of `conv` by its kernel, (side, side, C, F); g is the gradient by its output."""
    across, of_kernel, _ = matrices(side)
    xs, gs = (v.reshape(-1, chunk, *v.shape[1:]) for v in (x, g))

    def products(i):
        tiled, count = _tiles(xs[i], padding, g.shape[1:3], side)
        fill = [(0, tiles * len(across) - size, 0) for tiles, size in zip(count, g.shape[1:3], strict=True)]
        whole = lax.pad(gs[i], jnp.zeros((), g.dtype), ((0, 0, 0), *fill, (0, 0, 0)))
        rows = _combine(across.T, [whole[:, j :: len(across)] for j in range(len(across))], 0)
        both = _combine(across.T, [rows[:, :, :, j :: len(across)] for j in range(len(across))], 0)
        both = both.reshape(len(tiled), -1, g.shape[-1])
        return lax.dot_general(both, tiled, (((1,), (1,)), ((0,), (0,))))

    # The first chunk starts the sum: a zero would not vary over devices under shard_map, and the sum does.
    total = lax.fori_loop(1, len(xs), lambda i, total: total + products(i), products(0))
    total = total.reshape(len(of_kernel), len(of_kernel), *total.shape[1:])
    constants = 2 * [jnp.asarray(of_kernel, x.dtype)]
    return jnp.einsum("ip,jq,jifc->pqcf", *constants, total, precision=lax.Precision.HIGHEST)


def _tiles(x, padding, size, side):
    """The transformed tiles of x, (t², N · tiles, C), for outputs of this size, and the tiles along both axes."""
    _, _, data = matrices(side)
    outputs = len(data) - side + 1
    count = [-(-extent // outputs) for extent in size]
    widths = [
        (before, tiles * outputs + side - 1 - extent - before, 0)
        for tiles, extent, (before, _) in zip(count, x.shape[1:3], padding, strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *widths, (0, 0, 0)))
    reach = [(tiles - 1) * outputs + 1 for tiles in count]
    rows = _combine(data, [x[:, i : i + reach[0] : outputs] for i in range(len(data))], 0)
    both = _combine(data, [rows[:, :, :, j : j + reach[1] : outputs] for j in range(len(data))], 0)
    return both.reshape(len(data) ** 2, -1, x.shape[-1]), count


def _combine(matrix, parts, axis):
    """The products of a constant matrix with a vector of arrays, stacked along a new axis."""
    sums = []
    for row in matrix:
        terms = [
            part if factor == 1 else part * jnp.asarray(factor, part.dtype)
            for factor, part in zip(row, parts, strict=True)
            if factor
        ]
        sums.append(functools.reduce(jnp.add, terms))
    return jnp.stack(sums, axis)
