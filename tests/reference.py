"""The two-tower AlexNet in plain NumPy, float64, with hand-written gradients: what the tests measure the models by.

Written from the paper and the notes on its source, not from `models/`. Every layer is a pair: `layer(...)` gives the
output, and `layer_gradient(...)` takes the gradient of the loss by that output back to its inputs. Maps are NHWC.
"""

import numpy as np

CONVOLUTIONS = ("conv1", "conv2", "conv3", "conv4", "conv5")
KERNEL_STRIDE_PAD = {
    "conv1": (11, 4, 0),
    "conv2": (5, 1, 2),
    "conv3": (3, 1, 1),
    "conv4": (3, 1, 1),
    "conv5": (3, 1, 1),
}
AFTER = {
    "paper": {
        "conv1": ("relu", "lrn", "pool"),
        "conv2": ("relu", "lrn", "pool"),
        "conv3": ("relu",),
        "conv4": ("relu",),
        "conv5": ("relu", "pool"),
    },
    "2012": {
        "conv1": ("lrn", "pool", "relu"),
        "conv2": ("relu", "lrn", "srn", "pool"),
        "conv3": ("relu",),
        "conv4": ("relu",),
        "conv5": ("relu", "pool"),
    },
}
LRN = {"k": 2.0, "n": 5, "alpha": 1e-4, "beta": 0.75}
SRN = {"size": 5, "scale": 0.001 / 25, "power": 0.75, "constant": 1.0}


def conv(x, kernel, bias, stride, pad):
    """`pad` is ((top, bottom), (left, right))."""
    x = np.pad(x, ((0, 0), *pad, (0, 0)))
    kh, kw = kernel.shape[:2]
    h, w = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    y = np.zeros((len(x), h, w, kernel.shape[3])) + bias
    for i in range(kh):
        for j in range(kw):
            y += x[:, i : i + h * stride : stride, j : j + w * stride : stride][:, :h, :w] @ kernel[i, j]
    return y


def conv_gradient(x, kernel, g, stride, pad):
    padded = np.pad(x, ((0, 0), *pad, (0, 0)))
    dx, dkernel = np.zeros_like(padded), np.zeros_like(kernel)
    h, w = g.shape[1:3]
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            at = (slice(None), slice(i, i + (h - 1) * stride + 1, stride), slice(j, j + (w - 1) * stride + 1, stride))
            dx[at] += g @ kernel[i, j].T
            dkernel[i, j] = np.einsum("nhwc,nhwf->cf", padded[at], g)
    (top, _), (left, _) = pad
    return dx[:, top : top + x.shape[1], left : left + x.shape[2]], dkernel, g.sum((0, 1, 2))


def relu(x):
    return np.maximum(x, 0)


def relu_gradient(x, g):
    return g * (x > 0)


def _neighbours(n, maps):
    """(maps, maps) of 0 and 1: column i marks the maps that element i is normalised by."""
    first = np.arange(maps) - n // 2
    source = np.arange(maps)[:, None]
    return ((source >= first) & (source < first + n)).astype(np.float64)


def lrn(x, k, n, alpha, beta):
    s = k + alpha * (x**2 @ _neighbours(n, x.shape[-1]))
    return x / s**beta


def lrn_gradient(x, g, k, n, alpha, beta):
    window = _neighbours(n, x.shape[-1])
    s = k + alpha * (x**2 @ window)
    return g / s**beta - 2 * alpha * beta * x * ((g * x / s ** (beta + 1)) @ window.T)


def _box(x, size, mirrored=False):
    """Sums over size×size pixels of each map; mirrored for even sizes, whose windows are not symmetric."""
    rows, columns = (_neighbours(size, length) for length in x.shape[1:3])
    if mirrored:
        rows, columns = rows.T, columns.T
    return np.einsum("nhwc,hi,wj->nijc", x, rows, columns, optimize=True)


def srn(x, size, scale, power, constant):
    return x / (constant + scale * _box(x**2, size)) ** power


def srn_gradient(x, g, size, scale, power, constant):
    s = constant + scale * _box(x**2, size)
    return g / s**power - 2 * scale * power * x * _box(g * x / s ** (power + 1), size, mirrored=True)


