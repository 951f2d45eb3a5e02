"""The data's way: records → 256×256 images → views → batches, in tf.data.

The stream of training views is a pure function of (seed, g). It passes over the training split again and again: of N
examples, number g comes in epoch g // N, at place g % N of that epoch's permutation, and step s of batch size B takes
g = s·B … (s+1)·B − 1. So every epoch has each example exactly once, batches are always full, and to resume is to begin
at another g: nothing about the stream is saved. Records are read by their place in the files, so nothing is skipped
over, and a process reads its own rows only.

Importing this module does not import TensorFlow; opening records does.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from errors import UserError, nearest

Batch = dict[str, np.ndarray]


def prepare(
    dataset: str,
    *,
    data_dir: str,
    manual_dir: str = "",
    size: int = 256,
    train_split: str = "train",
    allow_unreadable: int = 0,
    max_pixels: int = 100_000_000,
) -> pathlib.Path:
    """Returns the folder of a prepared set, and prepares it first where it is not there; see `datasets.records`."""
    _tensorflow()
    from datasets import records, sources

    if dataset.startswith("~"):
        dataset = str(pathlib.Path(dataset).expanduser())
    data_dir = str(pathlib.Path(data_dir).expanduser())

    name = sources.prepared_name(dataset)
    directory = records.directory(data_dir, name, size)
    if not directory.is_dir():
        with records.lock(data_dir, name):
            if not directory.is_dir():  # another process may have prepared it meanwhile
                source = sources.open_source(dataset, data_dir, manual_dir, train_split)
                count = sum(source.counts.values())
                print(f"Preparing {count:,} images of {source.origin} in {directory}, once.", flush=True)
                records.prepare(
                    source,
                    name=name,
                    data_dir=data_dir,
                    size=size,
                    train_split=train_split,
                    allow_unreadable=allow_unreadable,
                    max_pixels=max_pixels,
                )
    summary = json.loads((directory / "prepared.json").read_text())
    origin = summary["origin"]
    if sources.is_folder(dataset):  # which may be gone since
        same = origin == sources.printable(str(pathlib.Path(dataset).resolve()))
    else:
        same = origin.startswith(f"TFDS {re.split('[/:]', dataset)[0]}/")
    if not same:
        raise UserError(
            f"{directory.parent} was prepared from {origin}, not from {dataset}; rename one of the two folders, or "
            f"delete the prepared one."
        )
    if summary["train_split"] != train_split:
        raise UserError(
            f"{directory.parent} has the mean image of its split {summary['train_split']!r}, not of {train_split!r}; "
            f"delete it to prepare it again."
        )
    return directory


@dataclasses.dataclass(frozen=True)
class Records:
    """A prepared data set.

    Attributes:
      directory: folder of the records.
      class_names: by label.
      mean_image: (S, S, 3) float32, RGB in 0–255.
      principal_std: (3,) standard deviations of RGB along the principal components, the largest first.
      principal_components: (3, 3), rows of unit length.
    """

    directory: pathlib.Path
    class_names: tuple[str, ...]
    mean_image: np.ndarray
    principal_std: np.ndarray
    principal_components: np.ndarray

    @classmethod
    def open(cls, directory: pathlib.Path) -> "Records":
        """Opens the folder that `prepare` returned."""
        builder = _builder(directory)
        with np.load(directory / "statistics.npz", allow_pickle=False) as statistics:
            return cls(directory, tuple(builder.info.features["label"].names), **statistics)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Side of the records in pixels."""
        return self.mean_image.shape[0]

    def num_examples(self, split: str) -> int:
        """Size of a split, 'train' or a part of one as TFDS writes it, 'train[:90%]'."""
        return _split(self, split).num_examples

    def index(self, split: str) -> "Index":
        """Where each record of a split lies."""
        instructions = _split(self, split).file_instructions
        files = tuple(self.directory / pathlib.Path(part.filename).name for part in instructions)
        rows = []
        for number, (file, part) in enumerate(zip(files, instructions, strict=True)):
            stop = None if part.take < 0 else part.skip + part.take
            rows.append(np.insert(_scan(file)[part.skip : stop], 0, number, axis=1))
        return Index(files, np.concatenate(rows))


