"""Records: every source is turned, once, into square images of one size, in TFRecords that TFDS can load.

Beside the records of `DATA_DIR/prepared/NAME-SIZE/1.0.0` lie

    statistics.npz   mean_image (S, S, 3), principal_std (3,) and principal_components (3, 3) of the training split
    prepared.json    what was prepared, from where, which files were left out, and which images are in two splits

A folder of that name is complete: it gets its name when everything in it is written.
"""

import array
import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from datasets.progress import progress
from datasets.sources import File, Source, printable, tensorflow_datasets
from errors import UserError

VERSION = "1.0.0"
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # Pillow knows more, and runs Ghostscript for some
LOSSLESS_UP_TO = 64  # pixels a side; JPEG would visibly change images as small as CIFAR's
JPEG_QUALITY = 95

BYTES_PER_PIXEL = 8  # of the largest file: 16-bit RGBA, stored as it is
AHEAD = 1 << 28  # bytes of finished records that may wait for their turn
PAIRS_NAMED = 3  # of the images that two splits share

# Sizes are checked here, before anything is decoded, against a limit that is a config field.
Image.MAX_IMAGE_PIXELS = None
# Of Pillow's usual blocks, 16 MiB, the C library would keep some for every thread after they are freed; above 32 none.
Image.core.set_block_size(1 << 26)

# EXIF's orientations, as Image.Transpose undoes them.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unreadable(Exception):
    """A file that is no image that can be used; the message says why."""


