"""The stream is a function of (seed, place) and nothing else; views are crops; evaluation sees each example once."""

import gc
import io
import itertools
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import input_pipeline
from configs import alexnet
from errors import UserError

TRAIN, TEST = 23, 13
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Lossless records of 32 pixels."""
    return prepared(tmp_path_factory.mktemp("small"), 32)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """JPEG records of 80 pixels."""
    return prepared(tmp_path_factory.mktemp("large"), 80)


def prepared(path, size):
    data.make_folder(path / "photos", {"train": TRAIN, "test": TEST}, classes=("a", "b", "c"), size=(100, 90))
    return input_pipeline.Records.open(
        input_pipeline.prepare(str(path / "photos"), data_dir=str(path / "data"), size=size)
    )


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
        records, split, input=section, batch_size=batch_size, seed=seed, **{"num_threads": 2} | keywords
    )
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


def whole(records, split):
    """All images and labels of a split, in the order of storage, read by TFDS and decoded by Pillow."""
    import tensorflow_datasets as tfds

    undecoded = {"image": tfds.decode.SkipDecoding()}
    examples = list(tfds.builder_from_directory(records.directory).as_dataset(split=split, decoders=undecoded))
    images = [np.asarray(Image.open(io.BytesIO(e["image"].numpy()))) for e in examples]
    return np.stack(images), np.array([int(e["label"]) for e in examples])


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
        parts.append(input_pipeline._example_numbers(count, seed, at + np.arange(length)))
        at += length
    epochs = input_pipeline._example_numbers(count, seed, np.arange((at // count + 1) * count))
    np.testing.assert_array_equal(np.concatenate([*parts, []]), epochs[start:at])
    np.testing.assert_array_equal(
        np.sort(epochs.reshape(-1, count)), np.arange(count)[None].repeat(len(epochs) // count, 0)
    )


def test_orders_are_uniform_over_epochs_and_over_seeds():
    numbers = input_pipeline._example_numbers
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
    return input_pipeline.Records(
        directory=pathlib.Path("nowhere"),
        class_names=("a",),
        mean_image=np.zeros((size, size, 3), np.float32),
        principal_std=np.array([60.0, 12.0, 5.0], np.float32),
        principal_components=components.astype(np.float32),
    )


def draw(count, seed=0, start=0, examples=1000, **changes):
    return input_pipeline._draw(statistics(), options(**changes), examples, seed, start + np.arange(count))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), start=st.integers(0, 10**12), cut=st.integers(0, 20))
def test_draws_are_a_function_of_the_place(seed, start, cut):
    pieces = [draw(n, seed, at) for n, at in ((cut, start), (20 - cut, start + cut)) if n]
    for together, apart in zip(draw(20, seed, start), map(np.concatenate, zip(*pieces, strict=True)), strict=True):
        np.testing.assert_array_equal(together, apart)


def test_corners_and_reflections_are_uniform():
    corner, reflect, _, _ = draw(200_000)
    assert corner.min() == 0
    assert corner.max() == 32, "256 − 224 has 33 places a side, the last among them"
    cells = np.bincount((corner[:, 0] * 33 + corner[:, 1]) * 2 + reflect, minlength=33 * 33 * 2)
    assert scipy.stats.chisquare(cells).pvalue > 1e-5
    # and what comes next does not depend on it
    pairs = np.bincount((corner[:-1, 0] // 11) * 3 + corner[1:, 0] // 11)
    assert scipy.stats.chi2_contingency(pairs.reshape(3, 3)).pvalue > 1e-5


def test_without_chance_views_are_central_and_upright():
    corner, reflect, shift, gain = draw(50, random_crop=False, reflect=False, lighting_std=0.0)
    assert (corner == 16).all()
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
    corner, reflect, shift, _ = draw(100_000)
    columns = np.concatenate([corner, reflect[:, None], shift @ statistics().principal_components.T], axis=1)
    np.testing.assert_allclose(np.corrcoef(columns.astype(np.float64).T), np.eye(6), atol=0.02)


def test_lighting_ends_and_divides():
    _, _, shift, gain = draw(400, examples=100, lighting_until=2.0, lighting_divide=True, scale=0.5)
    assert (abs(shift[:200]).max(1) > 0).all()
    assert not shift[200:].any()
    np.testing.assert_allclose(gain, np.where(np.arange(400) < 200, 0.5 / 1.1, 0.5), rtol=1e-6)
    np.testing.assert_allclose(draw(5)[3], 1)


@pytest.mark.parametrize("which", ["small", "large"])
def test_views_are_crops_of_whole_records_mirrored_where_drawn(which, request):
    records = request.getfixturevalue(which)
    images, labels = whole(records, "train")
    crop, seed = records.image_size - 13, 11
    section = options(resize=records.image_size, crop=crop)
    g = np.arange(40)
    corner, reflect, shift, gain = input_pipeline._draw(records, section, TRAIN, seed, g)
    numbers = input_pipeline._example_numbers(TRAIN, seed, g)
    joined = {
        k: np.concatenate([b[k] for b in batches(records, 5, seed=seed)]) for k in ("image", "label", "shift", "gain")
    }
    assert 0 < reflect.sum() < 40
    for i in range(40):
        top, left = corner[i]
        expected = images[numbers[i], top : top + crop, left : left + crop]
        np.testing.assert_array_equal(joined["image"][i], expected[:, ::-1] if reflect[i] else expected)
    np.testing.assert_array_equal(joined["label"], labels[numbers])
    np.testing.assert_array_equal(joined["shift"], shift)
    np.testing.assert_array_equal(joined["gain"], gain)


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


@settings(max_examples=30, deadline=None)
@given(percent=st.integers(5, 95))
def test_slices_part_a_split(small, percent):
    first, second = (small.index(f"train[{part}]") for part in (f":{percent}%", f"{percent}%:"))
    rows = np.concatenate([first.rows, second.rows])
    np.testing.assert_array_equal(rows, small.index("train").rows)
    assert len(first) == small.num_examples(f"train[:{percent}%]")
    joined = small.index("train+test")
    assert len(joined) == len(joined.rows) == TRAIN + TEST
    assert len(set(map(tuple, joined.rows))) == TRAIN + TEST


def test_a_slice_trains_on_its_own_examples(small):
    images, _ = whole(small, "train")
    part = batches(small, 3, split="train[:5]", batch_size=5, **PLAIN)
    for batch in part:
        assert {image.tobytes() for image in batch["image"]} == {image.tobytes() for image in images[:5]}


# What can go wrong.


def damaged(records, tmp_path, change):
    """A copy of the records after `change` of the bytes of the training split."""
    directory = tmp_path / "photos-32" / records.directory.name
    shutil.copytree(records.directory, directory)
    (file,) = directory.glob("*train*")
    file.write_bytes(change(bytearray(file.read_bytes())))
    return input_pipeline.Records.open(directory), file


def test_a_file_cut_short_is_named(small, tmp_path):
    for cut in (1, 10, 2000):
        records, file = damaged(small, tmp_path / str(cut), lambda content, cut=cut: content[:-cut])
        with pytest.raises(UserError) as error:
            batches(records, 1)
        assert str(file) in str(error.value)


def test_a_damaged_record_names_its_folder(small, tmp_path):
    at, size = small.index("train").rows[4, 1:]

    def change(content):
        content[at + 40 : at + size] = bytes(size - 40)
        return content

    records, file = damaged(small, tmp_path, change)
    with pytest.raises(UserError) as error:
        batches(records, 4)
    assert str(file.parent) in str(error.value)
    with pytest.raises(UserError):
        list(input_pipeline.eval_batches(records, "train", batch_size=8))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resize", 0),
        ("crop", 257),
        ("crop", 0),
        ("lighting_scale", "deviation"),
        ("scale", 0.0),
        ("scale", float("nan")),
        ("lighting_std", -0.1),
        ("lighting_std", float("nan")),
        ("lighting_until", float("inf")),
        ("threads", -1),
    ],
)
def test_values_that_cannot_work_are_named(field, value):
    input_pipeline.validate(options())
    with pytest.raises(UserError, match=f"input.{field}={value!r}".replace("(", ".")):
        input_pipeline.validate(options(**{field: value}))


def config_of(path, **dataset):
    """The paper's recipe for what `prepared` made at `path`, with records of 32 pixels."""
    config = alexnet.get_config()
    places = dict(name=str(path / "photos"), data_dir=str(path / "data"), eval_split="test")
    config.dataset.update(places | dataset)
    config.input.update(resize=32, crop=28)
    return config


