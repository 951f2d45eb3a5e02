"""The layers that networks call: `models.layers`, computed in the form that is fast on the platform.

This is the one place where forms of layers are chosen, when a program is lowered for a platform. Only a kernel of
`models.fused` and the loop of `models.phases` are chosen before, by the network, and `models.amx` by the machine that
traces the program. A platform's module holds only what is
faster there, and `models.default` has the rest. To add a platform: a module with some of the functions of
`models.default`, and a line in PLATFORMS. The tests run every form on the CPU.

Reverse-mode differentiation only.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from models import cpu, default, fused, gpu, layers, phases, tpu

# By JAX's names of platforms; a GPU is 'cuda' or 'rocm'.
PLATFORMS = {"cpu": cpu, "tpu": tpu, "cuda": gpu, "rocm": gpu}


def _form(name: str, *arrays: jax.Array, **options) -> Any:
    """Function `name` of the platform's module, of arrays with these options."""
    other = functools.partial(getattr(default, name), **options)
    own = {
        platform: functools.partial(getattr(module, name), **options)
        for platform, module in PLATFORMS.items()
        if hasattr(module, name)
    }
    return lax.platform_dependent(*arrays, **own, default=other) if own else other(*arrays)


# A layer of one array.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _layer(name, options, x):
    jax.eval_shape(functools.partial(getattr(layers, name), **dict(options)), x)  # raises
    return _form(name, x, **dict(options))


def _layer_forward(name, options, x):
    return _layer(name, options, x), x


def _layer_backward(name, options, x, g):
    return (_form(f"{name}_gradient", x, g, **dict(options)),)


_layer.defvjp(_layer_forward, _layer_backward)


def relu(x: jax.Array) -> jax.Array:
    """See `layers.relu`."""
    return _layer("relu", (), x)


ACTIVATIONS = layers.ACTIVATIONS | {"relu": relu}


def local_response_normalization(
    x: jax.Array, *, k: float, n: int, alpha: float, beta: float, groups: int = 1
) -> jax.Array:
    """See `layers.local_response_normalization`."""
    constants = {"k": float(k), "n": n, "alpha": float(alpha), "beta": float(beta), "groups": groups}
    return _layer("local_response_normalization", tuple(constants.items()), x)


def spatial_response_normalization(
    x: jax.Array, *, size: int, scale: float, power: float, constant: float = 1.0
) -> jax.Array:
    """See `layers.spatial_response_normalization`."""
    constants = {"size": size, "scale": float(scale), "power": float(power), "constant": float(constant)}
    return _layer("spatial_response_normalization", tuple(constants.items()), x)


def softmax(logits: jax.Array) -> jax.Array:
    """The probabilities of (N, classes) logits."""
    return _form("softmax", logits)


# A layer with a kernel, and one that is pooled.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(name, options, x, kernel):
    jax.eval_shape(functools.partial(getattr(layers, name), **dict(options)), x, kernel)  # raises
    return _form(name, x, kernel, **dict(options))


def _product_forward(name, options, x, kernel):
    return _product(name, options, x, kernel), (x, kernel)


def _product_backward(name, options, inputs, g):
    kernel_gradient = _form(f"{name}_kernel_gradient", *inputs, g, **dict(options))
    return _form(f"{name}_input_gradient", *inputs, g, **dict(options)), kernel_gradient


_product.defvjp(_product_forward, _product_backward)


def conv(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding="VALID", groups: int = 1) -> jax.Array:
    """See `layers.conv`."""
    options = {"stride": stride, "padding": _pixels(padding), "groups": groups}
    return _product("conv", tuple(options.items()), x, kernel)


def _pixels(padding):
    return ((0, 0), (0, 0)) if padding == "VALID" else tuple((int(a), int(b)) for a, b in padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv_pool(padding, x, kernel):
    return phases.conv_pool(x, kernel, padding)


def _conv_pool_forward(padding, x, kernel):
    y, place = phases.conv_pool_and_places(x, kernel, padding)
    return y, (x, kernel, place)


def _conv_pool_backward(padding, kept, g):
    x, kernel, place = kept
    options = {"stride": 1, "padding": padding, "groups": 1}
    maps = jax.eval_shape(functools.partial(layers.conv, **options), x, kernel)
    window, stride = phases.POOL
    below = default.max_pool_gradient(maps, place, g, window=window, stride=stride)
    by_kernel = phases.kernel_gradient(x, place, g, len(kernel), padding)
    return _form("conv_input_gradient", x, kernel, below, **options), by_kernel


_conv_pool.defvjp(_conv_pool_forward, _conv_pool_backward)


def conv_pool(x: jax.Array, kernel: jax.Array, window: int, stride: int, *, padding="VALID") -> jax.Array:
    """`max_pool` of `conv` with stride 1: what `phases.fits` in a loop that is fast on CPUs, on any platform."""
    padding = _pixels(padding)
    jax.eval_shape(functools.partial(layers.conv, padding=padding), x, kernel)  # raises
    if phases.fits(x.shape, kernel.shape, padding, (window, stride)):
        y = _conv_pool(padding, *layers.rounded(x, kernel))
        return layers.rounded_back(y, kernel)  # before sums of it, of overlapping windows, are multiplied
    return max_pool(conv(x, kernel, padding=padding), window, stride)


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """See `layers.dense`."""
    return _product("dense", (), x, kernel)


# Pooling.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """See `layers.max_pool`."""
    return _form("max_pool", x, window=window, stride=stride)


def _max_pool_forward(x, window, stride):
    y, place = _form("max_pool_and_places", x, window=window, stride=stride)
    return y, (x, place)  # a platform's gradient takes one of the two, and XLA drops the other


def _max_pool_backward(window, stride, kept, g):
    return (_form("max_pool_gradient", *kept, g, window=window, stride=stride),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize_pool(options, x, rectified):
    del x
    return _joined("normalize_pool", rectified, **dict(options))


def _normalize_pool_forward(options, x, rectified):
    del x
    y, place = _joined("normalize_pool_and_places", rectified, **dict(options))
    return y, (rectified, place)


def _normalize_pool_backward(options, kept, g):
    return _joined("normalize_pool_gradient", *kept, g, **dict(options)), jnp.zeros_like(kept[0])


def _joined(name, x, *arrays, kernel, **options):
    """The platform's form, or a kernel of `models.fused`."""
    if kernel and fused.fits(x.shape, groups=options["groups"], window=options["window"]):
        return getattr(fused, name)(x, *arrays, **options)
    return _form(name, x, *arrays, **options)


_normalize_pool.defvjp(_normalize_pool_forward, _normalize_pool_backward)


def normalize_pool(
    x: jax.Array, rectified: jax.Array, window: int, stride: int, *, kernel: bool = False, **options
) -> jax.Array:
    """`max_pool` of `local_response_normalization`, with its options, of `rectified`, which is `relu` of x.

    The values of x are not read. The gradient goes to x, through the ReLU, and none to `rectified`. With `kernel`, a
    kernel for NVIDIA GPUs computes the maps that `fused.fits` accepts; no other platform can then.
    """
    whole = {**options, "window": window, "stride": stride, "kernel": kernel}
    return _normalize_pool(tuple(whole.items()), x, lax.stop_gradient(rectified))


def avg_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """See `layers.avg_pool`."""
    return _form("avg_pool", x, window=window, stride=stride)
