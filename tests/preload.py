"""What a forked run of `main.py` finds imported; see `runs`."""

import datasets

datasets.tensorflow_datasets()  # before clu, which would import TensorFlow without its settings

import clu.metric_writers  # noqa: E402, F401

import main  # noqa: E402, F401
import train  # noqa: E402, F401
