"""The generated set is reproducible, balanced and not too easy."""

import numpy as np
import pytest
from PIL import Image

from datasets import shapes


def test_an_example_of_shapes_is_a_function_of_its_number():
    first, again, other = (shapes.draw(3, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5
    assert (first.shape, first.dtype) == ((256, 256, 3), np.uint8)
    assert len(shapes.CLASSES) == 10


def test_two_cues_of_shapes_leave_classes_open():
    """No single cue names the class; every value of every cue has at least three classes."""
    for cue in range(3):
        values = [name.split("-")[cue] for name in shapes.CLASSES]
        assert all(values.count(value) >= 3 for value in set(values))


@pytest.mark.parametrize("count", [200, pytest.param(1200, marks=pytest.mark.slow)])
def test_shapes_are_not_told_apart_by_linear_classifiers(count):
    """Ridge regression on pixels at three sizes stays above half wrong, whatever its penalty."""
    labels, of_train = np.arange(count) % 10, count * 3 // 4
    images = [Image.fromarray(shapes.draw(label, np.random.default_rng((i, 9)))) for i, label in enumerate(labels)]
    for side in (8, 16, 32):
        x = np.stack([np.asarray(image.resize((side, side), Image.Resampling.BOX)) for image in images])
        x = x.reshape(len(x), -1) / 255.0
        train, test = x[:of_train] - x[:of_train].mean(0), x[of_train:] - x[:of_train].mean(0)
        kernel = train @ train.T
        targets = np.eye(10)[labels[:of_train]] - 0.1
        errors = []
        for penalty in (1e-2, 1, 1e1, 1e2, 1e3, 1e4):
            scores = test @ (train.T @ np.linalg.solve(kernel + penalty * np.eye(len(train)), targets))
            errors.append((scores.argmax(1) != labels[of_train:]).mean())
        print(f"{side}×{side}: {min(errors):.1%} of the test examples wrong at the best penalty")
        assert min(errors) > 0.5
