"""Four simulated devices for every test, strict types, and nothing written outside temporary folders."""

import os
import pathlib
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

# Processes that tests start import from the same folders. Their code is optimised less, as is that of the tests: it
# compiles in half of the time, and the networks of the tests are small.
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser):
    parser.addoption("--part", metavar="K/N", help="of the selected tests, every Nth one from number K on")


# The files that take longest come first, so that no worker begins one when the others are done.
LONGEST = ("interruptions", "train", "processes", "parallel", "alexnet", "configs", "layers", "benchmarks")


def pytest_collection_modifyitems(config, items):
    names = [f"test_{name}" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))
    if part := config.getoption("part"):
        first, step = map(int, part.split("/"))
        selected = [item for item in items if item.get_closest_marker("slow")]
        kept = selected[first % step :: step]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
