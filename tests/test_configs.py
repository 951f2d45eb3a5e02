"""Hostile configs through the real command line: each value of each field is refused by its name, or works."""

import contextlib
import importlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import data
import optimizer
import recipes
import runs
import update
from common import cli
from common.errors import UserError
from configs import alexnet, alexnet_2012, cifar10
from models.alexnet import LAYERS
from run import schema, setup, workdirs

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Imports what a start needs, once, and forks for each command line that it reads, two at a time. Each line it reads has
# several, and says whether they are 'whole', and go on to train. The machine has 16 GiB, whatever it has.
PROGRAM = """
import gc, json, os, signal, sys, tempfile, traceback
command = sys.argv = [sys.argv[1]]
sys.path.insert(0, os.path.dirname(command[0]))
import main, checkpoint, train
import tensorflow, tensorflow_datasets
from configs import alexnet, alexnet_2012
from datasets import prepared, sources
from run import setup

setup.state_shapes(alexnet.get_config())  # warms JAX's caches, and starts no device
gc.freeze()
sysconf, opened, memory = os.sysconf, checkpoint.Checkpoints, {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4 << 20}
os.sysconf = lambda name: memory[name] if name in memory else sysconf(name)

def stop(workdir, read_only=False):
    if read_only:
        return opened(workdir, read_only)
    print("accepted")
    sys.exit(0)

def start(arguments, whole, said):
    signal.alarm(300)
    os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
    sys.argv, code = command + arguments, 1
    if not whole:
        checkpoint.Checkpoints = stop
    try:
        main.cli.run(main.main)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    whole, *starts = json.loads(line)
    answers, running = [None] * len(starts), {}
    for number in range(len(starts) + 2):  # in the last two rounds nothing is left but to wait
        if len(running) == 2 or number >= len(starts) and running:
            child, status = os.wait()
            ended, said = running.pop(child)
            said.seek(0)
            answers[ended] = os.waitstatus_to_exitcode(status), said.read()
            said.close()
        if number < len(starts):
            said = tempfile.TemporaryFile("w+", errors="backslashreplace")
            child = os.fork()
            if not child:
                start(starts[number], whole, said)
            running[child] = number, said
    print(json.dumps(answers), flush=True)
"""


