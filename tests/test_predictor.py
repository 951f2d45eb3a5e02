"""A workdir alone predicts as NumPy does, wherever it lies, for every form in which an image comes."""

import dataclasses
import importlib.util
import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import checkpoint
import data
import reference
import runs
from common.errors import UserError
from configs import base
from datasets import arguments, conversion, images, prepared, preparing, wordnet
from predictor import Predictor
from run import setup, workdirs

SIZE, CROP = 80, 67


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.photographs(tmp_path_factory.mktemp("predictor"))


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    """A trained run, in another folder than where it was made, with its data set hidden."""
    made = folder / "made"
    runs.run(folder, made, "--config.num_steps=10")
    moved = tmp_path_factory.mktemp("elsewhere") / "moved"
    shutil.move(made, moved)
    return moved


@pytest.fixture(scope="module")
def network(workdir):
    return Predictor(workdir, batch_size=4)


def square(path):
    """The square of a photograph, by Pillow alone."""
    with Image.open(path) as image:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


def views(network, pixels, which):
    """The views of a square in float64, the mean subtracted."""
    low, margin = (SIZE - CROP) // 2, SIZE - CROP
    mean = network.records.mean_image[low : low + CROP, low : low + CROP].astype(np.float64)
    places = [(low, low)] + [(y, x) for y in (0, margin) for x in (0, margin)] * (which == "ten")
    found = []
    for top, left in places:
        view = (pixels[top : top + CROP, left : left + CROP] - mean) * network.config.input.scale
        found += [view, view[:, ::-1]] if which == "ten" else [view]
    return np.stack(found)


def expected(network, pixels, which):
    logits, _ = reference.forward(network.params, views(network, pixels, which))
    e = np.exp(logits - logits.max(1, keepdims=True))
    return (e / e.sum(1, keepdims=True)).mean(0)


@pytest.mark.parametrize("which", ["ten", "centre"])
def test_probabilities_are_those_of_numpy(workdir, folder, which):
    network = Predictor(workdir, views=which, batch_size=4)
    files = arguments.find([folder / "photos" / "test" / "a"])
    found = list(network.probabilities(photograph.pixels for photograph in network.read(files)))
    assert len(found) == len(files) == 4
    for file, row in zip(files, found, strict=True):
        np.testing.assert_allclose(row, expected(network, square(file), which), atol=1e-5)
    assert np.ptp(found, axis=0).max() > 1e-3


@pytest.mark.parametrize(("images", "rows"), [(9, [12]), (12, [12]), (25, [12, 12, 12])])
def test_no_batch_is_larger_than_was_asked_for(workdir, monkeypatch, images, rows):
    network, put = Predictor(workdir, views="centre", batch_size=12), []
    original = network._layout.put
    monkeypatch.setattr(network._layout, "put", lambda batch: put.append(len(batch)) or original(batch))
    squares = np.zeros((images, network.size, network.size, 3), np.uint8)
    assert len(list(network.probabilities(squares))) == images and put == rows


def test_an_image_alone_takes_the_first_device(workdir):
    network = Predictor(workdir, views="centre")
    image = np.random.default_rng(1).integers(0, 256, (network.size, network.size, 3), np.uint8)
    alone = next(network.probabilities([image]))
    feature = next(network.features([image], ["fc6"]))["fc6"]
    assert network._alone.layout.size == 1 < network._layout.size
    assert "_together" not in vars(network), "the other devices hold no parameters"
    for row in network.probabilities([image, image]):
        np.testing.assert_allclose(row, alone, atol=1e-6)
    for row in network.features([image, image], ["fc6"]):
        np.testing.assert_allclose(row["fc6"], feature, atol=1e-5)


def test_several_predictors_keep_their_programs(workdir):
    networks = [Predictor(workdir, views="centre") for _ in range(3)]
    images = [np.zeros((network.size, network.size, 3), np.uint8) for network in networks]
    for network, image in zip(networks, images, strict=True):
        list(network.probabilities([image])), list(network.probabilities([image, image]))
    kept = [dict(network._programs) for network in networks]
    for network, image in zip(networks, images, strict=True):
        list(network.probabilities([image])), list(network.probabilities([image, image]))
    assert kept == [network._programs for network in networks] and [len(each) for each in kept] == [2, 2, 2]


# Whether a process that has just begun predicts on two devices.
TWO = """
import sys
from common import host
host.cores = lambda: 2
from predictor import Predictor
print(Predictor(sys.argv[1])._layout.size)
"""


