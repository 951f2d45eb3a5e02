"""Preparing: complete or not there at all, whatever the files, and whoever stops it or does the same meanwhile."""

import collections
import concurrent.futures
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types
import zlib

import numpy as np
import pytest
from PIL import Image

import data
from common import progress as bars
from common.errors import UserError
from datasets import images, locks, merging, portions, prepared, preparing, progress, shapes, sources, tfrecords

ROOT = pathlib.Path(__file__).parent.parent


def prepare(dataset, tmp_path, **options):
    """Prepares in tmp_path/data and opens."""
    return prepared.Records.open(
        preparing.prepare(str(dataset), data_dir=str(tmp_path / "data"), **{"size": 32} | options)
    )


def leftovers(tmp_path):
    """What lies in data/prepared."""
    return sorted(p.name for p in (tmp_path / "data/prepared").iterdir())


def test_a_folder_becomes_records_of_its_files(tmp_path):
    folder = data.make_folder(
        tmp_path / "photos", {"train": 9, "test": 4}, classes=("ant", "bee", "cat"), size=(50, 40)
    )
    opened = prepare(folder, tmp_path)
    assert opened.class_names == ("ant", "bee", "cat")
    assert (opened.num_classes, opened.image_size) == (3, 32)
    assert {split: opened.num_examples(split) for split in ("train", "test", "train[:3]")} == {
        "train": 9,
        "test": 4,
        "train[:3]": 3,
    }
    pixels = []
    for split in ("train", "test"):
        examples = data.stored(opened, split)
        assert set(examples) == {str(f.relative_to(folder)) for f in (folder / split).rglob("*.jpg")}
        for name, (image, label) in examples.items():
            assert opened.class_names[label] == name.split("/")[1]
            record, _ = images.to_record((folder / name).read_bytes(), 32, 10**6)
            assert image == record
            if split == "train":
                pixels.append(np.asarray(Image.open(io.BytesIO(image)), np.float64))
    pixels = np.stack(pixels)
    np.testing.assert_allclose(opened.mean_image, pixels.mean(0), rtol=1e-6)
    covariance = np.cov(pixels.reshape(-1, 3).T, bias=True)
    variances, vectors = np.linalg.eigh(covariance)
    np.testing.assert_allclose(opened.principal_std, np.sqrt(variances[::-1]), rtol=1e-4)
    np.testing.assert_allclose(abs(np.sum(opened.principal_components * vectors.T[::-1], axis=1)), 1, atol=1e-5)
    assert leftovers(tmp_path) == ["photos-32"]


def test_statistics_of_jpeg_records_are_close_to_those_of_what_is_decoded(tmp_path):
    opened = prepare(data.make_folder(tmp_path / "photos", {"train": 6}, size=(130, 110)), tmp_path, size=96)
    decoded = [np.asarray(Image.open(io.BytesIO(image))) for image, _ in data.stored(opened, "train").values()]
    # Encoding rounds the pixels; the mean image is taken before.
    assert abs(opened.mean_image - np.mean(decoded, axis=0)).mean() < 2


def test_a_training_split_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes.Shapes, "EXAMPLES", {"train": 10, "test": 10})
    with pytest.raises(UserError, match=r"shapes/1\.0\.0 has no split 'tarin': did you mean train\?"):
        prepare("shapes", tmp_path, train_split="tarin")
    assert leftovers(tmp_path) == []


def test_preparing_again_finds_what_is_there(tmp_path, capsys):
    folder = data.make_folder(tmp_path / "photos", {"train": 2})
    first = prepare(folder, tmp_path).directory
    before = {p: p.stat().st_mtime_ns for p in first.iterdir()}
    assert "Preparing 2 images" in capsys.readouterr().out
    assert prepare(folder, tmp_path).directory == first
    assert {p: p.stat().st_mtime_ns for p in first.iterdir()} == before
    assert capsys.readouterr().out == ""
    assert prepare(folder, tmp_path, size=40).directory != first


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    folder = data.make_folder(tmp_path / "photos [1]", {"train": 5})
    monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", 0)
    prepare(folder, tmp_path)
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines == [f"photos [1]: {i} of 5 images" for i in range(1, 6)]


