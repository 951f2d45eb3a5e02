"""The stream is a function of (seed, place) alone; views are crops; evaluation sees each example once."""

import gc
import itertools
import os
import pathlib
import re
import resource
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import input_pipeline
from common.errors import UserError
from configs import alexnet
from datasets import prepared

TRAIN, TEST = 23, 13
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Lossless records of 32 pixels."""
    return data.prepare_folder(tmp_path_factory.mktemp("small"), TRAIN, TEST, size=32)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """JPEG records of 80 pixels."""
    return data.prepare_folder(tmp_path_factory.mktemp("large"), TRAIN, TEST, size=80)


def options(**changes):
    """The input section of the paper's recipe, changed."""
    section = alexnet.get_config().input
    section.update(changes)
    return section


PLAIN = dict(resize=32, crop=32, random_crop=False, reflect=False, lighting_std=0.0)


def batches(records, count, split="train", batch_size=8, seed=3, **changes):
    keywords = {k: changes.pop(k) for k in list(changes) if k not in alexnet.get_config().input}
    section = options(**(dict(resize=records.image_size, crop=records.image_size - 13) | changes))
    stream = input_pipeline.train_batches(
        records, split, options=section, batch_size=batch_size, seed=seed, **{"num_threads": 2} | keywords
    )
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


def whole(records, split):
    """All images and labels of a split, in the order of storage, read by TFDS and decoded by Pillow."""
    stored = list(data.stored(records, split).values())
    return np.stack([data.decoded(image) for image, _ in stored]), np.array([label for _, label in stored])


def assert_same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


# The stream.


def test_shapes_and_types(large):
    (batch,) = batches(large, 1)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "image": ((8, 67, 67, 3), "uint8"),
        "label": ((8,), "int32"),
        "shift": ((8, 3), "float32"),
        "gain": ((8,), "float32"),
    }


def test_threads_do_not_change_the_stream(large):
    one = batches(large, 7, num_threads=1)
    assert_same(one, batches(large, 7, num_threads=2))
    assert_same(one, batches(large, 7, num_threads=4))
    assert (one[0]["image"] != batches(large, 1, seed=4)[0]["image"]).any()


@pytest.mark.parametrize("start", [1, 2, 3, 6])
def test_to_resume_is_to_begin_later(large, start):
    assert_same(batches(large, 8)[start:], batches(large, 8 - start, start_step=start))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_one_stream(large, processes):
    parts = [batches(large, 4, process_index=p, process_count=processes) for p in range(processes)]
    joined = [{k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts, strict=True)]
    assert_same(batches(large, 4), joined)


def test_a_batch_must_divide_over_the_processes(large):
    with pytest.raises(UserError, match="batch_size=8 does not divide over 3"):
        batches(large, 1, process_count=3)
    with pytest.raises(UserError, match="eval_batch_size=8 does not divide over 3"):
        next(input_pipeline.eval_batches(large, "test", batch_size=8, process_count=3))


