"""Preparing: complete or not there at all, whatever the files, and whoever stops it or does the same meanwhile."""

import collections
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import data
import input_pipeline
from datasets import progress, records, shapes
from errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


def prepare(dataset, tmp_path, **options):
    """Prepares in tmp_path/data and opens."""
    return input_pipeline.Records.open(
        input_pipeline.prepare(str(dataset), data_dir=str(tmp_path / "data"), **{"size": 32} | options)
    )


def stored(opened, split):
    """The examples of a split as TFDS itself reads them: file name → (encoded image, label)."""
    import tensorflow_datasets as tfds

    examples = tfds.builder_from_directory(opened.directory).as_dataset(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    found = [(e["file_name"].decode(), (e["image"], int(e["label"]))) for e in examples.as_numpy_iterator()]
    assert len(dict(found)) == len(found)
    return dict(found)


def leftovers(tmp_path):
    """What lies in data/prepared beside locks."""
    return sorted(p.name for p in (tmp_path / "data/prepared").iterdir() if not p.name.endswith(".lock"))


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
        examples = stored(opened, split)
        assert set(examples) == {str(f.relative_to(folder)) for f in (folder / split).rglob("*.jpg")}
        for name, (image, label) in examples.items():
            assert opened.class_names[label] == name.split("/")[1]
            record, _ = records.to_record((folder / name).read_bytes(), 32, 10**6)
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
    decoded = [np.asarray(Image.open(io.BytesIO(image))) for image, _ in stored(opened, "train").values()]
    # Encoding rounds the pixels; the mean image is taken before.
    assert abs(opened.mean_image - np.mean(decoded, axis=0)).mean() < 2


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
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    prepare(folder, tmp_path)
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines == [f"photos [1]: {i} of 5 images" for i in range(1, 6)]


def test_another_folder_of_the_same_name_is_not_mixed_up(tmp_path):
    prepare(data.make_folder(tmp_path / "one/photos", {"train": 2}), tmp_path)
    with pytest.raises(UserError, match=r"was prepared from .*one/photos, not from .*two/photos"):
        prepare(data.make_folder(tmp_path / "two/photos", {"train": 2}), tmp_path)


def test_a_folder_of_any_name_is_prepared(tmp_path):
    folder = tmp_path / os.fsdecode(b"my 2nd set (caf\xe9).v1-final")
    opened = prepare(data.make_folder(folder, {"train": 2}, classes=("a b", "ü,x")), tmp_path)
    assert opened.class_names == ("a b", "ü,x")
    assert opened.num_examples("train") == 2


def test_an_unknown_split_names_the_nearest(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 2, "validation": 2})
    opened = prepare(folder, tmp_path)
    with pytest.raises(UserError, match=r"photos-32 has no split 'valid': did you mean validation\?"):
        opened.num_examples("valid")
    with pytest.raises(UserError, match=r"did you mean validation\?"):
        opened.index("valid[:50%]")
    for nonsense in ("train[", "train[:x]", "train[2:2]", ""):
        with pytest.raises(UserError):
            opened.num_examples(nonsense)


def make_hostile(folder):
    """Files of which some can be used and some cannot; returns the names of those that cannot."""
    data.make_folder(folder, {"train": 4}, classes=("a", "b"))
    home = folder / "train/a"
    rgb = data.picture("a", 0, 60)
    for name, image, format in (
        ("cmyk.JPEG", rgb.convert("CMYK"), "JPEG"),
        ("png.JPEG", rgb, "PNG"),
        ("gif.JPEG", rgb, "GIF"),
        ("grey.jpg", rgb.convert("L"), "JPEG"),
        ("deep.png", Image.fromarray(np.arange(3600, dtype=np.uint16).reshape(60, 60) * 18), "PNG"),
        ("alpha.png", rgb.convert("RGBA"), "PNG"),
        ("one.png", Image.new("RGB", (1, 1)), "PNG"),
        (" two\nlines .jpg", rgb, "JPEG"),
        (os.fsdecode(b"caf\xe9.jpg"), rgb, "JPEG"),
    ):
        (home / name).write_bytes(data.encoded(image, format))
    (home / "empty.jpg").touch()
    (home / "text.jpg").write_text("this is no image")
    (home / "short.jpg").write_bytes((home / "0000.jpg").read_bytes()[:-400])
    (home / os.fsdecode(b"bad\xff\n.jpg")).write_bytes(b"x")
    (home / "large.png").write_bytes(data.encoded(Image.new("1", (1100, 1000)), "PNG"))
    (home / "folder.jpg").mkdir()
    (home / "dangling.jpg").symlink_to("nowhere")
    os.mkfifo(home / "pipe.jpg")
    return {
        "empty.jpg": "empty",
        "text.jpg": "not an image",
        "short.jpg": "truncated",
        r"bad\udcff\n.jpg": "not an image",
        "large.png": "1100×1000",
        "folder.jpg": "regular file",
        "dangling.jpg": "No such file",
        "pipe.jpg": "regular file",
    }


def test_hostile_files_are_listed_and_counted(tmp_path):
    folder = tmp_path / "photos"
    bad = make_hostile(folder)
    with pytest.raises(UserError) as error:
        prepare(folder, tmp_path, allow_unreadable=len(bad) - 1, max_pixels=10**6)
    sentence, *listed = str(error.value).splitlines()
    assert sentence.startswith(f"{len(bad)} of {len(bad) + 13} files cannot be read, {len(bad) - 1} are allowed")
    assert f"--allow_unreadable={len(bad)}" in sentence
    assert len(listed) == len(bad)
    for name, why in bad.items():
        assert any(line.startswith(f"  train/a/{name}: ") and why in line for line in listed), (name, listed)
    assert leftovers(tmp_path) == []

    opened = prepare(folder, tmp_path, allow_unreadable=len(bad), max_pixels=10**6)
    assert opened.num_examples("train") == 13
    assert opened.index("train").rows.shape == (13, 3)
    summary = json.loads((opened.directory / "prepared.json").read_text())
    assert {item["file"] for item in summary["unreadable"]} == {f"train/a/{name}" for name in bad}


