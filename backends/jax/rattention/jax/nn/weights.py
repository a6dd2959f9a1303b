"""Weights by name, as files hold them: the same names and layouts as `rattention.torch.nn`.

Works for a layer, and for any module that contains some: names are paths, joined by dots.

    safetensors.numpy.save_file(state_dict(layer), "layer.safetensors")
    load_state_dict(layer, safetensors.numpy.load_file("layer.safetensors"))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rattention.jax.arguments import kind
from rattention.jax.dispatch import ARRAYS, unwrapped


def state_dict(module: nnx.Module) -> dict[str, np.ndarray]:
    """All parameters as NumPy arrays (ml_dtypes for bfloat16), by dotted path.

    Raises:
        ValueError: a parameter without value, of an abstract module (`nnx.eval_shape`); it is named.
    """
    parameters = {name: param.get_value() for name, param in _parameters(module).items()}
    for name, value in parameters.items():
        if isinstance(value, jax.ShapeDtypeStruct):
            raise ValueError(f"{name}: expected an array, got none: the module is abstract, of nnx.eval_shape")
    return {name: np.asarray(jax.device_get(value)) for name, value in parameters.items()}


def load_state_dict(module: nnx.Module, weights: Mapping[str, Any]) -> None:
    """Set every parameter of `module` to the array of its name, in the dtype that the parameter has.

    The module may be abstract, `nnx.eval_shape(make_layer)`: then no weights are made only to be replaced.

    Raises:
        ValueError: a parameter without weight, a weight without parameter, or a shape that differs.
        TypeError: a weight that is no JAX or NumPy array, or not one of floating-point numbers.

    Where it raises, nothing is set. A parameter keeps its device, and its split over several; those of an abstract
    module are where the weights are, NumPy arrays on the default device.
    """
    parameters = _parameters(module)
    missing, unknown = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
    if missing or unknown:
        raise ValueError(f"weights: expected {sorted(parameters)}, got {missing} missing and {unknown} unknown")
    found = {name: unwrapped(weight) for name, weight in weights.items()}
    for name, param in parameters.items():
        weight = found[name]
        if not isinstance(weight, ARRAYS) or isinstance(weight, np.ma.MaskedArray):
            raise TypeError(f"{name}: expected a jax.Array or numpy.ndarray, got {kind(weight)}")
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            raise TypeError(f"{name}: expected a floating-point dtype, got {weight.dtype}")
        if tuple(weight.shape) != tuple(param.shape):
            raise ValueError(f"{name}: expected shape {list(param.shape)}, got {list(weight.shape)}")
    made = {name: _array(found[name], param.get_value()) for name, param in parameters.items()}
    for name, param in parameters.items():
        # Set as a whole: an update in place would have to say how its result is split over explicit axes.
        param.set_value(made[name])


def _array(weight: Any, old: Any) -> jax.Array:
    """`weight` in the dtype of `old`, where its owner has put that. Transfers are explicit: a guard lets them pass."""
    placed = isinstance(old, jax.Array) and not isinstance(old, jax.core.Tracer) and old.committed
    new = weight.astype(old.dtype)  # of NumPy a copy: what is done to the given array later does not reach the module
    if placed:
        return jax.device_put(new, old.sharding)
    return new if isinstance(new, jax.Array) else jax.device_put(new)


def _parameters(module: nnx.Module) -> dict[str, Any]:
    found = {}
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param):
            found[".".join(str(part) for part in path)] = node
    return found
