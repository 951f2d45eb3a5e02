"""The demo: a narrow AlexNet in two towers on the generated set `shapes`, in minutes on two CPU cores.

    make demo

or, after the set-up,

    python main.py --config=configs/demo.py --workdir=runs/demo --cpu_devices=2
"""

import ml_collections

from configs import alexnet


def get_config() -> ml_collections.ConfigDict:
    """The recipe."""
    config = alexnet.get_config()
    config.batch_size = 50
    config.num_epochs = 12.0
    config.log_every.steps = 25
    config.eval_every.epochs = 2.0
    config.checkpoint_every.epochs = 2.0
    config.eval_batch_size = 100
    config.dataset.name = "shapes"
    config.dataset.eval_split = "test"
    config.input.scale = 1 / 64
    config.model.num_classes = 10
    config.model.width = 0.25
    config.model.init = "he"
    config.optimizer.learning_rate = 0.02
    config.schedule.name = "steps"
    config.schedule.factors = ((9.0, 0.1),)
    return config