@pytest.mark.parametrize("batch_size", [1, 8, TRAIN, 50])
def test_every_epoch_has_each_example_once(small, batch_size):
    images, labels = whole(small, "train")
    number = {image.tobytes(): i for i, image in enumerate(images)}
    stream = batches(small, -(-3 * TRAIN // batch_size), batch_size=batch_size, **PLAIN)
    seen = np.array([number[image.tobytes()] for batch in stream for image in batch["image"]])
    np.testing.assert_array_equal(labels[seen], np.concatenate([batch["label"] for batch in stream]))
    epochs = seen[: 3 * TRAIN].reshape(3, TRAIN)
    np.testing.assert_array_equal(np.sort(epochs), np.arange(TRAIN)[None].repeat(3, 0))
    assert len({tuple(epoch) for epoch in epochs}) == 3, "the same order twice"


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    start=st.integers(0, 5000),
    lengths=st.lists(st.integers(1, 90)),
)
def test_the_order_is_a_function_of_the_place(count, seed, start, lengths):
    parts, at = [], start
    for length in lengths:
        parts.append(input_pipeline.example_numbers(count, seed, at + np.arange(length)))
        at += length
    epochs = input_pipeline.example_numbers(count, seed, np.arange((at // count + 1) * count))
    np.testing.assert_array_equal(np.concatenate([*parts, []]), epochs[start:at])
    np.testing.assert_array_equal(
        np.sort(epochs.reshape(-1, count)), np.arange(count)[None].repeat(len(epochs) // count, 0)
    )


def test_orders_are_uniform_over_epochs_and_over_seeds():
    numbers = input_pipeline.example_numbers
    for orders in (
        numbers(10, 0, np.arange(30_000)).reshape(-1, 10),
        np.stack([numbers(10, seed, np.arange(10)) for seed in range(3000)]),
    ):
        for place in range(10):
            assert scipy.stats.chisquare(np.bincount(orders[:, place], minlength=10)).pvalue > 1e-5
        following = np.mean(orders[:-1, 0] == orders[1:, 0])
        assert abs(following - 0.1) < 0.03, "an epoch's order follows from the one before"


# Views.


def statistics(size=256):
    """Records without files, whose principal components are known."""
    components, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    return prepared.Records(
        directory=pathlib.Path("nowhere"),
        class_names=("a",),
        mean_image=np.zeros((size, size, 3), np.float32),
        principal_std=np.array([60.0, 12.0, 5.0], np.float32),
        principal_components=components.astype(np.float32),
    )


def draw(count, seed=0, start=0, examples=1000, **changes):
    return input_pipeline.draw_views(statistics(), options(**changes), examples, seed, start + np.arange(count))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**62), start=st.integers(0, 10**12), cut=st.integers(0, 20))
def test_draws_are_a_function_of_the_place(seed, start, cut):
    pieces = [draw(n, seed, at) for n, at in ((cut, start), (20 - cut, start + cut)) if n]
    for together, apart in zip(draw(20, seed, start), map(np.concatenate, zip(*pieces, strict=True)), strict=True):
        np.testing.assert_array_equal(together, apart)


def test_corners_and_reflections_are_uniform():
    window, reflect, _, _ = draw(200_000)
    corner = window[:, :2]
    assert corner.min() == 0
    assert corner.max() == 32, "256 − 224 has 33 places a side, the last among them"
    cells = np.bincount((corner[:, 0] * 33 + corner[:, 1]) * 2 + reflect, minlength=33 * 33 * 2)
    assert scipy.stats.chisquare(cells).pvalue > 1e-5
    # and what comes next does not depend on it
    pairs = np.bincount((corner[:-1, 0] // 11) * 3 + corner[1:, 0] // 11)
    assert scipy.stats.chi2_contingency(pairs.reshape(3, 3)).pvalue > 1e-5


def test_without_chance_views_are_central_and_upright():
    window, reflect, shift, gain = draw(50, random_crop=False, reflect=False, lighting_std=0.0)
    assert (window == (16, 16, 224)).all()
    assert not reflect.any()
    assert not shift.any()
    assert (gain == 1).all()


@pytest.mark.parametrize("scale", ["std", "variance"])
def test_lighting_follows_the_principal_components(scale):
    """Section 4.1: shifts along the components, normal with 0.1 times σ (source of 2012) or σ² (the paper's text)."""
    known = statistics()
    _, _, shift, _ = draw(200_000, lighting_scale=scale)
    std, components = known.principal_std.astype(np.float64), known.principal_components.astype(np.float64)
    spread = 0.1 * (std if scale == "std" else std**2)
    expected = components.T @ np.diag(spread**2) @ components
    np.testing.assert_allclose(np.cov(shift.T.astype(np.float64)), expected, atol=0.02 * abs(expected).max())
    normal = shift @ components.T / spread
    for component in normal.T:
        assert scipy.stats.kstest(component, "norm").pvalue > 1e-5
        assert scipy.stats.pearsonr(component[:-1], component[1:]).pvalue > 1e-5
    np.testing.assert_allclose(np.corrcoef(normal.T), np.eye(3), atol=0.012)


def test_lighting_is_independent_of_the_crop():
    window, reflect, shift, _ = draw(100_000)
    columns = np.concatenate([window[:, :2], reflect[:, None], shift @ statistics().principal_components.T], axis=1)
    np.testing.assert_allclose(np.corrcoef(columns.astype(np.float64).T), np.eye(6), atol=0.02)


def test_lighting_ends_and_divides():
    _, _, shift, gain = draw(400, examples=100, lighting_until=2.0, lighting_divide=True, scale=0.5)
    assert (abs(shift[:200]).max(1) > 0).all()
    assert not shift[200:].any()
    # `input.scale` is applied on the device.
    np.testing.assert_allclose(gain, np.where(np.arange(400) < 200, 1 / 1.1, 1), rtol=1e-6)
    np.testing.assert_allclose(draw(5)[3], 1)


def test_lighting_comes_back():
    _, _, shift, gain = draw(
        500, examples=100, lighting_until=1.0, lighting_again=((2.0, 3.0), (4, 4.5)), lighting_divide=True
    )
    on = np.repeat([True, False, True, False, True, False], [100, 100, 100, 100, 50, 50])
    np.testing.assert_array_equal(shift.any(1), on)
    np.testing.assert_allclose(gain, np.where(on, 1 / 1.1, 1), rtol=1e-6)


@pytest.mark.parametrize("which", ["small", "large"])
def test_views_are_crops_of_whole_records_mirrored_where_drawn(which, request):
    records = request.getfixturevalue(which)
    images, labels = whole(records, "train")
    # Half the side: the views begin and end at many places of the blocks of a JPEG, of 16 pixels.
    count, crop, seed = 160, records.image_size // 2, 11
    section = options(resize=records.image_size, crop=crop)
    places = np.arange(count)
    window, reflect, shift, gain = input_pipeline.draw_views(records, section, TRAIN, seed, places)
    numbers = input_pipeline.example_numbers(TRAIN, seed, places)
    (batch,) = batches(records, 1, batch_size=count, seed=seed, crop=crop)
    assert 0 < reflect.sum() < count
    for i, (top, left, _) in enumerate(window):
        expected = images[numbers[i], top : top + crop, left : left + crop]
        np.testing.assert_array_equal(batch["image"][i], expected[:, ::-1] if reflect[i] else expected)
    np.testing.assert_array_equal(batch["label"], labels[numbers])
    np.testing.assert_array_equal(batch["shift"], shift)
    np.testing.assert_array_equal(batch["gain"], gain)


@pytest.mark.parametrize("which", ["small", "large"])
def test_views_of_a_random_area_are_resized(which, request):
    """Compared with Pillow, which also weights all pixels where it shrinks."""
    records = request.getfixturevalue(which)
    images, _ = whole(records, "train")
    count, crop, seed = 96, records.image_size // 2, 11
    section = options(resize=records.image_size, crop=crop, crop_area=(0.1, 0.9))
    places = np.arange(count)
    window, reflect, _, _ = input_pipeline.draw_views(records, section, TRAIN, seed, places)
    numbers = input_pipeline.example_numbers(TRAIN, seed, places)
    (batch,) = batches(records, 1, batch_size=count, seed=seed, crop=crop, crop_area=(0.1, 0.9))
    sides = window[:, 2]
    assert (sides < crop).any()
    assert (sides > crop).any()
    for i, (top, left, side) in enumerate(window):
        part = PIL.Image.fromarray(images[numbers[i], top : top + side, left : left + side])
        expected = np.asarray(part.resize((crop, crop), PIL.Image.Resampling.BILINEAR)).astype(int)
        np.testing.assert_allclose(batch["image"][i], expected[:, ::-1] if reflect[i] else expected, atol=1)


def test_areas_are_uniform_and_their_places_too():
    window, reflect, shift, _ = draw(100_000, crop_area=(0.25, 0.75))
    side = window[:, 2].astype(np.float64)
    area = side**2 / 256**2
    assert 0.245 < area.min() < 0.255
    assert 0.745 < area.max() < 0.755
    # The sides are whole pixels, so areas are spread evenly only about that far.
    assert scipy.stats.kstest(area, "uniform", (0.25, 0.5)).statistic < 0.01
    place = window[:, :2] / (256 - side[:, None])
    assert place.min() == 0
    assert place.max() == 1
    columns = np.column_stack([area, place, reflect, shift @ statistics().principal_components.T])
    np.testing.assert_allclose(np.corrcoef(columns.T), np.eye(7), atol=0.02)
    np.testing.assert_array_equal(reflect, draw(100_000)[1], "other draws stay as they are")
    central, *_ = draw(20, crop_area=(0.25, 0.75), random_crop=False)
    np.testing.assert_array_equal(central[:, 0], (256 - central[:, 2]) // 2)


# Evaluation and splits.


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (4, 1), (4, 2), (4, 4), (13, 1), (16, 2), (40, 4)])
def test_evaluation_has_each_example_once_in_order(large, batch_size, processes):
    images, labels = whole(large, "test")
    parts = [
        list(
            input_pipeline.eval_batches(
                large, "test", batch_size=batch_size, process_index=p, process_count=processes, num_threads=2
            )
        )
        for p in range(processes)
    ]
    assert {len(part) for part in parts} == {-(-TEST // batch_size)}
    joined = {k: np.concatenate([b[k] for step in zip(*parts, strict=True) for b in step]) for k in parts[0][0]}
    assert {len(b["label"]) for part in parts for b in part} == {batch_size // processes}
    np.testing.assert_array_equal(joined["mask"], np.arange(len(joined["mask"])) < TEST)
    np.testing.assert_array_equal(joined["image"][:TEST], images)
    np.testing.assert_array_equal(joined["label"][:TEST], labels)
    assert [joined[k].dtype.name for k in ("image", "label", "mask")] == ["uint8", "int32", "float32"]


def test_a_slice_trains_on_its_own_examples(small):
    images, _ = whole(small, "train")
    part = batches(small, 3, split="train[:5]", batch_size=5, **PLAIN)
    for batch in part:
        assert {image.tobytes() for image in batch["image"]} == {image.tobytes() for image in images[:5]}


# What can go wrong.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resize", 0),
        ("crop", 257),
        ("crop", 0),
        ("crop_area", (0.5,)),
        ("crop_area", (0.0, 1.0)),
        ("crop_area", (0.6, 0.5)),
        ("crop_area", (0.5, 1.5)),
        ("crop_area", (0.5, True)),
        ("crop_area", (float("nan"), 1.0)),
        ("lighting_scale", "deviation"),
        ("scale", 0.0),
        ("scale", float("nan")),
        ("lighting_std", -0.1),
        ("lighting_std", float("nan")),
        ("lighting_until", float("inf")),
        ("lighting_again", (91.0, 124.0)),
        ("lighting_again", ((124.0, 91.0),)),
        ("lighting_again", ((91.0, True),)),
        ("threads", -1),
    ],
)
def test_values_that_cannot_work_are_named(field, value):
    input_pipeline.validate(options())
    with pytest.raises(UserError, match=re.escape(f"input.{field}={value!r}")):
        input_pipeline.validate(options(**{field: value}))


# Resources.


def open_files():
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_files_are_closed_when_a_stream_is_dropped(small):
    def run():
        batches(small, 2)
        evaluation = input_pipeline.eval_batches(small, "test", batch_size=4)
        next(evaluation)
        evaluation.close()
        gc.collect()

    run()
    before = open_files()
    for _ in range(3):
        run()
    end = time.monotonic() + 5
    while open_files() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert open_files() <= before


def test_memory_does_not_grow_with_the_stream(small):
    stream = input_pipeline.train_batches(
        small, "train", options=options(resize=32, crop=28), batch_size=64, seed=0, num_threads=2
    )
    for _ in range(20):
        next(stream)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(180):
        next(stream)
    stream.close()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 20, f"{grown:.0f} MiB more after 11,520 images"  # which are 27 MB of pixels


def test_importing_the_pipeline_does_not_import_tensorflow():
    program = "import input_pipeline, sys; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
