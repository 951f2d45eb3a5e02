"""The networks of the source's `example-layers`, on which the authors tried their methods with CIFAR-10.

`CifarNet` is layers-19pct.cfg, and with `lrn=True` layers-18pct.cfg. Without normalisation it is the best candidate for
the network of the paper's figure 1, which the paper does not name. `CifarLocalNet` is layers-conv-local-13pct.cfg, and
with `lrn=True` layers-conv-local-11pct.cfg: the four-layer network of 13 % and 11 % in section 3.3. The sources are
those of cuda-convnet, which configs/cifar10.py names.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.errors import check_name, check_ranges, require, shown
from models import ops, towers
from models.ops import ACTIVATIONS
from parallel import Towers

POOL = (3, 2)  # window and stride
# The normalisation of `CifarLocalNet`; the source divides its scale by the size of the window.
LOCAL_LRN = {"k": 1.0, "n": 5, "alpha": 0.001 / 5, "beta": 0.75}


class LocalLayer(nn.Module):
    """A layer of stride 1 that looks at its maps as a convolution does, but with a kernel of its own at each place.

    The parameters are `kernel`, (H, W, size, size, C, F), and `bias`, (H, W, F), in float32; H and W are the sides of
    the maps.

    Attributes:
      features: output maps.
      kernel_size: side of the kernels, odd; they reach over the edges, where they see zeros.
      kernel_init: initial values, of (key, shape, dtype).
      dtype: type of the computation.
    """

    features: int
    kernel_size: int
    kernel_init: nn.initializers.Initializer
    dtype: str

    @nn.compact
    def __call__(self, maps: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, H, W, features)."""
        maps, size = maps.astype(self.dtype), self.kernel_size
        _, height, width, channels = maps.shape
        shape = (height, width, size, size, channels, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (height, width, self.features), jnp.float32)
        around = (size // 2, size // 2)
        padded = jnp.pad(maps, ((0, 0), around, around, (0, 0)))
        seen = [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
        kernel = kernel.astype(self.dtype).reshape(height, width, -1, self.features)
        return jnp.einsum("nhwc,hwcf->nhwf", jnp.concatenate(seen, -1), kernel) + bias.astype(self.dtype)


class _Network(nn.Module):
    """What the networks here share. `models` describes the interface; nothing is random.

    Attributes:
      num_classes: width of the fully-connected layer.
      activation: 'relu', 'tanh' or 'sigmoid'.
      lrn: whether there is response normalisation.
      towers: 1; there is one tower.
      dtype: type of the computation, 'float32' or 'bfloat16'; parameters, logits and the loss are float32. Of bfloat16
        CPUs have convolutions alone, see `Towers.maps_dtype`.
      placement: which towers are on this device.
    """

    num_classes: int
    activation: str
    lrn: bool
    towers: int
    dtype: str
    placement: Towers

    def __call__(self, images: jax.Array, *, train: bool = False, rows: jax.Array | None = None) -> jax.Array:
        """Maps (N, H, W, 3) images to logits; see `models`."""
        del train, rows
        images = images.astype(self.placement.maps_dtype(self.dtype))
        return self.fc10(self.convolutional(images)).astype(jnp.float32)

    def _layer(self, features: int, kernel_size: int, deviation: float) -> towers.TowerLayer:
        """A layer of stride 1 with initial weights of this deviation, a convolution unless `kernel_size` is 0."""
        return towers.TowerLayer(
            features=features,
            kernel_size=kernel_size,
            stride=1,
            padding=kernel_size // 2,
            kernel_init=nn.initializers.normal(deviation),
            bias_init=nn.initializers.zeros,
            groups=1,
            towers=self.placement,
            dtype=self.dtype,
        )

    def activate(self, x: jax.Array) -> jax.Array:
        """The activation that is compared."""
        return ACTIVATIONS[self.activation](x)

    def pool(self, x: jax.Array) -> jax.Array:
        """Max-pooling."""
        return ops.max_pool(x, *POOL)

    def _pooled(self, layer, x):
        """Max-pooling of a convolutional layer, in one with it on CPUs."""
        return layer(x, POOL) if self.placement.fused and self.placement.cores else self.pool(layer(x))

    def _check(self, image_size: int, smallest: int) -> None:
        """Refuses fields that cannot work, and images of less than `smallest` pixels; raises `UserError`."""
        check_name("model.activation", self.activation, ACTIVATIONS)
        require(self.towers == 1, f"model.towers={shown(self.towers)}: the CIFAR-10 networks have one tower.")
        check_ranges({"crop": image_size}, {"crop": (smallest, 4096)}, "input.")  # a pooling needs its 3 pixels


class CifarNet(_Network):
    """conv5×5×32 → max-pool → act → conv5×5×32 → act → avg-pool → conv5×5×64 → act → avg-pool → fc10; pools are 3/2.

    `lrn` normalises across the pixels of each map, after the first and the second pooling.
    """

    def setup(self):
        """The four layers, with the source's standard deviations of the initial weights."""
        self.conv1, self.conv2, self.conv3 = (
            self._layer(32, 5, 1e-4),
            self._layer(32, 5, 0.01),
            self._layer(64, 5, 0.01),
        )
        self.fc10 = self._layer(self.num_classes, 0, 0.01)

    def convolutional(self, images: jax.Array) -> jax.Array:
        """Maps (N, 32, 32, 3) images to what fc10 sees, (N, 4, 4, 64)."""
        x = self.normalize_spatially(self.activate(self._pooled(self.conv1, images)))
        x = self.normalize_spatially(self.average(self.activate(self.conv2(x))))
        return self.average(self.activate(self.conv3(x)))

    def normalize_spatially(self, x: jax.Array) -> jax.Array:
        """Response normalisation across 3×3 pixels; the source divides its scale by their number."""
        return ops.spatial_response_normalization(x, size=3, scale=5e-5 / 9, power=0.75) if self.lrn else x

    def average(self, x: jax.Array) -> jax.Array:
        """Average-pooling."""
        return ops.avg_pool(x, *POOL)

    def validate(self, image_size: int) -> None:
        """Refuses fields that cannot work; raises `UserError`."""
        self._check(image_size, 12)


class CifarLocalNet(_Network):
    """conv5×5×64 → act → max-pool → conv5×5×64 → act → max-pool → local3×3×32 → act → local3×3×32 → act → fc10.

    Pools are 3/2. `lrn` normalises across five maps before each pooling.
    """

    def setup(self):
        """The five layers, with the source's standard deviations of the initial weights."""
        self.conv1, self.conv2 = self._layer(64, 5, 1e-4), self._layer(64, 5, 0.01)
        dtype = self.placement.maps_dtype(self.dtype)
        self.local3, self.local4 = (LocalLayer(32, 3, nn.initializers.normal(0.04), dtype) for _ in range(2))
        self.fc10 = self._layer(self.num_classes, 0, 0.01)

    def convolutional(self, images: jax.Array) -> jax.Array:
        """Maps (N, 24, 24, 3) images to what fc10 sees, (N, 6, 6, 32)."""
        x = self._activated_and_pooled(self.conv1(images))
        x = self._activated_and_pooled(self.conv2(x))
        return self.activate(self.local4(self.activate(self.local3(x))))

    def _activated_and_pooled(self, x):
        if self.placement.fused and self.lrn and self.activation == "relu":
            return self.normalize_pool(x, self.activate(x))
        return self.pool(self.normalize(self.activate(x)))

    def normalize(self, x: jax.Array) -> jax.Array:
        """Response normalisation across maps."""
        return ops.local_response_normalization(x, **LOCAL_LRN) if self.lrn else x

    def normalize_pool(self, x: jax.Array, rectified: jax.Array) -> jax.Array:
        """Two steps in one, of what a ReLU gave for x."""
        return ops.normalize_pool(x, rectified, *POOL, kernel=not self.placement.cores, groups=1, **LOCAL_LRN)

    def validate(self, image_size: int) -> None:
        """Refuses fields that cannot work; raises `UserError`."""
        self._check(image_size, 6)
