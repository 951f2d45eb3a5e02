"""How much longer training takes with dropout, which "roughly doubles the number of iterations" (paper, section 4.2).

    python -m tools.sweep --sweep=configs/sweeps/dropout.py --workdir=runs/dropout

The recipe is configs/caltech101.py:plain with images of half the size, one learning rate for all epochs, and dropout of
a half, as in the paper, or none. After every epoch the training images themselves are evaluated, by their centre and
with all outputs kept, because an error that is measured while a network trains has dropout in it.
docs/reproduction.md has what was measured.
"""

from configs import base
from configs.sweeps import Arm, Measure, Sweep, epochs_to

ERROR = "eval/top1_error"
MEASURES = {f"epochs to {bound:.0%} training error": bound for bound in (0.75, 0.5)}
EPOCHS = {0.0: 30.0, 0.5: 60.0}  # some more than it takes


def get_sweep(variant: str = "") -> Sweep:
    """The sweep; it has no variant."""
    base.check_variant("configs/sweeps/dropout.py", variant, ())

    def arm(rate, published):
        return Arm({"model.dropout_rate": rate, "num_epochs": EPOCHS[rate]}, published)

    return Sweep(
        config="configs/caltech101.py:plain",
        arms={"no_dropout": arm(0.0, {}), "dropout": arm(0.5, dict.fromkeys(MEASURES, 2.0))},
        measures=[Measure(name, epochs_to(ERROR, bound), ratio=True) for name, bound in MEASURES.items()],
        overrides={
            "input.resize": 128,
            "input.crop": 112,
            "dataset.eval_split": "train[:90%]",
            "dataset.test_split": "train[90%:]",
            "eval_every.epochs": 1.0,
            "checkpoint_every.epochs": 10.0,
            "optimizer.learning_rate": 0.01,
            "schedule.factors": (),
        },
        curve=ERROR,
    )
