"""Whole runs through main.py: exact resume, signals, what a workdir holds, and every refusal in one sentence."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

import data
import evaluate
import input_pipeline
import parallel
import predictor
import recipes
import runs
import train
from common import exits, host
from common.errors import UserError
from datasets import prepared
from run import processes, setup, workdirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of photographs, and where it is prepared."""
    return runs.photographs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(folder):
    """Ten steps in one go, in the paper's layout."""
    workdir, outside = folder / "whole", folder / "outside"
    outside.mkdir()
    places = {"HOME": str(outside), "TMPDIR": str(outside)}
    said = runs.run(folder, workdir, "--config.num_steps=10", env=os.environ | places, cwd=outside).stdout
    assert list(outside.rglob("*")) == [], "written outside of workdir and data_dir"
    return workdir, said


def test_a_run_leaves_what_it_promises(whole):
    workdir, said = whole
    lines = runs.metrics(workdir)
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, 11))
    assert all({"step", "epoch"} <= set(line) for line in lines)
    assert lines[0]["epoch"] == pytest.approx(8 / 30, abs=1e-3)
    timed = [line for line in runs.metrics(workdir, times=True) if "train/images_per_second" in line]
    assert timed and all(0 <= line["train/input_wait"] <= 1 for line in timed)
    assert [line["step"] for line in lines if "eval/top1_error" in line] == [5, 10]
    test = [line for line in lines if "test/top1_error" in line]
    assert len(test) == 1 and 0 <= test[0]["test/top1_error"] <= 1
    assert json.loads((workdir / "config.json").read_text())["model"]["width"] == 0.125
    assert list(workdir.glob("events.out.tfevents*"))
    for what in ("one tower on each of two devices", str(workdir / "checkpoints"), f"--logdir={workdir}"):
        assert what in said
    assert "Ten views of 'test'" in said and "The checkpoint was chosen on the same images" in said
    assert "top-5" not in said.partition("Done: ")[2], "of three classes"


def test_the_errors_at_the_end_are_those_of_the_test_split(folder, whole):
    """The same run, evaluated on one half of the split, and tested on the other: 1 − errors count whole images."""
    workdir = folder / "tested"
    said = runs.run(
        folder,
        workdir,
        "--config.num_steps=10",
        "--config.dataset.eval_split=test[:5]",
        "--config.dataset.test_split=test[5:]",
    ).stdout
    assert "Ten views of 'test[5:]'" in said and "The checkpoint was chosen on eval_split='test[:5]'" in said
    lines = runs.metrics(workdir)
    assert [line["train/loss"] for line in lines if "train/loss" in line] == [
        line["train/loss"] for line in runs.metrics(whole[0]) if "train/loss" in line
    ]
    # A split of 12 images; the best checkpoint may be another, so the errors need not add up to those of the whole.
    (tested,), evaluated = ([line for line in lines if f"{at}/loss" in line] for at in ("test", "eval"))
    assert tested["test/top1_error"] * 7 == pytest.approx(round(tested["test/top1_error"] * 7), abs=1e-5)
    for line in evaluated:
        assert line["eval/top1_error"] * 5 == pytest.approx(round(line["eval/top1_error"] * 5), abs=1e-5)
    network = predictor.Predictor(workdir)
    records = prepared.Records.open(network.records.directory)
    batches = input_pipeline.eval_batches(records, "test[5:]", batch_size=network.batch_size)
    again = evaluate.errors(network.totals(batches))
    assert again["loss"] == pytest.approx(tested["test/loss"], rel=1e-4)
    network = predictor.Predictor(workdir, views="centre")
    batches = input_pipeline.eval_batches(records, "test[5:]", batch_size=network.batch_size)
    again = evaluate.errors(network.totals(batches))
    assert again["loss"] == pytest.approx(tested["test/centre_loss"], rel=1e-4) != tested["test/loss"]
    assert f"With the centre view alone, the top-1 error is {tested['test/centre_top1_error']:.2%}" in said


