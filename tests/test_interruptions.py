"""Stopped anywhere, a run goes on as if nothing had been: real processes, real signals, real disks."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

import input_pipeline
import recipes
import runs
import train
from common import exits

STEPS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.photographs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(folder):
    """A run in one go, and the seconds it took from preparation to end."""
    begun = time.monotonic()
    runs.run(folder, folder / "undisturbed", f"--config.num_steps={STEPS}")
    return folder / "undisturbed", time.monotonic() - begun


def kill_somewhere(process, choice, seconds):
    """Kills a run with SIGKILL: at a random time, or at a random moment after a random step. Returns what it said."""
    if choice.random() < 0.4:
        timer = threading.Timer(choice.uniform(0, seconds), process.kill)
        timer.start()
        said = process.stdout.read()
        timer.cancel()
    else:
        said = runs.until(process, choice.randrange(1, STEPS))
        time.sleep(choice.uniform(0, 0.3))  # in the next steps, in an evaluation, or while a checkpoint is written
        process.kill()
        said += process.stdout.read()
    process.wait(60)
    return said


def check_killed_runs(folder, undisturbed, seed, kills):
    whole, seconds = undisturbed
    choice = random.Random(seed)
    done, number = 0, 0
    while done < kills:
        number += 1
        workdir, cache = folder / f"killed-{seed}-{number}", folder / f"cache-{seed}-{number}"
        while done < kills:
            before = runs.checkpoints(workdir)
            with runs.start(folder, workdir, f"--config.num_steps={STEPS}", cache=cache.name) as process:
                said = kill_somewhere(process, choice, seconds)
            if "Continuing after step" in said or "Training: " in said:
                resumed_at = f"Continuing after step {before[-1]}:" if before else "Training: "
                assert resumed_at in said, (before, said)
            assert "Traceback" not in said and "warning" not in said
            if process.returncode != -signal.SIGKILL:
                break  # it was done sooner
            done += 1
            assert runs.checkpoints(workdir)[-1:] >= before[-1:], "a checkpoint is lost"
        runs.run(folder, workdir, f"--config.num_steps={STEPS}", cache=cache.name)
        runs.assert_same(workdir, whole, STEPS)
        assert runs.leftovers(workdir, cache) == []
        assert runs.checkpoints(workdir) == runs.checkpoints(whole)
        shutil.rmtree(workdir)


def test_killed_runs_end_as_undisturbed_ones(folder, undisturbed):
    check_killed_runs(folder, undisturbed, seed=0, kills=2)


@pytest.mark.slow
def test_runs_killed_twenty_times_end_as_undisturbed_ones(folder, undisturbed):
    check_killed_runs(folder, undisturbed, seed=1, kills=20)


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGHUP"))]
)
def test_a_signal_saves_and_the_next_start_goes_on(folder, undisturbed, name):
    workdir = folder / name
    with runs.start(folder, workdir, f"--config.num_steps={STEPS}") as process:
        runs.until(process, 7)
        process.send_signal(signal.Signals[name])
        begun = time.monotonic()
        said = process.stdout.read()
        assert process.wait(60) == {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}[name], said
        assert time.monotonic() - begun < 10
    step = int(said.rpartition(f"Stopped by {name}: step ")[2].split()[0])
    assert 7 <= step < STEPS, "the signal came too late"
    assert runs.checkpoints(workdir)[-1] == step
    assert f"Continuing after step {step}:" in runs.run(folder, workdir, f"--config.num_steps={STEPS}").stdout
    runs.assert_same(workdir, undisturbed[0], STEPS)


def test_a_second_ctrl_c_on_the_way_out_is_not_heard(folder):
    with runs.start(folder, folder / "impatient", f"--config.num_steps={STEPS}") as process:
        runs.until(process, 7)
        process.send_signal(signal.SIGINT)
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("Stopped by SIGINT"):
                break
        while process.is_alive():
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        said += process.stdout.read()
    assert process.returncode == 130 and "Traceback" not in said and "Exception" not in said, said


def test_a_run_outlives_the_reader_of_its_output(folder, undisturbed):
    """Both streams go into one pipe, as to `2>&1 | head`, or to a connection that is lost."""
    with runs.start(folder, folder / "unread", f"--config.num_steps={STEPS}") as process:
        runs.until(process, 3)
        process.stdout.close()
        assert process.wait() == 0
    runs.assert_same(folder / "unread", undisturbed[0], STEPS)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")  # noqa: PTH110
def test_a_log_on_a_full_disk_does_not_end_a_run(folder, undisturbed):
    arguments = runs.command(folder, folder / "unlogged", f"--config.num_steps={STEPS}")[1:]
    with open("/dev/full", "w") as full, tempfile.TemporaryFile("w+") as err:  # noqa: PTH123
        assert runs.Forked(arguments, runs._Descriptor(full), runs._Descriptor(err)).wait() == 0
        err.seek(0)
        assert "warning: stdout takes no more (No space left on device); the run goes on." in err.read()
    runs.assert_same(folder / "unlogged", undisturbed[0], STEPS)


def test_a_signal_may_come_while_something_is_printed(monkeypatch):
    """Python refuses a second print into a stream then, with a RuntimeError."""

    class Busy:
        def write(self, _):
            raise RuntimeError("reentrant call")

        flush = write

    signals = exits.StopSignal()
    with signals:
        monkeypatch.setattr("sys.stderr", Busy())
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.code == 143


def test_output_outlives_its_reader_without_stderr():
    """stdin and stderr closed, so that files take their numbers."""
    program = "from common import exits; exits.outlive_readers(); [print('x' * 1000) for _ in range(999)]; print('end')"
    command = ["sh", "-c", 'exec "$0" "$@" <&- 2>&-', sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=runs.ROOT) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0


def test_help_outlives_its_reader():
    command = [sys.executable, str(runs.ROOT / "main.py"), "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == ("", 0)


def test_nohup_is_respected():
    """SIGHUP ignored from before stays ignored."""
    signals = exits.StopSignal()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.code == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.code == 143
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def here(folder):
    """The config of a run within this process, on its four devices."""
    config = recipes.narrow(num_classes=3, init="he")
    config.dataset.update(name=str(folder / "photos"), data_dir=str(folder / "cache"), eval_split="test")
    config.update(dict(batch_size=8, eval_batch_size=4, num_steps=15))
    config.log_every.steps = 3
    return config


@pytest.fixture(scope="module")
def whole_here(folder):
    assert train.train(here(folder), folder / "whole-here") == 0
    return folder / "whole-here"


def test_a_signal_gives_an_evaluation_up_and_the_next_start_does_it(folder, whole_here, monkeypatch, capsys):
    """In the centre view of step 10, the second evaluation, and then in the ten views after the last step."""
    workdir, count, original = folder / "given-up", 0, input_pipeline.eval_batches
    stop_at = 2

    def eval_batches(*args, **options):
        nonlocal count
        count += 1
        for number, batch in enumerate(original(*args, **options)):
            if (count, number) == (stop_at, 0):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(input_pipeline, "eval_batches", eval_batches)
    for stop_at, step in ((2, 10), (5, 15)):  # the second start does those of steps 10 and 15, and the ten views
        assert train.train(here(folder), workdir) == 143
        assert count == stop_at
        assert len(runs.metrics(workdir)) < len(runs.metrics(whole_here))
        assert runs.checkpoints(workdir)[-1] == step
        assert "Done" not in capsys.readouterr().out
    assert train.train(here(folder), workdir) == 0
    runs.assert_same(workdir, whole_here, 15)
    assert runs.leftovers(workdir) == []


# Disks.


def mountable():
    return shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


def in_own_mounts(*commands):
    """A prefix that runs shell commands, mounts for the most part, and then what follows, where only that sees them."""
    return ["unshare", "-rm", "sh", "-c", " && ".join([*commands, 'exec "$@"']), "sh"]


@pytest.mark.skipif(not mountable(), reason="this system lets ordinary users mount nothing")
def test_a_full_disk_ends_in_a_sentence_and_loses_nothing(folder, undisturbed):
    """A disk of 4 MB takes one checkpoint of 2.5 MB; with more room the run goes on from it."""
    home, kept = folder / "small", folder / "kept"
    home.mkdir()
    prefix = in_own_mounts(
        f"mount -t tmpfs -o size=4m none {home}", f'"$@"; code=$?; cp -r {home}/run {kept}; exit $code; true'
    )
    done = runs.run(folder, home / "run", f"--config.num_steps={STEPS}", prefix=prefix, expect=2)
    said = runs.sentence(done.stderr)
    assert "The checkpoint of step 10 cannot be written" in said and "No space left on device" in said
    assert "can go on from step 5" in said
    assert runs.checkpoints(kept) == [5] and runs.leftovers(kept) == []
    assert "after step 5:" in runs.run(folder, kept, f"--config.num_steps={STEPS}").stdout
    runs.assert_same(kept, undisturbed[0], STEPS)


@pytest.mark.skipif(not mountable(), reason="this system lets ordinary users mount nothing")
@pytest.mark.parametrize(
    ("dataset", "filled", "said"),
    [
        ("{folder}/photos", False, "{home} cannot take the prepared records: its disk is full."),
        ("{folder}/photos", True, "{home} cannot take the prepared records: its disk is full."),
        ("shapes", False, "TFDS could not get shapes ready in {home}: its disk is full."),
    ],
    ids=["while records are written", "before", "while TFDS writes"],
)
def test_a_disk_that_fills_during_a_preparation_is_named_and_keeps_nothing(folder, tmp_path, dataset, filled, said):
    """A disk of 100 kB, of which all may be taken."""
    home, kept, places = tmp_path / "small", tmp_path / "kept", dict(folder=folder, home=tmp_path / "small")
    home.mkdir()
    prefix = in_own_mounts(
        f"mount -t tmpfs -o size=100k none {home}",
        f"mkdir {home}/prepared {home}/shapes {home}/downloads",
        f"head -c {'1m' if filled else '1k'} /dev/zero > {home}/other; true",
        f'"$@"; code=$?; find {home} -type f > {kept}; exit $code; true',
    )
    command = [*prefix, sys.executable, "-m", "tools.prepare", f"--dataset={dataset.format(**places)}"]
    done = subprocess.run([*command, f"--data_dir={home}"], cwd=runs.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert runs.sentence(done.stderr) == f"error: {said.format(**places)}"
    assert kept.read_text().splitlines() == [f"{home}/other"]


def test_files_that_may_not_grow_end_in_a_sentence(folder):
    """The same without mounts: the system refuses to write more than 600 blocks to a file."""
    workdir = folder / "limited"
    prefix = ["sh", "-c", 'ulimit -f 600; exec "$@"', "sh"]
    said = runs.sentence(runs.run(folder, workdir, "--config.num_steps=10", prefix=prefix, expect=2).stderr)
    assert "The checkpoint of step 5 cannot be written" in said
    assert "File too large. There is none before it." in said
    assert runs.checkpoints(workdir) == [] and runs.leftovers(workdir) == []


@pytest.mark.skipif(not mountable(), reason="this system lets ordinary users mount nothing")
@pytest.mark.parametrize("begun", [False, True], ids=["empty", "with a run"])
def test_a_workdir_that_cannot_be_written_is_named(folder, undisturbed, begun):
    workdir = folder / f"read-only-{begun}"
    if begun:
        shutil.copytree(undisturbed[0], workdir)
    else:
        workdir.mkdir()
    before = sorted(workdir.rglob("*"))
    prefix = in_own_mounts(f"mount --bind {workdir} {workdir}", f"mount -o remount,bind,ro {workdir}")
    done = runs.run(folder, workdir, f"--config.num_steps={STEPS + 5}", prefix=prefix, expect=2)
    assert f"--workdir={workdir} cannot be written: Read-only file system" in runs.sentence(done.stderr)
    assert sorted(workdir.rglob("*")) == before


# Hours.

# Runs main.py in this process, and looks at it every second: memory (bytes), open files, bytes on the devices,
# programs compiled, steps done.
WATCHED = """
import json, os, pathlib, sys, threading
import jax
out, compiled = pathlib.Path(sys.argv.pop(1)), []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
)
def look():
    while not done.wait(1):
        resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        with out.open("a") as file:
            row = [resident, len(os.listdir("/proc/self/fd")), sum(a.nbytes for a in jax.live_arrays()), len(compiled)]
            file.write(json.dumps(row) + "\\n")
