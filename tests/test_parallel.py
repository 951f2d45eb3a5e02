"""The project's central promise: how the devices lie changes nothing but the speed."""

import functools
import os
import platform
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import checkpoint
import models
import optimizer
import parallel
import recipes
import update
from common import backend, host
from common.errors import UserError
from models import chunks, fused
from run import setup
from runs import ROOT

LAYOUTS = {"one device": (1, 1), "towers": (2, 2), "data parallel": (2, 1), "grid": (4, 2)}


def make_layout(name, **options):
    devices, per_network = LAYOUTS[name]
    return parallel.Layout(per_network, devices=jax.devices()[:devices], **options)


def build(config, name, mean_image, **options):
    layout = make_layout(name, **options)
    return layout, update.build_step(config, layout, mean_image, optimizer.Rates(config, 5.0))


@functools.cache  # a step compiles for seconds
def narrow_step(name):
    return build(recipes.narrow(), name, recipes.mean_image())


def run(config, layout, step, steps, merged=None):
    """Trains from the seed or from a merged state; returns the losses, the merged state, and the sharded one."""
    state = layout.shard(merged or jax.device_get(update.init_state(config)))
    losses = []
    for i in range(int(merged.step) if merged else 0, steps):
        state, values, _ = step(state, layout.put(recipes.batch(config, i)), np.float32(1), np.bool_(i % 2))
        losses.append(float(parallel.first(values)["loss"]))
    return losses, layout.merge(state, setup.state_shapes(config)), state


def run_narrow(name, steps, merged=None):
    return run(recipes.narrow(), *narrow_step(name), steps, merged)


@pytest.fixture(scope="module")
def alone():
    return run_narrow("one device", 10)


@pytest.mark.parametrize("cores,devices,parts", [(1, 1, 1), (2, 1, 2), (2, 2, 1), (8, 2, 2)])
def test_parts_of_the_batch_keep_spare_cores_busy(monkeypatch, cores, devices, parts):
    monkeypatch.setattr(host, "cores", lambda: cores)
    monkeypatch.setattr(chunks, "MAPS_BYTES", 1 << 30)  # a chunk of the first layer could be half of the batch too
    layout = parallel.Layout(devices=jax.devices()[:devices])
    assert layout.towers(2).cores == layout.towers(1).cores == cores // devices
    network = models.build(recipes.narrow().model, layout.towers(2), 67)
    for count, divided in ((4, parts), (3, 1)):  # an odd number goes as one
        text = str(jax.make_jaxpr(network.init_with_output)(jax.random.key(0), np.ones((count, 67, 67, 3), np.float32)))
        assert text.count(f"f32[{count // divided},67,67,3]") > 0
        assert text.count(f"f32[{count // 2},67,67,3]") == 0 or divided == 2


def test_parts_of_the_batch_train_alike(alone, monkeypatch):
    spare = make_layout("one device").towers(2).cores >= 2
    monkeypatch.setattr(host, "cores", lambda: 1 if spare else 2)
    assert (make_layout("one device").towers(2).cores >= 2) != spare
    losses, state, _ = run(recipes.narrow(), *build(recipes.narrow(), "one device", recipes.mean_image()), 10)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    for mine, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone[1].params), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_three_steps_in_one_kernel_train_alike(alone, monkeypatch):
    monkeypatch.setattr(fused, "INTERPRET", True)
    monkeypatch.setattr(parallel, "fuses", lambda device: True)
    config, called = recipes.narrow(), []
    kernel = fused.normalize_pool_gradient
    monkeypatch.setattr(fused, "normalize_pool_gradient", lambda *a, **o: called.append(a) or kernel(*a, **o))
    monkeypatch.setattr(parallel.Layout, "_cores", lambda layout: 0)
    layout, step = build(config, "towers", recipes.mean_image(), fused=True)
    losses, _, _ = run(config, layout, step, 3)
    assert len(called) >= 2, "conv1 and conv2"
    np.testing.assert_allclose(losses, alone[0][:3], rtol=1e-5)


def test_a_cpu_takes_no_kernel():
    layout = make_layout("towers", fused=True)
    assert layout.towers(2).fused and layout.towers(2).cores, "as always"
    assert "fused" not in str(layout)


