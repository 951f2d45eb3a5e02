"""Weights of torchvision and Caffe become workdirs that compute what those programs compute, and go back unchanged."""

import os
import pathlib
import pickle
import re
import resource
import zipfile

import numpy as np
import pytest
import safetensors.numpy

import reference
import runs
from common.errors import UserError
from predictor import Predictor
from weights import tensors

RNG = np.random.default_rng(0)


def random_tensors(shapes):
    """Weights with which every layer passes on about what it gets."""
    return {
        name: (RNG.normal(0, 1.4 / np.sqrt(np.prod(shape[1:])), shape) if len(shape) > 1 else RNG.normal(0, 0.1, shape))
        .astype(np.float32)
        for name, shape in shapes.items()
    }  # fmt: skip


# Written out by hand: torchvision/models/alexnet.py at a sixteenth of its width.
TORCHVISION = random_tensors(
    {
        "features.0.weight": (4, 3, 11, 11),
        "features.0.bias": (4,),
        "features.3.weight": (12, 4, 5, 5),
        "features.3.bias": (12,),
        "features.6.weight": (24, 12, 3, 3),
        "features.6.bias": (24,),
        "features.8.weight": (16, 24, 3, 3),
        "features.8.bias": (16,),
        "features.10.weight": (16, 16, 3, 3),
        "features.10.bias": (16,),
        "classifier.1.weight": (256, 576),
        "classifier.1.bias": (256,),
        "classifier.4.weight": (256, 256),
        "classifier.4.bias": (256,),
        "classifier.6.weight": (1000, 256),
        "classifier.6.bias": (1000,),
    }
)
# Of bvlc_alexnet/train_val.prototxt, likewise.
CAFFE = random_tensors(
    {
        "conv1.weight": (6, 3, 11, 11),
        "conv1.bias": (6,),
        "conv2.weight": (16, 3, 5, 5),
        "conv2.bias": (16,),
        "conv3.weight": (24, 16, 3, 3),
        "conv3.bias": (24,),
        "conv4.weight": (24, 12, 3, 3),
        "conv4.bias": (24,),
        "conv5.weight": (16, 12, 3, 3),
        "conv5.bias": (16,),
        "fc6.weight": (256, 576),
        "fc6.bias": (256,),
        "fc7.weight": (256, 256),
        "fc7.bias": (256,),
        "fc8.weight": (7, 256),
        "fc8.bias": (7,),
    }
)
CAFFE["fc8.weight"] /= 100  # of pixels in 0–255, which the normalisation needs, come logits too large for a softmax
IMAGES = RNG.integers(0, 256, (3, 256, 256, 3)).astype(np.uint8)


def convert(*flags, expect=0, cwd=None):
    return runs.run_tool("convert", *flags, expect=expect, cwd=cwd)


# The other programs, in NumPy and float64, with maps before pixels as they have them.


def conv(x, weight, bias, stride=1, padding=0, groups=1):
    parts = []
    for maps, rows in zip(np.split(x, groups, 1), np.split(weight, groups), strict=True):
        zero, pad = np.zeros(len(rows)), ((padding, padding),) * 2
        given = maps.transpose(0, 2, 3, 1), rows.transpose(2, 3, 1, 0).astype(np.float64)
        parts.append(reference.conv(*given, zero, stride, pad).transpose(0, 3, 1, 2))
    return np.concatenate(parts, 1) + bias[:, None, None]


def pool(x):
    """3/2; 55, 27 and 13 pixels are whole windows, in floor mode as in ceil mode."""
    return reference.max_pool(x.transpose(0, 2, 3, 1), 3, 2).transpose(0, 3, 1, 2)


