"""Images: any image file becomes a square RGB record."""

import contextlib
import io
import threading
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image

from datasets.progress import printable

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # Pillow knows more, and runs Ghostscript for some
LOSSLESS_UP_TO = 64  # pixels a side; JPEG would visibly change images as small as CIFAR's
JPEG_QUALITY = 95

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
    """An amount of bytes or pixels that threads share. A thread waits until what it asks for is free."""

    def __init__(self, total: int):
        self._total = self._left = total
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Holds `amount`, or the whole budget if that is less."""
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


def is_image(data: bytes) -> bool:
    """Whether the content of a file begins as an image does; nothing is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS):
            return True
    except Exception:  # Pillow raises anything on what is no image
        return False


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
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise Unreadable(f"it declares {image.width}×{image.height} pixels, above the limit of {max_pixels:,}")
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
        # 32-bit modes do not declare their range; their values must tell it.
        top = 65535 if image.mode.startswith("I;16") or pixels.max(initial=0) > 255 else 255
        grey = np.empty(pixels.shape, np.uint8)
        for part in range(0, len(pixels), 1 << 20):  # in one piece it would take 16 bytes a pixel
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
    """The central square, size×size and upright."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