def test_opening_checks_both_splits(tmp_path):
    data.make_folder(tmp_path / "photos", {"train": 2, "test": 1}, size=40)
    config = config_of(tmp_path, eval_split="tests")
    with pytest.raises(UserError, match=r"has no split 'tests': did you mean test\?"):
        input_pipeline.open_records(config.dataset, config.input)
    config.dataset.eval_split, config.dataset.train_split = "test", "train[:50%]"
    assert input_pipeline.open_records(config.dataset, config.input).image_size == 32


@pytest.mark.parametrize(
    ("train_split", "eval_split", "shared"),
    [
        ("train", "test", 0),
        ("train", "train", TRAIN),
        ("train[:18]", "train[18:]", 0),
        ("train[:18]", "train[15:]", 3),
        ("train[15:]", "train[:18]", 3),
        ("train[5:9]", "train", 4),
        ("train[:50%]", "train[50%:]+test", 0),
        ("train", "test+train[-2:]+train[-1:]", 2),
    ],
)
def test_images_of_both_splits_are_counted(small, capsys, train_split, eval_split, shared):
    config = config_of(small.directory.parents[3], train_split=train_split, eval_split=eval_split)
    input_pipeline.open_records(config.dataset, config.input)
    out, err = capsys.readouterr()
    splits = f"eval_split={eval_split!r} are also in train_split={train_split!r}"
    assert out == ""
    assert err == (
        f"warning: {shared} images of {splits}: errors measured on it will look too low.\n" if shared else ""
    )


