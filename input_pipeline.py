"""The data's way: records → 256×256 images → views → batches, in tf.data.

The stream of training views is a pure function of (seed, g). It passes over the training split again and again: of N
examples, number g comes in epoch g // N, at place g % N of that epoch's permutation, and step s of batch size B takes
g = s·B … (s+1)·B − 1. So every epoch has each example exactly once, batches are always full, and to resume is to begin
at another g: nothing about the stream is saved. Records are read by their place in the files, so nothing is skipped
over, and a process reads its own rows only.

Importing this module does not import TensorFlow; opening records does.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from errors import UserError, check_name, check_ranges, nearest, shortened, shown

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

    try:
        if dataset.startswith("~"):
            dataset = str(pathlib.Path(dataset).expanduser())
        data_dir, manual_dir = (str(pathlib.Path(path).expanduser()) if path else "" for path in (data_dir, manual_dir))
    except RuntimeError as error:
        raise UserError(f"{dataset}, {data_dir}: {error}") from None

    name = sources.prepared_name(dataset)
    directory = records.directory(data_dir, name, size)
    if not os.path.isdir(directory):  # noqa: PTH112 -- a Path raises where it may not look
        with records.lock(data_dir, name):
            if not directory.is_dir():  # another process may have prepared it meanwhile
                source = sources.open_source(dataset, data_dir, manual_dir, train_split)
                count = sum(source.counts.values())
                print(f"Preparing {count:,} images of {source.origin} in {directory}, once.", flush=True)
                if others := sum(source.passed_over.values()):
                    print(
                        f"passed over: {others:,} files with other suffixes ({', '.join(sorted(source.passed_over))})"
                    )
                records.prepare(
                    source,
                    name=name,
                    data_dir=data_dir,
                    size=size,
                    train_split=train_split,
                    allow_unreadable=allow_unreadable,
                    max_pixels=max_pixels,
                )
    summary = read_summary(directory)
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


def read_summary(directory: pathlib.Path) -> dict[str, Any]:
    """What `datasets.records.prepare` noted in prepared.json of a prepared set.

    Raises:
      UserError: it is missing or damaged.
    """
    file = directory / "prepared.json"
    with _damage(file, directory):
        # Sets prepared by earlier versions say nothing of overlaps.
        summary = {"overlap": {}, "overlap_as": {}} | json.loads(file.read_text(encoding="utf-8"))
        texts = [summary["origin"], summary["train_split"]]
        texts += [item[key] for item in summary["unreadable"] for key in ("file", "reason")]
        texts += [name for pairs in summary["overlap_as"].values() for one, other in pairs for name in (one, other)]
        counts = [*summary["examples"].values(), *summary["overlap"].values()]
        typed = all(isinstance(text, str) for text in texts) and all(isinstance(count, int) for count in counts)
        if not typed or summary["overlap"].keys() != summary["overlap_as"].keys():
            raise TypeError("a field has another type")
        return summary


def overlap_warnings(directory: pathlib.Path) -> dict[tuple[str, str], str]:
    """By (split, training split): a sentence for each split of a prepared set that shares images with training."""
    summary = read_summary(directory)
    sentences = {}
    for pair, count in summary["overlap"].items():
        split, _, train = pair.partition("/")
        named = "".join(f"{one} is {other}, " for one, other in summary["overlap_as"][pair])
        named = named + "…" if count > len(summary["overlap_as"][pair]) else named.removesuffix(", ")
        sentences[split, train] = (
            f"warning: {count:,} images of {split!r} are also in {train!r} ({named}): errors measured on it will look "
            f"too low."
        )
    return sentences


@contextlib.contextmanager
def _damage(path: pathlib.Path, directory: pathlib.Path) -> Iterator[None]:
    """Makes one sentence of whatever goes wrong in reading `path` of the prepared set in `directory`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the readers of JSON, NumPy's and TFDS's files raise anything on damaged ones
        text = " ".join(str(error).split())
        reason = f"no {text}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or text
        raise UserError(
            f"{path} cannot be used ({shortened(reason or type(error).__name__)}); {_cure(directory)}"
        ) from error


