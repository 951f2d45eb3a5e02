"""The photographs that the benchmarks work on: an even sample of a folder, perhaps scaled."""

import collections
import concurrent.futures
import io
import pathlib
import shutil

import numpy as np
from PIL import Image

from common import host
from common.errors import UserError
from datasets import sources

JPEG_QUALITY = 92  # of scaled photographs


def sample(photographs: pathlib.Path, into: pathlib.Path, images: int, size: int) -> list[pathlib.Path]:
    """Copies photographs from all over the training split to `into`/train/CLASS, unless that is done already.

    Args:
      photographs: a folder ROOT with ROOT/train/CLASS/*.jpg.
      into: the folder of the copies.
      images: how many, or all if there are fewer.
      size: pixels of the longer side after scaling; 0 leaves the files as they are.

    Returns:
      The copies.

    Raises:
      UserError: there is no such folder, it is empty, or a file cannot be read.
    """
    if not into.exists():
        partial = into.with_name(f".{into.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # an interrupted run leaves one
        files = list(sources.open_source(str(photographs.absolute()), "").files("train"))
        chosen = np.linspace(0, len(files) - 1, min(images, len(files))).round().astype(int)

        def copy(number):
            file = files[number]
            to = partial / file.name
            try:
                to.parent.mkdir(parents=True, exist_ok=True)
                with file.open() as stream:
                    data = stream.read()
                to.write_bytes(_scaled(data, size) if size else data)
            except OSError as error:
                raise UserError(f"{file.name} of {photographs} cannot be copied to {into}: {error}.") from None

        with concurrent.futures.ThreadPoolExecutor(host.cores()) as pool:
            collections.deque(pool.map(copy, chosen.tolist()), maxlen=0)
        partial.rename(into)
    return sorted(path for path in into.rglob("*") if path.is_file())


def _scaled(data: bytes, size: int) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
    scale, file = size / max(rgb.size), io.BytesIO()
    rgb.resize([max(1, round(side * scale)) for side in rgb.size], Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=JPEG_QUALITY
    )
    return file.getvalue()


def measures(file: pathlib.Path) -> tuple[int, int]:
    """Pixels and bytes of a photograph."""
    with Image.open(file) as image:
        return image.width * image.height, file.stat().st_size
