"""The tools on a trained run, as a user types them: numbers, files, exit codes, help."""

import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import input_pipeline
import runs
from datasets import prepared
from predictor import Predictor

CLASSES = runs.CLASSES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.photographs(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def workdir(folder):
    runs.run(folder, folder / "run", "--config.num_steps=10")
    return folder / "run"


@pytest.fixture(scope="module")
def other(folder):
    """A second run, with another seed."""
    runs.run(folder, folder / "other", "--config.num_steps=5", "--config.seed=1")
    return folder / "other"


def recorded(workdir, group):
    """The last values of a group of metrics, without the group's name."""
    lines = [line for line in runs.metrics(workdir) if f"{group}/loss" in line]
    own = {name: value for name, value in lines[-1].items() if name.startswith(f"{group}/") and "/centre_" not in name}
    return {name.partition("/")[2]: value for name, value in own.items()}


# Describe.


def test_describe_prints_the_table_and_draws_the_network(tmp_path):
    done = runs.run_tool("describe", "--config=configs/alexnet.py", f"--plot={tmp_path / 'network.svg'}", cwd=runs.ROOT)
    layers, total = done.stdout.splitlines()[2:10], done.stdout.splitlines()[11]
    assert [line.split()[0] for line in layers] == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
    assert total.split() == ["total", "60,965,224", "724,406,816", "30,336"]
    assert (tmp_path / "network.svg").stat().st_size > 10_000
    done = runs.run_tool("describe", "--config=configs/alexnet.py", "--plot=network.gif", expect=2, cwd=runs.ROOT)
    assert "must end in .png, .svg or .pdf" in runs.sentence(done.stderr) and not done.stdout


# Evaluate.


@pytest.mark.parametrize(("views", "group"), [("ten", "test"), ("centre", "eval")])
def test_evaluate_finds_what_training_found(workdir, tmp_path, views, group):
    expected = recorded(workdir, group)
    step = int(expected.pop("step", 10))
    out = tmp_path / "out"
    done = runs.run_tool(
        "evaluate", f"--workdir={workdir}", f"--views={views}", f"--step={step}", f"--out={out}", "--json"
    )
    found = json.loads(done.stdout)
    assert found.pop("examples") == 12 and found.pop("views") == views and found.pop("step") == step
    assert found.pop("unreadable") == 0 and found.pop("dataset").endswith("photos test")
    expected.pop("top5_error")  # of three classes
    assert found == pytest.approx(expected, abs=1e-6)
    assert json.loads((out / "metrics.json").read_text())["loss"] == found["loss"]


def test_evaluate_takes_the_mean_of_networks(workdir, other, folder, tmp_path):
    photographs = [f"--dataset={folder / 'photos'}", "--split=test"]
    also = [f"--workdir={workdir}", f"--also={other}", f"--out={tmp_path}", "--batch_size=5", "--json"]
    networks = [Predictor(workdir), Predictor(other)]
    records = prepared.Records.open(networks[0].records.directory)
    (whole,) = input_pipeline.eval_batches(records, "test", batch_size=12)
    # As they are; the records are encoded again.
    read = [
        (photograph.pixels, label)
        for label, name in enumerate(CLASSES)
        for photograph in networks[0].read(map(str, sorted((folder / "photos" / "test" / name).iterdir())))
    ]
    for flags, examples in ((photographs, read), ([], list(zip(whole["image"], whole["label"], strict=True)))):
        done = runs.run_tool("evaluate", *also, *flags)
        found, wrong, losses = json.loads(done.stdout), 0, []
        for pixels, label in examples:
            each = [np.float64(next(network.probabilities([pixels]))) for network in networks]
            wrong += np.argmax(sum(each)) != label
            losses.append([-np.log(np.mean(each, axis=0)[label]), -np.mean(np.log(each), axis=0)[label]])
        loss, geometric = np.mean(losses, axis=0)
        assert abs(loss - geometric) > 1e-4, "the networks are too much alike"
        assert found["loss"] == pytest.approx(loss, abs=1e-5)
        assert found["top1_error"] == pytest.approx(wrong / 12)
        assert found["also"] == {str(other): networks[1].step} and found["examples"] == 12
        assert matrix(tmp_path).sum() == 12 and "Warning" not in done.stderr


@pytest.mark.slow
def test_only_networks_of_the_same_classes_and_size_are_averaged(workdir, tmp_path):
    for split in (runs.photographs(tmp_path) / "photos").iterdir():
        (split / "c").rename(split / "d")
    runs.run(tmp_path, tmp_path / "renamed", "--config.num_steps=1")
    runs.run(workdir.parent, tmp_path / "larger", "--config.num_steps=1", "--config.input.resize=96")
    for name, sentence in (("renamed", "has other classes than"), ("larger", "sees images of 96 pixels, and .* of 80")):
        flags = f"--workdir={workdir}", f"--also={tmp_path / name}", f"--out={tmp_path}"
        done = runs.run_tool("evaluate", *flags, expect=2)
        assert re.search(sentence, runs.sentence(done.stderr))


def matrix(out):
    with (out / "confusion.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["", *CLASSES] and [row[0] for row in rows] == list(CLASSES)
    return np.array([[int(value) for value in row[1:]] for row in rows])


def test_evaluate_counts_every_prediction(workdir, folder, tmp_path):
    out = tmp_path / "out"
    done = runs.run_tool("evaluate", f"--workdir={workdir}", f"--out={out}")
    network, counts = Predictor(workdir), np.zeros((3, 3), int)
    for label, name in enumerate(CLASSES):
        for photograph in network.read(map(str, sorted((folder / "photos" / "test" / name).iterdir()))):
            counts[label, np.argmax(next(network.probabilities([photograph.pixels])))] += 1
    np.testing.assert_array_equal(matrix(out), counts)
    with (out / "classes.csv").open() as file:
        classes = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in classes] == pytest.approx(list(np.diag(counts) / 4))
    assert [int(row["examples"]) for row in classes] == [4, 4, 4]
    assert f"mean class accuracy  {np.diag(counts).sum() / 12:.2%}" in done.stdout
    with Image.open(out / "confusion.png") as image:
        assert min(image.size) > 100
    assert not runs.leftovers(out)


def test_evaluate_takes_other_splits_and_folders(workdir, folder, tmp_path):
    def counts(*flags):
        done = runs.run_tool("evaluate", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--json", *flags)
        return json.loads(done.stdout)["examples"], matrix(tmp_path / "out")

    assert counts("--split=train")[0] == 30
    assert counts("--split=train[:50%]")[0] == 15
    photos = folder / "photos"
    # The photographs of the test split: as a split, as classes alone, and without one of the classes.
    whole = counts(f"--dataset={photos}", "--split=test")
    assert whole[0] == 12
    np.testing.assert_array_equal(counts(f"--dataset={photos / 'test'}")[1], whole[1])
    (tmp_path / "some").mkdir()
    shutil.copytree(photos / "test" / "b", tmp_path / "some" / "b")
    np.testing.assert_array_equal(counts(f"--dataset={tmp_path / 'some'}")[1][1], whole[1][1])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--split=tset"], "has no split 'tset': did you mean test"),
        (["--dataset={root}/strange"], "strange/cat is no class of"),
        (["--dataset={root}/photos", "--split=no"], "has neither a class of .* nor a split 'no'"),
        (["--dataset={root}/absent"], "cannot be listed|is not there"),
        (["--data_dir={root}/absent"], "name the folder that holds prepared/ with --data_dir"),
        (["--dataset={root}/photos", "--split=test", "--data_dir=x"], "a folder of photographs needs none"),
        (["--step=7"], "it is best, latest, or a step that has a checkpoint"),
        (["--workdir={root}/photos"], "is not the workdir of a run"),
        (["--also={root}/photos"], "is not the workdir of a run"),
        (["--also={root}/run"], "--also=.*run is a run that is there already"),
        (["--also="], "--also= is empty"),
    ],
)
def test_evaluate_says_what_is_wrong(workdir, folder, tmp_path, flags, sentence):
    for name in ("a", "cat"):
        (folder / "strange" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "photos" / "test" / "a" / "0000.jpg", folder / "strange" / name)
    flags = [flag.format(root=folder) for flag in flags]
    done = runs.run_tool("evaluate", f"--workdir={workdir}", f"--out={tmp_path}", *flags, expect=2)
    assert re.search(sentence, runs.sentence(done.stderr))


