"""Shapes: a generated set of photographs' size, for the demo and the tests.

Each of the ten classes is a shape, a texture and a colour family. Any two of the three leave several classes open.
Position, size, rotation, hue, brightness and background are random, so a linear classifier on pixels learns little.
"""

import io
import itertools

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SHAPES = ("disc", "square", "triangle")
TEXTURES = ("stripes", "checks")
COLOURS = ("warm", "cool")
# These two of the twelve combinations are left out; they share no shape, texture or colour.
LEFT_OUT = ("disc-stripes-warm", "square-checks-cool")
CLASSES = tuple(name for name in map("-".join, itertools.product(SHAPES, TEXTURES, COLOURS)) if name not in LEFT_OUT)
SIZE = 256  # pixels a side


def draw(label: int, random: np.random.Generator) -> np.ndarray:
    """Draws one example of class `label` as (256, 256, 3) uint8 RGB."""
    shape, texture, colour = CLASSES[label].split("-")
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    radius = random.uniform(55, 90)
    middle = random.uniform(radius, SIZE - radius, 2)
    angle = random.uniform(0, 2 * np.pi)
    dx, dy = x - middle[1], y - middle[0]
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    if shape == "disc":
        inside = u**2 + v**2 < (0.8 * radius) ** 2
    elif shape == "square":
        inside = np.maximum(abs(u), abs(v)) < 0.7 * radius
    else:
        inside = (v > -0.5 * radius) & (abs(u) * np.sqrt(3) < radius - v)

    turn = random.uniform(0, np.pi)
    frequency = 2 * np.pi / random.uniform(16, 26)
    p, q = np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u
    waves = np.sin(frequency * p) if texture == "stripes" else np.sin(frequency * p) * np.sin(frequency * q)

    hue = random.uniform(-25, 55) if colour == "warm" else random.uniform(155, 235)
    rgb = _rgb(hue, random.uniform(0.55, 0.9)) * random.uniform(0.7, 1.0)
    object_ = rgb * np.where(waves > 0, 1.0, random.uniform(0.3, 0.5))[..., None]

    # The background mixes two colours of any hue smoothly, and grain covers everything.
    far, near = (_rgb(random.uniform(0, 360), random.uniform(0.1, 0.6)) * random.uniform(0.2, 0.9) for _ in range(2))
    slope = random.uniform(-1, 1, 2)
    blend = np.clip(0.5 + (slope[0] * (x - SIZE / 2) + slope[1] * (y - SIZE / 2)) / SIZE, 0, 1)[..., None]
    background = far * (1 - blend) + near * blend
    image = np.where(inside[..., None], object_, background) * 255
    grain = random.normal(0, random.uniform(2, 10), (SIZE, SIZE, 1)).astype(np.float32)
    return np.clip(image + grain, 0, 255).astype(np.uint8)


def _rgb(hue: float, saturation: float) -> np.ndarray:
    """The colour of full value with this hue, in degrees, and saturation."""
    k = (np.array([5, 3, 1]) + hue / 60) % 6
    return (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)


class Shapes(tfds.core.GeneratorBasedBuilder):
    """The set as a TFDS builder, `shapes`. Example i of a split is a function of (split, i) alone."""

    VERSION = tfds.core.Version("1.0.0")
    EXAMPLES = {"train": 2500, "test": 500}  # noqa: RUF012 -- a constant

    def _info(self):
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in self.EXAMPLES}

    def _generate_examples(self, split):
        for i in range(self.EXAMPLES[split]):
            label = i % len(CLASSES)
            random = np.random.default_rng((i, sorted(self.EXAMPLES).index(split)))
            file = io.BytesIO()
            Image.fromarray(draw(label, random)).save(file, "JPEG", quality=90)
            yield i, {"image": io.BytesIO(file.getvalue()), "label": label}
