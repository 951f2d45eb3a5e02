"""Images a second of the input pipeline, raw libjpeg-turbo and a Pillow loader: `python -m benchmarks.input`.

    python -m benchmarks.input --photographs=ROOT                   # a folder ROOT/train/CLASS/*.jpg
    python -m benchmarks.input --photographs=ROOT --size=500        # scaled to ImageNet's usual size first

The candidates work on a sample of the same photographs, on all cores, in turn, round by round:

    records           training batches from prepared records: random crop, reflection, lighting
    raw               the limit: libjpeg-turbo alone, on the same windows of the same records
    to_record         photographs to encoded records: what `tools.prepare` does to each image
    prepare           all of `tools.prepare`, with its start and the writing of the files
    pil               photographs to training batches as PyTorch users load them, one process a core: Pillow, the
                      shorter side to 256, random crop, reflection, standardised floats

`from_photographs` follows from these: the cost of a view in the paper's 90 epochs if they begin with photographs. Each
image is prepared once, and read as a record in each epoch.

The streams of `records` and `pil` run before and after the measurement, so neither their start nor batches prepared
ahead count. Processor time is that of all threads and worker processes.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import multiprocessing
import os
import pathlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

import datasets.images
import input_pipeline
from benchmarks import measure
from benchmarks.photographs import measures, sample
from common import host
from common.errors import UserError, check_ranges
from common.exits import fail
from datasets import prepared, preparing

CORES = host.cores()
AHEAD = 4 + 2 * CORES  # batches; no loader here prepares more in advance
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what PyTorch users standardise with

Work = Callable[[], tuple[int, float, float]]


class Timed:
    """A candidate for `measure.interleaved` that notes processor time too.

    Args:
      work: does some work; returns the number of images, the seconds and the processor seconds.

    Attributes:
      cpu_seconds: processor seconds an image, by round.
    """

    def __init__(self, work: Work):
        self._work, self.cpu_seconds = work, []

    def __call__(self) -> float:
        """Seconds an image."""
        images, seconds, cpu_seconds = self._work()
        self.cpu_seconds.append(cpu_seconds / images)
        return seconds / images


def clock(images: int, function: Callable[[], Any]) -> tuple[int, float, float]:
    """Calls a function that handles `images` images; returns `images`, seconds and processor seconds.

    The latter are those of this process, and of processes that the function starts and waits for.
    """
    seconds, cpu_seconds = time.perf_counter(), measure.processor_seconds()
    function()
    return images, time.perf_counter() - seconds, measure.processor_seconds() - cpu_seconds


def records(opened: prepared.Records, config: Any, images: int) -> tuple[int, float, float]:
    """Draws training batches from prepared records; returns what `Timed` takes.

    Args:
      opened: the prepared set.
      config: a config; `input`, `dataset.train_split`, `batch_size` and `seed` of it count.
      images: a multiple of the batch size.
    """
    batches = input_pipeline.train_batches(
        opened,
        config.dataset.train_split,
        options=config.input,
        batch_size=config.batch_size,
        seed=config.seed,
        num_threads=config.input.threads or None,
    )
    _draw(batches, AHEAD)
    found = clock(images, lambda: _draw(batches, images // config.batch_size))
    batches.close()
    _settle()
    return found


def _draw(batches: Iterator, count: int) -> None:
    for _ in range(count):
        next(batches)


def _settle() -> None:
    """Waits until the threads of a closed stream are idle."""
    cpu_seconds = -1.0
    while time.process_time() > cpu_seconds + 0.01:
        cpu_seconds = time.process_time()
        time.sleep(0.1)


class Raw:
    """libjpeg-turbo on the windows that `records` is timed on, in as many threads as the pipeline has.

    Args:
      opened, config, images: as for `records`.

    Attributes:
      encoded: the JPEGs.
      windows: (images, 4) int32: top, left, height, width in pixels.
    """

    def __init__(self, opened: prepared.Records, config: Any, images: int):
        import tensorflow as tf

        index, places = opened.index(config.dataset.train_split), AHEAD * config.batch_size + np.arange(images)
        with index.reader() as reader:
            found = reader.read(input_pipeline.example_numbers(len(index), config.seed, places))
        examples = [tf.train.Example.FromString(data).features.feature for data in found]
        self.encoded = [example["image"].bytes_list.value[0] for example in examples]
        windows, *_ = input_pipeline.draw_views(opened, config.input, len(index), config.seed, places)
        self.windows = windows[:, [0, 1, 2, 2]]
        self._threads = config.input.threads or CORES
        # Several parts for each thread, so that all threads end at about the same time.
        parts = np.array_split(np.arange(images), min(images, 8 * self._threads))
        self._parts = [
            (tf.constant([self.encoded[i] for i in part]), tf.constant(self.windows[part])) for part in parts
        ]
        # A graph, because single operations called from Python take a fifth longer.
        self._graph = tf.function(self._decode_all, reduce_retracing=True, autograph=False)

    def view(self, number: int) -> np.ndarray:
        """One decoded window, (side, side, 3) uint8."""
        return self._decode(self.encoded[number], self.windows[number]).numpy()

    def _decode(self, encoded, window):
        import tensorflow as tf

        return tf.io.decode_and_crop_jpeg(encoded, window, channels=3, dct_method="INTEGER_ACCURATE")

    def _decode_all(self, encoded, windows):
        import tensorflow as tf

        def decode(i, total):
            # A graph leaves out what nobody uses, so a value of each image is used.
            return i + 1, total + tf.cast(self._decode(encoded[i], windows[i])[0, 0, 0], tf.int32)

        return tf.while_loop(lambda i, _: i < tf.size(encoded), decode, (0, 0), parallel_iterations=1)[1]

    def decode(self) -> tuple[int, float, float]:
        """Decodes all; returns what `Timed` takes."""
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            return clock(len(self.encoded), lambda: list(pool.map(lambda part: self._graph(*part), self._parts)))


def to_record(files: Sequence[pathlib.Path], config: Any) -> tuple[int, float, float]:
    """Makes records of photographs, and forgets them; returns what `Timed` takes."""

    def make(file):
        datasets.images.to_record(file.read_bytes(), config.input.resize, config.dataset.max_pixels)

    with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        return clock(len(files), lambda: collections.deque(pool.map(make, files), maxlen=0))


def prepare(photographs: pathlib.Path, images: int, config: Any) -> tuple[int, float, float]:
    """Prepares a folder of photographs, and removes the records; returns what `Timed` takes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        size = config.input.resize
        return clock(images, lambda: preparing.prepare(str(photographs), data_dir=folder, size=size))