class CommandLine:
    """`main.py` on a miniature data set; each call is a process of its own."""

    def __init__(self, folder):
        data.make_folder(folder / "photos", {"train": 16, "test": 8}, ("a", "b", "c"))
        self._folder, self._numbers = folder, itertools.count()
        self._base = [
            f"--config={ROOT / 'configs/alexnet.py'}",
            "--cpu_devices=2",
            f"--config.dataset.name={folder / 'photos'}",
            f"--config.dataset.data_dir={folder / 'cache'}",
            "--config.dataset.eval_split=test",
            *runs.NARROW,
            "--config.eval_batch_size=8",
            "--config.num_steps=2",
        ]
        quiet = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(ROOT / "main.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | quiet,
        )

    def start(self, starts, whole=False):
        """Exit code and everything said, for each list of arguments.

        `whole` trains; otherwise a start ends before the first checkpoint is opened.
        """
        self._process.stdin.write(json.dumps([whole, *starts]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def each(self, starts, whole=False):
        """The same for a narrow network with each list of overrides, in a workdir of its own."""
        runs = (self._folder / "runs" / str(next(self._numbers)) for _ in starts)
        return self.start(
            [[*self._base, f"--workdir={run}", *start] for run, start in zip(runs, starts, strict=True)], whole
        )

    def __call__(self, *overrides):
        return self.each([overrides])[0]

    def close(self):
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def command_line(tmp_path_factory):
    with contextlib.closing(CommandLine(tmp_path_factory.mktemp("configs"))) as command_line:
        code, said = command_line()
        assert is_accepted(code, said), said
        yield command_line


def is_accepted(code, said):
    return code == 0 and said.endswith("accepted\n")


def is_refused(code, said, name=""):
    """Whether a mistake ended as it should: in one sentence, with its field's name."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    return code == 2 and len(errors) == 1 and "Traceback" not in said and name in errors[0]


def fields(config, prefix=""):
    """(dotted name, value) of every field that is no section."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


DIGITS = "0x" + "f" * 5000  # an integer that Python reads, and does not write
# By the type of a field: what none of them takes, and what some do.
NEVER = {
    bool: ("perhaps", "2", "", "None"),
    int: ("many", "1.5", "nan", "", "-1", str(1 << 63), str(10**30), DIGITS),
    float: ("wide", "", "-1.0", "-1e-300", "1e300", "nan", "inf", "-inf", "1e999"),
    str: ("x" * 10_000, "~no such user/there"),
    tuple: (
        "5",
        "-0.1",
        "1e999",
        "conv9",
        "None",
        "(None, b'conv4', 1j, {}, ...)",
        "((), ((),))",
        "(1, 2)",
        "((1.0, 0.1, 0.2),)",
        "((-1.0, 0.1),)",
        "((1.0, -0.1),)",
        "((2.0, 0.1), (1.0, 0.1))",
        "((1e999, 1e999),)",
        "((True, False),)",
        f"(({10**30}, {10**30}),)",
        "(('1', '2'),)",
        "(('conv1', ((1.0, 0.1),)), ('conv1', ((1.0, 0.1),)))",
        "(('conv9', ((1.0, 0.1),)),)",
        "(('conv1', (1.0, 0.1)),)",
        "(('conv1', 5),)",
        "((5, ((1.0, 0.1),)),)",
        str((1,) * 7),
        str((96.0,) * 7),
        str((True,) * 7),
        str(((96,),) * 7),
        str((1 << 20,) * 7),
        str((10**12,) * 7),
        f"({', '.join([DIGITS] * 7)})",
        "(" * 300 + "5" + ")" * 300,
        "-" * 20_000 + "1",
        "(",
        "('",
        "a, b",
        "{[]: 1}",
        "\udcff",
    ),
}
SOMETIMES = {
    bool: ("0",),
    int: ("0", "1", "1024", str((1 << 31) - 1), str(1 << 31)),
    float: ("0.0", "1e-300", "50.0", "1e6"),
    str: ("", " ", "unknown", "\a\n\x1b[2J", "\udcff"),
    tuple: (
        "conv4",
        "('conv4', 'conv4')",
        "('conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7')",
        "((1.0, 0.1),)",
        "((1.0, 0.1), (1.0, 0.1))",
        "((1e6, 1e3),)",
        "(('conv1', ((1.0, 0.1),)),)",
        str((96,) * 7),
    ),
}
FIELDS = dict(fields(alexnet.get_config()))
# Of NEVER, what one field takes all the same.
SOUND = {"optimizer.layer_decay": ("(('conv1', 5),)",)}
# Beside a field, what gives its values a meaning.
WITH = {"schedule.factors": ("--config.schedule.name=steps",), "num_epochs": ("--config.num_steps=0",)}


def values(name):
    """(value, whether it may be accepted) of each hostile value of a field."""
    kind = type(FIELDS[name])
    sound = SOUND.get(name, ())
    return [(value, value in sound) for value in NEVER[kind]] + [(value, True) for value in SOMETIMES[kind]]


def described(name, value, code, said):
    return f"--config.{name}={value[:60]!r} ({len(value)} characters): exit code {code}\n{said[-3000:]}"


def check_values(command_line, name, chosen):
    starts = [(*WITH.get(name, ()), f"--config.{name}={value}") for value, _ in chosen]
    answers = command_line.each(starts)
    for (value, may_work), (code, said) in zip(chosen, answers, strict=True):
        fine = is_refused(code, said, name) or (may_work and is_accepted(code, said))
        assert fine, described(name, value, code, said)
    return [start for start, answer in zip(starts, answers, strict=True) if is_accepted(*answer)]


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_is_refused_by_its_fields_name_or_accepted(command_line, name):
    """A third of the values of each field, others for the next field of its type; the slow test has all."""
    check_values(command_line, name, values(name)[list(FIELDS).index(name) % 3 :: 3])


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_what_is_accepted_trains_or_says_why_not(command_line, name):
    """Two steps and an evaluation: the start has promised nothing that the run does not keep."""
    starts = check_values(command_line, name, values(name))
    if name in ("num_steps", "num_epochs"):
        starts = [start for start in starts if float(start[-1].partition("=")[2]) < 10]  # the others take for ever
    for start, (code, said) in zip(starts, command_line.each(starts, whole=True), strict=True):
        assert "Done: " in said or is_refused(code, said), f"{start}: exit code {code}\n{said[-3000:]}"


# Any override: fields as they are and a little mistyped, any text and any literal as their value.

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from("\udc80\udcff"))
LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.binary(max_size=3) | st.sampled_from(LAYERS),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=7).map(tuple),
    max_leaves=12,
)
SECTIONS = [name for name, _ in cli.field_names(alexnet.get_config())]
NAMES = (
    st.sampled_from(SECTIONS)
    | st.builds(
        lambda name, at, text: name[:at] + text + name[at:], st.sampled_from(SECTIONS), st.integers(0, 30), TEXT
    )
    | st.builds(
        "{}{}".format, st.sampled_from(SECTIONS), st.sampled_from(["[0]", ".x", "['a']", "[", "()", ".__class__"])
    )
    | TEXT
)
OVERRIDES = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["--config.", "-config.", "--noconfig."]),
    NAMES,
    st.sampled_from(["=", "=", "=", "", " "]),
    TEXT | LITERALS.map(repr),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(overrides=st.lists(OVERRIDES, min_size=1, max_size=2))
