"""Runs of a sweep as jobs: what submitit's signals do to them, and what a SLURM cluster does."""

import dataclasses
import os
import sys

import pytest
import submitit

import runs
from run import arms, launchers

# In place of main.py: its steps take more than those six seconds, and SIGTERM ends it as it ends a run.
STAND_IN = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("started", flush=True)
for step in range(open("steps").read().count("\\n"), 16):
    time.sleep(0.4)
    with open("steps", "a") as file:
        print(step, file=file)
sys.exit(CODE)
"""


@dataclasses.dataclass(eq=False)
class StandIn(arms.ArmRun):
    """A run of STAND_IN."""

    @property
    def command(self):
        return [
            sys.executable,
            "-c",
            f"import os; os.chdir({str(self.workdir)!r})\n{STAND_IN}".replace("CODE", self.flags[0]),
        ]


@pytest.fixture
def executor(tmp_path, monkeypatch):
    """submitit's local executor, which signals a job after six seconds and starts one again that requeues itself."""
    monkeypatch.setenv("PYTHONPATH", f"{runs.ROOT}{os.pathsep}{runs.ROOT / 'tests'}")
    found = submitit.LocalExecutor(tmp_path / "jobs", max_num_timeout=9)
    found.update_parameters(timeout_min=0.25, signal_delay_s=9)
    return found


def stand_in(tmp_path, code):
    run = StandIn("base", 0, tmp_path / "run", (str(code),), 0)
    run.workdir.mkdir()
    (run.workdir / "steps").touch()
    return run


def test_a_job_that_is_signalled_saves_and_goes_on_when_it_runs_again(executor, tmp_path):
    run = stand_in(tmp_path, 0)
    job = executor.submit(launchers.Task(run))
    assert job.result() == 0
    assert run.log.read_text().count("started") >= 2, "it was never requeued"
    assert (run.workdir / "steps").read_text().split() == [str(step) for step in range(16)]
    assert run.finished


def test_a_job_that_fails_does_not_run_again(executor, tmp_path):
    run = stand_in(tmp_path, 2)
    (run.workdir / "steps").write_text("\n" * 16)
    assert executor.submit(launchers.Task(run)).result() == 2
    assert run.log.read_text().count("started") == 1 and not run.finished
