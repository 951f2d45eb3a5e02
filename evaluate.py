"""Exact evaluation: every example once, from the centre view or from the paper's ten.

The devices get whole records and cut the views themselves, so that each image crosses to them once for each network.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import views
from common import exits
from models import ops
from parallel import UNDER_WAY, Layout, first


def probabilities(network, mean_image: np.ndarray, options: Any, which: str):
    """Builds the function that gives the probabilities of the classes for whole records.

    Args:
      network: module that maps (N, crop, crop, 3) images to logits.
      mean_image: (S, S, 3) float32; see `views.to_input`.
      options: a config's `input` section; its `crop`, `scale` and `channel_std` are used.
      which: 'centre', or 'ten' for the mean of the softmax over corners, centre and their reflections.

    Returns:
      A function of (parameters, (N, S, S, 3) uint8 images) that gives (N, classes) float32.
    """
    places, factor = views.offsets(mean_image.shape[0], options.crop, which), views.factors(options)

    def of_place(params, images, place):
        view = views.to_input(views.cut(images, place, options.crop), mean_image, factor)
        sides = (view, view[:, :, ::-1]) if which == "ten" else (view,)
        return jnp.stack([ops.softmax(network.apply({"params": params}, side)) for side in sides]).mean(0)

    def of_images(params, images):
        # One view after the other: all ten at once would need ten times the memory.
        return jax.lax.map(functools.partial(of_place, params, images), places).mean(0)

    return of_images


def build(network, layout: Layout, mean_image: np.ndarray, options: Any, which: str, confusion: bool = False):
    """Builds the function that evaluates one batch on all devices; for its arguments see also `probabilities`.

    Args:
      confusion: whether to count the predictions of every class as well.

    Returns:
      A function of (sharded parameters, sharded batch) that gives sums over the real examples of the global batch:
      'loss', 'top1' and 'top5' (errors), 'examples', per class 'class_examples' and 'class_errors', and with
      `confusion` the (true class, predicted class) matrix 'confusion'.
    """
    softmax_of = probabilities(network, mean_image, options, which)

    def step(params, batch):
        batch = layout.gather_rows(batch)
        return layout.sum(sums(softmax_of(params, batch["image"]), batch["label"], batch["mask"], confusion))

    return layout.map(step)


def sums(softmax, label, mask, confusion: bool) -> dict[str, Any]:
    """What a batch adds to the sums that `build` names; `softmax` is (N, classes), `label` and `mask` (N,)."""
    classes = softmax.shape[-1]
    label = jax.nn.one_hot(label, classes)
    right = jnp.sum(softmax * label, -1)
    # A rival that is equal or not a number counts against the network, so that constant outputs are never right.
    rivals = jnp.sum(~(softmax < right[:, None]), -1) - 1
    wrong = jnp.where(rivals >= 1, mask, 0)
    loss = -jnp.log(jnp.maximum(right, jnp.finfo(jnp.float32).tiny))
    found = {
        "loss": jnp.sum(jnp.where(mask > 0, loss, 0)),
        "top1": jnp.sum(wrong),
        "top5": jnp.sum(jnp.where(rivals >= min(5, classes), mask, 0)),
        "examples": jnp.sum(mask),
        "class_examples": mask @ label,
        "class_errors": wrong @ label,
    }
    if confusion:
        # If an example is wrong, its prediction is another class, even where that one is only as probable.
        other = jax.nn.one_hot(jnp.argmax(jnp.where(label > 0, -1.0, softmax), -1), classes)
        predicted = jnp.where(wrong[:, None] > 0, other, label)
        found["confusion"] = (label * mask[:, None]).T @ predicted
    return found


def run(
    step, params: Any, batches: Iterable[Any], layout: Layout, after_batch: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Evaluates all batches and divides once: `errors` of `totals`."""
    return errors(totals(step, params, batches, layout, after_batch))


def totals(
    step, params: Any, batches: Iterable[Any], layout: Layout, after_batch: Callable[[], None] = lambda: None
) -> dict[str, np.ndarray]:
    """The sums over all batches, in float64; {} if there is none.

    Args:
      step: what `build` returned.
      params: sharded parameters.
      batches: host batches with 'image', 'label' and 'mask'.
      after_batch: called after each batch is dispatched; what it raises ends the evaluation.
    """
    total, under_way = {}, collections.deque()

    def take_in(at_most):
        # Never far behind: batches that wait on the devices would fill their memory.
        while len(under_way) > at_most:
            _add(total, first(under_way.popleft()))

    for batch in layout.prefetch(batches):
        under_way.append(step(params, batch))
        after_batch()
        take_in(at_most=UNDER_WAY)
    take_in(at_most=0)
    return total


def totals_of_mean(networks: Sequence[Any], batches: Iterable[Any]) -> dict[str, np.ndarray]:
    """The sums over all batches for the mean of the networks' probabilities (section 6), with 'confusion'.

    Args:
      networks: `predictor.Predictor`s of the same classes and the same size of records.
      batches: see `totals`.
    """
    batches, *streams = itertools.tee(batches, 1 + len(networks))
    # One generator a network over all images, so that the next batches are under way while one is summed up.
    answers = [
        network.probabilities(image for batch in stream for image in batch["image"])
        for network, stream in zip(networks, streams, strict=True)
    ]
    summed, total = jax.jit(functools.partial(sums, confusion=True)), {}
    for batch in batches:
        mean = np.mean([list(itertools.islice(answer, len(batch["image"]))) for answer in answers], axis=0)
        _add(total, jax.device_get(summed(mean, batch["label"], batch["mask"])))
    return total


def _add(total: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
    for name, value in found.items():
        total[name] = total.get(name, 0) + value.astype(np.float64)


def errors(total: dict[str, np.ndarray]) -> dict[str, float]:
    """What `totals` says of each example.

    Returns:
      'loss' (nats an example), 'top1_error', 'top5_error' and 'mean_class_accuracy' (over classes that have examples).
    """
    examples, seen = total["examples"], total["class_examples"] > 0
    accuracy = 1 - total["class_errors"][seen] / total["class_examples"][seen]
    return {
        "loss": float(total["loss"] / examples),
        "top1_error": float(total["top1"] / examples),
        "top5_error": float(total["top5"] / examples),
        "mean_class_accuracy": float(np.mean(accuracy)),
    }


if __name__ == "__main__":
    exits.fail("This file is no command; `python -m tools.evaluate --workdir=FOLDER` evaluates.")