done = threading.Event()
threading.Thread(target=look).start()
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
import main
from common import cli
try:
    cli.run(main.main)
finally:
    done.set()
"""


@pytest.mark.slow
def test_five_thousand_steps_leave_no_trace(folder, tmp_path):
    """Memory of host and devices, and open files, are flat; every step has its line; nothing compiles twice."""
    steps, workdir = 5000, folder / "long"
    python, *arguments = runs.command(
        folder,
        workdir,
        f"--config.num_steps={steps}",
        "--config.optimizer.learning_rate=0.001",
        "--config.eval_every.steps=250",
        "--config.checkpoint_every.steps=250",
    )
    log = tmp_path / "looks.jsonl"
    done = subprocess.run(
        [python, "-c", WATCHED, str(log), *arguments[1:]],
        capture_output=True,
        text=True,
        cwd=runs.ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    looks = [json.loads(line) for line in log.read_text().splitlines()]
    middle, end = looks[len(looks) // 3 : len(looks) // 2], looks[-len(looks) // 5 : -3]
    print(f"{len(looks)} looks; a third on {middle[0]}, near the end {end[-1]}")

    def typical(rows, column):
        return sorted(row[column] for row in rows)[len(rows) // 2]

    # A batch that is kept would be 108 kB a step, half a gigabyte in all. TensorFlow's summaries keep a little for each
    # value, and what glibc gives back to the system differs by a few per cent from run to run.
    assert typical(end, 0) < 1.1 * typical(middle, 0), "memory of the host grows"
    assert typical(end, 1) <= typical(middle, 1), "open files grow"
    assert typical(end, 2) <= typical(middle, 2), "memory of the devices grows"
    assert end[-1][3] == middle[0][3], "something compiled again"
    lines = runs.metrics(workdir)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, steps + 1))
    assert [line["step"] for line in lines if "eval/loss" in line] == list(range(250, steps + 1, 250))
    assert runs.leftovers(workdir) == []
