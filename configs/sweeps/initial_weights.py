"""The paper's initial weights against those of its source, where both train: at full width, on the generated `shapes`.

    python -m tools.sweep --sweep=configs/sweeps/initial_weights.py --workdir=runs/initial_weights --jobs=2

Section 5 has a standard deviation of 0.01 for every layer; the source has 0.03 for conv3 to conv5. Both were tuned for
the width of the paper and pixels of 0 to 255, so the recipe has these, the paper's dropout and its rate. Views have
112 pixels, to save time. docs/reproduction.md has what was measured, and of how many seeds.
"""

from configs.sweeps import Arm, Measure, Sweep, epochs_to, error, last

ERROR = "train/top1_error"


def get_sweep() -> Sweep:
    """The sweep."""
    return Sweep(
        config="configs/demo.py",
        overrides={
            "model.width": 1.0,
            "input.scale": 1.0,
            "model.dropout_rate": 0.5,
            "optimizer.learning_rate": 0.01,
            "schedule.name": "constant",
            "schedule.factors": (),
            "num_epochs": 12.0,
            "log_every.epochs": 0.25,
            "log_every.steps": 0,
            "eval_every.epochs": 4.0,
            "checkpoint_every.epochs": 4.0,
        },
        arms={"paper": Arm({"model.init": "paper"}), "2012": Arm({"model.init": "2012"})},
        measures=(
            Measure("epochs to 70 % training error", epochs_to(ERROR, 0.7), ratio=True),
            Measure("training error at the end", last(ERROR)),
            error("top1", "top-1 error"),
        ),
        curve=ERROR,
    )
