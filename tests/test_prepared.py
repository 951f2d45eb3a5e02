"""A prepared set is read as it was written, or refused in one sentence that tells the cure."""

import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import input_pipeline
from common.errors import UserError
from configs import alexnet
from datasets import opening, prepared, preparing, tfrecords

TRAIN, TEST = 23, 13


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Lossless records of 32 pixels."""
    return data.prepare_folder(tmp_path_factory.mktemp("small"), TRAIN, TEST, size=32)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """JPEG records of 80 pixels."""
    return data.prepare_folder(tmp_path_factory.mktemp("large"), TRAIN, TEST, size=80)


def config_of(path, **dataset):
    """The paper's recipe for what `data.prepare_folder` made at `path`, with records of 32 pixels."""
    config = alexnet.get_config()
    places = dict(name=str(path / "photos"), data_dir=str(path / "data"), eval_split="test")
    config.dataset.update(places | dataset)
    config.input.update(resize=32, crop=28)
    return config


def open_records(config):
    return opening.open_records(config.dataset, config.input)


def read(records, split="train", batch_size=8):
    """All batches of a split, joined."""
    batches = list(input_pipeline.eval_batches(records, split, batch_size=batch_size, num_threads=1))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def copied(records, tmp_path):
    """The folder of a copy, in a `data_dir` of its own."""
    shutil.copytree(records.directory.parents[2], tmp_path / "data")
    return tmp_path / "data" / records.directory.relative_to(records.directory.parents[2])


# Splits.


def test_an_unknown_split_names_the_nearest(small):
    with pytest.raises(UserError, match=r"photos-32 has no split 'tests': did you mean test\?"):
        small.num_examples("tests")
    with pytest.raises(UserError, match=r"did you mean test\?"):
        small.index("tset[:50%]")
    for nonsense in ("train[", "train[:x]", "train[2:2]", "", "all[:5]", "train[:200%]", "train++test"):
        with pytest.raises(UserError):
            small.num_examples(nonsense)


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


@pytest.mark.parametrize("split", ["train[5:2]", "train[:0]", "train[90%:10%]"])
def test_a_part_without_images_is_refused(small, split):
    with pytest.raises(UserError, match="is empty"):
        small.num_examples(split)


def test_opening_checks_both_splits(small):
    config = config_of(small.directory.parents[3], eval_split="tests")
    with pytest.raises(UserError, match=r"has no split 'tests': did you mean test\?"):
        open_records(config)
    config.dataset.eval_split, config.dataset.train_split = "test", "train[:50%]"
    assert open_records(config).image_size == 32


@pytest.mark.parametrize("field", ["train_split", "eval_split", "test_split"])
def test_the_field_of_an_unknown_split_is_named(small, field):
    config = config_of(small.directory.parents[3], **{field: "train[:50%]+tests"})
    with pytest.raises(UserError, match=rf"dataset\.{field}.* has no split 'tests': did you mean test\?"):
        open_records(config)


# Images of two splits.


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
    open_records(config)
    out, err = capsys.readouterr()
    splits = f"eval_split={eval_split!r} are also in train_split={train_split!r}"
    assert out == ""
    assert err == (
        f"warning: {shared} images of {splits}: errors measured on it will look too low.\n" if shared else ""
    )


def test_what_was_left_out_is_said_at_every_start(tmp_path, capsys):
    folder = data.make_folder(tmp_path / "photos", {"train": 4, "test": 2}, size=40)
    (folder / "train/a/0000.jpg").write_bytes(b"")
    for _ in range(2):
        config = config_of(tmp_path, train_split="train", eval_split="test")
        config.dataset.allow_unreadable = 1
        open_records(config)
        said = f"warning: 1 files of {folder} could not be read and are left out, such as train/a/0000.jpg: the file is"
        assert capsys.readouterr().err.startswith(said)


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
        open_records(config)
        assert capsys.readouterr().err == said, eval_split


def test_the_test_split_is_compared_with_the_training_split_too(small, tmp_path, capsys):
    def said(**splits):
        open_records(config_of(small.directory.parents[3], **splits))
        return capsys.readouterr().err.splitlines()

    assert said(train_split="train[:18]", eval_split="train[18:]", test_split="test") == []
    (line,) = said(train_split="train[:18]", eval_split="test", test_split="train[15:]")
    assert line.startswith("warning: 3 images of test_split='train[15:]' are also in train_split='train[:18]'")
    first, second = said(eval_split="train[:4]", test_split="train[:5]")
    assert "4 images of eval_split='train[:4]'" in first and "5 images of test_split='train[:5]'" in second
    for test_split in ("", "train[:4]"):
        assert said(eval_split="train[:4]", test_split=test_split) == [first]


