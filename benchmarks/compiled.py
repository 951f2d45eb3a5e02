"""What XLA's compilers say of a recipe on TPUs and GPUs that are not here: `make compiled ARGS='--target=v5e'`.

    make compiled ARGS='--target=v5e --batch_sizes=128,1024'            one chip
    make compiled ARGS='--target=h100 --devices=2'                      a tower on each of two
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
from common.errors import UserError, check_name, shortened
from common.exits import fail

PROGRAMS = ("training", "evaluation")
# Named scopes of `update`, `views` and `parallel`; and copies between the memories of a TPU, which go on beside the rest.
SCOPES = ("rows", "images", "towers", "exchange", "loss", "replicas", "update", "measure")
TRANSFERS = "to and from VMEM"
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
        rows = batch(
            image=(np.uint8, crop, crop, 3), label=(np.int32,), shift=(np.float32, 3), gain=(np.float32,)
        )
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


def parts(program: hlo.Program, layers: list[str]) -> dict[tuple[str, str], dict[str, float]]:
    """Cycles and bytes by (part, direction), what is computed forward first.

    A part is a layer, a step between layers (`models.STEPS`), one of SCOPES, TRANSFERS, or 'other'.
    """
    known = {*layers, *models.STEPS, *SCOPES}
    found = collections.defaultdict(lambda: {"cycles": 0, "bytes": 0})
    for operation, times in program.executed():
        if operation.kind in ("copy-start", "slice-start"):
            key = TRANSFERS, ""
        else:
            places = ((name, path) for path in program.paths(operation) for name in reversed(re.findall(r"\w+", path)))
            part, path = next((place for place in places if place[0] in known), ("other", ""))
            forward = "forward" if part in layers or part in models.STEPS else ""
            key = part, "backward" if "transpose(" in path else forward
        values = found[key]
        values["cycles"] += times * operation.cycles
        values["bytes"] += times * program.moved(operation)
    order = [*SCOPES[:2], *layers, *models.STEPS, *SCOPES[2:], TRANSFERS, "other"]
    places = {key: (key[1] == "backward", order.index(key[0])) for key in found}
    return {key: found[key] for key in sorted(found, key=places.get) if any(found[key].values())}


def exchanges(program: hlo.Program) -> list[dict[str, Any]]:
    """What `hlo.Program.collectives` gives; when each begins and ends is a share of the estimated cycles, or bytes."""
    costs = [times * operation.cycles for operation, times in program.executed()]
    if not any(costs):
        costs = [times * program.moved(operation) for operation, times in program.executed()]
    passed = np.cumsum([0, *costs]) / max(1, sum(costs))
    return [
        {
            "kind": each.kind,
            "arrays": each.shapes,
            "megabytes": each.size / 1e6,
            "megabytes_sent": each.sent / 1e6,
            "groups": each.groups,
            "path": each.path,
            "times": each.times,
            "begins": float(passed[each.position]),
            "ends": float(passed[each.done]),
        }
        for each in program.collectives()
    ]


def examine(kind: str, config, target: targets.Target, layout: parallel.Layout) -> dict[str, Any]:
    """Compiles a program, prints what the compiler says of it, and returns it."""
    begun = time.perf_counter()
    values = {"program": kind, "batch_size": config.batch_size, "device_memory_gigabytes": target.memory / 1e9}
    try:
        compiled = lower(kind, config, layout).compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"Used ([\d.]+)([MGT]) of", str(error))
        if not found:
            raise UserError(f"The compiler refuses it: {shortened(' '.join(str(error).split()))}") from error
        needed = float(found[1]) * {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}[found[2]] / 1e9
        print(f"\n{kind}, batch {config.batch_size}: does not fit; it needs {needed:.1f} GB")
        return values | {"fits": False, "memory_gigabytes": needed}
    program, flops = hlo.Program(compiled.as_text()), needed_flops(kind, config, layout.size)
    rows, collectives = parts(program, [layer for layer, _ in flops]), exchanges(program)
    rates = {"computation": target.product_rate(config.model.dtype), "bandwidth": target.bandwidth}
    memory, table = compiled.memory_analysis(), []
    for part, direction in dict.fromkeys([*rows, *flops]):
        row, operations = rows.get((part, direction), {"cycles": 0, "bytes": 0}), flops.get((part, direction), 0)
        table.append(
            {
                "part": f"{part} {direction}".strip(),
                "estimated_mega_cycles": row["cycles"] / 1e6,
                "gigabytes_moved": row["bytes"] / 1e9,
                "gigaflops": operations / 1e9,
                "computation_ms": 1e3 * operations / rates["computation"],
                "bandwidth_ms": 1e3 * row["bytes"] / rates["bandwidth"],
            }
        )
    total = {name: sum(row[name] for row in table) for name in table[0] if name != "part"}
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    sent = sum(each["megabytes_sent"] for each in collectives)
    values |= total | {
        "temporary_gigabytes": memory.temp_size_in_bytes / 1e9,
        "memory_gigabytes": needed / 1e9,
        "fits": needed <= target.memory,
        "megabytes_sent": sent,
        "exchange_ms": 1e9 * sent / target.link,
        "collectives": collectives,
        "parts": table,
        "compile_seconds": time.perf_counter() - begun,
    }
    show(values)
    return values


def show(values: dict[str, Any]) -> None:
    """Prints a table of what `examine` found."""
    print(f"\n{values['program']}, batch {values['batch_size']}")
    print(f"{'part':<28}{'Mcycles':>9}{'GB':>9}{'GFLOP':>9}{'ms by flops':>13}{'ms by bytes':>13}")
    for row in (*values["parts"], {"part": "total"} | values):
        figures = f"{row['estimated_mega_cycles']:9.3f}{row['gigabytes_moved']:9.3f}{row['gigaflops']:9.1f}"
        print(f"{row['part']:<28}{figures}{row['computation_ms']:13.3f}{row['bandwidth_ms']:13.3f}")
    fits = "fits" if values["fits"] else "does not fit"
    print(
        f"memory: {values['memory_gigabytes']:.2f} GB, {values['temporary_gigabytes']:.2f} of it temporary; it {fits} "
        f"into {values['device_memory_gigabytes']:.1f} GB"
    )
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Examines all programs and batch sizes that were asked for."""
    target = targets.TARGETS[args.target]
    devices = targets.devices(args.target, args.devices)
    runs = []
    for batch_size in args.batch_sizes:
        config = measure.recipe(args.config, batch_size, args.width, args.dtype)
        layout = parallel.Layout(
            args.devices_per_network, towers=config.model.towers, batch_size=batch_size, devices=devices
        )
        print(f"{layout}, {config.model.dtype}. {WARNING}", flush=True)
        runs += [examine(kind, config, target, layout) for kind in args.programs]
    return {
        "estimate": WARNING,
        "config": args.config,
        "width": args.width,
        "dtype": args.dtype,
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
    parser.add_argument("--config", default="configs/alexnet.py", help="the recipe whose network is compiled")
    parser.add_argument("--batch_sizes", type=_list_of(int), default=[128], help="rows of all devices together")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--programs", type=_list_of(str), default=PROGRAMS, help="of training,evaluation")
    args = parser.parse_args()
    try:
        check_name("--target", args.target, targets.TARGETS)
        for name in args.programs:
            check_name("--programs", name, PROGRAMS)
        targets.check_devices(args.target, args.devices)
        targets.prepare(args.target)
        compiler = {"tpu": "libtpu", "cuda": "jax-cuda12-plugin"}[targets.TARGETS[args.target].platform]
        versions = {name: importlib.metadata.version(name) for name in ("jax", compiler)}
        measure.report("compiled", run(args), versions)
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