def test_another_folder_of_the_same_name_is_not_mixed_up(tmp_path):
    prepare(data.make_folder(tmp_path / "one/photos", {"train": 2}), tmp_path)
    with pytest.raises(UserError, match=r"was prepared from .*one/photos, not from .*two/photos; delete it"):
        prepare(data.make_folder(tmp_path / "two/photos", {"train": 2}), tmp_path)
    with pytest.raises(UserError, match=r"was prepared from .*one/photos, not from .*two/photos; delete it"):
        prepare(tmp_path / "two/photos", tmp_path, again=True)


def test_a_folder_of_any_name_is_prepared(tmp_path):
    folder = tmp_path / os.fsdecode(b"my 2nd set (caf\xe9).v1-final")
    opened = prepare(data.make_folder(folder, {"train": 2}, classes=("a b", "ü,x")), tmp_path)
    assert opened.class_names == ("a b", "ü,x")
    assert opened.num_examples("train") == 2


def test_files_that_cannot_be_read_are_counted_and_allowed(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 4})
    (folder / "train/a/0000.jpg").write_bytes(b"")
    (folder / "train/b/large.png").write_bytes(data.encoded(Image.new("1", (1100, 1000)), "PNG"))
    with pytest.raises(UserError) as error:
        prepare(folder, tmp_path, allow_unreadable=1, max_pixels=10**6)
    sentence, *listed = str(error.value).splitlines()
    assert sentence.startswith("2 of 5 files cannot be read, 1 are allowed")
    assert "--allow_unreadable=2" in sentence
    assert listed == [
        "  train/a/0000.jpg: the file is empty",
        "  train/b/large.png: it declares 1100×1000 pixels, above the limit of 1,000,000",
    ]
    assert leftovers(tmp_path) == [".photos-32.partial"], "the next start need not convert the others again"

    opened = prepare(folder, tmp_path, allow_unreadable=2, max_pixels=10**6)
    assert opened.num_examples("train") == 3
    assert opened.index("train").rows.shape == (3, 3)
    assert [f"  {line}" for line in prepared.summary(opened.directory).unreadable] == listed


def test_a_split_without_one_readable_file_is_refused(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 2, "test": 0})
    (folder / "test/a/x.jpg").write_text("text")
    with pytest.raises(UserError, match=r"No file of the split 'test' can be read:\n  test/a/x\.jpg: not an image"):
        prepare(folder, tmp_path, allow_unreadable=5)


def test_a_label_out_of_range_is_refused(tmp_path, monkeypatch):
    file = data.encoded(data.picture("a", 0, 40))
    for label in (-1, 2):
        files = [portions.File(f"test/{i}\n", i if i < 2 else label, lambda: io.BytesIO(file)) for i in range(3)]
        made = portions.Portion("test-0", "test", 3, lambda files=files: iter(files))
        source = portions.Source("somewhere", ("a", "b"), (made,), 512)
        monkeypatch.setattr(sources, "open_source", lambda *_, source=source: source)
        with pytest.raises(UserError) as error:
            prepare("shapes", tmp_path, train_split="test")
        assert str(error.value) == rf"test/2\n of somewhere has the label {label}; it should be one of 0 … 1."
        assert leftovers(tmp_path) == []


