"""A narrow AlexNet on the generated set `shapes` (draft)."""

import ml_collections

from configs import alexnet


def get_config() -> ml_collections.ConfigDict:
    """The recipe."""
    config = alexnet.get_config()
    config.num_epochs = 12.0
    config.dataset.name = "shapes"
    config.dataset.eval_split = "test"
    config.model.num_classes = 10
    config.model.width = 0.25
    config.model.init = "2012"
    config.log_every = dict(epochs=0.0, steps=10)
    return config