@pytest.mark.parametrize(
    ("platform", "capability", "takes"),
    [("cpu", None, False), ("tpu", None, False), ("gpu", "8.0", True), ("gpu", "10.3", True), ("gpu", "7.5", None),
     ("gpu", "gfx90a", None), ("gpu", None, None)],
)  # fmt: skip
def test_only_gpus_that_triton_compiles_for_take_kernels(platform, capability, takes):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability, device_kind="Thing")
    if takes is not None:
        assert parallel.fuses(device) == takes
        return
    with pytest.raises(UserError, match=r"parallel\.fused=True needs NVIDIA .*this is a Thing"):
        parallel.fuses(device)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_in_place_the_update_is_the_same(name):
    config = recipes.narrow()
    config.optimizer.name = name
    rule, rates = optimizer.build(config), optimizer.Rates(config, 5.0)
    random = np.random.default_rng(0)
    params = {"conv1": {"kernel": jnp.asarray(random.normal(size=(3, 4))), "bias": jnp.asarray(random.normal(size=4))}}

    def update(gradients, state, params):
        updates, state = rule.update(gradients, state, params, rates=rates.tree(params, jnp.int32(3)))
        return optax.apply_updates(params, updates), state

    in_place = make_layout("one device").in_place(update)
    mine, theirs = (params, rule.init(params)), (params, rule.init(params))
    for _ in range(2):
        gradients = jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape)), params)
        with jax.numpy_dtype_promotion("standard"):  # for Optax
            mine, theirs = in_place(gradients, mine[1], mine[0]), update(gradients, theirs[1], theirs[0])
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one device"])
def test_layouts_agree(alone, name):
    """Ten steps with dropout and lighting; 7 classes, which two towers cannot share evenly."""
    losses, state, sharded = run_narrow(name, 10)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-3), "nothing was learned, so nothing is shown"
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    for (path, mine), theirs in zip(
        jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(alone[1].params), strict=True
    ):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))
    networks = LAYOUTS[name][0] // LAYOUTS[name][1]
    for leaf in jax.tree.leaves(sharded):
        parts = parallel.addressable(leaf)
        for network in range(1, networks):
            for tower in range(LAYOUTS[name][1]):
                replica = parts[network * LAYOUTS[name][1] + tower]
                np.testing.assert_array_equal(replica, parts[tower], err_msg="replicas drifted apart")


