"""Takes over weights of other programs: `python -m tools.convert --weights=alexnet.pth --workdir=runs/torchvision`.

Reads torchvision's `alexnet` from its state_dict (.pth, .pt, .safetensors), and Caffe's bvlc_alexnet and CaffeNet from
their .caffemodel. The workdir can then be used like that of a run: by the tools, in Python, and to start from with
--config.init_from or configs/finetune.py.

The way back: `python -m tools.convert --workdir=runs/alexnet --to=torch --out=alexnet.pth` writes a state_dict, for
torchvision's network or for the grouped module in docs/weights.md; --to=safetensors writes the same tensors.
"""

import pathlib
import shlex

import jax
import numpy as np
from absl import flags

from common import cli, files
from common.errors import UserError, require, shown
from datasets import prepared, wordnet
from run import setup, workdirs
from tools import shared
from weights import caffe, grouped, naming, tensors, torchvision

WEIGHTS = flags.DEFINE_string("weights", "", "The file to take over: .pth, .pt, .safetensors or .caffemodel.")
MEAN = flags.DEFINE_string("mean", "", "Caffe's mean image, a .binaryproto; by default its mean over the pixels.")
CLASSES = flags.DEFINE_string("classes", "", "A file of class names, one a line; by default ImageNet's for 1,000.")
TO = flags.DEFINE_enum("to", None, ["torch", "safetensors"], "Write the network of --workdir for other programs.")
OUT = flags.DEFINE_string("out", "", "The file to write; by default alexnet.pth or alexnet.safetensors.")
shared.define_network(views=False, batches=False)

SUFFIXES = {"torch": tensors.TORCH, "safetensors": tensors.SAFE}


def main(_) -> None:
    """Converts one way or the other."""
    require(
        bool(WEIGHTS.value) != bool(TO.value), "Give either --weights=FILE to take over, or --to=torch|safetensors."
    )
    if TO.value:
        require(not (MEAN.value or CLASSES.value), "--mean and --classes belong to --weights.")
        _write_file(TO.value)
    else:
        require(not OUT.value, "--out belongs to --to; the weights are written to --workdir.")
        require(shared.chosen("step") == "best", "--step belongs to --to; a file of weights has no steps.")
        _write_workdir(_read(workdirs.expanded(WEIGHTS.value, "--weights")))


# From elsewhere.


def _read(path: pathlib.Path) -> naming.Weights:
    if path.suffix == ".caffemodel":
        return caffe.read(path, workdirs.expanded(MEAN.value, "--mean") if MEAN.value else None)
    require(not MEAN.value, "--mean belongs to a .caffemodel.")
    known = (*tensors.TORCH, *tensors.SAFE, ".caffemodel")
    require(path.suffix in known, f"--weights={path} must end in {', '.join(known[:-1])} or {known[-1]}.")
    return torchvision.read(str(path), tensors.read(path))


def _write_workdir(found: naming.Weights) -> None:
    """Writes what the tools need of a workdir, and says what to do with it."""
    config, workdir = found.config, workdirs.expanded(shared.chosen("workdir"))
    records = _records(found)
    with workdirs.lock(workdir):
        taken = (workdir / "config.json").exists()
        require(not taken, f"{workdir} is the workdir of a run; take a new --workdir.")
        setup.write_new(config, records, workdir, found.params)
    count = sum(leaf.size for leaf in jax.tree.leaves(found.params))
    print(f"{workdir}: {config.model.name}, {count:,} parameters, {records.num_classes} classes. What to do with it:")
    print(f"  {shlex.join(['python', '-m', 'tools.predict', f'--workdir={workdir}', 'photo.jpg'])}")


def _records(found: naming.Weights) -> prepared.Records:
    """What a workdir keeps of its data set; no set is known, and no lighting."""
    side, components = found.config.input.resize, np.eye(3, dtype=np.float32)
    require(
        found.mean.ndim == 1 or len(found.mean) == side,
        f"--mean must be an image of {side}×{side} pixels, which it is not.",
    )
    mean = np.broadcast_to(found.mean, (side, side, 3)).astype(np.float32)
    return prepared.Records(
        pathlib.Path(), _class_names(found.config.model.num_classes), mean, np.zeros(3, np.float32), components
    )


def _class_names(count: int) -> tuple[str, ...]:
    if not CLASSES.value:
        known = wordnet.ids()
        return known if len(known) == count else tuple(f"class {number}" for number in range(count))
    path = workdirs.expanded(CLASSES.value, "--classes")
    require(path.is_file(), f"--classes={path} is not there, or is no file.")
    try:
        names = tuple(path.read_text("utf-8-sig").splitlines())  # Windows begins a text with a mark
    except OSError as error:
        raise UserError(f"--classes={path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"--classes={path} is no text in UTF-8.") from None
    require(len(names) == count, f"--classes={path} has {len(names)} names, and the network {count} classes.")
    for number, name in enumerate(names, 1):  # NumPy stores no text that ends in a zero byte
        require(name and "\0" not in name, f"--classes={path} must name every class; line {number} is {shown(name)}.")
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"--classes={path} must name no class twice: {shown(twice)}.")
    return names


# To elsewhere.


def _write_file(kind: str) -> None:
    suffixes = SUFFIXES[kind]
    path = workdirs.expanded(OUT.value or f"alexnet{suffixes[0]}", "--out")
    require(path.suffix in suffixes, f"--out={path} must end in {' or '.join(suffixes)} with --to={kind}.")
    require(not files.check(path).exists(), f"{path} is there already; remove it, or take another --out.")
    network = shared.network()
    model = network.config.model
    if model.name == "torchvision":
        says = f"It takes {_input_of(network)}, as torchvision's alexnet(num_classes={model.num_classes}) has it."
        content = torchvision.write(network.params)
    else:
        require(model.name == "alexnet", f"There is no module of PyTorch for model.name={model.name}.")
        content = grouped.write(network.params, network.config, network.records.mean_image)
        says = f"It takes RGB in 0 to 255, with docs/weights.md: AlexNet(state, {grouped.arguments(model)})"
    tensors.write(path, content)
    print(path, says, sep="\n")


def _input_of(network) -> str:
    """The input of torchvision's network in words."""
    mean, std = network.records.mean_image, tuple(network.config.input.channel_std)
    if np.ptp(mean, (0, 1)).any():
        return "RGB with the mean image of dataset.npz subtracted, then input.scale and input.channel_std"
    return f"RGB in 0 to 1 with mean {tuple((mean[0, 0].astype(np.float64) / 255).round(3).tolist())} and std {std}"


if __name__ == "__main__":
    cli.run(main)