class Photographs:
    """A data set as a PyTorch user writes it: item i is a view of photograph i, (crop, crop, 3) float32.

    Args:
      files: the photographs.
      resize: of the shorter side, in pixels.
      crop: side of the view in pixels.
    """

    def __init__(self, files: Sequence[pathlib.Path], resize: int, crop: int):
        self._files, self._resize, self.crop = files, resize, crop
        self._mean, self._scale = 255 * np.float32(MEAN), 1 / (255 * np.float32(STD))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> np.ndarray:
        with Image.open(self._files[i]) as file:
            image = file.convert("RGB")
        scale = self._resize / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
        left, top = (random.randint(0, side - self.crop) for side in image.size)
        image = image.crop((left, top, left + self.crop, top + self.crop))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return (np.asarray(image, np.float32) - self._mean) * self._scale


def pil(photographs: Photographs, batch_size: int, images: int) -> tuple[int, float, float]:
    """Draws batches of views from worker processes, new ones each time; returns what `Timed` takes.

    Args:
      photographs: the data set.
      images: a multiple of the batch size.
    """
    count = images // batch_size
    numbers = np.random.default_rng(0).permutation((count + 2 * AHEAD) * batch_size) % len(photographs)
    stamps = collections.defaultdict(list)

    def draw(count):
        for _ in range(count):
            batch, process, cpu_seconds = next(batches)
            assert batch.shape == (batch_size, photographs.crop, photographs.crop, 3)
            stamps[process].append(cpu_seconds)

    with contextlib.closing(_batches_of(photographs, numbers.tolist(), batch_size)) as batches:
        draw(AHEAD)
        found, seconds, cpu_seconds = clock(images, lambda: draw(count))
        # Before their first batch the workers were starting.
        workers = sum(at[-1] - at[0] for at in stamps.values()) / sum(len(at) - 1 for at in stamps.values())
    return found, seconds, cpu_seconds + count * workers


