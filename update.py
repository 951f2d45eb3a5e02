"""One update: the state that it changes, its first value, and the function that computes it on all devices."""

import math
from collections.abc import Callable
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
    """What an update changes: the number of updates done, the parameters, and the optimizer's velocity and average."""

    step: Any
    params: Any
    opt_state: Any

    @property
    def evaluated(self) -> Any:
        """The parameters that are evaluated and used: their average over the updates, if the optimizer has one."""
        averages = [part.params for part in self.opt_state if isinstance(part, optimizer.Average)]
        return averages[0] if averages else self.params


def build_network(config, layout: parallel.Layout | None = None):
    """The network of a config: as merged trees hold it, or as a device of `layout` sees it."""
    placement = layout.towers(config.model.towers) if layout else None
    return models.build(config.model, placement, config.input.crop)


def local_network(config):
    """The network of a config with all towers on one device of JAX's own platform, whatever a layout would do."""
    towers, cores = config.model.towers, int(jax.default_backend() == "cpu")
    return models.build(config.model, parallel.Towers(towers, towers, cores=cores), config.input.crop)


def init_state(config) -> State:
    """The merged state before the first update, a function of `config.seed` alone."""
    network = build_network(config)

    def init(key):
        images = jnp.zeros((1, config.input.crop, config.input.crop, 3))
        return begin(config, network.init(key, images)["params"])

    return jax.jit(init)(jax.random.key(config.seed))


def begin(config, params: Any) -> State:
    """The merged state before the first update of these parameters."""
    return State(step=jnp.int32(0), params=params, opt_state=optimizer.build(config).init(params))


def build_step(config, layout: parallel.Layout, mean_image: np.ndarray, rates: optimizer.Rates):
    """Builds the update on all devices.

    Args:
      mean_image: (S, S, 3) float32; see `views.to_input`.
      rates: the learning rate of every parameter at every step.

    Returns:
      A function of (sharded state, sharded batch, rate factor, measure) that gives (the next state, values, measured).
      The batch is one of `input_pipeline.train_batches`; all rates are multiplied by the rate factor, a float32 scalar.
      The values are 'loss' and 'top1_error', means over the global batch, by the labels alone, of images as the
      network saw them; with mixup, by the label of the image with the greater share. If `measure`, a bool, is true,
      `measurements` can read what was measured on each device: 'gradients', {layer: sum of squares of its part of the
      gradient of kernel and bias}, and 'dead_units', {layer: share of activations that are 0}. The function consumes
      the state.
    """
    network, rule, factor = build_network(config, layout), optimizer.build(config), views.factors(config.input)

    def step(state, batch, rate_factor, measure):
        batch = layout.gather_rows(batch)
        images = views.to_input(batch["image"], mean_image, factor, batch["shift"], batch["gain"])
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        rows = layout.row_numbers(len(images))
        _, mixing = jax.random.split(key)  # dropout derives its keys from `key` in another way
        mixture = mixture_of(config.mixup, mixing, rows) if config.mixup else None
        images = images if mixture is None else mixture(images)

        def loss_of(params):
            logits, activations = models.activations(
                network,
                params,
                images,
                train=True,
                rows=rows,
                rngs={"dropout": key},
            )
            activations.popitem()  # the logits
            with jax.named_scope("loss"):
                # What is recorded can be compared with an evaluation, whose targets are neither smoothed nor mixed, as
                # far as dropout and the views allow. With mixup the images are mixed, and both errors much higher.
                loss, target = cross_entropy(logits, batch["label"], config.label_smoothing)
                if mixture is not None:
                    target = mixture(target, cross_entropy(logits, swapped(batch["label"]), config.label_smoothing)[1])
                top1_error = jnp.mean(jnp.argmax(logits, -1) != batch["label"])
                loss, target = jnp.mean(loss), jnp.mean(target)
            # Both devices of a network compute this loss, and the transpose of the exchange adds their gradients up.
            return target / layout.devices_per_network, ({"loss": loss, "top1_error": top1_error}, activations)

        gradients, (values, activations) = jax.grad(loss_of, has_aux=True)(state.params)
        gradients, values = layout.mean((gradients, values))
        with jax.named_scope("measure"):
            measured = {
                # Not under a condition: that would copy the gradients, while a sum reads them in passing.
                "gradients": {layer: sum(map(_square, leaves.values())) for layer, leaves in gradients.items()},
                "dead_units": {
                    layer: jax.lax.cond(measure, lambda x: jnp.mean(x == 0), lambda x: jnp.float32(0), maps)
                    for layer, maps in activations.items()
                },
            }

        @jax.named_scope("update")
        def update(gradients, opt_state, params):
            updates, opt_state = rule.update(
                gradients, opt_state, params, rates=rates.tree(params, state.step, rate_factor), step=state.step
            )
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = layout.in_place(update)(gradients, state.opt_state, state.params)
        return State(step=state.step + 1, params=params, opt_state=opt_state), values, measured

    return layout.map(step, donate=(0,), broadcast=(2, 3))


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> tuple[jax.Array, jax.Array]:
    """The cross-entropy of each example in nats, by its label and by its smoothed target.

    Args:
      logits, labels: (N, classes) and (N,).
      smoothing: the share of the target that all classes get alike, the label among them (Szegedy et al. 2016).

    Returns:
      Both, (N,). They are the same array without smoothing.
    """
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return loss, loss
    of_all = jax.nn.logsumexp(logits, -1) - logits.mean(-1)
    return loss, (1 - smoothing) * loss + smoothing * of_all


