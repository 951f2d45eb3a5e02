"""The notebook: stored bare, names what exists, and runs from end to end, here and beside the packages of Colab."""

import base64
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import nbclient
import nbformat
import numpy as np
import PIL.Image
import pytest

from common import cli
from configs import demo

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks/alexnet.ipynb"
MADE = {"../kept.txt"}  # by the notebook itself
PICTURES = {"augmentation": 1, "figures": 5, "predict": 1, "finetune": 1}
# What Colab's GPU runtimes had in June 2026, after github.com/googlecolab/backend-info: those of its packages that this
# project uses too, a kernel, and another package called `datasets`.
BROUGHT = """
    pip==24.1.2 numpy==2.0.2 tensorflow==2.20.0 jax==0.7.2 jaxlib==0.7.2 flax==0.11.2 orbax-checkpoint==0.12.0
    absl-py==1.4.0 protobuf==5.29.6 tensorflow-datasets==4.9.10 tensorflow-metadata==1.17.3 matplotlib==3.10.0
    pillow==11.3.0 rich==13.9.4 ipykernel==6.17.1 ipython==7.34.0 datasets==4.0.0
"""


def cells():
    return nbformat.read(NOTEBOOK, as_version=4).cells


def test_it_is_stored_without_outputs():
    for cell in cells():
        assert not cell.get("outputs") and not cell.get("execution_count"), cell.source
        assert not cell.metadata


def test_what_it_names_exists():
    fields, seen = dict(cli.field_names(demo.get_config())), 0
    for cell in cells():
        for name in set(re.findall(r"[\w./-]+\.(?:py|md|txt)\b", cell.source)) - MADE:
            assert (ROOT / name).exists(), f"{name}: {cell.source}"
            seen += 1
        for field in re.findall(r"--config\.([\w.]+)", cell.source):
            assert field in fields, f"{field}: {cell.source}"
            seen += 1
        for module, arguments in re.findall(r"python (?:-m )?([\w.]+)(.*)", cell.source.replace("\\\n", "")):
            path = pathlib.Path(module if module.endswith(".py") else module.replace(".", "/") + ".py")
            code = "".join((ROOT / file).read_text() for file in (path, "common/cli.py", "tools/shared.py"))
            for flag in re.findall(r"--(\w+)=", arguments):
                assert flag == "config" or re.search(rf'DEFINE_\w+\(\s*"{flag}"', code), f"--{flag}: {cell.source}"
                seen += 1
    assert seen > 20


@pytest.fixture
def repository(tmp_path):
    """The files of this checkout as they are now, committed, so that they can be cloned."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists():
            (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "repository" / name)
    git = ["git", "-c", "user.name=test", "-c", "user.email=", "-C", str(tmp_path / "repository")]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    return tmp_path / "repository"


def run(python, repository, home, monkeypatch, jax):
    """Runs the notebook in the empty folder `home` with a kernel of the interpreter `python`, and checks what it shows.

    The trainings have four steps, on two simulated devices; `jax` is the notebook's JAX.
    """
    monkeypatch.delenv("PYTHONPATH")  # the clone shall find its own files
    monkeypatch.setenv("PATH", f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(home))
    for variable in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(home / "jupyter"))
    spec = home / "jupyter/kernels/tested/kernel.json"
    spec.parent.mkdir(parents=True)
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": command, "display_name": "tested", "language": "python"}))

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (settings,) = (cell for cell in notebook.cells if cell.id == "settings")
    quick = {"REPOSITORY": str(repository), "JAX": jax, "FLAGS": "--cpu_devices=2 --config.num_steps=4"}
    for name, value in quick.items():
        settings.source, count = re.subn(rf"^{name} = .*", f"{name} = {value!r}", settings.source, flags=re.M)
        assert count == 1, name
    where = {"metadata": {"path": home}}
    nbclient.NotebookClient(notebook, kernel_name="tested", timeout=600, resources=where).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            check(cell)


def check(cell):
    """No command failed, and the pictures are there."""
    said = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    said = re.sub(r"\x1b\[[?\d;]*\w|\r", "\n", said)  # of the progress bars
    assert not re.search(r"^(error|ERROR|fatal|Traceback)\b", said, re.M), said
    shown = [output.data for output in cell.outputs if "data" in output]
    pictures = [data["image/png"] for data in shown if "image/png" in data]
    assert len(pictures) == PICTURES.get(cell.id, 0), cell.id
    for picture in pictures:
        pixels = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(picture))).convert("L"))
        assert min(pixels.shape) > 200 and pixels.std() > 10, cell.id
    if cell.id == "tensorboard":
        assert any("iframe" in data.get("text/html", "") for data in shown)
    if cell.id in ("train", "finetune"):
        assert "Done: 4 steps" in said


@pytest.mark.slow
def test_it_runs_from_end_to_end(repository, tmp_path, monkeypatch):
    run(pathlib.Path(sys.executable), repository, tmp_path / "home", monkeypatch, jax="")


@pytest.fixture
def colab(tmp_path):
    """The interpreter of a new environment that has what Colab brings."""
    python = shutil.which("python3.12")
    if not python or subprocess.run([python, "-c", "import ensurepip"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("Colab has Python 3.12, and this machine has none on PATH")
    subprocess.run([python, "-m", "venv", tmp_path / "colab"], check=True)
    made = tmp_path / "colab/bin/python"
    subprocess.run([made, "-m", "pip", "install", "-q", *BROUGHT.split()], check=True)
    return made


def versions(python):
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True).stdout
    return {package["name"]: package["version"] for package in json.loads(listed)}


@pytest.mark.slow
def test_it_installs_and_runs_beside_what_colab_brings(repository, colab, tmp_path, monkeypatch):
    before = versions(colab)
    run(colab, repository, tmp_path / "home", monkeypatch, jax="jax")
    after = versions(colab)
    assert (after["tensorflow"], after["numpy"]) == (before["tensorflow"], before["numpy"])
    assert "tensorflow-cpu" not in after
    assert after["jaxlib"] == after["jax"] != before["jax"]