@example(overrides=["--config.model=3"])
@example(overrides=["--config.model={}"])
@example(overrides=["--config.parallel={'devices_per_network': 1.5}"])
@example(overrides=["--config.model.features[0]=3"])
@example(overrides=["--config.model.pool-window=3"])
@example(overrides=["--noconfig.model.lrn=3"])
@example(overrides=["--config.=", "--config.seed"])
def test_any_override_is_refused_in_a_sentence_or_accepted(command_line, overrides):
    # What is prepared goes into the test's own folder.
    overrides = [override for override in overrides if "data_dir" not in override]
    code, said = command_line(*overrides)
    assert is_accepted(code, said) or is_refused(code, said), f"{overrides}: {code}\n{said[-3000:]}"


# Any config.json.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def changed(name, value, how):
    """The paper's config as JSON, with a field or a section changed, added or left out."""
    config = workdirs.to_json(alexnet.get_config())
    *sections, field = name.split(".")
    place = config[sections[0]] if sections else config
    if how == "left out":
        del place[field]
    else:
        place[field if how == "changed" else f"{field}_"] = value
    return json.dumps(config)


CONTENTS = (
    JSON.map(json.dumps).map(str.encode)
    | st.binary(max_size=50)
    | st.builds(changed, st.sampled_from(SECTIONS), JSON, st.sampled_from(["changed", "added", "left out"])).map(
        str.encode
    )
    | st.builds(lambda end: changed("seed", 0, "changed").encode()[:end], st.integers(0, 2000))
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=CONTENTS)
@example(content=b"[]")
@example(content=b"[" * 100_000)
@example(content=b'{"a":' * 300 + b"1" + b"}" * 300)
@example(content=b'{"__class__": 1, "a.b": 2}')
@example(content=b'{"seed": ' + b"9" * 5000 + b"}")
def test_any_config_file_of_a_workdir_is_read_or_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with contextlib.suppress(UserError):
        workdirs.check(alexnet.get_config(), tmp_path)
    with contextlib.suppress(UserError):
        config = workdirs.read_config(tmp_path)
        assert isinstance(config, ml_collections.ConfigDict)
        assert isinstance(setup.state_shapes(config), update.State)


