"""Small configs and batches for tests."""

import numpy as np

from configs import alexnet


def narrow(**model):
    """The paper's recipe at an eighth of the width on 67×67 views of 80×80 images, seven classes."""
    config = alexnet.get_config()
    config.batch_size = 20
    config.num_steps = 10
    config.input.update(resize=80, crop=67)
    config.model.update(dict(num_classes=7, width=0.125, init="2012") | model)
    config.optimizer.learning_rate = 0.02
    config.log_every.steps = 1
    config.eval_every.update(epochs=0.0, steps=5)
    config.checkpoint_every.update(epochs=0.0, steps=5)
    config.eval_batch_size = 16
    return config


def mean_image(size=80):
    """A mean image that is not flat."""
    return np.random.default_rng(5).uniform(100, 130, (size, size, 3)).astype(np.float32)


def batch(config, step):
    """A training batch as `input_pipeline.train_batches` yields it, whose labels can be read off the images."""
    random = np.random.default_rng((config.seed, step))
    count, size = config.batch_size, config.input.crop
    label = random.integers(0, config.model.num_classes, count).astype(np.int32)
    image = random.integers(0, 256, (count, size, size, 3)).astype(np.uint8)
    image[:, : size // 2] //= (1 + label % 7)[:, None, None, None].astype(np.uint8)
    return {
        "image": image,
        "label": label,
        "shift": random.normal(0, 12, (count, 3)).astype(np.float32),
        "gain": np.full(count, 1 / 1.1, np.float32),
    }