# Predict.


def test_predict_prints_json_lines(workdir, folder):
    files = [folder / "photos" / "test" / "a" / "0000.jpg", folder / "photos" / "test" / "c" / "0002.jpg"]
    done = runs.run_tool("predict", f"--workdir={workdir}", "--json", *files)
    lines, network = [json.loads(line) for line in done.stdout.splitlines()], Predictor(workdir)
    assert [line["file"] for line in lines] == list(map(str, files))
    assert [line["true_label"] for line in lines] == ["a", "c"]
    for file, line in zip(files, lines, strict=True):
        answers = network.predict(file)
        assert [(answer["label"], answer["probability"]) for answer in line["predictions"]] == [
            (label, pytest.approx(p, abs=1e-6)) for label, p in answers
        ]


def test_predict_on_a_terminal_shows_answers_and_no_bar_between_them(workdir, folder):
    files = sorted((folder / "photos" / "test" / "a").iterdir())[:2]
    shown = runs.on_terminal("predict", f"--workdir={workdir}", "--top=1", *files)
    assert shown.count("%") == 2 and not set(shown) & set("━╸╺"), shown


def test_predict_goes_on_after_a_bad_file_and_says_so_at_the_end(workdir, folder, tmp_path):
    (tmp_path / "bad.jpg").write_text("no image")
    good = folder / "photos" / "test" / "a" / "0000.jpg"
    done = runs.run_tool("predict", f"--workdir={workdir}", "--json", good, tmp_path / "bad.jpg", good, expect=2)
    assert len(done.stdout.splitlines()) == 2
    assert f"{tmp_path / 'bad.jpg'}: not an image" in done.stderr and "Traceback" not in done.stderr


