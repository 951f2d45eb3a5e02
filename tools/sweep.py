"""Runs variations of a recipe: `python -m tools.sweep --sweep=configs/sweeps/claims.py --workdir=runs/claims`.

A sweep is a file under configs/sweeps/ with arms (overrides of one recipe) and seeds. Each run is a process of main.py
with its own folder, WORKDIR/ARM/seed-N, and what it says is in log.txt there. After each run, WORKDIR has results.md,
results.csv and pictures: means over the seeds, and differences from the first arm with 95 % intervals, paired by
seed; how much such differences spread is taken from all arms.

Overrides such as --config.dataset.name=imagenet2012 hold for all arms. The same command goes on with a sweep that was
stopped: finished runs are left as they are, and others continue from their last checkpoint. A run that fails stops no
other, and is reported at the end.

In a SLURM cluster, --launcher=slurm puts the runs into the queue as jobs. --slurm.OPTION=VALUE is an option of sbatch,
such as --slurm.partition=gpu --slurm.gpus=2 --slurm.time=8:00:00. A job that is preempted, or reaches its time limit,
saves and goes back into the queue. Ctrl-C takes the jobs out of it. If the sweep is killed they stay, and the same
command takes them up.
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
import shlex
import sys
import time
from collections.abc import Mapping

from absl import flags
from rich import console, live, table, text

from common import cli, exits, files
from common.errors import UserError, check_type, nearest, require, shown
from configs.sweeps import Arm, Measure, Sweep
from drawing import canvas, comparisons
from run import arms, launchers, results, workdirs

SWEEP = flags.DEFINE_string("sweep", None, "The sweep, FILE or FILE:VARIANT.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.", required=True)
JOBS = flags.DEFINE_integer(
    "jobs",
    0,
    "Runs at once, each with its share of the CPU cores and GPUs; 0 is one here, and all in a cluster.",
    lower_bound=0,
)
LAUNCHER = flags.DEFINE_enum("launcher", "here", ["here", "slurm"], "Run here, or as jobs of a SLURM cluster.")
ARMS = flags.DEFINE_list("arms", [], "Only these arms, with commas between them.")
SEEDS = flags.DEFINE_list(
    "seeds", [], "Only these seeds, with commas between them; the results are of the sweep's and of these."
)
CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "--cpu_devices of each run.", lower_bound=0)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, and run nothing.")

SECONDS = 2.0  # between looks at the runs


def main(argv: list[str]) -> int:
    """Runs what is not finished."""
    slurm = [argument for argument in argv[1:] if argument.startswith("--slurm.")]
    overrides = [argument for argument in argv[1:] if argument not in slurm]
    sweep = _load(overrides)
    workdir = workdirs.expanded(WORKDIR.value)
    devices = [f"--cpu_devices={CPU_DEVICES.value}"] if CPU_DEVICES.value else []
    runs = arms.runs_of(
        sweep,
        workdir.resolve(),
        recipe=cli.load_config(sweep.config).to_dict(),
        arms=ARMS.value,
        overrides=overrides,
        flags=devices,
    )
    seeds = _seeds() or sweep.seeds
    chosen = [run for run in runs if (run.arm in ARMS.value or not ARMS.value) and run.seed in seeds]
    if DRY_RUN.value:
        for run in chosen:
            print("#" * run.finished + shlex.join(run.command))
        return 0
    launcher = _launcher(slurm, sum(not run.finished for run in chosen))
    exits.outlive_readers()
    with workdirs.lock(workdir), exits.StopSignal() as stop:
        progress = Progress(sweep, runs, chosen, workdir, launcher)
        failed = progress.run(stop)
    if stop.code:
        print("Stopped; the same command goes on.", file=sys.stderr)
        return stop.code
    require(failed or not progress.hindrance, progress.hindrance)
    print(f"{workdir / 'results.md'}", *sorted(workdir.glob("*.png")), sep="\n")
    if failed:
        raise UserError(f"{len(failed)} of {len(chosen)} runs failed: {'; '.join(failed)}")
    return 0


def _launcher(given: list[str], unfinished: int) -> launchers.Here | launchers.Slurm:
    """What starts so many runs; `given` are the flags --slurm.OPTION=VALUE."""
    if LAUNCHER.value == "here":
        require(not given, f"{given and given[0]} needs --launcher=slurm.")
        return launchers.Here(max(1, min(JOBS.value, unfinished)))
    require(not CPU_DEVICES.value, "--cpu_devices simulates devices here; it does not go with --launcher=slurm.")
    options = {}
    for argument in given:
        name, equals, value = argument.removeprefix("--slurm.").partition("=")
        options[name.replace("_", "-")] = value if equals else True
    return launchers.Slurm(JOBS.value, options)


def _load(overrides: list[str]) -> Sweep:
    """The sweep; its parts, and the fields of all overrides, are checked before anything starts."""
    sweep = cli.call_file("sweep", SWEEP.value)
    require(isinstance(sweep, Sweep), f"--sweep={SWEEP.value}: get_sweep() returns no Sweep: {shown(sweep)}.")
    parts = [*sweep.arms.values(), *sweep.measures] if isinstance(sweep.arms, Mapping) else [None]
    fits = all(isinstance(part, Arm | Measure) for part in parts) and sweep.measures
    require(fits, f"--sweep={SWEEP.value}: arms must be Arm by name, and measures one Measure at least.")
    fits = sweep.seeds and all(type(seed) is int and seed >= 0 for seed in sweep.seeds)
    require(fits, f"The seeds {shown(sweep.seeds)} must be numbers from 0 on, one at least.")
    for seeds in (sweep.seeds, _seeds()):
        require(len(set(seeds)) == len(seeds), f"The seeds {shown(seeds)} have one twice.")
    require(sweep.arms, f"--sweep={SWEEP.value} has no arms.")
    measures = {measure.name for measure in sweep.measures}
    for number, (name, arm) in enumerate(sweep.arms.items()):
        for kind in set(arm.published) - measures:
            raise UserError(f"The arm {name} has a published {kind!r}, which is no measure: {nearest(kind, measures)}")
        fits = not arm.reads or (number and not arm.overrides and set(arm.reads) <= measures)
        require(
            fits,
            f"The arm {name} reads the runs of the base: it is not the first, has no overrides, and names measures.",
        )
        require(
            not arm.reads or name not in ARMS.value, f"--arms={name}: it has no runs of its own, and reads the base's."
        )
    for override in overrides:
        require("=" in override, f"{override} has no value; an override is --config.FIELD=VALUE.")
    known = dict(cli.field_names(cli.load_config(sweep.config)))
    for arm in sweep.arms.values():
        values = sweep.overrides | arm.overrides
        given = [arms.override(field, value) for field, value in values.items()]
        cli.check_overrides([*given, *overrides], sweep.config, known)
        for field, value in values.items():
            require(not hasattr(known[field], "items"), f"{field} is a section of the config; an arm sets its fields.")
            check_type(field, value, type(known[field]))
    return dataclasses.replace(sweep, seeds=tuple(dict.fromkeys([*sweep.seeds, *_seeds()])))


def _seeds() -> tuple[int, ...]:
    """Those of --seeds; () without it."""
    fits = all(seed.isdecimal() for seed in SEEDS.value)
    require(fits, f"--seeds={','.join(SEEDS.value)} must be numbers, such as 0,1,2.")
    return tuple(map(int, SEEDS.value))


class Progress:
    """Runs a sweep, shows how far it is, and keeps the results up to date.

    Args:
      sweep, runs: the whole sweep, which the results are about.
      chosen: the runs to do.
      workdir: where the results go.
      launcher: starts them; see `run.launchers`.

    Attributes:
      hindrance: why the results could not be written the last time; '' if they were.
    """

    def __init__(
        self, sweep: Sweep, runs: list[arms.ArmRun], chosen: list[arms.ArmRun], workdir: pathlib.Path, launcher
    ):
        self._sweep, self._runs, self._chosen, self._workdir, self._launcher = sweep, runs, chosen, workdir, launcher
        self._waiting = collections.deque(run for run in chosen if not run.finished)
        self._under_way, self._failed = [], {}
        self._begun, self._already = time.monotonic(), {}
        self._console, self.hindrance = console.Console(file=sys.stderr), ""

    def run(self, stop: exits.StopSignal) -> list[str]:
        """Runs until all has ended or a signal came; returns the failures, 'ARM/seed-N (reason)'."""
        self._renew()
        with live.Live(console=self._console, auto_refresh=False, transient=True) as shown:
            try:
                while (self._waiting or self._under_way) and not stop.code:
                    while self._waiting and self._launcher.has_room() and not stop.code:
                        self._start(self._waiting.popleft())
                    if self._console.is_terminal:
                        shown.update(self._table(), refresh=True)
                    time.sleep(SECONDS)
                    self._collect()
            finally:
                self._stop()
        if stop.code:  # a run may have come to its end meanwhile
            self._renew()
        return [f"{name} ({reason.rstrip('.')})" for name, reason in self._failed.items()]

    def _start(self, run):
        self._already[run.name] = self._fraction(run)
        try:
            run.start(self._launcher)
        except (UserError, OSError) as error:  # its folder cannot be written, or SLURM refuses it
            self._fail(run, str(error))
            return
        self._under_way.append(run)
        self._say(f"{run.name} {'goes on' if self._already[run.name] else 'starts'}", shown_already=True)

    def _fail(self, run, reason):
        self._failed[run.name] = reason
        self._say(f"{run.name} failed: {reason}")

    def _collect(self):
        """Takes out the runs that have ended, and renews the results."""
        for run in list(self._under_way):
            try:
                if not run.ended():
                    continue
                reason = run.failure() if run.process.returncode else ""
            except (UserError, OSError) as error:
                if run.process.returncode is None:
                    continue  # the cluster, or a disk far away, does not answer just now
                reason = str(error)  # its folder is gone, or cannot be written any more
            self._under_way.remove(run)
            if reason:
                self._fail(run, reason)
            else:
                self._renew()
                self._say(f"{run.name} is finished; {self._left()}", shown_already=True)

    def _stop(self):
        """Asks the runs under way to save and end, and waits for them."""
        for run in self._under_way:
            run.process.terminate()
        for run in self._under_way:
            run.process.wait()
            with contextlib.suppress(UserError, OSError):
                run.ended()

    def _renew(self):
        """Writes the results. What hinders it stops no run."""
        try:
            self._write()
            self.hindrance = ""
        except (UserError, OSError) as error:
            self.hindrance = str(error)
            self._say(f"warning: {error}")

    def _write(self):
        finished = {(run.arm, run.seed): run.lines() for run in self._runs if run.finished}
        found = results.rows(self._sweep, finished)
        pictures = {}  # of all arms, also if a few run now
        for number, measure in enumerate(self._sweep.measures, 1):
            title, drawn = results.to_draw(self._sweep, found, measure)
            if drawn:
                pictures[f"differences-{number}.png"] = comparisons.differences(
                    title, drawn, neutral=float(measure.ratio)
                )
        if curve := self._sweep.curve:
            pictures["curve.png"] = comparisons.curves(curve, results.curves(self._sweep, finished))
        for name, figure in pictures.items():
            canvas.save(figure, self._workdir / name)
        head = f"# {self._sweep.config}: {len(finished)} of {len(self._runs)} runs\n\n"
        command = shlex.join([pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]])
        page = f"{head}`python -m tools.{command}`\n\n{results.to_markdown(self._sweep, found)}"
        for name in pictures:
            page += f"\n![{name}]({name})\n"
        for name, content in (("results.md", page), ("results.csv", results.to_csv(found))):
            with files.replacing(self._workdir / name) as partial:
                partial.write_text(content, encoding="utf-8", errors="backslashreplace")  # a folder may have any name

    # What a person sees.

    def _say(self, text, shown_already=False):
        """Prints a line, on a terminal above the table, unless the table shows it already."""
        if not self._console.is_terminal:
            print(text, file=sys.stderr, flush=True)
        elif not shown_already:
            self._console.print(text, markup=False, highlight=False)

    def _fraction(self, run):
        if run.finished:
            return 1.0
        try:
            config = json.loads((run.workdir / "config.json").read_text())
            return arms.fraction(run.lines(), config)
        except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError):  # the run will say what is damaged
            return 0.0

    def _left(self):
        """The time left, from what was done since the start."""
        done = {run.name: self._fraction(run) for run in self._chosen}
        since = sum(done[name] - before for name, before in self._already.items() if name not in self._failed)
        open_runs = [run for run in self._chosen if run.name not in self._failed]
        rest = sum(1 - done[run.name] for run in open_runs)
        if since <= 0:  # a run that goes on from its last checkpoint has fewer steps than before
            return "time left unknown"
        minutes = rest / since * (time.monotonic() - self._begun) / 60
        return f"some {minutes:,.0f} minutes left" if minutes < 120 else f"some {minutes / 60:,.1f} hours left"

    def _table(self):
        """Arms by seeds: how far each is."""
        shown = table.Table(title=text.Text(f"{SWEEP.value}: {self._left()}"), title_justify="left")
        seeds = sorted({run.seed for run in self._chosen})
        for head in ("arm", *(f"seed {seed}" for seed in seeds)):
            shown.add_column(head)
        cells = {(run.arm, run.seed): self._cell(run) for run in self._chosen}
        for arm in dict.fromkeys(run.arm for run in self._chosen):
            shown.add_row(arm, *(cells[arm, seed] for seed in seeds))
        return shown

    def _cell(self, run):
        if run.name in self._failed:
            return "failed"
        part = self._fraction(run)
        if run in self._under_way:
            return f"{part:.0%} …"
        return "done" if run.finished else f"{part:.0%}" if part else "–"


if __name__ == "__main__":
    cli.run(main, passes=("--config.", "--slurm."))