def test_a_copy_in_two_evaluated_splits_is_told_once(tmp_path, capsys):
    folder = data.make_folder(tmp_path / "photos", {"train": 4, "test": 3}, size=40)
    shutil.copy(folder / "train/a/0002.jpg", folder / "test/b/copy.jpg")
    open_records(config_of(tmp_path, eval_split="test[:100%]", test_split="test"))
    assert capsys.readouterr().err.count("warning: 1 images of 'test' are also in 'train'") == 1


# Damage.


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def changed_arrays(**changes):
    return lambda content: npz(**dict(np.load(io.BytesIO(content))) | changes)


def joined(lengths):
    """As if the first two records were one."""
    return np.array([lengths[0] + 16 + lengths[1], *lengths[2:]])


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
    ("prepared.json", changed_summary(unreadable=[{}])),
    ("prepared.json", changed_summary(overlap={"test/train": 3})),
    ("prepared.json", changed_summary(overlap={"test/train": "x"}, overlap_as={"test/train": [["a", "b"]]})),
    ("prepared.json", changed_summary(overlap={"test/train": 1}, overlap_as={"test/train": [["a"]]})),
    ("statistics.npz", changed_arrays(mean_image=np.zeros((31, 32, 3), np.float32))),
    ("statistics.npz", changed_arrays(principal_std=np.zeros(3))),
    ("statistics.npz", changed_arrays(principal_components=np.full((3, 3), np.nan, np.float32))),
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
    *[("label.labels.txt", flipped(at, bits)) for at in range(6) for bits in (1, 4, 32)],
    *[
        ("dataset_info.json", replaced(b"{SHARD_X_OF_Y}", to))
        for to in (b"{SHARD_X_OF_Z}", b"{SPLIT}", b"{", b"x/y", b"\\u0000")
    ],
    (RECORDS, None),
    (RECORDS, lambda content: content[: int.from_bytes(content[:8], "little") + 16]),
    (RECORDS, lambda content: content + content[: int.from_bytes(content[:8], "little") + 16]),
    (RECORDS, lambda content: flipped(content.index(b"IDAT") + 100)(content)),
    *[(RECORDS, lambda content, cut=cut: content[:-cut]) for cut in (1, 10, 2000)],
]


@pytest.mark.parametrize(("name", "change"), DAMAGES)
def test_a_damaged_set_is_one_sentence_with_the_cure(small, tmp_path, name, change):
    file = copied(small, tmp_path) / name
    content = file.read_bytes()
    file.unlink()
    if change:
        file.write_bytes(change(content))
    config = config_of(small.directory.parents[3], data_dir=str(tmp_path / "data"))
    with pytest.raises(UserError) as error:
        read(open_records(config))
    sentence = str(error.value)
    assert str(file.parent) in sentence
    assert sentence.endswith(f"delete {file.parents[1]} and prepare the data set again.")
    assert sentence.isprintable()


def test_a_file_cut_short_is_named(small, tmp_path):
    file = copied(small, tmp_path) / RECORDS
    os.truncate(file, file.stat().st_size - 1)
    for index in (file.with_name("index.npz"), None):  # with the stored index, and without
        with pytest.raises(UserError, match=rf"\({RECORDS} is cut short\); delete"):
            prepared.Records.open(file.parent)
        if index:
            index.unlink()


