"""The softmax branch of a task: queries as the scores read them, and the softmax over the window."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from rattention.jax.pallas.parts import (
    F32,
    LOG2E,
    below,
    beside,
    columns,
    dot,
    loop_groups,
    rotate,
    softmax_mask,
)
from rattention.jax.pallas.plan import Plan


def folded(p: Plan) -> bool:
    """The factor on the scores sits in the queries, where that costs no rounding beyond the one they have anyway."""
    return p.rope or p.dtype == "float32"


def scaled_queries(p: Plan, ref: SimpleNamespace, stored: list[Any], rows: slice) -> Any:
    """Queries [N*C, D] as the scores read them: rotated, times scale * log2(e) where `folded`."""
    if not folded(p):
        return below(stored)
    out = []
    for x in stored:
        y = rotate(x.astype(F32), ref.rope[0, rows]) if p.rope else x
        out.append((y * (ref.numbers[0, 0, 0] * LOG2E)).astype(x.dtype))
    return below(out)


class Scores:
    """Scores of one task against the window, and the softmax over it. Logits are in base 2."""

    def __init__(self, p: Plan, ref: SimpleNamespace, step: Any, n: int, head: int, heads: int, queries: Any):
        self.p, self.ref, self.step, self.n, self.head, self.N = p, ref, step, n, head, heads
        self.queries = queries
        self.chunk = step * p.m + n

    def score(self, r: Any) -> Any:
        """Logits [C, N*C] of tile r, -inf where a key is not of the query's segment or lies before the sequence."""
        p, ref = self.p, self.ref
        s = dot(p, ref.k_tiles[self.head, self.n + r], self.queries, (1, 1))
        if not folded(p):
            s = s * (ref.numbers[0, 0, 0] * LOG2E)
        if p.segments:
            key = columns(p, ref.id_tiles[0, self.n + r, :1])
            query = jnp.broadcast_to(ref.id_tiles[0, self.n + p.R, :1], (p.C, p.C))
            return jnp.where(beside([key == query] * self.N), s, -jnp.inf)
        if isinstance(r, int) and r == p.R:
            return s
        return s + jnp.where(self.chunk + r < p.R, -jnp.inf, 0.0)

    def tiles(self) -> list[tuple[Any, Any]]:
        """(tile, masked logits) of the tiles outside the loop; the pair of `Plan.paired` is one entry, tile None."""
        p = self.p
        found: list[tuple[Any, Any]] = []
        if p.paired:
            found.append((None, jnp.where(self.newest(), self.score(p.R), self.score(0))))
        else:
            for r in p.softmax_tiles:
                found.append((r, jnp.where(softmax_mask(p, r, self.N), self.score(r), -jnp.inf)))
        return found

    def newest(self) -> Any:
        """Where a paired tile belongs to the chunk's own keys rather than the oldest tile's."""
        return softmax_mask(self.p, self.p.R, self.N)

    def first(self) -> Iterator[None]:
        """Scores of the tiles outside the loop, and their maximum."""
        p = self.p
        self.held = self.tiles()
        yield
        self.held += [(r, self.score(r)) for r in p.unrolled]
        top = functools.reduce(jnp.maximum, [s for _, s in self.held])
        self.top = jnp.max(top, axis=0, keepdims=True)
        yield

    def exponential(self, s: Any, top: Any) -> Any:
        """2^(s - top). A factor of s contracted with the subtraction could leave it above 0, at vast logits by far."""
        return jnp.exp2(s - top if folded(self.p) else jnp.minimum(s - top, 0.0))

    def weigh(self, r: Any, weight: Any) -> Any:
        """V^T p^T of one entry of `held`."""
        p, ref, dtype = self.p, self.ref, self.queries.dtype
        if r is not None:
            return dot(p, ref.v_tiles[self.head, self.n + r], weight.astype(dtype))
        new, n = self.newest(), self.n
        oldest = dot(p, ref.v_tiles[self.head, n], jnp.where(new, 0.0, weight).astype(dtype))
        return oldest + dot(p, ref.v_tiles[self.head, n + p.R], jnp.where(new, weight, 0.0).astype(dtype))

    def values(self) -> Iterator[None]:
        """Weights of `held` against `top`, the unnormalised output [Dv, N*C] and the sum of weights [1, N*C]."""
        total: Any = None
        output: Any = None
        self.weights: list[tuple[Any, Any]] = []
        for i, (r, s) in enumerate(self.held):
            weight = self.exponential(s, self.top)
            self.weights.append((r, weight))
            total = weight if total is None else total + weight
            part = self.weigh(r, weight)
            output = part if output is None else output + part
            if i == 0:
                yield
        self.total, self.output = jnp.sum(total, axis=0, keepdims=True), output
        if self.p.loop[1]:
            self.online()
        yield

    def online(self) -> None:
        """The looped tiles, rescaling what was summed whenever the maximum grows."""
        p, ref = self.p, self.ref

        def group(r: Any, carry: Any) -> Any:
            top, total, output = carry
            scores = [self.score(r + i) for i in range(p.config.tiles)]
            new = jnp.maximum(top, jnp.max(functools.reduce(jnp.maximum, scores), axis=0, keepdims=True))
            weights = [self.exponential(s, new) for s in scores]
            shrink = jnp.exp2(top - new)
            added = jnp.sum(functools.reduce(jnp.add, weights), axis=0, keepdims=True)
            values = [ref.v_tiles[self.head, self.n + r + i] for i in range(p.config.tiles)]
            parts = [dot(p, v, w.astype(self.queries.dtype)) for v, w in zip(values, weights, strict=True)]
            return new, total * shrink + added, output * shrink + functools.reduce(jnp.add, parts)

        carry = (self.top, self.total, self.output)
        self.top, self.total, self.output = loop_groups(p, p.R - self.chunk, carry, group)
