"""Exact evaluation: every example once, from the centre view or from the paper's ten.

The devices get whole records and cut the views themselves, so each image crosses to them once.
"""

import collections
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parallel import Layout, first

VIEWS = ("centre", "ten")


class Stopped(Exception):
    """A signal asked to stop, and all processes of the run have agreed on it; `code` is the exit code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def center(image: Any, size: int) -> Any:
    """The central size×size part of (…, S, S, 3) images; the odd pixel of a margin falls to the right and bottom."""
    top = (image.shape[-3] - size) // 2
    left = (image.shape[-2] - size) // 2
    return image[..., top : top + size, left : left + size, :]


def offsets(image_size: int, crop: int, views: str) -> list[tuple[int, int]]:
    """Where the views begin, as (top, left): the centre, and for 'ten' the four corners too (paper, section 4.1)."""
    margin = image_size - crop
    middle = (margin // 2, margin // 2)
    if views == "centre":
        return [middle]
    return [(0, 0), (0, margin), (margin, 0), (margin, margin), middle]


def build(network, layout: Layout, mean_image: np.ndarray, input: Any, views: str):
    """Builds the function that evaluates one batch on all devices.

    Args:
      network: module that maps (N, crop, crop, 3) images to logits.
      mean_image: (S, S, 3) float32; its central crop is subtracted from every view, as in the source of 2012.
      input: a config's `input` section; `crop` is the side of a view, `scale` multiplies the pixels.
      views: 'centre', or 'ten' for the mean of the softmax over corners, centre and their reflections.

    Returns:
      A function of (sharded parameters, sharded batch, stop) giving sums over the real examples of the global batch:
      'loss', 'top1' and 'top5' (errors), 'examples', and per class 'class_examples' and 'class_errors'; and 'stop', the
      largest of the processes' numbers of that name.
    """
    crop = input.crop
    mean = center(mean_image, crop)
    places = np.array(offsets(mean_image.shape[0], crop, views))

    def probabilities(params, images, place):
        view = jax.lax.dynamic_slice(images, (0, place[0], place[1], 0), (images.shape[0], crop, crop, 3))
        view = (view.astype(jnp.float32) - mean) * input.scale
        sides = (view, view[:, :, ::-1]) if views == "ten" else (view,)
        return jnp.stack([jax.nn.softmax(network.apply({"params": params}, side)) for side in sides]).mean(0)

    def step(params, batch, stop):
        batch = layout.gather_rows(batch)
        # View after view: all ten at once would need ten times the memory.
        softmax = jax.lax.map(functools.partial(probabilities, params, batch["image"]), places).mean(0)
        classes = softmax.shape[-1]
        label = jax.nn.one_hot(batch["label"], classes)
        right = jnp.sum(softmax * label, -1)
        # An equal or not-a-number rival counts against the network, so that constant outputs are never right.
        rivals = jnp.sum(~(softmax < right[:, None]), -1) - 1
        mask = batch["mask"]
        wrong = jnp.where(rivals >= 1, mask, 0)
        loss = -jnp.log(jnp.maximum(right, jnp.finfo(jnp.float32).tiny))
        sums = {
            "loss": jnp.sum(jnp.where(mask > 0, loss, 0)),
            "top1": jnp.sum(wrong),
            "top5": jnp.sum(jnp.where(rivals >= min(5, classes), mask, 0)),
            "examples": jnp.sum(mask),
            "class_examples": mask @ label,
            "class_errors": wrong @ label,
        }
        return layout.sum(sums) | {"stop": layout.largest(stop)}

    return layout.map(step, broadcast=(2,))


def run(
    step, params: Any, batches: Iterable[Any], layout: Layout, stop: Callable[[], int] = lambda: 0
) -> dict[str, float]:
    """Evaluates all batches and divides once.

    Args:
      step: what `build` returned.
      params: sharded parameters.
      batches: host batches with 'image', 'label' and 'mask'.
      stop: asked before each batch for an exit code; one that is not 0 in any process ends the evaluation in all.

    Returns:
      'loss' (nats an example), 'top1_error', 'top5_error' and 'mean_class_accuracy' (over classes that have examples).

    Raises:
      Stopped: as `stop` asked.
    """
    total, under_way = {}, collections.deque()

    def take_in(at_most):
        # Never far behind: batches that wait on the devices would fill their memory.
        while len(under_way) > at_most:
            for name, value in first(under_way.popleft()).items():
                total[name] = total.get(name, 0) + value.astype(np.float64)

    for batch in layout.prefetch(batches):
        under_way.append(step(params, batch, np.float32(stop())))
        take_in(at_most=1)
        if total.get("stop"):
            raise Stopped(int(total["stop"]))
    take_in(at_most=0)
    examples, seen = total["examples"], total["class_examples"] > 0
    accuracy = 1 - total["class_errors"][seen] / total["class_examples"][seen]
    return {
        "loss": float(total["loss"] / examples),
        "top1_error": float(total["top1"] / examples),
        "top5_error": float(total["top5"] / examples),
        "mean_class_accuracy": float(np.mean(accuracy)),
    }
