"""Records: every source is turned, once, into square images of one size, in TFRecords that TFDS can load.

Beside the records of `DATA_DIR/prepared/NAME-SIZE/1.0.0` lie

    statistics.npz   mean_image (S, S, 3), principal_std (3,) and principal_components (3, 3) of the training split
    prepared.json    what was prepared, from where, and which files were left out

A folder of that name is complete: it gets its name when everything in it is written.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps

from datasets.progress import progress
from datasets.sources import File, Source, printable
from errors import UserError

VERSION = "1.0.0"
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # Pillow knows more, and runs Ghostscript for some
LOSSLESS_UP_TO = 64  # pixels a side; JPEG would visibly change images as small as CIFAR's
JPEG_QUALITY = 95

# Sizes are checked here, before anything is decoded, against a limit that is a config field.
Image.MAX_IMAGE_PIXELS = None


class Unreadable(Exception):
    """A file that is no image that can be used; the message says why."""


def to_record(data: bytes, size: int, max_pixels: int) -> tuple[bytes, np.ndarray]:
    """Makes a size×size RGB image of any image file (paper, section 2).

    The shorter side is scaled to `size` and the central square taken, in one resampling with Pillow's bicubic filter,
    which averages over as many pixels as it skips. Whatever Pillow reads becomes RGB: greyscale, CMYK, palettes, 16
    bits, animations (their first frame); transparency shows white; EXIF orientation is applied.

    Returns:
      The encoded record, a JPEG, or a PNG up to 64 pixels a side; and its pixels before encoding.

    Raises:
      Unreadable: with the reason.
    """
    if not data:
        raise Unreadable("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise Unreadable(f"it declares {image.width}×{image.height} pixels, above the limit of {max_pixels:,}")
            ready = image.format == "JPEG" and image.mode == "RGB" and image.size == (size, size)
            upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            progressive = "progressive" in image.info  # slow to decode, and a crop of it saves nothing
            if ready and upright and not progressive and size > LOSSLESS_UP_TO:
                return data, np.asarray(image)  # encoding it again would only lose detail
            # Lets libjpeg skip detail of large photographs, down to twice the size wanted.
            scale = 2 * size / min(image.size)
            image.draft("RGB", (int(image.width * scale), int(image.height * scale)))
            image.load()
            image = _rgb(ImageOps.exif_transpose(image))
    except Unreadable:
        raise
    except Image.UnidentifiedImageError:
        raise Unreadable(f"not an image in a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise anything on damaged files
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from None
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    file = io.BytesIO()
    if size > LOSSLESS_UP_TO:
        # Colour at half resolution, as nearly all photographs come: it decodes faster than full colour.
        image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    else:
        image.save(file, "PNG")
    return file.getvalue(), np.asarray(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 bits or more, where Pillow's own conversion clips instead of scaling
        pixels = np.asarray(image, np.float64)
        # Of 32-bit modes only the values tell their range; a dark 16-bit image is dark.
        top = 65535 if image.mode.startswith("I;16") or pixels.max(initial=0) > 255 else 255
        image = Image.fromarray(np.clip(pixels * (255 / top), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclasses.dataclass
class Statistics:
    """The mean image and the RGB covariance of a training split, summed exactly.

    Attributes:
      count: images so far.
      image_sum: (S, S, 3) sums of pixels.
      outer_sum: (3, 3) sums over all pixels of the outer product of RGB with itself.
    """

    count: int
    image_sum: np.ndarray
    outer_sum: np.ndarray

    @classmethod
    def empty(cls, size: int) -> "Statistics":
        """Before the first image."""
        return cls(0, np.zeros((size, size, 3), np.int64), np.zeros((3, 3), np.float64))

    def add(self, pixels: np.ndarray, outer: np.ndarray) -> None:
        """Counts one image and its `outer_product`."""
        self.count += 1
        self.image_sum += pixels
        self.outer_sum += outer

    def arrays(self) -> dict[str, np.ndarray]:
        """What statistics.npz stores; the components are rows, the largest first (paper, section 4.1)."""
        mean_image = self.image_sum / self.count
        mean = mean_image.mean((0, 1))
        covariance = self.outer_sum / (self.count * mean_image[..., 0].size) - np.outer(mean, mean)
        variances, vectors = np.linalg.eigh(covariance)
        return {
            "mean_image": mean_image.astype(np.float32),
            "principal_std": np.sqrt(np.maximum(variances[::-1], 0)).astype(np.float32),
            "principal_components": vectors.T[::-1].astype(np.float32),
        }


def outer_product(pixels: np.ndarray) -> np.ndarray:
    """The sum over pixels of RGB's outer product with itself: (H, W, 3) uint8 to (3, 3) float64."""
    rgb = pixels.reshape(-1, 3).astype(np.float64)
    return rgb.T @ rgb


