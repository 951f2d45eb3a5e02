"""The paper's update rule (section 5) and the schedules of its learning rate, in Optax.

    v ← momentum · v − weight_decay · ε · w − ε · g        w ← w + v

The rate ε is *inside* the velocity, so after a change of ε the old velocity fades out; optimizers that keep ε outside
rescale it at once. Decay acts on kernels only, as in the source of 2012.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from errors import UserError, check_name, check_ranges, nearest, shown

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("steps", "plateau")


class Rates:
    """The learning rate of every parameter at every step.

    Args:
      optimizer: config section with `learning_rate` and `bias_rate`, the biases' rate relative to the kernels'.
      schedule: config section. `factors`, ((epoch, factor), …), multiplies the learning rate by `factor` from that
        epoch on; `layers` gives a layer factors of its own, ((layer, ((epoch, factor), …)), …), which replace the
        common ones from their first epoch on. With a factor of 0 what velocity a layer has left fades out, and it
        then stands still.
      steps_per_epoch: to turn epochs into steps, once.
    """

    def __init__(self, optimizer, schedule, steps_per_epoch: float):
        self._rate = optimizer.learning_rate
        self._bias_rate = optimizer.bias_rate
        self._common = _steps(schedule.factors, steps_per_epoch)
        self._layers = {name: _steps(factors, steps_per_epoch) for name, factors in schedule.layers}

    def factor(self, step: jax.Array | int, layer: str | None = None) -> jax.Array:
        """What the learning rate is multiplied by at `step`, in general or for a layer."""
        factor = _value(self._common, step, 1.0)
        return _value(self._layers[layer], step, factor) if layer in self._layers else factor

    def tree(self, params: Any, step: jax.Array) -> Any:
        """A tree of scalar rates with the structure of `params`, {layer: {'kernel', 'bias'}}."""
        unknown = set(self._layers) - set(params)
        if unknown:
            name = sorted(unknown)[0]
            raise UserError(f"schedule.layers names {name!r}, which the network does not have: {nearest(name, params)}")

        def rate(path, _):
            layer, kind = path[0].key, path[-1].key
            return self._rate * (self._bias_rate if kind == "bias" else 1.0) * self.factor(step, layer)

        return jax.tree_util.tree_map_with_path(rate, params)


def _steps(factors, steps_per_epoch: float) -> tuple[tuple[int, float], ...]:
    # Beyond what an int32 counts no step comes.
    return tuple((min(round(epoch * steps_per_epoch), (1 << 31) - 1), float(factor)) for epoch, factor in factors)


def _value(pieces, step, before):
    """The last piece's factor that has begun by `step`, else `before`."""
    value = jnp.asarray(before, jnp.float32)
    for begin, factor in pieces:
        value = jnp.where(step >= begin, jnp.float32(factor), value)
    return value


def _scale_by_rates(rates: Rates) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params, *, step, rate_factor, **_):
        scaled = jax.tree.map(
            lambda u, rate: (-rate * rate_factor).astype(u.dtype) * u, updates, rates.tree(params, step)
        )
        return scaled, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def build(optimizer, rates: Rates) -> optax.GradientTransformationExtraArgs:
    """The update rule of a config's `optimizer` section.

    'sgd' is the paper's. 'adam' is AdamW with the same rates, for comparisons. `update` takes two more arguments:
    `step`, and `rate_factor`, by which `Plateau` lowers all rates.
    """
    decay = optax.add_decayed_weights(
        optimizer.weight_decay,
        mask=lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params),
    )
    if optimizer.name == "sgd":
        rule = (decay, _scale_by_rates(rates), optax.trace(optimizer.momentum))
    elif optimizer.name == "adam":
        rule = (optax.scale_by_adam(b1=optimizer.momentum), decay, _scale_by_rates(rates))
    else:
        raise UserError(f"optimizer.name={optimizer.name!r} is not known: {nearest(optimizer.name, OPTIMIZERS)}")
    return optax.chain(*rule)


class Plateau(NamedTuple):
    """The paper's rule for the rate, which its authors applied by hand: divide by 10 when validation error stalls.

    Attributes:
      best: lowest validation error so far.
      stalled: evaluations since then.
      reductions: how often the rate was divided.
    """

    best: float = float("inf")
    stalled: int = 0
    reductions: int = 0

    def after(self, error: float, schedule) -> "Plateau":
        """The state after an evaluation; `schedule.patience` evaluations without a new best divide the rate."""
        if error < self.best:
            return self._replace(best=error, stalled=0)
        if self.stalled + 1 < schedule.patience or self.reductions == schedule.reductions:
            return self._replace(stalled=self.stalled + 1)
        return self._replace(stalled=0, reductions=self.reductions + 1)

    def rate_factor(self, schedule) -> float:
        """What all rates are multiplied by."""
        return 0.1**self.reductions if schedule.name == "plateau" else 1.0


def validate(config) -> None:
    """Refuses values of the `optimizer` and `schedule` sections that cannot work; raises `UserError`."""
    optimizer, schedule = config.optimizer, config.schedule
    check_name("optimizer.name", optimizer.name, OPTIMIZERS)
    check_name("schedule.name", schedule.name, SCHEDULES)
    rates = {"learning_rate": (0, 1e3), "momentum": (0, 0.9999), "weight_decay": (0, 1e3), "bias_rate": (0, 1e3)}
    check_ranges(optimizer, rates, "optimizer.")
    check_ranges(schedule, {"patience": (1, 1_000_000), "reductions": (1, 1_000_000)}, "schedule.")
    if schedule.name == "plateau" and schedule.factors:
        raise UserError("schedule.factors goes with schedule.name='steps'; 'plateau' lowers the rate by itself.")
    if schedule.name == "plateau" and not (config.eval_every.epochs or config.eval_every.steps):
        raise UserError(
            "eval_every.epochs and eval_every.steps are both 0, so that no evaluation would ever lower the rate; give "
            "one of them, or take schedule.name='steps'."
        )
    if not all(_pair(pair) and isinstance(pair[0], str) for pair in schedule.layers):
        raise UserError(
            f"schedule.layers={shown(schedule.layers)} must be (layer, factors) pairs; write one as "
            f"(('conv1', ((67.0, 0.0),)),), with its commas."
        )
    layers = [name for name, _ in schedule.layers]
    if len(layers) != len(set(layers)):
        raise UserError(f"schedule.layers={shown(schedule.layers)} names a layer twice.")
    for name, factors in [("factors", schedule.factors), *((f"layers[{shown(n)}]", f) for n, f in schedule.layers)]:
        if not (isinstance(factors, list | tuple) and all(_pair(f) and all(map(_number, f)) for f in factors)):
            raise UserError(
                f"schedule.{name}={shown(factors)} must be (epoch, factor) pairs; write one as ((30.0, 0.1),), with "
                f"its comma."
            )
        epochs = [epoch for epoch, _ in factors]
        if epochs != sorted(epochs) or not all(0 <= e <= 1e6 and 0 <= f <= 1e3 for e, f in factors):
            raise UserError(
                f"schedule.{name}={shown(factors)} must be (epoch, factor) pairs in order of the epochs, which lie "
                f"between 0 and 1e6, the factors between 0 and 1e3."
            )


def _pair(value) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