def test_data_without_a_name_are_refused(command_line):
    """An empty path would be the folder that one stands in."""
    for field in ("name", "data_dir", "train_split", "eval_split"):
        code, said = command_line(f"--config.dataset.{field}=")
        assert is_refused(code, said, f"dataset.{field}='' is empty"), said


@pytest.mark.parametrize("recipe", ["alexnet", "cifar10", "torchvision"])
def test_views_of_any_size_are_refused_or_go_through(recipe):
    config = importlib.import_module(f"configs.{recipe}").get_config()
    config.input.resize = 4096
    for size in (*range(1, 20), *range(45, 66), 4096):
        config.input.crop = size
        try:
            assert setup.state_shapes(config).params
        except UserError as error:
            assert f"input.crop={size} " in str(error) and size < (63 if recipe == "torchvision" else 52), error
            assert "try" not in str(error) and ("it takes 52 or more" in str(error)) == ("pooling" in str(error)), error


def test_a_damaged_config_of_another_run_is_named(command_line, tmp_path):
    content = changed("model.width", "wide", "changed")
    (tmp_path / "config.json").write_text(content)
    code, said = command_line(f"--config.init_from={tmp_path}")
    assert is_refused(code, said, f"init_from={str(tmp_path)!r}: model.width='wide' must be a number"), said


# What only a recipe can get wrong: the command line parses by the types of the fields.


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("seed", True, "seed=True must be an integer"),
        ("batch_size", np.int64(8), "batch_size=.*8.* must be an integer"),
        ("optimizer.momentum", np.float32(0.5), "optimizer.momentum=.* must be a number"),
        ("model.lrn", 1, "model.lrn=1 must be True or False"),
        ("model.width", None, "model.width=None must be a number"),
        ("model.features", 96, "model.features=96 must be a tuple"),
        ("model.features", (float("nan"),) * 7, "model.features=.*nan"),
        ("model.exchange", (float("nan"),), r"model.exchange=\(nan,\) takes layers of conv2"),
        ("schedule.layers", (("conv1", ((float("nan"), 0.1),)),), r"schedule.layers\['conv1'\]=.*nan"),
        ("schedule.layers", (("conv1", ((1.0, float("nan")),)),), r"schedule.layers\['conv1'\]=.*nan"),
        ("dataset.name", "a\0b", "dataset.name="),
        ("dataset", 3, "dataset=3 must be a section"),
        ("model.name", ["alexnet"], "model.name=.* must be text"),
        ("model.lnr", True, "did you mean lrn"),
        ("model.towers", ..., "no field model.towers"),
        ("optimizer.learningrate", 0.1, "optimizer.learningrate.* did you mean learning_rate"),
        ("num_step", 3, "num_step .*did you mean num_steps"),
        ("parallel", ..., "no field parallel"),
        ("log_every.steps", ..., "no field log_every.steps"),
    ],
)
def test_a_recipe_is_checked_like_a_command_line(name, value, says):
    config = alexnet.get_config().to_dict()
    *sections, field = name.split(".")
    place = config[sections[0]] if sections else config
    if value is ...:
        del place[field]
    else:
        place[field] = value
    with pytest.raises(UserError, match=says):
        schema.validate(ml_collections.ConfigDict(config))


