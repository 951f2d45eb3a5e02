"""The folder of a run, its config and what it needs of its data set: written at every start, and read by the tools."""

import contextlib
import fcntl
import json
import pathlib
import time
import zlib
from typing import IO, Any

import ml_collections
import numpy as np

from common import files
from common.errors import UserError, reason, require, shown
from datasets import prepared, statistics
from run import schema

# How long a start waits for the run before it, which may be saving after a signal.
SECONDS_TO_END = 30

# A run may go on with other values of these fields. Any other difference makes it another run.
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


def test_split(config) -> str:
    """The split of the errors at the end of a run."""
    return config.dataset.test_split or config.dataset.eval_split


def expanded(workdir: str | pathlib.Path, field: str = "--workdir") -> pathlib.Path:
    """The path of a workdir, with ~ as the user's home; raises `UserError`, which names `field`, if it is no path."""
    require(str(workdir), f"{field}= is empty; it names a folder.")
    path = files.expanded(workdir, field)
    try:
        str(path).encode()  # TensorBoard's files have names in UTF-8
    except UnicodeError as error:
        raise UserError(f"{field}={workdir} cannot be a path: {error}") from None
    return path


def read_config(workdir: str | pathlib.Path) -> ml_collections.ConfigDict:
    """The config of a workdir, with neutral values for fields that are newer than it.

    Raises:
      UserError: config.json is missing or damaged. Its values are not checked; see `schema.validate`.
    """
    return _config(_content(workdir), workdir)


def check(config, workdir: pathlib.Path) -> None:
    """Refuses a workdir that belongs to another config, and names the fields; raises `UserError`."""
    if not (workdir / "config.json").exists():
        return
    content = _content(workdir)
    theirs = _config(content, workdir)
    if differ := differences(to_json(theirs), to_json(config), CONTINUABLE, ("there", "here")):
        raise UserError(f"{workdir} is the run of another config; take a new --workdir. Different: {differ}.")
    # Factors of layers replaced the common ones before there were warm-ups; now they multiply.
    before = "warmup" not in content.get("schedule", {})
    if before and config.schedule.layers and config.schedule.factors:
        raise UserError(
            f"{workdir} was begun when schedule.layers replaced schedule.factors, and now they multiply; take a new "
            f"--workdir, or the version of this code that began it."
        )


def _content(workdir: str | pathlib.Path) -> dict[str, Any]:
    path = pathlib.Path(workdir) / "config.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir} is not the workdir of a run: it has no config.json.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no fields.")
    return content


def _config(content: dict[str, Any], workdir: str | pathlib.Path) -> ml_collections.ConfigDict:
    try:
        config = ml_collections.ConfigDict(schema.completed(content))
        to_json(config)  # fails for what JSON cannot store again
        model = content.get("model", {})
        changed = "label_smoothing" not in content and model.get("name") == "cifar" and model.get("lrn")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{pathlib.Path(workdir) / 'config.json'} is damaged: {str(error).rstrip('.')}.") from None
    if changed:
        raise UserError(
            f"{workdir} was begun when model.lrn of the network cifar normalised across maps, and now it normalises "
            f"within each map; use the version of this code that began it."
        )
    return config


