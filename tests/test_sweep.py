"""Sweeps: what they compute of finished runs, and that they survive failures, signals and kills."""

import csv
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats

import models
import runs
from common import cli
from common.errors import UserError
from configs import demo
from configs.sweeps import Arm, Measure, Sweep, caltech101, claims, dropout, epochs_to, figure1, initial_weights, last
from run import arms, results

BOUND = Measure("error", last("test/top1_error"))


def lines(*errors):
    return [{"step": step, "epoch": float(step), "test/top1_error": error} for step, error in enumerate(errors)]


def worse(lines):
    return last("test/top1_error")(lines) + 0.25


def sweep(**changes):
    return Sweep(
        "configs/demo.py", {"base": Arm(), "other": Arm({"model.lrn": False}, {"error": 0.02})}, [BOUND], **changes
    )


def test_differences_are_those_of_a_paired_test():
    rng = np.random.default_rng(0)
    base, other = rng.uniform(0.2, 0.3, (2, 5))
    finished = {("base", seed): lines(value) for seed, value in enumerate(base)}
    finished |= {("other", seed): lines(0.9, value) for seed, value in enumerate(other)} | {("base", 9): lines(0.7)}
    zero, row = results.rows(sweep(), finished)
    test = stats.ttest_rel(other, base).confidence_interval(0.95)  # seed 9 has no pair
    assert row.difference == pytest.approx((other - base).mean())
    assert (row.difference - row.margin, row.difference + row.margin) == pytest.approx((test.low, test.high))
    assert (row.mean, row.deviation) == pytest.approx((other.mean(), other.std(ddof=1)))
    assert (zero.mean, zero.difference, row.published) == (pytest.approx(np.mean([*base, 0.7])), None, 0.02)
    table = results.to_markdown(sweep(), [zero, row])
    assert f"| other | 5 | {other.mean():.1%}".replace("%", "") in table and "| +2.0 | `model.lrn=False` |" in table
    _, written = csv.DictReader(results.to_csv([zero, row]).splitlines())
    assert float(written["low"]) == pytest.approx(test.low) and written["values"].startswith("0:")


def test_the_noise_is_that_of_all_arms():
    """Against the sums of squares of a balanced table; and 95 of 100 intervals have the true difference in them."""
    names, effects, seeds = ("base", "other", "third", "fourth"), np.array([0.0, 0.02, 0.05, -0.01]), 3
    found = dataclasses.replace(sweep(), arms={name: Arm() for name in names} | {"read": Arm(reads={"error": worse})})
    rng, inside, tables = np.random.default_rng(0), 0, 400
    for _ in range(tables):
        values = 0.5 + effects[:, None] + rng.normal(0, 0.05, seeds) + rng.normal(0, 0.01, (4, seeds))
        finished = {(name, seed): lines(values[i, seed]) for i, name in enumerate(names) for seed in range(seeds)}
        _, *rows, read = results.rows(found, finished)
        inside += sum(abs(row.difference - effect) <= row.margin for row, effect in zip(rows, effects[1:], strict=True))
    rest = values - values.mean(0) - values.mean(1)[:, None] + values.mean()
    variance = np.sum(rest**2) / (3 * 2)
    margin = stats.t.ppf(0.975, 6) * np.sqrt(2 * variance / seeds)
    assert [row.margin for row in rows] == pytest.approx([margin] * 3)
    assert 0.93 < inside / (3 * tables) < 0.97
    assert read.margin == pytest.approx(0.0, abs=1e-9), "what it reads always differs as much"

    del finished["third", 2]  # an arm with fewer runs has a wider interval
    _, other, third, *_ = results.rows(found, finished)
    assert third.margin == pytest.approx(other.margin * np.sqrt(3 / 2))