def directory(data_dir: str | pathlib.Path, name: str, size: int) -> pathlib.Path:
    """Where the records of a set lie."""
    return pathlib.Path(data_dir) / "prepared" / f"{name}-{size}" / VERSION


@contextlib.contextmanager
def lock(data_dir: str | pathlib.Path, name: str) -> Iterator[None]:
    """Lets one process at a time prepare a set, in any size; the others wait.

    The system takes the lock from a process that dies.

    Raises:
      UserError: nothing can be written there.
    """
    path = pathlib.Path(data_dir) / "prepared" / f".{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"{path.parent} cannot take prepared records: {error.strerror}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another process prepares {name}; waiting for it.", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{path.parent} is on a file system without locks ({error.strerror}); prepare on a local disk, "
                f"and copy its prepared/ there."
            ) from None
        yield


def prepare(
    source: Source,
    *,
    name: str,
    data_dir: str | pathlib.Path,
    size: int = 256,
    train_split: str = "train",
    allow_unreadable: int = 0,
    max_pixels: int = 100_000_000,
) -> pathlib.Path:
    """Writes the records of a source, with a progress bar; returns their folder. Hold the `lock` of `name`.

    Args:
      name: the name of the prepared set.
      data_dir: the records go to data_dir/prepared/NAME-SIZE.
      size: pixels a side.
      train_split: the split over which the statistics are taken.
      allow_unreadable: how many files may be left out because they cannot be read.
      max_pixels: larger images are not decoded, and count as unreadable.

    Raises:
      UserError: more files than allowed are unreadable, or the folder cannot be written.
    """
    import tensorflow as tf
    import tensorflow_datasets as tfds

    final = directory(data_dir, name, size)
    partial = final.parent.with_name(f".{name}-{size}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted preparation
    statistics = Statistics.empty(size)
    unreadable = []

    def listed():
        return "".join(f"\n  {item['file']}: {item['reason']}" for item in unreadable)

    def examples(split, advance):
        written = 0
        results = _in_order(lambda file: _read(file, size, max_pixels), source.files(split))
        for number, (file, record, pixels, outer, reason) in enumerate(results):
            advance()
            if reason:
                unreadable.append({"file": printable(file.name), "reason": reason})
                continue
            if split == train_split:
                statistics.add(pixels, outer)
            written += 1
            yield number, {"image": io.BytesIO(record), "label": file.label, "file_name": os.fsencode(file.name)}
        if not written:
            raise UserError(f"No file of the split {split!r} can be read:{listed()}")

    encoding = "jpeg" if size > LOSSLESS_UP_TO else "png"
    try:
        partial.mkdir(parents=True)
        with progress(name, sum(source.counts.values())) as advance:
            builder = tfds.dataset_builders.AdhocBuilder(
                name="records",  # TFDS takes few characters in a name, folders have any
                version=VERSION,
                description=f"{source.origin} as {size}×{size} images.",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(size, size, 3), encoding_format=encoding),
                        "label": tfds.features.ClassLabel(names=list(source.class_names)),
                        "file_name": tfds.features.Text(),
                    }
                ),
                split_datasets={split: examples(split, advance) for split in source.counts},
                data_dir=partial,
                file_format="tfrecord",
            )
            builder.download_and_prepare()
        if len(unreadable) > allow_unreadable:
            raise UserError(
                f"{len(unreadable)} of {sum(source.counts.values())} files cannot be read, {allow_unreadable} are "
                f"allowed; remove them, or allow them with --allow_unreadable={len(unreadable)} "
                f"(--config.dataset.allow_unreadable in main.py):{listed()}"
            )
        if not statistics.count:
            raise UserError(f"{source.origin} has no split {train_split!r} to take the mean image from.")
        written = pathlib.Path(builder.data_path)
        np.savez(written / "statistics.npz", **statistics.arrays())
        summary = {
            "origin": source.origin,
            "size": size,
            "train_split": train_split,
            "examples": {split: info.num_examples for split, info in builder.info.splits.items()},
            "unreadable": unreadable,
        }
        (written / "prepared.json").write_text(json.dumps(summary, indent=2) + "\n")
        shutil.rmtree(final.parent, ignore_errors=True)
        written.parent.rename(final.parent)
    except (OSError, tf.errors.OpError) as error:
        raise UserError(f"{data_dir} cannot take the prepared records: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _read(file: File, size: int, max_pixels: int):
    """(file, record, pixels, outer product, reason); the reason says why there is no record."""
    try:
        record, pixels = to_record(file.read(), size, max_pixels)
    except Unreadable as error:
        return file, None, None, None, str(error)
    except OSError as error:
        return file, None, None, None, error.strerror or str(error)
    return file, record, pixels, outer_product(pixels), ""


def _in_order(function, items: Iterable) -> Iterator:
    """Maps in threads, for Pillow decodes outside the interpreter's lock; holds only a few results at a time."""
    workers = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        under_way = collections.deque()
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) > 4 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
