"""Devices: the only file that knows `pmap`, device grids and named axes.

The devices form a grid of *networks* × *towers* over one flat axis. With `devices_per_network=2`, devices 2r and 2r+1
hold network r, one tower each, as the two GPUs of 2012 did (paper, section 3.2 and figure 2). With 1, every device
holds a whole network. Networks are replicas of one another: each sees its own rows of the batch.

A *merged* tree is the ordinary one, with whole arrays in the host's memory. It is what is initialised, and what a
checkpoint stores. A *sharded* tree has the same leaves with a leading axis over this process's devices, cut along the
last axis into one part per tower. Scalars are copied to every device.
"""

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common import backend, host
from common.errors import require

AXIS = "devices"
# How many programs the host lets wait on the devices while it dispatches the next one.
UNDER_WAY = 1
# With fewer rows of a batch, a replica on a divided CPU may cost more time than it saves: each updates all parameters
# (benchmarks/README.md, "Against batch and width").
ROWS = 16
Tree = Any


@dataclasses.dataclass(frozen=True)
class Towers:
    """Which towers of a network this device computes, and how it reaches the others.

    The maps of several towers here lie side by side on the last axis.

    Attributes:
      total, here: the towers of the network, and how many of them this device computes.
      groups: the devices that share a network, if its towers are on several.
      cores: the CPU cores of this device; 0 for an accelerator. Forms of the layers depend on it, results only
        in their last bits and in what bfloat16 rounds.
      fused: whether this device computes some steps between layers in one.
    """

    total: int = 1
    here: int = 1
    groups: tuple[tuple[int, ...], ...] = ()
    cores: int = 0
    fused: bool = False

    def maps_dtype(self, dtype: str) -> str:
        """The type of the maps of a computation in `dtype`.

        XLA computes bfloat16 on CPUs by way of float32, one operation at a time. So maps and most layers are float32
        there: bfloat16 is what convolutions multiply, and the gradients of their kernels.
        """
        return "float32" if self.cores else dtype

    @property
    def split_over_devices(self) -> bool:
        """Whether each device computes a single tower of several."""
        return self.here < self.total

    def ids(self) -> list[int | jax.Array]:
        """The numbers of the towers that are here, in order."""
        if self.split_over_devices:
            return [jax.lax.axis_index(AXIS) % self.total]
        return list(range(self.total))

    def share(self, features: int) -> int:
        """How many of a layer's `features` output maps are computed here, padding included.

        If the towers are on two devices, an odd number of classes is padded to an even one; `Layout.shard` and
        `Layout.merge` add and drop the padding.
        """
        return -(-features // self.total) if self.split_over_devices else features

    @jax.named_scope("exchange")
    def join(self, maps: jax.Array) -> jax.Array:
        """The exchange: from the maps of the towers here to those of *all* towers of the network."""
        if not self.split_over_devices:
            return maps
        # Gathered along the last axis, XLA would lay out the operand and the result with that axis outermost.
        parts = jax.lax.all_gather(maps, AXIS, axis_index_groups=self.groups)
        return jnp.moveaxis(parts, 0, -2).reshape(*maps.shape[:-1], -1)

    def own(self, maps: jax.Array) -> jax.Array:
        """From the maps of all towers, as `join` gives them, to those of the towers here."""
        if not self.split_over_devices:
            return maps
        apart = maps.reshape(*maps.shape[:-1], self.total, -1)
        return jax.lax.dynamic_index_in_dim(apart, self.ids()[0], axis=-2, keepdims=False)


class Layout:
    """A grid of networks × towers over the devices of all processes.

    Args:
      devices_per_network: 1 (both towers on each device), 2 (one tower on each of two devices), or 0 to choose: 2 if
        the network has two towers and each process has an even number of devices, else 1. On a CPU that `backend` has
        divided, 0 takes 1, and where each device would not get an even number of rows, or fewer than ROWS, 0 and 1 use
        one device alone.
      towers: how many towers the network has.
      batch_size: rows of a global batch, which must divide over the devices; 0 is not checked.
      fused: whether GPUs compute steps between layers in one kernel where they can (`models.fused`). GPUs that cannot
        refuse it. CPUs compute such steps together in any case, and TPUs never.
      devices: the devices of this process to use, all by default.

    Raises:
      UserError: the numbers do not fit together; the sentence names some that do.
    """

    def __init__(
        self,
        devices_per_network: int = 1,
        *,
        towers: int = 2,
        batch_size: int = 0,
        fused: bool = False,
        devices: Sequence[jax.Device] | None = None,
    ):
        divided = devices is None and backend.divided()
        self.local_devices = list(devices or jax.local_devices())
        if divided and devices_per_network in (0, 1):
            devices_per_network = 1
            local = len(self.local_devices)
            # Mixup pairs the rows of a replica.
            if batch_size % (2 * local) or 0 < batch_size < ROWS * local:
                del self.local_devices[1:]
        local = len(self.local_devices)
        if devices_per_network == 0:
            devices_per_network = 2 if towers == 2 and local % 2 == 0 else 1
        field, cure = "parallel.devices_per_network", "use --config.parallel.devices_per_network=1"
        require(devices_per_network in (1, 2), f"{field}={devices_per_network}: a network lies on 1 device or on 2.")
        fits = devices_per_network == 1 or towers == 2
        require(fits, f"{field}=2 needs two towers, and this network has model.towers={towers}; {cure}.")
        require(
            local % devices_per_network == 0,
            f"{field}=2 needs an even number of devices in each process, not {local}: {cure}, or simulate more by "
            f"--cpu_devices={local + 1}.",
        )
        self.size, together = local * jax.process_count(), jax.device_count()
        sentence = f"Each of {jax.process_count()} processes must have as many devices: this has {local} of {together}."
        require(devices is not None or divided or self.size == together, sentence)
        below, above = batch_size // self.size * self.size, -(-batch_size // self.size) * self.size
        near = f"{below} or {above}" if below else f"{above}"
        fits = batch_size % self.size == 0
        require(fits, f"batch_size={batch_size} does not divide over {self.size} devices; {near} would.")
        self._fused = fused and fuses(self.local_devices[0])
        self.devices_per_network = devices_per_network
        self.networks = self.size // devices_per_network
        grid = np.arange(self.size).reshape(self.networks, devices_per_network)
        self._tower_groups = tuple(map(tuple, grid.tolist()))
        self._network_groups = tuple(map(tuple, grid.T.tolist()))
        mesh = Mesh(np.array(self.local_devices), (AXIS,))
        self._sharding = NamedSharding(mesh, PartitionSpec(AXIS))

    def __str__(self) -> str:
        kind = self.local_devices[0].device_kind
        if self.devices_per_network == 2:
            each = "one tower on each of two devices"
        else:
            each = "the whole network on each device"
        networks = f", {self.networks} replicas" if self.networks > 1 else ""
        return f"{self.size} × {kind}: {each}{networks}{', fused steps' if self._fused else ''}"

    def towers(self, total: int) -> Towers:
        """The towers of a network as one device of this layout sees them."""
        cores = self._cores()
        if self.devices_per_network == 1:
            return Towers(total, total, cores=cores, fused=self._fused or cores > 0)
        return Towers(total, 1, self._tower_groups, cores, self._fused or cores > 0)

    def _cores(self) -> int:
        on_cpu = self.local_devices[0].platform == "cpu"
        return max(1, host.cores() // len(self.local_devices)) if on_cpu else 0

    # Between host and devices.

    def shard(self, tree: Tree) -> Tree:
        """Puts a merged tree on the devices, cut by tower along the last axis, copied for each network."""

        def put(leaf):
            parts = self._parts(np.asarray(leaf))
            # Never alias host memory: these buffers are donated to the train step.
            shards = [
                jax.device_put(parts[i % len(parts)][None], device, may_alias=False)
                for i, device in enumerate(self.local_devices)
            ]
            shape = (len(shards), *parts[0].shape)
            return jax.make_array_from_single_device_arrays(shape, self._sharding, shards)

        return jax.tree.map(put, tree)

    def merge(self, tree: Tree, like: Tree) -> Tree:
        """Fetches a sharded tree into merged NumPy arrays with the shapes of `like` (padding dropped)."""

        def fetch(leaf, target):
            shards = addressable(leaf)[: self.devices_per_network if target.shape else 1]
            # A copy, because the step after this one reuses the devices' buffers.
            whole = np.concatenate(shards, axis=-1) if len(shards) > 1 else np.array(shards[0])
            return whole[..., : target.shape[-1]] if target.shape else whole

        return jax.tree.map(fetch, tree, like)

    def of_network(self, tree: Tree) -> Tree:
        """What each device of this process's first network holds of a sharded tree of scalars, as lists of floats."""
        return jax.tree.map(lambda leaf: [float(part) for part in addressable(leaf)[: self.devices_per_network]], tree)

    def put(self, batch: Tree) -> Tree:
        """Sends this process's rows of a batch to its devices, the same number to each; every row crosses once."""

        def send(rows):
            return jax.device_put(rows.reshape(len(self.local_devices), -1, *rows.shape[1:]), self._sharding)

        return jax.tree.map(send, batch)

    def prefetch(self, batches: Iterable[Tree], size: int = 2) -> Iterator[Tree]:
        """Yields batches on the devices, `size` ahead, so that transfers overlap with computation."""
        queue = collections.deque()
        for batch in batches:
            queue.append(self.put(batch))
            if len(queue) > size:
                yield queue.popleft()
        yield from queue

    def _parts(self, leaf: np.ndarray) -> list[np.ndarray]:
        if not leaf.shape or self.devices_per_network == 1:
            return [leaf]
        padding = -leaf.shape[-1] % self.devices_per_network
        if padding:
            leaf = np.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, padding)])
        return np.split(leaf, self.devices_per_network, axis=-1)

    # Computation on all devices.

    def map(self, function: Callable, *, donate: tuple[int, ...] = (), broadcast: tuple[int, ...] = ()):
        """`pmap`s a function over all devices.

        Args:
          function: what runs on each device, on positional arguments.
          donate: positions of the arguments whose buffers the result may reuse.
          broadcast: positions of the arguments that are not sharded and reach every device whole.
        """

        @functools.wraps(function)
        def on_device(*args):
            return function(*args)

        count = len(inspect.signature(function).parameters)
        in_axes = tuple(None if i in broadcast else 0 for i in range(count))
        # pmap takes its devices in the order of all processes, and a list of them in a single process only.
        devices = self.local_devices if jax.process_count() == 1 else None
        return jax.pmap(on_device, axis_name=AXIS, in_axes=in_axes, donate_argnums=donate, devices=devices)

    def in_place(self, function: Callable) -> Callable:
        """Lets each leaf of a function's result take the place of a donated one; for functions of trees, inside `map`.

        `pmap` removes each leaf's leading axis of length 1 and adds it again. The function keeps that axis, so no
        reshape stands between a donated buffer and its result. With one, XLA computes the velocity twice and copies
        both buffers.
        """

        @functools.wraps(function)
        def along(*trees):
            trees = jax.tree.map(lambda leaf: leaf[None], trees)
            return jax.tree.map(lambda leaf: leaf[0], jax.vmap(function)(*trees))

        return along

    @jax.named_scope("rows")
    def gather_rows(self, batch: Tree) -> Tree:
        """The rows of this device's network: its own, and those on the device of the other tower."""
        if self.devices_per_network == 1:
            return batch
        gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, tiled=True, axis_index_groups=self._tower_groups)
        return jax.tree.map(gather, batch)

    def row_numbers(self, count: int) -> jax.Array:
        """The numbers, in the global batch, of the `count` rows of this device's network."""
        network = jax.lax.axis_index(AXIS) // self.devices_per_network
        return network * count + jnp.arange(count)

    @jax.named_scope("replicas")
    def mean(self, tree: Tree) -> Tree:
        """The mean over the networks, tower by tower."""
        if self.networks == 1:
            return tree
        return jax.lax.pmean(tree, AXIS, axis_index_groups=self._network_groups)

    @jax.named_scope("replicas")
    def sum(self, tree: Tree) -> Tree:
        """The sum over the networks, tower by tower."""
        if self.networks == 1:
            return tree
        return jax.lax.psum(tree, AXIS, axis_index_groups=self._network_groups)

    def drifted(self, tree: Tree) -> list[str]:
        """The paths of the leaves of a sharded tree whose bits differ between networks."""
        if self.networks == 1:
            return []
        same = first(self._same(tree))
        return [jax.tree_util.keystr(path) for path, same in jax.tree_util.tree_leaves_with_path(same) if not same]

    @functools.cached_property
    def _same(self):
        def same(leaf):
            bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
            groups = self._network_groups
            least, most = (reduce(bits, AXIS, axis_index_groups=groups) for reduce in (jax.lax.pmin, jax.lax.pmax))
            # Reduced over all devices, because callers read only the first.
            return jax.lax.pmin(jnp.all(least == most).astype(jnp.int32), AXIS)

        return self.map(lambda tree: jax.tree.map(same, tree))


def fuses(device: jax.Device) -> bool:
    """Whether this device takes the kernels of `models.fused`: a GPU does.

    Raises:
      UserError: a GPU that Triton does not compile for.
    """
    if device.platform != "gpu":
        return False
    generation = str(getattr(device, "compute_capability", "")).split(".")[0]
    fits = generation.isdigit() and int(generation) >= 8  # those of AMD are called gfx…
    kind = device.device_kind
    require(fits, f"parallel.fused=True needs NVIDIA GPUs of compute capability 8.0 or above, and this is a {kind}.")
    return True


def addressable(leaf: jax.Array) -> list[np.ndarray]:
    """What each of this process's devices holds of a sharded leaf, in the order of the devices.

    It reads the shards, because indexing a stacked array would start a computation.
    """
    shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return [np.asarray(shard.data)[0] for shard in shards]


def first(tree: Tree) -> Tree:
    """The first device's values of a tree that is the same on all devices, as NumPy arrays."""
    return jax.tree.map(lambda leaf: addressable(leaf)[0], tree)
