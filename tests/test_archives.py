"""ImageNet's archives: the records that TFDS's way gives, whoever stops it, or one sentence about what is wrong."""

import io
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest

import data
from common import host
from common.errors import UserError
from datasets import conversion, images, prepared, preparing, sources

ROOT = pathlib.Path(__file__).parent.parent
TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The folder of the archives, and the synset of each file by split."""
    folder = tmp_path_factory.mktemp("tars")
    return folder, data.make_miniature_imagenet(folder)


def prepare(folder, data_dir, **options):
    directory = preparing.prepare("imagenet2012", data_dir=str(data_dir), manual_dir=str(folder), size=32, **options)
    return prepared.Records.open(directory)


def sentence(folder, data_dir, **options):
    with pytest.raises(UserError) as error:
        prepare(folder, data_dir, **options)
    return str(error.value)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_records_are_those_of_the_archives(miniature, tmp_path):
    folder, synsets = miniature
    opened = prepare(folder, tmp_path)
    assert opened.num_classes == 1000
    # Published: class 0 is the tench, 999 toilet tissue; the first five validation images are of these classes.
    assert (opened.class_names[0], opened.class_names[999]) == ("n01440764", "n15075141")
    validation = data.stored(opened, "validation")
    labels = [validation[f"validation/ILSVRC2012_val_{i:08d}.JPEG"][1] for i in range(1, 6)]
    assert labels == [65, 970, 230, 809, 516]
    for split, files in synsets.items():
        examples = data.stored(opened, split)
        assert opened.num_examples(split) == len(examples) == len(files)
        for name, synset in files.items():
            image, label = examples[f"{split}/{name}"]
            assert opened.class_names[label] == synset
            number = 0 if split == "train" else 999_999 + int(name[15:23])
            expected = data.encoded(data.picture(synset, number, (48, 40)))
            assert image == images.to_record(expected, 32, 10**6)[0]
    assert os.listdir(tmp_path) == ["prepared"], "the archives were copied"  # noqa: PTH208


def examples(records, split):
    """By file name, all else that is stored of an example."""
    import tensorflow_datasets as tfds

    found = tfds.builder_from_directory(records.directory).as_dataset(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    return {example.pop("file_name"): example for example in found.as_numpy_iterator()}


def test_tfds_gives_the_same_examples(miniature, tmp_path, monkeypatch):
    folder, synsets = miniature
    ours = prepare(folder, tmp_path / "ours")
    monkeypatch.setattr(sources, "IMAGENET", "none")
    theirs = prepare(folder, tmp_path / "theirs")
    assert (tmp_path / "theirs/imagenet2012/5.1.0").is_dir()
    for split in synsets:
        assert examples(ours, split) == examples(theirs, split)
    for name in ("mean_image", "principal_std", "principal_components", "class_names"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    summaries = [json.loads((records.directory / "prepared.json").read_text()) for records in (ours, theirs)]
    assert summaries[0] == summaries[1]
    # Once TFDS has its copy, that is read.
    monkeypatch.undo()
    assert prepare("nowhere", tmp_path / "theirs", again=True).num_examples("train") == 1000


def test_a_png_and_a_cmyk_image_are_what_their_pixels_are(tmp_path):
    """ImageNet has one of the former and 22 of the latter, all named .JPEG. TFDS encodes them anew."""
    data.make_miniature_imagenet(tmp_path / "tars", validation=1, size=8)
    picture = data.picture("n02105855", 7, (60, 50))
    odd = {
        "n02105855_2933.JPEG": data.encoded(picture, "PNG"),
        "n02105855_1.JPEG": data.encoded(picture.convert("CMYK")),
    }
    with tarfile.open(tmp_path / "tars" / TRAIN, "a") as archive:
        data.add(archive, "n02105855.tar", data.tar_of(odd))
    found = data.stored(prepare(tmp_path / "tars", tmp_path / "data"), "train")
    expected = data.decoded(images.to_record(odd["n02105855_2933.JPEG"], 32, 10**6)[0]).astype(float)
    for name in odd:
        assert abs(data.decoded(found[f"train/{name}"][0]) - expected).mean() < 3, name


# What is wrong with archives.


def test_missing_archives_are_named(miniature, tmp_path):
    shutil.copy(miniature[0] / VALIDATION, tmp_path)
    assert f"needs {TRAIN} in {tmp_path};" in sentence(tmp_path, tmp_path / "data")
    assert f"{TRAIN} and {VALIDATION} in {tmp_path}/data/downloads/manual;" in sentence("", tmp_path / "data")


def cut(at):
    return lambda content: content[:at]


def renamed(old, new):
    """An archive whose entries have other names, with the checksums of their headers."""

    def change(content):
        file = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(content)) as before, tarfile.open(fileobj=file, mode="w") as after:
            for entry in before:
                entry.name = entry.name.replace(old, new)
                after.addfile(entry, before.extractfile(entry))
        return file.getvalue()

    return change


def without(name):
    def change(content):
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            return data.tar_of({e.name: archive.extractfile(e).read() for e in archive if e.name != name})

    return change


def flipped(at):
    return lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (TRAIN, cut(3000), "{path} is cut short"),
        (TRAIN, cut(-10240), "{path} is cut short"),
        (TRAIN, cut(0), "{path} is cut short"),
        (TRAIN, lambda content: b"<!DOCTYPE html>" * 100, "{path} is damaged, or no tar archive (invalid header"),
        (TRAIN, lambda content: data.tar_of({"ILSVRC2012_val_00000001.JPEG": b"x"}), "{path} holds ILSVRC2012_val_0"),
        (TRAIN, lambda content: data.tar_of({}), "{path} lacks n01440764.tar and 999 more of the archives of ImageNet"),
        (TRAIN, without("n15075141.tar"), "{path} lacks n15075141.tar of the archives of ImageNet's 1,000 classes"),
        (TRAIN, flipped(512 + 20), "n01440764.tar in {path} is damaged, or no tar archive (bad checksum at byte 512)"),
        (TRAIN, renamed("n01440764.tar", "n01440764"), "{path} holds n01440764, and not an archive of each"),
        (VALIDATION, cut(5000), "{path} is cut short"),
        (VALIDATION, lambda content: data.tar_of({}), "{path} is empty"),
        (VALIDATION, renamed("_00000001", "_00050001"), "{path} holds ILSVRC2012_val_00050001.JPEG, which is no"),
        (VALIDATION, lambda content: data.tar_of({"n01440764.tar": b"x"}), "{path} holds n01440764.tar, which is no"),
    ],
)
def test_a_wrong_archive_is_one_sentence(miniature, tmp_path, name, change, said):
    for archive in (TRAIN, VALIDATION):
        shutil.copy(miniature[0] / archive, tmp_path)
    path = tmp_path / name
    path.write_bytes(change(path.read_bytes()))
    found = sentence(tmp_path, tmp_path / "data")
    assert said.format(path=path) in found
    assert "\n" not in found


# Preparations that are stopped.


def test_worker_processes_make_the_same(miniature, tmp_path, monkeypatch):
    one, several = tmp_path / "one", tmp_path / "several"
    expected = contents(prepare(miniature[0], one).directory)
    monkeypatch.setattr(host, "cores", lambda: 3)
    monkeypatch.setattr(sources, "FILES_PER_PROCESS", 1)
    started = []
    original = conversion._join
    monkeypatch.setattr(conversion, "_join", lambda *arguments: started.append(arguments) or original(*arguments))
    assert contents(prepare(miniature[0], several).directory) == expected
    assert not started, "this process converted them"


def test_processes_share_any_budget():
    budget = images.Budget(1 << 64, multiprocessing.get_context("spawn"))
    assert budget._left.value >= 1 << 60
    with budget.hold(1 << 30):
        pass


def interrupt_after(monkeypatch, count):
    """Stops a preparation once it has converted so many portions."""
    original, converted = conversion._convert_portion, []

    def convert(portion, advance):
        if len(converted) == count:
            raise KeyboardInterrupt
        converted.append(portion.name)
        return original(portion, advance)

    monkeypatch.setattr(conversion, "_convert_portion", convert)
    return converted


def test_it_goes_on_with_the_classes_that_are_not_finished(miniature, tmp_path, monkeypatch, capsys):
    folder, _ = miniature
    expected = contents(prepare(folder, tmp_path / "undisturbed").directory)
    first = interrupt_after(monkeypatch, 600)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path)
    monkeypatch.undo()
    capsys.readouterr()
    second = interrupt_after(monkeypatch, 9999)
    assert contents(prepare(folder, tmp_path).directory) == expected
    assert "600 of its 1,001 portions were prepared before.\n" in capsys.readouterr().out
    assert len(first) == 600 and len(second) == 401 and not set(first) & set(second)
    assert sorted(os.listdir(tmp_path / "prepared")) == ["imagenet2012-32"]  # noqa: PTH208


@pytest.mark.parametrize("change", ["archive", "option", "file", "nothing"])
def test_what_was_converted_otherwise_is_not_used(tmp_path, monkeypatch, capsys, change):
    folder = tmp_path / "tars"
    data.make_miniature_imagenet(folder, validation=1, size=8)
    interrupt_after(monkeypatch, 20)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path)
    monkeypatch.undo()
    (partial,) = (tmp_path / "prepared/.imagenet2012-32.partial").iterdir()
    if change == "archive":
        os.utime(folder / VALIDATION, (0, 0))
    if change == "file":
        with (partial / "train-n01443537.images").open("ab") as file:
            file.write(b"x")
    converted = interrupt_after(monkeypatch, 9999)
    options = {"max_pixels": 10**6} if change == "option" else {}
    assert prepare(folder, tmp_path, **options).num_examples("train") == 1000
    assert len(converted) == {"nothing": 981, "file": 982}.get(change, 1001)


def test_a_file_that_was_mended_is_read_again(tmp_path):
    """It has the name and the size that it had, as after a download that is repeated."""
    data.make_folder(tmp_path / "photos", {"train": 2, "test": 1}, classes=("a", "b"), size=(50, 40))
    file = next((tmp_path / "photos/train/a").iterdir())
    sound = file.read_bytes()
    file.write_bytes(bytes(len(sound)))
    options = dict(data_dir=str(tmp_path), size=32)
    with pytest.raises(UserError, match="1 of 3 files cannot be read"):
        preparing.prepare(str(tmp_path / "photos"), **options)
    file.write_bytes(sound)
    directory = preparing.prepare(str(tmp_path / "photos"), **options)
    assert prepared.Records.open(directory).num_examples("train") == 2


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from common import host
from datasets import preparing, sources
host.cores = lambda: 2
sources.FILES_PER_PROCESS = {files}
preparing.prepare("imagenet2012", data_dir=sys.argv[1], manual_dir=sys.argv[2], size=32)
"""


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 1 << 30], ids=["worker processes", "threads"])
def test_killed_at_any_moment_it_ends_with_the_same_set(miniature, tmp_path, files):
    folder, _ = miniature
    expected = contents(prepare(folder, tmp_path / "undisturbed").directory)
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT), files=files))
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path), str(folder)]
    place, choice = tmp_path / "prepared/.imagenet2012-32.partial", random.Random(0)
    seen, kills = 0, 0
    while kills < 10:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wanted = seen + choice.randrange(20, 110)  # files of finished portions, of some 2,000
        while process.poll() is None and len(list(place.glob("*/*.npz"))) < wanted:
            time.sleep(0.005)
        time.sleep(choice.random() / 50)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kills += 1
        seen = len(list(place.glob("*/*.npz")))
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert contents(tmp_path / "prepared/imagenet2012-32/1.0.0") == expected
    assert sorted(os.listdir(tmp_path / "prepared")) == ["imagenet2012-32"]  # noqa: PTH208
