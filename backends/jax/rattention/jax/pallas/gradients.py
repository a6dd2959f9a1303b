"""One task of the backward: outputs made again, norms and mix backwards, gradients of both branches."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from rattention.jax.pallas import linear, softmax
from rattention.jax.pallas.parts import (
    F32,
    LOG2E,
    ReadOnce,
    below,
    beside,
    columns,
    dot,
    loop_groups,
    phi_gradient,
    rotate,
    split_halves,
)
from rattention.jax.pallas.plan import Plan
from rattention.jax.pallas.states import base, key_gradient, unfold


def task(p: Plan, ref: SimpleNamespace, step: Any, n: int, head: int, first: int) -> Iterator[None]:
    """The queries of chunk n for `p.backward_heads` query heads of one kv head; yields between stages."""
    w = Work(p, ref, step, n, head, first)
    yield from w.outputs()
    if p.softmax:
        yield from w.softmax_gradient()
    if p.linear:
        if first == 0:
            # Not earlier: the heads of the chunk behind must have added to the state's cotangent, these must not.
            begin(p, ref, n, head, w.chunk)
        yield from w.linear_gradient()
    w.store_queries()
    if first + p.backward_heads == p.G:
        end(p, ref, n, head)
    yield


def rolled(p: Plan, ref: SimpleNamespace, step: Any, n: int, head: int) -> None:
    """The tasks of chunk n and one kv head as a loop over its query heads: one task's code, one task's spills."""
    begin(p, ref, n, head, step * p.m + n)

    def one(i: Any, carry: None) -> None:
        w = Work(p, ref, step, n, head, i)
        for stage in (w.outputs, *[w.softmax_gradient] * p.softmax, *[w.linear_gradient] * p.linear):
            for _ in stage():
                pass
        w.store_queries()

    with ReadOnce.in_loop():
        lax.fori_loop(0, p.G, one, None)
    end(p, ref, n, head)


def begin(p: Plan, ref: SimpleNamespace, n: int, head: int, chunk: Any) -> None:
    """Before the linear branch of the first query head: the border tiles' cotangents, unfolded where folded."""
    for i in range(len(p.linear_tiles)):
        folded = p.folds and i == 0
        begun = unfold(p, ref, n, head, chunk) if folded else jnp.zeros((p.C, p.F), F32)
        ref.d_features[head, n, i] = begun


def end(p: Plan, ref: SimpleNamespace, n: int, head: int) -> None:
    """After the last query head: the border tiles' gradients through phi."""
    for i, r in enumerate(p.linear_tiles):
        key_gradient(p, ref, head, base(p) + n + r, ref.d_features[head, n, i])


