"""AlexNet from scratch on Caltech-101, 30 training images a class, at a quarter of the paper's width.

    python main.py --config=configs/caltech101.py --workdir=runs/caltech101

Measured on two cores of an AMD EPYC, about 40 minutes a run on one core, seeds 0 to 2: 58.5, 59.0 and 59.4 %, mean
**59.0 ± 0.5 %** mean class accuracy on the test images with ten views (top-1 error 41.8 %, top-5 20.5 %), and 56.8 %
with the centre view. Published: Zeiler and Fergus (2013, table 4) trained a network of AlexNet's size on 30 images a
class from scratch, 46.5 ± 1.7 %.

The photographs lie in data/caltech101/{train,test}/CLASS/*.jpg; docs/reproduction.md says which they are.

3,030 photographs are few. In trials of one to two epochs with the paper's initial weights the loss did not fall below
ln(101): nearly all of each map is then the same in every image, and dropout turns it into noise. So weights are
initialised after He et al., pixels come in units of their standard deviation, fewer outputs are dropped, and batches
are small. Views of random areas, mixup, smoothed labels and an average of the weights are against overfitting. All was
settled on a fifth of the training images (docs/reproduction.md), and then all 30 of each class train; the test images
are looked at once, at the end. configs/sweeps/caltech101.py takes these means away one by one.

    python main.py --config=configs/caltech101.py:plain --workdir=runs/caltech101_plain

has none of these means, and as in the paper a validation error, of a tenth of the training images, chooses the
checkpoint. Measured on two cores of a Xeon in about half an hour, seed 0: 46.9 % mean class accuracy with ten views
(top-1 error 54.5 %, top-5 30.6 %), and 41.9 % with the centre view, by
`python -m tools.evaluate --workdir=runs/caltech101_plain --views=centre`. The loss is 4.49 after three epochs and 4.17
after five. The comparisons of configs/sweeps/claims.py and configs/finetune.py were made with this one.
"""

import ml_collections

from configs import alexnet, base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe; `variant` is '' or 'plain'."""
    base.check_variant("configs/caltech101.py", variant, ("plain",))
    config = alexnet.get_config()
    config.batch_size = 32  # 95 updates an epoch, of 30 images a class; the paper's 128 would give 24
    config.log_every.steps = 50
    config.dataset.name = "data/caltech101"
    config.dataset.test_split = "test"
    config.input.scale = 1 / 64
    config.model.num_classes = 101
    config.model.width = 0.25
    config.model.init = "he"
    config.model.dropout_rate = 0.25
    if variant == "plain":
        config.num_epochs = 40.0
        config.eval_every.epochs = 4.0
        config.checkpoint_every.epochs = 4.0
        config.dataset.train_split = "train[:90%]"
        config.dataset.eval_split = "train[90%:]"
        config.optimizer.learning_rate = 0.02
        config.schedule.name = "steps"
        config.schedule.factors = ((30.0, 0.1), (37.0, 0.01))
        return config
    config.num_epochs = 120.0
    config.eval_every.epochs = 0.0  # after the last step alone, on the test images
    config.checkpoint_every.epochs = 10.0
    config.dataset.train_split = "train"
    config.dataset.eval_split = "test"
    config.input.resize = 216  # smaller than the paper's 256 and 224, to save time
    config.input.crop = 192
    config.input.crop_area = (0.25, 1.0)
    config.mixup = 0.5
    config.label_smoothing = 0.1
    config.optimizer.average = 0.999
    config.optimizer.weight_decay = 0.001
    config.optimizer.learning_rate = 0.01
    config.schedule.name = "cosine"
    config.schedule.warmup = 2.0
    return config