def test_predict_reads_stdin(workdir, folder):
    file = folder / "photos" / "test" / "a" / "0000.jpg"
    image = runs.run_tool("predict", f"--workdir={workdir}", "-", stdin=file.read_bytes())
    names = runs.run_tool("predict", f"--workdir={workdir}", "-", stdin=f"{file}\n".encode())
    assert image.stdout.splitlines()[0] == "-" and names.stdout.splitlines()[0] == str(file)
    assert image.stdout.splitlines()[1:] == names.stdout.splitlines()[1:]
    shares = [float(share) for share in re.findall(r"([\d.]+)%", image.stdout)]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=0.1)


def test_predict_draws(workdir, folder, tmp_path):
    test = folder / "photos" / "test"
    runs.run_tool("predict", f"--workdir={workdir}", f"--plot={tmp_path / 'answers.svg'}", "--json", test)
    drawn = (tmp_path / "answers.svg").read_text()
    assert drawn.count("<image") == 12
    done = runs.run_tool("predict", f"--workdir={workdir}", "--plot=answers.gif", test, expect=2)
    assert "must end in .png, .svg or .pdf" in runs.sentence(done.stderr)


# Features.


def test_features_are_written_for_every_readable_file(workdir, folder, tmp_path):
    (tmp_path / "bad.jpg").write_text("no image")
    test, out = folder / "photos" / "test", tmp_path / "features.npz"
    arguments = [f"--workdir={workdir}", "--layer=conv5,fc7", f"--out={out}", tmp_path / "bad.jpg", test]
    runs.run_tool("features", *arguments, expect=2)
    with np.load(out, allow_pickle=False) as found:
        arrays = dict(found)
    files = sorted(map(str, test.rglob("*.jpg")))
    assert arrays["files"].tolist() == files
    network = Predictor(workdir)
    squares = [network.load(file) for file in files]
    for i, features in enumerate(network.features(squares, ["conv5", "fc7"])):
        for layer, values in features.items():
            np.testing.assert_allclose(arrays[layer][i], values, atol=1e-5)
    assert arrays["conv5"].ndim == 4 and arrays["fc7"].ndim == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jpg", "features.npz"]