def open_records(dataset: Any, input: Any) -> Records:
    """Opens the data set of a config's `dataset` and `input` sections; prepares it on first use.

    Raises:
      UserError: the set is not there or has not these splits, or a field cannot work.
    """
    validate(input)
    directory = prepare(
        dataset.name,
        data_dir=dataset.data_dir,
        size=input.resize,
        train_split=dataset.train_split.partition("[")[0],
        allow_unreadable=dataset.allow_unreadable,
        max_pixels=dataset.max_pixels,
    )
    records = Records.open(directory)
    for split in (dataset.train_split, dataset.eval_split):
        records.num_examples(split)
    return records


def validate(input: Any) -> None:
    """Refuses values of a config's `input` section that cannot work; raises `UserError`."""
    if not 8 <= input.resize <= 4096:
        raise UserError(f"input.resize={input.resize} must lie between 8 and 4096 pixels.")
    if not 1 <= input.crop <= input.resize:
        raise UserError(f"input.crop={input.crop} must lie between 1 and input.resize={input.resize}.")
    if input.lighting_scale not in ("std", "variance"):
        raise UserError(f"input.lighting_scale={input.lighting_scale!r} must be 'std' or 'variance'.")
    if not 0 < input.scale <= 1e6:
        raise UserError(f"input.scale={input.scale} must be above 0, and at most 1e6.")
    for field, high in (("lighting_std", 100), ("lighting_until", 1e6), ("threads", 1024)):
        if not 0 <= input[field] <= high:
            raise UserError(f"input.{field}={input[field]} must lie between 0 and {high}.")


@dataclasses.dataclass(frozen=True)
class Index:
    """Where records lie: `rows` holds (file number, offset, length) of each, in bytes."""

    files: tuple[pathlib.Path, ...]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def reader(self) -> "Reader":
        """Opens the files."""
        return Reader(self)


class Reader:
    """Reads records by number; use as a context."""

    def __init__(self, index: Index):
        self._rows = index.rows
        self._files = [os.open(file, os.O_RDONLY) for file in index.files]

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """The serialised examples of these numbers, as an array of bytes objects."""
        # Plain ints: one os.pread costs less than unpacking a row of NumPy integers.
        found = [os.pread(self._files[file], size, at) for file, at, size in self._rows[numbers].tolist()]
        return np.array(found, dtype=object)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in self._files:
            os.close(file)


