"""What XLA's compilers say of a recipe on TPUs and GPUs that are not here: `make compiled ARGS='--target=v5e'`.

    make compiled ARGS='--target=v5e --batch_sizes=128,1024'            # one chip
    make compiled ARGS='--target=h100 --devices=2'                      # a tower on each of two
    make compiled ARGS='--target=v5e --devices=256 --batch_sizes=16384 --programs=training'

It compiles the training step and the ten-view evaluation, and answers: does it fit, what bounds it, and what do the
devices exchange. All figures but those of the data sheets are estimates of the compiler for one device, and no
measurement. Cycles (TPUs only) are the compiler's own, and some operations have none; they choose between forms of a
program rather than predict a time. Bytes are those of the operands and results that lie in the device's memory. Flops
are those that the layers' products need. A fusion counts where its product does, so that a layer's backward pass may
hold its update.
"""

import argparse
import collections
import importlib.metadata
import re
import time
from typing import Any

import jax
import numpy as np

import evaluate
import models
import parallel
import update
from benchmarks import hlo, measure, targets
from common.errors import UserError, check_name, require, shortened
from common.exits import fail

PROGRAMS = ("training", "evaluation")
# Named scopes of `update`, `views` and `parallel`.
SCOPES = ("rows", "images", "towers", "exchange", "loss", "replicas", "update", "measure")
# Copies between the memories of a TPU, which go on beside the rest.
TRANSFERS = "to and from VMEM"
# What XLA calls a kernel that is written with Pallas, on GPUs.
KERNEL = "__gpu$xla.gpu.triton"
WARNING = "The compiler's estimate for one device; nothing was measured."


