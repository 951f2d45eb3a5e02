"""A folder of photographs: what is wrong with it is told, and so is what changes after it was prepared."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import data
from common.errors import UserError
from configs import alexnet
from datasets import conversion, locks, opening, prepared, preparing, sources

ROOT = pathlib.Path(__file__).parent.parent


def prepare(folder, tmp_path, **options):
    return preparing.prepare(str(folder), data_dir=str(tmp_path / "data"), **{"size": 32} | options)


def sentence(call, *args, **options):
    with pytest.raises(UserError) as error:
        call(*args, **options)
    return str(error.value)


# What has changed.


def add(folder, name, copy_of="train/a/0000.jpg"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / copy_of, folder / name)


CHANGES = {
    "two files": (
        lambda folder: [add(folder, f"train/b/{name}.jpg") for name in "xy"],
        "train/b has 5 images instead of 3",
    ),
    "a class": (
        lambda folder: [add(folder, "train/zebra/1.jpg"), add(folder, "test/zebra/1.jpg")],
        "test/zebra is new, with 1 images, train/zebra is new, with 1 images",
    ),
    "a split": (lambda folder: add(folder, "val/a/1.jpg"), "val/a is new, with 1 images"),
    "fewer": (lambda folder: (folder / "train/a/0002.jpg").unlink(), "train/a has 2 images instead of 3"),
    "no class": (lambda folder: shutil.rmtree(folder / "test/b"), "test/b is gone, with 2 images"),
    "another name": (
        lambda folder: (folder / "train/a/0000.jpg").rename(folder / "train/a/first.jpg"),
        "images of train/a have other names or sizes",
    ),
    "another size": (
        lambda folder: add(folder, "train/b/0001.jpg"),
        "images of train/b have other names or sizes",
    ),
    "a move": (
        lambda folder: (folder / "train/a/0000.jpg").rename(folder / "test/a/9.jpg"),
        "test/a has 3 images instead of 2, train/a has 2 images instead of 3",
    ),
    "much": (
        lambda folder: [add(folder, f"{name}/a/1.jpg") for name in "vwxyz"],
        "v/a is new, with 1 images, w/a is new, with 1 images, x/a is new, with 1 images, and 2 more",
    ),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_a_changed_folder_is_refused_and_can_be_prepared_again(tmp_path, change, said, capsys):
    folder = data.make_folder(tmp_path / "photos", {"train": 6, "test": 4})
    first = prepare(folder, tmp_path)
    change(folder)
    told = sentence(prepare, folder, tmp_path)
    command = f"python -m tools.prepare --dataset={folder} --data_dir={tmp_path}/data --size=32 --train_split=train"
    assert told == (
        f"{folder} has changed since {first.parent} was prepared from it: {said}. Undo that, or prepare it again: "
        f"{command} --again"
    )
    again = prepared.Records.open(prepare(folder, tmp_path, again=True))
    assert again.directory == first
    files = {str(file.relative_to(folder)) for file in folder.rglob("*.jpg")}
    assert {name for split in again.splits for name in data.stored(again, split)} == files
    assert sorted(os.listdir(tmp_path / "data/prepared")) == ["photos-32"]  # noqa: PTH208
    capsys.readouterr()
    assert prepare(folder, tmp_path) == first
    assert capsys.readouterr().out == ""


def test_a_kill_while_the_new_set_takes_the_place_of_the_old_leaves_the_old(tmp_path, capsys):
    folder = data.make_folder(tmp_path / "photos", {"train": 6, "test": 4})
    first = prepare(folder, tmp_path)
    partial = tmp_path / "data/prepared/.photos-32.partial"
    partial.mkdir()
    first.parent.rename(partial / "old")
    capsys.readouterr()
    assert prepare(folder, tmp_path) == first and capsys.readouterr().out == ""
    assert prepared.Records.open(first).num_examples("train") == 6


def test_a_set_whose_folder_is_named_from_here_may_lose_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = data.make_folder(tmp_path / "photos", {"train": 6})
    first = prepare("photos", tmp_path)
    shutil.rmtree(folder)
    assert prepare("photos", tmp_path) == first
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert f"was prepared from {folder}, not from photos" in sentence(prepare, "photos", tmp_path)


def test_a_place_that_was_emptied_is_filled_again(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 6})
    first = prepare(folder, tmp_path)
    shutil.rmtree(first)
    assert prepare(folder, tmp_path) == first
    assert prepared.Records.open(first).num_examples("train") == 6
    assert os.listdir(tmp_path / "data/prepared") == ["photos-32"]  # noqa: PTH208


def test_a_signal_between_the_two_renames_leaves_the_old_set(tmp_path, monkeypatch):
    folder = data.make_folder(tmp_path / "photos", {"train": 6})
    first = prepare(folder, tmp_path)
    rename = pathlib.Path.rename

    def interrupted(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path, again=True)
    assert prepared.Records.open(first).num_examples("train") == 6


def test_a_set_is_not_replaced_under_a_run(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 6, "test": 4})
    reading = locks.Reading(prepare(folder, tmp_path))
    assert "photos-32 is read by a run of main.py; wait" in sentence(prepare, folder, tmp_path, again=True)
    assert prepare(folder, tmp_path)
    reading.close()
    prepare(folder, tmp_path, again=True)


def test_a_prepared_set_needs_a_place(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 6, "test": 4})
    assert "--data_dir= is empty" in sentence(preparing.prepare, str(folder), data_dir="")


SAME = {
    "times": lambda folder: [os.utime(file, (1, 1)) for file in folder.rglob("*")],
    "no image": lambda folder: (folder / "train/a/notes.txt").write_text("x"),
    "hidden": lambda folder: add(folder, "train/a/.hidden.jpg"),
    "hidden folder": lambda folder: add(folder, "train/.checkpoints/1.jpg"),
    "an empty class": lambda folder: (folder / "test/c").mkdir(),
    "a copy": lambda folder: [shutil.copytree(folder, folder.parent / "x"), replace(folder, folder.parent / "x")],
    "gone": shutil.rmtree,
    "not mounted": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


def replace(folder, other):
    shutil.rmtree(folder)
    other.rename(folder)


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_changes_no_image_changes_nothing(tmp_path, change):
    folder = data.make_folder(tmp_path / "photos", {"train": 6, "test": 4})
    first = prepare(folder, tmp_path)
    change(folder)
    assert prepare(folder, tmp_path) == first


def test_sets_of_earlier_versions_are_not_compared(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 6})
    file = prepare(folder, tmp_path) / "prepared.json"
    summary = json.loads(file.read_text())
    del summary["contents"]
    file.write_text(json.dumps(summary))
    add(folder, "train/b/x.jpg")
    assert prepare(folder, tmp_path) == file.parent


def test_what_changes_during_a_preparation_is_noticed_at_the_next_start(tmp_path, monkeypatch):
    folder = data.make_folder(tmp_path / "photos", {"train": 6})
    original = conversion.to_record

    def to_record(*arguments):
        add(folder, "train/b/x.jpg")
        return original(*arguments)

    monkeypatch.setattr(conversion, "to_record", to_record)
    prepare(folder, tmp_path)
    assert "train/b has 4 images instead of 3" in sentence(prepare, folder, tmp_path)


def test_a_failed_second_preparation_leaves_the_first(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 6})
    first = prepare(folder, tmp_path)
    before = {file.name: file.read_bytes() for file in first.iterdir()}
    (folder / "train/a/bad.jpg").write_text("text")
    assert "1 of 7 files cannot be read" in sentence(prepare, folder, tmp_path, again=True)
    assert {file.name: file.read_bytes() for file in first.iterdir()} == before
    (folder / "train/a/bad.jpg").unlink()
    prepare(folder, tmp_path, again=True)
    assert sorted(os.listdir(tmp_path / "data/prepared")) == ["photos-32"]  # noqa: PTH208


# What is wrong.


def test_each_wrong_folder_has_its_own_sentence(tmp_path):
    def said(root, **options):
        return sentence(sources.open_source, str(root), "unused", **options)

    photo = data.encoded(data.picture("a", 0))

    def make(*names):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(photo)
        return root

    flat = make("1.jpg", "2.jpg", "notes.txt")
    assert said(flat) == f"{flat} holds 2 images and no folders; sort them into {flat}/SPLIT/CLASS."
    classes = make("ant/1.jpg", "bee/2.jpg", "cat/3.jpg", "dog/4.jpg")
    assert said(classes) == (
        f"{classes} holds the classes ant, bee, cat, and 1 more and no splits; move them into {classes}/train. To hold "
        f"some of it out, use --config.dataset.train_split='train[:90%]' and --config.dataset.eval_split='train[90%:]'."
    )
    split = make("train/1.jpg", "test/2.jpg")
    assert said(split) == f"{split}/test holds images and no class folders; sort them into {split}/test/CLASS."
    deep = make("train/ant/1.jpg", "train/bee/1.jpg", "test/ant/2.jpg")
    assert (
        said(deep / "train") == f"{deep}/train is a split, with the classes ant, bee; name the folder above it, {deep}."
    )
    empty = make("notes.txt")
    assert "holds no SPLIT/CLASS folders; it should hold SPLIT/CLASS/*.jpg." in said(empty)
    assert len(list(sources.open_source(str(deep), "unused").files("train"))) == 2


# A config's data set.


def config_of(tmp_path, **dataset):
    config = alexnet.get_config()
    places = dict(name=str(tmp_path / "photos"), data_dir=str(tmp_path / "data"), eval_split="test")
    config.dataset.update(places | dataset)
    config.input.update(resize=32, crop=28)
    return config


def open_records(config, num_classes=2, **options):
    return opening.open_records(config.dataset, config.input, num_classes, **options)


def test_a_split_that_an_old_set_lacks_is_named_and_not_prepared_for(tmp_path):
    data.make_folder(tmp_path / "photos", {"train": 6, "test": 4})
    open_records(config_of(tmp_path))
    told = sentence(open_records, config_of(tmp_path, train_split="training[:90%]"))
    assert told.endswith(f"{tmp_path}/photos has no split 'training': did you mean train?")
    told = sentence(open_records, config_of(tmp_path, train_split="test[:90%]"))
    assert "photos-32 has the mean image of 'train', not of 'test'; prepare it again: python -m tools.prep" in told
    prepare(tmp_path / "photos", tmp_path, train_split="test", again=True)
    open_records(config_of(tmp_path, train_split="test[:90%]", eval_split="train"))


def test_a_class_that_an_evaluated_split_lacks_is_warned_of(tmp_path, capsys):
    folder = data.make_folder(tmp_path / "photos", {"train": 6, "test": 4, "validation": 4})
    shutil.rmtree(folder / "validation/b")
    for file in (folder / "test/a").iterdir():
        file.unlink()
    warning = {
        split: f"warning: {split!r} has no images of 1 of the 2 classes ({name}): errors measured on it say nothing of "
        f"them."
        for split, name in (("validation", "b"), ("test", "a"))
    }
    for splits, said in (
        (dict(eval_split="validation"), ["validation"]),
        (dict(eval_split="validation[:1]+validation[1:]", test_split="test"), ["validation", "test"]),
        (dict(eval_split="train[:1]", train_split="train[1:]"), []),
    ):
        open_records(config_of(tmp_path, **splits))
        assert capsys.readouterr().err.splitlines() == [warning[split] for split in said]
    open_records(config_of(tmp_path, eval_split="validation"), warn=False)
    assert capsys.readouterr().err == ""


WRONG = {
    "eval_split": (
        dict(eval_split="tets"),
        {},
        r"dataset.eval_split: .*/photos has no split 'tets': did you mean test?",
    ),
    "test_split": (dict(test_split="train[:5]+tets"), {}, "dataset.test_split: .*'tets': did you mean test?"),
    "train_split": (dict(train_split="tarin"), {}, "/photos has no split 'tarin': did you mean train?"),
    "classes": (
        {},
        dict(num_classes=1000),
        r"model.num_classes=1000, but .*/photos has 2 classes; use --config.model.nu",
    ),
}


@pytest.mark.parametrize(("dataset", "options", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_before_anything_is_converted(tmp_path, monkeypatch, dataset, options, said):
    data.make_folder(tmp_path / "photos", {"train": 6, "test": 4})
    monkeypatch.setattr(preparing, "_write", None)
    assert re.search(said.replace("?", r"\?"), sentence(open_records, config_of(tmp_path, **dataset), **options))


@pytest.mark.parametrize("split", ["test[", "test[:x]", "test[4:]", "test[:200%]", "all[:5]"])
def test_a_wrong_part_is_said_before_anything_is_converted(tmp_path, monkeypatch, split):
    data.make_folder(tmp_path / "photos", {"train": 6, "test": 4})
    monkeypatch.setattr(preparing, "_write", None)
    told = sentence(open_records, config_of(tmp_path, eval_split=split))
    assert "dataset.eval_split: " in told and repr(split) in told


def test_a_wrong_split_of_a_tfds_set_is_said_before_anything_is_converted(tmp_path, monkeypatch):
    from datasets import shapes

    monkeypatch.setattr(shapes.Shapes, "EXAMPLES", {"train": 20, "test": 10})
    monkeypatch.setattr(preparing, "_write", None)
    told = sentence(open_records, config_of(tmp_path, name="shapes", eval_split="validation"), 10)
    assert told.endswith("dataset.eval_split: TFDS shapes/1.0.0 has no split 'validation': known are all, test, train.")


EARLY = """
import sys
from common.errors import UserError
from configs import alexnet
from datasets import opening
config = alexnet.get_config()
config.dataset.update(dict(name=sys.argv[1], data_dir=sys.argv[2], eval_split=sys.argv[3]))
try:
    opening.open_records(config.dataset, config.input, int(sys.argv[4]))
except UserError as error:
    print(error)
print(*[name for name in sys.modules if name.startswith("tensorflow")])
"""


@pytest.mark.parametrize(("split", "classes", "said"), [("tets", 2, "mean test?"), ("test", 3, "has 2 classes")])
def test_the_names_in_a_folder_are_checked_before_tensorflow_is_imported(tmp_path, split, classes, said):
    data.make_folder(tmp_path / "photos", {"train": 6, "test": 4})
    places = map(str, (tmp_path / "photos", tmp_path / "data", split, classes))
    command = [sys.executable, "-c", EARLY, *places]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    told, imported = out.splitlines()
    assert said in told and imported == ""