def test_the_recipes_are_in_order():
    for file in sorted((ROOT / "configs").glob("[!_]*.py")):
        if file.stem in ("base", "finetune"):  # the fields of all recipes; and one that needs the run of another
            continue
        get_config = importlib.import_module(f"configs.{file.stem}").get_config
        known = re.search(r"check_variant\(.*, \((.*)\)\)", file.read_text())
        variants = re.findall(r'"(\w+)"', known[1]) if known else re.findall(r'variant == "(\w+)"', file.read_text())
        assert "variant" not in file.read_text() or variants
        for arguments in ((), *((variant,) for variant in variants)):
            setup.state_shapes(get_config(*arguments))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("def get_config(:", "SyntaxError: "),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module' (line 1)"),
        ("def get_config():\n    return 1 / 0", "ZeroDivisionError: division by zero (line 2)"),
        ("def get_config():\n    return int('x')", "ValueError: invalid literal for int() with base 10: 'x' (line 2)"),
        ("def get_config():\n    raise KeyError('x')", "KeyError: 'x' (line 2)"),
        ("def get_config():\n    return open('/no/file')", "No such file or directory"),
        ("def get_config():\n    raise OSError", "cannot be loaded: OSError"),
        ("def get_config():\n    return 3", "get_config() returns no ConfigDict: 3"),
        ("x = 3", "has no function get_config()"),
        (None, "No such file or directory"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence(command_line, tmp_path, content, says):
    file = tmp_path / "recipe.py"
    if content:
        file.write_text(content)
    [(code, said)] = command_line.start([[f"--config={file}", f"--workdir={tmp_path / 'run'}"]])
    assert is_refused(code, said, "--config") and says in said, said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config="], "--config= cannot be loaded"),
        (["--config=/nowhere.py", f"--config={ROOT / 'configs/alexnet.py'}"], "--config is given 2 times"),
        (
            [f"--config={ROOT / 'configs/alexnet.py'}", "--config.batch_size=many"],
            "batch_size=many must be an integer.",
        ),
        ([f"--config={ROOT / 'configs/alexnet.py'}", "--config.batch_size="], "batch_size= must be an integer."),
        (
            [f"--config={ROOT / 'configs/alexnet.py'}", "--config.schedule.warmup=a"],
            "schedule.warmup=a must be a number.",
        ),
    ],
)
def test_flags_that_cannot_be_read_are_one_sentence(command_line, tmp_path, arguments, says):
    [(code, said)] = command_line.start([[*arguments, f"--workdir={tmp_path / 'run'}"]])
    assert is_refused(code, said) and says in said, said


def test_a_workdir_from_when_factors_of_layers_replaced_the_common_ones(tmp_path):
    """The same values mean other rates now."""
    config = alexnet_2012.get_config()
    stored = workdirs.to_json(config)
    workdirs.write_config(config, tmp_path)
    workdirs.check(config, tmp_path)
    del stored["schedule"]["warmup"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"was begun when schedule\.layers replaced schedule\.factors"):
        workdirs.check(config, tmp_path)


def test_a_workdir_from_when_the_cifar_network_normalised_across_maps(tmp_path):
    """The same values mean another network now."""
    for lrn in (False, True):
        stored = workdirs.to_json(cifar10.get_config())
        stored["model"]["lrn"] = lrn
        del stored["label_smoothing"]  # there was no such field then
        (tmp_path / "config.json").write_text(json.dumps(stored))
        if lrn:
            with pytest.raises(
                UserError, match=r"was begun when model\.lrn of the network cifar normalised across maps"
            ):
                workdirs.read_config(tmp_path)
        else:
            workdirs.read_config(tmp_path)


def test_debug_shows_the_traceback(command_line):
    for mistake in ("--config.seed=-1", "--config.seed=x", "--config.sed=1"):
        code, said = command_line(mistake)
        assert is_refused(code, said), said
        code, shown = command_line("--debug", mistake)
        assert code == 2 and "Traceback (most recent call last)" in shown and said in shown, shown


# Sizes.


