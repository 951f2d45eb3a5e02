"""Whole runs through main.py: exact resume, signals, what a workdir holds, and every refusal in one sentence."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

import data

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLASSES = ("a", "b", "c")
# A narrow network on small views: seconds a run, all of them start-up.
SMALL = [
    "--config.input.resize=80",
    "--config.input.crop=67",
    "--config.model.width=0.125",
    "--config.model.num_classes=3",
    "--config.model.init=he",
    "--config.input.scale=0.0156",
    "--config.batch_size=8",
    "--config.eval_batch_size=16",
    "--config.dataset.eval_split=test",
    "--config.log_every.steps=1",
    "--config.eval_every.steps=5",
    "--config.checkpoint_every.steps=5",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of photographs, and where it is prepared."""
    root = tmp_path_factory.mktemp("data")
    data.make_folder(root / "photos", {"train": 30, "test": 12}, CLASSES)
    return root


def command(folder, workdir, *arguments, devices=2):
    return [
        sys.executable,
        str(ROOT / "main.py"),
        f"--config={ROOT / 'configs/alexnet.py'}",
        f"--workdir={workdir}",
        f"--cpu_devices={devices}",
        f"--config.dataset.name={folder / 'photos'}",
        f"--config.dataset.data_dir={folder / 'cache'}",
        *SMALL,
        *arguments,
    ]


def run(*args, expect=0, **options):
    done = subprocess.run(command(*args, **options), capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def parameters(workdir, step):
    state = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")
    return {"/".join(map(str, path)): leaf for path, leaf in _leaves(state)}


def _leaves(tree, path=()):
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return [(path, np.asarray(tree))] if tree is not None else []
    return [found for key, value in items for found in _leaves(value, (*path, key))]


@pytest.fixture(scope="module")
def whole(folder):
    """Ten steps in one go, in the paper's layout."""
    workdir = folder / "whole"
    return workdir, run(folder, workdir, "--config.num_steps=10").stdout


def test_a_run_leaves_what_it_promises(whole):
    workdir, said = whole
    lines = metrics(workdir)
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, 11))
    assert all({"step", "epoch"} <= set(line) for line in lines)
    assert lines[0]["epoch"] == pytest.approx(8 / 30, abs=1e-3)
    timed = [line for line in lines if "train/images_per_second" in line]
    assert timed and all(0 <= line["train/input_wait"] <= 1 for line in timed)
    assert [line["step"] for line in lines if "eval/top1_error" in line] == [5, 10]
    test = [line for line in lines if "test/top1_error" in line]
    assert len(test) == 1 and 0 <= test[0]["test/top1_error"] <= 1
    assert json.loads((workdir / "config.json").read_text())["model"]["width"] == 0.125
    assert list(workdir.glob("events.out.tfevents*"))
    for what in ("one tower on each of two devices", str(workdir / "checkpoints"), f"--logdir={workdir}"):
        assert what in said


def test_resumed_run_is_bit_identical(folder, whole):
    """5 + 5 steps in two processes give the parameters and the losses of 10 in one."""
    workdir = folder / "halves"
    run(folder, workdir, "--config.num_steps=5")
    assert "Continuing after step 5" in run(folder, workdir, "--config.num_steps=10").stdout
    mine, theirs = parameters(workdir, 10), parameters(whole[0], 10)
    assert mine.keys() == theirs.keys() and len(mine) > 30
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    losses = [
        {line["step"]: line["train/loss"] for line in metrics(w) if "train/loss" in line} for w in (workdir, whole[0])
    ]
    assert losses[0] == losses[1]


def test_checkpoint_continues_on_other_devices(folder, whole):
    """Five steps on two devices, five on one: the losses of ten on two."""
    workdir = folder / "elsewhere"
    run(folder, workdir, "--config.num_steps=5")
    run(folder, workdir, "--config.num_steps=10", devices=1)
    losses = [[line["train/loss"] for line in metrics(w) if "train/loss" in line] for w in (workdir, whole[0])]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_finished_run_says_so_and_stays_as_it_is(folder, whole):
    before = (whole[0] / "metrics.jsonl").read_text()
    assert "Done: 10 steps" in run(folder, whole[0], "--config.num_steps=10").stdout
    assert (whole[0] / "metrics.jsonl").read_text() == before