class Budget:
    """An amount, of bytes or pixels, that threads share: one that asks for more than is left waits."""

    def __init__(self, total: int):
        self._total = self._left = total
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Holds `amount`, or all there is where it is more."""
        amount = min(amount, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= amount)
            self._left -= amount
        try:
            yield
        finally:
            with self._changed:
                self._left += amount
                self._changed.notify_all()


def to_record(data: bytes, size: int, max_pixels: int, decoding: Budget | None = None) -> tuple[bytes, np.ndarray]:
    """Makes a size×size RGB image of any image file (paper, section 2).

    The shorter side is scaled to `size` and the central square taken, in one resampling with Pillow's bicubic filter,
    which averages over as many pixels as it skips. Whatever Pillow reads becomes RGB: greyscale, CMYK, palettes, 16
    bits, animations (their first frame); transparency shows white; EXIF orientation is applied.

    Args:
      data: the file.
      size: pixels a side.
      max_pixels: larger images are refused before they are decoded.
      decoding: pixels that may be decoded at once; some 16 bytes of memory each.

    Returns:
      The encoded record, a JPEG, or a PNG up to 64 pixels a side; and its pixels before encoding.

    Raises:
      Unreadable: with the reason.
    """
    if not data:
        raise Unreadable("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise Unreadable(f"it declares {image.width}×{image.height} pixels, above the limit of {max_pixels:,}")
            progressive = "progressive" in image.info  # slow to decode, and a crop of it saves nothing
            ready = image.format == "JPEG" and image.mode == "RGB" and image.size == (size, size) and not progressive
            # Encoding it again would only lose detail, unless most of the file is no image.
            ready = ready and size > LOSSLESS_UP_TO and len(data) <= 3 * size**2 and _orientation(image) == 1
            if not ready:
                # Lets libjpeg skip detail of large photographs, down to twice the size wanted.
                scale = 2 * size / min(image.size)
                image.draft("RGB", (int(image.width * scale), int(image.height * scale)))
            # Of a progressive JPEG libjpeg holds all coefficients, whatever it skips.
            pixels = pixels if progressive else image.width * image.height
            with decoding.hold(pixels) if decoding else contextlib.nullcontext():
                image.load()
                if ready:
                    return data, np.asarray(image)
                image = _square(_rgb(image), _orientation(image), size)
    except Unreadable:
        raise
    except Image.UnidentifiedImageError:
        raise Unreadable(f"not an image in a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise anything on damaged files
        raise Unreadable(printable(" ".join(str(error).split())) or type(error).__name__) from None
    file = io.BytesIO()
    if size > LOSSLESS_UP_TO:
        # Colour at half resolution, as nearly all photographs come: it decodes faster than full colour.
        image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    else:
        image.save(file, "PNG")
    return file.getvalue(), np.asarray(image)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of damaged EXIF, which says nothing then; the pixels may be good
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 bits or more, where Pillow's own conversion clips instead of scaling
        pixels = np.asarray(image).ravel()
        # Of 32-bit modes only the values tell their range; a dark 16-bit image is dark.
        top = 65535 if image.mode.startswith("I;16") or pixels.max(initial=0) > 255 else 255
        grey = np.empty(pixels.shape, np.uint8)
        for part in range(0, len(pixels), 1 << 20):  # whole, it would take 8 bytes a pixel, twice
            scaled = pixels[part : part + (1 << 20)] * (255 / top)
            grey[part : part + (1 << 20)] = np.clip(np.nan_to_num(scaled), 0, 255)
        image = Image.fromarray(grey.reshape(image.height, image.width))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _square(image: Image.Image, orientation: int, size: int) -> Image.Image:
    """The central square, upright."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


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
        return cls(0, np.zeros((size, size, 3)), np.zeros((3, 3)))  # whole numbers up to 2^53

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
    """The sum over pixels of RGB's outer product with itself: (H, W, 3) uint8 to (3, 3) float64, without rounding."""
    # Sums of 256 such products, at most 256 · 255², are whole numbers that float32 still counts. Eight pixels side by
    # side make a product that is worth its call, and of its sums those of a pixel with itself are taken.
    values, sums = pixels.ravel(), np.zeros((24, 24))
    step = 512 * 256 * 24  # values; whole, a large image would take 200 MB
    for part in np.split(values, range(step, len(values), step)):
        together = np.zeros((-(-len(part) // (256 * 24)), 256, 24), np.float32)
        together.reshape(-1)[: len(part)] = part
        sums += (together.transpose(0, 2, 1) @ together).sum(0, dtype=np.float64)
    return np.einsum("aiaj->ij", sums.reshape(8, 3, 8, 3))


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
    while True:
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
            if not _is_at(file, path):  # who held it before has removed it, and the next may hold another
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()  # while it is held, so that nobody else's is removed
            return


def _is_at(file, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


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

    However many cores decode, files in memory take up to BYTES_PER_PIXEL · max_pixels bytes, decoding some
    16 · max_pixels, and finished records some AHEAD.

    Args:
      name: the name of the prepared set.
      data_dir: the records go to data_dir/prepared/NAME-SIZE.
      size: pixels a side.
      train_split: the split over which the statistics are taken.
      allow_unreadable: how many files may be left out because they cannot be read.
      max_pixels: larger images are not decoded, and count as unreadable.

    Raises:
      UserError: more files than allowed are unreadable, a label is none, or the folder cannot be written.
    """
    import tensorflow as tf

    tfds = tensorflow_datasets()
    final = directory(data_dir, name, size)
    partial = final.parent.with_name(f".{name}-{size}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted preparation
    statistics = Statistics.empty(size)
    unreadable = []
    hashes = {split: array.array("Q") for split in source.counts}  # of each file, 0 for one that cannot be read
    reading, decoding = Budget(BYTES_PER_PIXEL * max_pixels + (1 << 20)), Budget(max_pixels)
    read = functools.partial(_read, size=size, max_pixels=max_pixels, reading=reading, decoding=decoding)

    def listed():
        return "".join(f"\n  {item['file']}: {item['reason']}" for item in unreadable)

    def examples(split, advance):
        written = 0
        for number, result in enumerate(_in_order(read, source.files(split), ahead=AHEAD // (3 * size**2))):
            advance()
            file = result.file
            hashes[split].append(result.hash)
            if result.reason:
                unreadable.append({"file": printable(file.name), "reason": result.reason})
                continue
            if not 0 <= file.label < len(source.class_names):
                raise UserError(
                    f"{printable(file.name)} of {source.origin} has the label {file.label}; it should be one of "
                    f"0 … {len(source.class_names) - 1}."
                )
            if split == train_split:
                statistics.add(result.pixels, result.outer)
            written += 1
            yield (
                number,
                {
                    "image": io.BytesIO(result.record),
                    "label": file.label,
                    "file_name": os.fsencode(file.name),
                    "fingerprint": result.fingerprint,
                },
            )
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
                        "fingerprint": tfds.features.Scalar(np.int64),
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
        overlap, overlap_as = _overlap(source, hashes, train_split)
        summary = {
            "origin": source.origin,
            "size": size,
            "train_split": train_split,
            "examples": {split: info.num_examples for split, info in builder.info.splits.items()},
            "unreadable": unreadable,
            "overlap": overlap,
            "overlap_as": overlap_as,
        }
        (written / "prepared.json").write_text(json.dumps(summary, indent=2) + "\n")
        shutil.rmtree(final.parent, ignore_errors=True)
        written.parent.rename(final.parent)
    except (OSError, tf.errors.OpError) as error:
        raise UserError(f"{data_dir} cannot take the prepared records: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def fingerprint(label, record):
    """A hash of a record and its label, by which damage is seen: tensors, or an int and bytes, to an int64 tensor.

    TFRecords carry CRC-32C, which neither Python nor an operation of TensorFlow's computes; of this hash TensorFlow
    promises that it will never change.
    """
    import tensorflow as tf

    return tf.strings.to_hash_bucket_fast(tf.strings.join([tf.strings.as_string(label), ":", record]), 1 << 62)


class _Result(NamedTuple):
    """What became of a file: a record, its `fingerprint`, its pixels, their outer product and hash; or why not."""

    file: File
    record: bytes = b""
    fingerprint: int = 0
    pixels: np.ndarray | None = None
    outer: np.ndarray | None = None
    hash: int = 0
    reason: str = ""


def _read(file: File, size: int, max_pixels: int, reading: Budget, decoding: Budget) -> _Result:
    limit = BYTES_PER_PIXEL * max_pixels + (1 << 20)
    try:
        with file.open() as stream:
            length = stream.seek(0, os.SEEK_END)
            if length > limit:
                raise Unreadable(f"it has {length:,} bytes, more than an image of {max_pixels:,} pixels needs")
            with reading.hold(length):
                stream.seek(0)
                record, pixels = to_record(stream.read(length), size, max_pixels, decoding)
    except Unreadable as error:
        return _Result(file, reason=str(error))
    except OSError as error:
        return _Result(file, reason=error.strerror or str(error))
    digest = hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=8).digest()
    outer, mark = outer_product(pixels), int(fingerprint(file.label, record))
    return _Result(file, record, mark, pixels, outer, hash=int.from_bytes(digest, "little"))


def _in_order(function, items: Iterable, ahead: int) -> Iterator:
    """Maps in threads, for Pillow decodes outside the interpreter's lock; holds `ahead` results at most."""
    workers = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        under_way = collections.deque()
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) > min(4 * workers, ahead):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def _overlap(
    source: Source, hashes: Mapping[str, Sequence[int]], train_split: str
) -> tuple[dict[str, int], dict[str, list[list[str]]]]:
    """Which images of other splits are, pixel for pixel, also in the training split; splits that share none are absent.

    Returns:
      How many, {'test/train': 12}; and the names of a few, {'test/train': [['test/a/1.jpg', 'train/b/7.jpg'], …]}.
    """
    train = np.array(hashes[train_split], np.uint64)
    order = np.argsort(train, kind="stable")
    counts, pairs = {}, {}
    for split in sorted(hashes.keys() - {train_split}):
        others = np.array(hashes[split], np.uint64)
        shared = np.flatnonzero(np.isin(others, train) & (others != 0))
        if len(shared):
            # The pairs nearest to the start of the training split, for the source is listed again up to them.
            places = order[np.searchsorted(train, others[shared], sorter=order)]
            first = np.argsort(places, kind="stable")[:PAIRS_NAMED]
            names = _names(source, split, shared[first]), _names(source, train_split, places[first])
            counts[f"{split}/{train_split}"] = len(shared)
            pairs[f"{split}/{train_split}"] = [list(pair) for pair in zip(*names, strict=True)]
    return counts, pairs


def _names(source: Source, split: str, places: np.ndarray) -> list[str]:
    """The names of the files at these places of a split."""
    wanted, names = set(places.tolist()), {}
    for place, file in enumerate(source.files(split)):
        if place in wanted:
            names[place] = printable(file.name)
            if len(names) == len(wanted):
                break
    return [names[place] for place in places.tolist()]
