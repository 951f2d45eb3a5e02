"""What networks in towers share: the layer that every tower here computes for itself, and dropout.

How the towers lie on devices is known to `parallel.Towers` alone.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import ops
from parallel import Towers


class TowerLayer(nn.Module):
    """One layer in all towers that are here: a convolution, or a fully-connected layer on flattened maps.

    The parameters are `kernel`, (size, size, C, F) or (C, F), and `bias`, (F,), with F this device's share of the
    output maps and C the maps that one tower sees. They are float32.

    Attributes:
      features: output maps of all towers together.
      kernel_size: side of the square kernel; 0 makes the layer fully connected.
      stride: of the convolution.
      padding: pixels of zeros at each edge. None lets the last kernels run over the bottom and right edge, as
        cuda-convnet does: 224 pixels, kernels of 11 and stride 4 give 55.
      kernel_init, bias_init: initial values, of (key, shape, dtype).
      groups: 1 if each tower sees all these maps; the number of towers here if each sees its own alone.
      towers: which towers are here.
      dtype: type of the computation, of which CPUs have convolutions alone, see `Towers.maps_dtype`.
    """

    features: int
    kernel_size: int
    stride: int
    padding: int | None
    kernel_init: Callable[..., jax.Array]
    bias_init: Callable[..., jax.Array]
    groups: int
    towers: Towers
    dtype: str

    @nn.compact
    def __call__(self, maps: jax.Array, pool: tuple[int, int] | None = None) -> jax.Array:
        """Maps (N, …, groups · C) to (N, …, this device's share of the output maps).

        With `pool`, a window and a stride, a convolution of stride 1 and one group is max-pooled before its bias is
        added. The values are those of pooling behind it; of maxima that rounding makes equal, another one may get the
        gradient. Raises `ValueError` for other layers.
        """
        if pool and (not self.kernel_size or self.stride != 1 or self.groups != 1):
            raise ValueError(f"{self.name}: only a convolution of stride 1 and one group pools its maps.")
        maps, share = maps.astype(self.towers.maps_dtype(self.dtype)), self.towers.share(self.features)
        channels = maps.shape[-1] // self.groups
        if not self.kernel_size:
            channels *= math.prod(maps.shape[1:-1])
        window = (self.kernel_size,) * 2 if self.kernel_size else ()
        kernel = self.param("kernel", self.kernel_init, (*window, channels, share), jnp.float32)
        bias = self.param("bias", self.bias_init, (share,), jnp.float32)
        output = self._convolve(maps, kernel, pool) if self.kernel_size else self._connect(maps, kernel)
        return output + bias.astype(output.dtype)

    def _convolve(self, maps, kernel, pool):
        if self.padding is None:
            padding = [(0, -(size - self.kernel_size) % self.stride) for size in maps.shape[1:3]]
        else:
            padding = [(self.padding, self.padding)] * 2
        if pool:
            return ops.conv_pool(maps, kernel.astype(self.dtype), *pool, padding=padding)
        return ops.conv(maps, kernel.astype(self.dtype), stride=self.stride, padding=padding, groups=self.groups)

    def _connect(self, maps, kernel):
        parts = zip(*(jnp.split(array, self.groups, axis=-1) for array in (maps, kernel)), strict=True)
        outputs = [ops.dense(part.reshape(part.shape[0], -1), weights) for part, weights in parts]
        return jnp.concatenate(outputs, axis=-1)


def dropout(x: jax.Array, rate: float, key: jax.Array, towers: Towers, rows: jax.Array | None) -> jax.Array:
    """Sets a share of `rate` of the outputs (N, maps of the towers here) to 0; the others keep their value.

    Each tower and example has a key of its own, because the masks must not depend on which device computes what.

    Args:
      x: outputs of a layer.
      rate: share that is dropped.
      key: of this layer and step, the same on all devices.
      towers: which towers are here.
      rows: (N,) numbers of the examples in the global batch; None means 0 … N − 1.
    """
    rows = jnp.arange(x.shape[0]) if rows is None else rows
    shape = (x.shape[1] // towers.here,)
    masks = []
    for tower in towers.ids():
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, tower), rows)
        masks.append(jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys))
    return jnp.where(jnp.concatenate(masks, axis=-1), x, 0)