def events(workdir):
    """What TensorBoard sees of a run."""
    from tensorboard.backend.event_processing import event_accumulator

    return event_accumulator.EventAccumulator(str(workdir), size_guidance={"images": 0, "tensors": 0}).Reload()


def test_every_log_step_says_what_was_measured(folder):
    """The rate falls to a tenth after 5 updates: an epoch has 30 images in batches of 8, 1.34 epochs are 5 steps."""
    workdir = folder / "drop"
    drop = ["--config.schedule.name=steps", "--config.schedule.factors=((1.34, 0.1),)", "--config.log_every.steps=2"]
    said = runs.run(folder, workdir, "--config.num_steps=7", "--config.optimizer.learning_rate=0.02", *drop).stdout
    lines = {line["step"]: line for line in runs.metrics(workdir) if "train/loss" in line}
    assert {step: pytest.approx(line["train/learning_rate"]) for step, line in lines.items()} == {
        2: 0.02, 4: 0.02, 6: 0.002, 7: 0.002
    }  # fmt: skip
    for line in lines.values():
        assert line["train/gradient_norm"] > 0
        for layer in ("conv1", "fc7", "fc8"):
            assert 0 < line[f"train/update_to_weight/{layer}"] < 1
        assert 0 <= line["train/dead_units/fc7"] <= 1 and "train/dead_units/fc8" not in line
    assert "learning rate 0.002" in said and "gradient norm" not in said and "dead" not in said


def test_tensorboard_has_kernels_inputs_and_hparams(folder, whole):
    from tensorboard.plugins.hparams import plugin_data_pb2

    seen = events(whole[0])
    tags = seen.Tags()["tensors"]
    assert {"train/gradient_norm", "train/dead_units/conv1", "kernels/conv1", "inputs"} <= set(tags)
    for tag, shape in (("kernels/conv1", None), ("inputs", (67, 67))):
        found = seen.Tensors(tag)
        assert [event.step for event in found] == [5, 10]
        width, height, *pictures = found[-1].tensor_proto.string_val
        assert len(pictures) == (8 if tag == "inputs" else 1) and pictures[0].startswith(b"\x89PNG")
        assert shape in (None, (int(height), int(width)))
    data = plugin_data_pb2.HParamsPluginData.FromString(
        seen.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    )
    fields = data.session_start_info.hparams
    assert fields["batch_size"].number_value == 8 and fields["model.name"].string_value == "alexnet"
    assert fields["model.exchange"].string_value == '["conv3", "fc6", "fc7"]'
    assert fields["model.lrn"].bool_value is True


def test_visible_pixels_are_those_of_the_view_without_lighting():
    config = recipes.narrow()
    batch = recipes.batch(config, 0) | {"shift": np.zeros((20, 3), np.float32), "gain": np.ones(20, np.float32)}
    for scale in (1.0, 0.0156):
        np.testing.assert_array_equal(train.visible(batch, recipes.mean_image(), scale), batch["image"])
    brighter = batch | {"shift": np.full((20, 3), 7, np.float32)}
    expected = np.minimum(batch["image"] + 7.0, 255)
    np.testing.assert_array_equal(train.visible(brighter, recipes.mean_image(), 0.0156), expected)


def test_profile_of_a_short_run(folder):
    workdir = folder / "profiled"
    said = runs.run(folder, workdir, "--config.num_steps=2", "--profile").stdout
    assert "No trace: --profile begins with step 10, and this ended after step 2." in said
    said = runs.run(folder, workdir, "--config.num_steps=15", "--profile").stdout
    assert "Trace of steps 12 to 15" in said
    assert len(list(workdir.glob("plugins/profile/*/*.xplane.pb"))) == 1


