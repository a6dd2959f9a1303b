"""What is fixed when a kernel is built: sizes, window geometry, and which optional parts there are."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from rattention.jax.pallas.config import Config


@dataclass(frozen=True)
class Plan:
    """One call as the kernels see it. Hashable: compiled programs are kept by it.

    Attributes:
        batch, tokens, q_heads, kv_heads: B, T, Hq, Hkv. `tokens` counts queries.
        key_dim, value_dim: D and Dv as stored, padded to what the lanes need.
        true_key_dim, true_value_dim: D and Dv of the call.
        split: the padding of D sits behind each half of it, so that a rotation stays one swap of halves.
        window: w >= -1; a window that covers everything is `keys`.
        prefix: leading grid steps that hold keys without queries (the cache of an extend).
        mode: "mix", "swa" or "rla": both branches normalised and mixed, or one branch as it is.
        feature_map: phi.
        dtype: storage, "float32" or "bfloat16".
        rope, q_scale, k_scale, memory, initial, segments: optional inputs present.
        final: the final state is an output.
        exact: products of float32 operands are true float32.
    """

    batch: int
    tokens: int
    q_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    true_key_dim: int
    true_value_dim: int
    split: bool
    window: int
    prefix: int
    mode: str
    feature_map: str
    dtype: str
    rope: bool
    q_scale: bool
    k_scale: bool
    memory: bool
    initial: bool
    segments: bool
    final: bool
    exact: bool
    config: Config
    interpret: bool

    @property
    def C(self) -> int:
        return self.config.chunk

    @property
    def m(self) -> int:
        return self.config.blocks

    @property
    def step(self) -> int:
        """Tokens per grid step."""
        return self.C * self.m

    @property
    def G(self) -> int:
        return self.q_heads // self.kv_heads

    @functools.cached_property
    def together(self) -> int:
        """KV heads per grid step: as many as fill whole lanes, so that a head is a column block of [B, T, H*D]."""
        if not (self.key_dim % 128 or self.value_dim % 128):
            return 1
        return next((n for n in (2, 4) if self.kv_heads % n == 0 and _fills(n, self)), self.kv_heads)

    @property
    def groups(self) -> int:
        return self.kv_heads // self.together

    @property
    def halves(self) -> int:
        return 1 if self.feature_map == "identity" else 2

    @property
    def F(self) -> int:
        return self.halves * self.key_dim

    @property
    def keys(self) -> int:
        """Tokens on the common axis of keys: prefix and new."""
        return self.prefix * self.step + self.tokens

    @property
    def steps(self) -> int:
        return -(-self.keys // self.step)

    @property
    def ragged(self) -> bool:
        return self.keys % self.step != 0

    # ---------------------------------------------------------------- window geometry

    @functools.cached_property
    def R(self) -> int:
        """Tiles of the past that a chunk reads: those with a token in the window of its first query."""
        return max(0, min(-(-self.window // self.C), self.steps * self.m - 1))

    @property
    def folds(self) -> bool:
        """Tiles leave the window: for a query that reads them by the linear branch, or for the final state alone."""
        read = self.window + 1 <= self.keys - 1 + (self.window < 0)
        return self.mode != "swa" and (read or (self.final and self.window <= self.keys - 1))

    def offset(self, r: int) -> int:
        """Start of tile r relative to the chunk; tile R is the chunk itself."""
        return (r - self.R) * self.C

    def deltas(self, r: int) -> tuple[int, int]:
        """Least and greatest distance from a key of tile r to a query of the chunk."""
        return 1 - self.C - self.offset(r), self.C - 1 - self.offset(r)

    @functools.cached_property
    def paired(self) -> bool:
        """The oldest and the newest tile hold complementary triangles: one exponential serves both."""
        return self.mode != "rla" and self.R >= 1 and self.window + 1 == self.R * self.C

    @functools.cached_property
    def softmax_tiles(self) -> tuple[int, ...]:
        """Tiles that the window cuts, oldest first; no tile from 0 to R lies outside it."""
        if not self.softmax:
            return ()
        return (*range(self.inner_tiles.start), *range(self.inner_tiles.stop, self.R + 1))

    @functools.cached_property
    def inner_tiles(self) -> range:
        """Tiles wholly inside the window: no key is newer than a query, and the oldest is seen by the last query. In
        closed form, as all sizes here: a window may have thousands of tiles."""
        if not self.softmax:
            return range(0)
        first = max(0, self.R - (self.window + 1 - self.C) // self.C)
        last = self.R - (self.C > 1)
        return range(first, max(first, last + 1))

    @functools.cached_property
    def linear_tiles(self) -> range:
        """Tiles that some query reads by the linear branch, before they enter the state; the oldest is always among
        them, since it is folded after the chunk."""
        if not self.folds:
            return range(0)
        newest = self.R - -(-(self.window + 2 - self.C) // self.C)
        return range(max(0, min(newest, self.R)) + 1)

    @property
    def loop(self) -> tuple[int, int]:
        """Inner tiles [first, last) taken in a loop over groups of `config.tiles`; empty where all are unrolled."""
        inner, unit = self.inner_tiles, self.config.tiles
        if len(inner) <= unit:
            return (0, 0)
        return inner[len(inner) % unit], inner[-1] + 1

    @property
    def unrolled(self) -> tuple[int, ...]:
        """Inner tiles outside the loop."""
        first, last = self.loop
        return tuple(r for r in self.inner_tiles if not first <= r < last)

    @property
    def softmax(self) -> bool:
        return self.mode != "rla" and self.window >= 0

    @property
    def state(self) -> bool:
        """The carried state can be other than zero."""
        return self.folds or (self.initial and self.mode != "swa")

    @property
    def linear(self) -> bool:
        return self.mode != "swa" and (self.state or self.memory)

    @property
    def back(self) -> int:
        """Grid steps that the backward's keys run ahead of its queries."""
        return -(-self.R // self.m)

    @property
    def heads(self) -> int:
        return math.gcd(self.G, self.config.heads)

    @property
    def rolled(self) -> bool:
        """A loop finds the columns of a head only where they are whole lanes."""
        aligned = not (self.key_dim % 128 or self.value_dim % 128)
        return self.config.rolled and (aligned or self.interpret)

    @property
    def backward_heads(self) -> int:
        return 1 if self.rolled else math.gcd(self.G, self.config.backward_heads)


def _fills(n: int, p: Plan) -> bool:
    return n * p.key_dim % 128 == 0 and n * p.value_dim % 128 == 0
