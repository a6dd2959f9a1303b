"""The fused backward: everything is rebuilt on chip from q, k, v, the row statistics and one state per step.

Grid (batch, kv heads, steps), the last axis from the end of the sequence to its start. Keys run `Plan.back` steps
ahead of queries, since a chunk needs the R tiles before it. Per step:

    1. shift the window of tiles and of their gradient sums by m; prepend the m new tiles of K, V, K^T, V^T
    2. rebuild the states of the m chunks from the one saved at the step's start
    3. per chunk, last first: gradients of the tile that its fold put into the state, from the state's cotangent D^T
    4. per query head of the chunk (staggered):
         p^T = 2^(K q^T - lse), o1^T, o2^T as in the forward; norms and mix backwards give do1^T, do2^T
         ds^T = p^T (V do1^T - sum(do1 o1));  dq^T += K^T ds^T;  dk += ds^T q;  dv += p^T do1
         border tiles of the linear branch likewise, without exponential;  D^T += do2^T phi(q)
    5. store dk, dv of the m tiles that no earlier chunk reads

dk, dv are summed over the query heads of the group in float32 in the window, and rounded once (GRAD-3).
Main memory: q, k, v and the cotangent once in, dq, dk, dv once out, statistics and one state per step in.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from rattention.jax.pallas import forward
from rattention.jax.pallas.parts import (
    F32,
    LOG2E,
    below,
    beside,
    columns,
    dot,
    interleave,
    loop_groups,
    phi_gradient,
    read_once,
    rotate,
    shift,
    split_halves,
)
from rattention.jax.pallas.plan import Plan


def body(p: Plan, ref: SimpleNamespace) -> None:
    """The kernel. `ref` holds the references by name, see `calls.run_backward`."""
    at = pl.program_id(2)
    arriving = p.steps - 1 - at  # step of the keys that come in; negative: before the sequence
    step = arriving + p.back  # step whose queries are worked on; >= p.steps: after the sequence

    @pl.when(at == 0)
    def _start() -> None:
        start(p, ref)

    for head in range(p.together):
        load(p, ref, head, arriving)
    if p.back == 0:
        compute(p, ref, step)
    else:
        pl.when(step < p.steps)(functools.partial(compute, p, ref, step))
        if p.final and p.folds:
            pl.when(step >= p.steps)(functools.partial(unfold_only, p, ref, step))

    @pl.when(step < p.steps)
    def _store() -> None:
        for head in range(p.together):
            store_keys(p, ref, head)

    @pl.when(at == p.steps + p.back - 1)
    def _finish() -> None:
        finish(p, ref)


def start(p: Plan, ref: SimpleNamespace) -> None:
    """Before the first step: cotangent of the state, sums of the small gradients, gains as columns."""
    for head in range(p.together):
        if hasattr(ref, "d_state"):
            given = jnp.transpose(ref.d_final[0, head]) if p.final else jnp.zeros(ref.d_state.shape[1:], F32)
            ref.d_state[head] = given
    for name in ("d_swa_sum", "d_rla_sum", "d_q_scale_sum", "d_k_scale_sum", "d_memory_sum"):
        if hasattr(ref, name):
            sums = getattr(ref, name)
            sums[...] = jnp.zeros(sums.shape, sums.dtype)
    if p.mode == "mix":
        forward.gains(p, ref)
    if p.q_scale:
        ref.q_column[...] = jnp.transpose(jnp.broadcast_to(ref.q_scale[...], (p.C, p.key_dim)))
    if p.k_scale:
        ref.k_column[...] = jnp.transpose(jnp.broadcast_to(ref.k_scale[...], (p.C, p.key_dim)))
    if p.memory and p.linear:
        for h in range(p.together * p.G):
            ref.memory_t[h] = jnp.transpose(ref.memory[h]).astype(ref.memory_t.dtype)
    if p.back:
        # The tiles behind the last step stand for queries that do not exist.
        for name in WINDOWS + SUMS:
            if hasattr(ref, name):
                window = getattr(ref, name)
                for head in range(window.shape[0]):
                    for i in range(p.back * p.m):
                        window[head, i] = jnp.zeros(window.shape[2:], window.dtype)


WINDOWS = ("k_tiles", "kt_tiles", "v_tiles", "vn_tiles", "raw_tiles", "id_tiles")
SUMS = ("dk_sum", "dk_raw_sum", "dv_sum")


def load(p: Plan, ref: SimpleNamespace, head: int, arriving: Any) -> None:
    """Prepend the m tiles of step `arriving` of one kv head to the window, zeros before the sequence."""
    kept = p.back * p.m
    for name in WINDOWS + SUMS:
        if hasattr(ref, name) and not (name == "id_tiles" and head) and kept:
            shift(p, getattr(ref, name), head, False, kept)
    for n in range(p.m):
        rows = slice(n * p.C, (n + 1) * p.C)
        if p.segments and head == 0:
            row = jnp.where(arriving >= 0, ref.ids[0, :, rows], 0)
            ref.id_tiles[0, n] = jnp.broadcast_to(row, ref.id_tiles.shape[2:])
        raw = arrived(p, ref, ref.k[0, rows, head * p.key_dim : (head + 1) * p.key_dim], n, arriving)
        value = arrived(p, ref, ref.v[0, rows, head * p.value_dim : (head + 1) * p.value_dim], n, arriving)
        key = raw
        if p.rope:
            key = rotate(raw.astype(F32), ref.k_rope[0, rows]).astype(raw.dtype)
            key = arrived(p, ref, key, n, arriving)
            if hasattr(ref, "raw_tiles"):
                ref.raw_tiles[head, n] = raw
        ref.k_tiles[head, n] = key
        if p.softmax:
            ref.kt_tiles[head, n] = jnp.transpose(key)
        ref.v_tiles[head, n] = jnp.transpose(value)
        ref.vn_tiles[head, n] = value
        for name in SUMS:
            if hasattr(ref, name):
                sums = getattr(ref, name)
                sums[head, n] = jnp.zeros(sums.shape[2:], sums.dtype)


def arrived(p: Plan, ref: SimpleNamespace, x: Any, n: int, arriving: Any) -> Any:
    """Zero the rows of x [C, channels] that are padding, before the sequence or past its end."""
    if p.segments:
        x = forward.inert_to_zero(p, ref, x, n, arriving)
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0) + (arriving * p.step + n * p.C)
    live = (row >= 0) & (row < p.keys) if p.ragged else row >= 0
    return jnp.where(live, x, jnp.zeros_like(x)) if p.back or p.ragged else x


# ------------------------------------------------------------------------------------------------ per chunk


def compute(p: Plan, ref: SimpleNamespace, step: Any) -> None:
    ref = read_once(p, ref)
    if p.state:
        for head in range(p.together):
            rebuild(p, ref, step, head)

    def tasks() -> Iterator[Iterator[None]]:
        for n in reversed(range(p.m)):
            for head in range(p.together):
                for first in range(0, p.G, p.backward_heads):
                    yield task(p, ref, step, n, head, first)

    interleave(tasks(), p.config.backward_lag)


def base(p: Plan) -> int:
    """Index in the window of tile 0 of chunk 0 of the step at work."""
    return p.back * p.m - p.R


def rebuild(p: Plan, ref: SimpleNamespace, step: Any, head: int) -> None:
    """The states that the m chunks read, and phi of their border tiles, both ways round."""
    state = ref.states[0, head, 0] if p.folds else jnp.transpose(ref.initial[0, head])
    for n in range(p.m):
        chunk = step * p.m + n
        ref.read_state[head, n] = state.astype(ref.read_state.dtype)
        for i, r in enumerate(p.linear_tiles):
            features = forward.key_features(p, ref, head, base(p) + n + r)[2]
            ref.features[head, n, i] = jnp.transpose(features)
        if p.folds and n + 1 < p.m:
            value = fold_values(p, ref, head, n, chunk)
            state = forward.keep(p, ref, state, chunk) + dot(p, value, ref.features[head, n, 0])


def fold_mask(p: Plan, ref: SimpleNamespace, n: int, chunk: Any) -> Any:
    """Which tokens [1, C] of the tile that leaves after `chunk` enter the state; None: all."""
    if not (p.segments or p.final):
        return None
    enters = lax.broadcasted_iota(jnp.int32, (1, p.C), 1) + (chunk - p.R) * p.C < ref.limits[0, 0, 0]
    if p.segments:
        enters &= ref.id_tiles[0, base(p) + n, :1] == ref.owners[0, 0, chunk + 1]
    return enters


def fold_values(p: Plan, ref: SimpleNamespace, head: int, n: int, chunk: Any) -> Any:
    value = ref.v_tiles[head, base(p) + n]
    mask = fold_mask(p, ref, n, chunk)
    return value if mask is None else jnp.where(mask, value, jnp.zeros_like(value))


def unfold(p: Plan, ref: SimpleNamespace, n: int, head: int, chunk: Any) -> Any:
    """Gradients of the tile that `chunk` folded; the cotangent of the state it left becomes that of the state before.

    Returns the cotangent [C, F] of phi of that tile.
    """
    tile = base(p) + n
    d_state = ref.d_state[head]
    dtype = ref.vn_tiles.dtype
    rounded = d_state.astype(dtype)
    features = jnp.transpose(forward.key_features(p, ref, head, tile)[2])
    d_features = dot(p, ref.vn_tiles[head, tile], rounded)
    d_values = dot(p, features, rounded, (1, 1))
    mask = fold_mask(p, ref, n, chunk)
    if mask is not None:
        live = columns(p, mask.astype(F32))[:, :1] != 0
        d_features = jnp.where(live, d_features, 0.0)
        d_values = jnp.where(live, d_values, 0.0)
    ref.dv_sum[head, tile] += d_values
    ref.d_state[head] = forward.keep(p, ref, d_state, chunk)
    return d_features


def unfold_only(p: Plan, ref: SimpleNamespace, step: Any) -> None:
    """Past the last query: tokens that only the final state holds."""
    for n in reversed(range(p.m)):
        for head in range(p.together):
            d_features = unfold(p, ref, n, head, step * p.m + n)
            key_gradient(p, ref, head, base(p) + n, d_features)


def key_gradient(p: Plan, ref: SimpleNamespace, head: int, tile: int, d_features: Any) -> None:
    """Add the gradient through phi(k * k_scale), given d_features [C, F]."""
    x, halves, _ = forward.key_features(p, ref, head, tile)
    d = phi_gradient(p, x, halves, split_halves(p, jnp.transpose(d_features)))
    if p.k_scale:
        raw = jnp.transpose(forward.raw_keys(p, ref, head, tile)).astype(F32)
        ref.d_k_scale_sum[...] += d * raw
        d = d * ref.k_column[...]
    sums = ref.dk_raw_sum if hasattr(ref, "dk_raw_sum") else ref.dk_sum
    sums[head, tile] += jnp.transpose(d)


# ------------------------------------------------------------------------------------------------ per query head


def task(p: Plan, ref: SimpleNamespace, step: Any, n: int, head: int, first: int) -> Iterator[None]:
    """The queries of chunk n for `p.backward_heads` query heads of one kv head; yields between stages."""
    w = Work(p, ref, step, n, head, first)
    if p.softmax:
        yield from w.softmax_output()
    if p.linear:
        yield from w.linear_output()
    w.epilogue()
    yield
    if p.softmax:
        yield from w.softmax_gradient()
    if p.linear:
        yield from w.linear_gradient()
    w.store_queries()
    if first + p.backward_heads == p.G:
        for i, r in enumerate(p.linear_tiles):
            key_gradient(p, ref, head, base(p) + n + r, ref.d_features[head, n, i])
    yield


class Work:
    """One task: rows of `N` query heads of chunk n, side by side on lanes."""

    def __init__(self, p: Plan, ref: SimpleNamespace, step: Any, n: int, head: int, first: int):
        self.p, self.ref, self.step, self.n, self.head, self.first = p, ref, step, n, head, first
        self.N = p.backward_heads
        self.chunk = step * p.m + n
        self.tile0 = base(p) + n
        self.heads = [head * p.G + first + i for i in range(self.N)]
        self.rows = slice(n * p.C, (n + 1) * p.C)
        self.live = self.alive()
        self.stored = [self.natural(ref.q, h, p.key_dim) for h in self.heads]
        self.queries = None
        if p.softmax:
            queries = [forward.scaled_queries(p, ref, [x], self.rows) for x in self.stored]
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
        return self.only_live(source[0, self.rows, h * width : (h + 1) * width])

    def only_live(self, x: Any) -> Any:
        """Zero the rows of x [C, channels] where no query is."""
        if self.live is None:
            return x
        live = columns(self.p, self.live.astype(F32))[:, :1] != 0
        return jnp.where(live, x, jnp.zeros_like(x))

    def row(self, which: int) -> Any:
        """Statistic `which` of the task's rows [1, N*C], 0 where no query is."""
        p = self.p
        found = []
        for h in self.heads:
            x = self.ref.statistics[0, 0, pl.ds(which * p.together * p.G + h, 1), self.rows]
            found.append(x if self.live is None else jnp.where(self.live, x, 0.0))
        return beside(found)

    def per_head(self, column: Any) -> Any:
        return beside([column[h] for h in self.heads])

    # ---- outputs, as in the forward

    def softmax_output(self) -> Iterator[None]:
        """Weights of the unrolled tiles, normalised, and o1^T [Dv, N*C]."""
        p = self.p
        self.scores = forward.Scores(p, self.view(), self.step, self.n, self.head, self.N, self.queries)
        self.lse = self.row(0)
        held = self.scores.tiles()
        yield
        held += [(r, self.scores.score(r)) for r in p.unrolled]
        yield
        self.weights = [(r, jnp.exp2(s - self.lse)) for r, s in held]
        output = functools.reduce(jnp.add, [self.scores.weigh(r, w) for r, w in self.weights])
        if p.loop[1]:

            def group(r: Any, total: Any) -> Any:
                parts = [total]
                for i in range(p.config.tiles):
                    weight = jnp.exp2(self.scores.score(r + i) - self.lse)
                    parts.append(self.scores.weigh(r + i, weight))
                return functools.reduce(jnp.add, parts)

            output = loop_groups(p, p.R - self.chunk, output, group)
        self.o1 = output
        yield

    def view(self) -> SimpleNamespace:
        """The window as `forward.Scores` indexes it: tile r of chunk n at n + r."""
        p, ref = self.p, self.ref
        offset = base(p)
        names = {name: getattr(ref, name) for name in ("k_tiles", "v_tiles", "id_tiles") if hasattr(ref, name)}
        return SimpleNamespace(numbers=ref.numbers, **{k: Shifted(v, offset) for k, v in names.items()})

    def linear_output(self) -> Iterator[None]:
        p, ref = self.p, self.ref
        self.x, self.halves, self.features = forward.query_features(p, ref, self.stored)
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
        return forward.mask_linear(self.p, self.view(), self.n, r, x, self.N)

    def only_owned(self, x: Any) -> Any:
        """Zero the queries [.., N*C] whose segment is not the state's."""
        p = self.p
        if not p.segments:
            return x
        return jnp.where(beside([forward.owned(p, self.owned_view(), self.n, self.chunk)] * self.N), x, 0.0)

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
        for which, name, gain, sums in (
            (1, "o1", "swa_gain", "d_swa_sum"),
            (2 * p.softmax, "o2", "rla_gain", "d_rla_sum"),
        ):
            if not (p.softmax if name == "o1" else p.linear):
                continue
            norm = self.row(which)
            unit = getattr(self, name) * norm
            g = d * self.per_head(getattr(ref, gain))
            mean = jnp.sum(g * unit, axis=0, keepdims=True) * (1 / p.true_value_dim)
            setattr(self, "d" + name[1], norm * (g - unit * mean))
            product = d * unit
            for i, h in enumerate(self.heads):
                getattr(ref, sums)[h] += self.lanes(product, i)

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
                    parts.append(self.tile(r + i, jnp.exp2(self.scores.score(r + i) - self.lse)))
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
        return dot(p, ref.kt_tiles[self.head, tile], ds)

    def key_factor(self) -> Any:
        """What the queries of `spread` lack of the scale of the scores."""
        return 1 / LOG2E if forward.folded(self.p) else self.ref.numbers[0, 0, 0]

    # ---- linear branch

    def linear_gradient(self) -> Iterator[None]:
        p, ref = self.p, self.ref
        if self.first == 0:
            # Not earlier: the heads of the chunk behind must have added to the state's cotangent, these must not.
            for i in range(len(p.linear_tiles)):
                folded = p.folds and i == 0
                begun = unfold(p, ref, self.n, self.head, self.chunk) if folded else jnp.zeros((p.C, p.F), F32)
                ref.d_features[self.head, self.n, i] = begun
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
            ref.d_q[0, self.rows, h * p.key_dim : (h + 1) * p.key_dim] = self.only_live(out)


