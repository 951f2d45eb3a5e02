"""Small data sets on disk for tests: a folder of photographs, and ImageNet's archives in miniature."""

import importlib.util
import io
import pathlib
import tarfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

LABELS = pathlib.Path(importlib.util.find_spec("tensorflow_datasets").origin).parent / "datasets/imagenet2012"


def picture(kind: str, number: int, size: int | tuple[int, int] = (96, 80)) -> Image.Image:
    """Picture `number` of a kind: the kind decides on four coloured quarters, the number on grain and brightness.

    `size` is (width, height) or the side of a square.
    """
    width, height = (size, size) if isinstance(size, int) else size
    key = zlib.crc32(kind.encode())
    quarters = np.random.default_rng(key).uniform(40, 215, (2, 2, 3))
    random = np.random.default_rng((key, number))
    pixels = quarters.repeat(-(-height // 2), axis=0).repeat(-(-width // 2), axis=1)[:height, :width]
    pixels = pixels + random.normal(0, 20, pixels.shape) + random.uniform(-25, 25)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    """The file of an image."""
    file = io.BytesIO()
    image.save(file, format, **({"quality": 95} if format == "JPEG" else {}) | options)
    return file.getvalue()


def make_folder(
    root: pathlib.Path,
    splits: Mapping[str, int] = {"train": 20, "test": 10},
    classes: Sequence[str] = ("a", "b"),
    size: int | tuple[int, int] = (96, 80),
) -> pathlib.Path:
    """Writes ROOT/SPLIT/CLASS/0000.jpg …; `splits` gives the images of each split, dealt to the classes in turn."""
    for split, count in splits.items():
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            name = classes[i % len(classes)]
            number = i + 1_000_000 * (sorted(splits).index(split))
            (root / split / name / f"{i:04d}.jpg").write_bytes(encoded(picture(name, number, size)))
    return root


def make_miniature_imagenet(
    manual_dir: pathlib.Path, per_class: int = 2, validation: int = 10, size: int | tuple[int, int] = (96, 80)
) -> dict[str, dict[str, str]]:
    """Writes the archives from which TFDS prepares `imagenet2012`: the true structure and names, few and small images.

    The validation archive has the first `validation` images of the true one. The training archive has one archive for
    each of their synsets, of `per_class` images.

    Returns:
      The synset of every file, by split: {'train': {'n01440764_0.JPEG': 'n01440764', …}, 'validation': …}.
    """
    manual_dir.mkdir(parents=True, exist_ok=True)
    labels = (LABELS / "validation_labels.txt").read_text().split()[:validation]
    synsets = {"train": {}, "validation": {}}
    with tarfile.open(manual_dir / "ILSVRC2012_img_train.tar", "w") as archive:
        for synset in sorted(set(labels)):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for i in range(per_class):
                    _add(images, f"{synset}_{i}.JPEG", encoded(picture(synset, i, size)))
                    synsets["train"][f"{synset}_{i}.JPEG"] = synset
            _add(archive, f"{synset}.tar", inner.getvalue())
    with tarfile.open(manual_dir / "ILSVRC2012_img_val.tar", "w") as archive:
        for i, synset in enumerate(labels):
            name = f"ILSVRC2012_val_{i + 1:08d}.JPEG"
            _add(archive, name, encoded(picture(synset, 1_000_000 + i, size)))
            synsets["validation"][name] = synset
    return synsets


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))
