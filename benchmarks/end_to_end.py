"""Images a second of training by main.py, beside its two stages alone: `python -m benchmarks.end_to_end`.

    python -m benchmarks.end_to_end --dataset=FOLDER_OR_NAME --data_dir=data          # configs/alexnet.py as it is
    python -m benchmarks.end_to_end --dataset=… --steps=2000 --width=0.125            # for the memory of a long run
    python -m benchmarks.end_to_end --dataset=… --config.model.dtype=bfloat16         # with any fields of the config

In turn, round by round: main.py from its start to its end in a workdir of its own, the bare training step on data that
are already on the device (`benchmarks.step`), and the input pipeline with nothing behind it (`benchmarks.input`).
Whichever of these two is slower is the limit. What main.py reaches is read from its metrics.jsonl, without the first
interval, in which it compiles.
"""

import argparse
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from benchmarks import input as input_benchmark
from benchmarks import measure, step
from common import backend, host
from common.errors import UserError, check_ranges, shortened
from common.exits import fail
from datasets import opening
from run import metrics, schema

INTERVALS = 5  # of a run, the one with the compilation among them
PIPELINE_BATCHES = 16
SECONDS_BETWEEN_SAMPLES = 0.2


class Training:
    """Runs of main.py: a candidate for `measure.interleaved`.

    Args:
      arguments: of main.py, all but the workdir.
      log_every: steps of an interval.

    Attributes:
      input_wait: the fraction of the time in which the devices waited for data, by round.
      memory: bytes of main.py's resident set in the last run, sampled from the second interval to the last.
    """

    def __init__(self, arguments: Sequence[str], log_every: int):
        self._arguments, self._log_every = arguments, log_every
        self.input_wait, self.memory = [], []

    def __call__(self) -> float:
        """Seconds of an image; raises `UserError` where main.py fails."""
        with tempfile.TemporaryDirectory() as folder:
            said, workdir = pathlib.Path(folder, "said.txt"), pathlib.Path(folder, "run")
            command = [sys.executable, str(measure.ROOT / "main.py"), *self._arguments, f"--workdir={workdir}"]
            self.memory = []
            with said.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
                while process.poll() is None:
                    time.sleep(SECONDS_BETWEEN_SAMPLES)
                    lines = metrics.read_lines(workdir / "metrics.jsonl")
                    if lines and not any("eval/loss" in line for line in lines):
                        self.memory += _resident(process.pid)
            if process.returncode:
                last = [line for line in said.read_text().splitlines() if line.strip()][-1:]
                raise UserError(f"main.py ended with exit code {process.returncode}: {''.join(last)}")
            lines = metrics.read_lines(workdir / "metrics.jsonl")
        timed = [line for line in lines if "train/images_per_second" in line and line["step"] > self._log_every]
        self.input_wait.append(statistics.fmean(line["train/input_wait"] for line in timed))
        return statistics.fmean(1 / line["train/images_per_second"] for line in timed)


