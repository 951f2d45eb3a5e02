"""Images a second of prediction from a folder of JPEGs: `python -m benchmarks.predict --photographs=FOLDER`.

    python -m benchmarks.predict --photographs=CALTECH101 --views=ten,centre                # full width, 1,000 classes
    python -m benchmarks.predict --photographs=CALTECH101 --compare=torch --torch_compile   # beside PyTorch

From the names of the files to the probabilities on the host, as tools.predict computes them, with initial weights. The
peer is the same network in PyTorch, in a process of its own so that the threads of neither meet those of the other: a
DataLoader with Pillow and worker processes, and its best settings (see `torch_networks.Prediction`). The two run in
turn, round by round, and must give the same probabilities.
"""

import argparse
import functools
import multiprocessing
import pathlib
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks import measure, photographs
from common import backend, host
from common.errors import UserError, check_ranges
from common.exits import fail
from datasets import prepared
from predictor import Predictor
from run import setup
from views import factors


def untrained(config, workdir: pathlib.Path) -> pathlib.Path:
    """Writes a workdir of a config with its initial weights, a grey mean image and numbered classes; returns it."""
    size = config.input.resize
    names = tuple(f"class {i}" for i in range(config.model.num_classes))
    grey, components = np.full((size, size, 3), 118.0, np.float32), np.eye(3, dtype=np.float32)
    records = prepared.Records(workdir, names, grey, np.ones(3, np.float32), components)
    setup.write_new(config, records, workdir)
    return workdir


class Peer:
    """PyTorch in a process of its own; a call predicts once and returns the seconds."""

    def __init__(self, **options):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, options), daemon=False)
        self._process.start()
        self.probabilities = self._answer()

    def _answer(self):
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise UserError(f"PyTorch: {answer}")
        return answer

    def __call__(self) -> float:
        """Seconds from the names of the files to the probabilities."""
        self._pipe.send("again")
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send(None)
        self._process.join()


def _serve(pipe, options):
    try:
        from benchmarks import torch_networks

        host.keep_freed_memory()
        prediction = torch_networks.Prediction(**options)
        pipe.send(prediction())
        while pipe.recv():
            begun = time.perf_counter()
            prediction()
            pipe.send(time.perf_counter() - begun)
    except ImportError as error:
        pipe.send(f"{error}; `pip install -r requirements-benchmarks.txt` installs it.")
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def run(args: argparse.Namespace, views: str, folder: pathlib.Path, files: list[str]) -> dict[str, Any]:
    """Measures one kind of views."""
    network = Predictor(folder, views=views, batch_size=args.batch_size)

    def predict():
        return np.stack(list(network.probabilities(photograph.pixels for photograph in network.read(files))))

    ours = predict()
    candidates = {"jax": functools.partial(measure.clock, predict)}
    peer = None
    if args.compare:
        peer = Peer(
            files=files,
            params=network.params,
            mean=network.records.mean_image,
            factors=factors(network.config.input),
            crop=network.config.input.crop,
            views=views,
            batch_size=args.batch_size,
            workers=args.workers,
            compiled=args.torch_compile,
        )
        difference = np.abs(peer.probabilities - ours).max() / ours.max()
        if not difference < 1e-2:
            raise UserError(f"PyTorch gives other probabilities, by {difference:.1%} of the largest.")
        candidates["torch"] = peer
    seconds = measure.interleaved(candidates, args.rounds)
    values = {"views": views, "images": len(files), "images_per_second": len(files) / min(seconds["jax"])}
    if peer:
        peer.close()
        values["torch_images_per_second"] = len(files) / min(seconds["torch"])
        values["times_torch"] = measure.ratio(seconds, "torch", "jax")
        values["largest_difference"] = float(difference)
    return values


def main() -> None:
    """Parses the flags, measures, and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", required=True, help="a folder ROOT with ROOT/train/CLASS/*.jpg")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--views", default="ten,centre", help="ten, centre or both")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--compare", choices=("torch",))
    parser.add_argument("--torch_compile", action="store_true", help="torch.compile for the peer")
    parser.add_argument("--workers", type=int, default=host.cores(), help="processes of the peer's DataLoader")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    try:
        bounds = {"images": (1, 1 << 20), "batch_size": (1, 1 << 16), "rounds": (1, 1000), "workers": (0, 256)}
        check_ranges(vars(args), bounds, "--")
        host.keep_freed_memory()
        config = measure.recipe(width=args.width)
        backend.start_devices()
        with tempfile.TemporaryDirectory() as temporary:
            sample = photographs.sample(
                pathlib.Path(args.photographs), pathlib.Path(temporary, "photographs"), args.images, 0
            )
            folder = untrained(config, pathlib.Path(temporary, "run"))
            results = []
            for views in args.views.split(","):
                results.append(run(args, views, folder, list(map(str, sample))))
                print(", ".join(f"{name} {value}" for name, value in results[-1].items()), flush=True)
        about = {"width": args.width, "batch_size": args.batch_size, "compiled": args.torch_compile}
        measure.report("predict", about | {"rounds": args.rounds, "runs": results})
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
