"""Several processes are one run: the same losses, one writer, one end. Here two, of two devices each, on this host."""

import contextlib
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.photographs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(folder):
    """The same run in one process with four devices."""
    runs.run(folder, folder / "alone", "--config.num_steps=20", devices=4)
    return folder / "alone"


@contextlib.contextmanager
def pair(folder, workdir, *arguments, second=()):
    """Two processes that find each other by flags; `second` are arguments of the second one alone."""
    port = runs.free_port()

    def flags(number):
        return f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2", f"--process_id={number}"

    with (
        runs.start(folder, workdir, *arguments, *flags(0)) as zero,
        runs.start(folder, workdir, *arguments, *flags(1), *second) as one,
    ):
        yield zero, one


def assert_equal_metrics(workdir, other):
    """All metrics agree to 1e-5, line by line: nothing is missing, and nothing is written twice."""
    mine, theirs = runs.metrics(workdir), runs.metrics(other)
    assert [(line["step"], *sorted(line)) for line in mine] == [(line["step"], *sorted(line)) for line in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_processes_end_and_go_on_together(folder, alone):
    """The second process is killed, the whole is started again, the second is asked to stop, and so on to the end."""
    workdir = folder / "together"
    arguments = ("--config.num_steps=20",)

    with pair(folder, workdir, *arguments) as (zero, one):
        runs.until(zero, 6)
        one.kill()
        begun = time.monotonic()
        said = zero.stdout.read()
        assert zero.wait(60) == 2, said
        assert time.monotonic() - begun < 60
        assert "of this run has ended or is out of reach; start all of them again" in runs.sentence(said)

    with pair(folder, workdir, *arguments) as (zero, one):
        resumed = runs.until(zero, 12)
        assert "Continuing after step 5:" in resumed
        one.send_signal(signal.SIGTERM)
        said = zero.stdout.read(), one.stdout.read()
        assert (zero.wait(60), one.wait(60)) == (143, 143), said
        assert "SIGTERM: saving" in said[1] and "SIGTERM: saving" not in said[0]
        step = int(said[0].rpartition("Stopped by SIGTERM: step ")[2].split()[0])
        assert runs.checkpoints(workdir)[-1] == step < 20

    with pair(folder, workdir, *arguments) as (zero, one):
        said = zero.stdout.read(), one.stdout.read()
        assert (zero.wait(60), one.wait(60)) == (0, 0), said
        assert f"Continuing after step {step}:" in said[0]
        assert "Done: 20 steps" in said[0] and "Done" not in said[1] and "step " not in said[1]
    assert_equal_metrics(workdir, alone)
    assert len(list(workdir.glob("events.out.tfevents*.v2"))) == 3, "one writer for each start"
    assert runs.leftovers(workdir) == []


@pytest.mark.slow
def test_slurm_needs_no_flags(folder, alone):
    """The variables that srun sets for two tasks on two nodes; both nodes are this host."""
    workdir, job = folder / "slurm", os.getpid()
    slurm = {
        "SLURM_JOB_ID": f"{job}",
        "SLURM_STEP_NODELIST": "localhost,localhost",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
    }
    arguments = folder, workdir, "--config.num_steps=20"
    with (
        runs.start(*arguments, env=os.environ | slurm | {"SLURM_PROCID": "0"}) as zero,
        runs.start(*arguments, env=os.environ | slurm | {"SLURM_PROCID": "1"}) as one,
    ):
        said = zero.stdout.read(), one.stdout.read()
        assert (zero.wait(60), one.wait(60)) == (0, 0), said
    assert "Devices: 4 × cpu" in said[0]
    assert_equal_metrics(workdir, alone)


def test_a_process_that_cannot_begin_ends_both_with_its_sentence(folder):
    """The second process has another learning rate; nothing is written."""
    workdir = folder / "unequal"
    with pair(folder, workdir, second=["--config.optimizer.learning_rate=0.3"]) as (zero, one):
        said = zero.stdout.read(), one.stdout.read()
        assert (zero.wait(60), one.wait(60)) == (2, 2), said
    for words in said:
        assert "optimizer.learning_rate (0.01 in process 0, 0.3 in process 1)" in words
    assert not workdir.exists()


def connections(port):
    """The ends of established connections with a port of this host."""
    tables = [pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6")]
    rows = [line.split() for line in itertools.chain(*tables)]
    return sum(state == "01" and f":{port:04X}" in (own[-5:], other[-5:]) for _, own, other, state, *_ in rows)


WAITS = """
import sys
from run import processes
processes.NOTICE, processes.PATIENCE = 1, 3
processes.initialize(sys.argv[1], 2, int(sys.argv[2]))
"""


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_stays_alone_says_whom_it_waits_for_and_ends(number):
    address = f"127.0.0.1:{runs.free_port()}"
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", WAITS, address, str(number)], cwd=runs.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and time.monotonic() - begun < 30
    assert f"Waiting for process {1 - number} at {address}." in done.stdout
    assert f"Waited 3 s for process {1 - number} at {address}" in runs.sentence(done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 0.5, 1, 2])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_while_it_starts_ends_the_other_with_a_sentence(folder, tmp_path, victim, seconds):
    """While it imports, prepares or compiles, so many seconds after the two have met, in processes that start anew."""
    port = runs.free_port()
    address = f"127.0.0.1:{port}"
    commands = [
        runs.command(
            folder, tmp_path / "run", f"--coordinator_address={address}", "--num_processes=2", f"--process_id={number}"
        )
        for number in range(2)
    ]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    while connections(port) < 4:  # both ends of those of both processes with the store in process 0
        time.sleep(0.05)
    time.sleep(seconds)
    both[victim].kill()
    said, _ = both[1 - victim].communicate(timeout=100)
    both[victim].communicate()
    assert both[1 - victim].returncode == 2, said
    assert "has ended or is out of reach; start all of them again" in runs.sentence(said)


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("victim", [0, 1])
def test_no_process_waits_for_one_that_is_gone(folder, victim, stop):
    """Killed, or hanging, as a machine does that lost its network."""
    with pair(folder, folder / f"gone-{victim}-{stop}", "--config.num_steps=100000") as processes:
        runs.until(processes[0], 3)
        processes[victim].send_signal(signal.Signals[stop])
        begun = time.monotonic()
        said = processes[1 - victim].stdout.read()
        assert processes[1 - victim].wait(60) == 2, said
        assert time.monotonic() - begun < 60
        assert "has ended or is out of reach" in said


@pytest.mark.slow
def test_processes_that_were_suspended_together_go_on(folder):
    """As by Ctrl-Z, a suspended job or a paused container: longer than a process may be silent."""
    with pair(folder, folder / "suspended", "--config.num_steps=100000") as processes:
        runs.until(processes[0], 3)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                process.send_signal(number)
            time.sleep(25 if number == signal.SIGSTOP else 10)
        assert all(process.is_alive() for process in processes)
        processes[0].send_signal(signal.SIGTERM)
        said = processes[0].stdout.read(), processes[1].stdout.read()
        assert [process.wait(60) for process in processes] == [143, 143], said


@pytest.mark.slow
def test_what_stops_one_process_is_said_by_both(folder, alone):
    """The second process reads a copy of the data, in which every training record has one bit changed."""
    copy = shutil.copytree(folder / "cache", folder / "copy")
    (records,) = copy.rglob("*train*.tfrecord*")
    content = bytearray(records.read_bytes())
    for place in range(400, len(content), 1000):
        content[place] ^= 1
    records.write_bytes(content)
    with pair(folder, folder / "one-fails", "--config.num_steps=20", second=[f"--config.dataset.data_dir={copy}"]) as (
        zero,
        one,
    ):
        said = zero.stdout.read(), one.stdout.read()
        assert (zero.wait(60), one.wait(60)) == (2, 2), said
    assert "is damaged; delete" in runs.sentence(said[1])
    assert "Process 1: A record of" in runs.sentence(said[0])
