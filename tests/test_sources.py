"""Folders and TFDS builders: their files in a fixed order, or one sentence about what is wrong."""

import os
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import datasets
from common.errors import UserError
from datasets import prepared, preparing, progress, shapes, sources


def contents(file):
    with file.open() as opened:
        return opened.read()


def test_a_folder_lists_its_images_by_class_and_name(tmp_path):
    data.make_folder(tmp_path, {"train": 36, "val": 2}, classes=("cat", "ant", "bee"), size=9)
    (tmp_path / "train/ant/notes.txt").write_text("not an image")
    (tmp_path / "train/ant/.hidden.jpg").write_text("not an image")
    (tmp_path / "README").write_text("not a split")
    source = sources.open_source(str(tmp_path), "unused")
    assert source.class_names == ("ant", "bee", "cat")
    assert source.counts == {"train": 36, "val": 2}
    files = list(source.files("train"))
    assert [(file.name, file.label) for file in files] == [
        (f"train/{name}/{i:04d}.jpg", label)
        for label, (name, first) in enumerate({"ant": 1, "bee": 2, "cat": 0}.items())
        for i in range(first, 36, 3)
    ]
    assert all(contents(file) == (tmp_path / file.name).read_bytes() for file in files)


NAMES = st.binary(min_size=1, max_size=20).filter(lambda name: not set(name) & {0, ord("/")} and name[:1] != b".")


@settings(max_examples=40, deadline=None)
@given(names=st.sets(NAMES, max_size=6))
def test_file_names_are_any_bytes(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("names")
    data.make_folder(root, {"train": 1}, classes=("a",))
    for number, name in enumerate(names):
        path = os.path.join(os.fsencode(root / "train/a"), name + b".jpg")  # noqa: PTH118 -- bytes
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(b"%d" % number)
    files = list(sources.open_source(str(root), "unused").files("train"))
    assert len(files) == 1 + len(names)
    assert {contents(file) for file in files} >= {b"%d" % number for number in range(len(names))}
    assert all(progress.printable(file.name).isprintable() for file in files)


def test_a_wrong_folder_is_one_sentence(tmp_path):
    def sentence(root, **options):
        with pytest.raises(UserError) as error:
            sources.open_source(str(root), "unused", **options)
        return str(error.value)

    assert "does not exist" in sentence(tmp_path / "nowhere")
    assert "holds no SPLIT/CLASS" in sentence(tmp_path)
    (tmp_path / "train/cat").mkdir(parents=True)
    assert "holds no image files" in sentence(tmp_path)
    data.make_folder(tmp_path, {"train": 1, "validation": 1}, classes=("cat",))
    assert "did you mean validation?" in sentence(tmp_path, train_split="valid")
    (tmp_path / "validation/dog").mkdir()
    assert f"{tmp_path}/validation/dog is a class that" in sentence(tmp_path)
    (tmp_path / "train/dog").mkdir()
    assert f"{tmp_path}/train/dog holds no image files" in sentence(tmp_path)
    (tmp_path / "train/dog").rmdir()
    (tmp_path / "validation/dog").rmdir()
    (tmp_path / "my photos/cat").mkdir(parents=True)
    assert "split's name" in sentence(tmp_path)
    (tmp_path / "my photos").rename(tmp_path / "photos")
    os.mkdir(os.fsencode(tmp_path / "train") + b"/caf\xe9")  # noqa: PTH102
    assert r"caf\udce9' needs a printable name" in sentence(tmp_path)
    (tmp_path / "train" / os.fsdecode(b"caf\xe9")).rename(tmp_path / "train/cat ")
    assert "cat ' needs a printable name, without spaces" in sentence(tmp_path), "TFDS would take the space away"
    assert "cannot be listed: File name too long" in sentence("/" + "x" * 300)
    line = sentence(tmp_path / "two\nlines")
    assert r"two\nlines does not exist" in line
    assert line.isprintable()


def test_names_of_folders_and_of_tfds_sets_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("here").mkdir()
    assert all(map(sources.is_folder, ["here", "./nowhere", "/nowhere", "no/where", "~/x"]))
    assert not any(map(sources.is_folder, ["cifar10", "shapes", "imagenet_resized/32x32", "imagenette/320px-v2"]))
    assert sources.prepared_name("imagenet_resized/32x32") == "imagenet_resized-32x32"
    assert sources.prepared_name("no/where/") == "where"
    with pytest.raises(UserError, match="did you mean cifar10"):
        sources.open_source("cifar10x", "data")
    with pytest.raises(UserError, match="imagenet_resized/32x32"):
        sources.open_source("imagenet_resized/33x33", "data")
    with pytest.raises(UserError, match=r"TFDS has shapes, but not as 'shapes:9\.9\.9': did you mean shapes\?"):
        sources.open_source("shapes:9.9.9", "data")
    with pytest.raises(UserError, match=r"coco has no image \(Image\) with a label .* objects \(Sequence\)"):
        sources.open_source("coco", "data")
    for name in ("x" * 300, "/" + "x" * 300, "no/" + "x" * 300):
        with pytest.raises(UserError, match="too long a name"):
            sources.prepared_name(name)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("dataset_info.json", b"{", b"["),
        ("dataset_info.json", b"splits", b"split\xff"),
        ("dataset_info.json", b"{SHARD_X_OF_Y}", b"{SHARD_X_OF_Z}"),
        ("dataset_info.json", b"{SPLIT}", b"{SPLJT}"),
        ("dataset_info.json", b"{SPLIT}", b"|SPLIT}"),
        ("shapes-train.tfrecord-00000-of-00001", b"label", b"lable"),
    ],
)
def test_a_damaged_tfds_set_is_one_sentence(tmp_path, monkeypatch, file, old, new):
    monkeypatch.setattr(shapes.Shapes, "EXAMPLES", {"train": 20, "test": 10})
    sources.open_source("shapes", str(tmp_path))
    (folder,) = (tmp_path / "shapes").iterdir()
    content = (folder / file).read_bytes()
    assert old in content
    (folder / file).write_bytes(content.replace(old, new))
    with pytest.raises(
        UserError, match=rf"TFDS cannot read shapes in {tmp_path}/shapes.* \(.*\); delete that folder, and"
    ):
        source = sources.open_source("shapes", str(tmp_path))
        assert [len(list(source.files(split))) for split in ("train", "test")] == [20, 10]


MINIATURE = """
import numpy as np
import tensorflow_datasets as tfds

class Miniature(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
        features = {"image": image, "label": tfds.features.ClassLabel(names=["a", "b"])}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(6):
            yield i, {"image": np.full((20, 20, 3), 40 * i, np.uint8), "label": i % 2}
"""


def test_a_further_data_set_is_one_module_and_its_entry(tmp_path, monkeypatch):
    (tmp_path / "miniature.py").write_text(MINIATURE)
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(tmp_path)])
    monkeypatch.setattr(datasets, "BUILDERS", (*datasets.BUILDERS, "miniature"))
    datasets.tensorflow_datasets.cache_clear()
    opened = prepared.Records.open(preparing.prepare("miniature", data_dir=str(tmp_path / "data"), size=20))
    assert opened.class_names == ("a", "b")
    found = {data.decoded(image).mean(): label for image, label in data.stored(opened, "train").values()}
    assert found == {40 * i: i % 2 for i in range(6)}
    with pytest.raises(UserError, match="did you mean miniature"):
        sources.open_source("minature", "data")
