"""configs/finetune.py: what it takes over from a run, what moves, and what it refuses."""

import pathlib

import numpy as np
import pytest

import data
import runs
import update
from common import cli
from common.errors import UserError
from configs import alexnet, cifar10, finetune, torchvision
from run import setup, workdirs

RECIPE = pathlib.Path(finetune.__file__)


def recipe(source, photos=None):
    """The recipe as the command line loads it; with the data set that a user would give."""
    config = cli.load_config(f"{RECIPE}:{source}")
    if photos:
        config.batch_size = 8
        config.dataset.update(name=str(photos), data_dir=str(photos.parent / "cache"))
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs of the classes a, b and c, and as many of d, e and f."""
    folder = runs.photographs(tmp_path_factory.mktemp("data"))
    data.make_folder(folder / "others", {"train": 24, "test": 12}, ("d", "e", "f"))
    return folder


@pytest.fixture(scope="module")
def source(folder):
    """A run of two steps on a, b and c, and its parameters {layer/kind: …}."""
    runs.run(folder, folder / "source", "--config.num_steps=2")
    return folder / "source", stored(folder / "source", 2)


def stored(workdir, step):
    return {
        name.removeprefix("params/"): leaf
        for name, leaf in runs.parameters(workdir, step).items()
        if name.startswith("params/")
    }


def begun(config, workdir):
    """The parameters before the first step, {layer/kind: …}."""
    with setup.set_up(config, workdir) as run:
        return flat(run.state.params)


def flat(params):
    return {f"{layer}/{kind}": leaf for layer, kinds in params.items() for kind, leaf in kinds.items()}


def test_the_network_and_its_pixels_are_those_of_the_run(source):
    config = recipe(source[0])
    assert (config.input.resize, config.input.crop, config.input.scale) == (80, 67, 0.0156)
    assert (config.model.width, config.model.towers, config.model.exchange) == (0.125, 2, ("conv3", "fc6", "fc7"))
    shapes = {name: leaf.shape for name, leaf in flat(setup.state_shapes(config).params).items()}
    assert shapes == {name: leaf.shape for name, leaf in source[1].items()}


@pytest.mark.parametrize(
    "config",
    [alexnet.get_config("one_gpu"), alexnet.get_config("no_exchange"), torchvision.get_config(), cifar10.get_config()],
)
def test_every_network_can_be_the_source(tmp_path, config):
    workdirs.write_config(config, tmp_path)
    mine = recipe(tmp_path)
    assert mine.model.to_dict() == config.model.to_dict() and mine.optimizer == config.optimizer
    for field in ("resize", "crop", "scale"):
        assert mine.input[field] == config.input[field]
    setup.state_shapes(mine)


def test_other_classes_get_a_new_last_layer(folder, source, tmp_path):
    """As many classes, so that the shapes tell nothing."""
    config = recipe(source[0], folder / "others")
    mine, new = begun(config, tmp_path), flat(update.init_state(config).params)
    assert mine.keys() == source[1].keys()
    for name, leaf in mine.items():
        np.testing.assert_array_equal(leaf, (new if name.startswith("fc8") else source[1])[name], err_msg=name)
    assert not np.array_equal(new["fc8/kernel"], source[1]["fc8/kernel"])


def test_the_same_classes_keep_the_last_layer(folder, source, tmp_path):
    for name, leaf in begun(recipe(source[0], folder / "photos"), tmp_path).items():
        np.testing.assert_array_equal(leaf, source[1][name], err_msg=name)


def test_layers_at_factor_0_stand_still_and_the_others_move(folder, source):
    frozen = "(('conv1', ((0.0, 0.0),)), ('conv2', ((0.0, 0.0),)))"
    runs.run_main(
        f"--config={RECIPE}:{source[0]}",
        f"--workdir={folder / 'tuned'}",
        "--cpu_devices=2",
        f"--config.dataset.name={folder / 'others'}",
        f"--config.dataset.data_dir={folder / 'cache'}",
        "--config.batch_size=8",
        "--config.num_steps=3",
        f"--config.schedule.layers={frozen}",
    )
    after = stored(folder / "tuned", 3)
    moved = {name.partition("/")[0] for name, leaf in after.items() if not np.array_equal(leaf, source[1][name])}
    assert moved == {"conv3", "conv4", "conv5", "fc6", "fc7", "fc8"}


def test_a_workdir_may_have_a_colon_or_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "12:30").mkdir()
    workdirs.write_config(torchvision.get_config(), tmp_path / "12:30")
    for source in (tmp_path / "12:30", "~/12:30"):
        config = recipe(source)
        assert config.model.name == "torchvision" and config.init_from == str(tmp_path / "12:30")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "source is not the workdir of a run: it has no config.json"),
        ("{", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ("[]", "TypeError"),
        ('{"model": []}', "AttributeError"),
        ('{"model": {"name": "alexnet"}}', "KeyError: 'input'"),
        ('{"model": {}, "input": {"resize": 256, "crop": 224, "scale": 1.0}}', "KeyError: 'optimizer'"),
    ],
)
def test_what_is_no_workdir_is_refused_with_the_command(tmp_path, content, says):
    (tmp_path / "source").mkdir()
    if content:
        (tmp_path / "source/config.json").write_text(content)
    with pytest.raises(UserError) as refused:
        recipe(tmp_path / "source")
    for part in (says, str(tmp_path / "source"), "--config=configs/finetune.py:WORKDIR"):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("source", "says"), [("", "needs a run to start from"), ("~nobody_of_this_name/run", "home directory")]
)
def test_mistakes_end_in_one_sentence(tmp_path, source, says):
    done = runs.run_main(f"--config={RECIPE}:{source}", f"--workdir={tmp_path / 'run'}", expect=2)
    [said] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert says in said and "--config=configs/finetune.py:WORKDIR" in said and "Traceback" not in done.stderr
