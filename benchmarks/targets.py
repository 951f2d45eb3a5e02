"""Accelerators that XLA compiles for without having them: what their data sheets say, and stand-ins for JAX."""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Sequence

import jax
from jax._src import xla_bridge
from jax.experimental import topologies

from common.errors import require

# Grids of chips by their number. A single chip and a pair are part of the smallest.
_SQUARES = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A device, from its data sheet.

    Attributes:
      platform: JAX's name of it.
      flops: floating-point operations a second of products of bfloat16, without sparsity.
      bandwidth: bytes a second from or to its memory.
      memory: bytes.
      link: bytes a second that it can send to other devices over all of its links together.
      grids: of a TPU, {devices: the shape in which they are joined}.
      options: of a TPU, further ones of its topology.
      description: of a GPU, what XLA's GpuTargetConfigProto says of it.
    """

    platform: str
    flops: float
    bandwidth: float
    memory: int
    link: float
    grids: dict[int, str] = dataclasses.field(default_factory=dict)
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    description: str = ""

    def product_rate(self, dtype: str) -> float:
        """Floating-point operations a second of products of `dtype`, as JAX computes them by default.

        Of float32 a TPU multiplies the leading bfloat16 part, and a GPU TF32, at half of the rate.
        """
        return self.flops / 2 if self.platform == "cuda" and dtype == "float32" else self.flops


def _gpu(name: str, shared: int, cores: int, units: int, cache: int, clock: float, capability: int, **sheet) -> Target:
    """A GPU; its description has the fields of XLA's own files for it (xla/backends/gpu/target_config/specs)."""
    description = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
          core_count: {cores} fpus_per_core: {units} registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {sheet["bandwidth"]:.0f} device_memory_size: {sheet["memory"]} l2_cache_size: {cache}
          clock_rate_ghz: {clock} cuda_compute_capability {{ major: {capability} }} runtime_version: "12.8.0"
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 7 }} device_description_str: "{name}"
    """
    return Target("cuda", description=description, **sheet)


# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e; the links of v4 are six of 50 GB/s each way (Jouppi et al. 2023,
# "TPU v4"), and of the others half of "bidirectional ICI bandwidth". GPUs: NVIDIA's data sheets of the A100 80 GB SXM
# and the H100 SXM; links are half of NVLink's total.
TARGETS = {
    "v4": Target("tpu", 275e12, 1200e9, 32 << 30, 300e9, _CUBES, {"chip_config_name": "megacore"}),
    "v5e": Target("tpu", 197e12, 819e9, 16 << 30, 200e9, _SQUARES),
    "v5p": Target("tpu", 459e12, 2765e9, 95 << 30, 600e9, _CUBES),
    "v6e": Target("tpu", 918e12, 1600e9, 32 << 30, 400e9, _SQUARES),
    "a100": _gpu(
        *("NVIDIA A100", 167936, 108, 64, 40 << 20, 1.41, 8),
        flops=312e12,
        bandwidth=2.039e12,
        memory=85_100_068_864,
        link=300e9,
    ),
    "h100": _gpu(
        *("NVIDIA H100", 233472, 132, 128, 50 << 20, 1.98, 9),
        flops=989e12,
        bandwidth=3.352e12,
        memory=84_942_979_072,
        link=450e9,
    ),
}
# GPUs that NVLink joins in one machine.
_MOST_GPUS = 8


def check_devices(name: str, count: int) -> None:
    """Raises `UserError` if the target has no topology of so many devices."""
    target = TARGETS[name]
    known = [1, 2, *target.grids] if target.grids else list(range(1, _MOST_GPUS + 1))
    require(count in known, f"--devices={count}: {name} is joined in {', '.join(map(str, known))}.")


def prepare(name: str) -> None:
    """Sets the variables that the compiler of a target reads; before JAX starts a device.

    Raises:
      UserError: the compiler is not installed.
    """
    package = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}[TARGETS[name].platform]
    found = importlib.util.find_spec(package)
    require(found, f"--target={name} needs {package}, which `make compiled ARGS='--target={name}'` installs.")
    # This machine's own accelerators, if it has some, stay out of it.
    jax.config.update("jax_platforms", "cpu")
    if package == "libtpu":
        os.environ["TPU_LIBRARY_PATH"] = str(pathlib.Path(found.origin).with_name("libtpu.so"))
        # Without these it asks a metadata server which TPU this is.
        os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost")
    else:
        # The plugin refuses to load without a driver otherwise; and XLA would time its candidates on the device.
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def devices(name: str, count: int) -> Sequence[jax.Device]:
    """Stand-ins for `count` devices; programs compile for them, and nothing runs."""
    target = TARGETS[name]
    if target.platform == "tpu":
        grid = target.grids[max(count, min(target.grids))]
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{grid}", **target.options)
    else:
        with _without_a_driver():
            topology = topologies.get_topology_desc(
                platform="cuda", target_config=target.description, topology=f"1x1x{count}"
            )
    return topology.devices[:count]


@contextlib.contextmanager
def _without_a_driver():
    """Lets JAX accept the name 'cuda' where no GPU is (jax issues 23971 and 28376)."""
    known = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda platform: platform if platform == "cuda" else known(platform)
    try:
        yield
    finally:
        xla_bridge.canonicalize_platform = known