def lower(program: str, config, layout: parallel.Layout):
    """Lowers a program of a config for the devices of a layout."""
    mean_image = np.full((config.input.resize,) * 2 + (3,), 118.0, np.float32)
    state = jax.tree.map(lambda leaf: _sharded(leaf, layout), jax.eval_shape(lambda: update.init_state(config)))

    def batch(**fields):
        rows = (layout.size, config.batch_size // layout.size)
        return {name: jax.ShapeDtypeStruct((*rows, *shape), dtype) for name, (dtype, *shape) in fields.items()}

    if program == "training":
        crop = config.input.crop
        rows = batch(image=(np.uint8, crop, crop, 3), label=(np.int32,), shift=(np.float32, 3), gain=(np.float32,))
        step = update.build_step(config, layout, mean_image, measure.rates(config))
        return step.lower(state, rows, np.float32(1), np.bool_(False))
    rows = batch(image=(np.uint8, *mean_image.shape), label=(np.int32,), mask=(np.float32,))
    network = update.build_network(config, layout)
    return evaluate.build(network, layout, mean_image, config.input, "ten").lower(state.params, rows)


def _sharded(leaf, layout):
    """The shape of a leaf of a merged tree once `Layout.shard` has cut it."""
    cut = (*leaf.shape[:-1], -(-leaf.shape[-1] // layout.devices_per_network)) if leaf.shape else ()
    return jax.ShapeDtypeStruct((layout.size, *cut), leaf.dtype)


def needed_flops(program: str, config, devices: int) -> dict[tuple[str, str], float]:
    """Floating-point operations of the products of each layer on one device, by (layer, direction)."""
    found, images = {}, config.batch_size / devices
    for row in models.layer_table(config.model, config.input.crop):
        forward = 2 * row.multiply_adds * images
        if program == "evaluation":
            found[row.name, "forward"] = 10 * forward
        else:
            # The first layer has no gradient by its input.
            found.update({(row.name, "forward"): forward, (row.name, "backward"): (2 if found else 1) * forward})
    return found


def parts(program: hlo.Program, layers: list[str]) -> list[tuple[str, str]]:
    """The (part, direction) of each executed operation.

    A part is a layer, a step between layers (`models.STEPS`), one of SCOPES, TRANSFERS, or 'other'.
    """
    known, found = {*layers, *models.STEPS, *SCOPES}, []
    for operation, _ in program.executed():
        if operation.kind in ("copy-start", "slice-start"):
            found.append((TRANSFERS, ""))
            continue
        places = ((name, path) for path in program.paths(operation) for name in reversed(re.findall(r"\w+", path)))
        part, path = next((place for place in places if place[0] in known), ("other", ""))
        forward = "forward" if part in layers or part in models.STEPS else ""
        found.append((part, "backward" if "transpose(" in path else forward))
    return found


def passed(program: hlo.Program) -> np.ndarray:
    """The share of the work that is done before each operation, and after the last: of the cycles, or else of bytes."""
    costs = [times * operation.cycles for operation, times in program.executed()]
    if not any(costs):
        costs = [times * program.moved(operation) for operation, times in program.executed()]
    return np.cumsum([0, *costs]) / max(1, sum(costs))


def exchanges(program: hlo.Program) -> list[dict[str, Any]]:
    """What `hlo.Program.collectives` gives, and the shares of the work at which each begins and ends."""
    done = passed(program)
    return [
        {
            "kind": each.kind,
            "arrays": each.shapes,
            "megabytes": each.size / 1e6,
            "megabytes_sent": each.sent / 1e6,
            "groups": each.groups,
            "path": each.path,
            "times": each.times,
            "begins": float(done[each.position]),
            "ends": float(done[each.done]),
        }
        for each in program.collectives()
    ]


def examine(kind: str, config, target: targets.Target, layout: parallel.Layout) -> dict[str, Any]:
    """Compiles a program and returns what the compiler says of it."""
    begun = time.perf_counter()
    values = {"program": kind, "batch_size": config.batch_size, "device_memory_gigabytes": target.memory / 1e9}
    try:
        compiled = lower(kind, config, layout).compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"(?:Used |temporaries \()([\d.]+)([MGT])\b", str(error))
        if not found:
            raise UserError(f"The compiler refuses it: {shortened(' '.join(str(error).split()))}") from error
        needed = float(found[1]) * {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}[found[2]]
        return values | {"fits": False, "memory_gigabytes": needed / 1e9}
    memory, program = compiled.memory_analysis(), hlo.Program(compiled.as_text())
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    flops, found = needed_flops(kind, config, layout.size), exchanges(program)
    table, sent = figures(program, flops, config, target), sum(each["megabytes_sent"] for each in found)
    backward = [i for i, (_, way) in enumerate(parts(program, [layer for layer, _ in flops])) if way == "backward"]
    return values | {
        **{name: sum(row[name] for row in table) for name in table[0] if name != "part"},
        "temporary_gigabytes": memory.temp_size_in_bytes / 1e9,
        "memory_gigabytes": needed / 1e9,
        "fits": needed <= target.memory,
        "kernels": sum(operation.kind == KERNEL for operation, _ in program.executed()),
        "megabytes_sent": sent,
        "exchange_ms": 1e9 * sent / target.link,
        "backward_ends": float(passed(program)[max(backward, default=-1) + 1]),
        "collectives": found,
        "parts": table,
        "compile_seconds": time.perf_counter() - begun,
    }


def figures(program: hlo.Program, flops: dict, config, target: targets.Target) -> list[dict[str, Any]]:
    """A row for each of `parts` and of `needed_flops`, with the time that it takes at least by either rate."""
    layers = [layer for layer, _ in flops]
    order = [*SCOPES[:2], *layers, *models.STEPS, *SCOPES[2:], TRANSFERS, "other"]
    cycles, moved = collections.Counter(), collections.Counter()
    for key, (operation, times) in zip(parts(program, layers), program.executed(), strict=True):
        cycles[key] += times * operation.cycles
        moved[key] += times * program.moved(operation)
    table = []
    for key in sorted({*moved, *flops}, key=lambda key: (key[1] == "backward", order.index(key[0]))):
        if cycles[key] or moved[key] or key in flops:
            table.append(
                {
                    "part": " ".join(key).strip(),
                    **({"estimated_mega_cycles": cycles[key] / 1e6} if target.platform == "tpu" else {}),
                    "gigabytes_moved": moved[key] / 1e9,
                    "gigaflops": flops.get(key, 0) / 1e9,
                    "computation_ms": 1e3 * flops.get(key, 0) / target.product_rate(config.model.dtype),
                    "bandwidth_ms": 1e3 * moved[key] / target.bandwidth,
                }
            )
    return table


def show(values: dict[str, Any]) -> None:
    """Prints what `examine` found."""
    print(f"\n{values['program']}, batch {values['batch_size']}")
    if "parts" not in values:
        print(f"It does not fit: it needs {values['memory_gigabytes']:.1f} GB.")
        return
    print(f"{'part':<28}{'Mcycles':>9}{'GB':>9}{'GFLOP':>9}{'ms by flops':>13}{'ms by bytes':>13}")
    for row in (*values["parts"], {"part": "total"} | values):
        cycles = f"{row['estimated_mega_cycles']:.3f}" if "estimated_mega_cycles" in row else "—"
        print(f"{row['part']:<28}{cycles:>9}{row['gigabytes_moved']:9.3f}{row['gigaflops']:9.1f}", end="")
        print(f"{row['computation_ms']:13.3f}{row['bandwidth_ms']:13.3f}")
    needed = f"{values['memory_gigabytes']:.2f} GB, {values['temporary_gigabytes']:.2f} of it temporary"
    fits = "fits" if values["fits"] else "does not fit"
    print(f"memory: {needed}; it {fits} into {values['device_memory_gigabytes']:.1f} GB")
    alike = collections.defaultdict(list)
    for each in values["collectives"]:
        alike[each["kind"], each["arrays"], each["groups"], each["path"]].append(each)
    for (kind, arrays, groups, path), several in alike.items():
        sent, begin, end = sum(each["megabytes_sent"] for each in several), several[0]["begins"], several[-1]["ends"]
        print(
            f"{f'{len(several)} × ' if len(several) > 1 else ''}{kind} of {', '.join(arrays[:3])}"
            f"{f' and {len(arrays) - 3} more' if len(arrays) > 3 else ''}: {sent:.3f} MB sent, {len(groups)} × "
            f"{len(groups[0])} devices, {shortened(str(groups[0]))}; {begin:.0%} to {end:.0%} of the work; "
            f"{path or 'made by the compiler'}"
        )
    if values["collectives"]:
        print(f"exchange: {values['megabytes_sent']:.1f} MB sent, {values['exchange_ms']:.3f} ms over all links")
        print(f"The backward pass ends at {values['backward_ends']:.0%} of the work.")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Examines all programs and batch sizes that were asked for."""
    target = targets.TARGETS[args.target]
    devices = targets.devices(args.target, args.devices)
    runs = []
    for batch_size in args.batch_sizes:
        config = measure.recipe(args.model, batch_size, args.width, args.dtype, args.fused)
        layout = parallel.Layout(
            args.devices_per_network,
            towers=config.model.towers,
            batch_size=batch_size,
            fused=config.parallel.fused,
            devices=devices,
        )
        print(f"{layout}, {config.model.dtype}. {WARNING}", flush=True)
        for kind in args.programs:
            runs.append(examine(kind, config, target, layout))
            show(runs[-1])
    return {
        "estimate": WARNING,
        "model": args.model,
        "width": args.width,
        "dtype": args.dtype,
        "fused": args.fused,
        "target": args.target,
        "devices": args.devices,
        "devices_per_network": layout.devices_per_network,
        "runs": runs,
    }


def _list_of(kind: type):
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    """Parses the flags, compiles, and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help=f"the device: {', '.join(targets.TARGETS)}")
    parser.add_argument("--devices", type=int, default=1, help="how many of them")
    parser.add_argument("--devices_per_network", type=int, choices=(0, 1, 2), default=0)
    parser.add_argument(
        "--model", choices=tuple(measure.RECIPES), default="alexnet", help="the network that is compiled"
    )
    parser.add_argument("--batch_sizes", type=_list_of(int), default=[128], help="rows of all devices together")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--fused", action="store_true", help="parallel.fused=True: normalise and pool in one kernel, on GPUs"
    )
    parser.add_argument("--programs", type=_list_of(str), default=PROGRAMS, help="of training,evaluation")
    args = parser.parse_args()
    try:
        check_name("--target", args.target, targets.TARGETS)
        for name in args.programs:
            check_name("--programs", name, PROGRAMS)
        on_gpu = targets.TARGETS[args.target].platform == "cuda"
        require(on_gpu or not args.fused, f"--fused is a kernel for GPUs, and {args.target} is none.")
        targets.check_devices(args.target, args.devices)
        targets.prepare(args.target)
        compiler = {"tpu": "libtpu", "cuda": "jax-cuda12-plugin"}[targets.TARGETS[args.target].platform]
        versions = {name: importlib.metadata.version(name) for name in ("jax", compiler)}
        measure.report("compiled", run(args), versions)
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
