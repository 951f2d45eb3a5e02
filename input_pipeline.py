"""The stream of training views and the pass over an evaluation split, in tf.data: records → views → batches.

The stream is a pure function of (seed, place). It repeats the training split without end. Place g of the stream belongs
to epoch g // N, of N examples, and holds example g % N of that epoch's permutation. Step s of batch size B takes the
places s·B … (s+1)·B − 1. So every epoch has each example exactly once, batches are always full, and a run resumes at
any step without a stored state. Records are read by number: no process reads records that it does not need.

Importing this module does not import TensorFlow.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from common import host
from common.errors import UserError, check_name, check_ranges, require, shortened, shown
from datasets import images, prepared, tensorflow, tfrecords

Batch = dict[str, np.ndarray]
GROUP = 8  # images that are decoded in one call, at most


def validate(options: Any) -> None:
    """Refuses values of a config's `input` section that cannot work; raises `UserError`."""
    bounds = {
        "resize": prepared.SIZES,
        "scale": (1e-6, 1e6),
        "lighting_std": (0, 100),
        "lighting_until": (0, 1e6),
        "threads": (0, 1024),
    }
    check_ranges(options, bounds, "input.")
    std = options.channel_std
    fits = len(std) == 3 and all(type(value) in (int, float) and 1e-6 <= value <= 1e6 for value in std)
    require(fits, f"input.channel_std={shown(std)} must be three numbers between 1e-06 and 1000000.0.")
    if not 1 <= options.crop <= options.resize:
        raise UserError(f"input.crop={shown(options.crop)} must lie between 1 and input.resize={options.resize}.")
    area = options.crop_area
    fits = len(area) in (0, 2) and all(type(share) in (int, float) for share in area)
    require(
        fits and (not area or 0 < area[0] <= area[1] <= 1),
        f"input.crop_area={shown(area)} must be (), or the least and the most share of a record's area, such as "
        f"(0.25, 1.0).",
    )
    check_name("input.lighting_scale", options.lighting_scale, ("std", "variance"))
    spans = [span if isinstance(span, list | tuple) else (span,) for span in options.lighting_again]
    require(
        all(len(span) == 2 and all(type(epoch) in (int, float) for epoch in span) for span in spans)
        and all(0 <= first < end <= 1e6 for first, end in spans),
        f"input.lighting_again={shown(options.lighting_again)} must be pairs of epochs, such as ((91.0, 124.0),) with "
        f"its comma.",
    )


