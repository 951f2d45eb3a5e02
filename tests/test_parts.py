"""A run on a part of a split learns nothing of the rest, not even its mean image."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import data
from common.errors import UserError
from configs import alexnet
from datasets import opening, parts, statistics
from test_statistics import check_components

ROOT = pathlib.Path(__file__).parent.parent
FILES = "statistics-*.npz"


def config_of(path, size, **dataset):
    """The paper's recipe for what `data.prepare_folder` made at `path`."""
    config = alexnet.get_config()
    config.dataset.update(dict(name=str(path / "photos"), data_dir=str(path / "data"), eval_split="test") | dataset)
    config.input.update(resize=size, crop=size - 4)
    return config


def open_records(path, size, **dataset):
    config = config_of(path, size, **dataset)
    return opening.open_records(config.dataset, config.input, warn=False)


def pixels(records, split):
    """The records of a split, read by TFDS and decoded by Pillow: (N, S, S, 3) float64."""
    return np.stack([data.decoded(image) for image, _ in data.stored(records, split).values()]).astype(np.float64)


def stored(records):
    return sorted(records.directory.glob(FILES))


def assert_equal(one, other):
    for name in statistics.SHAPES:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("size", [32, 80])
@pytest.mark.parametrize("split", ["train[:9]", "train[40%:]", "train[:5]+train[-3:]", "train+test[:2]"])
def test_the_statistics_are_those_of_the_part(tmp_path, size, split):
    data.prepare_folder(tmp_path, 23, 13, size=size)
    records = open_records(tmp_path, size, train_split=split)
    chosen = pixels(records, split)
    np.testing.assert_allclose(records.mean_image, chosen.mean(0), rtol=1e-6)
    check_components(records.principal_std, records.principal_components, chosen)
    assert abs(records.mean_image - pixels(records, "train").mean(0)).max() > 1, "the part tells nothing"
    assert len(stored(records)) == 1


@pytest.mark.parametrize("split", ["train", "train[:100%]", "train[9:]+train[:9]"])
def test_the_whole_split_keeps_its_statistics(tmp_path, split):
    records = data.prepare_folder(tmp_path, 23, 13, size=80)
    before = (records.directory / "statistics.npz").read_bytes()
    assert_equal(open_records(tmp_path, 80, train_split=split), records)
    assert (records.directory / "statistics.npz").read_bytes() == before
    assert stored(records) == []


def test_the_statistics_of_a_part_are_computed_once_whatever_its_name(tmp_path, monkeypatch):
    data.prepare_folder(tmp_path, 20, 4, size=32)
    first = open_records(tmp_path, 32, train_split="train[:50%]")
    monkeypatch.setattr(parts, "in_order", None)
    for name in ("train[:50%]", "train[:10]", "train[5:10]+train[:5]"):
        assert_equal(open_records(tmp_path, 32, train_split=name), first)
    with pytest.raises(TypeError):
        open_records(tmp_path, 32, train_split="train[:11]")


@pytest.mark.parametrize("content", [b"", b"{", None])
def test_a_damaged_file_is_written_again(tmp_path, content):
    data.prepare_folder(tmp_path, 20, 4, size=32)
    first = open_records(tmp_path, 32, train_split="train[:7]")
    (file,) = stored(first)
    sound = file.read_bytes()
    file.write_bytes(sound[: len(sound) // 2] if content is None else content)
    assert_equal(open_records(tmp_path, 32, train_split="train[:7]"), first)
    assert file.read_bytes() == sound


def test_a_folder_that_cannot_be_written_takes_none(tmp_path, monkeypatch):
    data.prepare_folder(tmp_path, 20, 4, size=32)
    first = open_records(tmp_path, 32, train_split="train[:7]")
    (file,) = stored(first)
    file.unlink()
    before = sorted(os.listdir(file.parent))  # noqa: PTH208

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    assert_equal(open_records(tmp_path, 32, train_split="train[:7]"), first)
    assert sorted(os.listdir(file.parent)) == before  # noqa: PTH208


def test_a_damaged_record_is_one_sentence(tmp_path):
    records = data.prepare_folder(tmp_path, 20, 4, size=80)
    file, rows = records.directory / "records-train.tfrecord-00000-of-00001", records.index("train").rows
    content = bytearray(file.read_bytes())
    content[rows[3, 1] + rows[3, 2] // 2] ^= 4
    file.write_bytes(content)
    open_records(tmp_path, 80, train_split="train[4:]")
    with pytest.raises(UserError, match=r"A record of .* is damaged; delete .* prepare the data set again\.$"):
        open_records(tmp_path, 80, train_split="train[:4]")


PROGRAM = """
import sys
from common import host
host.cores = lambda: int(sys.argv[2])
from datasets import parts, prepared
records = prepared.Records.open(__import__("pathlib").Path(sys.argv[1]))
found = parts.of_part(records, "train[:17]", "train")
print(found.mean_image.tobytes().hex(), found.principal_components.tobytes().hex())
"""


def test_processes_with_other_cores_find_the_same(tmp_path):
    records = data.prepare_folder(tmp_path, 23, 4, size=80)
    said = set()
    for cores in (1, 5):
        command = [sys.executable, "-c", PROGRAM, str(records.directory), str(cores)]
        said.add(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        (file,) = stored(records)
        file.unlink()
    assert len(said) == 1
