"""The runs of a sweep: their commands, what they have done, and processes that end with the sweep."""

import ctypes
import dataclasses
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from common import files
from common.errors import UserError, nearest, require
from configs.sweeps import Lines, Sweep
from run import metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclasses.dataclass(eq=False)
class ArmRun:
    """A run of main.py: one arm with one seed.

    Attributes:
      arm, seed, workdir: which, and its folder.
      flags: what follows main.py and --workdir.
      recipe: a checksum of the recipe without overrides.
      process: while it is under way.
      said: the length of log.txt when it was last started, in bytes.
    """

    arm: str
    seed: int
    workdir: pathlib.Path
    flags: tuple[str, ...]
    recipe: int
    process: subprocess.Popen | None = None
    said: int = 0

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
        """Whether the same command, with the recipe as it is, has come to its end."""
        try:
            return json.loads((self.workdir / "command.json").read_text()) == self._command(finished=True)
        except (OSError, ValueError):
            return False

    def lines(self) -> Lines:
        """The metrics so far."""
        return metrics.read_lines(self.workdir / "metrics.jsonl")

    def start(self, cores: Collection[int]) -> None:
        """Begins, or goes on, on these CPU cores; what it says goes to log.txt.

        The process has a session of its own, so that Ctrl-C reaches the sweep alone. It is asked to save and end when
        the sweep ends in any way.
        """
        files.folder(self.workdir)
        self._write(finished=False)
        with (self.workdir / "log.txt").open("ab") as log:
            self.said = log.tell()
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(_prepare, cores),
            )

    def ended(self) -> bool:
        """Whether the process is over; notes its success."""
        if self.process.poll() == 0:
            self._write(finished=True)
        return self.process.returncode is not None

    def failure(self) -> str:
        """The sentence with which it ended, or its exit code."""
        said = (self.workdir / "log.txt").read_bytes()[self.said :].decode(errors="replace")
        errors = re.findall(r"^error: (.*)", said, re.MULTILINE)
        return errors[-1] if errors else f"exit code {self.process.returncode}, see {self.workdir / 'log.txt'}"

    def _write(self, finished: bool) -> None:
        with files.replacing(self.workdir / "command.json") as partial:
            partial.write_text(json.dumps(self._command(finished), indent=2) + "\n")

    def _command(self, finished: bool) -> dict[str, Any]:
        return {"flags": list(self.flags), "recipe": self.recipe, "finished": finished}


def _prepare(cores):
    if sys.platform == "linux":
        os.sched_setaffinity(0, cores)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def shares(jobs: int) -> list[set[int]]:
    """The CPU cores of each of so many runs at once: its own, if there are enough, because runs on the same cores wait."""
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    return [set(cores[job::jobs] if len(cores) >= jobs else cores) for job in range(jobs)]


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
    checksum = zlib.crc32(json.dumps(recipe, sort_keys=True).encode())
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
            checksum,
        )
        for seed in sweep.seeds
        for name, arm in sweep.arms.items()
    ]


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