def test_features_are_drawn(workdir, folder, tmp_path):
    photo = folder / "photos" / "test" / "a" / "0000.jpg"
    runs.run_tool("features", f"--workdir={workdir}", "--layer=all", f"--plot={tmp_path / 'maps.svg'}", photo)
    assert (tmp_path / "maps.svg").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--layer=conv9", "--out=x.npz", "{photo}"], "layer='conv9' is not known: did you mean conv"),
        (["{photo}"], "--out=features.npz for the numbers, --plot"),
        (["--out=x.npy", "{photo}"], "--out=x.npy must end in .npz"),
        (["--out=x.npz"], "Name photographs"),
        (["--out=/proc/x.npz", "{photo}"], "/proc/x.npz cannot be written"),
        (["--out=x.npz", "absent.jpg"], "absent.jpg is not there"),
        (["--out=~nobody-of-this-name/x.npz", "absent.jpg"], "--out=~nobody-of-this-name/x.npz cannot be a path"),
        (["--plot=~nobody-of-this-name/x.png", "absent.jpg"], "--plot=~nobody-of-this-name/x.png cannot be a path"),
        (["--out=x.npz", "{bad}"], "No photograph could be read"),
    ],
)
def test_features_says_what_is_wrong(workdir, folder, tmp_path, flags, sentence):
    (tmp_path / "bad.jpg").write_text("no image")
    photo = folder / "photos" / "test" / "a" / "0000.jpg"
    flags = [flag.format(photo=photo, bad=tmp_path / "bad.jpg") for flag in flags]
    done = runs.run_tool("features", f"--workdir={workdir}", *flags, expect=2, cwd=tmp_path)
    assert sentence in runs.sentence(done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jpg"]


# Help.


@pytest.mark.parametrize("name", sorted({path.stem for path in (runs.ROOT / "tools").glob("[a-z]*.py")} - {"shared"}))
def test_help_is_short_and_has_an_example(name):
    done = runs.run_tool(name, "--help")
    assert f"python -m tools.{name} --" in done.stdout
    assert len(done.stdout.splitlines()) < 40
    assert "--debug" in done.stdout and "logtostderr" not in done.stdout and "pdb" not in done.stdout
    source = pathlib.Path(runs.ROOT, "tools", f"{name}.py").read_text()
    for flag in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source):
        assert f"--{flag}" in done.stdout
    assert ("--workdir" in done.stdout) == ("shared.define_network" in source or '"workdir"' in source)


# What an attack found.


def test_a_folder_to_evaluate_may_hold_links_strays_and_broken_files(workdir, folder, tmp_path):
    test, root = folder / "photos" / "test", tmp_path / "some"
    shutil.copytree(test / "b", root / "b")
    (root / "a").symlink_to(test / "a")
    shutil.copy(test / "a" / "0000.jpg", root / "stray.jpg")
    (root / ".hidden").mkdir()
    shutil.copy(test / "a" / "0000.jpg", root / ".hidden")
    (root / "b" / "broken.jpg").write_text("no image")
    out = tmp_path / "out"
    arguments = [f"--workdir={workdir}", f"--dataset={root}", f"--out={out}", "--json"]
    found = json.loads(runs.run_tool("evaluate", *arguments, expect=2).stdout)
    assert (found["examples"], found["unreadable"]) == (8, 1)
    assert matrix(out).sum(1).tolist() == [4, 4, 0]
    done = runs.run_tool("evaluate", *arguments, "--split=test", expect=2)
    assert "holds the class a itself" in runs.sentence(done.stderr)
    for file in (root / "b").iterdir():
        file.write_text("no image")
    (root / "a").unlink()
    done = runs.run_tool("evaluate", *arguments, expect=2)
    assert "can be read" in runs.sentence(done.stderr)


def test_a_reader_that_goes_away_ends_a_tool_in_silence(workdir, folder):
    command = [sys.executable, "-m", "tools.predict", f"--workdir={workdir}", str(folder / "photos")]
    for flags in ([], ["--json"]):
        with subprocess.Popen(
            [*command, *flags], cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as tool:
            tool.stdout.close()
            assert tool.stderr.read() == ""
            assert tool.wait(60) == 141


def test_names_that_are_no_text_are_printed_with_escapes(workdir, folder, tmp_path):
    photo = folder / "photos" / "test" / "a" / "0000.jpg"
    shutil.copy(photo, os.fsencode(tmp_path) + b"/\xff\x1b.jpg")
    done = runs.run_tool("predict", f"--workdir={workdir}", tmp_path)
    assert done.stdout.startswith(f"{tmp_path}/\\udcff\\x1b.jpg\n")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--layer=conv1,", "--out=x.npz"], "layer='' is not known"),
        (["--layer=conv1,conv1", "--out=x.npz"], "must name different layers"),
        (["--layer=all,fc7", "--out=x.npz"], "layer='all' is not known"),
        (["--out=folder.npz"], "folder.npz cannot be written: it is a folder"),
        (["--plot=no/x.png"], "there is no folder no"),
    ],
)
def test_features_refuses_before_it_works(workdir, folder, tmp_path, flags, sentence):
    (tmp_path / "folder.npz").mkdir()
    photo = folder / "photos" / "test" / "a" / "0000.jpg"
    done = runs.run_tool("features", f"--workdir={workdir}", *flags, photo, expect=2, cwd=tmp_path)
    assert sentence in runs.sentence(done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.npz"]
