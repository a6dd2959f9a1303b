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
    """One configuration. `chunk` is N, the tokens between two saved states: a multiple of every `keys`."""

    attend: Tile
    query_grad: Tile
    key_grad: Tile
    states: Tile
    decode: Tile = Tile(16, 64, 4, 3)
    values: int = 64
    chunk: int = 256
    elements: int = 512


INTERPRETER = Config(
    attend=Tile(128, 64, 1, 1, 64),
    query_grad=Tile(128, 64, 1, 1),
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
    amd = kind.startswith("gfx")
    narrow = dtype == torch.bfloat16
    if narrow:
        table = {
            64: Config(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), values=64),
            128: Config(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 4, 2), values=64),
            256: Config(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), values=32),
        }
    else:
        table = {
            64: Config(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), values=32),
            128: Config(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), values=32),
            256: Config(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), values=16),
        }
    chosen = table[size]
    if amd:
        names = ("attend", "query_grad", "key_grad", "states")
        chosen = replace(chosen, **{name: replace(getattr(chosen, name), stages=1) for name in names})
    return chosen