def train_batches(
    records: Records,
    split: str,
    *,
    input: Any,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> Iterator[Batch]:
    """Training views, without end.

    Args:
      input: a config's `input` section.
      batch_size: of the global batch; this process gets rows [p·B/P, (p+1)·B/P) of it.
      start_step: the step whose batch comes first.
      num_threads: for decoding; None takes all cores. It does not change the stream.

    Yields:
      'image' (b, crop, crop, 3) uint8; 'label' (b,) int32; 'shift' (b, 3) float32, the lighting, to be added after the
      mean is subtracted; 'gain' (b,) float32, by which the sum is multiplied.

    Raises:
      UserError: the batch does not divide over the processes, or a record is damaged.
    """
    if batch_size % process_count:
        raise UserError(f"batch_size={batch_size} does not divide over {process_count} processes.")
    index = records.index(split)
    rows = batch_size // process_count

    tf = _tensorflow()

    def chunks():
        with index.reader() as reader:
            step = start_step
            while True:
                g = step * batch_size + process_index * rows + np.arange(rows)
                data = reader.read(_example_numbers(len(index), seed, g))
                yield data, *_draw(records, input, len(index), seed, g)
                step += 1

    def view(data, corner, reflect, shift, gain):
        image, label = _parse(data)
        image = _decode(image, records.image_size, (*tf.unstack(corner), input.crop, input.crop))
        image = tf.cond(reflect, lambda: tf.reverse(image, [1]), lambda: image)
        return {"image": image, "label": label, "shift": shift, "gain": gain}

    signature = (
        tf.TensorSpec([rows], tf.string),
        tf.TensorSpec([rows, 2], tf.int32),
        tf.TensorSpec([rows], tf.bool),
        tf.TensorSpec([rows, 3], tf.float32),
        tf.TensorSpec([rows], tf.float32),
    )
    stream = tf.data.Dataset.from_generator(chunks, output_signature=signature).prefetch(2).unbatch()
    return _batches(stream.map(view, num_parallel_calls=_threads(num_threads)), rows, num_threads, records.directory)


def eval_batches(
    records: Records,
    split: str,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> Iterator[Batch]:
    """Whole records, each once, in the order in which they are stored; the views are cut on the device.

    All processes yield the same number of batches, the last of them filled up with padding.

    Yields:
      'image' (b, S, S, 3) uint8; 'label' (b,) int32; 'mask' (b,) float32, 1 for an example and 0 for padding.

    Raises:
      UserError: the batch does not divide over the processes, or a record is damaged.
    """
    if batch_size % process_count:
        raise UserError(f"eval_batch_size={batch_size} does not divide over {process_count} processes.")
    index = records.index(split)
    rows = batch_size // process_count
    tf = _tensorflow()

    def chunks():
        with index.reader() as reader:
            for start in range(0, len(index), batch_size):
                numbers = start + process_index * rows + np.arange(rows)
                mask = (numbers < len(index)).astype(np.float32)
                yield reader.read(np.minimum(numbers, len(index) - 1)), mask

    def view(data, mask):
        image, label = _parse(data)
        return {"image": _decode(image, records.image_size), "label": label, "mask": mask}

    signature = (tf.TensorSpec([rows], tf.string), tf.TensorSpec([rows], tf.float32))
    stream = tf.data.Dataset.from_generator(chunks, output_signature=signature).prefetch(2).unbatch()
    return _batches(stream.map(view, num_parallel_calls=_threads(num_threads)), rows, num_threads, records.directory)


# Everything that is random.


def _example_numbers(count: int, seed: int, g: np.ndarray) -> np.ndarray:
    """Which example of the split stands at each place g of the stream."""
    epochs, places = np.divmod(g, count)
    numbers = np.empty(len(g), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        numbers[here] = _permutation(count, seed, int(epoch))[places[here]]
    return numbers


@functools.lru_cache(maxsize=2)  # a batch may lie over the border of two epochs
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=(seed, 1), counter=(0, 0, 0, epoch))).permutation(count)


def _draw(records: Records, input: Any, count: int, seed: int, g: np.ndarray) -> tuple[np.ndarray, ...]:
    """Draws the views of consecutive places g: corner (b, 2), reflect (b,), shift (b, 3) and gain (b,).

    Philox is a function of its counter: place g has the counter's values 2g and 2g + 1, of four 64-bit numbers each,
    whatever the batch and the process.
    """
    generator = np.random.Philox(key=(seed, 2)).advance(2 * int(g[0]))
    uniform = (generator.random_raw(8 * len(g)).reshape(len(g), 8) >> np.uint64(11)) * 2.0**-53
    margin = records.image_size - input.crop
    if input.random_crop:
        corner = np.floor(uniform[:, :2] * (margin + 1)).astype(np.int32)
    else:
        corner = np.full((len(g), 2), margin // 2, np.int32)
    reflect = (uniform[:, 2] < 0.5) & input.reflect
    # Box and Muller: two uniform numbers give two normal ones.
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[:, 3:5])), 2 * np.pi * uniform[:, 5:7]
    normal = np.concatenate([radius * np.cos(angle), radius[:, :1] * np.sin(angle[:, :1])], axis=1)
    # The source of 2012 takes the standard deviation along each component, the paper's text the variance.
    scale = records.principal_std if input.lighting_scale == "std" else records.principal_std**2
    on = (input.lighting_std > 0) & ((input.lighting_until <= 0) | (g / count < input.lighting_until))
    shift = (normal * input.lighting_std * scale) @ records.principal_components * on[:, None]
    gain = input.scale * np.where(on & input.lighting_divide, 1 / (1 + input.lighting_std), 1)
    return corner, reflect, shift.astype(np.float32), gain.astype(np.float32)


