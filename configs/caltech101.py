"""AlexNet from scratch on Caltech-101, 30 training images a class, at a quarter of the paper's width.

    tar -xf caltech101.tar -C data            # gives data/caltech101/{train,test}/CLASS/*.jpg
    python main.py --config=configs/caltech101.py --workdir=runs/caltech101

Measured on two cores of a Xeon in about half an hour, seed 0: 46.9 % mean class accuracy on the test images with ten
views (top-1 error 54.5 %, top-5 30.6 %), and 41.9 % with the centre view, by
`python -m tools.evaluate --workdir=runs/caltech101 --views=centre`. It learns from 27 images a class, and the other
three choose the checkpoint, which was the last. Published: Zeiler and Fergus (2013, table 4) trained a network of
AlexNet's size on 30 images a class from scratch, 46.5 ± 1.7 %.

3,030 photographs are few. In trials of one to two epochs with the paper's initial weights the loss did not fall below
ln(101): nearly all of each map is then the same in every image, and dropout turns it into noise. So weights are
initialised after He et al., pixels come in units of their standard deviation, fewer outputs are dropped, and batches
are small. The loss is 4.49 after three epochs and 4.17 after five.
"""

import ml_collections

from configs import alexnet


def get_config() -> ml_collections.ConfigDict:
    """The recipe."""
    config = alexnet.get_config()
    config.batch_size = 32  # 95 updates an epoch; the paper's 128 would give 24
    config.num_epochs = 40.0
    config.log_every.steps = 50
    config.eval_every.epochs = 4.0
    config.checkpoint_every.epochs = 4.0
    config.dataset.name = "data/caltech101"
    # A tenth of the training images chooses the checkpoint, so that the test images are looked at once, at the end.
    config.dataset.train_split = "train[:90%]"
    config.dataset.eval_split = "train[90%:]"
    config.dataset.test_split = "test"
    config.input.scale = 1 / 64
    config.model.num_classes = 101
    config.model.width = 0.25
    config.model.init = "he"
    config.model.dropout_rate = 0.25
    config.optimizer.learning_rate = 0.02
    config.schedule.name = "steps"
    config.schedule.factors = ((30.0, 0.1), (37.0, 0.01))
    return config
