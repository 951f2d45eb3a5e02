"""Computes what a layer makes of photographs: `python -m tools.features --workdir=… --out=features.npz folder/`.

    python -m tools.features --workdir=runs/caltech101 --layer=fc7 --out=features.npz photographs/
    python -m tools.features --workdir=runs/caltech101 --layer=conv1,conv5 --plot=maps.png photo.jpg

The features are those of the centre view after the layer's activation, before normalisation, pooling and dropout, in
float32; the last layer gives the logits. In the file, `files` are the names, (N,), and each layer has an array of its
name: maps (N, height, width, features), or vectors (N, features). `--plot` draws the first photograph and its maps.
Exit code 2 if a file cannot be read.
"""

import contextlib
import shutil
import zipfile

import numpy as np
from absl import flags

import views
from common import cli, files
from common.errors import UserError, check_name, require
from drawing import canvas, plots
from tools import shared

LAYER = flags.DEFINE_list("layer", ["fc7"], "Layers by the paper's names, with commas; 'all' for all of them.")
OUT = flags.DEFINE_string("out", "", "The .npz file for the features.")
PLOT = flags.DEFINE_string("plot", "", "Draw the maps of the first photograph into this .png, .svg or .pdf.")
shared.define_network(views=False)


def main(arguments: list[str]) -> int:
    """Writes the features and the picture."""
    require(len(arguments) > 1, "Name photographs: files, folders, or - for stdin.")
    require(OUT.value or PLOT.value, "Say where to: --out=features.npz for the numbers, --plot=maps.png for a picture.")
    require(OUT.value.endswith(".npz") or not OUT.value, f"--out={OUT.value} must end in .npz.")
    if OUT.value:
        files.check(files.expanded(OUT.value, "--out"))
    if PLOT.value:
        canvas.check(PLOT.value)
    network = shared.network()
    layers = network.layers if LAYER.value == ["all"] else tuple(LAYER.value)
    require(layers and len(set(layers)) == len(layers), f"--layer={','.join(layers)} must name different layers.")
    for layer in layers:
        check_name("--layer", layer, network.layers)
    photographs = shared.Photographs(network, arguments[1:])
    rows = photographs.through(lambda squares: network.features(squares, layers), "features")
    with _Archive(OUT.value, layers) if OUT.value else contextlib.nullcontext() as archive:
        for number, (photograph, values) in enumerate(rows):
            if PLOT.value and not number:
                seen = views.center(photograph.pixels, network.config.input.crop)
                canvas.save(plots.layers(seen, values, network.config.model.towers), PLOT.value)
            if not archive:
                break
            archive.add(photograph.file, values)
    return photographs.exit_code()


class _Archive:
    """An .npz file of features, written whole or not at all, in the memory of one row.

    NumPy's format states the number of rows first, and files that cannot be read are known last. So the rows go to a
    temporary file for each layer.
    """

    def __init__(self, path: str, layers: tuple[str, ...]):
        self._path, self._layers, self._files, self._shapes = files.expanded(path, "--out"), layers, [], {}

    def __enter__(self):
        with self._explained():
            self._folder = self._path.with_name(f".{self._path.name}.partial")
            shutil.rmtree(self._folder, ignore_errors=True)  # a killed run leaves one
            self._folder.mkdir()
            self._parts = {layer: (self._folder / layer).open("wb") for layer in self._layers}
        return self

    def add(self, file: str, values: dict[str, np.ndarray]) -> None:
        """Adds the features of a photograph."""
        self._files.append(file)
        with self._explained():
            for layer, value in values.items():
                self._shapes[layer] = value.shape
                self._parts[layer].write(np.ascontiguousarray(value, np.float32).tobytes())

    def __exit__(self, kind, *_):
        try:
            with self._explained():
                for part in self._parts.values():
                    part.close()
                if not kind:
                    require(self._files, f"No photograph could be read, so {self._path} is not written.")
                    self._write()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self):
        whole = self._folder / "whole"
        with zipfile.ZipFile(whole, "w") as archive:
            for name in ("files", *self._layers):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    if name == "files":
                        np.lib.format.write_array(entry, np.array(self._files))
                        continue
                    header = {"descr": "<f4", "fortran_order": False, "shape": (len(self._files), *self._shapes[name])}
                    np.lib.format.write_array_header_1_0(entry, header)
                    with (self._folder / name).open("rb") as part:
                        shutil.copyfileobj(part, entry, 1 << 20)
        whole.replace(self._path)

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"--out={self._path} cannot be written: {error.strerror}.") from None


if __name__ == "__main__":
    cli.run(main, takes=shared.FILES)
