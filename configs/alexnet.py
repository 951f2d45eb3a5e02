"""AlexNet on ImageNet (ILSVRC-2012) after the text of the paper: Krizhevsky, Sutskever, Hinton, NIPS 2012.

    python -m tools.prepare --dataset=imagenet2012 --data_dir=data --manual_dir=WHERE_THE_TARS_ARE
    python main.py --config=configs/alexnet.py --workdir=runs/alexnet

Every number of the paper is a line below. With an even number of devices each pair shares a network, one tower on each
(section 3.2); `--config.parallel.devices_per_network=1` gives every device both towers.

Published: ten views 40.7 % top-1 and 18.2 % top-5 error on the validation set (table 2, "1 CNN"), after 90 epochs, 5 to
6 days on two GTX 580. Not measured here: this project has not yet trained on ImageNet.

Variants, as `configs/alexnet.py:NAME`:
    one_gpu      the paper's one-GPU network of equal cost, the baseline of section 3.2 (source: layers-145-half.cfg)
    no_exchange  towers that meet at fc8 only (source: layers-150.cfg)
    ungrouped    one tower as wide as both, what "AlexNet" means where grouping is left out
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe; `variant` is '', 'one_gpu', 'no_exchange' or 'ungrouped'."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 128  # section 5
    config.num_epochs = 90.0  # section 5: "roughly 90 cycles"
    config.num_steps = 0  # if not 0, counts instead of num_epochs
    # How often, in epochs or in steps; steps count if they are not 0. 0 and 0: never.
    config.log_every = dict(epochs=0.0, steps=100)
    config.eval_every = dict(epochs=1.0, steps=0)
    config.checkpoint_every = dict(epochs=1.0, steps=0)
    config.eval_batch_size = 256
    config.init_from = ""  # a workdir whose parameters to start from, where their shapes agree

    config.dataset = dict(
        name="imagenet2012",  # a TFDS name, or a folder ROOT with ROOT/SPLIT/CLASS/*.jpg
        data_dir="data",
        train_split="train",
        eval_split="validation",
        allow_unreadable=0,  # files that may be left out of the prepared set
        max_pixels=100_000_000,  # larger images are refused before they are decoded
    )
    config.input = dict(
        resize=256,  # pixels, shorter side; then the central square (section 2)
        crop=224,  # pixels (section 4.1)
        random_crop=True,
        reflect=True,
        scale=1.0,  # multiplies the pixels after the mean is subtracted; 1 leaves them in 0–255, as in the paper
        lighting_std=0.1,  # section 4.1
        lighting_scale="std",  # the source's reading; 'variance' is the paper's, whose text has the eigenvalue itself
        lighting_until=0.0,  # epoch at which lighting ends; 0 is never
        lighting_divide=False,  # divide by 1 + lighting_std where lighting is on, as the source does
        threads=0,  # for decoding; 0 takes all cores
    )
    config.model = dict(
        name="alexnet",
        num_classes=1000,
        width=1.0,  # multiplies the maps of every layer
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
        without=(),  # layers left out (section 7), as ('conv4',)
        order="paper",
        init="paper",  # section 5
        dtype="float32",
    )
    config.optimizer = dict(
        name="sgd",
        learning_rate=0.01,  # section 5
        momentum=0.9,  # section 5
        weight_decay=5e-4,  # section 5
        bias_rate=1.0,  # the biases' learning rate, relative
    )
    config.schedule = dict(
        name="plateau",  # section 5: divided by 10 when the validation error stopped improving, three times
        patience=3,  # evaluations without a new best; the paper's authors judged by eye
        reductions=3,  # section 5
        factors=(),  # with name='steps': ((epoch, factor of the learning rate), …)
        layers=(),  # the same for single layers: (('conv1', ((epoch, factor), …)), …)
    )
    config.parallel = dict(
        devices_per_network=0,  # 2 = a tower on each of two devices, 1 = both on each; 0 = 2 where the number is even
    )

    if variant == "one_gpu":
        config.model.towers = 1
    elif variant == "no_exchange":
        config.model.exchange = ()
        config.model.features = (96, 320, 384, 384, 256, 8192, 4096)
    elif variant == "ungrouped":
        config.model.towers = 1
        config.model.features = (96, 256, 384, 384, 256, 4096, 4096)
    elif variant:
        from errors import UserError, nearest

        raise UserError(
            f"configs/alexnet.py:{variant}: there is no such variant, "
            f"{nearest(variant, ['one_gpu', 'no_exchange', 'ungrouped'])}"
        )
    return config