def mixture_of(alpha: float, key: jax.Array, rows: jax.Array) -> Callable:
    """Mixup (Zhang et al. 2018): each row of a batch is mixed with its neighbour, of rows 0 and 1, 2 and 3, …

    Args:
      alpha: of the symmetric beta distribution of the shares. The greater share goes to the row itself, so that its
        label is the main one. Neighbours are random, so the expectation of the gradient stays what it is without this.
      key: of the step.
      rows: (N,) their numbers in the global batch, N even; the same row gets the same share in every layout.

    Returns:
      A function of (N, …) values of the rows, and those of their neighbours if they are not the values `swapped`.
    """
    share = jax.vmap(lambda row: jax.random.beta(jax.random.fold_in(key, row), alpha, alpha))(rows)
    share = jnp.maximum(share, 1 - share)

    def mixed(values, others=None):
        own = share.reshape(-1, *[1] * (values.ndim - 1))
        return own * values + (1 - own) * (swapped(values) if others is None else others)

    return mixed


def swapped(values: jax.Array) -> jax.Array:
    """The rows of (N, …) values, N even, with neighbours changed: 1, 0, 3, 2, …"""
    return values.reshape(-1, 2, *values.shape[1:])[:, ::-1].reshape(values.shape)


def build_weigh(layout: parallel.Layout):
    """Builds what measures a state after its update.

    Returns:
      A function of a sharded state. For each device it gives 'updates' and 'kernels', {layer: sum of squares}, of this
      device's part of the layer's kernel. The last update is the velocity, which only the paper's rule has. With
      another rule the function gives {}.
    """

    def weigh(state):
        velocity = optax.tree_utils.tree_get(state.opt_state, "trace")
        if velocity is None:
            return {}
        return {
            "updates": {layer: _square(leaves["kernel"]) for layer, leaves in velocity.items()},
            "kernels": {layer: _square(leaves["kernel"]) for layer, leaves in state.params.items()},
        }

    return layout.map(weigh)


def measurements(measured: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Metrics of the last step, of what `build_step` and `build_weigh` measured.

    Args:
      measured: {kind: {layer: the value of each device of one network}}.

    Returns:
      'gradient_norm', the L2 norm of all gradients; 'update_to_weight/LAYER', the L2 norm of the update of a kernel by
      that of the kernel after it; 'dead_units/LAYER', the share of activations that are 0.
    """
    total = {kind: {layer: math.fsum(parts) for layer, parts in of.items()} for kind, of in measured.items()}
    values = {"gradient_norm": math.sqrt(math.fsum(total["gradients"].values()))}
    for layer, kernel in total.get("kernels", {}).items():
        values[f"update_to_weight/{layer}"] = math.sqrt(total["updates"][layer] / kernel) if kernel else math.nan
    for layer, shares in measured["dead_units"].items():
        values[f"dead_units/{layer}"] = math.fsum(shares) / len(shares)
    return values


def _square(array: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(array))
