"""What `make compiled` says: its reader of compiled programs, against texts made by hand, and the design's exchanges.

The slow tests set up the compiler's own environment and compile for devices that are not here.
"""

import collections
import json
import math
import os
import platform
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import models
import parallel
import recipes
import runs
import update
from benchmarks import compiled, hlo, measure, step, targets
from common.errors import UserError

# A product with its bias in a fusion, a loop that runs five times, a condition, and copies; what has S(1) lies in VMEM.
TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[2,4]{1,0})->f32[2,3]{1,0}}

%fused (p.0: bf16[2,4], p.1: bf16[4,3], p.2: f32[3]) -> (f32[3], bf16[2,3]) {
  %p.0 = bf16[2,4]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[4,3]{1,0} parameter(1)
  %p.2 = f32[3]{0} parameter(2)
  %dot.1 = bf16[2,3]{1,0} dot(%p.0, %p.1), metadata={op_name="jit(step)/transpose(jvp(Net))/fc6/dot_general"}
  %sum.1 = f32[3]{0} add(%p.2, %p.2), metadata={op_name="jit(step)/update/add"}
  ROOT %tuple.1 = (f32[3]{0}, bf16[2,3]{1,0}) tuple(%sum.1, %dot.1)
}

%body (b.0: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b.0 = (s32[], f32[8]{0}) parameter(0)
  %b.1 = f32[8]{0} get-tuple-element(%b.0), index=1
  %negate.1 = f32[8]{0} negate(%b.1), metadata={op_name="jit(step)/while/body/Net.pool/neg"}
  ROOT %b.2 = (s32[], f32[8]{0}) tuple(%b.1, %negate.1)
}

%until (u.0: (s32[], f32[8])) -> pred[] {
  %u.0 = (s32[], f32[8]{0}) parameter(0)
  %u.1 = s32[] get-tuple-element(%u.0), index=0
  %u.2 = s32[]{:T(128)} constant(5)
  ROOT %u.3 = pred[] compare(%u.1, %u.2), direction=LT
}

%seldom (s.0: f32[8]) -> f32[8] {
  %s.0 = f32[8]{0} parameter(0)
  ROOT %s.1 = f32[8]{0} exponential(%s.0)
}

%always (a.0: f32[8]) -> f32[8] {
  ROOT %a.0 = f32[8]{0} parameter(0)
}

