"""The cache of `rattention_extend`: the last tokens of each row, and one state for all tokens before them."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from rattention.spec import SpecError
from rattention.torch.arguments import number
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FEATURE_MAPS = ("softmax", "relu", "identity")

CACHE = "Cache.empty"


class Cache(NamedTuple):
    """What a sequence leaves behind, in the canonical form of the specification (EXT-3 .. EXT-6, EXT-10).

    A tuple, so it passes through `torch.compile`, `torch.func` transforms and pytree utilities as it is.
    """

    k: Tensor
    """`[B, W, Hkv, D]` in storage dtype: keys of the last W = max(window, 0) tokens before rotary embedding, newest
    last, zero-filled on the left. With window None every token so far has a slot."""

    v: Tensor
    """`[B, W, Hkv, Dv]`: their values."""

    state: Tensor
    """`[B, Hkv, F, Dv]` float32: sum of phi(k)^T v over all older tokens."""

    length: Tensor
    """`[B]` int32: tokens seen so far, row by row."""

    @classmethod
    def empty(
        cls,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        window: int | None,
        feature_map: str = "softmax",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Cache:
        """A cache that has seen nothing. `value_dim` defaults to `head_dim`.

        Raises:
            SpecError: no size, window, feature map or storage dtype that a call could have (ERR-4, ERR-5).
        """
        batch = _count("batch", batch, 0)
        num_kv_heads, head_dim = _count("num_kv_heads", num_kv_heads, 1), _count("head_dim", head_dim, 1)
        Dv = head_dim if value_dim is None else _count("value_dim", value_dim, 1)
        window = None if window is None else _count("window", number(window), -1, ", or None")
        if not isinstance(feature_map, str) or feature_map not in FEATURE_MAPS:
            raise SpecError(CACHE, "feature_map", f"one of {', '.join(FEATURE_MAPS)}", repr(feature_map), "ERR-5")
        dtype = storage_dtype(CACHE, dtype)
        F = head_dim if feature_map == "identity" else 2 * head_dim
        W = 0 if window is None else max(window, 0)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            torch.zeros(batch, W, num_kv_heads, head_dim, dtype=dtype, device=device),
            torch.zeros(batch, W, num_kv_heads, Dv, dtype=dtype, device=device),
            torch.zeros(batch, num_kv_heads, F, Dv, dtype=wide, device=device),
            torch.zeros(batch, dtype=torch.int32, device=device),
        )


def storage_dtype(operation: str, dtype: Any) -> torch.dtype:
    """`dtype` if q, k and v may have it."""
    if dtype not in DTYPES:
        known = " or ".join(str(x).removeprefix("torch.") for x in DTYPES)
        raise SpecError(operation, "dtype", f"dtype {known}", str(dtype).removeprefix("torch."), "ERR-4")
    return dtype


def _count(name: str, value: Any, least: int, more: str = "") -> int:
    """`value` as an int that is not below `least`. A size that `torch.compile` traces stays symbolic."""
    count = as_int(value)
    if count is None or count < least:
        raise SpecError(CACHE, name, f"an int >= {least}{more}", repr(value), "ERR-5")
    return count


def as_int(value: Any) -> Any:
    """`value` as an int; None for what is none, such as True, 2.0 and a tensor."""
    if isinstance(value, bool | Tensor):
        return None
    if isinstance(value, int | torch.SymInt):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return None