def test_ratios_are_those_of_each_seed():
    epochs = Measure("epochs", last("test/top1_error"), ratio=True)
    found = dataclasses.replace(sweep(), measures=[epochs])
    finished = {("base", seed): lines(value) for seed, value in enumerate((6.0, 6.5))}
    finished |= {("other", seed): lines(value) for seed, value in enumerate((30.0, 26.0))}
    zero, row = results.rows(found, finished)
    assert (zero.difference, row.difference) == (None, pytest.approx(4.5))  # of 5 and 4
    assert results.cells_of(row) == ("28.00 ± 2.83", "× 4.50 ± 6.35", "–")
    title, ((name, _, _, _, by_seed),) = results.to_draw(found, [zero, row], epochs)
    assert (title, name, by_seed) == ("epochs / that of base", "other", [5.0, 4.0])


def test_an_arm_with_a_run_that_never_arrives_is_not_compared():
    """Its other runs are the better ones. There is no ratio to a base of 0 either."""
    steps = Measure("steps", epochs_to("test/top1_error", 0.2), ratio=True)
    found = dataclasses.replace(sweep(), measures=[steps])
    finished = {("base", seed): lines(0.4, 0.4, 0.1) for seed in range(3)}
    finished |= {("other", seed): lines(0.4, 0.4, 0.4, end) for seed, end in enumerate((0.1, 0.9, 0.9))}
    zero, row = results.rows(found, finished)
    assert (row.values, row.finished, row.difference, zero.finished) == ({0: 3.0}, 3, None, 3)
    assert results.to_draw(found, [zero, row], steps)[1] == [("other", None, None, None, [])]
    assert "| other | 1 of 3 | 3.00 | – |" in results.to_markdown(found, [zero, row])
    assert results.rows(found, finished | {("base", 0): lines(0.1), ("other", 1): lines(0.1)})[1].difference is None
    none = {("base", 0): lines(0.1), ("other", 0): lines(0.4, 0.1)}
    assert results.rows(found, none)[1].difference is None


def test_a_measure_that_fails_names_the_run():
    found = dataclasses.replace(sweep(), measures=[Measure("error", worse)])
    with pytest.raises(UserError, match=r"The measure 'error' of other/seed-1: TypeError: "):
        results.rows(found, {("base", 0): lines(0.5), ("other", 1): [{"step": 1}]})


def test_a_new_neutral_field_leaves_finished_runs_finished(tmp_path):
    recipe = demo.get_config().to_dict()

    def run_of(recipe):
        return arms.runs_of(sweep(), tmp_path, recipe=recipe, arms=(), overrides=(), flags=())[0]

    def without(section, field):
        return recipe | {section: {name: value for name, value in recipe[section].items() if name != field}}

    run = run_of(recipe)
    run.workdir.mkdir(parents=True)
    command = {"flags": list(run.flags), "finished": True}
    for stored, finished in (
        (recipe, True),
        (without("optimizer", "layer_decay"), True),
        ({name: value for name, value in recipe.items() if name != "mixup"}, True),
        (without("input", "crop"), False),  # a recipe's own, not the neutral one
        (recipe | {"mixup": 0.5}, False),
        (arms.checksum(recipe), True),  # as earlier versions stored it
        (arms.checksum(recipe) + 1, False),
        (None, False),
    ):
        (run.workdir / "command.json").write_text(json.dumps(command | {"recipe": stored}))
        assert run.finished == finished, stored
    (run.workdir / "command.json").write_text(json.dumps({"recipe": recipe, "finished": True}))
    assert not run.finished, "of other flags"


def test_an_arm_that_reads_another_metric_takes_the_runs_of_the_base():
    found = dataclasses.replace(sweep(), arms={"base": Arm(), "centre": Arm(reads={"error": last("centre")})})
    finished = {("base", seed): [{"test/top1_error": 0.5, "centre": 0.6 + seed / 100}] for seed in range(2)}
    _, row = results.rows(found, finished)
    assert row.values == {0: 0.6, 1: 0.61} and row.difference == pytest.approx(0.105)
    planned = arms.runs_of(found, pathlib.Path("w"), recipe={}, arms=(), overrides=(), flags=())
    assert {run.arm for run in planned} == {"base"}