def _resident(process: int) -> list[int]:
    """Bytes of a process in memory; [] if it has ended, or if the system has no /proc."""
    try:
        status = pathlib.Path(f"/proc/{process}/status").read_text()
    except OSError:
        return []
    return [1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")]


def configured(arguments: Sequence[str], overrides: Sequence[str]) -> Any:
    """The config that main.py makes of these arguments; raises `UserError` if main.py would refuse them."""
    values, argv = flags.FlagValues(), ["main.py", *arguments, *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
        return values["config"].value
    except Exception as error:  # absl and ml_collections raise anything
        message = shortened(" ".join(str(error).split()))
        raise UserError(f"The config cannot be had with {' '.join(overrides)}: {message}.") from None


def run(args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Measures.

    Args:
      args: the flags.
      overrides: further ones, --config.FIELD=VALUE.

    Raises:
      UserError: a flag, the config or the data set cannot work.
    """
    # With fewer steps there would be no interval after the first.
    check_ranges(vars(args), {"steps": (INTERVALS, 1 << 20), "rounds": (1, 1000), "cpu_devices": (0, 1024)}, "--")
    host.keep_freed_memory()  # as main.py does
    log_every = args.steps // INTERVALS
    num_steps = INTERVALS * log_every
    fields = {
        "dataset.name": args.dataset,
        "dataset.data_dir": args.data_dir,
        "batch_size": args.batch_size,
        "model.width": args.width,
        "num_steps": num_steps,
        "log_every.steps": log_every,
        # main.py always evaluates and saves after its last step. This keeps that cheap: one image, and none before.
        "eval_every.steps": num_steps,
        "checkpoint_every.steps": num_steps,
        "dataset.eval_split": "train[:1]",
        "eval_batch_size": 1,
    }
    for override in overrides:
        if (field := override.removeprefix("--config.").partition("=")[0]) in fields:
            raise UserError(f"{override}: the benchmark itself sets {field}; --help lists what it takes.")
    arguments = [f"--config={measure.ROOT / 'configs/alexnet.py'}"]
    arguments += [f"--config.{field}={value}" for field, value in fields.items()]
    config = configured(arguments, overrides)
    schema.validate(config)
    opened = opening.open_records(config.dataset, config.input, warn=False)
    arguments.append(f"--config.model.num_classes={opened.num_classes}")
    config = configured(arguments, overrides)

    backend.start_devices()
    on_cpu = [f"--cpu_devices={args.cpu_devices}"] if args.cpu_devices else []
    training = Training([*arguments, *overrides, *on_cpu], log_every)
    bare_config = config.copy_and_resolve_references()
    bare_config.optimizer.learning_rate = 1e-4  # stays finite on noise
    bare = step.Step(bare_config, 0, config.parallel.devices_per_network)
    bare.train()
    batch = config.batch_size
    pipeline = input_benchmark.Timed(
        functools.partial(input_benchmark.records, opened, config, PIPELINE_BATCHES * batch)
    )
    candidates = {
        "end_to_end": training,
        "step": lambda: measure.clock(bare.train, args.seconds) / batch,
        "pipeline": pipeline,
    }
    seconds = measure.interleaved(candidates, args.rounds)
    rates = {f"{name}_images_per_second": 1 / min(values) for name, values in seconds.items()}
    seconds["limit"] = [max(pair) for pair in zip(seconds["step"], seconds["pipeline"], strict=True)]
    half = len(training.memory) // 2
    halves = {"first_half": training.memory[:half], "second_half": training.memory[half:]}
    return {
        "batch_size": batch,
        "width": config.model.get("width", 1.0),
        "devices": bare.layout.size,
        "steps": config.num_steps,
        "rounds": args.rounds,
        "overrides": list(overrides),
        **rates,
        "end_to_end_times_limit": measure.ratio(seconds, "limit", "end_to_end"),
        "input_wait": max(training.input_wait),
        "pipeline_cpu_seconds_per_image": min(pipeline.cpu_seconds),
        "memory_bytes": {name: statistics.median(part) if part else None for name, part in halves.items()},
    }


def main() -> None:
    """Parses the flags, measures, and prints the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset", required=True, help="as config.dataset.name; prepared first if it is not")
    parser.add_argument("--data_dir", default="data", help="as config.dataset.data_dir")
    parser.add_argument("--steps", type=int, default=20, help="of a run, a fifth of them untimed")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--cpu_devices", type=int, default=0, help="as main.py has it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="at least so long for the bare step")
    args, overrides = parser.parse_known_args()
    try:
        if strangers := [argument for argument in overrides if not argument.startswith("--config.")]:
            raise UserError(f"{strangers[0]!r} is no flag; --help lists them, and --config.FIELD=VALUE is for main.py.")
        if args.cpu_devices:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", args.cpu_devices)
        # Or this process would take the GPU's memory from main.py.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        measure.report("end_to_end", run(args, overrides))
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
