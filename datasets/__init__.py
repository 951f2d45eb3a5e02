"""Where images come from (`sources`, `shapes`), how they become records (`images`), and how records are stored.

TensorFlow and TFDS take seconds to import. They are imported here, in the functions that need them.
"""

import functools
import importlib
import os
import sys

BUILDERS = ("shapes",)  # the modules of this folder that define a TFDS builder


@functools.cache
def tensorflow():
    """Imports TensorFlow, without GPUs: it would take their memory from JAX."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # gains nothing here, and prints a notice
    os.environ.setdefault("KERAS_HOME", os.devnull)  # TensorFlow imports Keras, which would write ~/.keras/keras.json
    # Keras would import pyplot as well, which takes a second and writes a cache to the home folder.
    hidden = () if "matplotlib" in sys.modules else ("matplotlib",)
    sys.modules.update(dict.fromkeys(hidden))
    try:
        import tensorflow as tf
    finally:
        for name in hidden:
            del sys.modules[name]

    tf.config.set_visible_devices([], "GPU")
    return tf


@functools.cache
def tensorflow_datasets():
    """Imports TFDS, with our builders among its own and without its visits to Google's buckets."""
    tensorflow()
    import tensorflow_datasets as tfds

    # Later versions look there only when told to, but still leave an empty folder in TMPDIR.
    tfds.core.DatasetInfo.initialize_from_bucket = lambda info: None
    for module in BUILDERS:
        importlib.import_module(f"datasets.{module}")  # TFDS registers every builder class that it sees
    return tfds
