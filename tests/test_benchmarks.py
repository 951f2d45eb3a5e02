"""What the benchmarks compare is the same work, and their figures are those of known runs; no speed is tested."""

import argparse
import itertools
import json
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

import data
import input_pipeline
import parallel
import recipes
import runs
from benchmarks import end_to_end, input, layers, measure, start, step
from common.errors import UserError
from configs import alexnet as alexnet_recipe
from datasets import prepared, preparing
from models import alexnet, fused

CANDIDATES = {"records", "raw", "to_record", "prepare", "pil", "from_photographs"}


def narrow():
    config = recipes.narrow()
    config.batch_size = 8
    return config


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return data.make_folder(tmp_path_factory.mktemp("benchmarks") / "photos", {"train": 30}, runs.CLASSES)


@pytest.fixture(scope="module")
def opened(photographs):
    cache = str(photographs.parent / "cache")
    return prepared.Records.open(preparing.prepare(str(photographs), data_dir=cache, size=80))


@pytest.fixture
def one_worker(monkeypatch):
    monkeypatch.setattr(input, "CORES", 1)  # a worker's start takes seconds


def test_input_times_what_was_asked(photographs, tmp_path, capsys, one_worker):
    args = argparse.Namespace(photographs=str(photographs), images=20, size=0, data_dir=str(tmp_path), rounds=1)
    measure.report("input", input.run(narrow(), args))
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    (folder,) = tmp_path.glob("photos-*-24")
    copies = {path.read_bytes() for path in folder.rglob("*.jpg")}
    originals = {path.read_bytes() for path in photographs.rglob("*.jpg")}
    assert len(copies) == values["photographs"] == values["images"] == 24, "20, in batches of 8"
    assert copies < originals
    assert values["photograph_pixels"] == 96 * 80
    for figures in ("images_per_second", "images_per_second_per_core", "cpu_seconds_per_image"):
        assert set(values[figures]) == CANDIDATES
        assert min(values[figures].values()) > 0
    seconds = values["cpu_seconds_per_image"]
    assert seconds["from_photographs"] == pytest.approx(seconds["prepare"] / 90 + seconds["records"], rel=2e-3)
    for fast, slow in (("records", "raw"), ("from_photographs", "pil"), ("to_record", "pil"), ("prepare", "pil")):
        rates, ratio = values["images_per_second"], values[f"{fast}_times_{slow}"]
        assert ratio["median"] == pytest.approx(rates[fast] / rates[slow], rel=2e-3)
        rates, ratio = values["cpu_seconds_per_image"], values[f"{fast}_times_{slow}_cpu"]
        assert ratio["median"] == pytest.approx(rates[slow] / rates[fast], rel=2e-3)


def test_photographs_are_scaled_by_their_longer_side(photographs, tmp_path):
    files = input.sample(photographs, tmp_path / "scaled", 5, 480)
    assert len(files) == 5
    for file in files:
        with Image.open(file) as image:
            assert image.size == (480, 400)


