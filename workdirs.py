"""The config in a run's folder: written once, compared at every start, and read by the tools."""

import json
import pathlib
from typing import Any

import ml_collections

from errors import UserError

# A run may be continued with other values of these; every other difference makes it another run.
CONTINUABLE = (
    "num_epochs",
    "num_steps",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "eval_batch_size",
    "dataset.data_dir",
    "input.threads",
    "parallel",
)


def to_json(config) -> dict[str, Any]:
    """A config as JSON stores it, with lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))


def read_config(workdir: str | pathlib.Path) -> ml_collections.ConfigDict:
    """The config of a workdir.

    Raises:
      UserError: there is none.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        return ml_collections.ConfigDict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{workdir} is not the workdir of a run: it has no config.json.") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}.") from None


def check(config, workdir: pathlib.Path) -> None:
    """Refuses a workdir that belongs to another config, and names the fields; raises `UserError`."""
    if not (workdir / "config.json").exists():
        return
    before, now = _flat(to_json(read_config(workdir))), _flat(to_json(config))
    differ = [
        f"{name} ({before.get(name, 'absent')!r} there, {now.get(name, 'absent')!r} here)"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(CONTINUABLE)
    ]
    if differ:
        raise UserError(
            f"{workdir} is the run of another config; take a new --workdir. Different: {'; '.join(differ)}."
        )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def write_config(config, workdir: pathlib.Path) -> None:
    """Writes config.json, whole or not at all."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        partial = workdir / "config.json.tmp"
        partial.write_text(json.dumps(to_json(config), indent=2) + "\n")
        partial.replace(workdir / "config.json")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}.") from None
