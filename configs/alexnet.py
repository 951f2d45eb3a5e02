"""AlexNet on ImageNet (ILSVRC-2012) after the text of the paper: Krizhevsky, Sutskever, Hinton, NIPS 2012.

    python -m tools.prepare --dataset=imagenet2012 --data_dir=data --manual_dir=WHERE_THE_TARS_ARE
    python main.py --config=configs/alexnet.py --workdir=runs/alexnet

Every number of the paper is a line below, but for the sizes of the layers and the deviations of the initial weights:
these are the tables at the top of models/alexnet.py. With an even number of GPUs or TPU chips in a process each pair
shares a network, one tower on each (section 3.2); `--config.parallel.devices_per_network=1` gives every device both
towers.

Published: ten views 40.7 % top-1 and 18.2 % top-5 error on the validation set (table 2, "1 CNN"), after 90 epochs, 5 to
6 days on two GTX 580. Not measured here: this project has not yet trained on ImageNet.

Variants, as `configs/alexnet.py:NAME`:
    one_gpu      the paper's one-GPU network of equal cost, the baseline of section 3.2 (source: layers-145-half.cfg)
    no_exchange  towers that meet at fc8 only, wider in conv2 and fc6 (source: layers-150.cfg)
    ungrouped    one tower as wide as both, what "AlexNet" means where grouping is left out
"""

import ml_collections

from configs import base

VARIANTS = ("one_gpu", "no_exchange", "ungrouped")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe; `variant` is '', 'one_gpu', 'no_exchange' or 'ungrouped'."""
    base.check_variant("configs/alexnet.py", variant, VARIANTS)
    config = base.get_config()
    config.batch_size = 128  # section 5
    config.num_epochs = 90.0  # section 5: "roughly 90 cycles"

    config.dataset.name = "imagenet2012"
    config.dataset.eval_split = "validation"
    config.input.update(
        resize=256,  # pixels, shorter side; then the central square (section 2)
        crop=224,  # pixels (section 4.1)
        random_crop=True,
        reflect=True,
        scale=1.0,  # the paper leaves pixels in 0–255
        lighting_std=0.1,  # section 4.1
        lighting_scale="std",  # the source's reading; the paper's text has the eigenvalue itself, the variance
    )
    config.model = dict(
        name="alexnet",
        num_classes=1000,
        width=1.0,  # multiplies the maps of every layer but fc8
        features=(),  # maps of conv1 … fc7, all towers together; () for the paper's
        activation="relu",  # section 3.1
        lrn=True,  # section 3.3, with its constants
        lrn_k=2.0,
        lrn_n=5,
        lrn_alpha=1e-4,
        lrn_beta=0.75,
        pool_window=3,  # section 3.4, z
        pool_stride=2,  # section 3.4, s
        dropout_rate=0.5,  # section 4.2
        towers=2,  # section 3.2
        exchange=("conv3", "fc6", "fc7"),  # section 3.5; fc8 always joins the towers
        without=(),  # layers left out (section 7), such as ('conv4',)
        order="paper",
        init="paper",  # section 5
        dtype="float32",
    )
    config.optimizer.update(
        name="sgd",
        learning_rate=0.01,  # section 5
        momentum=0.9,  # section 5
        weight_decay=5e-4,  # section 5
    )
    config.schedule.update(
        name="plateau",  # section 5: divided by 10 when the validation error stopped improving, three times
        patience=3,  # evaluations without a new best; the paper's authors judged by eye
        reductions=3,  # section 5
    )

    if variant == "one_gpu":
        config.model.towers = 1
    elif variant == "no_exchange":
        config.model.exchange = ()
        config.model.features = (96, 320, 384, 384, 256, 8192, 4096)
    elif variant == "ungrouped":
        config.model.towers = 1
        config.model.features = (96, 256, 384, 384, 256, 4096, 4096)
    return config
