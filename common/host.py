"""This machine: its CPU cores and their caches, its GPUs, and how its C library keeps memory."""

import ctypes
import functools
import importlib.util
import os
import pathlib
import re

# Where Linux has a file for each NVIDIA GPU, such as nvidia0.
_DEVICES = pathlib.Path("/dev")
# Where Linux describes the second cache of the first core.
_CACHE = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index2/size")

# Where Linux says what each core can do.
_PROCESSORS = pathlib.Path("/proc/cpuinfo")


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """The NVIDIA GPUs that JAX would take in this environment, as CUDA_VISIBLE_DEVICES names them; JAX is not asked."""
    platforms = {name for name in os.environ.get("JAX_PLATFORMS", "").split(",") if name}
    plugins = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if not plugins or (platforms and not platforms & {"cuda", "gpu"}):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        files = (re.fullmatch(r"nvidia(\d+)", path.name) for path in _DEVICES.glob("nvidia*"))
        return [str(number) for number in sorted(int(found[1]) for found in files if found)]
    names = [name.strip() for name in named.split(",")]
    whole = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
    return names[:whole]  # CUDA sees none from the first that does not exist


def second_cache() -> int:
    """The bytes of a core's second cache; 1 MB where the system does not say."""
    try:
        size = _CACHE.read_text().strip()  # such as 2048K
        return int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]]
    except (OSError, ValueError, LookupError):
        return 1 << 20


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the cores of this machine have a unit that multiplies matrices of bfloat16, Intel's AMX."""
    try:
        return re.search(r"^flags\b.*\bamx_bf16\b", _PROCESSORS.read_text(), re.M) is not None
    except OSError:
        return False


def keep_freed_memory() -> None:
    """Makes glibc keep freed buffers of up to 32 MB, some hundred MB at most, instead of returning them to the system.

    Threads return whole heaps and request them again for the next chunk or batch. For the full network on a CPU that is
    a million page faults a step, a fifth of its time. Does nothing if the environment sets MALLOC_… itself or if the
    C library is not glibc.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # From malloc.h: the largest M_MMAP_THRESHOLD, then M_TRIM_THRESHOLD, then M_TOP_PAD of a whole heap.
    for parameter, value in ((-3, 32 << 20), (-1, 1 << 30), (-2, 64 << 20)):
        mallopt(parameter, value)
