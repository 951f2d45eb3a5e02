"""Caffe's AlexNet and CaffeNet: .caffemodel files and their mean image. Source: caffe/src/caffe/proto/caffe.proto.

The schema below has the fields that are needed, of both ways in which Caffe has stored layers and sizes.
"""

import functools
import math
import pathlib

import numpy as np

from common.errors import UserError, require, shortened
from configs import caffe as recipe
from models.alexnet import FEATURES, GEOMETRY, LAYERS
from weights import naming

# Message: field: number, type, whether it is repeated.
SCHEMA = {
    "BlobShape": {"dim": (1, "INT64", True)},
    "BlobProto": {
        "num": (1, "INT32", False),  # sizes of before BlobShape
        "channels": (2, "INT32", False),
        "height": (3, "INT32", False),
        "width": (4, "INT32", False),
        "data": (5, "FLOAT", True),
        "shape": (7, "BlobShape", False),
        "double_data": (8, "DOUBLE", True),
    },
    "LayerParameter": {"name": (1, "STRING", False), "blobs": (7, "BlobProto", True)},
    "V1LayerParameter": {"name": (4, "STRING", False), "blobs": (6, "BlobProto", True)},
    "NetParameter": {
        "name": (1, "STRING", False),
        "layers": (2, "V1LayerParameter", True),
        "layer": (100, "LayerParameter", True),
    },
}
# In the mean over the pixels of Caffe's ImageNet mean image, as RGB (caffe/examples/00-classification.ipynb).
MEAN = (122.6789143406786, 116.66876761696767, 104.0069879317889)


def read(path: pathlib.Path, mean: pathlib.Path | None = None) -> naming.Weights:
    """The network of a .caffemodel, at any width and with any number of classes.

    Args:
      path: the .caffemodel. The order of its layers says which network it is.
      mean: Caffe's mean image, a .binaryproto; without it, its mean over the pixels of ImageNet is subtracted.

    Raises:
      UserError: a file is missing, damaged, or of another network.
    """
    net = _parse(path, "NetParameter")
    layers = [*net.layer, *net.layers]
    require(layers, f"{path} is no .caffemodel, or is damaged: it has no layers.")
    config = recipe.get_config(_variant(path, [layer.name for layer in layers]))
    tensors = {}
    for layer in layers:
        for number, blob in enumerate(layer.blobs):
            kind = ("weight", "bias")[number] if number < 2 else f"blob {number + 1}"
            name = f"{layer.name}.{kind}"
            require(name not in tensors, f"{path} is damaged: it has {name} twice.")
            tensors[name] = _array(path, name, blob)
    first, last = (tensors.get(f"{layer}.bias", np.zeros(0)) for layer in ("conv1", "fc8"))
    config.model.width = first.size / FEATURES[2][0] or 1.0
    config.model.num_classes = last.size or 1000
    naming.check(str(path), tensors, _shapes(config.model), "Caffe's AlexNet or CaffeNet")
    params = {}
    for layer in LAYERS:
        weight = tensors[f"{layer}.weight"]
        if layer == "conv1":
            weight = weight[:, ::-1]  # from BGR
        if layer in ("fc7", "fc8"):
            # Caffe divides by 1 − rate in training what this network multiplies by 1 − rate in evaluation.
            weight = weight / np.float32(1 - config.model.dropout_rate)
        kernel = naming.from_rows(weight, len(params["conv5"]["bias"]) if layer == "fc6" else 0)
        params[layer] = {"kernel": kernel, "bias": tensors[f"{layer}.bias"]}
    return naming.Weights(config, params, _mean(mean) if mean else np.float32(MEAN))


def _variant(path, names):
    """'caffenet' if pooling comes before normalisation."""
    known = "pool1" in names and "norm1" in names
    there = shortened(", ".join(f"{name}" for name in names if name)) or "layers without names"
    require(
        known,
        f"{path} is not Caffe's AlexNet or CaffeNet: it has no layers pool1 and norm1, but {there}.",
    )
    return "caffenet" if names.index("pool1") < names.index("norm1") else ""


def _mean(path):
    blob = _parse(path, "BlobProto")
    mean = _array(path, "the mean image", blob)
    mean = mean[0] if mean.ndim == 4 and len(mean) == 1 else mean
    square = mean.ndim == 3 and mean.shape[0] == 3 and mean.shape[1] == mean.shape[2]
    require(square, f"{path} is no mean image of 3 channels and a square: it is {'×'.join(map(str, mean.shape))}.")
    require(np.isfinite(mean).all(), f"{path} holds numbers that are not finite.")
    return np.ascontiguousarray(mean[::-1].transpose(1, 2, 0))


def _shapes(model):
    shapes, seen = {}, 3
    features = [max(1, round(maps * model.width / 2)) * 2 for maps in FEATURES[2]]
    for layer, maps in zip(LAYERS, (*features, model.num_classes), strict=True):
        groups = 2 if layer in ("conv2", "conv4", "conv5") else 1
        inputs = seen * 6**2 if layer == "fc6" else seen // groups
        shapes[f"{layer}.weight"] = (maps, inputs, *(GEOMETRY[layer][:1] * 2 if layer in GEOMETRY else ()))
        shapes[f"{layer}.bias"] = (maps,)
        seen = maps
    return shapes


def _array(path, name, blob):
    """A blob as float32, without the leading axes of size 1 with which Caffe once filled up four."""
    numbers = blob.data or blob.double_data
    sizes = list(blob.shape.dim) or [blob.num, blob.channels, blob.height, blob.width]
    fits = all(size > 0 for size in sizes) and math.prod(sizes) == len(numbers)
    shape = "×".join(map(str, sizes))
    require(fits, f"{path} is damaged: {name} is said to be {shape}, and has {len(numbers)} numbers.")
    if not blob.shape.dim:
        while len(sizes) > 1 and sizes[0] == 1:
            sizes = sizes[1:]
    return np.array(numbers, np.float32).reshape(sizes)


def _parse(path, message):
    from google.protobuf.message import DecodeError

    require(path.is_file(), f"{path} is not there, or is no file.")
    found = messages()[message]()
    try:
        found.ParseFromString(path.read_bytes())
    except DecodeError:
        raise UserError(f"{path} is damaged, or is no file of Caffe: it is no {message}.") from None
    return found


@functools.cache
def messages() -> dict[str, type]:
    """The classes of the messages of SCHEMA by name."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            added = message.field.add(name=field, number=number)
            added.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if kind in SCHEMA:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                added.type = getattr(kinds, f"TYPE_{kind}")
                added.options.packed = repeated
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindFileByName("caffe.proto").message_types_by_name
    return {name: message_factory.GetMessageClass(found[name]) for name in SCHEMA}