def test_a_predictor_divides_the_cpu(workdir):
    speak = ("JAX_COMPILATION", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(speak)}
    command = [sys.executable, "-c", TWO, str(workdir)]
    done = subprocess.run(command, env=inherited, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"]


def test_the_three_lines_of_the_documents(network, folder):
    file = folder / "photos" / "test" / "b" / "0001.jpg"
    answers = network.predict(str(file))
    exact = expected(network, square(file), "ten")
    assert [label for label, _ in answers] == [network.records.class_names[i] for i in np.argsort(-exact)]
    assert [p for _, p in answers] == pytest.approx(sorted(exact, reverse=True), abs=1e-5)
    assert len(network.predict(str(file), top=2)) == 2


def test_an_image_comes_in_four_forms(network, folder):
    file = folder / "photos" / "test" / "b" / "0001.jpg"
    with Image.open(file) as image:
        forms = [str(file), file.read_bytes(), image.copy(), np.asarray(image)]
    answers = [network.predict(form) for form in forms]
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("missing.jpg", "missing.jpg: No such file"),
        (b"no image", "not an image"),
        (np.zeros((5, 5, 4), np.uint8), r"must be \(height, width, 3\) uint8, not \(5, 5, 4\)"),
        (np.zeros((5, 5, 3)), "float64"),
    ],
)
def test_what_is_no_image_is_a_sentence(network, image, reason):
    with pytest.raises(UserError, match=reason):
        network.predict(image)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_the_batch_does_not_change_the_answer(workdir, network, count):
    images = np.random.default_rng(0).integers(0, 256, (9, SIZE, SIZE, 3)).astype(np.uint8)
    whole = np.stack(list(network.probabilities(images)))
    fresh = Predictor(workdir, batch_size=8)
    np.testing.assert_allclose(np.stack(list(fresh.probabilities(images[:count]))), whole[:count], atol=1e-6)
    assert len(whole) == 9
    assert list(fresh.probabilities([])) == []


def test_features_are_those_of_numpy(network):
    images = np.random.default_rng(1).integers(0, 256, (3, SIZE, SIZE, 3)).astype(np.uint8)
    found = list(network.features(images, ["fc7", "conv1", "fc8"]))
    for pixels, features in zip(images, found, strict=True):
        logits, cache = reference.forward(network.params, views(network, pixels, "centre"))
        before = {name: np.concatenate(saved, -1)[0] for step, name, saved, _ in cache if step == "relu"}
        for name in ("fc7", "conv1"):
            np.testing.assert_allclose(features[name], np.maximum(before[name], 0), atol=1e-4, err_msg=name)
        np.testing.assert_allclose(features["fc8"], logits[0], atol=1e-4)
        assert set(features) == {"conv1", "fc7", "fc8"}
    with pytest.raises(UserError, match="did you mean fc7"):
        network.features(images, ["fc77"])


def test_every_layer_has_features(network):
    features = next(network.features(np.zeros((1, SIZE, SIZE, 3), np.uint8), network.layers))
    assert tuple(network.layers) == ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
    for row in network.table:
        assert features[row.name].shape == row.output


def test_the_checkpoint_can_be_chosen(workdir):
    steps = runs.checkpoints(workdir)
    assert len(steps) == 2
    assert {Predictor(workdir, step=step).step for step in steps} == set(steps)
    assert Predictor(workdir, step="latest").step == max(steps)
    with pytest.raises(UserError, match=f"best, latest, .*{steps[0]}, {steps[1]}"):
        Predictor(workdir, step=3)