def test_a_tfds_split_without_examples_is_left_out(tmp_path, monkeypatch):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    counts = {"train": 1, "test": 0}

    def as_dataset(split, **_):
        rows = {"image": [b"an image"], "label": [0]}
        return tf.data.Dataset.from_tensor_slices(rows).take(counts[split.partition("[")[0]])

    info = types.SimpleNamespace(
        features={"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["a"])},
        splits={name: types.SimpleNamespace(num_examples=count) for name, count in counts.items()},
        full_name="mnist/1.0.0",
    )
    builder = types.SimpleNamespace(info=info, is_prepared=lambda: True, as_dataset=as_dataset)
    monkeypatch.setattr(tfds, "builder", lambda *_, **__: builder)
    assert sources.open_source("mnist", str(tmp_path)).counts == {"train": 1}


def test_images_in_two_splits_are_counted_and_named(tmp_path):
    # Of the right size, so that they become records as they are, and a PNG of the same pixels does not.
    folder = data.make_folder(tmp_path / "photos", {"train": 8, "validation": 4, "test": 6}, size=80)
    train, test = folder / "train", folder / "test"
    (train / "a/bad.jpg").touch()  # those that cannot be read do not count, and shift nothing
    (test / "a/bad.jpg").touch()
    shutil.copy(train / "b/0007.jpg", test / "a/again.jpg")
    (test / "b/copy.jpg").symlink_to(train / "a/0002.jpg")
    Image.open(train / "a/0000.jpg").save(test / "b/as.png")  # the same pixels in another file
    shutil.copy(train / "a/0000.jpg", test / "b/twice.jpg")
    shutil.copy(test / "a/0000.jpg", test / "a/0000_again.jpg")  # within a split, which is nobody's concern
    shutil.copy(test / "a/0000.jpg", folder / "validation/a/as_in_test.jpg")

    opened = prepare(folder, tmp_path, size=80, allow_unreadable=2)
    summary = json.loads((opened.directory / "prepared.json").read_text())
    assert summary["overlap"] == {"test/train": 4}
    assert summary["overlap_as"] == {
        "test/train": [
            ["test/b/as.png", "train/a/0000.jpg"],
            ["test/b/twice.jpg", "train/a/0000.jpg"],
            ["test/b/copy.jpg", "train/a/0002.jpg"],
        ]
    }
    sentence = (
        "warning: 4 images of 'test' are also in 'train' (test/b/as.png is train/a/0000.jpg, test/b/twice.jpg is "
        "train/a/0000.jpg, test/b/copy.jpg is train/a/0002.jpg, …): errors measured on it will look too low."
    )
    assert prepared.summary(opened.directory).overlaps == {("test", "train"): sentence}
    # Sets prepared before overlaps were looked for can still be used.
    del summary["overlap"], summary["overlap_as"]
    (opened.directory / "prepared.json").write_text(json.dumps(summary))
    assert prepared.summary(opened.directory).overlaps == {}


def test_every_image_twice_is_found(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 3})
    shutil.copytree(folder / "train", folder / "test")
    directory = prepare(folder, tmp_path).directory
    (sentence,) = prepared.summary(directory).overlaps.values()
    named = ", ".join(f"test/{name}.jpg is train/{name}.jpg" for name in ("a/0000", "a/0002", "b/0001"))
    assert f"3 images of 'test' are also in 'train' ({named}): errors" in sentence


def test_one_holds_the_lock_at_a_time_though_it_is_removed_each_time(tmp_path):
    inside, most = [], []

    def work(_):
        with locks.hold(tmp_path / "data/prepared/.set.lock"):
            inside.append(0)
            most.append(len(inside))
            time.sleep(0.001)
            inside.pop()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(150)))
    assert max(most) == 1
    assert len(most) == 150
    assert leftovers(tmp_path) == []


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 2})
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot take"):
        prepare(folder, tmp_path)
    with pytest.raises(UserError, match=r"^~nobody-here/photos, .*home directory"):
        prepare("~nobody-here/photos", tmp_path)


# What TFDS writes.


