"""Where the runs of a sweep are computed: by processes here, or by jobs of a SLURM cluster.

A launcher starts an `ArmRun` and returns its process, which has `poll`, `returncode`, `terminate` and `wait` as
`subprocess.Popen` has.
"""

import ctypes
import dataclasses
import functools
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping

from common.errors import UserError, require
from common.exits import SIGNALS
from run.arms import ROOT, ArmRun

PR_SET_PDEATHSIG = 1  # of Linux's prctl
TERMINATED = SIGNALS[signal.SIGTERM], -signal.SIGTERM  # saved, or ended before it had anything to save


def is_over(process: "subprocess.Popen | Job | None") -> bool:
    """Whether a process has ended, as far as `poll` has seen."""
    return process is None or process.returncode is not None


class Here:
    """Processes of this machine.

    Each has CPU cores of its own, if there are enough, because runs on the same cores wait for one another. It has a
    session of its own, so that Ctrl-C reaches the sweep alone, and is asked to save and end when the sweep ends in any
    way.

    Args:
      jobs: how many at once.
    """

    def __init__(self, jobs: int):
        cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
        self._cores = [cores[job::jobs] if len(cores) >= jobs else cores for job in range(jobs)]
        self._processes = [None] * jobs

    def has_room(self) -> bool:
        """Whether another run can start."""
        return any(map(is_over, self._processes))

    def start(self, run: ArmRun) -> subprocess.Popen:
        """Starts a run; what it says is added to its log."""
        place = next(place for place, process in enumerate(self._processes) if is_over(process))
        with run.log.open("ab") as log:
            self._processes[place] = subprocess.Popen(
                run.command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(_prepare, self._cores[place]),
            )
        return self._processes[place]


def _prepare(cores: Collection[int]) -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # SLURM sends them to all processes of a job; see `Task`
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        os.sched_setaffinity(0, cores)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Slurm:
    """Jobs of a SLURM cluster, each on one node, submitted by `submitit`.

    A job that is preempted or reaches its time limit saves and goes back into the queue. Jobs go on when the sweep is
    killed, and the next sweep takes them up.

    Args:
      jobs: how many at once; 0 puts all into the queue.
      options: of sbatch, by name.

    Raises:
      UserError: there is no SLURM here, or an option is one that the sweep sets.
    """

    OWN = ("array", "chdir", "comment", "error", "job-name", "nodes", "ntasks", "ntasks-per-node", "output", "signal")
    MINUTES = 240  # of a job, if the options do not say
    SECONDS = 5.0  # between looks at the queue

    def __init__(self, jobs: int, options: Mapping[str, str]):
        for name in self.OWN:
            require(name not in options, f"--slurm.{name} cannot be given: the sweep sets it. A run takes one node.")
        missing = [name for name in ("sbatch", "squeue", "srun") if not shutil.which(name)]
        require(not missing, f"--launcher=slurm: there is no {' and no '.join(missing)} here.")
        self._limit, self._options, self._jobs = jobs or math.inf, dict(options), []
        self._queue, self._looked = {}, -math.inf

    def has_room(self) -> bool:
        """Whether another run can start."""
        return sum(not is_over(job) for job in self._jobs) < self._limit

    def start(self, run: ArmRun) -> "Job":
        """Takes up the job of a run that is in the queue, or submits one; raises `UserError` if SLURM refuses it."""
        known = [number for number, workdir in self.queue().items() if workdir == str(run.workdir)]
        self._jobs.append(Job(self, run, known[0] if known else self._submit(run)))
        return self._jobs[-1]

    def _submit(self, run):
        import submitit

        executor = submitit.SlurmExecutor(_folder(run), max_num_timeout=sys.maxsize)
        cores = self._options.get("cpus-per-task")  # srun does not take it over from sbatch
        executor.update_parameters(
            time=self.MINUTES,
            job_name=run.name,
            comment=str(run.workdir),
            srun_args=[f"--cpus-per-task={cores}"] if cores else None,
            additional_parameters={"chdir": str(ROOT), **self._options},
        )
        try:
            number = executor.submit(Task(run)).job_id
        except submitit.core.utils.FailedJobError as error:
            said = re.findall(r"^sbatch: (?:.*error: |.*fatal: )?(.*)", str(error), re.MULTILINE)
            raise UserError(f"sbatch refused the job: {said[-1] if said else 'it says no more'}.") from error
        self._looked = -math.inf
        return number

    def queue(self) -> dict[str, str]:
        """The user's jobs that wait or run: number and comment, which is the workdir of a run of a sweep."""
        if time.monotonic() - self._looked > self.SECONDS:
            command = ["squeue", "--me", "--noheader", "--format=%i %k"]
            asked = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            self._looked = time.monotonic()
            if asked.returncode == 0:  # if SLURM's controller is away, the last answer holds
                self._queue = dict(line.split(" ", 1) for line in asked.stdout.splitlines())
        return self._queue


def _folder(run: ArmRun) -> pathlib.Path:
    """Where submitit keeps the files of a run's jobs."""
    return run.workdir / "slurm"


class Job:
    """A job in the manner of a process; `returncode` is that of main.py, or 1 if the job left the queue without one."""

    PATIENCE = 30.0  # seconds in which the file with its result may come after it left the queue

    def __init__(self, cluster: Slurm, run: ArmRun, number: str):
        self.returncode, self._cluster, self._run, self._number = None, cluster, run, number
        self._seen = time.monotonic()

    def poll(self) -> int | None:
        """The exit code, or None while it waits or runs."""
        import submitit

        if self.returncode is None:
            job = submitit.SlurmJob(_folder(self._run), self._number)
            if job.paths.result_pickle.exists():
                self.returncode = 1 if job.exception() else job.result()
            elif self._number in self._cluster.queue():
                self._seen = time.monotonic()
            elif time.monotonic() - self._seen > self.PATIENCE:
                with self._run.log.open("a") as log:
                    print(f"error: SLURM's job {self._number} left the queue before its end.", file=log)
                self.returncode = 1
        return self.returncode

    def terminate(self) -> None:
        """Takes it out of the queue; a run that is under way saves first."""
        subprocess.run(["scancel", self._number], capture_output=True, stdin=subprocess.DEVNULL)

    def wait(self) -> None:
        """Waits until it has left the queue."""
        while self._number in self._cluster.queue():
            time.sleep(Slurm.SECONDS / 5)


class Task:
    """What a job does: the run, and what SLURM's signals ask for.

    Before a time limit, and on some clusters before a preemption, all processes of the job get submitit's signal. Then
    the run saves, and the job requeues itself. On other clusters they get SIGTERM, as when the job is cancelled:
    the run saves, and SLURM kills the job and requeues it or not.
    """

    PATIENCE = 120.0  # seconds until that kill; a cancelled job is killed after 30, unless SLURM is told otherwise

    def __init__(self, run: ArmRun):
        self._run = dataclasses.replace(run, process=None)
        self._warned = False

    def __call__(self) -> int:
        """Returns the exit code of the run."""
        import submitit

        number = getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}")
        requeue = signal.signal(number, self._note)  # submitit's; it calls `checkpoint` and ends this process
        self._run.start(Here(1))
        code = self._run.process.wait()
        if code in TERMINATED:
            if not self._warned:
                time.sleep(self.PATIENCE)
            requeue(number, None)
        self._run.ended()
        return code

    def _note(self, *_):
        self._warned = True
        self._run.process.terminate()

    def checkpoint(self):
        """What submitit is to do when the job runs again."""
        import submitit

        return submitit.helpers.DelayedSubmission(Task(self._run))
