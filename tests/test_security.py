"""No code of strangers runs, no host is asked, and nothing is written beside the folder that the user named."""

import io
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest

import data
from common.errors import UserError
from datasets import prepared, preparing

ROOT = pathlib.Path(__file__).parent.parent


# What would run code.


def test_a_pickle_in_a_prepared_set_is_refused_and_not_run(tmp_path):
    folder = data.make_folder(tmp_path / "photos", {"train": 2}, size=40)
    directory = preparing.prepare(str(folder), data_dir=str(tmp_path / "data"), size=32)
    arrays = dict(np.load(directory / "statistics.npz"))

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    file = io.BytesIO()
    np.savez(file, **arrays | {"principal_std": np.array([Evil()], object)})
    for content in (file.getvalue(), np.array([Evil()], object).dumps()):
        (directory / "statistics.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"statistics\.npz cannot be used .* prepare the data set again\.$"):
            prepared.Records.open(directory)
    assert not (tmp_path / "evil").exists()


def test_a_prepared_set_does_not_name_modules_to_import(tmp_path, monkeypatch):
    folder = data.make_folder(tmp_path / "photos", {"train": 2}, size=40)
    directory = preparing.prepare(str(folder), data_dir=str(tmp_path / "data"), size=32)
    (tmp_path / "stranger.py").write_text(f"import os; os.mkdir({str(tmp_path / 'evil')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    original = (directory / "features.json").read_text()
    for key in ("pythonClassName", "python_class_name", r"python\u0043lassName", "type"):
        for name in ("text_feature.Text", "features_dict.FeaturesDict"):
            changed = original.replace(
                f'pythonClassName": "tensorflow_datasets.core.features.{name}', f'{key}": "stranger.X'
            )
            assert changed != original
            (directory / "features.json").write_text(changed)
            with pytest.raises(UserError, match=r"of the class stranger\.X\); delete .* prepare the data set again\.$"):
                prepared.Records.open(directory)
    assert not (tmp_path / "evil").exists()


# What would be written elsewhere.


def tree(folder):
    """Every file and folder, and when it was last changed."""
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["../../../evil", "{root}/evil", "/evil"])
@pytest.mark.parametrize("where", ["train", "class", "validation"])
def test_archives_write_nothing_beside_the_data(tmp_path, name, where):
    manual, name = tmp_path / "home/tars", name.format(root=tmp_path)
    data.make_miniature_imagenet(manual, validation=3, size=8)
    image = data.encoded(data.picture("evil", 0, 8))
    train, validation = (manual / f"ILSVRC2012_img_{split}.tar" for split in ("train", "val"))
    with tarfile.open(validation if where == "validation" else train, "a") as archive:
        if where == "class":  # a later archive of the class takes the place of the one before
            data.add(archive, "n01440764.tar", data.tar_of({f"{name}.JPEG": image}))
        else:
            data.add(archive, f"{name}.{'tar' if where == 'train' else 'JPEG'}", data.tar_of({"x.JPEG": image}))
        for kind in tarfile.SYMTYPE, tarfile.LNKTYPE:
            link = tarfile.TarInfo("n01443537.tar")
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=f"holds {re.escape(name)}"):
        preparing.prepare("imagenet2012", data_dir=str(tmp_path / "home/data"), manual_dir=str(manual), size=32)
    after = {name: time for name, time in tree(tmp_path).items() if not f"{name}/".startswith("home/data/")}
    assert after | {"home": 0} == before | {"home": 0}, "but that it holds the data, the folder above has not changed"
    assert not list(pathlib.Path("/").glob("evil*"))


# Says which hosts Python asks for while it prepares few shapes, a miniature ImageNet, and what the flags name.
LISTENED = """
import runpy, sys
def heard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(arguments[1], tuple):
        print("network:", event, arguments[1], file=sys.stderr)
    if event.startswith(("socket.getaddrinfo", "socket.gethostby", "urllib.")):
        print("network:", event, arguments, file=sys.stderr)
sys.addaudithook(heard)
from datasets import preparing, shapes
shapes.Shapes.EXAMPLES = {"train": 20, "test": 10}
data_dir, manual_dir = (argument.partition("=")[2] for argument in sys.argv[2:4])
for name in ("shapes", "imagenet2012"):
    preparing.prepare(name, data_dir=data_dir, manual_dir=manual_dir, size=32)
runpy.run_module("tools.prepare", run_name="__main__")
"""


@pytest.fixture
def proxy():
    """A server that gives no answers, and the list of what it was asked."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(100))

        thread = threading.Thread(target=listen)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_preparing_asks_no_host_and_writes_to_its_folder_only(tmp_path, proxy):
    address, asked = proxy
    data.make_folder(tmp_path / "photos", {"train": 4, "test": 2})
    shutil.copy(tmp_path / "photos/train/a/0000.jpg", tmp_path / "photos/test/b/copy.jpg")
    data.make_miniature_imagenet(tmp_path / "tars", validation=3)
    empty = {
        variable: tmp_path / variable for variable in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "PWD")
    }
    for folder in empty.values():
        folder.mkdir()
    # The network of TensorFlow's C++ file systems is curl, which does as these say.
    proxies = {f"{kind}_proxy": address for kind in ("http", "https", "all")}
    before = tree(tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LISTENED,
            f"--dataset={tmp_path / 'photos'}",
            f"--data_dir={tmp_path / 'data'}",
            f"--manual_dir={tmp_path / 'tars'}",
            "--size=32",
        ],
        cwd=empty["PWD"],
        env={variable: str(folder) for variable, folder in empty.items()}
        | proxies
        | {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    warning = "warning: 1 images of 'test' are also in 'train' (test/b/copy.jpg is train/a/0000.jpg)"
    assert done.stderr == f"{warning}: errors measured on it will look too low.\n"
    assert sorted(os.listdir(tmp_path / "data/prepared")) == ["imagenet2012-32", "photos-32", "shapes-32"]  # noqa: PTH208
    assert asked == []
    after = tree(tmp_path)
    assert {path for path in after if not f"{path}/".startswith("data/")} == before.keys()
    changed = [path for path in before if after[path] != before[path]]
    assert changed in ([], ["TMPDIR"]), "Python tries whether it can write there, and removes what it wrote"


@pytest.mark.slow
def test_the_traps_of_the_last_test_catch_what_they_should(proxy):
    address, asked = proxy
    program = LISTENED.partition("from datasets")[0] + (
        "import socket\n"
        "try: socket.create_connection(('192.0.2.1', 1), timeout=0.01)\n"  # an address of nobody's (RFC 5737)
        "except OSError: pass\n"
        "import tensorflow as tf\n"
        "tf.io.gfile.exists('gs://nowhere/x')\n"
    )
    environment = os.environ | {f"{kind}_proxy": address for kind in ("http", "https", "all")}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        end = time.monotonic() + 60
        while not asked and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
        heard = process.stderr.read()
    assert "network: socket.connect ('192.0.2.1', 1)" in heard
    assert asked