@pytest.mark.parametrize("size", [32, 80])
def test_the_records_lie_as_tfds_would_write_them(tmp_path, monkeypatch, size):
    """Earlier versions let TFDS write. Their sets can be used, and a run on one draws what it draws on the other."""
    import tensorflow_datasets as tfds

    folder = data.make_folder(tmp_path / "photos", {"train": 700, "test": 5}, size=(44, 40))
    (folder / "train/a/0004.jpg").write_bytes(b"")  # leaves a gap in the keys
    monkeypatch.setattr(tfds.core.utils.shard_utils.ShardConfig, "min_shard_size", 1 << 17)
    monkeypatch.setattr(merging, "SHARD", 1 << 17)
    ours = prepare(folder, tmp_path, size=size, allow_unreadable=1)
    stored = {split: data.stored(ours, split) for split in ours.splits}

    def examples(split):
        for number, file in enumerate(sources.open_source(str(folder), "").files(split)):
            if file.name in stored[split]:
                image, label = stored[split][file.name]
                hashed = tfrecords.fingerprint(np.array([label]), np.array([image], object)).numpy()[0]
                values = {"image": io.BytesIO(image), "label": label, "file_name": file.name, "fingerprint": hashed}
                yield number, values

    builder = tfds.dataset_builders.AdhocBuilder(
        name="records",
        version="1.0.0",
        description=ours.splits["train"].name,
        features=tfds.builder_from_directory(ours.directory).info.features,
        split_datasets={split: examples(split) for split in ("test", "train")},
        data_dir=tmp_path / "theirs",
        file_format="tfrecord",
    )
    with progress.quiet():
        builder.download_and_prepare()
    directory = pathlib.Path(builder.data_path)
    names = {path.name for path in directory.iterdir()}
    assert len([name for name in names if "train" in name]) > 4
    assert names | {"index.npz", "prepared.json", "statistics.npz"} == {path.name for path in ours.directory.iterdir()}
    for name in ("prepared.json", "statistics.npz"):
        shutil.copy(ours.directory / name, directory)
    theirs = prepared.Records.open(directory)
    assert [path.name for path in theirs.places.files] == [path.name for path in ours.places.files]
    np.testing.assert_array_equal(theirs.places.rows, ours.places.rows)
    for split in ("train", "test", "train[:10%]"):
        assert list(data.stored(theirs, split).items()) == list(data.stored(ours, split).items())
        assert theirs.splits[split].num_bytes == ours.splits[split].num_bytes
    assert (directory / "features.json").read_bytes() == (ours.directory / "features.json").read_bytes()


