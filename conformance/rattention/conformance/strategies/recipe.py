"""A recipe: everything that determines a case, small enough to print, shrink and draw from pools."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Recipe:
    """One case before its tensors exist.

    op: operation, `.vjp` included. dtype: the storage dtype. B, T, Hkv, G, D, Dv: sizes, Hq = G Hkv.
    window, feature_map, scale, eps: attributes (scale None is left out of the call).
    options: the optional tensors that are present, and "poison": NaN, inf and huge numbers in everything inert;
        "defaults": attributes equal to their default are left out of the call; "far": caches that have seen thousands
        of tokens, positions as large; "rows": a rotary table without a spare row.
    family: how values are drawn. layout: how segments lie. fill: how full caches are. slots: W where window is None.
    weights: dtype of the "weight" class, "float32", "storage" or "mixed" (tables float32, the rest storage).
    seed: of the values.
    extra: what else the property needs to know, such as how a sequence is split.
    """

    op: str
    dtype: str = "float32"
    B: int = 1
    T: int = 4
    Hkv: int = 1
    G: int = 1
    D: int = 4
    Dv: int = 4
    window: int | None = 1
    feature_map: str = "softmax"
    scale: float | None = None
    eps: float = 1e-6
    options: tuple[str, ...] = ()
    family: str = "normal"
    layout: str = "pair"
    fill: str = "mixed"
    slots: int = 0
    weights: str = "float32"
    seed: int = 0
    extra: tuple[Any, ...] = ()

    def rng(self, purpose: str) -> np.random.Generator:
        """An independent stream per purpose, so that dropping one option leaves every other tensor as it was."""
        return np.random.default_rng((self.seed & 0xFFFFFFFF, zlib.crc32(purpose.encode())))

    def has(self, option: str) -> bool:
        return option in self.options

    def with_(self, **changes: Any) -> Recipe:
        return dataclasses.replace(self, **changes)

    def without(self, *options: str) -> Recipe:
        return self.with_(options=tuple(o for o in self.options if o not in options))

    @property
    def base_op(self) -> str:
        return self.op.removesuffix(".vjp")

    @property
    def is_vjp(self) -> bool:
        return self.op.endswith(".vjp")

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a compiled program depends on; recipes that share it share the program."""
        values = dataclasses.asdict(self)
        for name in ("family", "layout", "fill", "seed", "extra"):
            del values[name]
        values["options"] = tuple(o for o in self.options if o not in ("poison", "defaults", "rows"))
        return tuple(values.items())
