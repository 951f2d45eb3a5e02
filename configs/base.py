"""The fields that every recipe has, with their types, units and neutral values: what a recipe does not set is off.

This is the schema: a config has exactly these fields, and in `model` those of its network. A field that is added here
later counts as neutral in configs that were stored before.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """A config without a network."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 0  # of all devices together; a recipe must set it
    config.eval_batch_size = 256
    config.num_epochs = 0.0
    config.num_steps = 0  # if not 0, counts instead of num_epochs
    config.mixup = 0.0  # alpha of the beta distribution of the shares in which two images, and targets, mix; 0 is never
    config.label_smoothing = 0.0  # share of each training target that all classes get alike
    # How often, in epochs or in steps; steps count if they are not 0. 0 and 0: after the last step only.
    config.log_every = dict(epochs=0.0, steps=100)
    config.eval_every = dict(epochs=1.0, steps=0)
    config.checkpoint_every = dict(epochs=1.0, steps=0)
    config.init_from = ""  # a workdir; start from those of its parameters that have the shapes of this network

    config.dataset = dict(
        name="",  # a TFDS name, or a folder ROOT with ROOT/SPLIT/CLASS/*.jpg
        data_dir="data",
        train_split="train",
        eval_split="test",  # evaluated while it trains; its error chooses the best checkpoint
        test_split="",  # for the errors at the end, with ten views; '' is eval_split
        allow_unreadable=0,  # files that may be left out of the prepared set
        max_pixels=100_000_000,  # larger images are refused before they are decoded
    )
    config.input = dict(
        resize=256,  # pixels, shorter side; then the central square
        crop=224,  # pixels
        crop_area=(),  # (least, most) share of a record in a training view, resized to `crop`; () resizes nothing
        random_crop=False,
        reflect=False,
        scale=1.0,  # multiplies the pixels after the mean is subtracted; 1 leaves them in 0–255
        channel_std=(1.0, 1.0, 1.0),  # divides R, G and B after that
        lighting_std=0.0,
        lighting_scale="std",  # the shift follows the 'std' or the 'variance' along each principal component
        lighting_until=0.0,  # epoch at which lighting ends; 0 is never
        lighting_again=(),  # ((first epoch, epoch at which it ends), …) of lighting after that
        lighting_divide=False,  # divide by 1 + lighting_std while lighting is on
        threads=0,  # for decoding; 0 takes all cores
    )
    config.model = dict(name="", num_classes=0, towers=1)  # and the fields of the network; see `models`
    config.optimizer = dict(
        name="sgd",  # or 'adam'
        learning_rate=0.0,
        momentum=0.0,
        weight_decay=0.0,  # of kernels
        layer_decay=(),  # that of single layers in its place: (('fc10', 1.0), …)
        bias_rate=1.0,  # the biases' learning rate, relative to the kernels'
        average=0.0,  # of the parameters: how much each counts beside the next, such as 0.999; 0 is the last ones alone
    )
    config.schedule = dict(
        name="constant",  # 'constant', 'steps', 'cosine' or 'plateau'; see `optimizer.schedule`
        warmup=0.0,  # epochs in which the rate grows linearly
        factors=(),  # for 'steps': ((epoch, factor of the learning rate), …)
        layers=(),  # further factors, of single layers: (('conv1', ((epoch, factor), …)), …); see `optimizer.Rates`
        patience=3,  # for 'plateau': evaluations without a new best before the rate is divided by 10
        reductions=3,  # for 'plateau': how often it is divided at most
    )
    config.parallel = dict(
        # 2 = a tower on each of two devices, 1 = both on each; 0 = 2 if each process has an even number of devices, but
        # 1 on a CPU, unless its devices are simulated with --cpu_devices
        devices_per_network=0,
        # On NVIDIA GPUs, normalisation and pooling behind a ReLU in one kernel (models/fused.py), in training and its
        # evaluations; the tools compute them apart.
        fused=False,
    )
    return config


def check_variant(file: str, variant: str, known: tuple[str, ...]) -> None:
    """Raises `UserError` if a recipe has no variant of this name; '' is the recipe itself."""
    from common.errors import UserError, nearest

    if variant and variant not in known:
        raise UserError(f"{file}:{variant}: there is no such variant, {nearest(variant, known)}")
