"""Writes a network as a program: `python -m tools.export --workdir=runs/caltech101 --out=alexnet.stablehlo`.

The file has the parameters and all that is done with the pixels. It runs on CPUs, NVIDIA's GPUs and TPUs, on batches of
any size, and needs `pip install jax flatbuffers` but not this code. Beside it, alexnet.json has the names of the
classes and readable `labels`, in the order of the probabilities. A program with Pillow as well, in their folder:

    import json, pathlib
    import jax, numpy as np
    from jax import export
    from PIL import Image, ImageOps

    network = export.deserialize(bytearray(pathlib.Path("alexnet.stablehlo").read_bytes()))
    probabilities = jax.jit(network.call)  # of (b, S, S, 3) uint8 RGB images: (b, classes) float32
    size = network.in_avals[0].shape[1]
    photo = ImageOps.fit(ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB"), (size, size))
    labels = json.loads(pathlib.Path("alexnet.json").read_text("utf-8"))["labels"]
    print(labels[np.argmax(probabilities(np.asarray(photo)[None]))])

JAX compiles it once for each size of a batch. It reads files of its last six months or more: see "Compatibility
guarantees" of `jax.export`.
"""

import json

import jax
import numpy as np
from absl import flags
from jax import export

import evaluate
import update
from common import cli, files
from common.errors import require
from predictor import Predictor
from run import workdirs
from tools import shared

OUT = flags.DEFINE_string("out", "alexnet.stablehlo", "The .stablehlo file; a .json of the same name comes with it.")
shared.define_network(batches=False)

PLATFORMS = ("cpu", "cuda", "tpu")
MOST_BYTES = 2_000_000_000  # of the parameters; flatbuffers end at 2 GiB


def main(_) -> None:
    """Writes the two files."""
    program = workdirs.expanded(OUT.value, "--out")
    require(program.suffix == ".stablehlo", f"--out={OUT.value} must end in .stablehlo.")
    names = program.with_suffix(".json")
    for path in (program, names):
        require(not files.check(path).exists(), f"{path} is there already; remove it, or take another --out.")
    network = shared.network()
    classes = {"step": network.step, "classes": network.records.class_names, "labels": network.labels}
    content = exported(network, shared.chosen("views")).serialize()
    with files.replacing(names) as beside, files.replacing(program) as partial:  # both or none
        beside.write_text(json.dumps(classes, ensure_ascii=False, indent=1), "utf-8")
        partial.write_bytes(content)
    print(program, names, sep="\n")


def exported(network: Predictor, views: str) -> export.Exported:
    """The program of a network: (b, S, S, 3) uint8 images to (b, classes) float32 probabilities, for any b.

    Raises:
      UserError: it is too large.
    """
    config, size = network.config, sum(leaf.nbytes for leaf in jax.tree.leaves(network.params))
    require(size < MOST_BYTES, f"The parameters take {size / 1e9:.1f} GB, and a file of jax.export holds 2 GB at most.")
    probabilities = evaluate.probabilities(
        update.build_network(config), network.records.mean_image, config.input, views
    )
    batch = export.symbolic_shape(f"b, {network.size}, {network.size}, 3")
    function = jax.jit(lambda images: probabilities(network.params, images))
    return export.export(function, platforms=PLATFORMS)(jax.ShapeDtypeStruct(batch, np.uint8))


if __name__ == "__main__":
    cli.run(main)
