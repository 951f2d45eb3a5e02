"""The network of Krizhevsky, Sutskever and Hinton, NIPS 2012: eight layers in two towers.

Numbers without a source are from the paper, sections 3 to 5; "source" is the code of 2012 that the Computer History
Museum released, `layers/layers-145.cfg` and `layers/layer-params-145.cfg` there.

The parameters are one ordinary tree, {'conv1': {'kernel', 'bias'}, …, 'fc8'}, in the shapes of a grouped network
(conv2/kernel is 5×5×48×256): the first half of the output maps belongs to tower 0, the second half to tower 1.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.errors import UserError, check_name, check_ranges, require, shown
from models import ops, towers
from models.layers import output_size
from models.ops import ACTIVATIONS
from parallel import Towers

CONVOLUTIONS = ("conv1", "conv2", "conv3", "conv4", "conv5")
LAYERS = (*CONVOLUTIONS, "fc6", "fc7", "fc8")

# Layer: kernel size, stride, padding; the first convolution runs over the edge, so that 224 pixels give 55 (source).
GEOMETRY = {"conv1": (11, 4, None), "conv2": (5, 1, 2), "conv3": (3, 1, 1), "conv4": (3, 1, 1), "conv5": (3, 1, 1)}

# Output maps of conv1 … fc7, all towers together, by number of towers. One tower is the paper's one-GPU network, which
# widens the last layers so that the parameters stay about as many (source: layers-145-half.cfg).
FEATURES = {2: (96, 256, 384, 384, 256, 4096, 4096), 1: (48, 128, 192, 192, 256, 4096, 4096)}

# What follows each convolution. The source's first layer normalises and pools before its ReLU, and its second has a
# second, spatial normalisation. CaffeNet pools before it normalises.
PAPER = {
    "conv1": ("activate", "normalize", "pool"),
    "conv2": ("activate", "normalize", "pool"),
    "conv3": ("activate",),
    "conv4": ("activate",),
    "conv5": ("activate", "pool"),
}
ORDERS = {
    "paper": PAPER,
    "caffenet": PAPER | dict.fromkeys(("conv1", "conv2"), ("activate", "pool", "normalize")),
    "no_lrn2": PAPER | {"conv2": ("activate", "pool")},
    "lrn2_first": PAPER | {"conv2": ("normalize", "activate", "pool")},
    "2012": PAPER
    | {
        "conv1": ("normalize", "pool", "activate"),
        "conv2": ("activate", "normalize", "normalize_spatially", "pool"),
    },
}

# Standard deviations of the initial weights that are not 0.01. None stands for √(2 / fan-in) and biases of 0 in every
# layer (He et al. 2015): it works at any width, while the others were tuned for the paper's.
DEVIATIONS = {"paper": {}, "2012": {"conv3": 0.03, "conv4": 0.03, "conv5": 0.03}, "he": None}

# These start with bias 1, "to provide the ReLUs with positive inputs".
BIASED = ("conv2", "conv4", "conv5", "fc6", "fc7")

# Not truncated, like the others.
HE_NORMAL = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class AlexNet(nn.Module):
    """Five convolutional and three fully-connected layers in two towers that meet at conv3, fc6, fc7 and fc8.

    `models` describes the interface; configs/alexnet.py has the paper's values.

    Attributes:
      num_classes: width of fc8.
      width: multiplies the maps of every layer but fc8.
      features: maps of conv1 … fc7, all towers together; () takes those of the paper for this number of towers.
      activation: 'relu', 'tanh' or 'sigmoid'.
      lrn: whether conv1 and conv2 are followed by response normalisation, within each tower (`lrn_across_towers`).
      lrn_k, lrn_n, lrn_alpha, lrn_beta: its constants (section 3.3); alpha multiplies the sum of squares undivided.
      pool_window, pool_stride: side and step of max-pooling; equal for pooling that does not overlap.
      dropout_rate: share of fc6 and fc7 set to 0 in training; in evaluation all outputs are kept and scaled by
        1 − dropout_rate, as in the paper.
      towers: 2, or 1 for the paper's one-GPU network.
      exchange: layers whose input is the maps of both towers, of conv2 … fc7; fc8 always joins them.
      without: layers left out, of conv2 … fc7. A convolution takes its ReLU and normalisation with it; its pooling
        stays, so that the layers above keep their sizes. An exchange goes with its layer: without conv3, the towers
        first meet at fc6, unless `exchange` names conv4.
      order: 'paper' (ReLU → LRN → pool), 'caffenet' (ReLU → pool → LRN), 'no_lrn2' (no LRN after conv2), 'lrn2_first'
        (LRN before the ReLU of conv2), or '2012' (the source's order, with its second, spatial normalisation).
      initial_weights: `model.init` in a config; 'paper' (normal, σ 0.01), '2012' (σ 0.03 in conv3 … conv5), or 'he'
        (σ √(2 / fan-in), biases 0), which is made for inputs of unit variance, see `input.scale`.
      dtype: type of the computation, 'float32' or 'bfloat16'; parameters, logits and the loss are float32. Of bfloat16
        CPUs have convolutions alone, see `Towers.maps_dtype`.
      placement: which towers are on this device.
      lrn_across_towers: whether maps are normalised by those of both towers, as in Caffe, which knows no towers but
        groups of maps. On two devices this takes two more exchanges.
    """

    num_classes: int
    width: float
    features: tuple[int, ...]
    activation: str
    lrn: bool
    lrn_k: float
    lrn_n: int
    lrn_alpha: float
    lrn_beta: float
    pool_window: int
    pool_stride: int
    dropout_rate: float
    towers: int
    exchange: tuple[str, ...]
    without: tuple[str, ...]
    order: str
    initial_weights: str
    dtype: str
    placement: Towers
    lrn_across_towers: bool = False

    def maps(self) -> dict[str, int]:
        """Output maps of every layer, all towers together: multiples of the number of towers, but for fc8."""
        features = self.features or FEATURES[self.towers]
        scaled = [max(1, round(n * self.width / self.towers)) * self.towers for n in features]
        return dict(zip(LAYERS, (*scaled, self.num_classes), strict=True))

    def setup(self):
        """The layers conv1 … fc8."""
        deviations = DEVIATIONS[self.initial_weights]
        for name, features in self.maps().items():
            kernel_size, stride, padding = GEOMETRY.get(name, (0, 1, 0))
            he = deviations is None
            layer = towers.TowerLayer(
                features=features,
                kernel_size=kernel_size,
                stride=stride,
                padding=padding,
                groups=1 if name == "conv1" or self._joins(name) else self.placement.here,
                kernel_init=HE_NORMAL if he else nn.initializers.normal(deviations.get(name, 0.01)),
                bias_init=nn.initializers.constant(float(name in BIASED and not he)),
                towers=self.placement,
                dtype="float32" if name == "fc8" else self.dtype,  # bfloat16 logits would often tie
            )
            setattr(self, name, layer)

    def __call__(self, images: jax.Array, *, train: bool = False, rows: jax.Array | None = None) -> jax.Array:
        """Computes logits; see `models`."""
        return self.fully_connected(
            self.convolutional(images.astype(self.placement.maps_dtype(self.dtype))), train, rows
        )

    def convolutional(self, images: jax.Array) -> jax.Array:
        """Maps (N, H, W, 3) images to what fc6 sees, (N, H', W', maps of the towers here)."""
        maps = images
        for name in CONVOLUTIONS:
            left_out = name in self.without
            maps = maps if left_out else self._layer(name, maps)
            steps = ORDERS[self.order][name]
            if self._in_one(steps) and not left_out:
                maps = self.normalize_pool(maps, self.activate(maps))
                continue
            for step in steps:
                if step == "pool" or not left_out:
                    across = step == "normalize" and self.lrn and self.lrn_across_towers
                    maps = self._join(f"{name}_across", maps) if across else maps
                    maps = getattr(self, step)(maps)
                    maps = self.placement.own(maps) if across else maps
        return maps

    def fully_connected(self, maps: jax.Array, train: bool, rows: jax.Array | None) -> jax.Array:
        """Maps what `convolutional` returns to (N, num_classes) float32 logits."""
        for name in ("fc6", "fc7"):
            if name not in self.without:
                maps = self.dropout(self.activate(self._layer(name, maps)), train, rows)
        logits = self.placement.join(self._layer("fc8", maps))[..., : self.num_classes]
        return logits.astype(jnp.float32)

    def _lrn(self):
        """The constants of response normalisation, and the groups of maps that it sees apart."""
        groups = 1 if self.lrn_across_towers else self.placement.here
        return {"k": self.lrn_k, "n": self.lrn_n, "alpha": self.lrn_alpha, "beta": self.lrn_beta, "groups": groups}

    def _in_one(self, steps):
        """Whether these steps are computed together."""
        fit = steps == ("activate", "normalize", "pool") and self.activation == "relu"
        return self.placement.fused and fit and self.lrn and not self.lrn_across_towers

    def _joins(self, name):
        """Whether the input of layer `name` is the maps of both towers."""
        return name in (*self.exchange, "fc8")

    def _layer(self, name, maps):
        """Layer `name` of the maps of the towers here, after the exchange if it has one."""
        return getattr(self, name)(self._join(f"{name}_joined", maps) if self._joins(name) else maps)

    def _join(self, record, maps):
        maps = self.placement.join(maps)
        self.sow("intermediates", record, maps)
        return maps

    def activate(self, x: jax.Array) -> jax.Array:
        """ReLU, if `activation` names no other (section 3.1)."""
        return ACTIVATIONS[self.activation](x)

    def normalize(self, x: jax.Array) -> jax.Array:
        """Response normalisation across maps, within each tower (section 3.3), or across the towers."""
        return ops.local_response_normalization(x, **self._lrn()) if self.lrn else x

    def normalize_pool(self, x: jax.Array, rectified: jax.Array) -> jax.Array:
        """Two steps in one, of what a ReLU gave for x."""
        kernel = not self.placement.cores  # a CPU has a loop of its own
        return ops.normalize_pool(x, rectified, self.pool_window, self.pool_stride, kernel=kernel, **self._lrn())

    def normalize_spatially(self, x: jax.Array) -> jax.Array:
        """Response normalisation across pixels (source: rnorm2b, with its constants)."""
        return ops.spatial_response_normalization(x, size=5, scale=0.001 / 25, power=0.75) if self.lrn else x

    def pool(self, x: jax.Array) -> jax.Array:
        """Max-pooling that overlaps (section 3.4)."""
        return ops.max_pool(x, self.pool_window, self.pool_stride)

    def dropout(self, x: jax.Array, train: bool, rows: jax.Array | None) -> jax.Array:
        """Dropout that scales the outputs in evaluation, and not in training (section 4.2)."""
        if not self.dropout_rate:
            return x
        if not train:
            return x * (1 - self.dropout_rate)
        return towers.dropout(x, self.dropout_rate, self.make_rng("dropout"), self.placement, rows)

    def validate(self, image_size: int) -> None:
        """Refuses fields that cannot work for images of `image_size` pixels a side; raises `UserError`."""
        check_name("model.activation", self.activation, ACTIVATIONS)
        check_name("model.order", self.order, ORDERS)
        check_name("model.init", self.initial_weights, DEVIATIONS)
        require(self.towers in FEATURES, f"model.towers={shown(self.towers)}: it is 2, or 1 for the one-GPU network.")
        for field, names in (("exchange", self.exchange), ("without", self.without)):
            known = all(name in LAYERS[1:-1] for name in names)
            require(
                known, f"model.{field}={shown(names)} takes layers of conv2 to fc7, such as ('conv4',) with its comma."
            )
        counts = [n for n in self.features if type(n) is int and self.towers <= n <= 1 << 20]
        require(
            not self.features or len(self.features) == len(counts) == 7,
            f"model.features={shown(self.features)} must give 7 counts of maps, conv1 to fc7, each between "
            f"{self.towers} and {1 << 20}, or none: ().",
        )
        bounds = {
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
        check_ranges({"crop": image_size}, {"crop": (11, 4096)}, "input.")  # conv1's kernels must fit
        least = next((size for size in range(11, 4097) if self._fits(size)), None)
        if least is None or image_size < least:
            raise UserError(
                f"input.crop={image_size} is too small for three times max-pooling with "
                f"model.pool_window={self.pool_window}, model.pool_stride={self.pool_stride}; "
                f"{f'it takes {least} or more' if least else 'take smaller ones'}."
            )

    def _fits(self, size: int) -> bool:
        """Whether images of this side are large enough for conv1 and three times max-pooling."""
        try:
            size = output_size(size, *GEOMETRY["conv1"][:2])
            for _ in range(3):
                size = output_size(size, self.pool_window, self.pool_stride)
        except ValueError:
            return False
        return True
