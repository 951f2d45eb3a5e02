"""The four-layer CIFAR-10 network with which the paper's figure 1 compares ReLU and tanh.

The paper does not name it. This is the best candidate in the source of 2012, `example-layers/layers-19pct.cfg`; with
`lrn=True` it becomes `layers-18pct.cfg`, which normalises after the first two poolings.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from errors import UserError, check_name, check_ranges, shown
from models import layers
from models.alexnet import ACTIVATIONS
from parallel import Towers


class CifarNet(nn.Module):
    """conv5×5×32 → max-pool → act → conv5×5×32 → act → avg-pool → conv5×5×64 → act → avg-pool → fc10; pools are 3/2.

    Attributes:
      num_classes: width of the fully-connected layer.
      activation: 'relu', 'tanh' or 'sigmoid'.
      lrn: response normalisation across maps after the first and the second pooling (size 3, scale 5e-5, power .75).
      towers: 1; there is one tower.
      dtype: type of the computation, 'float32' or 'bfloat16'; parameters, logits and the loss are float32.
      placement: which towers are on this device.
    """

    num_classes: int = 10
    activation: str = "relu"
    lrn: bool = False
    towers: int = 1
    dtype: str = "float32"
    placement: Towers = Towers(1, 1)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, rows: jax.Array | None = None) -> jax.Array:
        """Maps (N, 32, 32, 3) images, RGB in 0–255 with the mean subtracted, to (N, num_classes) float32 logits.

        `train` and `rows` are taken for the sake of a common interface; nothing here is random.
        """
        del train, rows
        activate = ACTIVATIONS[self.activation]

        def conv(x, features, deviation, name):
            return nn.Conv(
                features,
                (5, 5),
                padding=2,
                dtype=self.dtype,
                kernel_init=nn.initializers.normal(deviation),
                name=name,
            )(x)

        def normalize(x):
            if not self.lrn:
                return x
            return layers.local_response_normalization(x, k=1.0, n=3, alpha=5e-5 / 3, beta=0.75)

        x = images.astype(self.dtype)
        x = normalize(activate(layers.max_pool(conv(x, 32, 1e-4, "conv1"), 3, 2)))
        x = normalize(layers.avg_pool(activate(conv(x, 32, 0.01, "conv2")), 3, 2))
        x = layers.avg_pool(activate(conv(x, 64, 0.01, "conv3")), 3, 2)
        x = x.reshape(x.shape[0], -1)
        x = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=nn.initializers.normal(0.01), name="fc10")(x)
        return x.astype(jnp.float32)

    def validate(self, image_size: int) -> None:
        """Refuses fields that cannot work; raises `UserError`."""
        check_name("model.activation", self.activation, ACTIVATIONS)
        check_name("model.dtype", self.dtype, ("float32", "bfloat16"))
        if self.towers != 1:
            raise UserError(f"model.towers={shown(self.towers)}: the CIFAR-10 network has one tower.")
        check_ranges(vars(self), {"num_classes": (2, 1 << 20)}, "model.")
        check_ranges({"crop": image_size}, {"crop": (12, 4096)}, "input.")  # the third pooling needs its 3 pixels
