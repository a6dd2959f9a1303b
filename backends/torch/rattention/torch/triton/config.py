"""Frozen configurations: tile sizes, warps and pipeline stages per (device kind, D, dtype).

A configuration fixes the order of every sum, so it is part of the result: it is looked up here, never searched for
behind the caller's back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """rows: (token, head) pairs of the row tile. keys: tokens of the tile walked over. stages: pipeline depth.
    residue: keys of the tiles that the linear branch reads in `attend`."""

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2
    residue: int = 32


@dataclass(frozen=True)
class Config:
    """One configuration. `chunk` is N, the tokens between two saved states: a multiple of every `keys`. `split_residue`
    makes dk and dv of the linear branch in two launches."""

    attend: Tile
    output_grad: Tile
    query_grad: Tile
    residue_grad: Tile
    key_grad: Tile
    states: Tile
    decode: Tile = Tile(16, 64, 4, 3)
    values: int = 64
    chunk: int = 256
    elements: int = 512
    split_residue: bool = False


INTERPRETER = Config(
    attend=Tile(128, 64, 1, 1, 64),
    output_grad=Tile(128, 64, 1, 1),
    query_grad=Tile(128, 64, 1, 1),
    residue_grad=Tile(128, 64, 1, 1),
    key_grad=Tile(128, 64, 1, 1),
    states=Tile(64, 64, 1, 1),
    decode=Tile(16, 64, 1, 1),
    values=256,
    chunk=64,
    elements=65536,
)
"""Few programs with large tiles: the interpreter's time is a few microseconds per operation, whatever its size."""


def device_kind(device: torch.device) -> str:
    """sm_90, gfx942, ...: the key of the table; `interpreter` for CPU tensors."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def config_for(kind: str, D: int, Dv: int, dtype: torch.dtype) -> Config:
    """The default configuration for a device kind, head dims and storage dtype."""
    if kind == "interpreter":
        return INTERPRETER
    width = max(D, Dv)
    size = 64 if width <= 64 else 128 if width <= 128 else 256
    if dtype != torch.bfloat16:
        return _EXACT[size]
    return _BFLOAT16.get((kind, size)) or _BFLOAT16["other", size]


def _uniform(rows: int, keys: int, warps: int, stages: int, values: int) -> Config:
    tile = Tile(rows, keys, warps, stages, min(keys, 32))
    return Config(tile, tile, tile, tile, tile, tile, Tile(16, keys, 4, stages), values)


def _table(**tiles: tuple[int, ...] | bool) -> Config:
    """A configuration from tuples in the order of Tile; `decode` (16, 64, 4, 3) unless given."""
    built = {name: value if isinstance(value, bool) else Tile(*value) for name, value in tiles.items()}
    return Config(**built)  # type: ignore[arg-type]


_AMD_64 = _table(
    attend=(64, 64, 4, 1), output_grad=(64, 64, 4, 1), query_grad=(64, 64, 4, 1), residue_grad=(64, 64, 4, 1),
    key_grad=(64, 64, 4, 1), states=(64, 64, 4, 1), decode=(16, 64, 4, 1),
)  # fmt: skip
_AMD_128 = _table(
    attend=(64, 32, 8, 1, 16), output_grad=(64, 32, 8, 1), query_grad=(64, 32, 4, 1), residue_grad=(32, 32, 4, 1),
    key_grad=(32, 32, 4, 1), states=(64, 64, 4, 1), decode=(16, 64, 4, 1), split_residue=True,
)  # fmt: skip
_NVIDIA_64 = _table(
    attend=(64, 64, 4, 2), output_grad=(64, 64, 8, 2), query_grad=(64, 64, 8, 2), residue_grad=(64, 64, 8, 2),
    key_grad=(64, 64, 8, 2), states=(64, 64, 4, 2),
)  # fmt: skip
_NVIDIA_128 = _table(
    attend=(64, 64, 8, 2), output_grad=(64, 64, 8, 2), query_grad=(64, 64, 8, 2), residue_grad=(64, 64, 8, 2),
    key_grad=(32, 64, 8, 2), states=(64, 64, 8, 2), decode=(16, 32, 4, 3), split_residue=True,
)  # fmt: skip

_BFLOAT16: dict[tuple[str, int], Config] = {
    # Operands of mma.sync stand in registers, those of wgmma and tcgen05 in shared memory: smaller tiles on sm_80.
    ("sm_80", 64): replace(
        _NVIDIA_64, query_grad=Tile(64, 32, 4, 2), residue_grad=Tile(64, 32, 4, 2), key_grad=Tile(32, 64, 4, 2),
        split_residue=True,
    ),
    ("sm_80", 128): replace(
        _NVIDIA_128, query_grad=Tile(32, 64, 8, 2), residue_grad=Tile(32, 32, 8, 2), key_grad=Tile(64, 32, 8, 2),
        states=Tile(64, 32, 8, 2),
    ),
    ("sm_90", 64): replace(
        _NVIDIA_64, attend=Tile(128, 64, 8, 2), output_grad=Tile(128, 64, 8, 2), query_grad=Tile(64, 64, 4, 2),
        key_grad=Tile(64, 128, 8, 2),
    ),
    ("sm_90", 128): replace(_NVIDIA_128, attend=Tile(128, 64, 8, 2)),
    ("sm_100", 64): _NVIDIA_64,
    ("sm_100", 128): replace(_NVIDIA_128, key_grad=Tile(64, 64, 8, 1)),
    ("gfx942", 64): _AMD_64,
    ("gfx942", 128): _AMD_128,
    ("gfx950", 64): _AMD_64,
    ("gfx950", 128): _AMD_128,
    ("other", 64): _uniform(64, 32, 4, 1, 64),
    ("other", 128): _uniform(64, 32, 8, 1, 64),
    ("other", 256): _uniform(32, 32, 8, 1, 32),
}  # fmt: skip
_EXACT = {64: _uniform(32, 32, 4, 1, 32), 128: _uniform(32, 32, 8, 1, 32), 256: _uniform(16, 16, 8, 1, 16)}
"""float32, and float16, whose unbounded operands are multiplied in TF32."""
