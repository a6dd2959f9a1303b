"""Pieces that the kernels share. In all but decode everything is transposed: features on sublanes, tokens on lanes.

So softmax over keys, the feature map and the RMS norms all reduce along sublanes, which are plain vector operations,
where a reduction along lanes costs a trip through the cross-lane unit per eight rows; and the statistics of 128
queries fill one vector register. Queries enter every product as stored, and one transpose per head brings the output
back to [tokens, channels].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax.core
import jax.numpy as jnp
from jax import lax
from rattention.jax.pallas.plan import Plan

LOG2E = 1.4426950408889634
F32 = jnp.float32


def dot(p: Plan, a: Any, b: Any, contract: tuple[int, int] = (1, 0)) -> Any:
    """Matrix product accumulated in float32. float32 operands keep all their bits unless the caller gave them up."""
    if p.interpret:
        # The CPU's products lack some shapes in bfloat16; these are the same products.
        a, b = a.astype(F32), b.astype(F32)
    precision = lax.Precision.HIGHEST if p.exact and a.dtype == F32 else lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=F32)


def interleave(tasks: Iterable[Iterator[None]], lag: int) -> None:
    """Emit generator tasks staggered by `lag` stages, so that the matrix work of one overlaps the vector work of
    the one before it: the instruction scheduler moves little across what the program order keeps apart."""
    waiting = list(tasks)
    live: list[Iterator[None]] = []
    tick = 0
    while waiting or live:
        if waiting and (tick % lag == 0 or not live):
            live.append(waiting.pop(0))
        live = [task for task in live if next(task, StopIteration) is not StopIteration]
        tick += 1


class ReadOnce:
    """A reference nobody writes during a step, each element of which is read at most once.

    For the interpreter, where a read is a call back into Python. Compiled kernels read again instead: a load is cheaper
    than a register held across the step.
    """

    inside_loop = False

    @classmethod
    @contextlib.contextmanager
    def in_loop(cls) -> Iterator[None]:
        """While the body of a loop is traced: nothing of it may be kept for what follows."""
        outer, cls.inside_loop = cls.inside_loop, True
        try:
            yield
        finally:
            cls.inside_loop = outer

    def __init__(self, ref: Any):
        self._ref, self._seen = ref, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ref, name)

    def __getitem__(self, at: Any) -> Any:
        parts = at if isinstance(at, tuple) else (at,)
        if any(isinstance(x, jax.core.Tracer) or isinstance(getattr(x, "start", 0), jax.core.Tracer) for x in parts):
            return self._ref[at]
        key = repr(at)
        if key in self._seen:
            return self._seen[key]
        value = self._ref[at]
        if not ReadOnce.inside_loop:  # what a loop body reads does not exist outside it
            self._seen[key] = value
        return value


READ_ONLY = (
    *("q", "d_out", "numbers", "limits", "owners", "rope", "swa_gain", "rla_gain", "q_column"),
    *("k_column", "memory_t", "k_tiles", "kt_tiles", "v_tiles", "vn_tiles", "raw_tiles", "id_tiles"),
)


def read_once(p: Plan, ref: SimpleNamespace) -> SimpleNamespace:
    """`ref` for the computing part of a step, in which nothing of `READ_ONLY` is written."""
    if not p.interpret:
        return ref
    return SimpleNamespace(**{k: ReadOnce(v) if k in READ_ONLY else v for k, v in vars(ref).items()})


# ------------------------------------------------------------------------------------------------ masks


def distance(p: Plan, r: int, heads: int) -> Any:
    """Query position minus key position [C, heads*C] for tile r: keys on sublanes, queries on lanes."""
    key = lax.broadcasted_iota(jnp.int32, (p.C, p.C), 0)
    query = lax.broadcasted_iota(jnp.int32, (p.C, p.C), 1)
    return beside([query - key - p.offset(r)] * heads)


def softmax_mask(p: Plan, r: int, heads: int) -> Any:
    """SWA-1 on a tile that the window cuts."""
    delta = distance(p, r, heads)
    low, high = p.deltas(r)
    terms = ([delta >= 0] if low < 0 else []) + ([delta <= p.window] if high > p.window else [])
    return terms[0] if len(terms) == 1 else terms[0] & terms[1]


def linear_mask(p: Plan, r: int, heads: int) -> Any:
    """RLA-1 on a tile: the complement of the softmax mask within the past (RAT-2)."""
    return distance(p, r, heads) > p.window


def beside(xs: Sequence[Any]) -> Any:
    return xs[0] if len(xs) == 1 else jnp.concatenate(xs, axis=1)


def below(xs: Sequence[Any]) -> Any:
    return xs[0] if len(xs) == 1 else jnp.concatenate(xs, axis=0)


def columns(p: Plan, row: Any) -> Any:
    """A row of numbers of tokens [1, C] as [C, C], token j's all along sublane j."""
    return jnp.transpose(jnp.broadcast_to(row, (p.C, p.C)))


