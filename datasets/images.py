"""Images: any image file becomes a square RGB record."""

import contextlib
import io
import multiprocessing.dummy
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from datasets.progress import printable

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # Pillow knows more, and runs Ghostscript for some
LOSSLESS_UP_TO = 64  # pixels a side; JPEG would visibly change images as small as CIFAR's
JPEG_QUALITY = 95

MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a JPEG; within a scan there are only 00 and D0 … D7
LOOK_AHEAD = 16  # bytes; libjpeg fills a register of 8

# `to_record` checks sizes before decoding, against a limit that is a config field.
Image.MAX_IMAGE_PIXELS = None
# The C library would keep some of Pillow's usual 16 MiB blocks for every thread after they are freed; it keeps none
# above 32 MiB.
Image.core.set_block_size(1 << 26)

# How to undo each EXIF orientation.
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
    """No usable image is in the file; the message says why."""


class Budget:
    """An amount of bytes or pixels that threads share. A thread waits until what it asks for is free.

    `context` is `multiprocessing.dummy` for the threads of one process, or a context of `multiprocessing` for those of
    all processes that inherit the budget.
    """

    def __init__(self, total: int, context: Any = multiprocessing.dummy):
        self._total = min(total, 1 << 62)  # processes share 64 bits, and more would wrap without a word
        self._left = context.Value("q", self._total)
        self._changed = context.Condition()

    @contextlib.contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Holds `amount`, or the whole budget if that is less."""
        amount = min(amount, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._left.value >= amount)
            self._left.value -= amount
        try:
            yield
        finally:
            with self._changed:
                self._left.value += amount
                self._changed.notify_all()


def is_image(data: bytes) -> bool:
    """Whether the content of a file begins as an image does; nothing is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS):
            return True
    except Exception:  # Pillow raises anything on what is no image
        return False


def _open_ended(data: bytes) -> bytes:
    """A JPEG of one scan without its end marker; other files as they are.

    At that marker libjpeg makes all pixels grey that are still to come. Without it, and with a few bytes to look ahead
    at, a complete scan gives the same pixels. In one that lacks more than a few blocks, Pillow misses data. The scans
    of a progressive JPEG need the marker; `to_square` relies on it that each block of 8×8 pixels takes a bit or more.
    """
    at, components = 2, 0
    while data[:2] == b"\xff\xd8" and data[at : at + 1] == b"\xff" and len(data) > at + 9:
        kind, after = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if kind in (0xC0, 0xC1):  # the frame of a sequential JPEG
            components = data[at + 9]
        if kind == 0xDA:  # a scan
            marker = MARKER.search(data, after)
            whole = data[at + 4] == components and marker and marker.group().endswith(b"\xd9")
            # A marker may begin with further bytes FF. With a + for them the search would take 18 times as long.
            return data[: marker.start()].rstrip(b"\xff") + bytes(LOOK_AHEAD) if whole else data
        at = after
    return data


def square_of(image: Image.Image, size: int) -> Image.Image:
    """Makes a size×size RGB image of any Pillow image (paper, section 2).

    One resampling scales the shorter side to `size` and takes the central square. Pillow's bicubic filter averages over
    as many pixels as it skips. Everything becomes RGB: greyscale, CMYK, palettes, 16 bits, and the first frame of an
    animation. Transparency shows white, and EXIF orientation is applied.
    """
    return _square(_rgb(image), _orientation(image), size)


def to_square(data: bytes, size: int, max_pixels: int, decoding: Budget | None = None) -> tuple[Image.Image, bool]:
    """Makes a size×size RGB image of any image file, see `square_of`.

    Args:
      data: the content of the file.
      size: pixels a side.
      max_pixels: larger images are refused before they are decoded.
      decoding: the pixels that all threads together may decode at once; each takes about 16 bytes of memory.

    Returns:
      The image, and whether the file can be its record as it is.

    Raises:
      Unreadable: the file has no image, a damaged one, or one with too many pixels.
    """
    if not data:
        raise Unreadable("the file is empty")
    try:
        with Image.open(io.BytesIO(_open_ended(data)), formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise Unreadable(f"it declares {image.width}×{image.height} pixels, above the limit of {max_pixels:,}")
            if image.format in ("JPEG", "MPO") and 8 * len(data) < pixels // 64:
                raise Unreadable(f"it declares {image.width}×{image.height} pixels, and its data end long before")
            progressive = "progressive" in image.info  # slow to decode; not even a crop is cheaper
            ready = image.format == "JPEG" and image.mode == "RGB" and image.size == (size, size) and not progressive
            # Encoding again would only lose detail, unless most of the file is something else.
            ready = ready and size > LOSSLESS_UP_TO and len(data) <= 3 * size**2 and _orientation(image) == 1
            if not ready:
                # libjpeg may skip detail of large photographs, down to twice the size of the record.
                scale = 2 * size / min(image.size)
                image.draft("RGB", (int(image.width * scale), int(image.height * scale)))
            # libjpeg holds all coefficients of a progressive JPEG, even if it skips detail.
            pixels = pixels if progressive else image.width * image.height
            with decoding.hold(pixels) if decoding else contextlib.nullcontext():
                image.load()
                return image if ready else square_of(image, size), ready
    except Image.UnidentifiedImageError:
        raise Unreadable(f"not an image in a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise anything on damaged files
        raise Unreadable(printable(" ".join(str(error).split())) or type(error).__name__) from None


def to_record(data: bytes, size: int, max_pixels: int, decoding: Budget | None = None) -> tuple[bytes, np.ndarray]:
    """Makes a record of any image file; for the arguments and errors see `to_square`.

    Returns:
      The record, encoded as PNG up to LOSSLESS_UP_TO pixels a side and as JPEG above.
      (size, size, 3) uint8: its pixels before encoding.
    """
    image, ready = to_square(data, size, max_pixels, decoding)
    if ready:
        return data, np.asarray(image)
    file = io.BytesIO()
    if size > LOSSLESS_UP_TO:
        # Nearly all photographs come with colour at half resolution, and it decodes faster.
        image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    else:
        image.save(file, "PNG")
    return file.getvalue(), np.asarray(image)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises anything on damaged EXIF; the pixels may be good
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 bits or more; Pillow's own conversion clips instead of scaling
        pixels = np.asarray(image).ravel()
        top = 65535 if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM") else _top(pixels)
        grey = np.empty(pixels.shape, np.uint8)
        for part in range(0, len(pixels), 1 << 20):  # in one piece it would take 16 bytes a pixel
            grey[part : part + (1 << 20)] = np.clip(pixels[part : part + (1 << 20)] * (255 / top), 0, 255)
        image = Image.fromarray(grey.reshape(image.height, image.width))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _top(pixels: np.ndarray) -> int:
    """What white is in an image of 32 bits a pixel: its type does not tell, so its values must."""
    low, high = pixels.min(), pixels.max()
    # Fractions may overshoot a little, as they do after a resampling.
    tops, over = ((1, 255, 65535), 0.1) if pixels.dtype.kind == "f" else ((255, 65535), 0)
    top = next((top for top in tops if high <= (1 + over) * top), None)
    if top is None or not low >= -over * top:  # or a value is not a number
        raise Unreadable(
            f"its values reach from {low:g} to {high:g}; images of 32 bits a pixel are taken with values of 0–1 "
            f"(fractions), 0–255 or 0–65535"
        )
    return top


def _square(image: Image.Image, orientation: int, size: int) -> Image.Image:
    """The central square, size×size and upright."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
