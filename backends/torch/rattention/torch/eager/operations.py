"""The operations of the specification in their eager form, on tensors that have been validated.

Every function takes the tensors and attributes of operations.toml by keyword, absent ones as None, and returns the
outputs in the order of operations.toml. Compute is float32 whatever the storage (float64 for float64); each output is
rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rattention.torch.eager.branches import Linear, Pair, Softmax, both_branches, linear_branch, softmax_branch
from rattention.torch.eager.documents import Documents, documents, lagging
from rattention.torch.eager.groups import Groups
from rattention.torch.eager.layout import compute_dtype, keep
from rattention.torch.eager.maps import phi, rotary_table, table_rows
from rattention.torch.eager.mix import mix
from torch import Tensor


def feature_map(x: Tensor, *, feature_map: str, reduced: bool = False) -> tuple[Tensor]:
    out = phi(x.to(compute_dtype(x.dtype)), feature_map).to(x.dtype)
    return (out.clone() if feature_map == "identity" else out,)


def rope_table(positions: Tensor, *, head_dim: int, theta: float, reduced: bool = False) -> tuple[Tensor, Tensor]:
    return rotary_table(positions, head_dim, theta)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    positions: Tensor | None = None,
    segment_ids: Tensor | None = None,
    window: int | None,
    scale: float | None,
    reduced: bool = False,
) -> tuple[Tensor]:
    docs, (qf, kf, vf) = _open(segment_ids, q, k, v)
    table = _table(rope_cos, rope_sin, positions, docs, qf)
    out = softmax_branch(qf, kf, vf, Softmax(table, table, _groups(docs), window, scale), reduced)
    return (_close(docs, _rowless(out, rope_cos, positions, docs, window), q.dtype),)


def residual_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    memory: Tensor | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    window: int | None,
    feature_map: str,
    reduced: bool = False,
) -> tuple[Tensor, Tensor]:
    docs, (qf, kf, vf) = _open(segment_ids, q, k, v)
    keys, groups = lagging(docs, q.shape[1], window)
    linear = Linear(q_scale, k_scale, memory, initial_state, keys, groups, window == -1, feature_map)
    out, state = linear_branch(qf, kf, vf, linear, reduced)
    return _close(docs, out, q.dtype), _last(docs, state, keys)


def rms_mix(
    swa: Tensor, rla: Tensor, swa_weight: Tensor, rla_weight: Tensor, *, eps: float, reduced: bool = False
) -> tuple[Tensor]:
    dtype = compute_dtype(swa.dtype)
    return (mix(swa.to(dtype), rla.to(dtype), swa_weight.to(dtype), rla_weight.to(dtype), eps).to(swa.dtype),)


def rattention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    swa_weight: Tensor,
    rla_weight: Tensor,
    *,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    positions: Tensor | None = None,
    segment_ids: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    memory: Tensor | None = None,
    initial_state: Tensor | None = None,
    window: int | None,
    scale: float | None,
    feature_map: str,
    eps: float,
    reduced: bool = False,
) -> tuple[Tensor, Tensor]:
    docs, (qf, kf, vf) = _open(segment_ids, q, k, v)
    table = _table(rope_cos, rope_sin, positions, docs, qf)
    keys, groups = lagging(docs, q.shape[1], window)
    softmax = Softmax(table, table, _groups(docs), window, scale)
    linear = Linear(q_scale, k_scale, memory, initial_state, keys, groups, window == -1, feature_map)
    out, state = both_branches(qf, kf, vf, swa_weight, rla_weight, softmax, linear, eps, reduced)
    out = _rowless(out, rope_cos, positions, docs, window)
    return _close(docs, out, q.dtype), _last(docs, state, keys)


def rattention_extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    swa_weight: Tensor,
    rla_weight: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    cache_state: Tensor,
    cache_length: Tensor,
    *,
    lengths: Tensor | None = None,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    memory: Tensor | None = None,
    window: int | None,
    scale: float | None,
    feature_map: str,
    eps: float,
    reduced: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cache and new tokens stand side by side as W + T slots; slot j of row b has position cache_length - W + j."""
    dtype = compute_dtype(q.dtype)
    T, W = q.shape[1], cache_k.shape[1]
    slots = torch.arange(W + T, device=q.device)
    filled = cache_length.clamp(max=W)
    new = torch.full_like(cache_length, T) if lengths is None else lengths
    live = (slots >= W - filled[:, None]) & (slots < W + new[:, None])
    qf = (q if lengths is None else keep(live[:, W:], q)).to(dtype)
    # The next cache is taken from these too, so that all gradients of a token meet in float32 (GRAD-3).
    kf, vf = (keep(live, torch.cat((old, x), 1)).to(dtype) for old, x in ((cache_k, k), (cache_v, v)))

    q_table = k_table = rows = None
    if rope_cos is not None and rope_sin is not None:
        # Keys that stand in the cache beside no new token have no reader, so the table may lack their rows.
        rows = cache_length[:, None] + (slots - W)
        cos, sin = table_rows(rope_cos, rope_sin, rows, rows.shape[0], W + T, dtype)
        q_table, k_table = (cos[:, W:], sin[:, W:]), (cos, sin)
    # The first T slots are those that new tokens push out of the cache, so the window is the shift between key j and
    # query j (EXT-5). A row with fewer new tokens than T pushes out fewer.
    owners = None
    if lengths is not None and window is not None:
        one = torch.ones_like(lengths)[:, None]
        owners = Groups(one.expand(-1, T), torch.where(slots[:T] < new[:, None], one, -1), one.expand(-1, T + 1))
    pushed = 0 if window is None else T
    softmax = Softmax(q_table, k_table, (live[:, W:], live), window, scale)
    linear = Linear(q_scale, k_scale, memory, cache_state, pushed, owners, window == -1, feature_map)
    out, state = both_branches(qf, kf, vf, swa_weight, rla_weight, softmax, linear, eps, reduced)
    if rows is not None and rope_cos is not None:
        # Positions rise along a row: where a cached key lacks its row, so does every token that reads it.
        out = _unknown(_outside(rows[:, W:], rope_cos), out)
    if lengths is not None:
        out = keep(live[:, W:], out)
    kept = W if window is not None else W + T
    next_k, next_v = (_newest(x, lengths, T, kept).to(q.dtype, copy=True) for x in (kf, vf))
    return out.to(q.dtype), next_k, next_v, state, cache_length + new


