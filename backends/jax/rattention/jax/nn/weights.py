"""Weights by name, as files hold them: the same names and layouts as `rattention.torch.nn`.

Works for a layer, and for any module that contains some: names are paths, joined by dots.

    safetensors.numpy.save_file(state_dict(layer), "layer.safetensors")
    load_state_dict(layer, safetensors.numpy.load_file("layer.safetensors"))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx


def state_dict(module: nnx.Module) -> dict[str, np.ndarray]:
    """All parameters as NumPy arrays (ml_dtypes for bfloat16), by dotted path."""
    return {name: np.asarray(param[...]) for name, param in _parameters(module).items()}


def load_state_dict(module: nnx.Module, weights: Mapping[str, Any]) -> None:
    """Set every parameter of `module` to the array of its name, in the dtype that the parameter has.

    Raises:
        ValueError: a parameter without weight, a weight without parameter, or a shape that differs; nothing is set.
    """
    parameters = _parameters(module)
    missing, unknown = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
    if missing or unknown:
        raise ValueError(f"weights: expected {sorted(parameters)}, got {missing} missing and {unknown} unknown")
    for name, param in parameters.items():
        if tuple(weights[name].shape) != tuple(param.shape):
            raise ValueError(f"{name}: expected shape {list(param.shape)}, got {list(weights[name].shape)}")
    for name, param in parameters.items():
        param[...] = jnp.asarray(weights[name]).astype(param.dtype)


def _parameters(module: nnx.Module) -> dict[str, Any]:
    found = {}
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param):
            found[".".join(str(part) for part in path)] = node
    return found