def _cure(directory: pathlib.Path) -> str:
    return f"delete {directory.parent} and prepare the data set again."


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
        examples = read_summary(directory)["examples"]
        with _damage(directory, directory):
            info = _builder(directory).info
            if (found := {split: part.num_examples for split, part in info.splits.items()}) != examples:
                raise ValueError(f"it has {found} examples, where {examples} were prepared")
            names, size = tuple(info.features["label"].names), info.features["image"].shape[0]
            # Where the file of names is damaged, TFDS makes some up.
            lines = (directory / "label.labels.txt").read_text(encoding="utf-8").split("\n")
            classes = _features(directory)["label"]["classLabel"]["numClasses"]
            if not len(names) == sum(bool(line.strip()) for line in lines) == int(classes):
                raise ValueError(f"label.labels.txt does not name its {classes} classes")
        file = directory / "statistics.npz"
        with _damage(file, directory):
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as statistics:  # pickles can run code
                arrays = dict(statistics)
            shapes = {"mean_image": (size, size, 3), "principal_std": (3,), "principal_components": (3, 3)}
            for name, shape in shapes.items():
                array = arrays[name]
                if (array.shape, array.dtype) != (shape, np.float32) or not np.isfinite(array).all():
                    raise ValueError(f"{name} is not {shape} finite float32 numbers")
        return cls(directory, names, **{name: arrays[name] for name in shapes})

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
            with _damage(file, self.directory):
                found = _scan(file)
                if len(found) != part.examples_in_shard:
                    raise ValueError(f"it has {len(found):,} records, not {part.examples_in_shard:,}")
            rows.append(np.insert(found[part.skip : part.skip + part.take], 0, number, axis=1))
        return Index(files, np.concatenate(rows))


def open_records(dataset: Any, input: Any, warn: bool = True) -> Records:
    """Opens the data set of a config's `dataset` and `input` sections; prepares it on first use.

    Warns on stderr, unless `warn` is False, of images on which a run would both train and be evaluated.

    Raises:
      UserError: the set is not there or has not these splits, or a field cannot work.
    """
    validate(input)
    validate_dataset(dataset)
    try:
        directory = prepare(
            dataset.name,
            data_dir=dataset.data_dir,
            size=input.resize,
            train_split=dataset.train_split.partition("[")[0],
            allow_unreadable=dataset.allow_unreadable,
            max_pixels=dataset.max_pixels,
        )
    except UserError as error:
        fields = (f"dataset.{field}={shown(dataset[field])}" for field in ("name", "data_dir", "train_split"))
        raise UserError(f"{', '.join(fields)}: {error}") from error
    records = Records.open(directory)
    for field in ("train_split", "eval_split"):
        try:
            records.num_examples(dataset[field])
        except UserError as error:
            raise UserError(f"dataset.{field}: {error}") from error
    for warning in _overlaps(records, dataset.train_split, dataset.eval_split) if warn else ():
        print(warning, file=sys.stderr, flush=True)
    return records


def _overlaps(records: Records, train_split: str, eval_split: str) -> Iterator[str]:
    """Warnings of images on which a run both trains and is evaluated, by their place in the files and by content."""

    def chosen(split):
        masks = {}
        for part in _split(records, split).file_instructions:
            mask = masks.setdefault(part.filename, np.zeros(part.examples_in_shard, bool))
            mask[part.skip : part.skip + part.take] = True
        return masks

    train, evaluation = chosen(train_split), chosen(eval_split)
    if shared := sum((train[file] & evaluation[file]).sum() for file in train.keys() & evaluation.keys()):
        yield (
            f"warning: {shared:,} images of eval_split={eval_split!r} are also in train_split={train_split!r}: errors "
            f"measured on it will look too low."
        )
    for (split, trained), sentence in overlap_warnings(records.directory).items():
        if chosen(split).keys() & evaluation.keys() and chosen(trained).keys() & train.keys():
            yield sentence


def validate(input: Any) -> None:
    """Refuses values of a config's `input` section that cannot work; raises `UserError`."""
    bounds = {
        "resize": (8, 4096),  # pixels
        "scale": (1e-6, 1e6),
        "lighting_std": (0, 100),
        "lighting_until": (0, 1e6),
        "threads": (0, 1024),
    }
    check_ranges(input, bounds, "input.")
    if not 1 <= input.crop <= input.resize:
        raise UserError(f"input.crop={shown(input.crop)} must lie between 1 and input.resize={input.resize}.")
    check_name("input.lighting_scale", input.lighting_scale, ("std", "variance"))