def test_an_unreadable_file_does_not_stop_the_others(network, folder, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 broken")
    good = str(folder / "photos" / "test" / "a" / "0000.jpg")
    photographs = list(network.read([good, str(tmp_path / "broken.jpg"), str(tmp_path / "absent.jpg"), good]))
    assert [photograph.pixels is None for photograph in photographs] == [False, True, True, False]
    assert all(photograph.reason for photograph in photographs[1:3])


def test_large_files_are_not_read_and_large_images_decoded_one_at_a_time(network, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "BYTES_PER_PIXEL", 0)
    video = tmp_path / "video.jpg"
    with video.open("wb") as file:
        file.truncate((1 << 20) + 1)
    (found,) = network.read([str(video)])
    assert "it has 1,048,577 bytes, more than an image of" in found.reason
    budgets, original = [], images.to_square
    monkeypatch.setattr(images, "to_square", lambda *given: budgets.append(given[3]) or original(*given))
    good = str(folder / "photos" / "test" / "a" / "0000.jpg")
    assert len(list(network.read([good, good]))) == 2
    assert budgets[0] is budgets[1] and isinstance(budgets[0], images.Budget), "no budget for all threads"


def test_files_are_found_in_folders(folder, monkeypatch):
    names = arguments.find([folder / "photos" / "test"])
    assert len(names) == 12 and names == sorted(names)
    (folder / "photos" / "test" / "a" / "notes.txt").write_text("no image")
    assert arguments.find([folder / "photos" / "test"]) == names
    listed = io.TextIOWrapper(io.BytesIO("\n".join(names[:2]).encode() + b"\n\n"))
    monkeypatch.setattr("sys.stdin", listed)
    assert arguments.find(["-", names[3]]) == [*names[:2], names[3]]
    content = (folder / "photos" / "test" / "a" / "0000.jpg").read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert arguments.find(["-"]) == [content]
    for content in (b"<!DOCTYPE html>", b"\0\0\0\x1cftypavif\0"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        with pytest.raises(UserError, match="stdin is neither an image that can be read nor names of files"):
            arguments.find(["-"])
    hidden = folder / "photos" / "test" / "a" / ".old"
    hidden.mkdir()
    for place in (hidden / "0.jpg", folder / "photos" / "test" / "a" / "._0000.jpg"):
        place.write_bytes(content)
    assert arguments.find([folder / "photos" / "test"]) == names, "what is hidden is taken"
    with pytest.raises(UserError, match=r"absent is not there"):
        arguments.find([folder / "absent"])
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image files"):
        arguments.find([folder / "empty"])


# What the workdir keeps of its data set.


def test_the_workdir_keeps_what_preparation_measured(network, folder):
    records = prepared.Records.open(next((folder / "cache" / "prepared").glob("*/1.0.0")))
    kept = network.records
    assert kept.class_names == records.class_names == runs.CLASSES
    for name in ("mean_image", "principal_std", "principal_components"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(records, name))
    assert network.data().num_examples("test") == 12


def test_no_data_set_is_needed(workdir, network, folder, tmp_path):
    image = np.random.default_rng(2).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    before = network.predict(image)
    shutil.copytree(workdir, tmp_path / "copy")
    hidden = folder / "cache" / "hidden"
    (folder / "cache" / "prepared").rename(hidden)
    try:
        alone = Predictor(tmp_path / "copy")
        assert alone.predict(image) == before
        with pytest.raises(UserError, match=r"are not in .*--data_dir"):
            alone.data()
    finally:
        hidden.rename(folder / "cache" / "prepared")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _without_names(path):
    with np.load(path) as stored:
        kept = {name: stored[name] for name in stored if name != "class_names"}
    np.savez(path, **kept)


@pytest.mark.parametrize("damage", [_cut, _flip, _without_names, lambda path: path.write_bytes(b"")])
def test_a_damaged_dataset_file_is_a_sentence_and_the_next_start_mends_it(workdir, folder, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    whole = workdirs.read_dataset(copy)
    damage(copy / "dataset.npz")
    with pytest.raises(UserError, match=r"dataset.npz is damaged \(.+\); start main.py"):
        Predictor(copy)
    workdirs.write_dataset(prepared.Records.open(whole.directory), copy)
    np.testing.assert_array_equal(Predictor(copy).records.mean_image, whole.mean_image)
    assert not runs.leftovers(copy)


def test_the_file_holds_no_pickle(workdir):
    with np.load(workdir / "dataset.npz", allow_pickle=False) as stored:
        assert len([stored[name] for name in stored]) > 2  # each raises if it were a pickle


def test_a_run_of_before_is_told_what_to_do(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "old")
    (tmp_path / "old" / "dataset.npz").unlink()
    with pytest.raises(UserError, match=r"has no dataset.npz, like the runs of earlier versions; start main.py"):
        Predictor(tmp_path / "old")


def test_other_classes_cannot_go_on(workdir, tmp_path):
    data.make_folder(tmp_path / "photos", {"train": 30, "test": 12}, ("a", "b", "d"))
    shutil.copytree(workdir, tmp_path / "copy")
    config = (workdir / "config.json").read_text()
    name = workdirs.read_config(workdir).dataset.name
    (tmp_path / "copy" / "config.json").write_text(config.replace(name, str(tmp_path / "photos")))
    done = runs.run(tmp_path, tmp_path / "copy", "--config.num_steps=11", expect=2)
    assert "begun with other classes" in runs.sentence(done.stderr)
    assert "['c']; only here: ['d']" in done.stderr


# What an attack found: files of a workdir that do not belong together.


def test_a_damaged_best_checkpoint_is_not_replaced_in_silence(workdir, tmp_path, capsys):
    shutil.copytree(workdir, tmp_path / "copy")
    best = Predictor(workdir).step
    _flip(tmp_path / "copy" / "checkpoints" / str(best) / "record" / "metadata")
    other = Predictor(tmp_path / "copy")
    assert other.step != best
    assert f"warning: the checkpoint of step {best} cannot be read, another is taken" in capsys.readouterr().err
    assert (tmp_path / "copy" / "checkpoints" / str(best)).is_dir()


@pytest.mark.parametrize(
    ("field", "value"), [("model.lrn_alpha", 1e-3), ("model.dropout_rate", 0.0), ("input.scale", 1.0)]
)
def test_a_config_that_is_not_the_checkpoints_is_refused(workdir, tmp_path, field, value):
    shutil.copytree(workdir, tmp_path / "copy")
    config = workdirs.read_config(workdir)
    section, name = field.split(".")
    config[section][name] = value
    workdirs.write_config(config, tmp_path / "copy")
    with pytest.raises(UserError, match=f"checkpoints of .* are of another config. Different: {field}"):
        Predictor(tmp_path / "copy")


@pytest.mark.parametrize(
    ("names", "given", "says"), [(["~nobody-here/x"], b"", "~nobody-here/x"), (["-"], b"\n\n", "names no file")]
)
def test_names_of_nothing_are_one_sentence(workdir, names, given, says):
    done = runs.run_tool("predict", f"--workdir={workdir}", *names, stdin=given, expect=2)
    assert says in runs.sentence(done.stderr)


def test_a_run_from_before_a_field_was_added_goes_on(workdir, tmp_path):
    """The neutral values of newer fields stand in for it, tuples among them."""
    meta = {"config": workdirs.to_json(workdirs.read_config(workdir))}
    like = workdirs.to_json(base.get_config())
    newer = [(section, name) for section, fields in like.items() if isinstance(fields, dict) for name in fields]
    config = workdirs.read_config(workdir)
    for section, name in newer:
        if meta["config"][section][name] == like[section][name]:
            del meta["config"][section][name]
    assert "lighting_again" not in meta["config"]["input"] and "layers" not in meta["config"]["schedule"]
    workdirs.check_checkpoint(meta, config, workdirs.read_dataset(workdir), workdir)


def test_classes_that_are_not_the_checkpoints_are_refused(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "copy")
    records = workdirs.read_dataset(workdir)
    (tmp_path / "copy" / "dataset.npz").unlink()
    workdirs.write_dataset(dataclasses.replace(records, class_names=records.class_names[::-1]), tmp_path / "copy")
    with pytest.raises(UserError, match=r"The checkpoints of .* are of other classes"):
        Predictor(tmp_path / "copy")


def test_weights_that_are_not_numbers_are_refused(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "copy")
    shapes = setup.state_shapes(workdirs.read_config(workdir))
    with checkpoint.Checkpoints(tmp_path / "copy") as checkpoints:
        state, meta = checkpoints.restore_latest(shapes)
        state.params["fc8"]["bias"][0] = np.nan
        checkpoints.save(99, state, meta)
    with pytest.raises(UserError, match=r"The parameters of step 10 in .* are not finite"):
        Predictor(tmp_path / "copy", step="latest")


def test_another_data_set_of_the_same_name_is_refused(workdir, folder, network, tmp_path):
    data.make_folder(tmp_path / "photos", {"train": 12, "test": 6}, ("c", "b", "a"), size=(90, 85))
    preparing.prepare(str(tmp_path / "photos"), data_dir=str(tmp_path), size=SIZE)
    with pytest.raises(UserError, match="is another data set than that of"):
        network.data(str(tmp_path))


def test_a_run_on_a_part_knows_its_data_set_again(folder, tmp_path):
    """Its mean image is that of four photographs, and the records have that of thirty."""
    train = "--config.dataset.train_split=train[:4]"
    runs.run(folder, tmp_path / "run", train, "--config.num_steps=1", cache="part")
    network = Predictor(tmp_path / "run")
    opened = network.data()
    assert np.abs(opened.mean_image - network.records.mean_image).max() > 1
    np.testing.assert_allclose(network.records.mean_image, _mean(opened, "train[:4]"), rtol=1e-6)


def _mean(records, split):
    return np.mean([data.decoded(image) for image, _ in data.stored(records, split).values()], axis=0)


# Words.


def test_wordnet_ids_become_words():
    names = data.LABELS.joinpath("labels.txt").read_text().split()
    words = wordnet.words(names)
    assert len(set(words)) == 1000
    # Known places of the 1,000 classes, which everyone who trains on ImageNet has seen.
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 340: "zebra", 999: "toilet tissue"}
    assert all(words[i].startswith(word) for i, word in known.items())
    assert wordnet.words(["n02123045", "n00000000", "cat"]) == ("tabby, tabby cat", "n00000000", "cat")


def test_without_tfds_ids_stay(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wordnet._synsets.cache_clear()
    try:
        assert wordnet.words(["n02123045"]) == ("n02123045",)
    finally:
        wordnet._synsets.cache_clear()
