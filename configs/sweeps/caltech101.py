"""The recipe for few images, configs/caltech101.py, with three seeds, and what its means against overfitting do.

    python -m tools.sweep --sweep=configs/sweeps/caltech101.py --workdir=runs/caltech101_seeds
    python -m tools.sweep --sweep=configs/sweeps/caltech101.py:short --workdir=runs/caltech101_short

The first is the recipe as it is, and looks at the test images. `:short` has an arm without each of the means, and two
with the paper's weight decay and dropout, at 112 pixels and for 60 epochs. It trains on four fifths of the training
images and is evaluated on the others, so that nothing is chosen by the test images. docs/reproduction.md has what was
measured.
"""

from configs import base
from configs.sweeps import Arm, Measure, Sweep, error, last


def get_sweep(variant: str = "") -> Sweep:
    """The sweep; `variant` is '' or 'short'."""
    base.check_variant("configs/sweeps/caltech101.py", variant, ("short",))
    short = {
        "input.resize": 128,
        "input.crop": 112,
        "num_epochs": 60.0,
        "dataset.train_split": "train[:80%]",
        "dataset.eval_split": "train[80%:]",
        "dataset.test_split": "",
    }
    without = {
        "no_mixup": Arm({"mixup": 0.0}),
        "no_crop_area": Arm({"input.crop_area": ()}),
        "no_smoothing": Arm({"label_smoothing": 0.0}),
        "no_average": Arm({"optimizer.average": 0.0}),
        "paper_decay": Arm({"optimizer.weight_decay": 0.0005}),
        "paper_dropout": Arm({"model.dropout_rate": 0.5}),
    }
    return Sweep(
        config="configs/caltech101.py",
        overrides=short if variant else {},
        measures=(
            Measure("mean class accuracy", last("test/mean_class_accuracy")),
            error("top1", "top-1 error"),
            error("top5", "top-5 error"),
        ),
        arms={"base": Arm(), **(without if variant else {})},
    )