def test_resumed_run_is_bit_identical(folder, whole):
    """5 + 5 steps in two processes give the parameters and the losses of 10 in one."""
    workdir = folder / "halves"
    runs.run(folder, workdir, "--config.num_steps=5")
    assert "Continuing after step 5" in runs.run(folder, workdir, "--config.num_steps=10").stdout
    mine, theirs = runs.parameters(workdir, 10), runs.parameters(whole[0], 10)
    assert mine.keys() == theirs.keys() and len(mine) > 30
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    losses = [
        {line["step"]: line["train/loss"] for line in runs.metrics(w) if "train/loss" in line}
        for w in (workdir, whole[0])
    ]
    assert losses[0] == losses[1]


def test_an_average_is_evaluated_resumed_and_taken_over(folder):
    """Also with smoothed targets, other decays and views of random areas, with a tower on each of two devices."""
    changes = [
        "--config.optimizer.average=0.9",
        "--config.optimizer.layer_decay=(('fc8', 0.01),)",
        "--config.label_smoothing=0.1",
        "--config.mixup=0.5",
        "--config.input.crop_area=(0.25, 1.0)",
    ]
    once, twice = folder / "averaged", folder / "averaged_twice"
    runs.run(folder, once, "--config.num_steps=10", *changes)
    runs.run(folder, twice, "--config.num_steps=5", *changes)
    runs.run(folder, twice, "--config.num_steps=10", *changes)
    mine, theirs = runs.parameters(once, 10), runs.parameters(twice, 10)
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    network = predictor.Predictor(once, views="centre", step=10)
    (average,) = (leaf for name, leaf in mine.items() if "opt_state" in name and name.endswith("params/fc8/kernel"))
    np.testing.assert_array_equal(network.params["fc8"]["kernel"], average)
    assert np.abs(average - mine["params/fc8/kernel"]).max() > 1e-5
    records = prepared.Records.open(network.records.directory)
    totals = network.totals(input_pipeline.eval_batches(records, "test", batch_size=network.batch_size))
    (measured,) = (line for line in runs.metrics(once) if line["step"] == 10 and "eval/loss" in line)
    assert evaluate.errors(totals)["loss"] == pytest.approx(measured["eval/loss"], rel=1e-4)
    # A run that begins from it begins, and averages, from its average.
    begun = folder / "from_averaged"
    still = ["--config.optimizer.learning_rate=0.0", "--config.num_steps=1", f"--config.init_from={once}"]
    never = ["--config.eval_every.steps=0", "--config.eval_every.epochs=0.0", "--config.schedule.name=constant"]
    said = runs.run(folder, begun, *changes, *still, *never).stdout
    assert "The checkpoint was not chosen: it is that of the last step" in said
    found, best = runs.parameters(begun, 1), predictor.Predictor(once).params["fc6"]["kernel"]
    both = [name for name in found if name.endswith("params/fc6/kernel")]
    assert len(both) == 2
    for name in both:
        np.testing.assert_allclose(found[name], best, rtol=1e-6, err_msg=name)


def test_finished_run_says_so_and_stays_as_it_is(folder, whole):
    before, seen = (whole[0] / "metrics.jsonl").read_text(), set(whole[0].glob("events*"))
    assert "Done: 10 steps" in runs.run(folder, whole[0], "--config.num_steps=10").stdout
    assert (whole[0] / "metrics.jsonl").read_text() == before
    (new,) = set(whole[0].glob("events*")) - seen
    assert new.stat().st_size < 100, "figures a second time"


def test_damaged_checkpoint_falls_back_to_the_one_before(folder, whole):
    workdir = shutil.copytree(whole[0], folder / "damaged")
    largest = max((workdir / "checkpoints/10").rglob("*"), key=lambda file: file.stat().st_size * file.is_file())
    largest.write_bytes(largest.read_bytes()[:100])
    done = runs.run(folder, workdir, "--config.num_steps=10")
    assert "step 10 cannot be read" in done.stderr and "Continuing after step 5" in done.stdout
    mine, theirs = runs.parameters(workdir, 10), runs.parameters(whole[0], 10)
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_checkpoints_of_another_config_are_refused_though_its_file_is_gone(folder, whole):
    workdir = shutil.copytree(whole[0], folder / "without-config")
    (workdir / "config.json").unlink()
    done = runs.run(folder, workdir, "--config.num_steps=10", "--config.optimizer.momentum=0.5", expect=2)
    assert "are of another config. Different: optimizer.momentum (0.9 in the checkpoint, 0.5 here)" in done.stderr
    assert not (workdir / "config.json").exists()
    runs.run(folder, workdir, "--config.num_steps=10")
    assert (workdir / "config.json").exists()