def _windows(size, window, stride):
    """(start, end) of each window, the last of which may be cut off by the edge but not be empty."""
    count = -(-(size - window) // stride) + 1
    return [(i * stride, min(i * stride + window, size)) for i in range(count) if i * stride < size]


def max_pool(x, window, stride):
    rows, columns = (_windows(size, window, stride) for size in x.shape[1:3])
    y = np.empty((len(x), len(rows), len(columns), x.shape[3]))
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            y[:, i, j] = x[:, top:bottom, left:right].max((1, 2))
    return y


def max_pool_gradient(x, g, window, stride):
    """The first maximum of each window, row by row, takes the whole gradient."""
    dx = np.zeros_like(x)
    n, c = np.indices((x.shape[0], x.shape[3]))
    for i, (top, bottom) in enumerate(_windows(x.shape[1], window, stride)):
        for j, (left, right) in enumerate(_windows(x.shape[2], window, stride)):
            where = x[:, top:bottom, left:right].reshape(len(x), -1, x.shape[3]).argmax(1)
            dx[n, top + where // (right - left), left + where % (right - left), c] += g[:, i, j]
    return dx


def avg_pool(x, window, stride):
    rows, columns = (_windows(size, window, stride) for size in x.shape[1:3])
    return np.stack([np.stack([x[:, t:b, le:r].mean((1, 2)) for le, r in columns], 1) for t, b in rows], 1)


def avg_pool_gradient(x, g, window, stride):
    dx = np.zeros_like(x)
    for i, (top, bottom) in enumerate(_windows(x.shape[1], window, stride)):
        for j, (left, right) in enumerate(_windows(x.shape[2], window, stride)):
            dx[:, top:bottom, left:right] += g[:, i : i + 1, j : j + 1] / ((bottom - top) * (right - left))
    return dx


def dropout(x, mask, rate):
    """In training (a mask of 0 and 1 is given) a plain product; in testing all outputs, times 1 − rate."""
    return x * (1 - rate) if mask is None else x * mask


dropout_gradient = dropout  # linear, so the gradient goes through the same factor


def softmax_cross_entropy(logits, labels):
    """Mean over the batch, and its gradient."""
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    rows = np.arange(len(labels))
    gradient = np.exp(log_p)
    gradient[rows, labels] -= 1
    return -log_p[rows, labels].mean(), gradient / len(labels)


_STEPS = {"relu": (relu, relu_gradient), "lrn": (lrn, lrn_gradient), "srn": (srn, srn_gradient)}
_STEPS["pool"] = (max_pool, max_pool_gradient)


def _halves(array):
    """What tower 0 and tower 1 own: the first and the second half of the output maps."""
    return np.split(array, 2, axis=-1)


def _padding(name, size):
    kernel, stride, pad = KERNEL_STRIDE_PAD[name]
    # conv1 runs over the bottom and right edge: 224 pixels and 11, 4 give 55.
    return tuple((pad, pad + (-(s + 2 * pad - kernel) % stride if name == "conv1" else 0)) for s in size)


def forward(
    params, images, *, exchange=("conv3", "fc6", "fc7"), order="paper", masks=None, rate=0.5, lrn=None, pool=(3, 2)
):
    """Logits, and a list of what each step saw for `backward`.

    Args:
      params: {'conv1': {'kernel', 'bias'}, …, 'fc8'}; conv2/kernel is 5×5×(in/2)×out, tower 0 the first half of out.
      images: (N, H, W, 3) with the mean subtracted.
      exchange: the layers that see the maps of both towers; conv1 and fc8 always do.
      order: 'paper' or '2012'.
      masks: {'fc6': (N, units), 'fc7': …} of 0 and 1 in training; none in testing.
      rate: of dropout.
      lrn: constants of the response normalisation.
      pool: window and stride of max-pooling.
    """
    constants = {"relu": {}, "lrn": lrn or LRN, "srn": SRN, "pool": {"window": pool[0], "stride": pool[1]}}
    towers = [images.astype(np.float64)] * 2
    cache = []

    def exchanged(name):
        joined = name in (*exchange, "fc8")
        # Flattened maps are joined as maps: each pixel's channels are tower 0's, then tower 1's.
        return [np.concatenate(towers, -1)] * 2 if joined else list(towers)

    def owned(name):
        layer = {key: np.asarray(value, np.float64) for key, value in params[name].items()}
        return list(zip(_halves(layer["kernel"]), _halves(layer["bias"]), strict=True))

    for name in CONVOLUTIONS:
        inputs = exchanged(name)
        stride, pad = KERNEL_STRIDE_PAD[name][1], _padding(name, inputs[0].shape[1:3])
        cache.append(("conv", name, inputs, (stride, pad)))
        towers = [conv(x, k, b, stride, pad) for x, (k, b) in zip(inputs, owned(name), strict=True)]
        for step in AFTER[order][name]:
            cache.append((step, name, towers, constants[step]))
            towers = [_STEPS[step][0](x, **constants[step]) for x in towers]
    for name in ("fc6", "fc7"):
        inputs = exchanged(name)
        cache.append(("fc", name, inputs, None))
        towers = [x.reshape(len(x), -1) @ k + b for x, (k, b) in zip(inputs, owned(name), strict=True)]
        cache.append(("relu", name, towers, {}))
        towers = [relu(x) for x in towers]
        factors = [None] * 2 if masks is None else _halves(masks[name])
        cache.append(("dropout", name, factors, rate))
        towers = [dropout(x, mask, rate) for x, mask in zip(towers, factors, strict=True)]
    x = np.concatenate(towers, -1)
    cache.append(("logits", "fc8", [x], None))
    return x @ np.asarray(params["fc8"]["kernel"], np.float64) + np.asarray(params["fc8"]["bias"], np.float64), cache


def backward(params, cache, g_logits, exchange=("conv3", "fc6", "fc7")):
    """Gradients of all parameters, as one tree, from that of the logits."""
    grads = {}
    g = []
    for step, name, saved, extra in reversed(cache):
        kernel = np.asarray(params[name]["kernel"], np.float64)
        if step == "logits":
            grads[name] = {"kernel": saved[0].T @ g_logits, "bias": g_logits.sum(0)}
            g = _halves(g_logits @ kernel.T)
        elif step in ("conv", "fc"):
            dx, dkernel, dbias = [], [], []
            for x, k, g_tower in zip(saved, _halves(kernel), g, strict=True):
                if step == "conv":
                    one = conv_gradient(x, k, g_tower, *extra)
                else:
                    flat = x.reshape(len(x), -1)
                    one = (g_tower @ k.T).reshape(x.shape), flat.T @ g_tower, g_tower.sum(0)
                for total, value in zip((dx, dkernel, dbias), one, strict=True):
                    total.append(value)
            grads[name] = {"kernel": np.concatenate(dkernel, -1), "bias": np.concatenate(dbias, -1)}
            # Both towers read the same joined maps, so what they send back adds up before it is parted again.
            g = _halves(dx[0] + dx[1]) if name in exchange else dx
        elif step == "dropout":
            g = [dropout_gradient(g_tower, mask, extra) for g_tower, mask in zip(g, saved, strict=True)]
        else:
            g = [_STEPS[step][1](x, g_tower, **extra) for x, g_tower in zip(saved, g, strict=True)]
    return grads


def loss_and_gradients(params, images, labels, *, exchange=("conv3", "fc6", "fc7"), **options):
    """The mean cross-entropy of the batch, and its gradients; `options` as in `forward`."""
    logits, cache = forward(params, images, exchange=exchange, **options)
    loss, g_logits = softmax_cross_entropy(logits, labels)
    return loss, backward(params, cache, g_logits, exchange)


def update(params, velocity, grads, rates, momentum=0.9, weight_decay=5e-4):
    """v ← 0.9 v − 0.0005 ε w − ε g; w ← w + v (section 5). `rates` is a tree of ε; biases do not decay (source)."""
    new_params, new_velocity = {}, {}
    for name, layer in params.items():
        new_params[name], new_velocity[name] = {}, {}
        for key, w in layer.items():
            decay = weight_decay if key == "kernel" else 0.0
            rate = rates[name][key]
            v = momentum * velocity[name][key] - decay * rate * w - rate * grads[name][key]
            new_velocity[name][key], new_params[name][key] = v, w + v
    return new_params, new_velocity


def random_params(rng, maps, classes, pixels, channels=3, exchange=("conv3", "fc6", "fc7"), deviation=0.1):
    """Random parameters for `maps` output maps of conv1 … fc7 and `pixels` values per map of conv5 after pooling."""
    names = (*CONVOLUTIONS, "fc6", "fc7", "fc8")
    widths = (*maps, classes)
    params, below = {}, channels
    for name, width in zip(names, widths, strict=True):
        seen = below if name in ("conv1", "fc8", *exchange) else below // 2
        window = (KERNEL_STRIDE_PAD[name][0],) * 2 if name in CONVOLUTIONS else ()
        shape = (*window, seen * pixels if name == "fc6" else seen, width)
        params[name] = {
            "kernel": deviation * rng.standard_normal(shape),
            "bias": deviation * rng.standard_normal(width),
        }
        below = width
    return params