def test_raw_decodes_the_windows_that_the_pipeline_yields(opened):
    config, count = narrow(), 24
    raw = input.Raw(opened, config, count)
    batches = input_pipeline.train_batches(opened, "train", options=config.input, batch_size=8, seed=config.seed)
    for _ in range(input.AHEAD):
        next(batches)
    views = np.concatenate([next(batches)["image"] for _ in range(count // 8)])
    mirrored = 0
    for number, view in enumerate(views):
        alone = raw.view(number)
        # At its sides libjpeg lacks the colours of the neighbours, which the pipeline gives it.
        found = [np.array_equal(some[:, 2:-2], view[:, 2:-2]) for some in (alone, alone[:, ::-1])]
        assert any(found), number
        mirrored += found[1]
    assert 0 < mirrored < count
    assert raw.decode()[0] == count
    decoded = sum(int(raw._graph(*part)) for part in raw._parts)
    assert decoded == sum(int(raw.view(number)[0, 0, 0]) for number in range(count)), "none is left out"


def test_the_pillow_loader_yields_standardised_views_in_order(tmp_path, one_worker):
    files, levels = [tmp_path / f"{number}.jpg" for number in range(4)], [10, 60, 130, 250]
    for file, level in zip(files, levels, strict=True):
        Image.new("RGB", (60, 50), (level, level, 255 - level)).save(file, quality=95)
    numbers = [3, 1, 0, 2] * 4 * input.AHEAD
    stream = input._batches_of(input.Photographs(files, 40, 32), numbers, 4)
    for _ in range(2):
        views, process, cpu_seconds = next(stream)
        assert views.dtype == np.float32 and process > 0 and cpu_seconds > 0
        wanted = np.array([(levels[i], levels[i], 255 - levels[i]) for i in numbers[:4]]) / 255
        wanted = (wanted - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        np.testing.assert_allclose(views, np.broadcast_to(wanted[:, None, None], (4, 32, 32, 3)), atol=0.06)
    stream.close()


def test_the_fused_kernel_is_checked_before_it_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(fused, "INTERPRET", True)
    monkeypatch.setattr(parallel, "fuses", lambda device: True)
    config = recipes.narrow(width=0.0625)
    for checked in (config, measure.recipe("cifar_local", fused=True)):
        step.check_kernel(checked)
        assert "differ from those of the steps apart by" in capsys.readouterr().out
    right = fused.normalize_pool_gradient
    monkeypatch.setattr(fused, "normalize_pool_gradient", lambda *arrays, **options: 1.001 * right(*arrays, **options))
    with pytest.raises(UserError, match="The fused kernel computes something else"):
        step.check_kernel(config)


@pytest.mark.parametrize(("width", "says"), [(1, "needs an NVIDIA GPU"), (2, "conv2 has 256 maps in a tower")])
def test_what_the_fused_kernel_cannot_take_is_named(monkeypatch, width, says):
    config = measure.recipe(width=width, fused=True)
    monkeypatch.setattr(parallel, "fuses", lambda device: width == 2)
    with pytest.raises(UserError, match=says):
        step.check_kernel(config)


def test_networks_without_steps_for_the_kernel_are_named():
    with pytest.raises(UserError, match="The network cifar has no steps that the fused kernel takes"):
        measure.recipe("cifar", fused=True)


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "benchmarks.input", f"--photographs={tmp_path / 'none'}"]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"The data folder {tmp_path / 'none'} does not exist" in runs.sentence(done.stderr)


def test_layers_are_those_of_the_step():
    """Each part takes what the one before it gives, and their operations are those of a training step."""
    config = recipes.narrow()
    parts = layers.parts(config)
    names = [part.name for part in parts]
    assert [name for name in names if name.startswith(("conv", "fc"))] == list(alexnet.LAYERS)
    assert [name for name in names if name[-1] == "1"] == ["conv1", "activate1", "normalize_pool1", "pool1", "dropout1"]
    assert names[-1] == "update"
    done = sum(part.flops + part.flops_backward for part in parts)
    assert done == config.batch_size * step.training_flops(config)

    for part, after in itertools.pairwise(parts[:-1]):
        # The halves of two towers, or what both see.
        given = jax.eval_shape(part.function, part.params, *part.inputs).size
        assert sum(x.size for x in jax.tree.leaves(after.inputs)) == given, (part.name, after.name)

    pool = parts[names.index("normalize_pool2")]
    (forward, _, moved), (_, _, moved_backward) = layers.candidates(pool).values()
    n, side, pooled, channels = config.batch_size, 7, 3, 32
    assert moved == 4 * n * channels * (side**2 + pooled**2), "float32 maps before and after"
    assert moved_backward == 4 * n * channels * (2 * side**2 + pooled**2), "and the gradient of the former"
    assert forward() > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections' own
def test_end_to_end_times_main_beside_its_stages(photographs):
    args = argparse.Namespace(
        dataset=str(photographs), data_dir=str(photographs.parent / "cache"), steps=7, batch_size=8, width=0.125
    )
    vars(args).update(cpu_devices=4, rounds=1, seconds=0.1)
    small = [
        "input.resize=80",
        "input.crop=67",
        "input.scale=0.0156",
        "model.init=he",
        "model.towers=1",
        "model.lrn=False",
    ]
    values = end_to_end.run(args, [f"--config.{field}" for field in small])
    assert (values["steps"], values["batch_size"], values["devices"]) == (5, 8, 4)
    rates = {name: values[f"{name}_images_per_second"] for name in ("end_to_end", "step", "pipeline")}
    assert values["end_to_end_times_limit"]["median"] == pytest.approx(
        rates["end_to_end"] / min(rates["step"], rates["pipeline"])
    )
    assert 0 <= values["input_wait"] <= 1


# Writes what a run of 10 steps would, holding 100 MB more memory from the sixth on.
PROGRAM = """
import json, pathlib, sys, time
workdir = pathlib.Path(sys.argv[-1].partition("=")[2])
workdir.mkdir()
if "fail" in sys.argv:
    sys.exit("error: it cannot.")
with (workdir / "metrics.jsonl").open("w") as file:
    def write(step, **values):
        values = {f"train/{name}": value for name, value in values.items()}
        file.write(json.dumps({"step": step, "epoch": 1.0} | values) + "\\n")
        file.flush()
        time.sleep(0.5)
    write(2, images_per_second=1.0, input_wait=1.0)
    write(4, images_per_second=100.0, input_wait=0.1)
    held = bytes(b"1") * (100 << 20)
    write(6, images_per_second=50.0, input_wait=0.3)
"""


def test_a_run_is_read_without_its_first_interval(tmp_path, monkeypatch):
    (tmp_path / "main.py").write_text(PROGRAM)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(end_to_end, "SECONDS_BETWEEN_SAMPLES", 0.05)
    training = end_to_end.Training(["--config=x"], log_every=2)
    assert training() == pytest.approx((1 / 100 + 1 / 50) / 2)
    assert training.input_wait == [pytest.approx(0.2)]
    assert 100e6 < max(training.memory) - min(training.memory) < 110e6
    with pytest.raises(UserError, match=r"main.py ended with exit code 1: error: it cannot\."):
        end_to_end.Training(["fail"], log_every=2)()


def test_parameters_and_maps_are_those_of_the_papers_layers():
    """4 bytes for each of 60,965,224 parameters, their velocity and gradient, and for the maps of section 3.5."""
    config = alexnet_recipe.get_config()
    maps = 2 * 55**2 * 96 + 27**2 * 96 + 2 * 27**2 * 256 + 13**2 * (256 + 2 * 384 + 256) + 6**2 * 256 + 4 * 4096
    assert step.parameters_and_maps(config) == 4 * (3 * 60_965_224 + config.batch_size * (224**2 * 3 + maps))


# Stands in for main.py: the first start is slower, and `losses` are those of the first and the second.
MAIN = """
import os, pathlib, sys, time
cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
known = (cache / "compiled").exists()
(cache / "compiled").touch()
if losses[known] is None:
    sys.exit("error: it cannot.")
time.sleep(0.1 if known else 0.3)
print("step 1  loss 7.0  top1_error 1.0")
time.sleep(0.5)
print(f"step 3  loss {losses[known]}  top1_error 1.0")
"""


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ((6.5, 6.5), None),
        ((6.5, 6.4), "With the compilation cache the loss of step 3 is 6.4, and 6.5 without it"),
        ((6.5, None), "main.py ended with exit code 1: error: it cannot."),
    ],
)
def test_starts_are_timed_to_the_first_step(tmp_path, monkeypatch, losses, message):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    (tmp_path / "main.py").write_text(f"losses = {losses}{MAIN}")
    if message:
        with pytest.raises(UserError, match=re.escape(message)):
            start.run(1, devices=1)
    else:
        begun = time.perf_counter()
        values = start.run(1, devices=1)
        passed = time.perf_counter() - begun
        assert all(values[name]["least"] == values[name]["most"] for name in ("first_seconds", "second_seconds"))
        first, second = values["first_seconds"]["median"], values["second_seconds"]["median"]
        assert first > 0.3 and second > 0.1
        # There were two rounds, of which the first does not count, and neither does what comes after a first step.
        assert passed > 2 * 0.5 + (0.3 + 0.5) + (0.1 + 0.5) + first + second
        assert "second_seconds" not in start.run(1, devices=2), "there is no cache"
