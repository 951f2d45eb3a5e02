"""Seconds from the start of main.py to its first step, and of a second start: `python -m benchmarks.start`.

Trains configs/demo.py for three steps on two simulated devices, in a workdir of its own, and times the line of the
first; the data set is prepared before. `--cpu_devices=1` adds a second start, which finds what the first has left in
JAX's compilation cache. That is off unless JAX_COMPILATION_CACHE_DIR names a folder for it, and with several devices on
the CPU always.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import measure
from common.errors import UserError, check_ranges
from common.exits import fail

FLAGS = ("--config=configs/demo.py", "--config.log_every.steps=1", "--config.num_steps=3")


def start(devices: int, cache: pathlib.Path) -> tuple[float, float]:
    """Starts main.py, and waits for its end.

    Args:
      devices: how many are simulated.
      cache: folder of the compilation cache.

    Returns:
      Seconds until the line of the first step, and the loss of the third.

    Raises:
      UserError: main.py fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-u",
            str(measure.ROOT / "main.py"),
            *FLAGS,
            f"--cpu_devices={devices}",
            f"--workdir={folder}/run",
        ]
        known = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        begun, lines, first = time.perf_counter(), [], None
        with subprocess.Popen(
            command, cwd=measure.ROOT, env=known, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            for line in process.stdout:
                lines.append(line.strip())
                if first is None and line.split()[:2] == ["step", "1"]:
                    first = time.perf_counter() - begun
        if process.returncode or first is None:
            raise UserError(f"main.py ended with exit code {process.returncode}: {' '.join(lines[-1:])}")
        losses = [line.split("loss ")[1].split()[0] for line in lines if line.split()[:2] == ["step", "3"]]
    return first, float(losses[0])


def run(rounds: int, devices: int) -> dict[str, Any]:
    """Measures starts; raises `UserError` if the second start of a pair computes something else than the first."""
    firsts, seconds = [], []
    for number in range(rounds + 1):
        with tempfile.TemporaryDirectory() as cache:
            first, loss = start(devices, pathlib.Path(cache))
            second, again = start(devices, pathlib.Path(cache)) if devices == 1 else (None, loss)
        if loss != again:
            raise UserError(f"With the compilation cache the loss of step 3 is {again}, and {loss} without it.")
        if number:  # round 0 warms up: it may prepare the data set, and the system has not read the files before
            firsts.append(first)
            seconds.append(second)
    found = {"rounds": rounds, "devices": devices, "first_seconds": measure.spread(firsts)}
    return found | ({"second_seconds": measure.spread(seconds)} if devices == 1 else {})


def main() -> None:
    """Parses the flags, measures, and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu_devices", type=int, default=2)
    try:
        args = parser.parse_args()
        check_ranges(vars(args), {"rounds": (1, 1000), "cpu_devices": (1, 64)}, "--")
        measure.report("start", run(args.rounds, args.cpu_devices))
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