def test_copies_of_training_images_are_told_to_those_who_use_both_splits(tmp_path, capsys):
    folder = data.make_folder(tmp_path / "photos", {"train": 4, "validation": 2, "test": 2}, size=40)
    shutil.copy(folder / "train/a/0002.jpg", folder / "test/b/copy.jpg")
    sentence = (
        "warning: 1 images of 'test' are also in 'train' (test/b/copy.jpg is train/a/0002.jpg): errors measured on it "
        "will look too low.\n"
    )
    for eval_split, said in (
        ("test", sentence),
        ("test", sentence),
        ("validation", ""),
        ("validation+test[:1]", sentence),
    ):
        config = config_of(tmp_path, eval_split=eval_split)
        input_pipeline.open_records(config.dataset, config.input)
        assert capsys.readouterr().err == said, eval_split


# A prepared set that is not as it was left.


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def changed_statistics(**changes):
    return lambda content: npz(**dict(np.load(io.BytesIO(content))) | changes)


def changed_summary(**changes):
    return lambda content: json.dumps(json.loads(content) | changes).encode()


def replaced(old, new):
    def change(content):
        assert old in content
        return content.replace(old, new)

    return change


def flipped(at, bits=255):
    return lambda content: content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]


RECORDS = "records-train.tfrecord-00000-of-00001"
DAMAGES = [
    *[
        (file, what)
        for file in ("prepared.json", "statistics.npz", "features.json", "dataset_info.json")
        for what in (
            None,
            lambda _: b"",
            lambda _: b"{",
            lambda _: b"3",
            lambda _: b"\xff\xfe",
            lambda content: content[: len(content) // 2],
        )
    ],
    ("prepared.json", lambda _: b"[" * 100_000),
    ("prepared.json", changed_summary(origin=3)),
    ("prepared.json", changed_summary(examples=[])),
    ("prepared.json", changed_summary(examples={"train": TRAIN, "test": "13"})),
    ("prepared.json", changed_summary(unreadable=[{}])),
    ("prepared.json", changed_summary(overlap={"test/train": 3})),
    ("prepared.json", changed_summary(overlap={"test/train": "x"}, overlap_as={"test/train": [["a", "b"]]})),
    ("prepared.json", changed_summary(overlap={"test/train": 1}, overlap_as={"test/train": [["a"]]})),
    ("statistics.npz", changed_statistics(mean_image=np.zeros((31, 32, 3), np.float32))),
    ("statistics.npz", changed_statistics(principal_std=np.zeros(3))),
    ("statistics.npz", changed_statistics(principal_components=np.full((3, 3), np.nan, np.float32))),
    ("statistics.npz", lambda _: npz(mean_image=np.zeros((32, 32, 3), np.float32))),
    ("statistics.npz", flipped(3000)),
    ("features.json", replaced(b'"32"', b'"33"')),
    ("features.json", replaced(b'"numClasses": "3"', b'"numClasses": "2"')),
    ("features.json", replaced(b'"label"', b'"lable"')),
    ("dataset_info.json", replaced(b'"23"', b'"22"')),
    ("dataset_info.json", replaced(b'"23"', b'"-1"')),
    ("dataset_info.json", replaced(b'"train"', b'"tarin"')),
    ("dataset_info.json", replaced(b'"records"', b'"../photos"')),
    ("label.labels.txt", None),
    ("label.labels.txt", lambda _: b"a\nb\n"),
    ("label.labels.txt", lambda _: b"\xff"),
    (RECORDS, None),
    (RECORDS, lambda content: content[: int.from_bytes(content[:8], "little") + 16]),
    (RECORDS, lambda content: content + content[: int.from_bytes(content[:8], "little") + 16]),
    (RECORDS, flipped(0)),
    (RECORDS, flipped(7)),
    (RECORDS, lambda content: flipped(content.index(b"IDAT") + 100)(content)),
]


@pytest.mark.parametrize(("name", "change"), DAMAGES)
def test_a_damaged_set_is_one_sentence_with_the_cure(small, tmp_path, name, change):
    shutil.copytree(small.directory.parents[2], tmp_path / "data")
    (file,) = (tmp_path / "data").rglob(name)
    content = file.read_bytes()
    file.unlink()
    if change:
        file.write_bytes(change(content))
    config = config_of(small.directory.parents[3], data_dir=str(tmp_path / "data"))
    with pytest.raises(UserError) as error:
        records = input_pipeline.open_records(config.dataset, config.input)
        list(input_pipeline.eval_batches(records, "train", batch_size=8))
    sentence = str(error.value)
    assert str(file.parent) in sentence
    assert sentence.endswith(f"delete {file.parents[1]} and prepare the data set again.")
    assert sentence.isprintable()


def test_one_flipped_bit_of_a_jpeg_is_seen(large, tmp_path):
    """Of nearly all of them a decoder makes another image, and does not complain."""
    (file,) = large.directory.glob("*train*")
    start = file.read_bytes().index(b"\xff\xd8")
    end = file.read_bytes().index(b"\xff\xd9")
    for at in range(start, end, (end - start) // 25):
        records, _ = damaged(large, tmp_path / str(at), flipped(at, 1 << at % 8))
        with pytest.raises(UserError, match=f"A record of {records.directory} is damaged; delete .* prepare"):
            list(input_pipeline.eval_batches(records, "train", batch_size=8, num_threads=1))


def changed_examples(small, tmp_path, change):
    """A copy of the records after `change` of each example of the training split."""
    import tensorflow as tf

    directory = tmp_path / "photos-32" / small.directory.name
    shutil.copytree(small.directory, directory)
    files = tf.data.TFRecordDataset(directory / RECORDS).as_numpy_iterator()
    examples = [tf.train.Example.FromString(example) for example in files]
    with tf.io.TFRecordWriter(str(directory / RECORDS)) as file:
        for number, example in enumerate(examples):
            change(number, example.features.feature)
            file.write(example.SerializeToString())
    return input_pipeline.Records.open(directory)


def test_a_changed_label_is_seen(small, tmp_path):
    def change(number, feature):
        if number == 5:
            feature["label"].int64_list.value[0] ^= 1

    with pytest.raises(UserError, match=r"is damaged"):
        list(input_pipeline.eval_batches(changed_examples(small, tmp_path, change), "train", batch_size=4))


def test_sets_of_earlier_versions_can_be_read(small, tmp_path):
    def change(number, feature):
        del feature["fingerprint"]

    old = input_pipeline.eval_batches(changed_examples(small, tmp_path, change), "train", batch_size=4)
    assert_same(list(old), list(input_pipeline.eval_batches(small, "train", batch_size=4)))


@pytest.mark.parametrize("label", [-1, 3, 2**31 - 1])
def test_a_label_that_is_none_is_named_where_it_is_read(small, tmp_path, label):
    def change(number, feature):
        del feature["fingerprint"]
        if number == 5:
            feature["label"].int64_list.value[0] = label

    records = changed_examples(small, tmp_path, change)
    directory = records.directory
    expected = f"A record of {directory} has the label {label}, and the classes are 0 … 2; delete {directory.parent}"
    for stream in (
        input_pipeline.train_batches(records, "train", input=options(**PLAIN), batch_size=TRAIN, seed=0),
        input_pipeline.eval_batches(records, "train", batch_size=4),
    ):
        with pytest.raises(UserError, match=re.escape(expected)):
            list(itertools.islice(stream, TRAIN))


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
    for _ in range(5):
        run()
    end = time.monotonic() + 5
    while open_files() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert open_files() <= before


def test_memory_does_not_grow_with_the_stream(small):
    stream = input_pipeline.train_batches(
        small, "train", input=options(resize=32, crop=28), batch_size=64, seed=0, num_threads=2
    )
    for _ in range(30):
        next(stream)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300):
        next(stream)
    stream.close()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 20, f"{grown:.0f} MiB more after 19,200 images"  # which are 45 MB of pixels


def test_importing_the_pipeline_does_not_import_tensorflow():
    program = "import input_pipeline, sys; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
