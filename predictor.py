"""A trained network, ready for photographs. In plain Python, from the folder of this file:

    from predictor import Predictor
    network = Predictor("runs/caltech101")
    print(network.predict("photo.jpg"))

It needs the workdir alone, wherever that lies now, and neither the data set nor TensorFlow. It computes on all devices
of this process, each with the whole network and its part of a batch. An image alone takes the first device; after both
kinds of calls that device holds the parameters twice.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import PIL.Image
from absl import logging

import checkpoint
import evaluate
import models
import update
from common import backend, exits
from common.errors import UserError, check_name, require, shown
from datasets import conversion, images, parts, prepared, sources, wordnet
from parallel import UNDER_WAY, Layout, addressable
from run import setup, workdirs
from views import VIEWS, center, factors, to_input


class Photograph(NamedTuple):
    """One image: its file (- for stdin), and its central square, (S, S, 3) uint8 RGB, or why there is none."""

    file: str
    pixels: np.ndarray | None
    reason: str = ""


class _Place(NamedTuple):
    """Devices, with the network and its parameters on them."""

    layout: Layout
    network: Any
    params: Any


class Predictor:
    """The network of a workdir with the parameters of one of its checkpoints.

    Args:
      workdir: folder of a run.
      step: 'best' (the lowest validation error; the latest if none was measured), 'latest', or the number of a step.
      views: 'ten' averages the softmax over the paper's ten views (section 4.1); 'centre' takes the central one.
      batch_size: images that are computed at once.

    Attributes:
      workdir: the folder.
      config: the run's config.
      records: its class names, mean image and principal components; see `datasets.prepared.Records`.
      labels: readable names of the classes, in the order of the probabilities; see `datasets.wordnet`.
      params: the merged parameters, {layer: {'kernel', 'bias'}}, as NumPy arrays.
      step: the number of updates they have had.
      size: side in pixels of the squares that it sees.

    Raises:
      UserError: the folder is not that of a run, or something in it is missing or damaged.
    """

    def __init__(
        self, workdir: str | pathlib.Path, *, step: str | int = "best", views: str = "ten", batch_size: int = 64
    ):
        self.workdir = workdirs.expanded(workdir)
        check_name("views", views, VIEWS)
        backend.start_devices()
        require(batch_size >= 1, f"batch_size={batch_size} must be at least 1.")
        self.config = workdirs.read_config(self.workdir)
        shapes = setup.state_shapes(self.config)
        self.records = workdirs.read_dataset(self.workdir)
        resize, classes = self.config.input.resize, self.config.model.num_classes
        fits = (self.records.image_size, self.records.num_classes) == (resize, classes)
        require(fits, f"{self.workdir}: dataset.npz is of another run than config.json.")
        self.labels = wordnet.words(self.records.class_names)
        self.size, self._views, self._programs = resize, views, {}
        state, meta = _restore(self.workdir, shapes, step)
        workdirs.check_checkpoint(meta, self.config, self.records, self.workdir)
        self.params, self.step = state.evaluated, int(state.step)
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(self.params))
        require(finite, f"The parameters of step {self.step} in {self.workdir} are not finite numbers.")
        self._layout = Layout(1, towers=self.config.model.towers)
        self.batch_size = -(-batch_size // self._layout.size) * self._layout.size

    def predict(self, image: Any, top: int = 5) -> list[tuple[str, float]]:
        """The `top` most probable labels of one image with their probabilities, the most probable first.

        Args:
          image: a file's path, its content in bytes, a Pillow image, or a (H, W, 3) uint8 RGB array.
          top: how many labels.

        Raises:
          UserError: there is no usable image.
        """
        pixels = self.load(image)
        return self.top(next(self.probabilities([pixels])), top)

    def top(self, probabilities: np.ndarray, top: int = 5) -> list[tuple[str, float]]:
        """The `top` most probable labels of a row of probabilities, the most probable first."""
        return [(self.labels[label], float(probabilities[label])) for label in ranked(probabilities, top)]

    def load(self, image: Any) -> np.ndarray:
        """The central square of an image, (S, S, 3) uint8, as preparation makes it; for the argument see `predict`.

        Raises:
          UserError: there is no usable image.
        """
        try:
            return _square(image, self.size, self.config.dataset.max_pixels)
        except (images.Unreadable, OSError) as error:  # Pillow raises the second for an image that it opened
            name = f"{image}: " if isinstance(image, str | pathlib.Path) else ""
            raise UserError(f"{name}{error}.") from None

    def read(self, files: Iterable[str | bytes]) -> Iterator[Photograph]:
        """Reads images, see `arguments.find`, in threads and in order; those that cannot be read have the reason."""

        decoding = images.Budget(self.config.dataset.max_pixels)

        def photograph(file):
            name = "-" if isinstance(file, bytes) else file
            try:
                return Photograph(name, _square(file, self.size, self.config.dataset.max_pixels, decoding))
            except images.Unreadable as error:
                return Photograph(name, None, str(error))

        return conversion.in_order(photograph, files, ahead=2 * self.batch_size)

    def probabilities(self, squares: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields (classes,) float32 for each (S, S, 3) uint8 square: how probable each class is."""
        return self._over("probabilities", self._probabilities, squares)

    def features(self, squares: Iterable[np.ndarray], layers: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """Yields what the layers give for the centre view of each of (S, S, 3) uint8 squares; see `models.activations`.

        Raises:
          UserError: the network has no such layer.
        """
        for layer in layers:
            check_name("layer", layer, self.layers)
        layers = tuple(layers)
        return self._over(layers, functools.partial(self._features, layers), squares)

    def totals(self, batches: Iterable[Any]) -> dict[str, np.ndarray]:
        """The sums over batches of examples that `evaluate.errors` divides, with the 'confusion' matrix.

        Args:
          batches: with 'image', 'label' and 'mask' as `input_pipeline.eval_batches` gives them, of `batch_size`.
        """
        mean_image, options = self.records.mean_image, self.config.input
        network, params = self._together.network, self._together.params
        step = evaluate.build(network, self._layout, mean_image, options, self._views, confusion=True)
        return evaluate.totals(step, params, batches, self._layout)

    def data(self, data_dir: str = "") -> prepared.Records:
        """Opens the prepared set of the run: in `data_dir`; or else where the run last found it, or in the config's.

        Raises:
          UserError: it is not there, it is damaged, or it is another set.
        """
        dataset = self.config.dataset
        name = sources.prepared_name(dataset.name)
        place = workdirs.expanded(data_dir or dataset.data_dir, "data_dir")
        found = [prepared.directory(place, name, self.size)]
        found = [self.records.directory, *found] if self.records.directory.name and not data_dir else found
        for directory in found:
            if directory.is_dir():
                records = prepared.Records.open(directory)
                require(
                    records.class_names == self.records.class_names and self._has_mean_of(records),
                    f"{directory} is another data set than that of {self.workdir}: name the right --data_dir.",
                )
                return records
        raise UserError(
            f"The records of {dataset.name}, on which {self.workdir} was trained, are not in "
            f"{' or '.join(str(path.parent) for path in found)}; name the folder that holds prepared/ with --data_dir."
        )

    def _has_mean_of(self, records: prepared.Records) -> bool:
        """Whether the run's mean image is that of its training split in `records`.

        Runs of earlier versions have the mean of the whole split. Weights of other programs have a mean of their own.
        """
        if not self.records.directory.name:
            return True
        close = functools.partial(workdirs.same_mean, self.records)
        split = self.config.dataset.train_split
        return close(records) or close(parts.of_part(records, split, sources.split_names(split)[0]))

    @functools.cached_property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers with parameters, in order of computation."""
        return tuple(row.name for row in self.table)

    @functools.cached_property
    def table(self) -> list[models.Row]:
        """The network layer by layer; see `models.layer_table`."""
        return models.layer_table(self.config.model, self.config.input.crop)

    @functools.cached_property
    def _together(self):
        return self._place(self._layout)

    @functools.cached_property
    def _alone(self):
        """The first device: an image alone would wait for the others, which compute its padding."""
        return self._place(Layout(1, towers=self.config.model.towers, devices=self._layout.local_devices[:1]))

    def _place(self, layout):
        return _Place(layout, update.build_network(self.config, layout), layout.shard(self.params))

    def _probabilities(self, place):
        step = evaluate.probabilities(place.network, self.records.mean_image, self.config.input, self._views)
        return place.layout.map(lambda params, batch: step(params, batch))

    def _features(self, layers, place):
        options = self.config.input

        def step(params, batch):
            view = to_input(center(batch, options.crop), self.records.mean_image, factors(options))
            _, found = models.activations(place.network, params, view)
            return {layer: found[layer] for layer in layers}

        return place.layout.map(step)

    def _over(self, name: Any, build: Callable[[_Place], Callable], squares: Iterable[np.ndarray]) -> Iterator[Any]:
        """Yields the rows of a program over batches of squares, without the padding of the last one.

        `build` makes the program, a function of (params, batch), when it is first needed; `name` tells it from others.
        """
        squares, under_way, most = iter(squares), [], 0
        while batch := list(itertools.islice(squares, self.batch_size)):
            if not most:
                alone = len(batch) == 1 < self._layout.size
                place = self._alone if alone else self._together
                if (name, alone) not in self._programs:
                    self._programs[name, alone] = build(place)
                # A power of two, so that few programs are compiled for few images; later batches have its size.
                most = min(_padded(len(batch), place.layout.size), self.batch_size)
            padding = [np.zeros_like(batch[0])] * (most - len(batch))
            result = self._programs[name, alone](place.params, place.layout.put(np.stack(batch + padding)))
            under_way.append((len(batch), result))
            if len(under_way) > UNDER_WAY:
                yield from _rows(*under_way.pop(0))
        for count, result in under_way:
            yield from _rows(count, result)


def ranked(probabilities: np.ndarray, top: int) -> list[int]:
    """The `top` most probable classes of a row of probabilities, the most probable first."""
    require(top >= 1, f"top={top} must be at least 1.")
    return np.argsort(-probabilities, kind="stable")[:top].tolist()


def _square(image: Any, size: int, max_pixels: int, decoding: images.Budget | None = None) -> np.ndarray:
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
            raise images.Unreadable(f"an array must be (height, width, 3) uint8, not {image.shape} {image.dtype}")
        image = PIL.Image.fromarray(image)
    if isinstance(image, PIL.Image.Image):
        return np.asarray(images.square_of(image, size))
    if not isinstance(image, bytes):
        try:
            with sources.open_file(pathlib.Path(image)) as file:
                image = file.read(conversion.length_of(file, max_pixels))
        except OSError as error:
            raise images.Unreadable(error.strerror or str(error)) from None
    return np.asarray(images.to_square(image, size, max_pixels, decoding)[0])


def _restore(workdir: pathlib.Path, shapes: update.State, step: str | int) -> tuple[update.State, dict[str, Any]]:
    """The merged state of a checkpoint, and its meta; for `step` see `Predictor`."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what a reader without devices leaves out
    try:
        with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
            known = checkpoints.steps()
            require(known, f"{workdir} has no checkpoint yet.")
            if step == "best" and (best := checkpoints.restore_best(shapes)):
                return best[1:]
            if step in ("best", "latest"):
                latest = checkpoints.restore_latest(shapes)
                require(latest, f"{workdir} has no checkpoint just now: its run replaces the only one.")
                return latest
            number = int(step) if str(step).isdecimal() else None
            at_hand = ", ".join(map(str, known))
            sentence = (
                f"step={shown(step)} of {workdir}: it is best, latest, or a step that has a checkpoint: {at_hand}."
            )
            require(number in known, sentence)
            return checkpoints.restore(number, shapes)
    finally:
        logging.set_verbosity(verbosity)


def _padded(count: int, devices: int) -> int:
    """The least power of two that is no less than `count`, or the least multiple of `devices` above it."""
    power = 1 << (count - 1).bit_length()
    return -(-power // devices) * devices


def _rows(count: int, result: Any) -> Iterator[Any]:
    """The first `count` rows of a tree of sharded arrays, each as a tree of NumPy arrays."""
    whole = jax.tree.map(lambda leaf: np.concatenate(addressable(leaf)), result)
    for row in range(count):
        yield jax.tree.map(lambda leaf, row=row: leaf[row], whole)


if __name__ == "__main__":
    exits.fail("This file is no command; `python -m tools.predict --workdir=FOLDER PHOTO …` predicts.")
