"""What a forked run of `main.py` finds imported; see `runs`."""

import os

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "KERAS_HOME": os.devnull}

import clu.metric_writers  # noqa: F401
import tensorflow  # noqa: F401
import tensorflow_datasets  # noqa: F401

import main  # noqa: F401
import train  # noqa: F401
