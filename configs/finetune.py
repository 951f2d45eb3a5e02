"""Fine-tuning: goes on from the weights of a run, on photographs of other classes.

    python main.py --config=configs/finetune.py:runs/source --workdir=runs/photos --config.dataset.name=photos \
        --config.model.num_classes=12

The network, the size and scale of its pixels and the update rule are those of the run in runs/source, but no average
of its weights is kept, which counts updates and would be too long for few images. The length, the batches and the
schedule are set below. All layers learn at the source's rate, and the last one is new unless the
classes are the same. `--config.schedule.layers="(('conv1', ((0.0, 0.0),)), ('conv2', ((0.0, 0.0),)))"` freezes two
layers; a factor of 0.1 slows one. Every start reads the source's config.json, also one that continues a run.

Measured on two cores of a Xeon, seeds 0 to 2. The source is a run of configs/caltech101.py:plain on 71 classes of
Caltech-101, with input.resize=128 and input.crop=112; the target is the 30 other classes, with 30 training images each
and 513 test images. Mean class accuracy with ten views, after the last step of 40 epochs, 3 to 5 minutes each, other
work going on beside it:

    fine-tuned                                           56.3, 61.6, 61.5   mean 59.8 %   top-1 error 39.6 %
    the same from scratch (--config.init_from=)          54.4, 50.6, 53.3   mean 52.7 %   top-1 error 46.7 %
    configs/caltech101.py:plain from scratch             49.2, 52.8, 54.7   mean 52.2 %   top-1 error 47.2 %
    fine-tuned, 10 images a class                        42.5, 44.7, 43.4   mean 43.6 %
    configs/caltech101.py:plain from scratch, 10 a class 29.3, 30.0, 34.9   mean 31.4 %

The classes of the target are the first 30 of the sorted names after `random.Random(0).shuffle`. The commands, with 10
images a class from a folder that holds only the first ten of each:

    SIZE="--config.input.resize=128 --config.input.crop=112 --config.dataset.train_split=train"
    SIZE="$SIZE --config.dataset.eval_split=test --config.dataset.test_split="
    python main.py --config=configs/caltech101.py:plain --workdir=runs/source $SIZE \
        --config.dataset.name=SOURCE --config.model.num_classes=71
    LAST="--config.dataset.name=TARGET --config.model.num_classes=30 --config.eval_every.epochs=0.0 --config.seed=0"
    python main.py --config=configs/finetune.py:runs/source --workdir=runs/tuned $LAST [--config.init_from=]
    python main.py --config=configs/caltech101.py:plain --workdir=runs/scratch $LAST $SIZE

The rates and the length were chosen on a fifth of the target's training images (180, standard error 4 points), seed 0.
Mean class accuracy there after 20 epochs, the last layer at a rate of 0.02, by the rate of the others: 46.7 % at 0.02,
46.1 % at 0.01, 43.9 % at 0.005, 44.4 % at 0.002, 42.8 % frozen. After 40 epochs the first has 53.9 % and the second
46.7 %. Not measured: a source that has seen many more images, or one of configs/caltech101.py without `:plain`, whose
rate is 0.01.
"""

import json
import pathlib

import ml_collections

from common.errors import UserError, require
from configs import base


def get_config(source: str = "") -> ml_collections.ConfigDict:
    """The recipe for the network of the run in the workdir `source`, which may begin with ~.

    Raises:
      UserError: `source` is no workdir, or its config.json is damaged.
    """
    model, view, rule = _sections(source)
    config = base.get_config()
    config.init_from = str(pathlib.Path(source).expanduser().resolve())  # the same from any folder
    config.batch_size = 32
    config.num_epochs = 40.0
    config.log_every.steps = 50
    config.eval_every.epochs = 4.0
    config.checkpoint_every.epochs = 4.0
    config.dataset.name = "data/photos"
    config.input.update(view, random_crop=True, reflect=True, lighting_std=0.1)
    config.model = model
    config.optimizer.update(rule)
    config.schedule.name = "cosine"  # whatever num_epochs is, the rate ends at 0
    return config


def _sections(source: str) -> tuple[dict, dict, dict]:
    """What suits the weights of a run: its network, size and scale of its pixels in `input`, and its update rule."""
    command = "the command is --config=configs/finetune.py:WORKDIR, with the folder of a run of main.py."
    require(source, f"configs/finetune.py needs a run to start from; {command}")
    try:
        stored = json.loads((pathlib.Path(source).expanduser() / "config.json").read_text())
        model = {field: tuple(value) if isinstance(value, list) else value for field, value in stored["model"].items()}
        view = {field: stored["input"][field] for field in ("resize", "crop", "scale")}
        view["channel_std"] = tuple(stored["input"].get("channel_std", (1.0, 1.0, 1.0)))  # of later runs alone
        rule = {field: value for field, value in stored["optimizer"].items() if field != "average"}
        return model, view, rule
    except FileNotFoundError:
        raise UserError(f"{source} is not the workdir of a run: it has no config.json; {command}") from None
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"The config.json of {source} cannot be used ({reason}); {command}") from None
