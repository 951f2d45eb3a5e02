"""AlexNet from scratch on Caltech-101 (draft)."""

import ml_collections

from configs import alexnet


def get_config() -> ml_collections.ConfigDict:
    """The recipe."""
    config = alexnet.get_config()
    config.num_epochs = 30.0
    config.dataset.name = "data/caltech101"
    config.dataset.eval_split = "test"
    config.model.num_classes = 101
    config.model.init = "2012"
    return config
