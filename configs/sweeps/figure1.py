"""The paper's figure 1: how fast the training error of a four-layer network falls on CIFAR-10, with ReLU and with tanh.

    python -m tools.sweep --sweep=configs/sweeps/figure1.py:search --workdir=runs/figure1_search
    python -m tools.sweep --sweep=configs/sweeps/figure1.py --workdir=runs/figure1

The rate of each activation is the best of TRIED by the training error in the third epoch, one seed each: `:search`. The
sweep itself trains with these RATES. Nothing regularises. The training error of an epoch is the mean over its batches
while it trains, and the epochs until it is at most 25 % are counted to a quarter of an epoch.

Published: ReLU reaches 25 % six times as fast as tanh. `configs/cifar10.py` describes the network.
"""

from configs import base
from configs.sweeps import Arm, Measure, Sweep, epochs_to, last

TRIED = (0.001, 0.003, 0.01, 0.03)
RATES = {"relu": 0.003, "tanh": 0.01}
EPOCHS = {"relu": 10.0, "tanh": 40.0}


def get_sweep(variant: str = "") -> Sweep:
    """The sweep; `variant` is '' or 'search'."""
    base.check_variant("configs/sweeps/figure1.py", variant, ("search",))
    if variant:
        arms = {
            f"{activation}_{rate}": Arm(
                {"model.activation": activation, "optimizer.learning_rate": rate, "num_epochs": 3.0}
            )
            for activation in RATES
            for rate in TRIED
        }
        measures, seeds, every = [Measure("training error in the last epoch", last("train/top1_error"))], (0,), 1.0
    else:
        arms = {
            activation: Arm(
                {
                    "model.activation": activation,
                    "optimizer.learning_rate": rate,
                    "num_epochs": EPOCHS[activation],
                }
            )
            for activation, rate in RATES.items()
        }
        measures = [Measure("epochs to 25 % training error", epochs_to("train/top1_error", 0.25), percent=False)]
        seeds, every = (0, 1, 2), 0.25
    return Sweep(
        config="configs/cifar10.py",
        overrides={"log_every.epochs": every, "log_every.steps": 0, "checkpoint_every.epochs": 5.0},
        arms=arms,
        measures=measures,
        seeds=seeds,
        curve="train/top1_error",
    )
