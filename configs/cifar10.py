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

from configs import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe; `variant` is '' for ReLU or 'tanh'."""
    base.check_variant("configs/cifar10.py", variant, ("tanh",))
    config = base.get_config()
    config.batch_size = 128
    config.num_epochs = 30.0
    config.eval_batch_size = 1000
    config.dataset.name = "cifar10"
    config.dataset.eval_split = "test"
    config.input.update(resize=32, crop=32)  # whole images, neither cropped nor reflected
    config.model = dict(
        name="cifar",
        num_classes=10,
        activation=variant or "relu",
        lrn=False,
        towers=1,
        dtype="float32",
    )
    config.optimizer.learning_rate = 0.001
    config.optimizer.momentum = 0.9
    config.schedule.name = "steps"  # without factors: the rate stays as it is, unless an override gives some
    return config
