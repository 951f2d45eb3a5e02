"""How JAX's devices start, and into how many a CPU is divided."""

import contextlib
import os
import sys

import jax

from common import host
from common.errors import UserError, shortened

# Into how many devices `start_devices` divides a CPU. Two were measured, on two cores (benchmarks/README.md).
DIVISION = 2
# XLA ends a process in which one of a CPU's devices waits so many seconds for another. By default it is a minute, and
# on a busy machine a replica with a large batch may be later than that.
_PATIENCE, _A_DAY = "--xla_cpu_collective_call_terminate_timeout_seconds", 86400
_divided = False


def start_devices() -> None:
    """Starts the devices of JAX, before anything else asks for them.

    A CPU of several cores becomes two devices, because XLA leaves most of the work of one device to one core. It is
    left as it is if JAX was told how many devices it has, if JAX's compilation cache is on, if several processes make
    the run, and if its devices have started before.

    If a CPU has several devices that were asked for, JAX's compilation cache is turned off. A program from the cache
    has lost the order between collectives in a loop and those outside it (jax 0.10.2 and 0.11.2), so that devices meet
    in different ones and write into each other's memory: crashes, and once a wrong result.

    Raises:
      UserError: the platform that JAX_PLATFORMS names is not there, or a GPU does not start.
    """
    _divide_cpu()
    if _PATIENCE not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} {_PATIENCE}={_A_DAY}".strip()
    try:
        devices = jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        # For a platform whose plugin is not installed, JAX fails an assertion that has no message.
        reason = " ".join(str(error).split()) or "JAX has no plugin for it"
        named, reason = jax.config.jax_platforms, shortened(reason)
        raise UserError(
            f"JAX_PLATFORMS={named}: JAX cannot use it here ({reason}); without this variable it takes what is there."
            if named
            else f"JAX cannot start its devices here ({reason}); JAX_PLATFORMS=cpu computes without them."
        ) from error
    if _cached() and jax.device_count() > 1 and devices[0].platform == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        print(
            "warning: JAX's compilation cache stays off: with several devices on the CPU it corrupts memory.",
            file=sys.stderr,
        )


def divided() -> bool:
    """Whether JAX's devices are a CPU that `start_devices` has divided."""
    return _divided and jax.default_backend() == "cpu"


def _cached() -> bool:
    return bool(jax.config.jax_compilation_cache_dir and jax.config.jax_enable_compilation_cache)


def _divide_cpu() -> None:
    global _divided
    told = jax.config.jax_num_cpu_devices != -1 or "device_count" in os.environ.get("XLA_FLAGS", "")
    if told or _cached() or jax.distributed.is_initialized() or host.cores() < DIVISION:
        return
    with contextlib.suppress(RuntimeError):  # the devices have started
        jax.config.update("jax_num_cpu_devices", DIVISION)
        _divided = True
