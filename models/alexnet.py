"""The network of Krizhevsky, Sutskever and Hinton, NIPS 2012: eight layers in two towers.

Numbers without a source are from the paper, sections 3 to 5; "source" is the code of 2012 that the Computer History
Museum released, `layers/layers-145.cfg` and `layers/layer-params-145.cfg` there.

The parameters are one ordinary tree, {'conv1': {'kernel', 'bias'}, …, 'fc8'}, in the shapes of a grouped network
(conv2/kernel is 5×5×48×256): the first half of the output maps belongs to tower 0, the second half to tower 1. How the
towers lie on devices is known to `Towers` alone.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from errors import UserError, check_name, check_ranges, shown
from models import layers
from parallel import Towers

CONVOLUTIONS = ("conv1", "conv2", "conv3", "conv4", "conv5")
FULLY_CONNECTED = ("fc6", "fc7", "fc8")
LAYERS = CONVOLUTIONS + FULLY_CONNECTED

# Layer: kernel size, stride.
GEOMETRY = {"conv1": (11, 4), "conv2": (5, 1), "conv3": (3, 1), "conv4": (3, 1), "conv5": (3, 1)}

# Output maps of conv1 … fc7, all towers together, by number of towers. One tower is the paper's one-GPU network, which
# widens the last layers so that the parameters stay about as many (source: layers-145-half.cfg).
FEATURES = {2: (96, 256, 384, 384, 256, 4096, 4096), 1: (48, 128, 192, 192, 256, 4096, 4096)}

# What follows each convolution. The source's first layer normalises and pools before its ReLU, and its second has a
# second, spatial normalisation.
ORDERS = {
    "paper": {
        "conv1": ("activate", "normalize", "pool"),
        "conv2": ("activate", "normalize", "pool"),
        "conv3": ("activate",),
        "conv4": ("activate",),
        "conv5": ("activate", "pool"),
    },
    "2012": {
        "conv1": ("normalize", "pool", "activate"),
        "conv2": ("activate", "normalize", "normalize_spatially", "pool"),
        "conv3": ("activate",),
        "conv4": ("activate",),
        "conv5": ("activate", "pool"),
    },
}

# Standard deviations of the initial weights where they are not 0.01. None stands for √(2 / fan-in) and biases of 0 in
# every layer (He et al. 2015): it works at any width, where the others were tuned for the paper's.
DEVIATIONS = {"paper": {}, "2012": {"conv3": 0.03, "conv4": 0.03, "conv5": 0.03}, "he": None}
BIASED = (
    "conv2",
    "conv4",
    "conv5",
    "fc6",
    "fc7",
)  # these start with bias 1, "to provide the ReLUs with positive inputs"

# Not truncated, as the others are not.
HE_NORMAL = nn.initializers.variance_scaling(2.0, "fan_in", "normal")

ACTIVATIONS = {"relu": nn.relu, "tanh": jnp.tanh, "sigmoid": nn.sigmoid}


class TowerLayer(nn.Module):
    """One layer in all towers that are here: a convolution, or a fully-connected layer on flattened maps.

    Attributes:
      features: output maps of all towers together.
      kernel_size: side of the square kernel; 0 makes the layer fully connected.
      stride, padding: of the convolution, as `layers.conv` takes them.
      deviation: standard deviation of the initial weights, which are normal with mean 0; 0 takes √(2 / fan-in).
      bias: initial bias.
      towers: which towers are here.
      dtype: type of the computation; parameters stay float32.
    """

    features: int
    kernel_size: int
    deviation: float
    bias: float
    towers: Towers
    dtype: Any
    stride: int = 1
    padding: Any = ((0, 0), (0, 0))

    @nn.compact
    def __call__(self, inputs: Sequence[jax.Array]) -> jax.Array:
        """Maps one input that all towers see, or one input per tower here, to (N, …, this device's share of maps)."""
        if not self.kernel_size:
            inputs = [x.reshape(x.shape[0], -1) for x in inputs]
        share = self.towers.share(self.features)
        window = (self.kernel_size,) * 2 if self.kernel_size else ()
        shape = (*window, inputs[0].shape[-1], share)
        weights = nn.initializers.normal(self.deviation) if self.deviation else HE_NORMAL
        kernel = self.param("kernel", weights, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.constant(self.bias), (share,), jnp.float32)
        # Each tower's convolution is its own: a grouped one trains three times slower on CPUs (jax issue 13800).
        kernels = jnp.split(kernel.astype(self.dtype), len(inputs), axis=-1)
        outputs = [self._apply(x.astype(self.dtype), k) for x, k in zip(inputs, kernels, strict=True)]
        output = jnp.concatenate(outputs, axis=-1) if len(outputs) > 1 else outputs[0]
        return output + bias.astype(self.dtype)

    def _apply(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        if self.kernel_size:
            return layers.conv(x, kernel, stride=self.stride, padding=self.padding)
        return x @ kernel


class AlexNet(nn.Module):
    """Five convolutional and three fully-connected layers in two towers that meet at conv3, fc6, fc7 and fc8.

    Attributes:
      num_classes: width of fc8.
      width: multiplies the maps of every layer but fc8.
      features: maps of conv1 … fc7, all towers together; () takes those of the paper for this number of towers.
      activation: 'relu', 'tanh' or 'sigmoid'.
      lrn: whether conv1 and conv2 are followed by response normalisation, within each tower.
      lrn_k, lrn_n, lrn_alpha, lrn_beta: its constants (section 3.3); alpha multiplies the sum of squares undivided.
      pool_window, pool_stride: side and step of max-pooling; equal for pooling that does not overlap.
      dropout_rate: share of fc6 and fc7 set to 0 in training; in evaluation all outputs are kept and scaled by
        1 − dropout_rate, as in the paper.
      towers: 2, or 1 for the paper's one-GPU network.
      exchange: layers whose input is the maps of both towers, of conv2 … fc7; fc8 always joins them.
      without: layers left out, of conv2 … fc7. A convolution takes its ReLU and normalisation with it; its pooling
        stays, so that the layers above keep their sizes. An exchange goes with its layer: without conv3, the towers
        first meet at fc6, unless `exchange` names conv4.
      order: 'paper' (ReLU → LRN → pool) or '2012' (the source's order, with its second, spatial normalisation).
      initial_weights: `model.init` in a config; 'paper' (normal, σ 0.01), '2012' (σ 0.03 in conv3 … conv5), or 'he'
        (σ √(2 / fan-in), biases 0), which is made for inputs of unit variance, see `input.scale`.
      dtype: type of the computation, 'float32' or 'bfloat16'; parameters, logits and the loss are float32.
      placement: which towers are on this device.
    """

    num_classes: int = 1000
    width: float = 1.0
    features: tuple[int, ...] = ()
    activation: str = "relu"
    lrn: bool = True
    lrn_k: float = 2.0
    lrn_n: int = 5
    lrn_alpha: float = 1e-4
    lrn_beta: float = 0.75
    pool_window: int = 3
    pool_stride: int = 2
    dropout_rate: float = 0.5
    towers: int = 2
    exchange: tuple[str, ...] = ("conv3", "fc6", "fc7")
    without: tuple[str, ...] = ()
    order: str = "paper"
    initial_weights: str = "paper"
    dtype: str = "float32"
    placement: Towers = Towers(2, 2)

    def maps(self) -> dict[str, int]:
        """Output maps of every layer, all towers together: multiples of the number of towers, but for fc8."""
        features = self.features or FEATURES[self.towers]
        scaled = [max(1, round(n * self.width / self.towers)) * self.towers for n in features]
        return dict(zip(LAYERS, (*scaled, self.num_classes), strict=True))

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, rows: jax.Array | None = None) -> jax.Array:
        """Computes logits.

        Args:
          images: (N, H, W, 3), RGB in 0–255 with the mean subtracted; 224×224 in the paper.
          train: draws dropout masks, from the rng 'dropout'.
          rows: (N,) numbers of the examples in the global batch, by which masks are drawn; 0 … N−1 by default.

        Returns:
          (N, num_classes) float32 logits, the same on every device of a network.
        """
        parts = jnp.split(images.astype(self.dtype), math.gcd(self.placement.parts, len(images)))
        for name in CONVOLUTIONS:
            steps = ORDERS[self.order][name]
            if name in self.without:
                steps = tuple(step for step in steps if step == "pool")
            else:
                parts = self._layer(name, parts)
            for step in steps:
                parts = [getattr(self, f"_{step}")(maps) for maps in parts]
        maps = jnp.concatenate(parts)
        for name in FULLY_CONNECTED[:-1]:
            if name not in self.without:
                maps = self._dropout(self._activate(*self._layer(name, [maps])), train, rows)
        logits = self.placement.join(*self._layer("fc8", [maps]))[..., : self.num_classes]
        return logits.astype(jnp.float32)

    def _inputs(self, name: str, maps: jax.Array) -> list[jax.Array]:
        """What layer `name` sees: one input for all towers here, after the exchange where there is one, or one each."""
        if name == "conv1":
            return [maps]
        if name in self.exchange or name == "fc8":
            joined = self.placement.join(maps)
            self.sow("intermediates", f"{name}_joined", joined)
            return [joined]
        return self.placement.split(maps)

    def _layer(self, name: str, parts: list[jax.Array]) -> list[jax.Array]:
        """Layer `name` on each part of the examples, with the maps of the towers here side by side."""
        kernel_size, stride = GEOMETRY.get(name, (0, 1))
        deviations = DEVIATIONS[self.initial_weights]
        if name == "conv1":
            # The kernels run over the bottom and right edge, where pixels count as the mean: 224 gives 55 (source).
            padding = tuple((0, -(size - kernel_size) % stride) for size in parts[0].shape[1:3])
        else:
            padding = ((kernel_size // 2,) * 2,) * 2
        layer = TowerLayer(
            features=self.maps()[name],
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            deviation=0.0 if deviations is None else deviations.get(name, 0.01),
            bias=0.0 if deviations is None else float(name in BIASED),
            towers=self.placement,
            dtype=jnp.float32 if name == "fc8" else self.dtype,  # bfloat16 logits would often tie
            name=name,
        )
        return [layer(self._inputs(name, maps)) for maps in parts]

    def _activate(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.activation](x)

    def _normalize(self, x: jax.Array) -> jax.Array:
        if not self.lrn:
            return x
        return layers.local_response_normalization(
            x, k=self.lrn_k, n=self.lrn_n, alpha=self.lrn_alpha, beta=self.lrn_beta, groups=self.placement.here
        )

    def _normalize_spatially(self, x: jax.Array) -> jax.Array:
        # Constants of rnorm2b in the source.
        if not self.lrn:
            return x
        return layers.spatial_response_normalization(x, size=5, scale=0.001 / 25, power=0.75)

    def _pool(self, x: jax.Array) -> jax.Array:
        return layers.max_pool(x, self.pool_window, self.pool_stride)

    def _dropout(self, x: jax.Array, train: bool, rows: jax.Array | None) -> jax.Array:
        if not self.dropout_rate:
            return x
        keep = 1 - self.dropout_rate
        if not train:
            return x * keep
        if rows is None:
            rows = jnp.arange(x.shape[0])
        key = self.make_rng("dropout")
        masks = []
        for tower in self.placement.ids():
            # A key for each tower and example: the masks must not depend on which device computes what.
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, tower), rows)
            shape = (x.shape[1] // self.placement.here,)
            masks.append(jax.vmap(lambda k, shape=shape: jax.random.bernoulli(k, keep, shape))(keys))
        return jnp.where(jnp.concatenate(masks, axis=-1), x, 0)

    def validate(self, image_size: int) -> None:
        """Refuses fields that cannot work for images of `image_size` pixels a side.

        Raises:
          UserError: names the field and what it may be.
        """
        check_name("model.activation", self.activation, ACTIVATIONS)
        check_name("model.order", self.order, ORDERS)
        check_name("model.init", self.initial_weights, DEVIATIONS)
        check_name("model.dtype", self.dtype, ("float32", "bfloat16"))
        middle = LAYERS[1:-1]
        for field in ("exchange", "without"):
            for name in getattr(self, field):
                if name not in middle:
                    raise UserError(
                        f"model.{field} names {shown(name)}, but it takes layers of {', '.join(middle)}; write one "
                        f"layer as ('conv4',), with its comma."
                    )
        if self.towers not in FEATURES:
            raise UserError(
                f"model.towers={shown(self.towers)}: the network has 2 towers, or 1 (the paper's one-GPU network)."
            )
        counts = [n for n in self.features if type(n) is int and self.towers <= n <= 1 << 20]
        if self.features and (len(self.features) != 7 or len(counts) != 7):
            raise UserError(
                f"model.features={shown(self.features)} must give 7 counts of maps, conv1 to fc7, each between "
                f"{self.towers} and {1 << 20}, or none: ()."
            )
        bounds = {
            "num_classes": (2, 1 << 20),
            "width": (1e-3, 64),
            "lrn_k": (1e-6, 1e6),
            "lrn_n": (1, 1024),
            "lrn_alpha": (0, 1e6),
            "lrn_beta": (0, 64),
            "pool_window": (1, 16),
            "pool_stride": (1, 16),
            "dropout_rate": (0, 0.999),
        }
        check_ranges(vars(self), bounds, "model.")
        check_ranges({"crop": image_size}, {"crop": (11, 4096)}, "input.")  # from conv1's kernels on
        size = layers.output_size(image_size, 11, 4)
        for _ in range(3):
            if size < self.pool_window:
                raise UserError(
                    f"input.crop={image_size} is too small for three times max-pooling with "
                    f"model.pool_window={self.pool_window}, model.pool_stride={self.pool_stride}; try 224."
                )
            size = layers.output_size(size, self.pool_window, self.pool_stride)