def test_other_images_cannot_go_on(folder, tmp_path):
    """Another number of the same classes, or another mean image; and none can come while a run reads."""
    root = runs.photographs(tmp_path)
    runs.run(root, root / "run", "--config.num_steps=5")
    prepare = ("prepare", f"--dataset={root / 'photos'}", f"--data_dir={root / 'cache'}", "--size=80", "--again")

    for file in (root / "photos").rglob("*.jpg"):
        shutil.copy(file, file.with_suffix(".jpeg"))  # the mean image stays
    runs.run_tool(*prepare)
    done = runs.run(root, root / "run", "--config.num_steps=6", expect=2)
    assert "was begun on 30 training images, and now there are 60" in runs.sentence(done.stderr)

    for file in (root / "photos").rglob("*.jpeg"):
        file.unlink()
    for file in (root / "photos").rglob("*.jpg"):
        ImageOps.invert(Image.open(file)).save(file)
    runs.run_tool(*prepare)
    done = runs.run(root, root / "run", "--config.num_steps=6", expect=2)
    assert "was begun on other images than" in runs.sentence(done.stderr)

    with runs.start(root, root / "other", "--config.num_steps=10000") as process:
        runs.until(process, 1)
        assert "is read by a run of main.py" in runs.sentence(runs.run_tool(*prepare, expect=2).stderr)


def test_a_run_that_is_done_has_nothing_left(folder, whole):
    workdir = shutil.copytree(whole[0], folder / "done")
    said = runs.run(folder, workdir, "--config.num_steps=4").stdout
    assert "Nothing is left to train: 10 steps are done, of 4." in said and "Done: 10 steps" in said


def here(folder):
    """The config of a run within this process, on its four devices."""
    config = recipes.narrow(num_classes=3)
    config.batch_size = 8
    config.dataset.update(name=str(folder / "photos"), data_dir=str(folder / "cache"), eval_split="test")
    return config


def test_ten_views_that_are_not_finite_are_refused(folder, tmp_path, monkeypatch):
    """As a device that computes wrongly gives them. A line with them, of an earlier version, is measured again."""
    with monkeypatch.context() as patched:
        wrong = {"loss": float("nan"), "top1_error": 1.0, "top5_error": 1.0, "mean_class_accuracy": 0.0}
        original, count = evaluate.run, itertools.count(1)
        patched.setattr(evaluate, "run", lambda *a, **o: wrong if next(count) == 3 else original(*a, **o))
        with pytest.raises(UserError, match=r"The evaluation loss of step \d+ is nan"):
            train.train(here(folder), tmp_path)
    lines = runs.metrics(tmp_path)
    assert not [line for line in lines if "test/loss" in line]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10, "epoch": lines[-1]["epoch"], "test/loss": None, "test/step": 10}) + "\n")
    assert train.train(here(folder), tmp_path) == 0
    assert np.isfinite(runs.metrics(tmp_path)[-1]["test/loss"])


@contextlib.contextmanager
def trainer(config, workdir):
    with (
        setup.set_up(config, workdir) as run,
        train.Trainer(run, processes.Stop(exits.StopSignal(), None)) as trainer,
    ):
        yield trainer


def test_the_config_says_whether_steps_are_fused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "fuses", lambda device: True)
    for wanted in (False, True):
        config = here(folder)
        config.parallel.fused = wanted
        with setup.set_up(config, tmp_path / str(wanted)) as run:
            assert ("fused steps" in str(run.layout)) == wanted


