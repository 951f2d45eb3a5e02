"""Runs of a sweep as jobs: what submitit's signals do to them, and what a SLURM cluster does."""

import dataclasses
import getpass
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from unittest import mock

import pytest
import submitit

import runs
from common import host
from common.errors import UserError
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


# How many devices a run is told to make of the CPU that is one of so many at once.
ASKING = """
import pathlib, sys
from run import arms, launchers
class Asking(arms.ArmRun):
    command = [sys.executable, "-c", "import os; print(os.environ.get('JAX_NUM_CPU_DEVICES', 'free'))"]
run = Asking("base", 0, pathlib.Path(sys.argv[1]), (), {})
launchers.Here(int(sys.argv[2])).start(run).wait()
print(run.log.read_text())
"""


@pytest.mark.parametrize(("jobs", "asked", "says"), [(1, "", "free"), (4096, "", "1"), (4096, "2", "2")])
def test_runs_that_share_cores_take_one_device_each(tmp_path, jobs, asked, says):
    variables = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    variables |= {"JAX_NUM_CPU_DEVICES": asked} if asked else {}
    command = [sys.executable, "-c", ASKING, str(tmp_path), str(jobs)]
    done = subprocess.run(command, env=variables, cwd=runs.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [says]


@pytest.mark.parametrize(
    ("visible", "files", "jobs", "each"),
    [
        (None, (0, 1, 10, 2), 2, ["0,1", "2,10"]),
        (None, (0, 1, 2), 2, ["0", "1"]),  # as many for each
        ("3,GPU-5f", (0, 1, 2, 3), 2, ["3", "GPU-5f"]),
        ("2,-1,0", (0, 1, 2), 1, [None]),  # one run keeps what the user set
        ("", (0, 1), 2, [None, None]),
        (None, (), 2, [None, None]),
    ],
)
def test_runs_at_once_have_gpus_of_their_own(tmp_path, monkeypatch, visible, files, jobs, each):
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: name == "jax_cuda12_plugin")
    monkeypatch.setattr(host, "_DEVICES", tmp_path)
    monkeypatch.setattr(subprocess, "Popen", mock.Mock(return_value=mock.Mock(returncode=None)))
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in files)):
        (tmp_path / name).touch()
    found, run = launchers.Here(jobs), mock.Mock(log=tmp_path / "log")
    for _ in range(jobs):
        found.start(run)
    given = [call.kwargs["env"].get("CUDA_VISIBLE_DEVICES") for call in subprocess.Popen.call_args_list]
    assert given == [visible if share is None else share for share in each]


@pytest.mark.parametrize(("platforms", "plugin"), [("cpu", True), ("", False), ("", True)])
def test_more_runs_than_gpus_are_refused_if_jax_would_take_gpus(monkeypatch, platforms, plugin):
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: plugin)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    if platforms or not plugin:
        launchers.Here(3)
        return
    with pytest.raises(UserError, match="--jobs=3 needs a GPU for each run; of GPUs there are 2"):
        launchers.Here(3)


def stand_in(tmp_path, code):
    run = StandIn("base", 0, tmp_path / "run", (str(code),), {})
    run.workdir.mkdir(parents=True)
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


# Stand-ins for SLURM's commands: the queue is a file.
COMMANDS = {
    "sbatch": """comment=$(sed -n "s/^#SBATCH --comment='\\(.*\\)'/\\1/p" "$1")
cp "$1" script; echo "7 $comment" >> queue; echo Submitted batch job 7""",
    "squeue": "test ! -e away && cat queue",
    "scancel": ": > queue",
    "srun": "exit 1",
}


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """The file with the jobs of those stand-ins."""
    (tmp_path / "bin").mkdir()
    for name, does in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ncd {tmp_path}\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(launchers.Slurm, "SECONDS", 0.0)
    monkeypatch.setattr(launchers.Job, "PATIENCE", 0.1)
    (tmp_path / "queue").write_text("3 a comment\nof another's job\n\n")
    return tmp_path / "queue"


def test_a_job_is_taken_up_by_the_same_command_alone(queue, tmp_path):
    run = stand_in(tmp_path, 0)
    run.start(launchers.Slurm(0, {"partition": "p", "exclusive": True}))
    script = (tmp_path / "script").read_text()
    for option in ("--partition=p", "--exclusive", "--requeue", "--job-name=base/seed-0"):
        assert f"#SBATCH {option}\n" in script
    (tmp_path / "script").unlink()
    again = dataclasses.replace(run)
    again.start(launchers.Slurm(0, {}))
    assert again.process.poll() is None and not (tmp_path / "script").exists()
    with pytest.raises(UserError, match=r"job 7 uses .*run for another command; `scancel 7` ends it"):
        dataclasses.replace(run, flags=("1",)).start(launchers.Slurm(0, {}))
    again.process.terminate()
    again.process.wait()
    time.sleep(0.2)
    assert (again.process.poll(), again.failure()) == (1, "SLURM's job 7 left the queue before its end.")


def test_results_of_earlier_jobs_do_not_count(queue, tmp_path):
    run = stand_in(tmp_path, 0)
    (run.workdir / "slurm").mkdir()
    (run.workdir / "slurm/7_0_result.pkl").write_bytes(pickle.dumps(("success", 0)))
    run.start(launchers.Slurm(0, {}))
    assert run.process.poll() is None
    (run.workdir / "slurm/7_0_result.pkl").write_bytes(pickle.dumps(("error", "Traceback\nOSError: why")))
    assert (run.process.poll(), run.failure()) == (1, "OSError: why")


