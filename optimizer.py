"""The paper's update rule (section 5) and the schedules of its learning rate, in Optax.

    v ← momentum · v − weight_decay · ε · w − ε · g        w ← w + v

The rate ε is *inside* the velocity, so after a change of ε the old velocity fades out; optimizers that keep ε outside
rescale it at once. Decay acts on kernels only, as in the source of 2012; a layer can have its own.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.errors import check_name, check_ranges, nearest, require, shown

OPTIMIZERS = ("sgd", "adam")
# Updates are counted in an int32.
MAX_STEPS = (1 << 31) - 1


# Schedules. To add one: a function here, its name in SCHEDULES, and its fields in configs/base.py.


def _constant(rate, options, **_):
    return optax.constant_schedule(rate)


def _steps(rate, options, steps_per_epoch, **_):
    return _piecewise(rate, options.factors, steps_per_epoch)


def _cosine(rate, options, steps_per_epoch, num_steps):
    warmup = to_steps(options.warmup, steps_per_epoch)
    decay = optax.cosine_decay_schedule(rate, max(1, num_steps - warmup))
    return optax.join_schedules([optax.constant_schedule(rate), decay], [warmup])


# With 'plateau' the schedule is constant: `Plateau` lowers the rate by what it sees of the validation error.
SCHEDULES = {"constant": _constant, "steps": _steps, "cosine": _cosine, "plateau": _constant}


def schedule(config, steps_per_epoch: float) -> optax.Schedule:
    """The learning rate at a step: an Optax schedule, made from a config's sections `optimizer` and `schedule`.

    `schedule.name` is 'constant'; 'steps', which multiplies the rate by the last factor of `schedule.factors`,
    ((epoch, factor), …), whose epoch has begun; 'cosine', which falls to 0 at the end of the run; or 'plateau'.
    During the first `schedule.warmup` epochs the rate also grows linearly. A run that is extended later takes the rates
    of the longer run from there on.
    """
    options, rate = config.schedule, config.optimizer.learning_rate
    num_steps = config.num_steps or to_steps(config.num_epochs, steps_per_epoch)
    main = SCHEDULES[options.name](rate, options, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
    warmup = to_steps(options.warmup, steps_per_epoch)
    if not warmup:
        return main
    return lambda step: jnp.minimum(1.0, (step + 1) / warmup) * main(step)


def to_steps(epochs: float, steps_per_epoch: float) -> int:
    """Epochs as a whole number of steps."""
    return min(round(epochs * steps_per_epoch), MAX_STEPS)


def _piecewise(value: float, factors, steps_per_epoch: float) -> optax.Schedule:
    # Multiplied in float32, as the step does; a float64 product that is rounded afterwards can differ in its last bit.
    values = [np.float32(value), *(np.float32(value) * np.float32(factor) for _, factor in factors)]
    return optax.join_schedules(
        [optax.constant_schedule(v) for v in values], [to_steps(epoch, steps_per_epoch) for epoch, _ in factors]
    )


class Rates:
    """The learning rate of every parameter at every step.

    It is the `schedule`, times `optimizer.bias_rate` for biases, times every factor of `schedule.layers` that applies:
    ((name, ((epoch, factor), …)), …), where a name is a layer ('conv1'), a kind ('kernel' or 'bias') or both
    ('conv1/bias'). At a factor of 0 the velocity of a layer fades out, and the layer then stands still.
    """

    def __init__(self, config, steps_per_epoch: float):
        self._schedule = schedule(config, steps_per_epoch)
        self._bias_rate = config.optimizer.bias_rate
        self._decayed = tuple(dict(config.optimizer.layer_decay))
        self._factors = {name: _piecewise(1.0, factors, steps_per_epoch) for name, factors in config.schedule.layers}

    def check(self, params: Mapping[str, Any]) -> None:
        """Raises `UserError` if the config names a layer that `params`, {layer: {kind: …}}, does not have."""
        known = {"kernel", "bias", *params, *(f"{layer}/{kind}" for layer in params for kind in params[layer])}
        for name in self._factors:
            require(name in known, f"schedule.layers names {name!r}, which is not there: {nearest(name, known)}")
        for name in self._decayed:
            require(name in params, f"optimizer.layer_decay names {name!r}, which is no layer: {nearest(name, params)}")

    def tree(self, params: Mapping[str, Any], step: jax.Array | int, rate_factor: jax.Array | float = 1.0) -> Any:
        """A tree of scalar rates with the structure of `params`; `rate_factor` multiplies them all."""
        common = self._schedule(step)

        def rate(path, _):
            layer, kind = path[0].key, path[-1].key
            found = common * (self._bias_rate if kind == "bias" else 1.0)
            for name in (layer, kind, f"{layer}/{kind}"):
                if name in self._factors:
                    found = found * self._factors[name](step)
            return found * rate_factor

        return jax.tree_util.tree_map_with_path(rate, params)


# The rule.


def build(config) -> optax.GradientTransformationExtraArgs:
    """The update rule of a config's `optimizer` section; its `update` also needs `rates`, a tree of `Rates.tree`.

    'sgd' is the paper's. 'adam' is AdamW with the same rates, for comparisons. With `optimizer.average` the state has
    an `Average` too, and `update` needs `step`, the number of updates before.
    """
    options = config.optimizer
    of_layers = dict(options.layer_decay)
    decay = [_decay(options.weight_decay, lambda layer: layer not in of_layers)]
    decay += [_decay(value, lambda layer, name=name: layer == name) for name, value in of_layers.items()]
    if options.name == "adam":
        parts = [optax.scale_by_adam(b1=options.momentum), *decay, _scale_by_rates()]
    else:
        parts = [*decay, _scale_by_rates(), optax.trace(options.momentum)]
    return optax.chain(*parts, *([_average(options.average)] if options.average else []))


def _decay(value: float, of_layer: Callable[[str], bool]) -> optax.GradientTransformation:
    """Weight decay of the kernels of some layers."""

    def mask(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key == "kernel" and of_layer(path[0].key), params
        )

    return optax.add_decayed_weights(value, mask)


def _scale_by_rates() -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, rates, **_):
        return jax.tree.map(lambda u, rate: -jnp.asarray(rate).astype(u.dtype) * u, updates, rates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


class Average(NamedTuple):
    """The exponential average of the parameters after each update.

    Those of an update count `optimizer.average` times as much as those of the next. The initial ones do not count
    (Kingma and Ba 2015, section 3, correct the bias of an average in this way).

    Attributes:
      params: a tree of the structure of the parameters.
    """

    params: Any


def _average(kept: float) -> optax.GradientTransformationExtraArgs:
    """Keeps an `Average`; its `update` also needs `step`, the number of updates before this one."""

    def update(updates, state, params, *, step, **_):
        # (1 − kept) / (1 − kept^(step + 1)), the share of the newest: 1 at first, then 1/2, and 1 − kept in the end.
        new = (1 - kept) / -jnp.expm1(math.log(kept) * (jnp.asarray(step, jnp.float32) + 1))
        average = jax.tree.map(lambda old, w, u: old + new * (w + u - old), state.params, params, updates)
        return updates, Average(average)

    return optax.GradientTransformationExtraArgs(Average, update)


class Plateau(NamedTuple):
    """The paper's rule for the rate, which its authors applied by hand: divide by 10 when validation error stalls.

    Attributes:
      best: lowest validation error so far.
      stalled: evaluations since then.
      reductions: how often the rate was divided.
    """

    best: float = math.inf
    stalled: int = 0
    reductions: int = 0

    def after(self, error: float, options) -> "Plateau":
        """The state after an evaluation; `options.patience` evaluations without a new best divide the rate."""
        if error < self.best:
            return self._replace(best=error, stalled=0)
        if self.stalled + 1 < options.patience or self.reductions == options.reductions:
            return self._replace(stalled=self.stalled + 1)
        return self._replace(stalled=0, reductions=self.reductions + 1)

    def rate_factor(self, options) -> float:
        """The factor of all rates; `options` is a config's `schedule` section."""
        return 0.1**self.reductions if options.name == "plateau" else 1.0