def train_batches(
    records: prepared.Records,
    split: str,
    *,
    options: Any,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> Iterator[Batch]:
    """Batches of training views, without end.

    Args:
      records: the prepared set.
      split: a split of it, or a part of one.
      options: a config's `input` section.
      batch_size: of the global batch; process p of P gets its rows [p·B/P, (p+1)·B/P).
      seed: of the permutations and the views.
      start_step: the step whose batch comes first.
      process_index, process_count: p and P.
      num_threads: for decoding; None takes all cores. It does not change the stream.

    Yields:
      'image' (B/P, crop, crop, 3) uint8; 'label' (B/P,) int32; 'shift' (B/P, 3) float32, the lighting to add to the
      pixels; 'gain' (B/P,) float32, the factor for the sum. `views.to_input` applies both.

    Raises:
      UserError: the batch does not divide over the processes, there is no such split, or a record is damaged.
    """
    rows = _rows("batch_size", batch_size, process_count)
    index = records.index(split)
    tf = tensorflow()

    def chunks():
        with index.reader() as reader:
            step = start_step
            while True:
                places = step * batch_size + process_index * rows + np.arange(rows)
                data = reader.read(example_numbers(len(index), seed, places))
                yield data, *draw_views(records, options, len(index), seed, places)
                step += 1

    def view(encoded, label, window, reflect, shift, gain):
        top, left, side = (*tf.unstack(window[:2]), window[2] if options.crop_area else options.crop)
        image = _decode(encoded, records.image_size, (top, left, side, side))
        if options.crop_area:
            image = resize(image, options.crop)
        image = tf.cond(reflect, lambda: tf.reverse(image, [1]), lambda: image)
        return {"image": image, "label": label, "shift": shift, "gain": gain}

    signature = (
        tf.TensorSpec([rows], tf.string),
        tf.TensorSpec([rows, 3], tf.int32),
        tf.TensorSpec([rows], tf.bool),
        tf.TensorSpec([rows, 3], tf.float32),
        tf.TensorSpec([rows], tf.float32),
    )
    return _batches(chunks, signature, view, rows, num_threads, records)


def eval_batches(
    records: prepared.Records,
    split: str,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> Iterator[Batch]:
    """Batches of whole records, each once, in the order of storage. The device cuts the views.

    All processes yield the same number of batches; padding fills the last one. For the arguments see `train_batches`.

    Yields:
      'image' (B/P, S, S, 3) uint8; 'label' (B/P,) int32; 'mask' (B/P,) float32, 1 for an example and 0 for padding.

    Raises:
      UserError: the batch does not divide over the processes, there is no such split, or a record is damaged.
    """
    rows = _rows("eval_batch_size", batch_size, process_count)
    index = records.index(split)
    tf = tensorflow()

    def chunks():
        with index.reader() as reader:
            for start in range(0, len(index), batch_size):
                numbers = start + process_index * rows + np.arange(rows)
                mask = (numbers < len(index)).astype(np.float32)
                yield reader.read(np.minimum(numbers, len(index) - 1)), mask

    def view(encoded, label, mask):
        return {"image": _decode(encoded, records.image_size), "label": label, "mask": mask}

    signature = (tf.TensorSpec([rows], tf.string), tf.TensorSpec([rows], tf.float32))
    return _batches(chunks, signature, view, rows, num_threads, records)


def _rows(field: str, batch_size: int, process_count: int) -> int:
    """The rows of a batch that each process gets."""
    if batch_size % process_count:
        raise UserError(f"{field}={batch_size} does not divide over {process_count} processes.")
    return batch_size // process_count


# Everything that is random.


def example_numbers(count: int, seed: int, places: np.ndarray) -> np.ndarray:
    """The examples at these places of the stream: (b,) int64, numbers below `count`, the size of the split."""
    epochs, within = np.divmod(places, count)
    numbers = np.empty(len(places), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        numbers[here] = _permutation(count, seed, int(epoch))[within[here]]
    return numbers


@functools.lru_cache(maxsize=2)  # a batch may span the border of two epochs
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=(seed, 1), counter=(0, 0, 0, epoch))).permutation(count)


def draw_views(
    records: prepared.Records, options: Any, count: int, seed: int, places: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Draws the views at consecutive places of the stream (paper, section 4.1).

    Philox computes its numbers from a counter. Place g owns the counter values 2g and 2g + 1, which give four 64-bit
    numbers each, whatever the batch and the process.

    Args:
      records: gives the size of the images and the principal components of their colours.
      options: a config's `input` section.
      count: the size of the split.
      seed: of the stream.
      places: (b,), consecutive.

    Returns:
      window (b, 3) int32, top, left and side in pixels of what is cut out; reflect (b,) bool; shift (b, 3) float32, the
      lighting in levels of 0–255; gain (b,) float32, 1 or, with `lighting_divide`, 1 / (1 + lighting_std).
    """
    generator = np.random.Philox(key=(seed, 2)).advance(2 * int(places[0]))
    uniform = (generator.random_raw(8 * len(places)).reshape(len(places), 8) >> np.uint64(11)) * 2.0**-53
    side = np.full(len(places), options.crop, np.int32)
    if options.crop_area:
        least, most = options.crop_area
        area = (least + (most - least) * uniform[:, 7]) * records.image_size**2
        side = np.maximum(1, np.rint(np.sqrt(area))).astype(np.int32)
    margin = records.image_size - side[:, None]
    corner = np.floor(uniform[:, :2] * (margin + 1)) if options.random_crop else np.repeat(margin // 2, 2, 1)
    window = np.concatenate([corner.astype(np.int32), side[:, None]], axis=1)
    reflect = (uniform[:, 2] < 0.5) & options.reflect
    # Box and Muller: two uniform numbers give two normal ones.
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[:, 3:5])), 2 * np.pi * uniform[:, 5:7]
    normal = np.concatenate([radius * np.cos(angle), radius[:, :1] * np.sin(angle[:, :1])], axis=1)
    # The source of 2012 takes the standard deviation along each component, the paper's text the variance.
    spread = records.principal_std if options.lighting_scale == "std" else records.principal_std**2
    epochs = places / count
    on = (options.lighting_until <= 0) | (epochs < options.lighting_until)
    for first, end in options.lighting_again:
        on |= (first <= epochs) & (epochs < end)
    on &= options.lighting_std > 0
    shift = (normal * options.lighting_std * spread) @ records.principal_components * on[:, None]
    gain = np.where(on & options.lighting_divide, 1 / (1 + options.lighting_std), 1)
    return window, reflect, shift.astype(np.float32), gain.astype(np.float32)


# TensorFlow.


def _batches(
    chunks: Callable, signature: tuple, view: Callable, rows: int, num_threads: int | None, records: prepared.Records
) -> Iterator[Batch]:
    """Batches of views in order, prepared a few batches ahead.

    Args:
      chunks: a generator function; it yields the serialised examples of a batch and what else `signature` lists.
      view: makes an element of an encoded image, its label, and the rest of a chunk's row.
      rows: elements of a batch.
      num_threads: for decoding; None takes all cores.
      records: the prepared set.
    """
    tf = tensorflow()
    # Looked up now: at exit TensorFlow may be gone before this generator. UnicodeDecodeError comes from a message that
    # quotes a damaged record.
    damaged, unreadable = (tf.errors.InvalidArgumentError, UnicodeDecodeError), tf.errors.OpError
    threads = num_threads or host.cores()
    settings = tf.data.Options()
    settings.deterministic = True
    # There is nothing to tune, and the tuner's thread would hold up the end of a run by up to a minute.
    settings.autotune.enabled = False
    settings.threading.private_threadpool_size = threads
    read = tf.data.Dataset.from_generator(chunks, output_signature=signature)
    # Parsed a batch at a time and viewed a group at a time, because each call costs microseconds.
    group = math.gcd(rows, GROUP)
    parse = functools.partial(tfrecords.parse, num_classes=records.num_classes)

    def grouped(data, *rest):
        return tuple(tf.reshape(x, [rows // group, group, *x.shape[1:]]) for x in (*parse(data), *rest))

    def views(*columns):
        made = [view(*row) for row in zip(*map(tf.unstack, columns), strict=True)]
        return tf.nest.map_structure(lambda *one: tf.stack(one), *made)

    def joined(groups):
        return {name: tf.reshape(x, [rows, *x.shape[2:]]) for name, x in groups.items()}

    examples = read.map(grouped).prefetch(2).unbatch()
    batches = examples.map(views, num_parallel_calls=threads).batch(rows // group, drop_remainder=True).map(joined)
    try:
        yield from batches.with_options(settings).prefetch(2).as_numpy_iterator()
    except damaged as error:
        raise records.damaged() from error
    except unreadable as error:
        raise UserError(f"The records of {records.directory} cannot be read: {shortened(error.message)}.") from error


def resize(image: Any, size: int) -> Any:
    """Makes a square (s, s, 3) uint8 image size×size: bilinear, with all pixels weighted where it shrinks."""
    tf = tensorflow()
    found = tf.image.resize(image, (size, size), antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(found), 0, 255), tf.uint8)


def _decode(encoded, size: int, window=None):
    """Decodes a record of side `size`, or just (top, left, height, width) of it, to uint8."""
    tf = tensorflow()
    if size <= images.LOSSLESS_UP_TO:
        image = tf.ensure_shape(tf.io.decode_png(encoded, channels=3), (size, size, 3))
        return image if window is None else tf.image.crop_to_bounding_box(image, *window)
    # TensorFlow's default, INTEGER_FAST, darkens red and blue by a level and is no faster. This matches Pillow.
    exactly = dict(channels=3, dct_method="INTEGER_ACCURATE")
    if window is None:
        return tf.ensure_shape(tf.io.decode_jpeg(encoded, **exactly), (size, size, 3))
    # Colour is stored for every other pixel. At the sides of the window it depends on the neighbours outside, which
    # libjpeg would leave out.
    top, left, height, width = window
    start = tf.maximum(left - 2, 0)
    wider = tf.minimum(left + width + 2, size) - start
    image = tf.io.decode_and_crop_jpeg(encoded, tf.stack([top, start, height, wider]), **exactly)
    return tf.slice(image, [0, left - start, 0], [height, width, 3])
