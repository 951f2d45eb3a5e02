"""The layers that networks call: `models.layers`, computed in the form that is fast on the platform.

This is the one place where forms of layers are chosen, when a program is lowered for a platform. A platform's module
holds only what is faster there, and `models.default` has the rest. To add a platform: a module with some of the
functions of `models.default`, a line in PLATFORMS, and its name in the tests' list of forms.

Reverse-mode differentiation only.
"""

import functools
from typing import Any

import jax
from jax import lax

from models import cpu, default, layers

# By JAX's names of platforms; a GPU is 'cuda' or 'rocm'.
PLATFORMS = {"cpu": cpu}


def _form(name: str, *arrays: jax.Array, **options) -> Any:
    """Function `name` of the platform's module, of arrays with these options."""
    other = functools.partial(getattr(default, name), **options)
    own = {
        platform: functools.partial(getattr(module, name), **options)
        for platform, module in PLATFORMS.items()
        if hasattr(module, name)
    }
    return lax.platform_dependent(*arrays, **own, default=other) if own else other(*arrays)


# Convolution.


def conv(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding="VALID") -> jax.Array:
    """See `layers.conv`."""
    padding = ((0, 0), (0, 0)) if padding == "VALID" else tuple((int(a), int(b)) for a, b in padding)
    return _conv(x, kernel, stride, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x, kernel, stride, padding):
    return _form("conv", x, kernel, stride=stride, padding=padding)


def _conv_forward(x, kernel, stride, padding):
    return _conv(x, kernel, stride, padding), (x, kernel)


def _conv_backward(stride, padding, inputs, g):
    kernel_gradient = _form("conv_kernel_gradient", *inputs, g, stride=stride, padding=padding)
    return _form("conv_input_gradient", *inputs, g, stride=stride, padding=padding), kernel_gradient


_conv.defvjp(_conv_forward, _conv_backward)


# Response normalisation.


def local_response_normalization(
    x: jax.Array, *, k: float, n: int, alpha: float, beta: float, groups: int = 1
) -> jax.Array:
    """See `layers.local_response_normalization`."""
    constants = {"k": float(k), "n": n, "alpha": float(alpha), "beta": float(beta), "groups": groups}
    return _normalize("local_response_normalization", tuple(constants.items()), x)


def spatial_response_normalization(
    x: jax.Array, *, size: int, scale: float, power: float, constant: float = 1.0
) -> jax.Array:
    """See `layers.spatial_response_normalization`."""
    constants = {"size": size, "scale": float(scale), "power": float(power), "constant": float(constant)}
    return _normalize("spatial_response_normalization", tuple(constants.items()), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalize(name, constants, x):
    jax.eval_shape(functools.partial(getattr(layers, name), **dict(constants)), x)  # raises
    return _form(name, x, **dict(constants))


def _normalize_forward(name, constants, x):
    return _normalize(name, constants, x), x


def _normalize_backward(name, constants, x, g):
    return (_form(f"{name}_gradient", x, g, **dict(constants)),)


_normalize.defvjp(_normalize_forward, _normalize_backward)


# Pooling.


def max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """See `layers.max_pool`."""
    return _max_pool(x, window, stride, x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x, window, stride, shape):
    return _form("max_pool", x, window=window, stride=stride)


def _max_pool_forward(x, window, stride, shape):
    return _form("max_pool_and_places", x, window=window, stride=stride)


def _max_pool_backward(window, stride, shape, place, g):
    return (_form("max_pool_gradient", place, g, window=window, stride=stride, shape=shape),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def avg_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """See `layers.avg_pool`."""
    return _form("avg_pool", x, window=window, stride=stride)