def test_replicas_that_drift_apart_stop_the_run(folder, tmp_path):
    """One bit of one weight on one of four devices: noticed before it is saved."""
    with trainer(here(folder), tmp_path) as at:
        at.advance(next(at.train_batches()))
        at.save()
        at.run.checkpoints.wait()
        assert runs.checkpoints(tmp_path) == [1]
        at.advance(next(at.train_batches()))
        at.settle()
        kernel = at.state.params["conv4"]["kernel"]
        parts = [shard.data for shard in kernel.addressable_shards]
        changed = np.array(parts[3])
        changed.view(np.uint32).flat[5] ^= 1
        parts[3] = jax.device_put(changed, parts[3].device)
        at.state.params["conv4"]["kernel"] = jax.make_array_from_single_device_arrays(
            kernel.shape, kernel.sharding, parts
        )
        with pytest.raises(
            UserError, match=r"After step 2 the replicas .* not the same in .*conv4.*kernel.*: a device"
        ):
            at.save()
    assert runs.checkpoints(tmp_path) == [1]


def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path):
    with trainer(here(folder), tmp_path) as at:
        at.state.params["fc8"]["bias"] = at.state.params["fc8"]["bias"] * np.float32("nan")
        with pytest.raises(UserError, match="Parameters are not finite after step 0"):
            at.save()
        with pytest.raises(UserError, match="The evaluation loss of step 0 is nan"):
            at.evaluate_and_save()
    assert runs.checkpoints(tmp_path) == []


def test_init_from_takes_over_what_fits(folder, whole):
    workdir = folder / "tuned"
    runs.run(
        folder,
        workdir,
        "--config.num_steps=1",
        f"--config.init_from={whole[0]}",
        "--config.optimizer.learning_rate=0.0",
    )
    mine = runs.parameters(workdir, 1)
    error, step = min(
        (line["eval/top1_error"], -line["step"]) for line in runs.metrics(whole[0]) if "eval/top1_error" in line
    )
    best = runs.parameters(whole[0], -step)
    np.testing.assert_array_equal(mine["params/fc6/kernel"], best["params/fc6/kernel"], err_msg=f"{error} at {-step}")


def test_two_runs_in_a_workdir_at_once_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs, "SECONDS_TO_END", 2)
    with (
        workdirs.lock(tmp_path),
        pytest.raises(UserError, match="in use by another run"),
    ):
        workdirs.lock(tmp_path)
    with workdirs.lock(tmp_path):
        pass