def test_two_processes_are_one_run(folder):
    """Two processes of two devices each, a network in either: the losses and errors of one process with four."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = [
        subprocess.Popen(
            command(
                folder,
                folder / "together",
                "--config.num_steps=6",
                f"--coordinator_address=127.0.0.1:{port}",
                "--num_processes=2",
                f"--process_id={number}",
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in together]
    finally:
        for process in together:
            process.kill()
    assert [process.returncode for process in together] == [0, 0], said
    assert "Done: 6 steps" in said[0] and "Done" not in said[1]
    run(folder, folder / "alone", "--config.num_steps=6", devices=4)
    mine, theirs = metrics(folder / "together"), metrics(folder / "alone")
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        for name in other:
            if not name.endswith(("images_per_second", "input_wait")):
                assert one[name] == pytest.approx(other[name], rel=1e-5), name


def test_sigterm_saves_and_the_next_start_goes_on(folder):
    workdir = folder / "stopped"
    with subprocess.Popen(
        command(folder, workdir, "--config.num_steps=100000", "--config.eval_every.steps=100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            for line in process.stdout:
                if line.startswith("step ") and int(line.split()[1]) >= 3:
                    break
            process.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            said = process.stdout.read()
            assert process.wait(60) == 143, said
            assert time.monotonic() - begun < 20
        finally:
            process.kill()
    step = int(said.rpartition("step ")[2].split()[0])
    assert "SIGTERM" in said and (workdir / "checkpoints" / str(step)).is_dir()
    assert f"Continuing after step {step}" in run(folder, workdir, f"--config.num_steps={step + 2}").stdout
    steps = [line["step"] for line in metrics(workdir) if "train/loss" in line]
    assert steps == list(range(1, step + 3))


def test_damaged_checkpoint_falls_back_to_the_one_before(folder, whole):
    workdir = folder / "damaged"
    run(folder, workdir, "--config.num_steps=10")
    largest = max((workdir / "checkpoints/10").rglob("*"), key=lambda file: file.stat().st_size * file.is_file())
    largest.write_bytes(largest.read_bytes()[:100])
    done = run(folder, workdir, "--config.num_steps=10")
    assert "step 10 cannot be read" in done.stderr and "Continuing after step 5" in done.stdout
    mine, theirs = parameters(workdir, 10), parameters(whole[0], 10)
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_init_from_takes_over_what_fits(folder, whole):
    workdir = folder / "tuned"
    run(
        folder,
        workdir,
        "--config.num_steps=1",
        f"--config.init_from={whole[0]}",
        "--config.optimizer.learning_rate=0.0",
    )
    mine = parameters(workdir, 1)
    best = min((line["eval/top1_error"], line["step"]) for line in metrics(whole[0]) if "eval/top1_error" in line)
    candidates = [parameters(whole[0], step) for step in (5, 10) if (whole[0] / "checkpoints" / str(step)).is_dir()]
    assert any(np.array_equal(mine["params/fc6/kernel"], other["params/fc6/kernel"]) for other in candidates), best


def test_diverging_run_stops(folder):
    done = run(folder, folder / "diverged", "--config.num_steps=40", "--config.optimizer.learning_rate=900.0", expect=2)
    assert "The loss of step" in done.stderr and "learning_rate=3e+02" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config.model.num_classes=4"], "has 3 classes; use --config.model.num_classes=3"),
        (["--config.model.lnr=False"], "did you mean model.lrn"),
        (["--config.batch_size=7"], "6 or 8 would"),
        (["--config.dataset.name=/nowhere/pictures"], "/nowhere/pictures does not exist"),
        (["--config.dataset.name=/nowhere/photos"], "not from /nowhere/photos"),
        (["--config.dataset.eval_split=tset"], "did you mean test"),
        (["--config.input.crop=100"], "input.crop=100 must lie between 1 and input.resize=80"),
        (["--config.num_steps=-1"], "num_steps=-1"),
        (["--config.init_from=/nowhere/run"], "/nowhere/run is not the workdir of a run"),
        (["--config.schedule.layers=(('conv9', ((1.0, 0.0),)),)"], "schedule.layers names 'conv9'"),
        (["surplus"], "'surplus' is no flag"),
    ],
)
def test_mistakes_end_in_one_sentence(folder, tmp_path, arguments, says):
    done = run(folder, tmp_path / "run", *arguments, expect=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "something was written"


def test_another_config_is_refused_and_named(folder, whole):
    done = run(folder, whole[0], "--config.num_steps=10", "--config.model.lrn=False", expect=2)
    assert "model.lrn (True there, False here)" in done.stderr


def test_miniature_imagenet_trains_and_evaluates(tmp_path):
    """The archives of ILSVRC-2012 in miniature, from their tars to the ten-view error."""
    data.make_miniature_imagenet(tmp_path / "data/downloads/manual", per_class=1, validation=4)
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "main.py"),
            f"--config={ROOT / 'configs/alexnet.py'}",
            f"--workdir={tmp_path / 'run'}",
            "--cpu_devices=2",
            f"--config.dataset.data_dir={tmp_path / 'data'}",
            *(argument for argument in SMALL if "num_classes" not in argument and "eval_split" not in argument),
            "--config.batch_size=2",
            "--config.num_steps=2",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2]
    assert "test/top5_error" in lines[-1]