# ------------------------------------------------------------------------------------------------ rotation


def rotate(x: Any, table: Any, inverse: bool = False) -> Any:
    """Rotary embedding (ROPE-3) of x [C, D] by table [C, 2D] = (cos, cos, -sin, sin); `inverse` is its transpose."""
    D = x.shape[1]
    swapped = jnp.concatenate([x[:, D // 2 :], x[:, : D // 2]], axis=1)
    turn = swapped * table[:, D:]
    return x * table[:, :D] - turn if inverse else x * table[:, :D] + turn


# ------------------------------------------------------------------------------------------------ feature map


def live_channels(p: Plan, like: Any, axis: int = 0) -> Any:
    """Which of the padded channels, along `axis`, exist; None where all do."""
    if p.key_dim == p.true_key_dim:
        return None
    at = lax.broadcasted_iota(jnp.int32, like.shape, axis)
    if p.split:
        half = p.key_dim // 2
        at = jnp.where(at >= half, at - half, at)
        return at < p.true_key_dim // 2
    return at < p.true_key_dim


def phi(p: Plan, x: Any, axis: int = 0) -> list[Any]:
    """The halves of the feature map of x float32, D along `axis`, each of its shape, float32 (FM-1 .. FM-4)."""
    if p.feature_map == "identity":
        return [x]
    if p.feature_map == "relu":
        return [jnp.maximum(x, 0.0), jnp.maximum(-x, 0.0)]
    live = live_channels(p, x, axis)
    top = x if live is None else jnp.where(live, x, -jnp.inf)
    bottom = x if live is None else jnp.where(live, x, jnp.inf)
    # The difference before the factor: a product contracted with the subtraction is not below its own rounded maximum.
    up = jnp.exp2((top - jnp.max(top, axis=axis, keepdims=True)) * LOG2E)
    down = jnp.exp2((jnp.min(bottom, axis=axis, keepdims=True) - bottom) * LOG2E)
    return [e * (1.0 / jnp.sum(e, axis=axis, keepdims=True)) for e in (up, down)]


def phi_gradient(p: Plan, x: Any, halves: Sequence[Any], d_halves: Sequence[Any]) -> Any:
    """Cotangent of x [D, N] from those of the halves."""
    if p.feature_map == "identity":
        return d_halves[0]
    if p.feature_map == "relu":
        return jnp.where(x > 0, d_halves[0], 0.0) - jnp.where(x < 0, d_halves[1], 0.0)
    (up, down), (d_up, d_down) = halves, d_halves
    one = up * (d_up - jnp.sum(up * d_up, axis=0, keepdims=True))
    return one - down * (d_down - jnp.sum(down * d_down, axis=0, keepdims=True))


def split_halves(p: Plan, x: Any) -> list[Any]:
    """The halves of x [F, N]."""
    return [x[i * p.key_dim : (i + 1) * p.key_dim] for i in range(p.halves)]


# ------------------------------------------------------------------------------------------------ window of tiles


def shift(p: Plan, ref: Any, head: int, up: bool, kept: int) -> None:
    """Move the `kept` tiles that stay in the window by one grid step within ref [heads, tiles, ...]."""

    def move(i: Any) -> None:
        source, target = (i + p.m, i) if up else (i, i + p.m)
        ref[head, target] = ref[head, source]

    order = range(kept) if up else range(kept - 1, -1, -1)
    if kept <= 8:
        for i in order:
            move(i)
    else:
        lax.fori_loop(0, kept, lambda i, _: (move(i if up else kept - 1 - i), None)[1], None)


def clear(ref: Any, head: int, first: int, count: int) -> None:
    """Zero `count` tiles of ref [heads, tiles, ...] from tile `first` on."""

    def one(i: Any) -> None:
        ref[head, first + i] = jnp.zeros(ref.shape[2:], ref.dtype)

    if count <= 8:
        for i in range(count):
            one(i)
    else:
        lax.fori_loop(0, count, lambda i, _: (one(i), None)[1], None)


def loop_groups(p: Plan, first_valid: Any, carry: Any, body: Callable[[Any, Any], Any]) -> Any:
    """Run `body(first tile of the group, carry)` over the looped tiles, skipping groups before the sequence."""
    first, last = p.loop
    unit = p.config.tiles
    start = jnp.clip((first_valid - first) // unit, 0, (last - first) // unit)

    def group(i: Any, carry: Any) -> Any:
        with ReadOnce.in_loop():
            return body(first + i * unit, carry)

    return lax.fori_loop(start, (last - first) // unit, group, carry)