def across_channels(x, size=5, alpha=1e-4, beta=0.75):
    """Caffe's LRN with k = 1: the sum of squares over 5 channels of all groups, times alpha / 5."""
    squares = np.pad(x**2, ((0, 0), (size // 2, size // 2), (0, 0), (0, 0)))
    sums = sum(squares[:, i : i + x.shape[1]] for i in range(size))
    return x / (1 + alpha / size * sums) ** beta


def relu(x):
    return np.maximum(x, 0)


def softmax(logits):
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def fully_connected(x, t, names):
    x = x.reshape(len(x), -1)
    for name in names:
        x = x @ t[f"{name}.weight"].T.astype(np.float64) + t[f"{name}.bias"]
        x = x if name == names[-1] else relu(x)
    return x


def of_torchvision(images):
    x = images[:, 16:240, 16:240].transpose(0, 3, 1, 2) / 255
    x = (x - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array([0.229, 0.224, 0.225])[:, None, None]
    t = TORCHVISION
    for number, stride, padding, pooled in [(0, 4, 2, 1), (3, 1, 2, 1), (6, 1, 1, 0), (8, 1, 1, 0), (10, 1, 1, 1)]:
        x = relu(conv(x, t[f"features.{number}.weight"], t[f"features.{number}.bias"], stride, padding))
        x = pool(x) if pooled else x
    return fully_connected(x, t, ("classifier.1", "classifier.4", "classifier.6"))


def of_caffe(images, mean, pool_first):
    """`mean`: (3, 256, 256) in BGR."""
    x = images[..., ::-1].transpose(0, 3, 1, 2)[:, :, 14:241, 14:241] - mean[:, 14:241, 14:241].astype(np.float64)
    after = (pool, across_channels) if pool_first else (across_channels, pool)
    for name, stride, padding, groups in [
        ("conv1", 4, 0, 1),
        ("conv2", 1, 2, 2),
        ("conv3", 1, 1, 1),
        ("conv4", 1, 1, 2),
        ("conv5", 1, 1, 2),
    ]:
        x = relu(conv(x, CAFFE[f"{name}.weight"], CAFFE[f"{name}.bias"], stride, padding, groups))
        for step in {"conv1": after, "conv2": after, "conv5": (pool,)}.get(name, ()):
            x = step(x)
    return fully_connected(x, CAFFE, ("fc6", "fc7", "fc8"))


# Files as the other programs write them.


def varint(number):
    out = b""
    while number > 127:
        out, number = out + bytes([number % 128 + 128]), number // 128
    return out + bytes([number])


def field(number, content):
    """A protobuf field of bytes, by hand: https://protobuf.dev/programming-guides/encoding."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def blob(array, legacy):
    if legacy:
        sizes = (1,) * (4 - array.ndim) + array.shape
        head = b"".join(varint(number << 3) + varint(size) for number, size in enumerate(sizes, 1))
    else:
        head = field(7, field(1, b"".join(map(varint, array.shape))))
    return head + field(5, array.astype("<f4").tobytes())


def caffemodel(path, order, legacy=False, blobs=CAFFE):
    """The layers of a network as Caffe stores them: since 2015, or `legacy` as bvlc_alexnet.caffemodel has them."""
    layer, name_number, blobs_number = (2, 4, 6) if legacy else (100, 1, 7)
    content = field(1, b"AlexNet")
    for name in ("data", "conv1", "relu1", *order, "conv2", "conv3", "conv4", "conv5", "fc6", "drop6", "fc7", "fc8"):
        inside = field(name_number, name.encode())
        for kind in ("weight", "bias", "more"):
            if f"{name}.{kind}" in blobs:
                inside += field(blobs_number, blob(blobs[f"{name}.{kind}"], legacy))
        content += field(layer, inside)
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def from_torchvision(folder):
    safetensors.numpy.save_file(TORCHVISION, folder / "alexnet.safetensors")
    done = convert(f"--weights={folder / 'alexnet.safetensors'}", f"--workdir={folder / 'torchvision'}")
    assert "1000 classes" in done.stdout
    return folder / "torchvision"


def logits_of(workdir, images, views="centre"):
    """Logits but for a constant: of the probabilities."""
    return np.log(np.stack(list(Predictor(workdir, views=views).probabilities(images))))


def same(found, expected):
    found, expected = (logits - logits.mean(-1, keepdims=True) for logits in (found, expected))
    assert np.ptp(expected, axis=0).max() > 0.1, "the images must differ"
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_torchvisions_network_computes_what_it_did(from_torchvision):
    same(logits_of(from_torchvision, IMAGES), of_torchvision(IMAGES))
    network = Predictor(from_torchvision)
    assert network.step == 0
    assert network.labels[0] == "tench, Tinca tinca"
    assert network.predict(IMAGES[0])[0][0] in network.labels


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("order", [("norm1", "pool1"), ("pool1", "norm1")])
def test_caffes_networks_compute_what_they_did(folder, legacy, order):
    path = caffemodel(folder / "net.caffemodel", order, legacy)
    mean = RNG.uniform(80, 140, (3, 256, 256)).astype(np.float32)
    (folder / "mean.binaryproto").write_bytes(blob(mean, legacy=True))
    (folder / "names.txt").write_text("\n".join("abcdefg"), "utf-8-sig")
    workdir = folder / f"caffe{legacy}{order[0]}"
    convert(
        f"--weights={path}",
        f"--workdir={workdir}",
        f"--mean={folder / 'mean.binaryproto'}",
        f"--classes={folder / 'names.txt'}",
    )
    same(logits_of(workdir, IMAGES), of_caffe(IMAGES, mean, pool_first=order[0] == "pool1"))
    assert Predictor(workdir).labels == tuple("abcdefg")


def test_caffes_mean_is_known(folder):
    path = caffemodel(folder / "plain.caffemodel", ("norm1", "pool1"))
    convert(f"--weights={path}", f"--workdir={folder / 'plain'}")
    mean = np.broadcast_to(np.array([104.0069879, 116.6687676, 122.6789143])[:, None, None], (3, 256, 256))
    same(logits_of(folder / "plain", IMAGES), of_caffe(IMAGES, mean, pool_first=False))


def test_the_way_back_is_bit_for_bit(from_torchvision, tmp_path):
    out = tmp_path / "back.safetensors"
    done = convert(f"--workdir={from_torchvision}", "--to=safetensors", f"--out={out}")
    assert "mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225)" in done.stdout
    back = safetensors.numpy.load_file(out)
    assert back.keys() == TORCHVISION.keys()
    for name, array in TORCHVISION.items():
        np.testing.assert_array_equal(back[name].view(np.uint32), array.view(np.uint32), err_msg=name)


def test_a_run_of_this_project_starts_from_them(from_torchvision, tmp_path):
    """And another run in the same folder is refused."""
    photographs = runs.photographs(tmp_path)
    flags = ["--config.num_steps=2", "--config.batch_size=4", f"--config.dataset.name={photographs / 'photos'}"]
    flags += [f"--config.dataset.data_dir={tmp_path / 'data'}", "--config.model.num_classes=3"]
    done = runs.run_main(f"--config=configs/finetune.py:{from_torchvision}", f"--workdir={tmp_path / 'tuned'}", *flags)
    assert "all parameters but fc8/bias, fc8/kernel" in done.stdout


PICKLE = b"cos\nsystem\n(S'touch executed'\ntR."


def truncated(path, data):
    path.write_bytes(data[: len(data) // 2])


def with_change(name, array):
    found = dict(TORCHVISION)
    found.pop(name, None)
    return found if array is None else found | {name: array}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--weights=absent.safetensors"], "absent.safetensors is not there"),
        (["--weights=text.safetensors"], "cannot be read, or is damaged"),
        (["--weights=half.safetensors"], "half.safetensors cannot be read, or is damaged"),
        (["--weights=lacks.safetensors"], "is not torchvision's AlexNet: there is no tensor classifier.4.bias"),
        (["--weights=other.safetensors"], "features.3.weight is 12×5×5×5, and must be 12×4×5×5"),
        (["--weights=more.safetensors"], "it has a tensor features.1.weight as well, 4"),
        (["--weights=nan.safetensors"], "features.0.bias holds numbers that are not finite"),
        (["--weights=whole-numbers.safetensors"], "features.0.bias holds int8, and must hold floating-point numbers"),
        (["--weights=third.caffemodel"], "it has a tensor conv3.blob 3 as well, 7"),
        (["--weights=scalar.safetensors"], "features.0.weight is 4×3×11×11, and must be 1×3×11×11"),
        (["--weights=bytes.caffemodel"], "it has no layers pool1 and norm1, but b'.xff'"),
        (["--weights=v0.caffemodel"], "it has no layers pool1 and norm1, but layers without names"),
        (["--weights=twice.caffemodel"], "twice.caffemodel is damaged: it has conv1.weight twice"),
        (["--weights=half.caffemodel"], "is damaged, or is no file of Caffe|has no layers"),
        (["--weights=wrong.caffemodel"], "conv2.weight is 16×6×5×5, and must be 16×3×5×5"),
        (["--weights=text.caffemodel"], "is damaged, or is no file of Caffe|has no layers"),
        (["--weights=whole.caffemodel", "--mean=text.caffemodel"], "damaged|no mean image"),
        (["--weights=whole.caffemodel", "--mean=pair.binaryproto"], "a square: it is 2×3×256×256"),
        (["--weights=whole.caffemodel", "--mean=nan.binaryproto"], "nan.binaryproto holds numbers that are not finite"),
        (["--weights=whole.caffemodel", "--classes=blank.txt"], "must name every class; line 3 is ''"),
        (["--weights=whole.caffemodel", "--classes=zero.txt"], r"must name every class; line 7 is 'g.x00'"),
        (["--weights=whole.caffemodel", "--classes=same.txt"], "must name no class twice: .'a'."),
        (["--weights=whole.caffemodel", "--classes=pipe"], "--classes=pipe is not there, or is no file"),
        (["--weights=whole.caffemodel", "--classes=two.txt"], "two.txt has 2 names, and the network 7 classes"),
        (["--weights=whole.safetensors", "--mean=two.txt"], "--mean belongs to a .caffemodel"),
        (["--weights=whole.h5"], "must end in .pth, .pt, .safetensors or .caffemodel"),
        (["--weights=whole.safetensors", "--workdir=taken"], "taken is the workdir of a run"),
        ([], "Give either --weights=FILE to take over, or --to"),
        (["--weights=whole.safetensors", "--out=x.pth"], "--out belongs to --to"),
        (["--weights=whole.safetensors", "--step=3"], "--step belongs to --to"),
        (["--to=torch", "--workdir=taken", "--out=x.safetensors"], "must end in .pth or .pt with --to=torch"),
        (["--to=safetensors", "--workdir=none"], "none is not the workdir of a run"),
    ],
)
def test_mistakes_end_in_a_sentence_and_nothing_is_written(tmp_path, flags, sentence):
    whole = safetensors.numpy.save(TORCHVISION)
    (tmp_path / "whole.safetensors").write_bytes(whole)
    (tmp_path / "text.safetensors").write_text("weights")
    (tmp_path / "text.caffemodel").write_text("weights")
    (tmp_path / "two.txt").write_text("a\nb")
    (tmp_path / "blank.txt").write_text("a\nb\n\nd\ne\nf\ng\n")
    (tmp_path / "zero.txt").write_text("a\nb\nc\nd\ne\nf\ng\0\n")
    (tmp_path / "same.txt").write_text("a\nb\na\nd\ne\nf\ng\n")
    os.mkfifo(tmp_path / "pipe")
    truncated(tmp_path / "half.safetensors", whole)
    caffemodel(tmp_path / "whole.caffemodel", ("norm1", "pool1"))
    truncated(tmp_path / "half.caffemodel", (tmp_path / "whole.caffemodel").read_bytes())
    ungrouped = CAFFE | {"conv2.weight": np.zeros((16, 6, 5, 5), np.float32)}
    caffemodel(tmp_path / "wrong.caffemodel", ("norm1", "pool1"), blobs=ungrouped)
    third = CAFFE | {"conv3.more": np.zeros(7, np.float32)}
    caffemodel(tmp_path / "third.caffemodel", ("norm1", "pool1"), blobs=third)
    first = field(100, field(1, b"conv1") + field(7, blob(CAFFE["conv1.weight"], False)))
    (tmp_path / "twice.caffemodel").write_bytes((tmp_path / "whole.caffemodel").read_bytes() + first)
    (tmp_path / "bytes.caffemodel").write_bytes(field(100, field(1, b"\xff")))
    (tmp_path / "v0.caffemodel").write_bytes(field(2, field(1, field(1, b"conv1"))))
    (tmp_path / "pair.binaryproto").write_bytes(blob(np.zeros((2, 3, 256, 256), np.float32), True))
    (tmp_path / "nan.binaryproto").write_bytes(blob(np.full((3, 256, 256), np.nan, np.float32), True))
    for name, changed in {
        "lacks": with_change("classifier.4.bias", None),
        "other": with_change("features.3.weight", np.zeros((12, 5, 5, 5), np.float32)),
        "more": with_change("features.1.weight", np.zeros(4, np.float32)),
        "nan": with_change("features.0.bias", np.full(4, np.nan, np.float32)),
        "scalar": with_change("features.0.bias", np.array(1, np.float32)),
        "whole-numbers": with_change("features.0.bias", np.zeros(4, np.int8)),
    }.items():
        safetensors.numpy.save_file(changed, tmp_path / f"{name}.safetensors")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    workdir = [] if any(flag.startswith("--workdir") for flag in flags) else ["--workdir=new"]
    done = convert(*workdir, *flags, expect=2, cwd=tmp_path)
    assert re.search(sentence, runs.sentence(done.stderr)), runs.sentence(done.stderr)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path not in before}
    assert not left - {"taken/.lock"}


@pytest.fixture
def full_disk():
    """No file of this process grows beyond 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_full_disk_ends_in_a_sentence_and_nothing_is_left(tmp_path, full_disk, suffix):
    if suffix == "pth":
        pytest.importorskip("torch", reason="PyTorch is no dependency of this project")
    with pytest.raises(UserError, match="cannot be written: File too large"):
        tensors.write(tmp_path / f"x.{suffix}", TORCHVISION)
    assert not list(tmp_path.iterdir())


# With PyTorch: `pip install torch torchvision` beside this project.


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is no dependency of this project")


def test_without_pytorch_a_sentence_names_what_to_do(tmp_path):
    (tmp_path / "alexnet.pth").write_bytes(b"PK")
    done = convert(f"--weights={tmp_path / 'alexnet.pth'}", f"--workdir={tmp_path / 'w'}", expect=2)
    assert re.search("pip install torch|is damaged", runs.sentence(done.stderr))


def test_torchvision_itself_there_and_back(torch, tmp_path):
    """Full size: logits within 1e-4, and the same bits after the way back."""
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    network = models.alexnet().eval()
    with torch.no_grad():
        for parameter in network.parameters():  # PyTorch's own are so small that all images look alike
            parameter *= 2
        torch.save(network.state_dict(), tmp_path / "alexnet.pth")
        x = torch.tensor(IMAGES[:, 16:240, 16:240]).permute(0, 3, 1, 2) / 255
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
        expected = network((x - mean) / std).numpy()
    convert(f"--weights={tmp_path / 'alexnet.pth'}", f"--workdir={tmp_path / 'w'}")
    same(logits_of(tmp_path / "w", IMAGES), expected)
    convert(f"--workdir={tmp_path / 'w'}", "--to=torch", f"--out={tmp_path / 'back.pth'}")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    models.alexnet().load_state_dict(back)
    for name, tensor in network.state_dict().items():
        assert torch.equal(back[name].view(torch.int32), tensor.view(torch.int32)), name


def test_the_module_of_the_documents_computes_what_the_predictor_does(torch, folder, tmp_path):
    """For a network of Caffe's order and for the paper's, which was trained here."""
    photographs = runs.photographs(tmp_path)
    runs.run(photographs, tmp_path / "trained", "--config.num_steps=10")
    path = caffemodel(tmp_path / "net.caffemodel", ("pool1", "norm1"))
    convert(f"--weights={path}", f"--workdir={tmp_path / 'caffe'}")
    scope = {}
    exec(documented("import torch", "\nnetwork = "), scope)
    for name in ("trained", "caffe"):
        out = tmp_path / f"{name}.pth"
        done = convert(f"--workdir={tmp_path / name}", "--to=torch", f"--out={out}", "--step=latest")
        network = Predictor(tmp_path / name, views="centre", step="latest")
        crop, size = network.config.input.crop, network.size
        arguments = eval(f"dict({re.search(r'AlexNet[(]state, (.*)[)]', done.stdout)[1]})")
        module = scope["AlexNet"](torch.load(out, weights_only=True), **arguments).eval()
        images, margin = IMAGES[:, :size, :size], (size - crop) // 2
        x = torch.tensor(images[:, margin : margin + crop, margin : margin + crop]).permute(0, 3, 1, 2)
        with torch.no_grad():
            logits = module(x).numpy()
        found = np.log(np.stack(list(network.probabilities(images))))
        found, logits = (v - v.mean(-1, keepdims=True) for v in (found, logits))
        assert np.ptp(logits, axis=0).max() > 1e-3
        np.testing.assert_allclose(found, logits, atol=1e-4, rtol=0)


def documented(first, end):
    """A piece of Python of docs/weights.md that begins with `first`."""
    text = pathlib.Path(runs.ROOT, "docs/weights.md").read_text()
    return re.search(rf"```python\n({first}.*?){end}", text, re.S)[1]


@pytest.mark.filterwarnings("ignore")  # of PyTorch's exporter
def test_the_module_of_the_documents_becomes_onnx(torch, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = caffemodel(tmp_path / "net.caffemodel", ("norm1", "pool1"))
    convert(f"--weights={path}", f"--workdir={tmp_path / 'w'}")
    convert(f"--workdir={tmp_path / 'w'}", "--to=torch", f"--out={tmp_path / 'alexnet.pth'}")
    monkeypatch.chdir(tmp_path)
    scope = {}
    code = documented("import torch", "```") + documented("batch = ", "```").replace("224", "227")
    exec(code, scope)
    session = runtime.InferenceSession("alexnet.onnx")
    for count in (1, 7):
        pixels = RNG.integers(0, 256, (count, 3, 227, 227)).astype(np.float32)
        with torch.no_grad():
            expected = scope["network"](torch.tensor(pixels)).numpy()
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(session.run(None, {"pixels": pixels})[0], expected, atol=1e-4, rtol=0)


def test_a_pickle_with_code_in_it_is_not_executed(torch, tmp_path):
    (tmp_path / "code.pth").write_bytes(PICKLE)
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("archive/data.pkl", PICKLE)
        archive.writestr("archive/version", "3\n")
    with (tmp_path / "object.pth").open("wb") as file:
        pickle.dump({"epoch": 3}, file)
    torch.save({"epoch": 3, "model": {}}, tmp_path / "more.pth")
    for name in ("code", "zip", "object", "more"):
        done = convert(f"--weights={name}.pth", "--workdir=new", expect=2, cwd=tmp_path)
        assert re.search("Nothing in it was executed|cannot be read|no state_dict", runs.sentence(done.stderr))
        assert not (tmp_path / "executed").exists() and not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore")  # of TorchScript
def test_other_files_of_pytorch_are_refused(torch, tmp_path):
    tensors.write(tmp_path / "whole.pth", TORCHVISION)
    data = (tmp_path / "whole.pth").read_bytes()
    truncated(tmp_path / "half.pth", data)
    middle = len(data) // 2
    (tmp_path / "flipped.pth").write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pth")
    torch.save({"features.0.bias": torch.zeros(4, dtype=torch.int8)}, tmp_path / "whole-numbers.pth")
    for name, says in {
        "half": "half.pth cannot be read, or is damaged",
        "flipped": "flipped.pth is damaged: a checksum in it is wrong",
        "script": "script.pth cannot be read, or is damaged|more than tensors",
        "whole-numbers": "features.0.bias holds torch.int8, and must hold floating-point numbers",
    }.items():
        done = convert(f"--weights={tmp_path / name}.pth", f"--workdir={tmp_path / 'w'}", expect=2)
        assert re.search(says, runs.sentence(done.stderr)) and "to False" not in done.stderr
        assert done.stderr.count("\n") == 1, "a warning of a library as well"