def differences(one: dict[str, Any], other: dict[str, Any], but: tuple[str, ...], places: tuple[str, str]) -> str:
    """Names the fields, dotted, in which two trees of JSON differ, with both values; '' if they are equal.

    Args:
      but: names of fields that may differ; also of whole sections.
      places: words for where the two come from.
    """
    one, other = _flat(one), _flat(other)
    return "; ".join(
        f"{name} ({one.get(name, 'absent')!r} {places[0]}, {other.get(name, 'absent')!r} {places[1]})"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name) and not name.startswith(but)
    )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def lock(workdir: pathlib.Path) -> IO:
    """Makes the folder and locks it against other runs, until the returned file is closed or the process ends.

    Raises:
      UserError: the folder cannot be written, or another run still holds it after SECONDS_TO_END.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}.") from None
    for _ in range(SECONDS_TO_END):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(1)
        except OSError:  # a file system without locks
            return file
        else:
            return file
    file.close()
    raise UserError(f"--workdir={workdir} is in use by another run; wait for its end, or take another folder.")


def write_config(config, workdir: pathlib.Path) -> None:
    """Writes config.json, whole or not at all."""
    with files.replacing(workdir / "config.json") as partial:
        partial.write_text(json.dumps(to_json(config), indent=2) + "\n")


def check_dataset(records: prepared.Records, workdir: pathlib.Path) -> None:
    """Refuses a workdir whose run was begun on other classes, which it names, or other images; raises `UserError`."""
    stored = records
    with contextlib.suppress(UserError):  # it is missing, or damaged and replaced now
        stored = read_dataset(workdir)
    require(
        stored.directory.name,
        f"{workdir} holds the weights of another program; to train on, take a new --workdir with "
        f"--config.init_from={workdir}.",
    )
    begun, here = stored.class_names, records.class_names
    if begun != here:
        only_there, only_here = sorted(set(begun) - set(here)), sorted(set(here) - set(begun))
        raise UserError(
            f"{workdir} was begun with other classes than {records.directory} has; take a new --workdir. "
            f"Only there: {shown(only_there)}; only here: {shown(only_here)}."
        )
    require(
        same_mean(stored, records),
        f"{workdir} was begun on other images than {records.directory} has: their mean image is another. Take a new "
        f"--workdir.",
    )


def same_mean(one: prepared.Records, other: prepared.Records) -> bool:
    """Whether two sets have the same mean image.

    A set that is prepared again, with another Pillow perhaps, differs in a fraction of a level.
    """
    shapes = one.mean_image.shape == other.mean_image.shape
    return shapes and bool(np.abs(one.mean_image - other.mean_image).max() < 1)


def write_dataset(records: prepared.Records, workdir: pathlib.Path) -> None:
    """Writes dataset.npz, whole or not at all: what the network needs when the data set is gone."""
    with files.replacing(workdir / "dataset.npz") as partial, partial.open("wb") as file:
        arrays = {name: getattr(records, name) for name in statistics.SHAPES}
        directory = str(records.directory.resolve()) if records.directory.name else ""
        np.savez(file, **arrays, class_names=np.array(records.class_names), directory=np.array(directory))


def classes_checksum(records: prepared.Records) -> int:
    """What ties the checkpoints of a run to its dataset.npz: a CRC-32 of the class names, in order."""
    return zlib.crc32(json.dumps(records.class_names).encode())


def check_checkpoint(meta: dict[str, Any], config, records: prepared.Records, workdir: pathlib.Path) -> None:
    """Refuses a checkpoint of another config or of other classes; raises `UserError`.

    Args:
      meta: of the checkpoint. Those of earlier versions know nothing of the classes.
      config, records: of the run, or what config.json and dataset.npz hold.
    """
    stored, ours = to_json(_config(meta["config"], workdir)), to_json(config)
    if differ := differences(stored, ours, CONTINUABLE, ("in the checkpoint", "here")):
        raise UserError(f"The checkpoints of {workdir} are of another config. Different: {differ}.")
    same = meta.get("classes", classes_checksum(records)) == classes_checksum(records)
    require(same, f"The checkpoints of {workdir} are of other classes.")


def read_dataset(workdir: str | pathlib.Path) -> prepared.Records:
    """Reads dataset.npz: records without splits, with the folder where they were when the run last began.

    Raises:
      UserError: it is missing or damaged.
    """
    path = pathlib.Path(workdir) / "dataset.npz"
    cure = "start main.py with its data once more, which writes it"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            size, names = stored["mean_image"].shape[0], stored["class_names"]
            directory = pathlib.Path(str(stored["directory"]))
            kinds = names.dtype.kind + stored["directory"].dtype.kind
        if names.ndim != 1 or kinds != "UU":
            raise ValueError("class_names or directory is no text")
        return prepared.Records(directory, tuple(map(str, names)), **statistics.load(path, size))
    except FileNotFoundError:
        raise UserError(f"{workdir} has no dataset.npz, like the runs of earlier versions; {cure}.") from None
    except Exception as error:  # NumPy and zipfile raise anything on damaged files
        raise UserError(f"{path} is damaged ({reason(error)}); {cure}.") from None