def _batches_of(photographs: Photographs, numbers: list[int], batch_size: int) -> Iterator:
    """Yields for each batch its views, the process that made it and that process's processor seconds so far.

    It works like PyTorch's loader, and is a little faster: batches cross in shared memory, each worker is two ahead.
    """
    context, places = multiprocessing.get_context("spawn"), 2 * CORES + 1
    shape = places, batch_size, photographs.crop, photographs.crop, 3
    shared = context.RawArray("f", int(np.prod(shape)))
    batches, under_way = np.frombuffer(shared, np.float32).reshape(shape), collections.deque()
    pool = context.Pool(CORES, _join_pool, (photographs, shared, shape))
    try:
        for number, start in enumerate(range(0, len(numbers), batch_size)):
            place = number % places
            under_way.append((place, pool.apply_async(_fill, (place, numbers[start : start + batch_size]))))
            if len(under_way) == places:
                place, stamp = under_way.popleft()
                yield batches[place], *stamp.get()
    finally:
        # `terminate`, which the pool's own context calls, can wait for ever on a worker that it killed with a lock.
        pool.close()
        pool.join()


def _join_pool(photographs: Photographs, shared: Any, shape: tuple[int, ...]) -> None:
    global _joined
    _joined = photographs, np.frombuffer(shared, np.float32).reshape(shape)


def _fill(place: int, numbers: list[int]) -> tuple[int, float]:
    photographs, batches = _joined
    for row, number in zip(batches[place], numbers, strict=True):
        row[:] = photographs[number]
    return os.getpid(), time.process_time()


def run(config: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Measures with the views of a config; raises `UserError` if a flag or the photographs cannot work."""
    check_ranges(vars(args), {"images": (1, 1 << 20), "rounds": (1, 1000), "size": (0, 4096)}, "--")
    host.keep_freed_memory()  # main.py does the same
    images = -(-args.images // config.batch_size) * config.batch_size
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(args.data_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        photographs = pathlib.Path(args.photographs)
        place = hashlib.sha256(os.fsencode(photographs.resolve())).hexdigest()[:8]
        name = f"{photographs.resolve().name}-{place}-{images}" + (f"-{args.size}" if args.size else "")
        files = sample(photographs, folder / name, images, args.size)
        directory = preparing.prepare(str(folder / name), data_dir=str(folder), size=config.input.resize)
        opened = prepared.Records.open(directory)

        raw = Raw(opened, config, images)
        loaded = Photographs(files, config.input.resize, config.input.crop)
        candidates = {
            "records": Timed(functools.partial(records, opened, config, images)),
            "raw": Timed(raw.decode),
            "to_record": Timed(functools.partial(to_record, files, config)),
            "prepare": Timed(functools.partial(prepare, folder / name, len(files), config)),
            "pil": Timed(functools.partial(pil, loaded, config.batch_size, images)),
        }
        raw.decode(), to_record(files[:64], config)  # warm-up; the others have theirs
        seconds = measure.interleaved(candidates, args.rounds)
        pixels, size = zip(*map(measures, files), strict=True)
    cpu_seconds = {name: candidate.cpu_seconds for name, candidate in candidates.items()}
    for of in seconds, cpu_seconds:
        both = zip(of["prepare"], of["records"], strict=True)
        of["from_photographs"] = [once / config.num_epochs + each for once, each in both]
    rates = {name: 1 / min(values) for name, values in seconds.items()}
    values = {
        "photographs": len(files),
        "photograph_pixels": float(np.mean(pixels)),
        "photograph_bytes": float(np.mean(size)),
        "scaled_to": args.size,
        "record_bytes": float(np.mean([len(data) for data in raw.encoded])),
        "images": images,
        "batch_size": config.batch_size,
        "epochs": config.num_epochs,
        "rounds": args.rounds,
        "images_per_second": rates,
        "images_per_second_per_core": {name: rate / CORES for name, rate in rates.items()},
        "cpu_seconds_per_image": {name: min(values) for name, values in cpu_seconds.items()},
    }
    for fast, slow in (("records", "raw"), ("from_photographs", "pil"), ("to_record", "pil"), ("prepare", "pil")):
        values[f"{fast}_times_{slow}"] = measure.ratio(seconds, slow, fast)
        values[f"{fast}_times_{slow}_cpu"] = measure.ratio(cpu_seconds, slow, fast)
    return values


def main() -> None:
    """Parses the flags, measures, and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", required=True, help="a folder ROOT with ROOT/train/CLASS/*.jpg")
    parser.add_argument("--images", type=int, default=4096, help="of a sample, and of a measurement")
    parser.add_argument("--size", type=int, default=0, help="pixels of the longer side, to scale to; 0 does not scale")
    parser.add_argument("--data_dir", default="", help="keeps the sample and its records, for the next time")
    parser.add_argument("--rounds", type=int, default=3)
    try:
        measure.report("input", run(measure.recipe(), parser.parse_args()))
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