def validate_dataset(dataset: Any) -> None:
    """Refuses values of a config's `dataset` section that cannot work; raises `UserError`."""
    check_ranges(dataset, {"allow_unreadable": (0, 1 << 40), "max_pixels": (1, 1 << 40)}, "dataset.")
    for field in ("name", "data_dir", "train_split", "eval_split"):
        if not dataset[field].strip() or "\0" in dataset[field]:
            raise UserError(f"dataset.{field}={shown(dataset[field])} is empty, or no name.")
    for field in ("name", "data_dir"):
        try:
            pathlib.Path(dataset[field]).expanduser().exists()
            if field == "data_dir":
                dataset.data_dir.encode()  # TensorFlow's paths are UTF-8
        except (OSError, RuntimeError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"dataset.{field}={shown(dataset[field])} cannot be a path: {reason}.") from None


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

    def view(encoded, label, corner, reflect, shift, gain):
        image = _decode(encoded, records.image_size, (*tf.unstack(corner), input.crop, input.crop))
        image = tf.cond(reflect, lambda: tf.reverse(image, [1]), lambda: image)
        return {"image": image, "label": label, "shift": shift, "gain": gain}

    signature = (
        tf.TensorSpec([rows], tf.string),
        tf.TensorSpec([rows, 2], tf.int32),
        tf.TensorSpec([rows], tf.bool),
        tf.TensorSpec([rows, 3], tf.float32),
        tf.TensorSpec([rows], tf.float32),
    )
    return _batches(chunks, signature, view, rows, num_threads, records)


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

    def view(encoded, label, mask):
        return {"image": _decode(encoded, records.image_size), "label": label, "mask": mask}

    signature = (tf.TensorSpec([rows], tf.string), tf.TensorSpec([rows], tf.float32))
    return _batches(chunks, signature, view, rows, num_threads, records)


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
    os.environ.setdefault("KERAS_HOME", os.devnull)  # TensorFlow imports Keras, which would write ~/.keras/keras.json
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf


def _threads(num_threads: int | None) -> int:
    return num_threads or os.cpu_count() or 1


def _batches(chunks, signature, view, rows: int, num_threads: int | None, records: Records) -> Iterator[Batch]:
    """Batches of views in order, a few batches ahead of their use.

    Args:
      chunks: a generator function; it yields serialised examples and what else belongs to each of them, by `signature`.
      view: makes an element of an encoded image, its label, and the rest.
    """
    tf = _tensorflow()
    # Found now, for at exit the module may be gone before the generator. Where TensorFlow's message quotes the damaged
    # record, it is no text.
    damaged = tf.errors.InvalidArgumentError, UnicodeDecodeError
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = _threads(num_threads)
    read = tf.data.Dataset.from_generator(chunks, output_signature=signature)
    # Parsed many at a time, for each operation on one of them costs microseconds.
    examples = read.map(lambda data, *rest: (*_parse(data), *rest)).prefetch(2).unbatch()
    views = examples.map(view, num_parallel_calls=_threads(num_threads))
    batches = views.batch(rows, drop_remainder=True).with_options(options).prefetch(2)
    classes = set(range(records.num_classes))
    try:
        for batch in batches.as_numpy_iterator():
            if strange := set(batch["label"].tolist()) - classes:
                raise UserError(
                    f"A record of {records.directory} has the label {min(strange)}, and the classes are 0 … "
                    f"{records.num_classes - 1}; {_cure(records.directory)}"
                )
            yield batch
    except damaged as error:
        raise UserError(f"A record of {records.directory} is damaged; {_cure(records.directory)}") from error
    except tf.errors.OpError as error:
        raise UserError(f"The records of {records.directory} cannot be read: {shortened(error.message)}.") from error


def _parse(serialized):
    """(encoded images, labels) of serialised examples; of one that has changed, an image that cannot be decoded."""
    import tensorflow as tf

    from datasets.records import fingerprint

    number = functools.partial(tf.io.FixedLenFeature, [], tf.int64)
    # Sets prepared by earlier versions have no fingerprints.
    features = {"image": tf.io.FixedLenFeature([], tf.string), "label": number(), "fingerprint": number(-1)}
    example = tf.io.parse_example(serialized, features)
    image, label, expected = example["image"], example["label"], example["fingerprint"]
    sound = (expected < 0) | (expected == fingerprint(label, image))
    return tf.where(sound, image, ""), tf.cast(label, tf.int32)


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
        return tf.slice(image, [0, left - start, 0], [height, width, 3])
    image = tf.ensure_shape(tf.io.decode_png(encoded, channels=3), (size, size, 3))
    return image if window is None else tf.image.crop_to_bounding_box(image, *window)


# Files.


@functools.lru_cache(maxsize=8)
def _builder(directory: pathlib.Path):
    _tensorflow()
    from datasets.progress import quiet
    from datasets.sources import tensorflow_datasets

    _features(directory)
    with quiet():
        return tensorflow_datasets().builder_from_directory(directory)


def _features(directory: pathlib.Path) -> dict[str, Any]:
    """What features.json says; TFDS would import whatever modules it names, and so run code of whoever wrote it."""

    def known(item):
        for key in ("type", "pythonClassName", "python_class_name"):
            if not str(item.get(key, "tensorflow_datasets.")).startswith("tensorflow_datasets."):
                raise ValueError(f"a feature is of the class {item[key]}")
        return item

    content = json.loads((directory / "features.json").read_text(encoding="utf-8"), object_hook=known)
    return content["featuresDict"]["features"]


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
                raise UserError(f"{file} is cut short; {_cure(file.parent)}")
            found.append((at + 12, length))
            at += length + 16
    return np.array(found, np.int64).reshape(-1, 2)
