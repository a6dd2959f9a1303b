"""Tile sizes of the kernels, with defaults found by search over the compiled schedule (benchmarks/tpu_schedule.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

GENERATIONS = ("v4", "v5e", "v5p", "v6e")


@dataclass(frozen=True)
class Config:
    """How a kernel cuts its work. Every field may change speed and memory, none the result beyond rounding.

    Attributes:
        chunk: C, tokens per chunk: the rows of a key tile and the columns of a query tile.
        blocks: m, chunks per grid step. Training saves one state per step and rebuilds the m - 1 between on chip.
        heads: query heads side by side in one matrix product of the forward.
        lag: stages by which consecutive head tasks of the forward are staggered, see `schedule.interleave`.
        backward_heads, backward_lag: the same two for the backward.
        rolled: the backward takes the query heads of a kv head in a loop, one at a time, which saves room for spills;
            where a head is whole lanes, that is, not at D or Dv 64.
        tiles: key tiles inside the window beyond which the softmax runs online, in a loop over groups of that many.
        vmem: bytes of on-chip memory that a kernel may ask for; None is the compiler's own limit.
    """

    chunk: int = 128
    blocks: int = 4
    heads: int = 4
    lag: int = 1
    backward_heads: int = 4
    backward_lag: int = 1
    rolled: bool = False
    tiles: int = 8
    vmem: int | None = None


INTERPRETED = Config(chunk=32, blocks=1, heads=8, backward_heads=8, tiles=4)
"""For the interpreter, where a grid step costs much and its size little."""

# A little below what a core has: 16 MiB on v4, 64 on v5p, 128 on v5e and v6e.
_MEMORY = {"v4": 15 * 2**20, "v5e": 100 * 2**20, "v5p": 60 * 2**20, "v6e": 100 * 2**20}

# By (head dim, storage dtype). Wide heads and float32, whose products are six passes, make long programs that compile
# slowly: fewer chunks per step, without a search.
_SHORTER: dict[tuple[int, str], dict[str, int]] = {
    (256, "bfloat16"): {"blocks": 2},
    (64, "float32"): {"blocks": 2},
    (128, "float32"): {"blocks": 2},
    (256, "float32"): {"blocks": 1},
}
# On v4 the backward's window, sums and spills must fit 16 MiB: one head at a time, one task after the other.
_NARROW = {"blocks": 1, "backward_heads": 1, "backward_lag": 16}
# Likewise, to the last bit of memory: float32 at D 256, and whatever has more operands than the plain call.
_ROLLED = {"blocks": 1, "rolled": True, "vmem": 16 * 2**20 - 2**16}
_V4: dict[tuple[int, str], dict[str, int]] = {
    (64, "bfloat16"): {"blocks": 2, "backward_heads": 1},
    (128, "bfloat16"): {"blocks": 2},
    (256, "bfloat16"): _NARROW,
    (64, "float32"): _NARROW,
    (128, "float32"): {"blocks": 1},
    (256, "float32"): _ROLLED,
}

# Frozen: from benchmarks/results/tpu_search.json and, on v4, from what fits; by (generation, head dim, storage dtype).
_DEFAULTS: dict[tuple[str, int, str], dict[str, int]] = {
    (generation, *key): fields for generation in GENERATIONS[1:] for key, fields in _SHORTER.items()
}
_DEFAULTS |= {("v4", *key): fields for key, fields in _V4.items()}
_DEFAULTS[("v5p", 128, "bfloat16")] = {"lag": 2}


def of_generation(generation: str) -> Config:
    """The untuned configuration for a TPU generation, one of `GENERATIONS`."""
    return Config(vmem=_MEMORY[generation])


def default(generation: str, head_dim: int, dtype: str = "bfloat16", more: bool = False) -> Config:
    """The configuration for a TPU generation, the larger of D and Dv after padding, and the storage dtype; `more`: for
    a call with optional tensors, such as rotary tables, which take room too."""
    fields = _DEFAULTS.get((generation, head_dim, dtype), {})
    if more and generation == "v4":
        fields = fields | _NARROW | _ROLLED
    return dataclasses.replace(of_generation(generation), **fields)


def fitted(settings: Config, tokens: int) -> Config:
    """The same for a sequence of `tokens` tokens: no step is longer than it."""
    blocks = min(settings.blocks, max(1, -(-tokens // settings.chunk)))
    return dataclasses.replace(settings, blocks=blocks)


def of_device(kind: str, call: Any, more: bool = False) -> Config:
    """The default for a device kind as JAX names it, such as "TPU v5 lite"; `more` as in `default`."""
    dim = max(call.dims["D"], call.dims["Dv"])
    dim = 64 if dim <= 64 else -(-dim // 128) * 128
    return default(generation(kind), dim, call.storage, more)


def generation(kind: str) -> str:
    """The TPU generation of a device kind; an unknown one is served as v5p."""
    kind = kind.lower()
    for names, found in ((("v6",), "v6e"), (("v5 lite", "v5e", "v5litepod"), "v5e"), (("v4",), "v4")):
        if any(name in kind for name in names):
            return found
    return "v5p"