def test_a_queue_that_is_not_known_is_not_empty(queue, tmp_path):
    (tmp_path / "away").touch()
    with pytest.raises(UserError, match="squeue does not answer"):
        stand_in(tmp_path, 0).start(launchers.Slurm(0, {}))
    (tmp_path / "away").unlink()
    run = dataclasses.replace(stand_in(tmp_path / "a", 0))
    run.start(launchers.Slurm(0, {}))
    (tmp_path / "away").touch()
    queue.write_text("")
    time.sleep(0.2)
    assert run.process.poll() is None, "it may be there: nobody has said otherwise"


@pytest.mark.parametrize(
    ("workdir", "options", "sentence"),
    [("50%j", {}, "holds a %"), ("run", {"job-name": "x"}, "--slurm.job-name cannot be given")],
)
def test_what_a_cluster_cannot_take_is_named(queue, tmp_path, workdir, options, sentence):
    run = dataclasses.replace(stand_in(tmp_path, 0), workdir=tmp_path / workdir)
    with pytest.raises(UserError, match=sentence):
        run.start(launchers.Slurm(0, options))


# A cluster of this machine alone. A job in `urgent` takes the place of one in `usual`, which goes back into the queue.
SLURM = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
AccountingStorageType=accounting_storage/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} Gres=gpu:2 State=UNKNOWN
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL PriorityTier=2
"""
GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"  # SLURM takes any two devices for GPUs


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """SLURM's daemons of Debian's slurm-wlm on this machine."""
    daemons = ("munged", "slurmctld", "slurmd")
    if os.getuid() or not all(map(shutil.which, daemons)):
        pytest.skip("needs root and Debian's slurm-wlm and munge")
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0)), other.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1], other.getsockname()[1]]
    host = socket.gethostname().partition(".")[0]
    settings = dict(host=host, ports=ports, user=getpass.getuser(), folder=folder, cores=os.cpu_count())
    (folder / "slurm.conf").write_text(SLURM.format(**settings))
    (folder / "gres.conf").write_text(GPUS)
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    files = [f"--{what}-file={folder / f'munge.{what}'}" for what in ("pid", "log", "seed")]
    commands = (
        [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={folder / 'key'}",
            f"--socket={folder}/munge.socket",
            *files,
        ],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D"],
    )
    processes = []
    for command, ready in zip(commands, (None, ["scontrol", "ping"], ["sinfo", "--states=idle", "-h"]), strict=True):
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        until(lambda command=ready: said(*command) if command else (folder / "munge.socket").exists())
    yield
    subprocess.run(["scancel", f"--user={getpass.getuser()}"])
    for process in reversed(processes):
        process.terminate()
        process.wait()


def said(*command):
    """What a command says; "" if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def until(holds, seconds=120):
    """Waits until it holds."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.2)
    return found


@pytest.mark.slow
def test_a_cluster(slurm, tmp_path):
    """Two arms of main.py. The sweep is killed, and the first arm preempted; the same command ends them both."""
    photographs = runs.photographs(tmp_path)
    workdir = tmp_path / "w"
    (tmp_path / "sweep.py").write_text(
        "from configs.sweeps import Arm, Measure, Sweep, last\n"
        "def get_sweep():\n"
        "    arms = {'base': Arm(), 'other': Arm({'model.lrn': False})}\n"
        "    return Sweep('configs/alexnet.py', arms, [Measure('error', last('test/top1_error'))], seeds=(0,))\n"
    )
    config = [flag for flag in runs.command(photographs, "") if flag.startswith("--config.")]
    options = ["--slurm.partition=usual", f"--slurm.cpus-per-task={os.cpu_count()}", "--slurm.gpus=2"]
    command = [sys.executable, "-m", "tools.sweep", f"--sweep={tmp_path / 'sweep.py'}", f"--workdir={workdir}"]
    steps = ["--config.num_steps=400", "--config.checkpoint_every.steps=50", "--config.optimizer.learning_rate=0.0003"]
    command += ["--launcher=slurm", *options, *config, *steps]
    with subprocess.Popen(command, cwd=runs.ROOT, start_new_session=True) as sweep:
        base = workdir / "base/seed-0"
        until(lambda: (base / "metrics.jsonl").exists() and len(runs.metrics(base)) > 20)
        queue = said("squeue", "--noheader", "--format=%i %j %T").splitlines()
        sweep.kill()
    jobs = {name: (number, state) for number, name, state in map(str.split, queue)}
    number, state = jobs["base/seed-0"]
    assert (state, jobs["other/seed-0"][1]) == ("RUNNING", "PENDING")
    assert "gpu:2" in said("scontrol", "show", "job", number)
    subprocess.run(["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"], check=True)
    until(lambda: "Restarts=1" in said("scontrol", "show", "job", number))
    assert "Stopped by SIGTERM" in (base / "log.txt").read_text()
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "base/seed-0 goes on" in done.stderr
    assert [path.name for path in (base / "slurm").glob("*_submission.sh")] == [f"{number}_submission.sh"]
    for arm in ("base", "other"):
        trained = [line["step"] for line in runs.metrics(workdir / arm / "seed-0") if "train/loss" in line]
        assert trained == list(range(1, 401))
    assert "| other | 1 |" in (workdir / "results.md").read_text()