def test_one_flipped_bit_of_a_jpeg_is_seen(large, tmp_path):
    """A decoder makes another image of nearly all such files, and does not complain."""
    directory = copied(large, tmp_path)
    records, content = prepared.Records.open(directory), (directory / RECORDS).read_bytes()
    start, end = content.index(b"\xff\xd8"), content.index(b"\xff\xd9")
    for at in range(start, end, (end - start) // 9):
        (directory / RECORDS).write_bytes(flipped(at, 1 << at % 8)(content))
        with pytest.raises(UserError, match=f"A record of {directory} is damaged; delete .* prepare"):
            read(records)


def changed_examples(records, tmp_path, change):
    """A copy of the records, without a stored index, after `change` of each example of the training split."""
    import tensorflow as tf

    directory = copied(records, tmp_path)
    stored = tf.data.TFRecordDataset(directory / RECORDS).as_numpy_iterator()
    examples = [tf.train.Example.FromString(example) for example in stored]
    with tf.io.TFRecordWriter(str(directory / RECORDS)) as file:
        for number, example in enumerate(examples):
            change(number, example.features.feature)
            file.write(example.SerializeToString())
    (directory / "index.npz").unlink()
    return prepared.Records.open(directory)


def test_a_changed_label_is_seen(small, tmp_path):
    def change(number, feature):
        if number == 5:
            feature["label"].int64_list.value[0] ^= 1

    with pytest.raises(UserError, match="is damaged"):
        read(changed_examples(small, tmp_path, change))


def test_sets_without_fingerprints_can_be_read(small, tmp_path):
    """Earlier versions stored none."""

    def change(number, feature):
        del feature["fingerprint"]

    old, new = read(changed_examples(small, tmp_path, change)), read(small)
    for name in new:
        np.testing.assert_array_equal(old[name], new[name], err_msg=name)


@pytest.mark.parametrize("label", [-1, 3, 2**31 - 1])
def test_a_label_out_of_range_is_damage(small, tmp_path, label):
    def change(number, feature):
        del feature["fingerprint"]
        if number == 5:
            feature["label"].int64_list.value[0] = label

    records = changed_examples(small, tmp_path, change)
    expected = f"A record of {records.directory} is damaged; delete {records.directory.parent}"
    section = config_of(tmp_path).input
    stream = input_pipeline.train_batches(records, "train", options=section, batch_size=TRAIN, seed=0)
    for draw in (lambda: next(stream), lambda: read(records)):
        with pytest.raises(UserError, match=re.escape(expected)):
            draw()


# The stored index.

INDEX_DAMAGES = [
    *[lambda _, content=content: content for content in (b"", b"{", b"3")],
    (lambda content: content[: len(content) // 2]),
    (flipped(200)),
    (lambda _: npz(lengths=np.zeros(3, np.int64))),
    (changed_arrays(**{RECORDS: np.zeros(TRAIN, np.int64)})),
    (changed_arrays(**{RECORDS: np.zeros(TRAIN)})),
    (changed_arrays(**{RECORDS: np.array([-16, 1 << 60])})),
    (lambda content: changed_arrays(**{RECORDS: joined(np.load(io.BytesIO(content))[RECORDS])})(content)),
]


@pytest.mark.parametrize("change", INDEX_DAMAGES)
def test_a_damaged_index_is_made_again(small, tmp_path, change):
    """The files themselves tell where their records lie."""
    file = copied(small, tmp_path) / "index.npz"
    file.write_bytes(change(file.read_bytes()))
    damaged = file.read_bytes()
    np.testing.assert_array_equal(prepared.Records.open(file.parent).places.rows, small.places.rows)
    assert file.read_bytes() != damaged


def test_opening_does_not_scan(tmp_path, monkeypatch):
    folder = data.make_folder(tmp_path / "photos", {"train": 5, "test": 2})
    directory = preparing.prepare(str(folder), data_dir=str(tmp_path / "data"), size=32)
    monkeypatch.setattr(tfrecords, "scan", None)
    assert len(prepared.Records.open(directory).index("train+test")) == 7


def test_a_set_without_an_index_is_scanned_once(small, tmp_path, monkeypatch):
    """Earlier versions stored none."""
    directory = copied(small, tmp_path)
    (directory / "index.npz").unlink()
    opened = prepared.Records.open(directory)
    np.testing.assert_array_equal(opened.places.rows, small.places.rows)
    assert sorted(os.listdir(directory)) == sorted(os.listdir(small.directory))  # noqa: PTH208
    monkeypatch.setattr(tfrecords, "scan", None)
    prepared.Records.open(directory)


def test_a_set_that_cannot_be_written_is_scanned_each_time(small, tmp_path, monkeypatch):
    directory = copied(small, tmp_path)
    (directory / "index.npz").unlink()
    before = sorted(os.listdir(directory))  # noqa: PTH208

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    for _ in range(2):
        np.testing.assert_array_equal(prepared.Records.open(directory).places.rows, small.places.rows)
    assert sorted(os.listdir(directory)) == before  # noqa: PTH208


def test_a_damaged_header_matters_to_a_scan_only(small, tmp_path):
    directory = copied(small, tmp_path)
    for at in (0, 7):
        file = directory / RECORDS
        content = file.read_bytes()
        file.write_bytes(flipped(at)(content))
        np.testing.assert_array_equal(read(prepared.Records.open(directory))["image"], read(small)["image"])
        (directory / "index.npz").rename(tmp_path / "index.npz")
        with pytest.raises(UserError, match="is cut short"):
            prepared.Records.open(directory)
        (tmp_path / "index.npz").rename(directory / "index.npz")
        file.write_bytes(content)


def test_the_index_tells_where_each_record_lies(small):
    """Against the format of TFRecords, read front to back."""
    (file,) = small.directory.glob("*train*")
    content, at, rows = file.read_bytes(), 0, small.index("train").rows
    for number, offset, length in rows:
        assert small.places.files[number] == file
        assert length == int.from_bytes(content[at : at + 8], "little")
        assert offset == at + 12
        at += 16 + length
    assert at == len(content)