# TensorFlow.


def _tensorflow():
    """Imports TensorFlow, which costs seconds and, where there is a GPU, would take its memory."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # of no use here, and it announces itself
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf


def _threads(num_threads: int | None) -> int:
    return num_threads or os.cpu_count() or 1


def _batches(examples, rows: int, num_threads: int | None, directory: pathlib.Path) -> Iterator[Batch]:
    """Batches a tf.data stream of examples in order, a few batches ahead of their use."""
    tf = _tensorflow()
    # Found now, for at exit the module may be gone before the generator. Where TensorFlow's message quotes the damaged
    # record, it is no text.
    damaged = tf.errors.InvalidArgumentError, UnicodeDecodeError
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = _threads(num_threads)
    batches = examples.batch(rows, drop_remainder=True).with_options(options).prefetch(2)
    try:
        yield from batches.as_numpy_iterator()
    except damaged as error:
        raise UserError(
            f"A record of {directory} cannot be decoded; delete {directory.parent} and prepare the data set again."
        ) from error


def _parse(serialized):
    """(encoded image, label) of a serialised example."""
    import tensorflow as tf

    features = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}
    example = tf.io.parse_single_example(serialized, features)
    return example["image"], tf.cast(example["label"], tf.int32)


def _decode(encoded, size: int, window=None):
    """Decodes a record of side `size`, or just (top, left, height, width) of it."""
    import tensorflow as tf

    from datasets.records import LOSSLESS_UP_TO

    if size > LOSSLESS_UP_TO:
        # TensorFlow's default, INTEGER_FAST, darkens red and blue by a level and is no faster; this is Pillow's result.
        exactly = dict(channels=3, dct_method="INTEGER_ACCURATE")
        if window is None:
            return tf.ensure_shape(tf.io.decode_jpeg(encoded, **exactly), (size, size, 3))
        # Colours are stored for every other pixel, and those at the sides of the window need their neighbours outside,
        # which libjpeg would leave out.
        top, left, height, width = window
        start = tf.maximum(left - 2, 0)
        wider = tf.minimum(left + width + 2, size) - start
        image = tf.io.decode_and_crop_jpeg(encoded, tf.stack([top, start, height, wider]), **exactly)
        return image[:, left - start :][:, :width]
    image = tf.ensure_shape(tf.io.decode_png(encoded, channels=3), (size, size, 3))
    return image if window is None else tf.image.crop_to_bounding_box(image, *window)


# Files.


@functools.lru_cache(maxsize=8)
def _builder(directory: pathlib.Path):
    _tensorflow()
    import tensorflow_datasets as tfds

    from datasets.progress import quiet

    with quiet():
        return tfds.builder_from_directory(directory)


def _split(records: Records, split: str):
    splits = _builder(records.directory).info.splits
    try:
        info = splits[split]
    except (KeyError, ValueError) as error:
        name = split.partition("[")[0]
        reason = nearest(name, splits) if name not in splits else str(error)
        raise UserError(f"{records.directory.parent.name} has no split {split!r}: {reason}") from None
    if not info.num_examples:
        raise UserError(f"The split {split!r} of {records.directory.parent.name} is empty.")
    return info


def _scan(file: pathlib.Path) -> np.ndarray:
    """(offset, length) of every record of a TFRecord file.

    A record is its length (uint64), a checksum (4 bytes), the data, and a checksum (4 bytes).
    """
    found, at, end = [], 0, file.stat().st_size
    with file.open("rb", buffering=0) as data:
        while at < end:
            length = int.from_bytes(os.pread(data.fileno(), 8, at), "little")
            if at + length + 16 > end:
                raise UserError(f"{file} is cut short; delete {file.parent.parent} and prepare the data set again.")
            found.append((at + 12, length))
            at += length + 16
    return np.array(found, np.int64).reshape(-1, 2)
