"""An exported network gives the same probabilities where this code is not, for batches of any size."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export

import runs
import update
from configs import alexnet_2012, cifar10, torchvision
from predictor import Predictor

# What a program of a user does, in a process that cannot import this code.
USE = """
import sys, pathlib
import numpy as np
from jax import export
network = export.deserialize(bytearray(pathlib.Path("alexnet.stablehlo").read_bytes()))
images = np.load("images.npy")
np.savez("found.npz", **{str(n): network.call(images[:n]) for n in (1, 7, 64)})
ours = [m for m in ("models", "predictor", "evaluate", "views", "flax", "absl", "tensorflow") if m in sys.modules]
print(network.platforms, network.in_avals[0].str_short(), *ours)
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = runs.photographs(tmp_path_factory.mktemp("export"))
    runs.run(folder, folder / "run", "--config.num_steps=10")
    return folder / "run"


@pytest.mark.parametrize("views", ["centre", "ten"])
def test_a_process_without_this_code_finds_what_the_predictor_finds(workdir, tmp_path, views):
    out = tmp_path / "alexnet.stablehlo"
    done = runs.run_tool("export", f"--workdir={workdir}", f"--views={views}", f"--out={out}", "--step=latest")
    assert done.stdout.split() == [str(out), str(tmp_path / "alexnet.json")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alexnet.json", "alexnet.stablehlo"]
    images = np.random.default_rng(0).integers(0, 256, (64, 80, 80, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    done = subprocess.run(
        [sys.executable, "-I", "-c", USE], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "('cpu', 'cuda', 'tpu') uint8[b,80,80,3]"
    network = Predictor(workdir, views=views, step="latest")
    expected = np.stack(list(network.probabilities(images)))
    assert np.ptp(expected, axis=0).max() > 1e-3, "the images must differ"
    found = np.load(tmp_path / "found.npz")
    for n in (1, 7, 64):
        np.testing.assert_allclose(found[str(n)], expected[:n], atol=1e-5, rtol=0)
    names = json.loads((tmp_path / "alexnet.json").read_text("utf-8"))
    assert names == {"step": 10, "classes": list(runs.CLASSES), "labels": list(network.labels)}


def test_on_a_full_disk_neither_file_is_left(workdir, tmp_path):
    """So that the same command works again."""
    limited = ["sh", "-c", 'ulimit -f 100; exec "$@"', "sh"]
    command = [*limited, sys.executable, "-m", "tools.export", f"--workdir={workdir}", f"--out={tmp_path}/x.stablehlo"]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=300)
    assert "x.stablehlo cannot be written: File too large" in runs.sentence(done.stderr)
    assert done.returncode == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config",
    [alexnet_2012.get_config(), cifar10.get_config("18pct"), cifar10.get_config("11pct"), torchvision.get_config()],
)
def test_every_network_takes_a_batch_of_any_size(config):
    if "width" in config.model:
        config.model.width = 0.125
    network, side = update.build_network(config), config.input.crop
    images = np.random.default_rng(1).normal(size=(6, side, side, 3)).astype(np.float32)
    params = network.init(jax.random.key(0), images[:1])["params"]
    function = jax.jit(lambda images: network.apply({"params": params}, images))
    batch = jax.ShapeDtypeStruct(export.symbolic_shape(f"b, {side}, {side}, 3"), np.float32)
    found = export.export(function, platforms=("cpu", "cuda", "tpu"))(batch).call(images)
    expected = function(images)
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


# In a process of its own, because two tools define a flag of the same name.
SMALL = """
import sys
from common import errors
from predictor import Predictor
from tools import export
export.MOST_BYTES = 1000
try:
    export.exported(Predictor(sys.argv[1], step="latest"), "ten")
except errors.UserError as error:
    print(error)
"""


def test_a_network_that_no_file_can_hold_is_refused(workdir):
    done = subprocess.run([sys.executable, "-c", SMALL, workdir], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.stdout == "The parameters take 0.0 GB, and a file of jax.export holds 2 GB at most.\n", done.stderr


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--workdir=absent"], "is not the workdir of a run|is not there"),
        (["--step=7"], "it is best, latest, or a step that has a checkpoint"),
        (["--out=x.npz"], "--out=x.npz must end in .stablehlo"),
        (["--out=folder.stablehlo"], "folder.stablehlo cannot be written: it is a folder"),
        (["--out=no/x.stablehlo"], "there is no folder no"),
        (["--out=old.stablehlo"], "old.stablehlo is there already"),
        (["--out=named.stablehlo"], "named.json is there already"),
    ],
)
def test_mistakes_end_in_a_sentence_and_nothing_is_written(workdir, tmp_path, flags, sentence):
    (tmp_path / "folder.stablehlo").mkdir()
    for name in ("old.stablehlo", "named.json"):
        (tmp_path / name).write_text("kept")
    before = sorted(path.name for path in tmp_path.iterdir())
    done = runs.run_tool("export", f"--workdir={workdir}", *flags, expect=2, cwd=tmp_path)
    assert re.search(sentence, runs.sentence(done.stderr))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert pathlib.Path(tmp_path / "old.stablehlo").read_text() == "kept"