ENTRY %main (x: f32[2,4], y: bf16[4,3], z: f32[3], w: (s32[], f32[8])) -> f32[2,3] {
  %x = f32[2,4]{1,0} parameter(0)
  %y = bf16[4,3]{1,0} parameter(1)
  %z = f32[3]{0} parameter(2)
  %w = (s32[], f32[8]{0}) parameter(3)
  %c.1 = bf16[2,4]{1,0:T(8,128)(2,1)S(1)} convert(%x), metadata={op_name="jit(step)/jvp(Net)/images/mul"}, \
backend_config={"window_config":{"estimated_cycles":"70","bounds":["1","2"]}}
  %copy-start.1 = (bf16[4,3]{1,0:S(1)}, bf16[4,3]{1,0}, u32[]{:S(2)}) copy-start(%y)
  %copy-done.1 = bf16[4,3]{1,0:S(1)} copy-done(%copy-start.1)
  %fusion.1 = (f32[3]{0}, /*index=1*/bf16[2,3]{1,0:S(1)}) fusion(%c.1, %copy-done.1, %z), kind=kOutput, calls=%fused, \
metadata={op_name="jit(step)/update/add"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %while.1 = (s32[], f32[8]{0}) while(%w), condition=%until, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %g.1 = f32[8]{0} get-tuple-element(%while.1), index=1
  %p.9 = pred[] constant(false)
  %cond.1 = f32[8]{0} conditional(%p.9, %g.1, %g.1), true_computation=%seldom, false_computation=%always
  %slice-start.1 = ((f32[8]{0}), f32[2]{0:S(1)}, s32[]{:S(2)}) slice-start(%cond.1), slice={[0:2]}
  %slice-done.1 = f32[2]{0:S(1)} slice-done(%slice-start.1)
  %g.2 = bf16[2,3]{1,0:S(1)} get-tuple-element(%fusion.1), index=1
  ROOT %out.1 = f32[2,3]{1,0} convert(%g.2)
}
"""


def test_bytes_and_cycles_by_hand():
    program = hlo.Program(TEXT)
    assert [(each.name, times, program.moved(each)) for each, times in program.executed()] == [
        ("c.1", 1, 32),  # reads 8 float32 and writes to VMEM
        ("copy-start.1", 1, 24),
        ("copy-done.1", 1, 0),
        ("fusion.1", 1, 24),  # a bias read and written; the rest is in VMEM
        ("negate.1", 5, 64),
        ("slice-start.1", 1, 8),  # of 8 float32 it reads two
        ("slice-done.1", 1, 0),
        ("out.1", 1, 24),
    ]
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert known in TEXT
    silent = hlo.Program(TEXT.replace(known, ""))
    assert [times for each, times in silent.executed() if each.name == "negate.1"] == [5], "by the loop's condition"
    config = recipes.narrow(dtype="bfloat16")
    table = compiled.figures(program, {("fc6", "backward"): 197e9}, config, targets.TARGETS["v5e"])
    assert {row["part"]: (row["estimated_mega_cycles"] * 1e6, row["gigabytes_moved"] * 1e9) for row in table} == {
        "images": (70, 32),
        "pool forward": (0, pytest.approx(320)),
        compiled.TRANSFERS: (0, 32),
        # The fusion is its product's, although its root is the update; and the last line belongs to what it takes.
        "fc6 backward": (1000, 48),
    }
    assert table[-1]["computation_ms"] == pytest.approx(1), "197 GFLOP at 197 TFLOP/s"
    assert table[-1]["bandwidth_ms"] == pytest.approx(48 / 819e6)


EXCHANGES = """\
HloModule jit_step

%hide.1 (h.0: bf16[8,2]) -> (bf16[8,2], bf16[8,4]) {
  %h.0 = bf16[8,2]{1,0} parameter(0)
  %all-gather.1 = bf16[8,4]{1,0} all-gather(%h.0), replica_groups={{0,1},{2,3}}, dimensions={1}, \
frontend_attributes={chain_id="0"}, metadata={op_name="jit(step)/jvp(Net)/exchange/all_gather"}
  ROOT %start.1 = (bf16[8,2]{1,0}, bf16[8,4]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%hide.2 (h.1: bf16[8,2]) -> bf16[8,4] {
  %h.1 = bf16[8,2]{1,0} parameter(0)
  %all-gather.2 = bf16[8,4]{1,0} all-gather(%h.1), replica_groups={{0,1},{2,3}}, dimensions={1}, \
frontend_attributes={chain_id="0"}, metadata={op_name="jit(step)/jvp(Net)/exchange/all_gather"}
  ROOT %done.1 = bf16[8,4]{1,0} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[8,2], y: f32[10], z: f32[]) -> f32[10] {
  %x = bf16[8,2]{1,0} parameter(0)
  %y = f32[10]{0} parameter(1)
  %z = f32[] parameter(2)
  %fusion.1 = (bf16[8,2]{1,0}, bf16[8,4]{1,0}) fusion(%x), kind=kCustom, calls=%hide.1
  %g.1 = bf16[8,2]{1,0} get-tuple-element(%fusion.1), index=0
  %negate.1 = bf16[8,2]{1,0} negate(%x)
  %fusion.2 = bf16[8,4]{1,0} fusion(%g.1), kind=kCustom, calls=%hide.2
  %all-reduce-start.1 = (f32[10]{0}, f32[]) all-reduce-start(%y, %z), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %negate.2 = bf16[8,2]{1,0} negate(%negate.1)
  %all-reduce-done.1 = (f32[10]{0}, f32[]) all-reduce-done(%all-reduce-start.1)
  %reduce-scatter.1 = bf16[8,2]{1,0} reduce-scatter(%fusion.2), replica_groups=[2,2]<=[4], dimensions={1}, to_apply=%add
  ROOT %g.2 = f32[10]{0} get-tuple-element(%all-reduce-done.1), index=0
}
"""


def test_collectives_by_hand():
    gather, reduction, scatter = hlo.Program(EXCHANGES).collectives()
    assert (gather.kind, gather.shapes, gather.size, gather.sent) == ("all-gather", ("bf16[8,4]",), 64, 32)
    assert gather.groups == ((0, 1), (2, 3))
    assert gather.path == "jit(step)/jvp(Net)/exchange/all_gather"
    assert (gather.position, gather.done) == (0, 3), "it goes on beside the first negation"
    assert (reduction.kind, reduction.shapes, reduction.size) == ("all-reduce", ("f32[10]", "f32[]"), 44)
    assert reduction.sent == 44, "in a ring of two each sends a half twice"
    assert reduction.groups == ((0, 2), (1, 3)), "a transposed range"
    assert (reduction.position, reduction.done) == (3, 5)
    assert (scatter.kind, scatter.size, scatter.sent) == ("reduce-scatter", 64, 32)
    assert scatter.groups == ((0, 1), (2, 3))


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
    ],
)
def test_groups_of_devices(written, groups):
    line = f"  %all-reduce.1 = f32[4]{{0}} all-reduce(%x), replica_groups={written}, to_apply=%add"
    program = hlo.Program(f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  %x = f32[4]{{0}} parameter(0)\n{line}\n}}\n")
    (found,) = program.collectives()
    assert found.groups == groups


# ---- the design


def elements(array):
    """('bf16', 43264) of 'bf16[2,13,13,128]'."""
    dtype, axes = re.fullmatch(r"(\w+)\[([\d,]*)\]", array).groups()
    return dtype, math.prod(int(n) for n in axes.split(",") if n)


def designed(config, networks, dtype):
    """Arrays that the towers of a network exchange in a step, as (type, elements): the rows, forward, and backward."""
    count, crop = config.batch_size // networks, config.input.crop
    rows = [("u8", count * crop * crop * 3), ("s32", count), ("f32", 3 * count), ("f32", count)]
    table = models.layer_table(config.model, crop)
    assert {row.name for row in table if row.exchange} == {"conv3", "fc6", "fc7", "fc8"}
    exchange = [(dtype, 2 * row.exchange * count) for row in table if row.exchange]
    logits = ("f32", config.model.num_classes * count)
    return rows, [*exchange, logits], [*exchange, logits]


def check_exchanges(found, config, devices, devices_per_network, dtype):
    """Holds what devices exchange to the design: towers of a network to `designed`, networks to one reduction."""
    networks = devices // devices_per_network
    pairs = tuple((i, i + 1) for i in range(0, devices, 2))
    replicas = tuple(tuple(range(i, devices, devices_per_network)) for i in range(devices_per_network))
    between_towers = [each for each in found if each["groups"] == pairs and devices_per_network == 2]
    between_networks = [each for each in found if each["groups"] == replicas and networks > 1]
    assert len(found) == len(between_towers) + len(between_networks)

    parameters = sum(row.parameters for row in models.layer_table(config.model, config.input.crop))
    values = parameters // devices_per_network + 2  # the mean loss and error
    assert sum(elements(array)[1] for each in between_networks for array in each["arrays"]) == (networks > 1) * values
    assert {each["kind"] for each in between_networks} <= {"all-reduce"}
    if devices_per_network == 1:
        return

    rows, forward, backward = designed(config, networks, dtype)
    exchanged = [elements(array) for each in between_towers for array in each["arrays"]]
    assert collections.Counter(exchanged) == collections.Counter([*rows, *forward, *backward])
    gathers = [elements(a) for each in between_towers for a in each["arrays"] if each["kind"] == "all-gather"]
    # Some compilers gather few rows as a sum with zeros.
    assert not collections.Counter([rows[0], *forward]) - collections.Counter(gathers)


@pytest.mark.parametrize("devices_per_network", [1, 2])
def test_the_step_on_simulated_devices_exchanges_what_the_design_says(devices_per_network):
    config = recipes.narrow(num_classes=8)
    layout = parallel.Layout(devices_per_network, batch_size=config.batch_size, devices=jax.devices()[:4])
    text = compiled.lower("training", config, layout).compile().as_text()
    found = compiled.exchanges(hlo.Program(text))
    check_exchanges(found, config, 4, devices_per_network, "f32")


def test_what_is_lowered_from_shapes_takes_the_arrays_of_a_run():
    config = recipes.narrow()  # seven classes, padded to eight on two devices
    layout = parallel.Layout(2, batch_size=config.batch_size, devices=jax.devices()[:2])
    program = compiled.lower("training", config, layout).compile()
    state = layout.shard(jax.device_get(update.init_state(config)))
    _, values, _ = program(state, layout.put(recipes.batch(config, 0)), np.float32(1), np.bool_(False))
    assert np.isfinite(parallel.first(values)["loss"])


def test_the_operations_needed():
    """As `benchmarks.step` counts them, and by the published multiply-adds of a forward pass."""
    config = measure.recipe(batch_size=128)
    found = compiled.needed_flops("training", config, 2)
    assert sum(found.values()) == 64 * step.training_flops(config)
    assert (
        found["conv1", "backward"] == found["conv1", "forward"]
        and found["fc8", "backward"] == 2 * found["fc8", "forward"]
    )
    found = compiled.needed_flops("evaluation", config, 1)
    assert sum(found.values()) == pytest.approx(2 * 128 * 10 * 724e6, rel=1e-3)


# ---- mistakes


def test_each_compiler_is_in_the_makefile():
    text = (runs.ROOT / "Makefile").read_text()
    (line,) = re.findall(r"^compiler := (.*)$", text, re.M)
    listed = {
        name: kind
        for names, kind in re.findall(r"filter ([\w ]+),\$\(target\)\),(\w+)", line)
        for name in names.split()
    }
    kinds = {"tpu": "tpu", "cuda": "gpu"}
    assert listed == {name: kinds[target.platform] for name, target in targets.TARGETS.items()}


@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_missing_compiler_is_named_with_its_cure(name, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"--target={name} needs .*make compiled ARGS='--target={name}'"):
        targets.prepare(name)


def test_devices_that_no_topology_has_are_refused():
    for name, count in (("v5e", 3), ("v4", 512), ("h100", 9), ("v5e", 0)):
        with pytest.raises(UserError, match=f"--devices={count}: {name} is joined in 1, 2, "):
            targets.check_devices(name, count)
    for name, count in (("v5e", 256), ("h100", 3), ("v5p", 1)):
        targets.check_devices(name, count)


def test_an_unknown_target_is_one_sentence():
    command = [sys.executable, "-m", "benchmarks.compiled", "--target=v5"]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--target='v5' is not known: did you mean v5" in runs.sentence(done.stderr)


def test_a_kernel_for_gpus_is_refused_for_tpus():
    command = [sys.executable, "-m", "benchmarks.compiled", "--target=v5e", "--fused"]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--fused is a kernel for GPUs, and v5e is none" in runs.sentence(done.stderr)


# ---- for devices that are not here


def say(*flags):
    """The JSON line of `make compiled`, without what the tests set for their own process."""
    ours = ("MAKE", "MFLAGS", "ARGS", "DEVICES", "PYTHON", "XLA_", "JAX_")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = ["make", "--no-print-directory", "compiled", f"ARGS={' '.join(flags)}"]
    done = subprocess.run(command, cwd=runs.ROOT, env=variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


H100 = pytest.mark.skipif(
    "COMPILE_FOR_H100" not in os.environ, reason="3 GB to download; COMPILE_FOR_H100=1 asks for it"
)
LINUX = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="these compilers exist for Linux on x86-64 only"
)


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize(
    ("target", "devices", "more"),
    [
        *(("v5e", n, ()) for n in (1, 2, 4, 8)),
        *(pytest.param("h100", n, more, marks=H100) for n in (1, 2) for more in ((), ("--fused",))),
    ],
)
def test_the_step_compiles_and_exchanges_what_the_design_says(target, devices, more):
    networks = max(1, devices // 2)
    flags = (f"--devices={devices}", f"--batch_sizes={16 * networks}", "--width=0.125", "--programs=training")
    values = say(f"--target={target}", *flags, *more)
    (run,) = values["runs"]
    kernels = run["kernels"]
    assert kernels == (4 if more else 0), "two layers, forward and backward"
    assert run["fits"] and 0 < run["temporary_gigabytes"] < run["memory_gigabytes"] < 1
    assert run["gigabytes_moved"] > 0 and (run.get("estimated_mega_cycles", 0) > 0) == (target == "v5e")
    config = measure.recipe(batch_size=16 * networks, width=0.125, dtype="bfloat16")
    found = [each | {"groups": tuple(map(tuple, each["groups"]))} for each in run["collectives"]]
    check_exchanges(found, config, devices, min(devices, 2), "bf16")


@pytest.mark.slow
@LINUX
@H100
def test_the_kernel_compiles_for_many_maps_in_float32():
    (run,) = say("--target=h100", "--batch_sizes=8", "--programs=training", "--fused", "--dtype=float32")["runs"]
    assert run["kernels"] == 4


@pytest.mark.slow
@LINUX
def test_what_does_not_fit_is_a_result():
    values = say("--target=v5e", "--batch_sizes=16,65536", "--width=0.125", "--programs=evaluation")
    small, large = values["runs"]
    assert small["fits"] and small["memory_gigabytes"] < 1
    assert not large["fits"] and large["memory_gigabytes"] > 16
