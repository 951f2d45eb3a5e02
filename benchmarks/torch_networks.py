"""The same networks, their training step and predictions in PyTorch, as fast as PyTorch makes them."""

import re
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# Stride, padding and groups of each convolution.
ALEXNET = {"conv1": (4, 0, 1), "conv2": (1, 2, 2), "conv3": (1, 1, 1), "conv4": (1, 1, 2), "conv5": (1, 1, 2)}
TORCHVISION = {"conv1": (4, 2, 1), "conv2": (1, 2, 1), "conv3": (1, 1, 1), "conv4": (1, 1, 1), "conv5": (1, 1, 1)}
POOLED = ("conv1", "conv2", "conv5")


class Local(torch.nn.Module):
    """A layer of stride 1 with a kernel of its own at each place, which PyTorch lacks: a product for each place.

    Args:
      kernel: (H, W, size, size, C, F).
      bias: (H, W, F).
    """

    def __init__(self, kernel: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        height, width, self._size, *_, features = kernel.shape
        kernel = kernel.permute(0, 1, 4, 2, 3, 5).reshape(height * width, -1, features)
        self.weight = torch.nn.Parameter(kernel.contiguous())
        self.bias = torch.nn.Parameter(bias.reshape(height * width, 1, features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, F, H, W)."""
        seen = F.unfold(x, self._size, padding=self._size // 2).permute(2, 0, 1)  # places, N, C · size²
        return torch.baddbmm(self.bias, seen, self.weight).permute(1, 2, 0).reshape(len(x), -1, *x.shape[2:])


class _Network(torch.nn.Module):
    """What the networks share: layers with the parameters of the JAX network.

    Args:
      params: its merged parameters.
      convolutions: (stride, padding, groups) by name; others have stride 1, one group, and padding that keeps the size
        of the maps.
    """

    def __init__(self, params: dict[str, dict[str, np.ndarray]], convolutions: dict[str, tuple[int, int, int]]):
        super().__init__()
        self.layers, maps = torch.nn.ModuleDict(), 0
        for name in sorted(params, key=lambda name: int(re.sub(r"\D", "", name))):  # in order of computation
            leaves = params[name]
            kernel, bias = (torch.tensor(np.asarray(leaves[kind])) for kind in ("kernel", "bias"))
            if kernel.ndim == 6:
                layer = Local(kernel, bias)
            elif kernel.ndim == 4:
                side = kernel.shape[0]
                stride, padding, groups = convolutions.get(name, (1, side // 2, 1))
                kernel = kernel.permute(3, 2, 0, 1)
                layer = torch.nn.Conv2d(kernel.shape[1] * groups, len(kernel), side, stride, padding, groups=groups)
            else:
                if maps:  # from rows, columns, maps of NHWC to maps, rows, columns
                    kernel = kernel.reshape(-1, maps, kernel.shape[1]).permute(1, 0, 2).reshape(len(kernel), -1)
                kernel = kernel.T
                layer = torch.nn.Linear(kernel.shape[1], kernel.shape[0])
            if kernel.ndim < 6:
                layer.weight.data, layer.bias.data = kernel.contiguous(), bias
            maps = bias.shape[-1] if kernel.ndim > 2 else 0
            self.layers[name] = layer


class AlexNet(_Network):
    """Two towers as grouped convolutions, ReLU, response normalisation, overlapping pooling, dropout."""

    def __init__(self, params: dict[str, dict[str, np.ndarray]]):
        super().__init__(params, ALEXNET)
        # PyTorch divides alpha by the number of maps.
        self.normalize = torch.nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) with the mean subtracted to (N, classes)."""
        layers = self.layers
        overhang = -(x.shape[-1] - 11) % 4
        x = F.pad(x, (0, overhang, 0, overhang))
        for name in ALEXNET:
            x = F.relu(layers[name](x))
            if name in ("conv1", "conv2"):
                x = self._normalize_towers(x)
            if name in POOLED:
                x = F.max_pool2d(x, 3, 2)
        x = x.flatten(1)
        for name in ("fc6", "fc7"):
            x = 0.5 * F.dropout(F.relu(layers[name](x)), 0.5, self.training)  # the paper's, which scales in evaluation
        return layers["fc8"](x)

    def _normalize_towers(self, x):
        """Each tower normalises over its own maps: they are laid side by side in the batch."""
        n, maps, height, width = x.shape
        return self.normalize(x.reshape(2 * n, maps // 2, height, width)).reshape(x.shape)


class Torchvision(_Network):
    """torchvision's AlexNet: one tower, no normalisation."""

    def __init__(self, params: dict[str, dict[str, np.ndarray]]):
        super().__init__(params, TORCHVISION)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W), standardised, to (N, classes)."""
        layers = self.layers
        for name in TORCHVISION:
            x = F.relu(layers[name](x))
            if name in POOLED:
                x = F.max_pool2d(x, 3, 2)
        x = F.adaptive_avg_pool2d(x, 6).flatten(1)
        for name in ("fc6", "fc7"):
            x = F.relu(layers[name](F.dropout(x, 0.5, self.training)))
        return layers["fc8"](x)


class CifarNet(_Network):
    """The four-layer network for CIFAR-10, without response normalisation."""

    def __init__(self, params: dict[str, dict[str, np.ndarray]]):
        super().__init__(params, {})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 32, 32) with the mean subtracted to (N, classes)."""
        layers = self.layers
        x = F.relu(F.max_pool2d(layers["conv1"](x), 3, 2, ceil_mode=True))
        x = F.avg_pool2d(F.relu(layers["conv2"](x)), 3, 2, ceil_mode=True)
        x = F.avg_pool2d(F.relu(layers["conv3"](x)), 3, 2, ceil_mode=True)
        return layers["fc10"](x.flatten(1))


class CifarLocalNet(_Network):
    """The network for CIFAR-10 with two layers of local kernels and response normalisation across maps."""

    def __init__(self, params: dict[str, dict[str, np.ndarray]]):
        super().__init__(params, {})
        self.normalize = torch.nn.LocalResponseNorm(5, alpha=1e-3, beta=0.75, k=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 24, 24) with the mean subtracted to (N, classes)."""
        layers = self.layers
        for name in ("conv1", "conv2"):
            x = F.max_pool2d(self.normalize(F.relu(layers[name](x))), 3, 2, ceil_mode=True)
        for name in ("local3", "local4"):
            x = F.relu(layers[name](x))
        return layers["fc10"](x.flatten(1))


# By the names of `models.MODELS`, with the layout of the maps that is the faster one on two cores.
NETWORKS = {
    "alexnet": (AlexNet, torch.contiguous_format),
    "torchvision": (Torchvision, torch.contiguous_format),
    "cifar": (CifarNet, torch.channels_last),
    "cifar_local": (CifarLocalNet, torch.channels_last),
}


@torch.no_grad()
def logits(name: str, params: Any, images: np.ndarray) -> np.ndarray:
    """The logits of a network of NETWORKS in evaluation, of (N, H, W, 3) float32 images."""
    network = NETWORKS[name][0](params).eval()
    return network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()


class Step:
    """The training step: uint8 images on the device to updated weights.

    Momentum is 0.9; rates and decays of single layers, which take no time, are left out.

    Args:
      config: the recipe.
      params, batch, mean: as the JAX step has them.
      factors: (1,) or (3,), what the pixels are multiplied by after the mean is subtracted.
      device: 'cpu' or 'cuda'; the latter takes channels_last, bfloat16 autocast (if the config says so), cuDNN's
        autotuning and a fused optimizer.
      compiled: whether to use `torch.compile`.
    """

    def __init__(
        self, config: Any, params: Any, batch: dict[str, np.ndarray], mean: np.ndarray, factors, *, device, compiled
    ):
        self.device = torch.device(device)
        self._cuda = self.device.type == "cuda"
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # JAX's default too
        network, layout = NETWORKS[config.model.name]
        self.network, layout = network(params).to(self.device), torch.channels_last if self._cuda else layout
        self.network = self.network.to(memory_format=layout)
        kernels = [p for name, p in self.network.named_parameters() if name.endswith("weight")]
        biases = [p for name, p in self.network.named_parameters() if name.endswith("bias")]
        rule = config.optimizer
        groups = [{"params": kernels, "weight_decay": rule.weight_decay}, {"params": biases, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=rule.learning_rate, momentum=0.9, fused=self._cuda or None)
        self._images = torch.tensor(batch["image"]).to(self.device)
        self._labels = torch.tensor(batch["label"]).long().to(self.device)
        self._shift = torch.tensor(batch["shift"]).to(self.device)
        self._mean = torch.tensor(mean).to(self.device)
        self._factors = torch.tensor(factors).to(self.device) if (factors != 1).any() else None
        self._bfloat16 = config.model.dtype == "bfloat16"
        self._layout = layout
        self._loss = torch.compile(self._loss_of, mode="max-autotune") if compiled else self._loss_of
        self._forward = torch.compile(self.network, mode="max-autotune") if compiled else self.network

    def _inputs(self):
        images = self._images.float() - self._mean + self._shift[:, None, None, :]
        images = images if self._factors is None else images * self._factors
        return images.permute(0, 3, 1, 2).contiguous(memory_format=self._layout)

    def _loss_of(self):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            logits = self.network(self._inputs())
        return F.cross_entropy(logits.float(), self._labels)

    def train(self) -> None:
        """One update."""
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        self._loss().backward()
        self.optimizer.step()
        self.wait()

    @torch.no_grad()
    def forward(self) -> np.ndarray:
        """The logits of evaluation."""
        self.network.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            logits = self._forward(self._inputs())
        self.wait()
        return logits.float().cpu().numpy() if self._cuda else logits.float().numpy()

    def wait(self) -> None:
        """Returns when the device is done."""
        if self._cuda:
            torch.cuda.synchronize()


class Prediction:
    """Probabilities of photographs: Pillow in the worker processes of a DataLoader, then the network.

    Args:
      files: names of image files.
      params: the merged parameters of the JAX network.
      mean: (S, S, 3) float32; S is the side of the squares.
      factors: (1,) or (3,), what the pixels are multiplied by after the mean is subtracted.
      crop: side of the views.
      views: 'ten' or 'centre'.
      batch_size: photographs that are computed at once.
      workers: processes of the DataLoader; they stay between passes.
      compiled: whether to use `torch.compile`.
    """

    def __init__(self, *, files, params, mean, factors, crop, views, batch_size, workers, compiled):
        self._crop, self._views, self._size = crop, views, mean.shape[0]
        margin = (self._size - crop) // 2
        self._mean = torch.tensor(mean[margin : margin + crop, margin : margin + crop]).permute(2, 0, 1)
        self._factors = torch.tensor(factors)[:, None, None]
        self._network = AlexNet(params).eval()
        self._forward = torch.compile(self._network, mode="max-autotune") if compiled else self._network
        self._loader = torch.utils.data.DataLoader(
            Squares(files, self._size), batch_size, num_workers=workers, persistent_workers=workers > 0
        )

    @torch.inference_mode()
    def __call__(self) -> np.ndarray:
        """A pass over all files: (N, classes) float32."""
        return torch.cat([self._softmax(images) for images in self._loader]).numpy()

    def _softmax(self, images):
        margin, crop, total = self._size - self._crop, self._crop, 0
        places = [(margin // 2, margin // 2)]
        if self._views == "ten":
            places += [(0, 0), (0, margin), (margin, 0), (margin, margin)]
        views = 0
        for top, left in places:
            view = (images[:, :, top : top + crop, left : left + crop].float() - self._mean) * self._factors
            for side in (view, view.flip(-1)) if self._views == "ten" else (view,):
                total, views = total + torch.softmax(self._forward(side), -1), views + 1
        return total / views


class Squares(torch.utils.data.Dataset):
    """The central squares of image files, (3, S, S) uint8, by Pillow alone and as fast as it can: with `draft`."""

    def __init__(self, files, size):
        self._files, self._size = files, size

    def __len__(self):
        return len(self._files)

    def __getitem__(self, number):
        with Image.open(self._files[number]) as image:
            scale = 2 * self._size / min(image.size)
            image.draft("RGB", (int(image.width * scale), int(image.height * scale)))
            image = image.convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((self._size, self._size), Image.Resampling.BICUBIC, box=box)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
