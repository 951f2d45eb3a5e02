"""One update: the state that it changes, its first value, and the function that computes it on all devices.

Needs JAX, Flax and Optax alone, so that a step can be measured where nothing else is installed.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import evaluate
import models
import parallel


@flax.struct.dataclass
class State:
    """What an update changes: the number of updates done, parameters, and the optimizer's velocity."""

    step: Any
    params: Any
    opt_state: Any


def build_network(config, layout: parallel.Layout | None = None):
    """The network of a config: as merged trees hold it, or as a device of `layout` sees it."""
    placement = layout.towers(config.model.towers) if layout else None
    return models.build(config.model, placement, config.input.crop)


def init_state(config, rule: optax.GradientTransformation) -> State:
    """The merged state before the first update, a function of `config.seed` alone."""
    network = build_network(config)

    def init(key):
        images = jnp.zeros((1, config.input.crop, config.input.crop, 3))
        params = network.init(key, images)["params"]
        return State(step=jnp.int32(0), params=params, opt_state=rule.init(params))

    return jax.jit(init)(jax.random.key(config.seed))


def build_step(config, layout: parallel.Layout, rule: optax.GradientTransformation, mean_image: np.ndarray):
    """Builds the update on all devices.

    Args:
      rule: of `optimizer.build`.
      mean_image: (S, S, 3) float32; its central crop is subtracted from every view, as in the source of 2012.

    Returns:
      A function of (sharded state, sharded batch, rate factor, stop) giving (the next state, values): 'loss' and
      'top1_error', means over the global batch, and 'stop', the largest of the processes' numbers of that name. It
      consumes the state.
    """
    network = build_network(config, layout)
    mean = evaluate.center(mean_image, config.input.crop)

    def step(state, batch, rate_factor, stop):
        batch = layout.gather_rows(batch)
        images = batch["image"].astype(jnp.float32) - mean + batch["shift"][:, None, None, :]
        images = images * batch["gain"][:, None, None, None]
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def loss_of(params):
            logits = network.apply(
                {"params": params},
                images,
                train=True,
                rows=layout.row_numbers(len(images)),
                rngs={"dropout": key},
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
            top1_error = jnp.mean(jnp.argmax(logits, -1) != batch["label"])
            # Both devices of a network compute this loss, and the transpose of the exchange adds their gradients up.
            return loss / layout.devices_per_network, {"loss": loss, "top1_error": top1_error}

        gradients, values = jax.grad(loss_of, has_aux=True)(state.params)
        gradients, values = layout.mean((gradients, values))

        def update(gradients, opt_state, params):
            rest = dict(step=state.step, rate_factor=rate_factor)
            updates, opt_state = rule.update(gradients, opt_state, params, **rest)
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = layout.in_place(update)(gradients, state.opt_state, state.params)
        values["stop"] = layout.largest(stop)
        return State(step=state.step + 1, params=params, opt_state=opt_state), values

    return layout.map(step, donate=(0,), broadcast=(2, 3))
