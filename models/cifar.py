"""The four-layer CIFAR-10 network with which the paper's figure 1 compares ReLU and tanh.

The paper does not name it. This is the best candidate in the source of 2012, `example-layers/layers-19pct.cfg`; with
`lrn=True` it becomes `layers-18pct.cfg`, which normalises after the first two poolings.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.errors import check_name, check_ranges, require, shown
from models import ops, towers
from models.ops import ACTIVATIONS
from parallel import Towers


class CifarNet(nn.Module):
    """conv5×5×32 → max-pool → act → conv5×5×32 → act → avg-pool → conv5×5×64 → act → avg-pool → fc10; pools are 3/2.

    `models` describes the interface; nothing here is random, so `train` and `rows` change nothing.

    Attributes:
      num_classes: width of the fully-connected layer.
      activation: 'relu', 'tanh' or 'sigmoid'.
      lrn: response normalisation across maps after the first and the second pooling (size 3, scale 5e-5, power .75).
      towers: 1; there is one tower.
      dtype: type of the computation, 'float32' or 'bfloat16'; parameters, logits and the loss are float32.
      placement: which towers are on this device.
    """

    num_classes: int
    activation: str
    lrn: bool
    towers: int
    dtype: str
    placement: Towers

    def setup(self):
        """The four layers, with the source's standard deviations of the initial weights."""

        def layer(features, kernel_size, deviation):
            return towers.TowerLayer(
                features=features,
                kernel_size=kernel_size,
                stride=1,
                padding=2,
                kernel_init=nn.initializers.normal(deviation),
                bias_init=nn.initializers.zeros,
                groups=1,
                towers=self.placement,
                dtype=self.dtype,
            )

        self.conv1, self.conv2, self.conv3 = layer(32, 5, 1e-4), layer(32, 5, 0.01), layer(64, 5, 0.01)
        self.fc10 = layer(self.num_classes, 0, 0.01)

    def __call__(self, images: jax.Array, *, train: bool = False, rows: jax.Array | None = None) -> jax.Array:
        """Maps (N, 32, 32, 3) images to logits; see `models`."""
        del train, rows
        return self.fc10(self.convolutional(images.astype(self.dtype))).astype(jnp.float32)

    def convolutional(self, images: jax.Array) -> jax.Array:
        """Maps (N, 32, 32, 3) images to what fc10 sees, (N, 4, 4, 64)."""
        x = self.normalize(self.activate(self.pool(self.conv1(images))))
        x = self.normalize(self.average(self.activate(self.conv2(x))))
        return self.average(self.activate(self.conv3(x)))

    def activate(self, x: jax.Array) -> jax.Array:
        """The activation that is compared."""
        return ACTIVATIONS[self.activation](x)

    def normalize(self, x: jax.Array) -> jax.Array:
        """Response normalisation across maps; the source divides its scale by the size of the window."""
        return ops.local_response_normalization(x, k=1.0, n=3, alpha=5e-5 / 3, beta=0.75) if self.lrn else x

    def pool(self, x: jax.Array) -> jax.Array:
        """Max-pooling."""
        return ops.max_pool(x, 3, 2)

    def average(self, x: jax.Array) -> jax.Array:
        """Average-pooling."""
        return ops.avg_pool(x, 3, 2)

    def validate(self, image_size: int) -> None:
        """Refuses fields that cannot work; raises `UserError`."""
        check_name("model.activation", self.activation, ACTIVATIONS)
        require(self.towers == 1, f"model.towers={shown(self.towers)}: the CIFAR-10 network has one tower.")
        check_ranges({"crop": image_size}, {"crop": (12, 4096)}, "input.")  # the third pooling needs its 3 pixels