EAGER: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    f.__name__: f
    for f in (
        feature_map,
        rope_table,
        sliding_window_attention,
        residual_linear_attention,
        rms_mix,
        rattention,
        rattention_extend,
    )
}


def _open(segment_ids: Tensor | None, *tensors: Tensor) -> tuple[Documents | None, tuple[Tensor, ...]]:
    """Inputs in the compute dtype, padding emptied, and the documents if there are any."""
    dtype = compute_dtype(tensors[0].dtype)
    if segment_ids is None or segment_ids.shape[1] == 0:
        return None, tuple(x.to(dtype) for x in tensors)
    docs = documents(segment_ids)
    return docs, tuple(keep(docs.live, x).to(dtype) for x in tensors)


def _close(docs: Documents | None, out: Tensor, storage: torch.dtype) -> Tensor:
    """Padding gets exactly 0 (SEG-4); the one rounding to storage."""
    return (out if docs is None else keep(docs.live, out)).to(storage)


def _table(cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, docs: Documents | None, q: Tensor) -> Pair:
    if cos is None or sin is None:
        return None
    if docs is not None:
        positions = docs.index if positions is None else torch.where(docs.live, positions, 0)
    return table_rows(cos, sin, positions, q.shape[0], q.shape[1], q.dtype)


def _rowless(
    out: Tensor, cos: Tensor | None, positions: Tensor | None, docs: Documents | None, window: int | None
) -> Tensor:
    """`out [B, T, Hq, Dv]` with NaN for live tokens that have no row in the table or read a key that has none (ERR-16).

    A selection after the branches: NaN in the table would reach, through the products of a tile, the gradients of
    tokens that have nothing to do with it.
    """
    T = out.shape[1]
    if cos is None or (positions is None and (docs is None or cos.shape[0] >= T)):
        return out  # without documents positions are 0 .. T-1, and the shapes have shown that these are rows
    t = torch.arange(T, device=out.device)
    if docs is None:
        outside, behind = _outside(positions, cos), t
    else:
        outside, behind = docs.live & _outside(docs.index if positions is None else positions, cos), docs.index
    if window is not None:
        behind = behind.clamp(max=max(window, 0))
    latest = torch.where(outside, t, -1).cummax(1).values
    return _unknown(latest >= t - behind, out)


def _outside(positions: Tensor | None, cos: Tensor) -> Tensor:
    """Which positions have no row."""
    assert positions is not None
    return (positions < 0) | (positions >= cos.shape[0])


def _unknown(tokens: Tensor, out: Tensor) -> Tensor:
    """`out [B, T, ...]` with NaN for the `tokens [B, T]`."""
    return torch.where(tokens[:, :, None, None], torch.nan, out)


def _groups(docs: Documents | None) -> Pair:
    return None if docs is None else (docs.ids, docs.ids)


def _last(docs: Documents | None, state: Tensor, J: int) -> Tensor:
    """The state of the last document (SEG-7). One with no key among the first J has not started: zeros."""
    if docs is None:
        return state
    started = docs.alive[:, J] == docs.alive[:, -1]
    return torch.where(started[:, None, None, None], state, 0)


def _newest(x: Tensor, lengths: Tensor | None, T: int, count: int) -> Tensor:
    """The last `count` slots of `x [B, W + T, ...]` to each row's last real token (EXT-4), zeros before the first."""
    B, J = x.shape[:2]
    if lengths is None:
        return x[:, J - count :]
    index = torch.arange(J - T - count, J - T, device=x.device) + lengths[:, None].long()
    full = index.clamp(min=0)[:, :, None, None].expand(B, count, *x.shape[2:])
    return keep(index >= 0, x.gather(1, full))
