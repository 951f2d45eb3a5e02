"""Any image file becomes a sensible record, or is refused with a reason."""

import collections
import concurrent.futures
import io
import struct
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from datasets import images

LIMIT = 100_000_000


def record(image_or_bytes, size=64, **options):
    """Pixels of the record of an image or file; at 64 pixels records are lossless."""
    given = image_or_bytes
    file = given if isinstance(given, bytes) else data.encoded(given, **{"format": "PNG"} | options)
    encoded, pixels = images.to_record(file, size, LIMIT)
    with Image.open(io.BytesIO(encoded)) as image:
        assert (image.size, image.mode) == ((size, size), "RGB")
        if size <= images.LOSSLESS_UP_TO:
            np.testing.assert_array_equal(np.asarray(image), pixels)
        return np.asarray(image).astype(np.int64)


def reason(file, size=64, max_pixels=LIMIT):
    with pytest.raises(images.Unreadable) as error:
        images.to_record(file, size, max_pixels)
    return str(error.value)


def quarters(width=64, height=64):
    """Red, green / blue, white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = 255
    pixels[: height // 2, width // 2 :, 1] = 255
    pixels[height // 2 :, : width // 2, 2] = 255
    pixels[height // 2 :, width // 2 :] = 255
    return Image.fromarray(pixels)


def corners(pixels):
    return [tuple(pixels[y, x]) for y in (8, -8) for x in (8, -8)]


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


# What becomes a record.


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.sampled_from([8, 32, 64, 65, 80]))
def test_every_image_becomes_a_square_of_its_centre(width, height, size):
    pixels = record(Image.new("RGB", (width, height), (200, 100, 50)), size)
    np.testing.assert_allclose(pixels, np.broadcast_to((200, 100, 50), pixels.shape), atol=2)


def test_the_centre_of_the_longer_side_is_kept():
    wide = Image.new("RGB", (192, 64), "black")
    wide.paste(quarters(), (64, 0))
    np.testing.assert_array_equal(record(wide), np.asarray(quarters()))
    tall = Image.new("RGB", (64, 256), "black")
    tall.paste(quarters(), (0, 96))
    np.testing.assert_array_equal(record(tall), np.asarray(quarters()))


def test_scaling_down_averages():
    """A grid of single black and white pixels becomes grey, and does not alias."""
    grid = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = record(Image.fromarray(grid))[4:-4, 4:-4]
    assert abs(pixels - 127.5).max() <= 3


def test_a_small_png_is_stored_without_loss():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    np.testing.assert_array_equal(record(Image.fromarray(noise), 32), noise)


def test_a_jpeg_of_the_right_size_passes_byte_for_byte():
    file = data.encoded(data.picture("a", 0, 256), quality=70)
    assert images.to_record(file, 256, LIMIT)[0] == file
    assert images.to_record(data.encoded(data.picture("a", 0, (256, 257))), 256, LIMIT)[0] != file
    encoded, pixels = images.to_record(file + bytes(1 << 20), 256, LIMIT)
    assert len(encoded) < len(file) + 50_000, "a megabyte that is no image was kept"
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(file))))


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, [RED, GREEN, BLUE, WHITE]),
        (2, [GREEN, RED, WHITE, BLUE]),
        (3, [WHITE, BLUE, GREEN, RED]),
        (6, [BLUE, RED, WHITE, GREEN]),
        (8, [GREEN, WHITE, RED, BLUE]),
    ],
)
def test_exif_orientation_is_applied_also_to_images_of_the_right_size(orientation, expected, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = record(quarters(size, size), size, format="JPEG", exif=exif.tobytes())
    np.testing.assert_allclose(corners(pixels), expected, atol=12)


def test_greyscale_16_bits_palettes_and_transparency_become_rgb():
    ramp = np.linspace(0, 1, 64)[None].repeat(64, 0)
    expected = np.round(ramp * 255)[..., None]
    grey = Image.fromarray((ramp * 255).round().astype(np.uint8))
    np.testing.assert_array_equal(record(grey), expected.repeat(3, -1))
    deep = Image.fromarray((ramp * 65535).round().astype(np.uint16))
    np.testing.assert_allclose(record(deep), expected.repeat(3, -1), atol=1)
    assert set(record(grey.convert("1")).flat) == {0, 255}

    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 32, 64))
    clear.paste((0, 0, 0, 128), (32, 32, 64, 64))
    np.testing.assert_allclose(corners(record(clear)), [BLUE, WHITE, BLUE, (127,) * 3], atol=1)

    palette = quarters().convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(corners(record(palette)), [RED, GREEN, BLUE, WHITE])
    red = palette.getpixel((0, 0))
    np.testing.assert_array_equal(corners(record(palette, transparency=red)), [WHITE, GREEN, BLUE, WHITE])
    by_entry = bytes(0 if i == red else 255 for i in range(256))
    np.testing.assert_array_equal(corners(record(palette, transparency=by_entry)), [WHITE, GREEN, BLUE, WHITE])


def test_cmyk_jpegs_have_their_colours():
    pixels = record(quarters().convert("CMYK"), format="JPEG")
    np.testing.assert_allclose(corners(pixels), [RED, GREEN, BLUE, WHITE], atol=12)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    pixels = record(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels[0, 0], RED)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_slivers_become_records(size, format):
    pixels = record(Image.new("RGB", size, (90, 90, 90)), 256, format=format)
    np.testing.assert_allclose(pixels, 90, atol=2)


# What does not.


def png_header(width, height):
    """A PNG that declares a size and has no pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    framed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_damaged_files_are_named_with_their_reason():
    assert reason(b"") == "the file is empty"
    assert "not an image" in reason(b"Once upon a time" * 100)
    jpeg = data.encoded(data.picture("a", 0, 200))
    assert "truncated" in reason(jpeg[: len(jpeg) // 2])
    assert "truncated" in reason(data.encoded(data.picture("a", 0, 64))[:-300], 64)
    square = data.encoded(data.picture("a", 0, 256))
    assert "truncated" in reason(square[: len(square) // 2], 256), "passed through though cut short"
    reason(jpeg[:3])
    reason(data.encoded(quarters(), "PNG")[:-80])
    # Pillow would hand PostScript to Ghostscript.
    assert "not an image" in reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")


RAMP = np.linspace(0, 1, 64)[None].repeat(64, 0)


def tiff(values, dtype):
    return data.encoded(Image.fromarray(values.astype(dtype)), "TIFF")


def signed(values):
    """A TIFF of int16, which Pillow does not write."""
    height, width = values.shape
    tags = (256, width), (257, height), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)
    tags = *tags, (279, 2 * width * height), (339, 2)
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    pixels = values.astype("<i2").tobytes()
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + directory + bytes(4)


@pytest.mark.parametrize(
    ("file", "top"),
    [(tiff(RAMP * top, np.float32), top) for top in (1, 255, 65535)]
    + [(tiff(RAMP * 1.0002 - 0.0001, np.float32), 1)]
    + [(tiff(RAMP * top, np.int32), top) for top in (255, 65535)]
    + [(signed(RAMP * 32767), 32767)],
    ids=["fractions", "float bytes", "float words", "overshoot", "bytes", "words", "int16"],
)
def test_the_values_of_images_without_a_range_tell_it(file, top):
    expected = RAMP * (255 / 2 if top == 32767 else 255)
    np.testing.assert_allclose(record(file), expected[..., None].repeat(3, -1), atol=1.01)


@pytest.mark.parametrize(
    ("file", "reach"),
    [
        (tiff(RAMP * 2e9, np.int32), "from 0 to 2e+09"),
        (tiff(RAMP * 200 - 100, np.int32), "from -100 to 100"),
        (tiff(RAMP * 80000, np.float32), "from 0 to 80000"),
        (tiff(RAMP - 0.5, np.float32), "from -0.5 to 0.5"),
        (tiff(np.where(RAMP < 1, RAMP, np.nan), np.float32), "from nan to nan"),
        (tiff(np.where(RAMP < 1, RAMP, np.inf), np.float32), "from 0 to inf"),
        (signed(RAMP * 200 - 100), "from -100 to 100"),
    ],
)
def test_values_that_tell_no_range_are_refused(file, reach):
    assert reason(file) == (
        f"its values reach {reach}; images of 32 bits a pixel are taken with values of 0–1 (fractions), 0–255 or "
        f"0–65535"
    )


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    quality=st.integers(5, 100),
    restart=st.integers(0, 4),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    after=st.sampled_from([b"", b"garbage", b"\xff\xd9" * 9]),
)
def test_a_complete_jpeg_keeps_its_pixels(size, subsampling, quality, restart, mode, after):
    """Pillow alone, with the whole file, is the reference."""
    image = data.picture("a", 0, size).convert(mode)
    file = data.encoded(
        image, quality=quality, subsampling=subsampling, restart_marker_blocks=restart, optimize=quality % 2 > 0
    )
    expected = images._square(Image.open(io.BytesIO(file)).convert("RGB"), 1, 64)
    np.testing.assert_array_equal(record(file + after), np.asarray(expected))


@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 2}, {"subsampling": "4:4:4"}])
def test_a_jpeg_whose_data_end_early_is_refused_though_it_has_an_end(options):
    file, end = data.encoded(data.picture("a", 0, (160, 120)), **options), b"\xff\xd9"
    for height in (130, 240, 9000):
        assert "truncated" in reason(data.declare(file, height=height))
    for cut in (200, 1000, len(file) // 2):
        assert "truncated" in reason(file[:-cut] + end)
        assert "truncated" in reason(file[:-cut])
    assert "declares 9000×9000 pixels, and its data end long before" in reason(
        data.declare(file, width=9000, height=9000)
    )


def test_a_progressive_jpeg_that_declares_far_too_much_is_refused():
    file = data.encoded(data.picture("a", 0, (160, 120)), progressive=True)
    record(file)
    assert "data end long before" in reason(data.declare(file, width=9000, height=9000))
    # The flattest image there can be, in the fewest bytes.
    flat = data.encoded(Image.new("L", (4096, 4096), 128), progressive=True, optimize=True, quality=1)
    np.testing.assert_array_equal(record(flat), 128)


def test_an_image_above_the_limit_is_refused_undecoded():
    assert "60000×60000" in reason(png_header(60_000, 60_000))
    file = data.encoded(Image.new("RGB", (40, 50)), "PNG")
    images.to_record(file, 64, 2000)
    assert "limit of 1,999" in reason(file, 64, 1999)


@settings(max_examples=200, deadline=None)
@given(
    cut=st.integers(0, 3000),
    at=st.integers(0, 3000),
    noise=st.binary(max_size=20),
    format=st.sampled_from(images.FORMATS),
)
def test_any_damage_gives_a_record_or_a_reason(cut, at, noise, format):
    file = data.encoded(data.picture("a", 0, 48), format)
    file = file[:at] + noise + file[at + len(noise) : max(len(file) - cut, 0)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as while a set is prepared
        try:
            encoded, pixels = images.to_record(file, 48, 1_000_000)
        except images.Unreadable as error:
            assert str(error).isprintable()
            assert str(error)
        else:
            assert pixels.shape == (48, 48, 3)
            assert encoded


def test_a_budget_is_never_exceeded_and_lets_everybody_through():
    budget, held, most = images.Budget(10), collections.Counter(), []

    def take(amount):
        with budget.hold(amount):
            held[threading.get_ident()] = min(amount, 10)
            most.append(sum(held.values()))
            time.sleep(0.002)
            held[threading.get_ident()] = 0

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(take, [1, 9, 3, 12, 2, 5, 10, 4] * 8))
    assert 5 < max(most) <= 10
    with pytest.raises(ValueError, match="given back"), budget.hold(7):
        raise ValueError("given back")
    with budget.hold(10):
        pass