def test_the_generated_set_is_balanced(tmp_path, monkeypatch):
    assert all(count % 10 == 0 for count in shapes.Shapes.EXAMPLES.values())
    monkeypatch.setattr(shapes.Shapes, "EXAMPLES", {"train": 40, "test": 20})
    opened = prepare("shapes", tmp_path)
    assert opened.class_names == shapes.CLASSES
    for split, count in (("train", 40), ("test", 20)):
        labels = [label for _, label in data.stored(opened, split).values()]
        assert collections.Counter(labels) == dict.fromkeys(range(10), count // 10)
    images = [image for split in ("train", "test") for image, _ in data.stored(opened, split).values()]
    assert len(set(images)) == 60


# Real processes.

# At the fourth image the process writes a file, and waits until somebody takes it away.
HELD = """
import pathlib, runpy, sys, time
from datasets import conversion
flag = pathlib.Path(sys.argv.pop(1))
original, seen = conversion.to_record, []
def to_record(*arguments):
    seen.append(arguments)
    if len(seen) == 4:
        flag.touch()
        end = time.monotonic() + 60
        while flag.exists() and time.monotonic() < end:
            time.sleep(0.02)
    return original(*arguments)
conversion.to_record = to_record
runpy.run_module("tools.prepare", run_name="__main__")
"""


def start(folder, tmp_path, program, *flags):
    return subprocess.Popen(
        [sys.executable, *program, f"--dataset={folder}", f"--data_dir={tmp_path / 'data'}", *flags],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("TF_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# What a process takes from pytest counts as its own peak until it starts one itself.
MEASURED = """
import os, pathlib, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, used = os.wait4(process.pid, 0)
pathlib.Path(sys.argv[1]).write_text(str(used.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def measured(folder, tmp_path, *flags, program=("-m", "tools.prepare")):
    """Runs to the end; returns the exit code, both outputs and the peak of memory in MiB."""
    peak = tmp_path / "peak"
    launch = ["-S", "-c", MEASURED, str(peak), sys.executable, *program]
    process = start(folder, tmp_path, launch, *flags)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err, int(peak.read_text()) / 1024


def test_hostile_files_become_records_or_a_line_each(tmp_path):
    home, outside = tmp_path / "photos/train/a", tmp_path / "outside"
    home.mkdir(parents=True)
    outside.mkdir()
    good, bad = data.make_hostile(home, outside)
    assert len(good) + len(bad) > 100
    for name in ("a.heic", "b.HEIC", "notes.txt", "Makefile", ".hidden.txt", ".hidden.jpg"):
        (home / name).touch()
    (home / "more").mkdir()

    code, out, err, peak = measured(tmp_path / "photos", tmp_path, "--size=32", f"--allow_unreadable={len(bad)}")
    assert (code, err) == (0, "")
    # 500 MiB of libraries, an image of 81 million pixels at 5 bytes each, a file of 100 MiB.
    assert peak < 1400, f"{peak:.0f} MiB"
    preparing, passed_over, *lines = out.splitlines()
    assert preparing.startswith(f"Preparing {len(good) + len(bad)} images")
    assert passed_over == "passed over: 5 files with other suffixes (.heic, .txt, folders, none)"
    assert all(line.isprintable() for line in lines)
    left_out = [line.removeprefix("left out     train/a/") for line in lines if line.startswith("left out ")]
    reasons = dict(line.split(": ", 1) for line in left_out)
    assert len(left_out) == len(reasons) == len(bad)
    for name, reason in bad.items():
        assert reason in reasons[progress.printable(name)], name
    opened = prepare(tmp_path / "photos", tmp_path)
    examples = data.stored(opened, "train")
    assert examples.keys() == {f"train/a/{name}" for name in good}
    for name, (left, right) in good.items():
        pixels = np.asarray(Image.open(io.BytesIO(examples[f"train/a/{name}"][0])), np.float64)
        np.testing.assert_allclose(pixels[:, :14].mean((0, 1)), left, atol=6, err_msg=name)
        np.testing.assert_allclose(pixels[:, -14:].mean((0, 1)), right, atol=6, err_msg=name)


MANY_CORES = """
import runpy
from common import host
host.cores = lambda: 16
runpy.run_module('tools.prepare', run_name='__main__')
"""


def test_many_cores_do_not_hold_many_large_images_at_once(tmp_path):
    home = tmp_path / "photos/train/a"
    home.mkdir(parents=True)
    pixels = zlib.compress((b"\0" + bytes(4 * 4000)) * 4000, 1)
    for i in range(6):  # 190 MB each while they are made opaque
        (home / f"{i}.png").write_bytes(data.png(4000, 4000, 8, 6, (b"IDAT", pixels)))
    for i in range(6):  # 120 MB each to read
        (home / f"{i}.jpg").write_bytes(data.encoded(data.picture("a", i)))
        os.truncate(home / f"{i}.jpg", 120_000_000)
    flags = "--size=32", "--max_pixels=16000000"
    code, _, err, peak = measured(tmp_path / "photos", tmp_path, *flags, program=("-c", MANY_CORES))
    assert (code, err) == (0, "")
    assert peak < 1000, f"{peak:.0f} MiB"


def wait_for(file, process):
    end = time.monotonic() + 60
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_a_killed_preparation_leaves_nothing_that_counts(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 6})
    process = start(folder, tmp_path, ["-c", HELD, str(tmp_path / "held")], "--size=32")
    wait_for(tmp_path / "held", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert leftovers(tmp_path) == [".photos-32.partial", ".photos.lock"]
    assert prepare(folder, tmp_path).num_examples("train") == 6
    assert leftovers(tmp_path) == ["photos-32"]


def test_two_preparations_at_once_do_the_work_once_and_quietly(tmp_path, capsys):
    folder = data.make_folder(tmp_path / "photos", {"train": 6, "test": 4})
    first = start(folder, tmp_path, ["-c", HELD, str(tmp_path / "held")])
    wait_for(tmp_path / "held", first)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        second = pool.submit(prepare, folder, tmp_path, size=256)
        said = ""
        while not said:
            said = capsys.readouterr().out
            time.sleep(0.02)
        (tmp_path / "held").unlink()
        out, err = first.communicate(timeout=60)
        opened = second.result(timeout=60)
    assert first.returncode == 0, err
    assert err == "", "TensorFlow or TFDS is heard"
    assert said + capsys.readouterr().out == "Another process prepares photos; waiting for it.\n"
    preparing, *summary = out.splitlines()
    assert preparing.startswith("Preparing 10 images of ")
    assert [line.split()[0] for line in summary] == ["records", "from", "test", "train", "classes", "mean", "principal"]
    assert opened.num_examples("train") == 6
    assert leftovers(tmp_path) == ["photos-256"]