def test_few_runs_have_no_interval():
    zero, row = results.rows(sweep(), {("base", 0): lines(0.5), ("other", 0): lines(0.25)})
    assert (row.difference, row.margin, row.deviation) == (-0.25, None, None)
    (_, missing) = results.rows(sweep(), {})
    assert (missing.mean, missing.difference) == (None, None)
    assert results.cells_of(missing)[0] == "–" and results.cells_of(zero)[0] == "50.0"


def test_the_epoch_of_a_bound():
    found = [{"step": 0, "epoch": 0.5, "x": 0.4}, {"step": 1, "epoch": 1.0}, {"step": 2, "epoch": 1.5, "x": 0.25}]
    assert (epochs_to("x", 0.25)(found), epochs_to("x", 0.1)(found)) == (1.5, None)


SWEEPS = {
    "caltech101": caltech101.get_sweep(),
    "caltech101:short": caltech101.get_sweep("short"),
    "claims": claims.get_sweep(),
    "claims:imagenet": claims.get_sweep("imagenet"),
    "dropout": dropout.get_sweep(),
    "figure1": figure1.get_sweep(),
    "figure1:search": figure1.get_sweep("search"),
    "initial_weights": initial_weights.get_sweep(),
}


@pytest.mark.parametrize("found", SWEEPS.values(), ids=SWEEPS)
def test_every_arm_is_a_recipe(found):
    """Each arm's overrides are fields, and give another network, input or rule than the base."""
    seen, trained = set(), [arm for arm in found.arms.values() if not arm.reads]
    for arm in trained:
        config = cli.load_config(str(runs.ROOT / found.config))
        for field, value in (found.overrides | arm.overrides).items():
            with config.unlocked():
                *section, name = field.split(".")
                of = config[section[0]] if section else config
                assert type(of[name]) is type(value), field
                of[name] = value
        models.build(config.model, None, config.input.crop)
        seen.add(str(config))
    assert len(seen) == len(trained)


# The command. A stand-in for main.py writes what a run writes, and takes a signal as a run does.
STAND_IN = """
import json, pathlib, signal, sys, time
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
workdir, seed = pathlib.Path(flags["workdir"]), int(flags["config.seed"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
if flags["config.model.lrn_n"] == "0":
    sys.exit("error: model.lrn_n=0 must be more.")
if flags.get("config.model.lrn_k") == "-1.0":
    sys.exit("error: model.lrn_k=-1.0 must be more.")
(workdir / "config.json").write_text(json.dumps({"num_steps": 4, "num_epochs": 0.0}))
metrics = workdir / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
for step in range(done, 5):
    time.sleep(float(flags["config.input.scale"]))
    with metrics.open("a") as file:
        print(json.dumps({"step": step, "epoch": step / 2, "test/top1_error": 0.1 * seed + 0.01 * step}), file=file)
"""
FILE = """
from configs.sweeps import Arm, Measure, Sweep, last
def get_sweep():
    arms = {"base": Arm(), "bad": Arm({"model.lrn_n": 0}), "last": Arm({"model.lrn_k": 1.0})}
    return Sweep("configs/demo.py", arms, [Measure("error", last("test/top1_error"))], seeds=(0, 1),
                 overrides={"model.lrn_n": 5, "input.scale": 0.01}, curve="test/top1_error")
"""
PROGRAM = """
import sys
from run import arms
arms.ArmRun.command = property(lambda run: [sys.executable, "STAND_IN", *run.flags, f"--workdir={run.workdir}"])
from common import cli
from tools import sweep
sweep.SECONDS = 0.05
cli.run(sweep.main, passes=("--config.", "--slurm."))
"""

ENVIRONMENT = os.environ | {"PYTHONPATH": str(runs.ROOT)}