class Shifted:
    """A window whose tile index is moved by a constant."""

    def __init__(self, ref: Any, offset: int):
        self.ref, self.offset = ref, offset

    def __getitem__(self, at: tuple[Any, ...]) -> Any:
        return self.ref[(at[0], at[1] + self.offset, *at[2:])]


# ------------------------------------------------------------------------------------------------ results


def store_keys(p: Plan, ref: SimpleNamespace, head: int) -> None:
    """dk and dv of the step's own tiles, which are complete: no earlier chunk reads them."""
    for n in range(p.m):
        tile = p.back * p.m + n
        rows = slice(n * p.C, (n + 1) * p.C)
        dk, dv = ref.dk_sum[head, tile], ref.dv_sum[head, tile]
        if p.rope:
            dk = rotate(dk, ref.rope[0, rows], inverse=True)
            if hasattr(ref, "dk_raw_sum"):
                dk = dk + ref.dk_raw_sum[head, tile]
        if p.segments:
            live = columns(p, ref.id_tiles[0, tile, :1])[:, :1] != 0
            dk, dv = jnp.where(live, dk, 0.0), jnp.where(live, dv, 0.0)
        ref.d_k[0, rows, head * p.key_dim : (head + 1) * p.key_dim] = dk.astype(ref.d_k.dtype)
        ref.d_v[0, rows, head * p.value_dim : (head + 1) * p.value_dim] = dv.astype(ref.d_v.dtype)


def finish(p: Plan, ref: SimpleNamespace) -> None:
    """What was summed over the whole sequence, per batch row."""
    for head in range(p.together):
        if p.initial and p.mode != "swa":
            ref.d_initial[0, head] = jnp.transpose(ref.d_state[head])
    for name, sums in (("d_swa_weight", "d_swa_sum"), ("d_rla_weight", "d_rla_sum")):
        if hasattr(ref, name):
            for h in range(p.together * p.G):
                row = jnp.sum(jnp.transpose(getattr(ref, sums)[h]), axis=0, keepdims=True)
                getattr(ref, name)[0, 0, h : h + 1] = row
    for name, sums in (("d_q_scale", "d_q_scale_sum"), ("d_k_scale", "d_k_scale_sum")):
        if hasattr(ref, name):
            getattr(ref, name)[0, 0] = jnp.sum(jnp.transpose(getattr(ref, sums)[...]), axis=0, keepdims=True)
    if hasattr(ref, "d_memory"):
        for h in range(p.together * p.G):
            ref.d_memory[0, h] = jnp.transpose(ref.d_memory_sum[h])
