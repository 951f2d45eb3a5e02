"""Where the runs of a sweep are computed: by processes here, or by jobs of a SLURM cluster.

A launcher starts an `ArmRun` and returns its process, which has `poll`, `returncode`, `terminate` and `wait` as
`subprocess.Popen` has.
"""

import contextlib
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
import zlib
from collections.abc import Collection, Mapping

from common import host
from common.errors import UserError, require, shortened
from common.exits import SIGNALS
from run.arms import ROOT, ArmRun, checksum

PR_SET_PDEATHSIG = 1  # of Linux's prctl
TERMINATED = SIGNALS[signal.SIGTERM], -signal.SIGTERM  # saved, or ended before it had anything to save


def is_over(process: "subprocess.Popen | Job | None") -> bool:
    """Whether a process has ended, as far as `poll` has seen."""
    return process is None or process.returncode is not None


class Here:
    """Processes of this machine.

    Each has CPU cores of its own, if there are enough, because runs on the same cores wait for one another, and GPUs of
    its own, because the first run on a GPU takes its memory. It has a session of its own, so that Ctrl-C reaches the
    sweep alone, and is asked to save and end when the sweep ends in any way.

    Args:
      jobs: how many at once.

    Raises:
      UserError: there are GPUs, but fewer than that.
    """

    def __init__(self, jobs: int):
        cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
        self._cores = [cores[job::jobs] if len(cores) >= jobs else cores for job in range(jobs)]
        self._processes = [None] * jobs
        # Runs that share cores leave none idle, and a replica more would only cost memory.
        self._devices = {} if len(cores) >= jobs or jobs == 1 else {"JAX_NUM_CPU_DEVICES": "1"}
        gpus = host.gpus() if jobs > 1 else []
        require(
            not gpus or jobs <= len(gpus), f"--jobs={jobs} needs a GPU for each run; of GPUs there are {len(gpus)}."
        )
        each = len(gpus) // jobs  # neighbours, which are often joined the faster
        self._gpus = [
            {"CUDA_VISIBLE_DEVICES": ",".join(gpus[each * job :][:each])} if gpus else {} for job in range(jobs)
        ]

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
                env=self._devices | os.environ | self._gpus[place],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(_prepare, self._cores[place], os.getpid()),
            )
        return self._processes[place]


def _prepare(cores: Collection[int], parent: int) -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # SLURM sends them to all processes of a job; see `Task`
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a container may have lost a core since
            os.sched_setaffinity(0, cores)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before this process had asked for its signal
            os._exit(128 + signal.SIGTERM)