@pytest.fixture
def command(tmp_path):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "file.py").write_text(FILE)
    (tmp_path / "program.py").write_text(PROGRAM.replace("STAND_IN", str(tmp_path / "stand_in.py")))
    flags = [f"--sweep={tmp_path / 'file.py'}", f"--workdir={tmp_path / 'w'}"]
    return [sys.executable, str(tmp_path / "program.py"), *flags]


def start(command, *flags):
    return subprocess.Popen(
        [*command, *flags],
        cwd=runs.ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(command, *flags, expect):
    process = start(command, *flags)
    out, err = process.communicate(timeout=120)
    assert process.returncode == expect, out + err
    return out, err


def counts(tmp_path):
    """How many steps each run has."""
    return {str(path.parent.relative_to(tmp_path / "w")): len(path.read_text().splitlines())
            for path in sorted((tmp_path / "w").rglob("metrics.jsonl"))}  # fmt: skip


def test_a_failed_arm_stops_no_other_and_finished_runs_stay(command, tmp_path):
    _out, err = finish(command, expect=2)
    failures = "2 of 6 runs failed: bad/seed-0 (model.lrn_n=0 must be more); bad/seed-1 (model.lrn_n=0 must be more)"
    assert runs.sentence(err) == f"error: {failures}"
    assert counts(tmp_path) == {f"{arm}/seed-{seed}": 5 for arm in ("base", "last") for seed in (0, 1)}
    table = (tmp_path / "w/results.md").read_text()
    assert "| base | 2 | 9.0 ± 7.1 |" in table and "| bad | 0 | – |" in table and "4 of 6 runs" in table
    for picture in ("curve.png", "differences-1.png"):
        assert picture in table and (tmp_path / "w" / picture).stat().st_size > 5000
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("metrics.jsonl")}
    _, err = finish(command, "--arms=base,last", expect=0)
    assert "starts" not in err
    assert before == {path: path.stat().st_mtime_ns for path in before}
    finish(command, "--arms=base", expect=0)
    assert (tmp_path / "w/results.md").read_text().count("| 2 |") == 2, "the other arm has left the table"
    finish(command, "--arms=last", "--seeds=7", "--config.input.scale=0.02", expect=0)
    flags = json.loads((tmp_path / "w/last/seed-7/command.json").read_text())["flags"]
    assert flags[-2:] == ["--config.input.scale=0.02", "--config.seed=7"]
    finish(command, "--arms=base", "--seeds=7", expect=0)
    assert "| base | 3 |" in (tmp_path / "w/results.md").read_text(), "the sweep's own seeds have left the table"


def test_results_that_cannot_be_written_stop_no_run(command, tmp_path):
    (tmp_path / "w/results.md").mkdir(parents=True)
    _, err = finish(command, "--arms=base,last", expect=2)
    assert len(re.findall(r"warning: .*results\.md cannot be written: ", err)) == 5, err
    assert re.search(r"results\.md cannot be written: ", runs.sentence(err)), err
    assert set(counts(tmp_path).values()) == {5} and len(counts(tmp_path)) == 4
    (tmp_path / "w/results.md").rmdir()
    _, err = finish(command, "--arms=base,last", expect=0)
    assert "starts" not in err


def test_a_refused_command_leaves_finished_runs_finished(command, tmp_path):
    finish(command, "--arms=base", expect=0)
    table = (tmp_path / "w/results.md").read_text()
    _, err = finish(command, "--arms=base", "--config.model.lrn_k=-1.0", expect=2)
    assert err.count("failed: model.lrn_k=-1.0 must be more") == 2
    log = tmp_path / "w/base/seed-0/log.txt"
    log.unlink(), log.mkdir()  # so that it does not even start
    _, err = finish(command, "--arms=base,last", "--seeds=0", "--config.batch_size=8", expect=2)
    assert "base/seed-0 failed: " in err and "last/seed-0 is finished" in err
    shutil.rmtree(tmp_path / "w/last")
    _, err = finish(command, "--arms=base", expect=0)
    assert "starts" not in err and "goes on" not in err
    assert (tmp_path / "w/results.md").read_text() == table