def test_diverging_run_stops(folder):
    done = runs.run(
        folder, folder / "diverged", "--config.num_steps=40", "--config.optimizer.learning_rate=900.0", expect=2
    )
    assert "The loss of step" in done.stderr and "learning_rate=3e+02" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config.model.num_classes=4"], "has 3 classes; use --config.model.num_classes=3"),
        (["--config.model.lnr=False"], "did you mean model.lrn"),
        (["--config.batch_size=7"], "6 or 8 would"),
        (
            ["--config.mixup=0.5", "--config.batch_size=6", "--config.parallel.devices_per_network=1"],
            "3 images to each",
        ),
        (["--config.dataset.name=/nowhere/pictures"], "/nowhere/pictures does not exist"),
        (["--config.dataset.name=/nowhere/photos"], "not from /nowhere/photos"),
        (["--config.dataset.eval_split=tset"], "did you mean test"),
        (["--config.input.crop=100"], "input.crop=100 must lie between 1 and input.resize=80"),
        (["--config.num_steps=-1"], "num_steps=-1"),
        (["--config.init_from=/nowhere/run"], "/nowhere/run is not the workdir of a run"),
        (["--config.num_steps=1e4"], "num_steps=1e4 must be an integer"),
        (["--config.model.lrn=no"], "model.lrn=no must be True or False"),
        (["--config.schedule.layers=(('conv9', ((1.0, 0.0),)),)"], "schedule.layers names 'conv9'"),
        (["surplus"], "'surplus' is no flag"),
        (["--coordinator_address=10.0.0.1", "--num_processes=2", "--process_id=0"], "--coordinator_address=HOST:PORT"),
        (["--coordinator_address=auto", "--num_processes=2", "--process_id=0"], "--coordinator_address=HOST:PORT"),
    ],
)
def test_mistakes_end_in_one_sentence(folder, tmp_path, arguments, says):
    done = runs.run(folder, tmp_path / "run", *arguments, expect=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "something was written"


def test_a_config_that_is_not_there_ends_in_one_sentence(tmp_path):
    done = runs.run_main("--config=nowhere.py", f"--workdir={tmp_path / 'run'}", expect=2)
    assert "--config=nowhere.py cannot be loaded" in runs.sentence(done.stderr)


def test_init_from_a_run_without_checkpoints_names_it(folder, whole, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(whole[0] / "config.json", begun)
    done = runs.run(folder, tmp_path / "run", f"--config.init_from={begun}", expect=2)
    assert f"{begun} is not the folder of a run of main.py: it holds no checkpoints" in runs.sentence(done.stderr)


def test_a_warm_up_longer_than_the_run_is_said(folder, tmp_path):
    done = runs.run(folder, tmp_path / "run", "--config.schedule.warmup=2.0", "--config.num_steps=1")
    assert "does not reach its value: schedule.warmup=2.0 epochs are 8 steps, and the run has 1." in done.stderr


@pytest.mark.parametrize("joined", [False, True])
def test_a_run_divides_the_cpu_if_it_is_the_only_process(folder, tmp_path, joined):
    address = f"--coordinator_address=127.0.0.1:{runs.free_port()}"
    company = [address, "--num_processes=1", "--process_id=0"] if joined else []
    steps = ["--config.num_steps=1", "--config.batch_size=32"]
    said = runs.run(folder, tmp_path / "run", *steps, *company, devices=0).stdout
    replicas = "2 × cpu: the whole network on each device, 2 replicas"
    alone = "1 × cpu: the whole network on each device"
    assert f"Devices: {replicas if host.cores() > 1 and not joined else alone}." in said


def test_a_platform_that_is_not_there_ends_in_one_sentence(folder, tmp_path):
    arguments = runs.command(folder, tmp_path / "run", devices=0)[2:]
    done = runs.run_main(*arguments, env=os.environ | {"JAX_PLATFORMS": "rocm"}, cwd=tmp_path, expect=2)
    assert "JAX_PLATFORMS=rocm: JAX cannot use it here" in runs.sentence(done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "command"), [("train", "main.py"), ("evaluate", "-m tools.evaluate"), ("predictor", "-m tools.predict")]
)
def test_files_that_are_no_commands_name_the_command(file, command):
    done = subprocess.run([sys.executable, f"{file}.py", "--config=x"], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and f"`python {command} " in runs.sentence(done.stderr)


def test_another_config_is_refused_and_named(folder, whole):
    done = runs.run(folder, whole[0], "--config.num_steps=10", "--config.model.lrn=False", expect=2)
    assert "model.lrn (True there, False here)" in done.stderr


def test_miniature_imagenet_trains_and_evaluates(tmp_path):
    """The archives of ILSVRC-2012 in miniature, from their tars to the ten-view error."""
    data.make_miniature_imagenet(tmp_path / "data/downloads/manual", per_class=1, validation=4)
    runs.run_main(
        f"--config={runs.ROOT / 'configs/alexnet.py'}",
        f"--workdir={tmp_path / 'run'}",
        "--cpu_devices=2",
        f"--config.dataset.data_dir={tmp_path / 'data'}",
        *(argument for argument in runs.SMALL if "num_classes" not in argument and "eval_split" not in argument),
        "--config.batch_size=2",
        "--config.num_steps=2",
        env=os.environ | {"HOME": str(tmp_path)},
    )
    lines = runs.metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2]
    assert "test/top5_error" in lines[-1]
