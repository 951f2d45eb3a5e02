"""The paper's figure 1: a four-layer network on CIFAR-10, ReLU beside tanh, no regularisation.

    python main.py --config=configs/cifar10.py --workdir=runs/cifar_relu
    python main.py --config=configs/cifar10.py:tanh --workdir=runs/cifar_tanh

The paper does not say which network; this is layers-19pct.cfg of the source of 2012, without weight decay. Published:
ReLU reaches 25 % training error six times as fast, each with the learning rate that suited it best. Tune
`--config.optimizer.learning_rate` for each before comparing.

`--config.dataset.name=data/cifar10` takes a folder of 32×32 images instead of the TFDS set. Records of 32×32 are stored
as PNG, without loss.
"""

import ml_collections

from configs import alexnet
from errors import UserError


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe; `variant` is '' for ReLU or 'tanh'."""
    if variant not in ("", "tanh"):
        raise UserError(f"configs/cifar10.py:{variant}: the only variant is tanh.")
    config = alexnet.get_config()
    config.num_epochs = 30.0
    config.dataset.name = "cifar10"
    config.dataset.eval_split = "test"
    config.input.update(resize=32, crop=32, random_crop=False, reflect=False, lighting_std=0.0)
    config.eval_batch_size = 1000
    config.model = dict(
        name="cifar",
        num_classes=10,
        activation=variant or "relu",
        lrn=False,
        towers=1,
        dtype="float32",
    )
    config.optimizer.learning_rate = 0.001
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "steps"
    return config