class Work:
    """One task: rows of `N` query heads of chunk n, side by side on lanes."""

    def __init__(self, p: Plan, ref: SimpleNamespace, step: Any, n: int, head: int, first: Any):
        self.p, self.ref, self.step, self.n, self.head = p, ref, step, n, head
        self.N = p.backward_heads
        self.chunk = step * p.m + n
        self.tile0 = base(p) + n
        self.heads = [head * p.G + first + i for i in range(self.N)]
        self.rows = slice(n * p.C, (n + 1) * p.C)
        self.live = self.alive()
        self.stored = [self.natural(ref.q, h, p.key_dim) for h in self.heads]
        self.queries = None
        if p.softmax:
            queries = [softmax.scaled_queries(p, ref, [x], self.rows) for x in self.stored]
            # Rows of the rotary table behind the end hold anything.
            self.queries = below([self.only_live(x) for x in queries] if p.rope else queries)
        self.dtype = self.stored[0].dtype

    def alive(self) -> Any:
        """Which queries [1, C] exist; None: all."""
        p = self.p
        if p.segments:
            return self.ref.id_tiles[0, self.tile0 + p.R, :1] != 0
        if p.ragged:
            at = lax.broadcasted_iota(jnp.int32, (1, p.C), 1)
            return at < p.keys - self.chunk * p.C
        return None

    def natural(self, source: Any, h: int, width: int) -> Any:
        """Rows of one head [C, width] as stored, zero where no query is."""
        return self.only_live(source[0, self.rows, columns_of(h, width)])

    def only_live(self, x: Any) -> Any:
        """Zero the rows of x [C, channels] where no query is."""
        if self.live is None:
            return x
        live = columns(self.p, self.live.astype(F32))[:, :1] != 0
        return jnp.where(live, x, jnp.zeros_like(x))

    def gain(self, branch: str) -> Any:
        """The norm's gains [Dv, N*C], as columns."""
        p, ref = self.p, self.ref
        if p.rolled:
            weight = getattr(ref, f"{branch}_weight")
            rows = [weight[:, columns_of(h, p.value_dim)] for h in self.heads]
            return beside([jnp.transpose(jnp.broadcast_to(row, (p.C, p.value_dim))) for row in rows])
        return beside([getattr(ref, f"{branch}_gain")[h] for h in self.heads])

    # ---- outputs, as in the forward

    def outputs(self) -> Iterator[None]:
        """Both branches made again, and their cotangents."""
        if self.p.softmax:
            yield from self.softmax_output()
        if self.p.linear:
            yield from self.linear_output()
        self.epilogue()
        yield

    def softmax_output(self) -> Iterator[None]:
        """o1^T [Dv, N*C] and the weights of the tiles outside the loop, by the softmax of these very scores.

        A log-sum-exp saved by the forward would not do: scores made again may be rounded otherwise than those in it, at
        logits of 1e30 by more than any exponent holds, and weights have to sum to 1 (SWA-3).
        """
        p = self.p
        scores = self.scores = softmax.Scores(p, self.view(), self.step, self.n, self.head, self.N, self.queries)
        yield from scores.first()
        top = scores.top
        yield from scores.values()
        inverse = 1.0 / scores.total
        self.o1 = scores.output * inverse
        if p.loop[1]:
            self.lse = scores.top + jnp.log2(scores.total)  # for the looped tiles, whose weights are made once more
            inverse = inverse * jnp.exp2(top - scores.top)
        self.weights = [(r, w * inverse) for r, w in scores.weights]

    def looped(self, r: Any) -> Any:
        """Weights of tile r of the loop. The sum they are divided by is rounded, a weight still is not above 1."""
        return jnp.exp2(jnp.minimum(self.scores.score(r) - self.lse, 0.0))

    def view(self) -> SimpleNamespace:
        """The window as `forward.Scores` indexes it: tile r of chunk n at n + r."""
        p, ref = self.p, self.ref
        offset = base(p)
        names = {name: getattr(ref, name) for name in ("k_tiles", "v_tiles", "id_tiles") if hasattr(ref, name)}
        return SimpleNamespace(numbers=ref.numbers, **{k: Shifted(v, offset) for k, v in names.items()})

    def linear_output(self) -> Iterator[None]:
        p, ref = self.p, self.ref
        self.x, self.halves, self.features = linear.query_features(p, ref, self.stored)
        self.a = []
        parts = []
        if p.state:
            read = dot(p, ref.read_state[self.head, self.n], self.features)
            parts.append(self.only_owned(read))
        if p.memory:
            parts.append(
                beside([dot(p, ref.memory_t[h], self.lanes(self.features, i)) for i, h in enumerate(self.heads)])
            )
        for i, r in enumerate(p.linear_tiles):
            weight = dot(p, ref.features[self.head, self.n, i], self.features)
            weight = self.linear_mask(r, weight).astype(self.dtype)
            self.a.append(weight)
            parts.append(dot(p, ref.v_tiles[self.head, self.tile0 + r], weight))
        self.o2 = functools.reduce(jnp.add, parts)
        yield

    def linear_mask(self, r: int, x: Any) -> Any:
        return linear.mask_linear(self.p, self.view(), self.n, r, x, self.N)

    def only_owned(self, x: Any) -> Any:
        """Zero the queries [.., N*C] whose segment is not the state's."""
        p = self.p
        if not p.segments:
            return x
        return jnp.where(beside([linear.owned(p, self.owned_view(), self.n, self.chunk)] * self.N), x, 0.0)

    def owned_view(self) -> SimpleNamespace:
        view = self.view()
        view.owners = self.ref.owners
        return view

    def lanes(self, x: Any, i: int) -> Any:
        """The columns of the task's i-th head."""
        return x[:, i * self.p.C : (i + 1) * self.p.C]

    # ---- norms and mix, backwards

    def epilogue(self) -> None:
        """do1, do2 [Dv, N*C] float32 and gradients of the gains."""
        p, ref = self.p, self.ref
        cotangent = [self.natural(ref.d_out, h, p.value_dim) for h in self.heads]
        d = beside([jnp.transpose(x) for x in cotangent]).astype(F32)
        self.d1 = self.d2 = d
        if p.mode != "mix":
            return
        for name, branch in (("o1", "swa"), ("o2", "rla")):
            if not (p.softmax if name == "o1" else p.linear):
                continue
            x = getattr(self, name)
            norm = lax.rsqrt(jnp.sum(x * x, axis=0, keepdims=True) * (1 / p.true_value_dim) + ref.numbers[0, 0, 1])
            unit = x * norm
            g = d * self.gain(branch)
            mean = jnp.sum(g * unit, axis=0, keepdims=True) * (1 / p.true_value_dim)
            setattr(self, "d" + name[1], norm * (g - unit * mean))
            product = d * unit
            for i, h in enumerate(self.heads):
                getattr(ref, f"d_{branch}_sum")[h] += self.lanes(product, i)

    # ---- softmax branch

    def rows_of(self, x: Any) -> Any:
        """x [channels, N*C] as [N*C, channels]."""
        return below([jnp.transpose(self.lanes(x, i)) for i in range(self.N)])

    def softmax_gradient(self) -> Iterator[None]:
        p = self.p
        self.delta = jnp.sum(self.d1 * self.o1, axis=0, keepdims=True)
        self.d1r = self.d1.astype(self.dtype)
        self.d1n = self.rows_of(self.d1r)
        dq = None
        for i, (r, weight) in enumerate(self.weights):
            part = self.pair(weight) if r is None else self.tile(r, weight)
            dq = part if dq is None else dq + part
            if i % 2 == 0:
                yield
        if p.loop[1]:

            def group(r: Any, total: Any) -> Any:
                parts = [total]
                for i in range(p.config.tiles):
                    parts.append(self.tile(r + i, self.looped(r + i)))
                return functools.reduce(jnp.add, parts)

            dq = loop_groups(p, p.R - self.chunk, dq, group)
        self.dq = dq

    def d_weight(self, r: Any) -> Any:
        return dot(self.p, self.ref.vn_tiles[self.head, self.tile0 + r], self.d1r)

    def tile(self, r: Any, weight: Any) -> Any:
        """Add to dk, dv of tile r; returns its part of dq^T."""
        ds = weight * (self.d_weight(r) - self.delta)
        return self.spread(r, weight.astype(self.dtype), ds.astype(self.dtype))

    def pair(self, weight: Any) -> Any:
        """The same for the two tiles that share one."""
        p = self.p
        new = self.scores.newest()
        ds = weight * (jnp.where(new, self.d_weight(p.R), self.d_weight(0)) - self.delta)

        def half(x: Any, mine: bool) -> Any:
            return (jnp.where(new, x, 0.0) if mine else jnp.where(new, 0.0, x)).astype(self.dtype)

        first = self.spread(0, half(weight, False), half(ds, False))
        return first + self.spread(p.R, half(weight, True), half(ds, True))

    def spread(self, r: Any, weight: Any, ds: Any) -> Any:
        p, ref, tile = self.p, self.ref, self.tile0 + r
        ref.dv_sum[self.head, tile] += dot(p, weight, self.d1n)
        ref.dk_sum[self.head, tile] += dot(p, ds, self.queries) * self.key_factor()
        if p.rolled:
            return dot(p, ref.k_tiles[self.head, tile], ds, (0, 0))
        return dot(p, ref.kt_tiles[self.head, tile], ds)

    def key_factor(self) -> Any:
        """What the queries of `spread` lack of the scale of the scores."""
        return 1 / LOG2E if softmax.folded(self.p) else self.ref.numbers[0, 0, 0]

    # ---- linear branch

    def linear_gradient(self) -> Iterator[None]:
        p, ref = self.p, self.ref
        d2r = self.d2.astype(self.dtype)
        d2n = self.rows_of(d2r)
        features = self.rows_of(self.features)
        d_features = None
        if p.state:
            mine = self.only_owned(self.d2).astype(self.dtype) if p.segments else d2r
            d_features = dot(p, jnp.transpose(ref.read_state[self.head, self.n]), mine)
            ref.d_state[self.head] += dot(p, mine, features)
        yield
        if p.memory:
            parts = []
            for i, h in enumerate(self.heads):
                at = slice(i * p.C, (i + 1) * p.C)
                parts.append(dot(p, jnp.transpose(ref.memory_t[h]), d2r[:, at]))
                ref.d_memory_sum[h] += dot(p, d2r[:, at], features[at])
            d_features = beside(parts) if d_features is None else d_features + beside(parts)
        for i, r in enumerate(p.linear_tiles):
            da = dot(p, ref.vn_tiles[self.head, self.tile0 + r], d2r)
            da = self.linear_mask(r, da).astype(self.dtype)
            keys = jnp.transpose(ref.features[self.head, self.n, i])
            d_features = d_features + dot(p, keys, da)
            ref.d_features[self.head, self.n, i] += dot(p, da, features)
            ref.dv_sum[self.head, self.tile0 + r] += dot(p, self.a[i], d2n)
        d = phi_gradient(p, self.x, self.halves, split_halves(p, d_features))
        if p.q_scale:
            raw = beside([jnp.transpose(x) for x in self.stored]).astype(F32)
            product = d * raw
            for i in range(self.N):
                ref.d_q_scale_sum[...] += self.lanes(product, i)
            d = d * beside([ref.q_column[...]] * self.N)
        self.dq_linear = d
        yield

    def store_queries(self) -> None:
        """dq of the task's heads."""
        p, ref = self.p, self.ref
        for i, h in enumerate(self.heads):
            parts = []
            if p.softmax:
                parts.append(self.lanes(self.dq, i) * ref.numbers[0, 0, 0])
            if p.linear:
                parts.append(self.lanes(self.dq_linear, i))
            if p.rope and p.softmax:
                parts = [jnp.transpose(x) for x in parts]
                parts[0] = rotate(parts[0], ref.rope[0, self.rows], inverse=True)
                out = functools.reduce(jnp.add, parts).astype(self.dtype)
            elif parts:
                out = jnp.transpose(functools.reduce(jnp.add, parts).astype(self.dtype))
            else:
                out = jnp.zeros((p.C, p.key_dim), self.dtype)
            ref.d_q[0, self.rows, columns_of(h, p.key_dim)] = self.only_live(out)


def columns_of(h: Any, width: int) -> Any:
    """The columns of head h in [C, H*width]; h may be a loop's."""
    if isinstance(h, int):
        return slice(h * width, (h + 1) * width)
    return pl.ds(pl.multiple_of(h * width, width), width)


class Shifted:
    """A window whose tile index is moved by a constant."""

    def __init__(self, ref: Any, offset: int):
        self.ref, self.offset = ref, offset

    def __getitem__(self, at: tuple[Any, ...]) -> Any:
        return self.ref[(at[0], at[1] + self.offset, *at[2:])]
