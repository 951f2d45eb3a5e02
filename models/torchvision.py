"""torchvision's `alexnet`: the one-tower network of Krizhevsky, "One weird trick for parallelizing convolutional neural
networks" (2014), without response normalisation.

Numbers are those of torchvision/models/alexnet.py and of PyTorch's default initial weights. PyTorch flattens maps as
(channels, height, width) before fc6; here it is (height, width, channels), as in the other networks of this project.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from common.errors import check_ranges, require, shown
from models import ops, towers
from models.layers import sum_dtype
from parallel import Towers

# Layer: output maps, kernel size (0 is fully connected), stride, padding.
LAYERS = {
    "conv1": (64, 11, 4, 2),
    "conv2": (192, 5, 1, 2),
    "conv3": (384, 3, 1, 1),
    "conv4": (256, 3, 1, 1),
    "conv5": (256, 3, 1, 1),
    "fc6": (4096, 0, 1, 0),
    "fc7": (4096, 0, 1, 0),
    "fc8": (None, 0, 1, 0),
}
POOLED = ("conv1", "conv2", "conv5")
WINDOW, STRIDE = 3, 2
SIDE = 6  # of the maps that fc6 sees, whatever the images' size


class TorchvisionAlexNet(nn.Module):
    """Five convolutional and three fully-connected layers in one tower, which take images of any size from 63 on.

    `models` describes the interface; configs/torchvision.py has torchvision's values.

    Attributes:
      num_classes: width of fc8.
      width: multiplies the maps of every layer but fc8.
      dropout_rate: share of the inputs of fc6 and fc7 set to 0 in training; the others are divided by 1 − dropout_rate.
      towers: 1; there is one tower.
      dtype: type of the computation, 'float32' or 'bfloat16'; parameters, logits and the loss are float32. Of bfloat16
        CPUs have convolutions alone, see `Towers.maps_dtype`.
      placement: which towers are on this device.
    """

    num_classes: int
    width: float
    dropout_rate: float
    towers: int
    dtype: str
    placement: Towers

    def setup(self):
        """The layers conv1 … fc8."""
        seen = 3
        for name, (features, kernel_size, stride, padding) in LAYERS.items():
            maps = max(1, round(features * self.width)) if features else self.num_classes
            fan_in = seen * (kernel_size**2 or (SIDE**2 if name == "fc6" else 1))
            uniform = functools.partial(jax.random.uniform, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)
            layer = towers.TowerLayer(
                features=maps,
                kernel_size=kernel_size,
                stride=stride,
                padding=padding,
                groups=1,
                kernel_init=uniform,
                bias_init=uniform,
                towers=self.placement,
                dtype="float32" if name == "fc8" else self.dtype,  # bfloat16 logits would often tie
            )
            setattr(self, name, layer)
            seen = maps

    def __call__(self, images: jax.Array, *, train: bool = False, rows: jax.Array | None = None) -> jax.Array:
        """Computes logits; see `models`."""
        return self.fully_connected(
            self.convolutional(images.astype(self.placement.maps_dtype(self.dtype))), train, rows
        )

    def convolutional(self, images: jax.Array) -> jax.Array:
        """Maps (N, H, W, 3) images to (N, 6, 6, maps of conv5)."""
        maps = images
        for name, (_, kernel_size, _, _) in LAYERS.items():
            if kernel_size:
                maps = self.activate(getattr(self, name)(maps))
                maps = self.pool(maps) if name in POOLED else maps
        return self.average(maps)

    def fully_connected(self, maps: jax.Array, train: bool, rows: jax.Array | None) -> jax.Array:
        """Maps what `convolutional` returns to (N, num_classes) float32 logits."""
        x = maps.reshape(maps.shape[0], -1)
        x = self.activate(self.fc6(self.dropout(x, train, rows)))
        x = self.activate(self.fc7(self.dropout(x, train, rows)))
        return self.fc8(x).astype(jnp.float32)

    def activate(self, x: jax.Array) -> jax.Array:
        """ReLU."""
        return ops.relu(x)

    def pool(self, x: jax.Array) -> jax.Array:
        """Max-pooling without the pixels at the bottom and right edge that do not fill a window."""
        height, width = ((size - WINDOW) // STRIDE * STRIDE + WINDOW for size in x.shape[1:3])
        return ops.max_pool(x[:, :height, :width], WINDOW, STRIDE)

    def average(self, x: jax.Array) -> jax.Array:
        """Means over 6×6 windows that cover the maps, PyTorch's adaptive pooling; nothing to do at 224 pixels."""
        if x.shape[1:3] == (SIDE, SIDE):
            return x
        rows, columns = (jnp.asarray(_shares(size), sum_dtype(x.dtype)) for size in x.shape[1:3])
        wide = x.astype(sum_dtype(x.dtype))
        return jnp.einsum("ih,jw,nhwc->nijc", rows, columns, wide, precision="highest").astype(x.dtype)

    def dropout(self, x: jax.Array, train: bool, rows: jax.Array | None) -> jax.Array:
        """Dropout that scales in training, so that evaluation has nothing to do."""
        if not train or not self.dropout_rate:
            return x
        kept = towers.dropout(x, self.dropout_rate, self.make_rng("dropout"), self.placement, rows)
        return kept / (1 - self.dropout_rate)

    def validate(self, image_size: int) -> None:
        """Refuses fields that cannot work; raises `UserError`."""
        require(self.towers == 1, f"model.towers={shown(self.towers)}: torchvision's AlexNet has one tower.")
        check_ranges(vars(self), {"width": (1e-3, 64), "dropout_rate": (0, 0.999)}, "model.")
        check_ranges({"crop": image_size}, {"crop": (63, 4096)}, "input.")  # the third pooling needs its 3 pixels


def _shares(size: int) -> np.ndarray:
    """(6, size): the share of each pixel in each of 6 means, whose windows start at ⌊i · size / 6⌋ and end at
    ⌈(i + 1) · size / 6⌉.
    """
    shares = np.zeros((SIDE, size))
    for i in range(SIDE):
        start, end = i * size // SIDE, math.ceil((i + 1) * size / SIDE)
        shares[i, start:end] = 1 / (end - start)
    return shares