class Slurm:
    """Jobs of a SLURM cluster, each on one node, submitted by `submitit`.

    A job that is preempted or reaches its time limit saves and goes back into the queue. Jobs go on when the sweep is
    killed, and the next sweep takes them up.

    Args:
      jobs: how many at once; 0 puts all into the queue.
      options: of sbatch, by name; True for one without a value.

    Raises:
      UserError: there is no SLURM here, or an option is one that the sweep sets.
    """

    OWN = ("array", "chdir", "clusters", "comment", "error", "job-name", "nodes", "ntasks", "ntasks-per-node", "output",
           "requeue", "no-requeue", "signal")  # fmt: skip
    MINUTES = 240  # of a job, if the options do not say
    SECONDS = 5.0  # between looks at the queue

    def __init__(self, jobs: int, options: Mapping[str, str | bool]):
        for name in self.OWN:
            require(name not in options, f"--slurm.{name} cannot be given: the sweep sets it. A run takes one node.")
        missing = [name for name in ("sbatch", "squeue", "srun") if not shutil.which(name)]
        require(not missing, f"--launcher=slurm: there is no {' and no '.join(missing)} here.")
        self._limit, self._options, self._jobs = jobs or math.inf, dict(options), []
        self._queue, self._looked = {}, -math.inf
        self.news = -math.inf  # the time of the queue that is known

    def has_room(self) -> bool:
        """Whether another run can start."""
        return sum(not is_over(job) for job in self._jobs) < self._limit

    def start(self, run: ArmRun) -> "Job":
        """Takes up the job of a run that is in the queue, or submits one; raises `UserError` if SLURM refuses it."""
        fits = not set("%\\\n") & set(str(run.workdir))
        require(fits, f"{run.workdir} holds a % or a backslash, which SLURM reads as something else.")
        job, (mark, workdir) = None, _comment(run).split(" ", 1)
        for number, comment in self.queue().items():
            other, _, place = comment.partition(" ")
            if place == workdir and other != mark:
                raise UserError(f"SLURM's job {number} uses {place} for another command; `scancel {number}` ends it.")
            if place == workdir and not _result(run, number).exists():
                job = Job(self, run, number)
        self._jobs.append(job or Job(self, run, self._submit(run)))
        return self._jobs[-1]

    def _submit(self, run):
        import submitit

        executor = submitit.SlurmExecutor(_folder(run), max_num_timeout=sys.maxsize)
        cores = self._options.get("cpus-per-task")  # srun does not take it over from sbatch
        for old in _folder(run).glob("*_result.pkl"):  # SLURM may give a number again
            old.unlink()
        executor.update_parameters(
            time=self.MINUTES,
            job_name=run.name,
            comment=_comment(run),
            srun_args=[f"--cpus-per-task={cores}"] if cores else None,
            additional_parameters={"chdir": str(ROOT), "requeue": True, **self._options},
        )
        try:
            number = executor.submit(Task(run)).job_id
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, OSError) as error:
            said = re.findall(r"^sbatch: (?:.*error: |.*fatal: )?(.*)", str(error), re.MULTILINE)
            raise UserError(f"sbatch refused the job: {said[-1] if said else 'it says no more'}.") from error
        self._looked = -math.inf
        return number

    def queue(self) -> dict[str, str]:
        """The comments of the user's jobs that wait or run, by number; raises `UserError` if squeue never answered."""
        if time.monotonic() - self._looked > self.SECONDS:
            self._looked = time.monotonic()
            asked = _ask("squeue", "--me", "--noheader", "--format=%i %k")
            if asked.returncode == 0:  # if SLURM's controller is away, the last answer holds
                self._queue = dict(re.findall(r"^(\d+) (.*)$", asked.stdout, re.MULTILINE))
                self.news = self._looked
            elif self.news == -math.inf:
                raise UserError(f"squeue does not answer: {shortened(asked.stderr.strip())}")
        return self._queue


def _ask(*command: str) -> subprocess.CompletedProcess:
    """Runs a command of SLURM's, which Ctrl-C does not reach."""
    quiet = dict(stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True)
    return subprocess.run(command, text=True, errors="replace", **quiet)


def _comment(run: ArmRun) -> str:
    """By what the job of a run is known: a checksum of what it does, and its workdir."""
    return f"{zlib.crc32(repr((run.flags, checksum(run.recipe))).encode()):08x} {run.workdir}"


def _folder(run: ArmRun) -> pathlib.Path:
    """Where submitit keeps the files of a run's jobs."""
    return run.workdir / "slurm"


def _result(run: ArmRun, number: str) -> pathlib.Path:
    """The file with the result of a job."""
    return _folder(run) / f"{number}_0_result.pkl"


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
            if _result(self._run, self._number).exists():
                job = submitit.SlurmJob(_folder(self._run), self._number)
                if problem := job.exception():
                    *_, said = re.findall(r"^(.+)\n-{5,}$", str(problem), re.MULTILINE) or [str(problem)]
                    self._fail(said)
                else:
                    self.returncode = job.result()
            elif self._number in self._cluster.queue():
                self._seen = time.monotonic()
            elif self._cluster.news - self._seen > self.PATIENCE:
                self._fail(f"SLURM's job {self._number} left the queue before its end.")
        return self.returncode

    def _fail(self, sentence):
        with self._run.log.open("a") as log:
            print(f"error: {sentence}", file=log)
        self.returncode = 1

    def terminate(self) -> None:
        """Takes it out of the queue; a run that is under way saves first."""
        _ask("scancel", self._number)

    def wait(self) -> None:
        """Waits until it has left the queue."""
        while self._number in self._cluster.queue():
            time.sleep(Slurm.SECONDS)
            self.terminate()  # SLURM may not have heard it


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
            if self._warned or self._runs():
                requeue(number, None)
        self._run.ended()
        return code

    def _note(self, *_):
        self._warned = True
        if self._run.process:
            self._run.process.terminate()

    @staticmethod
    def _runs():
        """Whether SLURM still counts the job as running, and is not about to end it."""
        asked = _ask("squeue", f"--jobs={os.environ.get('SLURM_JOB_ID')}", "--noheader", "--format=%T")
        return asked.stdout.strip() == "RUNNING"

    def checkpoint(self):
        """What submitit is to do when the job runs again."""
        import submitit

        return submitit.helpers.DelayedSubmission(Task(self._run))
