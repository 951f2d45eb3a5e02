"""Which configs can work, and their durations in steps. `configs/base.py` has the fields and their types."""

import dataclasses
from typing import Any

import ml_collections

import input_pipeline
import models
import optimizer
from common.errors import check_ranges, check_type, nearest, require, shown
from configs import base
from datasets import opening

CADENCES = ("log_every", "eval_every", "checkpoint_every")


def validate(config) -> None:
    """Refuses a config that cannot work, before anything is read or written; raises `UserError`."""
    _check_fields(config, base.get_config())
    bounds = {
        "batch_size": (1, 1 << 20),
        "eval_batch_size": (1, 1 << 20),
        "num_epochs": (0, 1e6),
        "num_steps": (0, optimizer.MAX_STEPS),
        "mixup": (0, 100),
        "label_smoothing": (0, 0.99),
        "seed": (0, (1 << 31) - 1),
    }
    check_ranges(config, bounds)
    require(
        config.num_steps or config.num_epochs, "num_epochs and num_steps are both 0: one must say how long to train."
    )
    for field in CADENCES:
        check_ranges(config[field], {"epochs": (0, 1e6), "steps": (0, optimizer.MAX_STEPS)}, f"{field}.")
    check_ranges(config.parallel, {"devices_per_network": (0, 2)}, "parallel.")
    input_pipeline.validate(config.input)
    opening.validate(config.dataset)
    models.build(config.model, None, config.input.crop)
    optimizer.validate(config)


def _check_fields(config, like, section: str = "") -> None:
    """Refuses a config that lacks a field of `like`, has others, or has other types; raises `UserError`."""
    # A network has fields of its own, which `models.build` checks.
    for name in () if section == "model." else config:
        require(name in like, f"The config's {section}{name} is no known field: {nearest(name, like)}")
    for name, default in like.items():
        field = section + name
        require(name in config, f"The config has no field {field}; configs/base.py has all fields.")
        value = config[name]
        if not isinstance(default, ml_collections.ConfigDict):
            check_type(field, value, type(default))
            continue
        parts = ", ".join(default)
        require(isinstance(value, ml_collections.ConfigDict), f"{field}={shown(value)} must be a section with {parts}.")
        _check_fields(value, default, f"{field}.")


def completed(config: dict[str, Any], like: dict[str, Any] | None = None) -> dict[str, Any]:
    """A stored config with the neutral values of fields that are newer than it."""
    like = base.get_config().to_dict() if like is None else like
    complete = {name: completed({}, value) if isinstance(value, dict) else value for name, value in like.items()}
    for name, value in config.items():
        both = isinstance(value, dict) and isinstance(like.get(name), dict)
        complete[name] = completed(value, like[name]) if both else value
    return complete


@dataclasses.dataclass(frozen=True)
class Durations:
    """A config's durations in steps; 0 is never but after the last step."""

    steps_per_epoch: float
    num_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int

    @classmethod
    def of(cls, config, num_examples: int) -> "Durations":
        """Converts the epochs of `config` for a training split of `num_examples`.

        Raises:
          UserError: more steps than can be counted.
        """
        steps_per_epoch = num_examples / config.batch_size

        def steps(count, epochs, field):
            found = count or (max(1, round(epochs * steps_per_epoch)) if epochs else 0)
            sentence = f"{field}={epochs} makes {found:,} steps of batch_size={config.batch_size}, too many to count."
            require(found <= optimizer.MAX_STEPS, sentence)
            return found

        every = {name: steps(config[name].steps, config[name].epochs, f"{name}.epochs") for name in CADENCES}
        return cls(steps_per_epoch, steps(config.num_steps, config.num_epochs, "num_epochs"), **every)

    def due(self, every: int, step: int) -> bool:
        """Whether an action with this period is due after update number `step`. After the last update it always is."""
        return step == self.num_steps or (every > 0 and step % every == 0)
