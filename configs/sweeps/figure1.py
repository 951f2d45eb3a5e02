"""The paper's figure 1: how fast the training error of a four-layer network falls on CIFAR-10, with ReLU and with tanh.

    python -m tools.sweep --sweep=configs/sweeps/figure1.py:search --workdir=runs/figure1_search
    python -m tools.sweep --sweep=configs/sweeps/figure1.py --workdir=runs/figure1

The learning rate of each activation is the best of TRIED by the training error in the third epoch, with one seed: that
is `:search`. It tries sigmoid too, which learns so slowly that the comparison leaves it out (docs/reproduction.md).
Nothing regularises. The training error is a mean over the batches of a quarter of an epoch while it trains.

Published: ReLU reaches 25 % six times as fast as tanh. Measured: 6.8 times, three seeds (docs/reproduction.md).
`configs/cifar10.py` describes the network.
"""

from configs import base
from configs.sweeps import Arm, Measure, Sweep, epochs_to, last

ERROR = "train/top1_error"
TO_25 = "epochs to 25 % training error"
TRIED = (0.001, 0.003, 0.01, 0.03)
RATES = {"relu": 0.003, "tanh": 0.01}
EPOCHS = {"relu": 10.0, "tanh": 50.0}  # some more than it takes


def get_sweep(variant: str = "") -> Sweep:
    """The sweep; `variant` is '' or 'search'."""
    base.check_variant("configs/sweeps/figure1.py", variant, ("search",))

    def arm(activation, rate, epochs, published):
        overrides = {"model.activation": activation, "optimizer.learning_rate": rate, "num_epochs": epochs}
        return Arm(overrides, published)

    if variant:
        arms = {f"{name}_{rate}": arm(name, rate, 3.0, {}) for name in (*RATES, "sigmoid") for rate in TRIED}
        measure, seeds, every = Measure("training error in the third epoch", last(ERROR)), (0,), 1.0
    else:
        published = {"relu": {}, "tanh": {TO_25: 6.0}}
        arms = {name: arm(name, rate, EPOCHS[name], published[name]) for name, rate in RATES.items()}
        measure, seeds, every = Measure(TO_25, epochs_to(ERROR, 0.25), ratio=True), (0, 1, 2), 0.25
    return Sweep(
        config="configs/cifar10.py",
        arms=arms,
        measures=(measure,),
        seeds=seeds,
        overrides={"log_every.epochs": every, "log_every.steps": 0, "checkpoint_every.epochs": 5.0},
        curve=ERROR,
    )
