"""What the benchmarks share: the recipe, interleaved timing, the machine's own rate, and the JSON line.

Nothing here needs TensorFlow or clu.
"""

import json
import pathlib
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import models
import optimizer
from common import cli, host
from common.errors import UserError, check_ranges, require

ROOT = pathlib.Path(__file__).resolve().parent.parent


IMAGENET_IMAGES = 1_281_167  # of the training split


# The recipe that has a network of `models.MODELS` as its source has it.
RECIPES = {
    "alexnet": "configs/alexnet.py",
    "cifar": "configs/cifar10.py",
    "cifar_local": "configs/cifar10.py:11pct",
    "torchvision": "configs/torchvision.py",
}


def recipe(
    model: str = "alexnet", batch_size: int = 128, width: float = 1.0, dtype: str = "float32", fused: bool = False
) -> ml_collections.ConfigDict:
    """The config of a network's recipe with these values; raises `UserError` if one is out of range."""
    check_ranges({"batch_size": batch_size, "width": width}, {"batch_size": (1, 1 << 20), "width": (1e-3, 64)}, "--")
    config = cli.load_config(str(ROOT / RECIPES[model]))
    if width != 1 and "width" not in config.model:
        raise UserError(f"--width={width}, but the network {model} has one width.")
    if "width" in config.model:
        config.model.width = width
    config.batch_size, config.model.dtype = batch_size, dtype
    if fused:
        able = [name for name, network in models.MODELS.items() if hasattr(network, "normalize_pool")]
        require(
            model in able, f"The network {model} has no steps that the fused kernel takes; {' and '.join(able)} have."
        )
        config.parallel.fused = True
    return config


def rates(config) -> optimizer.Rates:
    """The learning rates of a config, with epochs as long as those of ImageNet."""
    return optimizer.Rates(config, IMAGENET_IMAGES / config.batch_size)


def interleaved(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Times the candidates in turn, `rounds` times, so that what else the machine does meets them alike.

    Args:
      candidates: functions that do some work and return the seconds it took for one unit of it.

    Returns:
      The seconds of each, by round.
    """
    seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            seconds[name].append(candidate())
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> dict[str, float]:
    """How many times faster `fast` was than `slow`: the median over rounds, the least and the most."""
    return spread([a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)])


def spread(values: list[float]) -> dict[str, float]:
    """Their median, the least and the most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def clock(function: Callable[[], Any], at_least: float = 0.0) -> float:
    """Seconds of one call, repeated until `at_least` seconds have passed."""
    begun, calls = time.perf_counter(), 0
    while True:
        function()
        calls += 1
        passed = time.perf_counter() - begun
        if passed >= at_least:
            return passed / calls


def processor_seconds() -> float:
    """Of this process and of those that it has waited for, to microseconds; `os.times` knows hundredths alone."""
    found = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def matrix_product(dtype: str, size: int = 0) -> Callable[[], float]:
    """A candidate for `interleaved`: seconds of a floating-point operation (a multiply-add is two) in a square product.

    Products of bfloat16 have float32 sums as their result: XLA uses the matrix units of CPUs for no others. `size` is
    the side; 0 takes 2048 on CPUs and 8192 elsewhere, beyond which the rate no longer rises.
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    a = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    return lambda: clock(lambda: product(a).block_until_ready(), 0.3) / (2 * size**3)


def copy(size: int = 1 << 28) -> Callable[[], float]:
    """A candidate for `interleaved`: seconds of a byte read or written in a pass over an array of `size` bytes."""
    array = jnp.zeros(size // 4, jnp.float32)
    # Overwritten in place: the pages of a new array would cost more than the bytes.
    negate = jax.jit(jnp.negative, donate_argnums=0)

    def seconds():
        nonlocal array

        def turn():
            nonlocal array
            array = negate(array).block_until_ready()

        return clock(turn, 0.1) / (2 * array.nbytes)

    seconds()
    return seconds


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    device = jax.devices()[0]
    name = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return {
        "device": name if device.platform == "cpu" else device.device_kind,
        "cores": host.cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def report(name: str, values: dict[str, Any], origin: dict[str, Any] | None = None) -> None:
    """Prints the JSON line that ends a benchmark, its numbers to four digits; `origin` is by default this machine."""

    def rounded(value):
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [rounded(item) for item in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    print(json.dumps({"benchmark": name} | rounded(values) | (origin or machine())), flush=True)
