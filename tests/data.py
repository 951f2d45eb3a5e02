"""Small data sets on disk for tests: a folder of photographs, hostile files, and ImageNet's archives in miniature."""

import importlib.util
import io
import os
import pathlib
import re
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from datasets import prepared, preparing

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


def prepare_folder(path: pathlib.Path, train: int, test: int, size: int) -> prepared.Records:
    """Prepares a folder of three classes, path/photos, in path/data, and opens it."""
    make_folder(path / "photos", {"train": train, "test": test}, classes=("a", "b", "c"), size=(100, 90))
    return prepared.Records.open(preparing.prepare(str(path / "photos"), data_dir=str(path / "data"), size=size))


def stored(records: prepared.Records, split: str) -> dict[str, tuple[bytes, int]]:
    """The examples of a split as TFDS reads them, in the order of storage: file name → (encoded image, label)."""
    import tensorflow_datasets as tfds

    examples = tfds.builder_from_directory(records.directory).as_dataset(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    return {os.fsdecode(e["file_name"]): (e["image"], int(e["label"])) for e in examples.as_numpy_iterator()}


def decoded(file: bytes) -> np.ndarray:
    """The pixels of an image file, as Pillow reads them."""
    return np.asarray(Image.open(io.BytesIO(file)))


def make_miniature_imagenet(
    manual_dir: pathlib.Path, per_class: int = 1, validation: int = 10, size: int | tuple[int, int] = (48, 40)
) -> dict[str, dict[str, str]]:
    """Writes the archives of `imagenet2012` with their true structure and names, but few and small images.

    The training archive has one archive of `per_class` images for each of the 1,000 classes, and the validation archive
    the first `validation` images of the true one.

    Returns:
      The synset of every file, by split: {'train': {'n01440764_0.JPEG': 'n01440764', …}, 'validation': …}.
    """
    manual_dir.mkdir(parents=True, exist_ok=True)
    synsets = {"train": {}, "validation": {}}
    with tarfile.open(manual_dir / "ILSVRC2012_img_train.tar", "w") as archive:
        for synset in (LABELS / "labels.txt").read_text().split():
            images = {f"{synset}_{i}.JPEG": encoded(picture(synset, i, size)) for i in range(per_class)}
            synsets["train"] |= dict.fromkeys(images, synset)
            add(archive, f"{synset}.tar", tar_of(images))
    labels = (LABELS / "validation_labels.txt").read_text().split()[:validation]
    with tarfile.open(manual_dir / "ILSVRC2012_img_val.tar", "w") as archive:
        for i, synset in enumerate(labels):
            name = f"ILSVRC2012_val_{i + 1:08d}.JPEG"
            add(archive, name, encoded(picture(synset, 1_000_000 + i, size)))
            synsets["validation"][name] = synset
    return synsets


def tar_of(members: Mapping[str, bytes]) -> bytes:
    """A tar archive of files by name."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            add(archive, name, content)
    return file.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file to an archive, under any name."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


# Usable and unusable files.

LEFT, RIGHT = (200, 60, 40), (40, 80, 190)  # the halves of most of them
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def halves(left=LEFT, right=RIGHT, mode: str = "RGB", size: tuple[int, int] = (60, 60)) -> Image.Image:
    """An image of two colours, side by side."""
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def png(width: int, height: int, depth: int, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG made by hand of a header and these chunks."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)), *chunks, (b"IEND", b"")
    framed = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def jpeg_markers(file: bytes) -> list[int]:
    """Where the markers of a JPEG are, from the first after SOI to EOI, without those within entropy-coded data."""
    found, at = [], 2
    while True:
        found.append(at)
        kind = file[at + 1]
        if kind == 0xD9:  # EOI
            return found
        at += 2 + int.from_bytes(file[at + 2 : at + 4], "big")
        if kind == 0xDA:  # SOS: entropy-coded data follow
            at = re.compile(rb"\xff[^\x00\xd0-\xd7]").search(file, at).start()


def declare(jpeg: bytes, **fields: int) -> bytes:
    """A JPEG whose frame header is changed: `marker`, `precision`, `height`, `width`."""
    (at,) = (at for at in jpeg_markers(jpeg) if jpeg[at + 1] in (0xC0, 0xC2))
    names = "marker", "length", "precision", "height", "width"
    header = dict(zip(names, struct.unpack_from(">BHBHH", jpeg, at + 1), strict=True))
    return jpeg[: at + 1] + struct.pack(">BHBHH", *(header | fields).values()) + jpeg[at + 9 :]


def gif(screen: int, frame: int) -> bytes:
    """A GIF that declares a square screen and a square frame, and has next to no pixels."""
    header = b"GIF89a" + struct.pack("<HH", screen, screen) + b"\x80\0\0" + bytes(6)
    return header + b"," + struct.pack("<HHHH", 0, 0, frame, frame) + b"\0" + b"\x02\x02\x4c\x01\0;"


def tiff(width: int, height: int) -> bytes:
    """A greyscale TIFF whose only strip is missing."""
    tags = (
        (256, width),
        (257, height),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, height),
        (279, width * height),
    )
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value & 0xFFFFFFFF) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + directory + bytes(4)


def make_hostile(home: pathlib.Path, outside: pathlib.Path) -> tuple[dict[str, tuple], dict[str, str]]:
    """Writes files of all kinds into the folder `home`, and the targets of some links into `outside`.

    Returns:
      The usable images: name → the mean colours of the left and the right half of what they were made from.
      The other files: name → part of the reason.
    """
    rgb, (width, height) = halves(), (60, 60)
    jpeg, progressive = encoded(rgb), encoded(rgb, progressive=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    sideways = rgb.transpose(Image.Transpose.ROTATE_90)  # as a camera held upright stores it
    grey = (100,) * 3, (81,) * 3  # 0.299 R + 0.587 G + 0.114 B
    deep = np.full((height, width), 40 * 257, np.uint16)
    deep[:, : width // 2] = 200 * 257
    deep_grey = (200,) * 3, (40,) * 3
    deep_rgb = b"".join(
        b"\0" + struct.pack(">90H", *[257 * c for c in LEFT] * 30) + struct.pack(">90H", *[257 * c for c in RIGHT] * 30)
        for _ in range(height)
    )
    clear = halves(LEFT + (0,), RIGHT + (255,), "RGBA")
    palette = rgb.quantize(4)
    others = dict(save_all=True, append_images=[Image.new("RGB", (60, 60), "green")] * 2)
    large = 9000
    good = {
        "cmyk.JPEG": encoded(rgb.convert("CMYK")),
        "png.JPEG": encoded(rgb, "PNG"),
        "gif.jpe": encoded(rgb, "GIF"),
        "jpeg.png": jpeg,
        "progressive.jpg": progressive,
        "bmp.BMP": encoded(rgb, "BMP"),
        "ppm.ppm": encoded(rgb, "PPM"),
        "webp.webp": encoded(rgb, "WEBP", lossless=True),
        "tiff.tif": encoded(rgb, "TIFF"),
        "tiff_cmyk.tif": encoded(rgb.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        "tiff_ycbcr.tif": encoded(rgb.convert("YCbCr"), "TIFF", compression="jpeg"),
        "tiff_pages.tiff": encoded(rgb, "TIFF", **others),
        "mpo.jpg": encoded(rgb, "MPO", **others),
        "animated.gif": encoded(rgb, "GIF", **others),
        "animated.webp": encoded(rgb, "WEBP", lossless=True, **others),
        "animated.png": encoded(rgb, "PNG", **others),
        "palette.png": encoded(palette, "PNG"),
        "deep_rgb.png": png(60, 60, 16, 2, (b"IDAT", zlib.compress(deep_rgb))),
        "rotated.jpg": encoded(sideways, exif=turned),
        "rotated.tif": encoded(sideways, "TIFF", exif=turned),
        "rotated.webp": encoded(sideways, "WEBP", lossless=True, exif=turned),
        "exif_garbage.jpg": encoded(rgb, exif=b"Exif\0\0garbage" * 40),
        "exif_garbage.png": encoded(rgb, "PNG", exif=b"Exif\0\0garbage"),
        "exif_garbage.webp": encoded(rgb, "WEBP", lossless=True, exif=b"Exif\0\0garbage"),
        "exif_endless.jpg": encoded(rgb, exif=b"Exif\0\0II*\0\x08\0\0\0\x00\x00\x08\0\0\0"),
        "icc_garbage.jpg": encoded(rgb, icc_profile=b"garbage" * 1000),
        "icc_garbage.png": encoded(rgb, "PNG", icc_profile=b"garbage" * 1000),
        "trailing.jpg": jpeg + b"garbage" * 1000,
        " two\nlines .jpg": jpeg,
        "a space.jpg": jpeg,
        "--flag=x.jpg": jpeg,
        "right\u202eleft.jpg": jpeg,
        os.fsdecode(b"caf\xe9.jpg"): jpeg,
    }
    good = {name: (file, (LEFT, RIGHT)) for name, file in good.items()} | {
        "grey.jpg": (encoded(rgb.convert("L")), grey),
        "la.png": (encoded(rgb.convert("LA"), "PNG"), grey),
        "deep.png": (encoded(Image.fromarray(deep), "PNG"), deep_grey),
        "deep.tif": (encoded(Image.fromarray(deep.astype(np.int32)), "TIFF"), deep_grey),
        "deep.pgm": (b"P5 60 60 65535\n" + deep.astype(">u2").tobytes(), deep_grey),
        "dark.pgm": (b"P5 60 60 65535\n" + (deep // 257).astype(">u2").tobytes(), (0, 0)),
        "float.tif": (encoded(Image.fromarray(deep.astype(np.float32) / 257), "TIFF"), deep_grey),
        "alpha.png": (encoded(clear, "PNG"), (WHITE, RIGHT)),
        "alpha.webp": (encoded(clear, "WEBP", lossless=True), (WHITE, RIGHT)),
        "palette_clear.png": (encoded(palette, "PNG", transparency=palette.getpixel((0, 0))), (WHITE, RIGHT)),
        "bilevel.png": (encoded(halves(1, 0, "1"), "PNG"), (WHITE, BLACK)),
        "bilevel.tif": (encoded(halves(1, 0, "1"), "TIFF", compression="group4"), (WHITE, BLACK)),
        "one.png": (encoded(Image.new("RGB", (1, 1), LEFT), "PNG"), (LEFT, LEFT)),
        "one.jpg": (encoded(Image.new("RGB", (1, 1), LEFT)), (LEFT, LEFT)),
        "tall.png": (encoded(Image.new("RGB", (1, 20_000), LEFT), "PNG"), (LEFT, LEFT)),
        "wide.jpg": (encoded(Image.new("RGB", (20_000, 1), LEFT)), (LEFT, LEFT)),
        # 81 million pixels, which the limit allows, in files of 10 and 240 kB
        "large.png": (encoded(halves(1, 0, "1", (large, large)), "PNG"), (WHITE, BLACK)),
        "large_rgb.png": (
            png(large, large, 8, 2, (b"IDAT", zlib.compress((b"\0" + bytes(LEFT) * large) * large, 1))),
            (LEFT, LEFT),
        ),
        # ten rows are declared, and 64 MiB come out of the file
        "inflates.png": (png(10, 10, 8, 2, (b"IDAT", zlib.compress(bytes(1 << 26), 1))), (BLACK, BLACK)),
    }
    for name, (file, _) in good.items():
        (home / name).write_bytes(file)
    good = {name: colours for name, (_, colours) in good.items()}
    (outside / "photo").write_bytes(jpeg)
    (home / "link.jpg").symlink_to(outside / "photo")
    (home / "padded.jpg").write_bytes(jpeg)
    os.truncate(home / "padded.jpg", 100 << 20)
    good |= dict.fromkeys(("link.jpg", "padded.jpg"), (LEFT, RIGHT))

    huge = "declares 60000×60000 pixels"
    bad = {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"this is no image", "not an image"),
        "html.jpg": (b"<!DOCTYPE html><title>404 Not Found</title>", "not an image"),
        "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg' width='1' height='1'/>", "not an image"),
        "eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
        "heic.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "not an image"),
        "archive.jpg": (b"PK\x03\x04" + bytes(100), "not an image"),
        os.fsdecode(b"bad\xff\n.jpg"): (b"x", "not an image"),
        "huge.jpg": (declare(jpeg, width=60_000, height=60_000), huge),
        "huge_progressive.jpg": (declare(progressive, width=60_000, height=60_000), huge),
        "huge.png": (png(60_000, 60_000, 8, 2, (b"IDAT", b"")), huge),
        "huge.gif": (gif(60_000, 60_000), huge),
        "huge_frame.gif": (gif(1, 60_000), huge),
        "huge.bmp": (
            struct.pack("<2sIHHI IiiHHIIiiII", b"BM", 99, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
            huge,
        ),
        "huge.ppm": (b"P6 60000 60000 255\n", huge),
        "huge.tif": (tiff(60_000, 60_000), huge),
        "huge.webp": (b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (59_999).to_bytes(3, "little") * 2, ""),
        # libjpeg makes the rows that are missing grey without a word
        "taller.jpg": (declare(jpeg, height=6000), "truncated"),
        "taller_progressive.jpg": (declare(progressive, height=9000, width=9000), "data end long before"),
        "no_width.jpg": (declare(jpeg, width=0), ""),
        "no_height.jpg": (declare(jpeg, height=0), ""),
        "twelve_bits.jpg": (declare(jpeg, precision=12), ""),
        "lossless.jpg": (declare(jpeg, marker=0xC3), ""),
        "no_strip.tif": (tiff(60, 60)[:-60], ""),
        "no_pixels.png": (png(60, 60, 8, 2), ""),
        "checksum.png": (encoded(rgb, "PNG").replace(b"IDAT", b"IDAt"), ""),
        "cut.png": (encoded(picture("a", 0, 60), "PNG")[:-1000], "truncated"),
        "cut.gif": (encoded(picture("a", 0, 60), "GIF")[:-1000], "truncated"),
        "cut.webp": (encoded(picture("a", 0, 60), "WEBP")[:-100], ""),
        "cut.tif": (encoded(picture("a", 0, 60), "TIFF", compression="tiff_lzw")[:2000], ""),
        "cut.bmp": (encoded(rgb, "BMP")[:-1000], "truncated"),
        "cut.ppm": (encoded(rgb, "PPM")[:-1000], "truncated"),
        "text_bomb.png": (png(60, 60, 8, 2, (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26), 1))), "too large"),
    }
    for kind, file in ("baseline", jpeg), ("progressive", progressive):
        for number, at in enumerate(jpeg_markers(file)):
            bad |= {f"{kind}_{number}_{cut}.jpg": (file[: at + cut], "") for cut in (0, 3) if at + cut < len(file)}
    for name, (file, _) in bad.items():
        (home / name).write_bytes(file)
    bad = {name: reason for name, (_, reason) in bad.items()}

    (outside / "folder").mkdir()
    (home / "sparse.jpg").touch()
    os.truncate(home / "sparse.jpg", 10 << 30)
    (home / "folder.jpg").mkdir()
    for name, target in (
        ("dangling", "nowhere"),
        ("loop", "loop.jpg"),
        ("device", "/dev/zero"),
        ("linked", outside / "folder"),
    ):
        (home / f"{name}.jpg").symlink_to(target)
    os.mkfifo(home / "pipe.jpg")
    bad |= {
        "sparse.jpg": "10,737,418,240 bytes",
        "folder.jpg": "regular file",
        "linked.jpg": "regular file",
        "device.jpg": "regular file",
        "pipe.jpg": "regular file",
        "dangling.jpg": "No such file",
        "loop.jpg": "symbolic link",
    }
    (home / "secret.jpg").write_bytes(jpeg)
    (home / "secret.jpg").chmod(0)
    if os.access(home / "secret.jpg", os.R_OK):  # as root may
        good["secret.jpg"] = (LEFT, RIGHT)
    else:
        bad["secret.jpg"] = "Permission denied"
    return good, bad