# Checks.


def validate(config) -> None:
    """Refuses values of the sections `optimizer` and `schedule` that cannot work; raises `UserError`."""
    options = config.schedule
    check_name("optimizer.name", config.optimizer.name, OPTIMIZERS)
    check_name("schedule.name", options.name, SCHEDULES)
    rates = {"learning_rate": (0, 1e3), "momentum": (0, 0.9999), "weight_decay": (0, 1e3), "bias_rate": (0, 1e3)}
    check_ranges(config.optimizer, rates | {"average": (0, 0.999999)}, "optimizer.")
    check_ranges(options, {"patience": (1, 1_000_000), "reductions": (1, 1_000_000), "warmup": (0, 1e6)}, "schedule.")
    steps, plateau = options.name == "steps", options.name == "plateau"
    require(steps or not options.factors, f"schedule.factors goes with schedule.name='steps', not {options.name!r}.")
    measured = config.eval_every.epochs or config.eval_every.steps
    require(measured or not plateau, "eval_every.epochs and eval_every.steps are both 0: a plateau needs evaluations.")
    short = config.num_steps or options.warmup < config.num_epochs
    require(short, f"schedule.warmup={options.warmup} must be less than num_epochs={config.num_epochs}.")
    _check_factors("schedule.factors", options.factors)
    decay = config.optimizer.layer_decay
    require(
        _by_name(decay) and all(_is_number(value) and 0 <= value <= 1e3 for _, value in decay),
        f"optimizer.layer_decay={shown(decay)} must be (layer, weight decay) pairs of different layers, such as "
        f"(('fc10', 1.0),) with its comma; a decay lies between 0 and 1e3.",
    )
    require(
        _by_name(options.layers),
        f"schedule.layers={shown(options.layers)} must be (layer, factors) pairs of different layers, such as "
        f"(('conv1', ((67.0, 0.0),)),) with its commas.",
    )
    for name, factors in options.layers:
        _check_factors(f"schedule.layers[{name!r}]", factors)


def _check_factors(field: str, factors: Any) -> None:
    pairs = isinstance(factors, list | tuple) and all(_is_pair(f) and all(map(_is_number, f)) for f in factors)
    in_range = pairs and all(0 <= epoch <= 1e6 and 0 <= factor <= 1e3 for epoch, factor in factors)
    require(
        in_range and list(factors) == sorted(factors, key=lambda pair: pair[0]),
        f"{field}={shown(factors)} must be (epoch, factor) pairs in order of the epochs, such as ((30.0, 0.1),) with "
        f"its comma; epochs lie between 0 and 1e6, factors between 0 and 1e3.",
    )


def _by_name(pairs: Any) -> bool:
    """Whether these are pairs of a name and something, no name twice."""
    fits = all(_is_pair(pair) and isinstance(pair[0], str) for pair in pairs)
    return fits and len(dict(pairs)) == len(pairs)


def _is_pair(value) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