def test_a_split_without_one_readable_file_is_refused(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 2, "test": 0})
    (folder / "test/a/x.jpg").write_text("text")
    with pytest.raises(UserError, match="'test'"):
        prepare(folder, tmp_path, allow_unreadable=5)
    assert leftovers(tmp_path) == []


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 2})
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot take"):
        prepare(folder, tmp_path)


# ImageNet and the generated set.


def test_the_archives_of_imagenet(tmp_path):
    synsets = data.make_miniature_imagenet(tmp_path / "tars")
    opened = prepare("imagenet2012", tmp_path, manual_dir=str(tmp_path / "tars"))
    assert opened.num_classes == 1000
    # Published: class 0 is the tench, 999 toilet tissue; the first five validation images are of these classes.
    assert (opened.class_names[0], opened.class_names[999]) == ("n01440764", "n15075141")
    validation = stored(opened, "validation")
    labels = [validation[f"validation/ILSVRC2012_val_{i:08d}.JPEG"][1] for i in range(1, 6)]
    assert labels == [65, 970, 230, 809, 516]
    for split, files in synsets.items():
        examples = stored(opened, split)
        assert opened.num_examples(split) == len(examples) == len(files)
        for name, synset in files.items():
            image, label = examples[f"{split}/{name}"]
            assert opened.class_names[label] == synset
            number = int(name.partition("_")[2].partition(".")[0]) if split == "train" else None
            if number is not None:
                expected = data.encoded(data.picture(synset, number))
                assert image == records.to_record(expected, 32, 10**6)[0]


def test_missing_archives_are_named(tmp_path):
    data.make_miniature_imagenet(tmp_path / "tars", validation=2)
    (tmp_path / "tars/ILSVRC2012_img_train.tar").unlink()
    with pytest.raises(UserError, match=f"needs ILSVRC2012_img_train.tar in {tmp_path}/tars;"):
        prepare("imagenet2012", tmp_path, manual_dir=str(tmp_path / "tars"))
    both = f"ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in {tmp_path}/data/downloads/manual;"
    with pytest.raises(UserError, match=both):
        prepare("imagenet2012", tmp_path)
    assert leftovers(tmp_path) == []


def test_a_damaged_archive_is_one_sentence(tmp_path):
    data.make_miniature_imagenet(tmp_path / "tars", validation=2)
    train = tmp_path / "tars/ILSVRC2012_img_train.tar"
    train.write_bytes(train.read_bytes()[:3000])
    with pytest.raises(UserError, match="TFDS could not get imagenet2012 ready"):
        prepare("imagenet2012", tmp_path, manual_dir=str(tmp_path / "tars"))
    assert leftovers(tmp_path) == []


def test_the_generated_set_is_balanced(tmp_path, monkeypatch):
    assert all(count % 10 == 0 for count in shapes.Shapes.EXAMPLES.values())
    monkeypatch.setattr(shapes.Shapes, "EXAMPLES", {"train": 40, "test": 20})
    opened = prepare("shapes", tmp_path)
    assert opened.class_names == shapes.CLASSES
    for split, count in (("train", 40), ("test", 20)):
        labels = [label for _, label in stored(opened, split).values()]
        assert collections.Counter(labels) == dict.fromkeys(range(10), count // 10)
    images = [image for split in ("train", "test") for image, _ in stored(opened, split).values()]
    assert len(set(images)) == 60


# Real processes.

# At the fourth image the process says so, and waits.
HELD = """
import pathlib, runpy, sys, time
from datasets import records
flag, seconds = pathlib.Path(sys.argv.pop(1)), float(sys.argv.pop(1))
original, seen = records.to_record, []
def to_record(*arguments):
    seen.append(arguments)
    if len(seen) == 4:
        flag.touch()
        time.sleep(seconds)
    return original(*arguments)
records.to_record = to_record
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


def wait_for(file, process):
    end = time.monotonic() + 60
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_a_killed_preparation_leaves_nothing_that_counts(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 6})
    process = start(folder, tmp_path, ["-c", HELD, str(tmp_path / "held"), "60"], "--size=32")
    wait_for(tmp_path / "held", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert leftovers(tmp_path) == [".photos-32.partial"]
    assert prepare(folder, tmp_path).num_examples("train") == 6
    assert leftovers(tmp_path) == ["photos-32"]


def test_two_preparations_at_once_do_the_work_once_and_quietly(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 6, "test": 4})
    first = start(folder, tmp_path, ["-c", HELD, str(tmp_path / "held"), "6"])
    wait_for(tmp_path / "held", first)
    second = start(folder, tmp_path, ["-m", "tools.prepare"])
    (out, err), (second_out, second_err) = first.communicate(timeout=60), second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), err + second_err
    assert (err, second_err) == ("", ""), "TensorFlow or TFDS is heard"
    preparing, *summary = out.splitlines()
    assert preparing.startswith("Preparing 10 images of ")
    waiting, *second_summary = second_out.splitlines()
    assert waiting == "Another process prepares photos; waiting for it."
    assert second_summary == summary
    assert [line.split()[0] for line in summary] == ["records", "from", "test", "train", "classes", "mean", "principal"]
    assert leftovers(tmp_path) == ["photos-256"]