@pytest.fixture
def machine(monkeypatch):
    """Sets the memory of this machine, in bytes."""

    def set_memory(size):
        known, real = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": size // 4096}, os.sysconf
        monkeypatch.setattr(os, "sysconf", lambda name: known[name] if name in known else real(name))

    return set_memory


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 1 << 20),
        ("eval_batch_size", 1 << 20),
        ("model.width", 64.0),
        ("model.features", (1 << 20,) * 7),
        ("model.num_classes", 1 << 20),
        ("model.pool_stride", 1),
        ("input.crop", 4096),
    ],
)
def test_what_no_memory_can_hold_is_refused(machine, field, value):
    """The paper's network fits into 4 GB; its parameters, velocity and gradients alone are 3 × 4 × 60,965,224 bytes."""
    config = alexnet.get_config()
    machine(4 << 30)
    setup.check_memory(config, setup.state_shapes(config))
    machine(12 * 60_965_224)
    with pytest.raises(UserError, match="needs at least"):
        setup.check_memory(config, setup.state_shapes(config))
    machine(24 * 60_965_224)
    with pytest.raises(UserError, match=r"in 2 copies\. With --cpu_devices=1 it holds one"):
        setup.check_memory(config, setup.state_shapes(config), copies=2)
    config.update_from_flattened_dict({"input.resize": 4096, field: value})
    machine(24 << 30)
    with pytest.raises(UserError, match=re.escape(f"{field}={value}")):
        setup.check_memory(config, setup.state_shapes(config))


def test_a_start_counts_the_memory(command_line):
    for field in ("batch_size", "eval_batch_size"):
        code, said = command_line(f"--config.{field}={1 << 20}")
        assert is_refused(code, said, f"{field}=1048576") and "this machine has 17.2 GB" in said, said


def test_what_fits_by_the_compilers_count_is_not_refused(machine):
    """XLA's own count of the memory of a gradient, for a batch whose maps outweigh the parameters."""
    config = recipes.narrow()
    config.update(batch_size=256, eval_batch_size=1)
    shapes, network = setup.state_shapes(config), update.build_network(config)

    def loss(params, images):
        return network.apply({"params": params}, images.astype(jnp.float32), train=True, rngs={"dropout": key}).sum()

    key = jax.random.key(0)
    images = jax.ShapeDtypeStruct((256, 67, 67, 3), jnp.uint8)
    counted = jax.jit(jax.grad(loss)).lower(shapes.params, images).compile().memory_analysis()
    total = counted.temp_size_in_bytes + counted.argument_size_in_bytes + counted.output_size_in_bytes
    machine(total)
    setup.check_memory(config, shapes)
    machine(total // 8)
    with pytest.raises(UserError, match="batch_size=256"):
        setup.check_memory(config, shapes)


def test_more_steps_than_can_be_counted_are_refused():
    config = alexnet.get_config()
    config.update(num_epochs=1e6, batch_size=1)
    with pytest.raises(UserError, match=r"num_epochs=1000000\.0 makes 1,281,167,000,000 steps of batch_size=1"):
        schema.Durations.of(config, 1_281_167)
    config.num_steps = 10
    config.checkpoint_every.epochs = 2000.0
    with pytest.raises(UserError, match=r"checkpoint_every\.epochs=2000\.0 makes 2,562,334,000 steps"):
        schema.Durations.of(config, 1_281_167)
    config.checkpoint_every.epochs = 1676.0
    assert schema.Durations.of(config, 1_281_167).checkpoint_every == 2_147_235_892


def test_a_factor_beyond_the_last_step_that_can_be_counted_never_comes():
    config = alexnet.get_config()
    config.schedule.update(name="steps", factors=((1.0, 0.1), (1e6, 0.0)))
    rate, last = optimizer.schedule(config, 1e5), optimizer.MAX_STEPS - 1  # the number of updates before the last one
    assert [float(rate(jnp.int32(step))) for step in (0, last)] == pytest.approx([0.01, 0.001])


def test_a_plateau_that_nothing_measures_is_refused():
    config = alexnet.get_config()
    config.eval_every.epochs = 0.0
    with pytest.raises(UserError, match=r"eval_every\.epochs and eval_every\.steps are both 0"):
        schema.validate(config)
    config.schedule.name = "steps"
    schema.validate(config)
