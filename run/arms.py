"""The runs of a sweep: their commands, and what they have done."""

import dataclasses
import json
import pathlib
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from common import files
from common.errors import UserError, nearest, require
from configs.sweeps import Lines, Sweep
from run import metrics, schema

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(eq=False)
class ArmRun:
    """A run of main.py: one arm with one seed.

    Attributes:
      arm, seed, workdir: which, and its folder.
      flags: what follows main.py and --workdir.
      recipe: the config without overrides, as JSON stores it.
      process: once it was started; see `launchers`.
      said: the length of its log when it was last started, in bytes.
      before: what command.json said of a finished run when it was last started, and the bytes of its metrics.
    """

    arm: str
    seed: int
    workdir: pathlib.Path
    flags: tuple[str, ...]
    recipe: Mapping[str, Any]
    process: Any = None
    said: int = 0
    before: tuple[dict[str, Any], int] = ({}, 0)

    @property
    def name(self) -> str:
        """Such as 'tanh/seed-0'."""
        return f"{self.arm}/seed-{self.seed}"

    @property
    def command(self) -> list[str]:
        """The command that trains it, or goes on with it."""
        return [sys.executable, str(ROOT / "main.py"), *self.flags, f"--workdir={self.workdir}"]

    @property
    def finished(self) -> bool:
        """Whether the same command, with the recipe as it is, has come to its end.

        Of a field that is newer than the run, the neutral value counts as the one it had.
        """
        stored = self._stored()
        found = stored.get("recipe")
        if stored != self._command(finished=True) | {"recipe": found}:
            return False
        if isinstance(found, dict):  # a table asks every two seconds: most are equal as they are
            return found == self.recipe or checksum(schema.completed(found)) == checksum(schema.completed(self.recipe))
        return found == checksum(self.recipe)

    def lines(self) -> Lines:
        """The metrics so far."""
        return metrics.read_lines(self.workdir / "metrics.jsonl")

    @property
    def log(self) -> pathlib.Path:
        """The file with what it says."""
        return self.workdir / "log.txt"

    def start(self, launcher: Any) -> None:
        """Begins, or goes on; raises `UserError` if it cannot."""
        files.folder(self.workdir)
        stored = self._stored()
        self.before = stored if stored.get("finished") else {}, _size(self.workdir / "metrics.jsonl")
        self._write(self._command(finished=False))
        self.said = _size(self.log)
        try:
            self.process = launcher.start(self)
        except (UserError, OSError):
            self._restore_finished()
            raise

    def ended(self) -> bool:
        """Whether the process is over; notes its success."""
        if self.process.poll() == 0:
            self._write(self._command(finished=True))
        elif self.process.returncode:
            self._restore_finished()
        return self.process.returncode is not None

    def failure(self) -> str:
        """The sentence with which it ended, or its exit code."""
        said = self.log.read_bytes()[self.said :].decode(errors="replace")
        errors = re.findall(r"^error: (.*)", said, re.MULTILINE)
        return errors[-1] if errors else f"exit code {self.process.returncode}, see {self.log}"

    def _restore_finished(self) -> None:
        """What an earlier command has finished stays finished, if this one was refused."""
        finished, size = self.before
        if finished and size == _size(self.workdir / "metrics.jsonl"):
            self._write(finished)

    def _stored(self) -> dict[str, Any]:
        try:
            stored = json.loads((self.workdir / "command.json").read_text())
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) else {}

    def _write(self, command: dict[str, Any]) -> None:
        with files.replacing(self.workdir / "command.json") as partial:
            partial.write_text(json.dumps(command, indent=2) + "\n")

    def _command(self, finished: bool) -> dict[str, Any]:
        return {"flags": list(self.flags), "recipe": self.recipe, "finished": finished}


def _size(file: pathlib.Path) -> int:
    return file.stat().st_size if file.exists() else 0


def runs_of(
    sweep: Sweep,
    workdir: pathlib.Path,
    *,
    recipe: Mapping[str, Any],
    arms: Sequence[str],
    overrides: Sequence[str],
    flags: Sequence[str],
) -> list[ArmRun]:
    """The runs of all arms, those with the first seed before those with the second.

    Args:
      recipe: the config without overrides.
      arms: the names of those that will run; () for all.
      overrides: '--config.FIELD=VALUE …', which win over those of the whole sweep.
      flags: others of main.py.

    Raises:
      UserError: there is no such arm, or an override gives the seed or a field that an arm sets.
    """
    for arm in sweep.arms:
        named = re.fullmatch(r"\w[\w.-]*", arm)  # of a folder in the workdir, so not '..'
        require(
            named, f"The arm {arm!r} must be a name of letters, digits, '-', '_' and '.', and begin with no '.' or '-'."
        )
    for arm in arms:
        require(arm in sweep.arms, f"--arms={arm}: there is no such arm, {nearest(arm, sweep.arms)}")
    if any(override.startswith("--config.seed=") for override in overrides):
        raise UserError("--config.seed cannot be given: the sweep sets it, --seeds says which.")
    for name, arm in sweep.arms.items():
        for field in arm.overrides if name in arms or not arms else ():
            given = any(override.startswith(f"--config.{field}=") for override in overrides)
            require(not given, f"--config.{field} cannot be given: the arm {name} sets it.")
    recipe = json.loads(json.dumps(recipe))
    return [
        ArmRun(
            name,
            seed,
            workdir / name / f"seed-{seed}",
            (
                f"--config={sweep.config}",
                *(override(field, value) for field, value in (sweep.overrides | arm.overrides).items()),
                *overrides,
                f"--config.seed={seed}",
                *flags,
            ),
            recipe,
        )
        for seed in sweep.seeds
        for name, arm in sweep.arms.items()
        if not arm.reads
    ]


def checksum(recipe: Mapping[str, Any]) -> int:
    """Of a recipe's JSON; earlier versions stored it in place of the recipe."""
    return zlib.crc32(json.dumps(recipe, sort_keys=True).encode())


def override(field: str, value: Any) -> str:
    """An override on the command line."""
    return f"--config.{field}={value}"


def fraction(lines: Lines, config: Mapping[str, Any]) -> float:
    """How much of a run is done, from 0 to 1; `config` is its config.json."""
    if not lines:
        return 0.0
    if config["num_steps"]:
        return min(1.0, lines[-1]["step"] / config["num_steps"])
    return min(1.0, lines[-1]["epoch"] / config["num_epochs"])
