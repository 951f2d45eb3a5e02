"""One update: the state that it changes, its first value, and the function that computes it on all devices."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import models
import optimizer
import parallel
import views


@flax.struct.dataclass
class State:
    """What an update changes: the number of updates done, the parameters, and the optimizer's velocity."""

    step: Any
    params: Any
    opt_state: Any


def build_network(config, layout: parallel.Layout | None = None):
    """The network of a config: as merged trees hold it, or as a device of `layout` sees it."""
    placement = layout.towers(config.model.towers) if layout else None
    return models.build(config.model, placement, config.input.crop)


def init_state(config) -> State:
    """The merged state before the first update, a function of `config.seed` alone."""
    network, rule = build_network(config), optimizer.build(config)

    def init(key):
        images = jnp.zeros((1, config.input.crop, config.input.crop, 3))
        params = network.init(key, images)["params"]
        return State(step=jnp.int32(0), params=params, opt_state=rule.init(params))

    return jax.jit(init)(jax.random.key(config.seed))


def build_step(config, layout: parallel.Layout, mean_image: np.ndarray, rates: optimizer.Rates):
    """Builds the update on all devices.

    Args:
      mean_image: (S, S, 3) float32; see `views.to_input`.
      rates: the learning rate of every parameter at every step.

    Returns:
      A function of (sharded state, sharded batch, rate factor) that gives (the next state, values). The batch is one of
      `input_pipeline.train_batches`; all rates are multiplied by the rate factor, a float32 scalar; the values are
      'loss' and 'top1_error', means over the global batch. The function consumes the state.
    """
    network, rule = build_network(config, layout), optimizer.build(config)

    def step(state, batch, rate_factor):
        batch = layout.gather_rows(batch)
        images = views.to_input(batch["image"], mean_image, config.input.scale, batch["shift"], batch["gain"])
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
            updates, opt_state = rule.update(
                gradients, opt_state, params, rates=rates.tree(params, state.step, rate_factor)
            )
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = layout.in_place(update)(gradients, state.opt_state, state.params)
        return State(step=state.step + 1, params=params, opt_state=opt_state), values

    return layout.map(step, donate=(0,), broadcast=(2,))