def test_towers_normalise_across():
    """Caffe's networks: the maps of both towers normalise one another, in its order of layers."""
    config, apart = (
        recipes.narrow(lrn_across_towers=across, lrn_k=1.0, lrn_alpha=1.0, order="caffenet", init="he")
        for across in (True, False)
    )
    config.input.scale = apart.input.scale = 1 / 64
    one, two = (run(config, *build(config, name, recipes.mean_image()), 3)[0] for name in ("one device", "towers"))
    np.testing.assert_allclose(two, one, rtol=1e-5)
    within = run(apart, *build(apart, "one device", recipes.mean_image()), 3)[0]
    assert within[-1] != pytest.approx(one[-1], rel=1e-4), "the neighbours across the towers change nothing"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("towers", "one device"),
        ("towers", "grid"),
        ("one device", "towers"),
        ("grid", "one device"),
        ("grid", "towers"),
    ],
)
def test_a_checkpoint_continues_on_other_devices(alone, tmp_path, before, after):
    """Five steps here and five there, with a checkpoint in between: the losses of ten on one device."""
    first, state, _ = run_narrow(before, 5)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {})
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore_latest(setup.state_shapes(recipes.narrow()))
    second, _, _ = run_narrow(after, 10, restored)
    np.testing.assert_allclose(first + second, alone[0], rtol=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_drift_is_noticed_and_named(name):
    """A bit that differs between replicas; towers differ by right."""
    layout = make_layout(name)
    tree = layout.shard({"kernel": np.arange(8, dtype=np.float32), "count": np.int32(3)})
    assert layout.drifted(tree) == []
    for leaf in tree:
        parts = [shard.data for shard in tree[leaf].addressable_shards]
        other = np.array(parts[-1])
        other.view(np.uint32).flat[-1] ^= 1
        parts[-1] = jax.device_put(other, parts[-1].device)
        array = jax.make_array_from_single_device_arrays(tree[leaf].shape, tree[leaf].sharding, parts)
        expected = [f"['{leaf}']"] if layout.networks > 1 else []
        assert layout.drifted(tree | {leaf: array}) == expected


@pytest.mark.slow
def test_full_width_layouts_agree():
    """The paper's own network, 224×224 and 1000 classes: three steps on one device and on two."""
    config = recipes.narrow(width=1.0, num_classes=1000)
    config.batch_size = 8
    config.input.update(resize=256, crop=224)
    config.optimizer.learning_rate = (
        0.001  # at 0.02 the loss overshoots to 10, where rounding errors grow a hundredfold
    )
    seen = [run(config, *build(config, name, recipes.mean_image(256)), 3)[0] for name in ("one device", "towers")]
    assert seen[0][-1] != pytest.approx(seen[0][0], rel=1e-3)
    np.testing.assert_allclose(seen[1], seen[0], rtol=1e-5)


def test_each_device_holds_one_tower(alone):
    config = recipes.narrow()
    state = make_layout("towers").shard(alone[1])
    first, second = parallel.addressable(state.params["conv2"]["kernel"])
    merged = alone[1].params["conv2"]["kernel"]
    np.testing.assert_array_equal(first, merged[..., : merged.shape[-1] // 2])
    np.testing.assert_array_equal(second, merged[..., merged.shape[-1] // 2 :])
    assert {leaf.dtype for leaf in jax.tree.leaves(alone[1].params)} == {np.dtype("float32")}
    assert parallel.addressable(state.params["fc8"]["bias"])[0].shape == (-(-config.model.num_classes // 2),)


@pytest.mark.parametrize("name", LAYOUTS)
def test_merge_undoes_shard(name):
    layout = make_layout(name)
    random = np.random.default_rng(0)
    tree = {"odd": random.normal(size=(3, 5)).astype(np.float32), "even": np.arange(4), "scalar": np.float32(2)}
    merged = layout.merge(layout.shard(tree), tree)
    jax.tree.map(np.testing.assert_array_equal, merged, tree)
    assert not np.shares_memory(merged["even"], tree["even"])


def test_rows_cross_once_and_keep_their_numbers():
    """Every device gets its own rows, and each network ends up with all of its rows in order."""
    layout = make_layout("grid")
    numbers = np.arange(12)
    put = layout.put({"row": numbers})
    np.testing.assert_array_equal(np.concatenate(parallel.addressable(put["row"])), numbers)

    def gathered(batch):
        rows = layout.gather_rows(batch)["row"]
        return rows, layout.row_numbers(len(rows))

    for values, places in zip(*map(parallel.addressable, layout.map(gathered)(put)), strict=True):
        np.testing.assert_array_equal(values, places)


def test_exchange_has_the_gradient_of_a_concatenation():
    layout = make_layout("towers")
    x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    towers = layout.towers(2)

    def loss(x):
        joined = towers.join(x)
        return jnp.sum(jnp.sin(joined) * jnp.cos(joined[:, ::-1])) / layout.devices_per_network

    def whole(x):
        return jnp.sum(jnp.sin(x) * jnp.cos(x[:, ::-1]))

    gradient = layout.merge(layout.map(jax.grad(loss))(layout.shard(x)), x)
    np.testing.assert_allclose(gradient, jax.grad(whole)(x), rtol=1e-5)


def test_prefetch_keeps_order_and_all_batches():
    layout = make_layout("data parallel")
    batches = [{"x": np.full(2, i)} for i in range(5)]
    seen = [int(parallel.first(batch)["x"][0]) for batch in layout.prefetch(iter(batches))]
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(devices_per_network=3), "1 device or on 2"),
        (dict(devices_per_network=2, towers=1), "devices_per_network=1"),
        (dict(devices_per_network=2, devices=3), "--cpu_devices=4"),
        (dict(devices_per_network=1, batch_size=10, devices=4), "8 or 12 would"),
        (dict(devices_per_network=1, batch_size=3, devices=4), "; 4 would"),
    ],
)
def test_what_cannot_work_is_refused(arguments, says):
    arguments = arguments | {"devices": jax.devices()[: arguments.get("devices", 2)]}
    with pytest.raises(UserError, match=says):
        parallel.Layout(**arguments)


def test_zero_chooses():
    assert parallel.Layout(0, devices=jax.devices()[:2]).devices_per_network == 2
    assert parallel.Layout(0, devices=jax.devices()[:3]).devices_per_network == 1
    assert parallel.Layout(0, towers=1, devices=jax.devices()[:2]).devices_per_network == 1


# Prints how many devices a process starts, and how many networks a layout puts on how many of them, by batch.
DIVISION = """
import sys
from common import backend, host
host.cores = lambda: int(sys.argv[1])
import jax
exec(sys.argv[2])
backend.start_devices()
backend.start_devices()
import os, parallel
print(len(jax.devices()), *[flag for flag in os.environ["XLA_FLAGS"].split() if "terminate" in flag])
for per_network, batch in [(0, 0), (0, 32), (1, 36), (2, 12), (0, 34), (0, 28)]:
    layout = parallel.Layout(per_network, batch_size=batch, towers=2)
    print(layout.networks, layout.size)
"""


PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds"


def divided(cores, code="", **environment):
    """The lines and the errors that DIVISION prints on a CPU with so many cores."""
    speak = ("JAX_COMPILATION", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(speak)}
    command = [sys.executable, "-c", DIVISION, str(cores), code]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True)
    return done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("cores", [2, 16])
def test_a_cpu_of_several_cores_holds_two_replicas(cores):
    lines, errors = divided(cores)
    assert lines[1:] == ["2 2", "2 2", "2 2", "1 2", "1 1", "1 1"], "an odd share, or a small one: one device for all"
    assert lines[0] == f"2 {PATIENCE}=86400" and not errors
    assert divided(cores, XLA_FLAGS=f"{PATIENCE}=50")[0][0] == f"2 {PATIENCE}=50", "what the user says stays"


@pytest.mark.parametrize(
    ("cores", "code", "environment", "devices"),
    [
        (1, "", {}, "1"),
        (4, "", {"JAX_NUM_CPU_DEVICES": "1"}, "1"),
        (4, "", {"JAX_NUM_CPU_DEVICES": "4"}, "4"),
        (4, "", {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}, "1"),
        (4, "", {"JAX_COMPILATION_CACHE_DIR": "cache"}, "1"),
        (4, "jax.devices()", {}, "1"),
    ],
)
def test_a_cpu_is_not_divided_where_that_was_decided(cores, code, environment, devices):
    lines, errors = divided(cores, code, **environment)
    pairs = {"1": "1 1", "4": "2 4"}  # of four, which were asked for, two hold a network, as GPUs would
    assert lines[:2] == [f"{devices} {PATIENCE}=86400", pairs[devices]] and "warning" not in errors


# Prints how many pages a thread touched anew for four buffers of 20 MB at once, twenty times.
BUFFERS = """
import resource, sys, threading
from common import host
if sys.argv[1] == "kept":
    host.keep_freed_memory()
def fill():
    for _ in range(20):
        [b"1" * (20 << 20) for _ in range(4)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=fill)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's memory is kept")
def test_freed_memory_is_kept_but_where_the_environment_says_how():
    def pages(how, **more):
        known = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | more
        done = subprocess.run([sys.executable, "-c", BUFFERS, how], cwd=ROOT, env=known, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return int(done.stdout)

    all_of_them = 20 * 4 * (20 << 20) // 4096
    assert pages("kept") < all_of_them / 10
    assert pages("given back") > all_of_them / 4
    assert pages("kept", MALLOC_TRIM_THRESHOLD_="131072") > all_of_them / 4


@pytest.fixture
def compilation_cache(tmp_path):
    """A folder for JAX's cache of compiled programs, as JAX_COMPILATION_CACHE_DIR sets it."""
    options = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {option: getattr(jax.config, option) for option in options}
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", True)
    yield tmp_path
    for option, value in before.items():
        jax.config.update(option, value)


def test_several_cpu_devices_do_without_the_compilation_cache(compilation_cache, capsys):
    backend.start_devices()
    assert not jax.config.jax_enable_compilation_cache
    assert "compilation cache stays off" in capsys.readouterr().err