def test_a_run_whose_folder_is_gone_stops_no_other(command, tmp_path):
    process = start(command, "--arms=base,last", "--jobs=2", "--seeds=0", "--config.input.scale=1.0")
    gone = tmp_path / "w/base/seed-0"
    while not (gone / "metrics.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    shutil.rmtree(gone)
    gone.write_text("in its place")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "1 of 2 runs failed: base/seed-0" in runs.sentence(err), err
    assert "last/seed-0 is finished" in err


def test_a_failure_has_the_sentence_of_its_own_start(command, tmp_path):
    folder = tmp_path / "w/base/seed-0"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("error: of an earlier start.\n")
    (folder / "metrics.jsonl").mkdir()  # the stand-in ends with a traceback
    _, err = finish(command, "--arms=base", "--seeds=0", expect=2)
    assert re.search("base/seed-0 .exit code 1, see ", runs.sentence(err)), err


@pytest.mark.parametrize("content", ["[]", '{"num_steps": 0, "num_epochs": 0}', '{"num_steps": "4"}', "\0"])
def test_a_damaged_config_stops_no_sweep(command, tmp_path, content):
    folder = tmp_path / "w/base/seed-0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content)
    (folder / "metrics.jsonl").write_text(json.dumps(lines(0.5)[0]) + "\n")
    finish(command, "--arms=base", "--seeds=0", expect=0)


def test_a_folder_that_cannot_be_written_stops_no_other_arm(command, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/base").touch()
    _, err = finish(command, "--arms=base,last", "--seeds=0", expect=2)
    assert "1 of 2 runs failed: base/seed-0" in runs.sentence(err) and "Not a directory" in runs.sentence(err)
    assert counts(tmp_path) == {"last/seed-0": 5}


def test_it_outlives_the_readers_of_its_output(command, tmp_path):
    with pathlib.Path("/dev/full").open("w") as full:
        process = subprocess.Popen(
            [*command, "--arms=base,last"], cwd=runs.ROOT, env=ENVIRONMENT, stdout=full, stderr=full
        )
    assert process.wait(timeout=120) == 0
    assert len(counts(tmp_path)) == 4


def test_runs_of_another_recipe_are_not_finished(command, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text((runs.ROOT / "configs/demo.py").read_text())
    (tmp_path / "file.py").write_text(FILE.replace("configs/demo.py", str(recipe)))
    given = ["--arms=base", "--seeds=0"]
    finish(command, *given, expect=0)
    recipe.write_text(recipe.read_text().replace("config.batch_size", "config.eval_batch_size"))
    _, err = finish(command, *given, expect=0)
    assert "base/seed-0 goes on" in err or "base/seed-0 starts" in err


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"base": Arm()', '"base": {}', "arms must be Arm by name"),
        ("seeds=(0, 1)", "seeds=()", "must be numbers from 0 on"),
        ('Arm({"model.lrn_n": 0})', 'Arm(reads={"eror": last("x")})', "The arm bad reads the runs of the base: it is"),
        ('{"model.lrn_k": 1.0}', '{"model.lrn_k": 1.0}, {"eror": 0.1}', "published 'eror', .* did you mean error"),
        ('{"model.lrn_k": 1.0}', '{"model.lrn_k": "one"}', "model.lrn_k='one' must be a number"),
        ('{"model.lrn_k": 1.0}', '{"model": 1.0}', "model is a section of the config; an arm sets its fields"),
    ],
)
def test_mistakes_of_a_sweep_file_end_in_a_sentence(command, tmp_path, old, new, sentence):
    assert old in FILE
    (tmp_path / "file.py").write_text(FILE.replace(old, new))
    _, err = finish(command, expect=2)
    assert re.search(sentence, runs.sentence(err)), err


def test_a_dry_run_prints_the_commands_and_writes_nothing(command, tmp_path):
    out, _ = finish(command, "--dry_run", "--arms=last", "--cpu_devices=2", expect=0)
    first, second = out.splitlines()
    assert "--config.model.lrn_k=1.0 --config.seed=0 --cpu_devices=2 --workdir=" in first and "seed=1" in second
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_same_command_goes_on_after_a_signal(command, tmp_path, number):
    slow = ["--arms=base,last", "--jobs=2", "--config.input.scale=0.5"]
    process = start(command, *slow)
    while sorted(counts(tmp_path).values())[:1] < [2]:
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], err
    for _ in range(100):  # the children's end is theirs after a kill
        if not (left := subprocess.run(["pgrep", "-f", str(tmp_path / "stand_in.py")], capture_output=True).stdout):
            break
        time.sleep(0.1)
    assert not left, "runs go on without their sweep"
    stopped = counts(tmp_path)
    assert stopped and all(steps < 5 for steps in stopped.values())
    quick = [*slow[:2], "--config.input.scale=0.5"]
    _, err = finish(command, *quick, expect=0)
    assert f"{next(iter(stopped))} goes on" in err
    assert set(counts(tmp_path).values()) == {5}
    assert "| last | 2 | 9.0 ± 7.1 | +0.0 ± 0.0 |" in (tmp_path / "w/results.md").read_text()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--arms=bsae"], "--arms=bsae: there is no such arm, did you mean base"),
        (["--seeds=a"], "--seeds=a must be numbers"),
        (["--seeds=1,0,1"], r"The seeds \(1, 0, 1\) have one twice"),
        (["--config.num_steps"], "--config.num_steps has no value"),
        (["--config.model.lnr=False"], r"has no field 'model.lnr'; did you mean model.lrn"),
        (["--config.seed=3"], "the sweep sets it"),
        (["--config.model.lrn_k=2.0"], "--config.model.lrn_k cannot be given: the arm last sets it"),
        (["--sweep=absent.py"], "--sweep=absent.py cannot be loaded"),
        (["--sweep=configs/demo.py"], "has no function get_sweep"),
        (["stray"], "'stray' is no flag"),
    ],
)
def test_mistakes_end_in_a_sentence(command, tmp_path, flags, sentence):
    _, err = finish(command, *flags, expect=2)
    assert re.search(sentence, runs.sentence(err)), err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("arms", "sentence"),
    [("{}", "has no arms"), ("{'..': Arm()}", "The arm '..' must be a name"), ("{'a b': Arm()}", "The arm 'a b' must")],
)
def test_mistakes_of_a_file_end_in_a_sentence(command, tmp_path, arms, sentence):
    (tmp_path / "file.py").write_text(FILE.replace('Sweep("configs/demo.py", arms', f'Sweep("configs/demo.py", {arms}'))
    _, err = finish(command, expect=2)
    assert sentence in runs.sentence(err)


@pytest.mark.slow
def test_a_sweep_of_real_runs(tmp_path):
    """Two arms of main.py, on photographs."""
    photographs = runs.photographs(tmp_path)
    (tmp_path / "real.py").write_text(FILE.replace("configs/demo.py", "configs/alexnet.py").replace("0.01", "0.0156"))
    given = [flag for flag in runs.command(photographs, tmp_path / "x")[4:] if flag.startswith("--config.")]
    given = [flag for flag in given if not flag.startswith("--config.seed")]
    command = [sys.executable, "-m", "tools.sweep", f"--sweep={tmp_path / 'real.py'}", f"--workdir={tmp_path / 'w'}"]
    _, err = finish(command, "--arms=base,last", "--seeds=0", *given, "--config.num_steps=4", expect=0)
    assert "last/seed-0 is finished" in err
    assert runs.checkpoints(tmp_path / "w/last/seed-0") == [4]
