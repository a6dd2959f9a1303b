"""Both branches, their norms and the mix, a segment of tokens at a time.

A segment holds a few chunks: long enough to keep the kernels busy, short enough that the branches of one segment stay
in the cache until they are mixed. Softmax of a segment needs the keys of its tokens and of the window before them; the
scan needs the state that the segment before left, and the keys that lag `lead` tokens behind. So the walk over segments
reads like generation with a cache, and what it allocates besides the output is of the size of a segment; only a call
that will be differentiated keeps both branches and the states. Backward walks from the last segment to the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from rattention.torch.eager import composed
from rattention.torch.eager.band import fill_band, fill_band_backward
from rattention.torch.eager.batching import merge_into_batch
from rattention.torch.eager.chunks import TILE, scan_chunk, spans
from rattention.torch.eager.groups import Groups, groups_of
from rattention.torch.eager.kernel import Kernel
from rattention.torch.eager.maps import features
from rattention.torch.eager.mix import fill_mix, fill_mix_backward
from rattention.torch.eager.scan import fill_scan, fill_scan_backward, new_states
from rattention.torch.tangents import refuse_tangents
from torch import Tensor


class Inputs(NamedTuple):
    """Tensors of one call, each with the batch as its first axis, so that vmap merges into it."""

    q: Tensor  # [B, T, Hq, D], unrotated and unscaled
    k: Tensor  # [B, Hkv, P + T, D], rotated
    v: Tensor  # [B, Hkv, P + T, Dv]
    key: Tensor | None  # [B, Hkv, J, D], the first J keys as the linear branch sees them; None where it sees those of k
    q_scale: Tensor | None  # [B, D]
    state: Tensor | None  # [B, Hkv, F, Dv]
    swa_weight: Tensor  # [B, Hq, Dv]
    rla_weight: Tensor  # [B, Hq, Dv]
    cos: Tensor | None  # [B, T, D/2]
    sin: Tensor | None
    band_q: Tensor | None  # [B, T], groups of the band
    band_k: Tensor | None  # [B, P + T]
    scan_q: Tensor | None  # [B, T], groups of the scan
    scan_k: Tensor | None  # [B, J]
    alive: Tensor | None  # [B, J + 1]


INPUTS = 8
"""The first eight have gradients."""


def fused(
    inputs: Inputs, keys: int, window: int, scale: float, inclusive: bool, feature_map: str, eps: float, reduced: bool
) -> tuple[Tensor, Tensor]:
    """`[B, T, Hq, Dv]` and the final state `[B, Hkv, F, Dv]`.

    `keys`: J, how many keys the linear branch reads; the other attributes as in `band`, `scan` and `mix`.
    """
    transformed = torch._C._are_functorch_transforms_active()
    keep = torch.is_grad_enabled() and (transformed or any(x is not None and x.requires_grad for x in inputs[:INPUTS]))
    out, final, *_ = _KERNEL(*inputs, keys, window, scale, inclusive, feature_map, eps, reduced, keep)
    return out, final


class _Segment(NamedTuple):
    """Slices of one segment: queries, keys of the band, keys of the scan, chunks of the scan."""

    t: slice
    band: slice
    scan: slice
    chunks: slice


def _segments(x: Inputs, J: int, window: int) -> Iterator[_Segment]:
    """Cut at the first query that has a key behind its window, then every few chunks: no chunk is cut in two."""
    B, T, Hq, D = x.q.shape
    P, lead = x.k.shape[2] - T, T - J
    chunk = scan_chunk(Hq // x.k.shape[1])
    step = max(4 * TILE // max(B * Hq * max(D, x.v.shape[3]), 1) // chunk, 1) * chunk
    for t0, t1 in (*spans(0, lead, step), *spans(lead, T, step)):
        j0, j1 = max(t0 - lead, 0), max(t1 - lead, 0)
        chunks = slice(j0 // chunk, -(-j1 // chunk))
        band = slice(max(0, P + t0 - max(window, 0)), P + t1)
        yield _Segment(slice(t0, t1), band, slice(j0, j1), chunks)


def _tokens(x: Tensor | None, at: slice) -> Tensor | None:
    return None if x is None else x[:, at]


def _scan_groups(x: Inputs, at: _Segment) -> Groups | None:
    states = slice(at.scan.start, at.scan.stop + 1)
    return groups_of(_tokens(x.scan_q, at.t), _tokens(x.scan_k, at.scan), _tokens(x.alive, states))


def _band_args(
    x: Inputs, at: _Segment
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    tokens = x.q[:, at.t], x.k[:, :, at.band], x.v[:, :, at.band]
    return *tokens, _tokens(x.cos, at.t), _tokens(x.sin, at.t), _tokens(x.band_q, at.t), _tokens(x.band_k, at.band)


def _scan_args(x: Inputs, at: _Segment) -> tuple[Tensor, Tensor, Tensor]:
    q = x.q[:, at.t] if x.q_scale is None else x.q[:, at.t] * x.q_scale[:, None, None]
    return q, (x.k if x.key is None else x.key)[:, :, at.scan], x.v[:, :, at.scan]


@torch.library.custom_op("rattention::fused_forward", mutates_args=())
def fused_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor | None,
    q_scale: Tensor | None,
    state: Tensor | None,
    swa_weight: Tensor,
    rla_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    band_q: Tensor | None,
    band_k: Tensor | None,
    scan_q: Tensor | None,
    scan_k: Tensor | None,
    alive: Tensor | None,
    keys: int,
    window: int,
    scale: float,
    inclusive: bool,
    feature_map: str,
    eps: float,
    reduced: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = Inputs(q, k, v, key, q_scale, state, swa_weight, rla_weight, cos, sin, band_q, band_k, scan_q, scan_k, alive)
    refuse_tangents()
    out, final, swa, rla, states = _outputs(q, v, keys, feature_map, keep)
    running = state
    for at in _segments(x, keys, window):
        s, r = (b[:, at.t] if keep else torch.empty_like(out[:, at.t]) for b in (swa, rla))
        fill_band(s, *_band_args(x, at), window, scale, reduced)
        kept = states[:, :, at.chunks] if keep else None
        if running is None and at.scan.start == at.scan.stop:
            r.zero_()  # a token with nothing to read gets exactly 0 (RLA-7)
        else:
            rest = (running, _scan_groups(x, at), inclusive, feature_map, reduced)
            running = fill_scan(r, kept, *_scan_args(x, at), *rest)
        fill_mix(out[:, at.t], s, r, swa_weight, rla_weight, eps)
    if running is None:
        final.zero_()
    else:
        final.copy_(running)
    return out, final, swa, rla, states


def _outputs(q: Tensor, v: Tensor, J: int, feature_map: str, keep: bool) -> tuple[Tensor, ...]:
    """Output, final state, and what backward needs: both branches and the state before each chunk."""
    B, T, Hq, D = q.shape
    Hkv, Dv, F = v.shape[1], v.shape[3], features(D, feature_map)
    branches = [q.new_empty(B, T if keep else 0, Hq, Dv) for _ in range(2)]
    states = new_states(q, v, J if keep else 0, feature_map)
    return q.new_empty(B, T, Hq, Dv), q.new_empty(B, Hkv, F, Dv), *branches, states


@fused_forward.register_fake
def _(q, k, v, key, *args):
    keys, feature_map, keep = args[-8], args[-4], args[-1]
    return _outputs(q, v, keys, feature_map, keep)


@torch.library.custom_op("rattention::fused_backward", mutates_args=())
def fused_backward(
    d_out: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor | None,
    q_scale: Tensor | None,
    state: Tensor | None,
    swa_weight: Tensor,
    rla_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    band_q: Tensor | None,
    band_k: Tensor | None,
    scan_q: Tensor | None,
    scan_k: Tensor | None,
    alive: Tensor | None,
    swa: Tensor,
    rla: Tensor,
    states: Tensor,
    keys: int,
    window: int,
    scale: float,
    inclusive: bool,
    feature_map: str,
    eps: float,
    reduced: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first eight inputs; those of an absent key and q_scale are empty."""
    x = Inputs(q, k, v, key, q_scale, state, swa_weight, rla_weight, cos, sin, band_q, band_k, scan_q, scan_k, alive)
    d_q, d_k, d_v = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    # Where both branches read the same keys, they add to one gradient: no second one is made, cut and added.
    d_key = d_k if key is None else key.new_zeros(key.shape)
    d_q_scale = q.new_empty(0) if q_scale is None else q_scale.new_zeros(q_scale.shape)
    d_weights = swa_weight.new_zeros(swa_weight.shape), rla_weight.new_zeros(rla_weight.shape)
    d_state = d_final.clone(memory_format=torch.contiguous_format)
    for at in reversed(list(_segments(x, keys, window))):
        d_s, d_r = torch.empty_like(swa[:, at.t]), torch.empty_like(rla[:, at.t])
        mixed = (swa[:, at.t], rla[:, at.t], swa_weight, rla_weight, eps)
        fill_mix_backward(d_s, d_r, *d_weights, d_out[:, at.t], *mixed)
        band = d_q[:, at.t], d_k[:, :, at.band], d_v[:, :, at.band], d_s
        fill_band_backward(*band, *_band_args(x, at), window, scale, reduced)
        if state is None and at.scan.start == at.scan.stop:
            continue
        args = _scan_args(x, at)
        d_qs = torch.empty_like(d_q[:, at.t])
        scan = d_qs, d_key[:, :, at.scan], d_v[:, :, at.scan], d_r, d_state
        rest = (state, states[:, :, at.chunks], _scan_groups(x, at), inclusive, feature_map, reduced)
        d_state = fill_scan_backward(*scan, *args, *rest)
        if q_scale is None:
            d_q[:, at.t] += d_qs
        else:
            d_q[:, at.t].addcmul_(d_qs, q_scale[:, None, None])
            d_q_scale += d_qs.mul_(q[:, at.t]).sum((1, 2))
    return d_q, d_k, d_v, k.new_empty(0) if key is None else d_key, d_q_scale, d_state, *d_weights


@fused_backward.register_fake
def _(d_out, d_final, q, k, v, key, q_scale, state, swa_weight, rla_weight, *args):
    optional = [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (key, q_scale)]
    first, last = ([x.new_empty(x.shape) for x in xs] for xs in ((q, k, v), (d_final, swa_weight, rla_weight)))
    return (*first, *optional, *last)


fused_forward.register_vmap(merge_into_batch(fused_forward))
fused_backward.register_vmap(merge_into_batch(fused_backward))


_KERNEL = Kernel(
    fused_forward,
    fused_backward,
    lambda *args: composed.fused(*args[:-1]),
    inputs=INPUTS,
    constants=len(Inputs._fields) - INPUTS,
    outputs=2,
    attributes=7,
)
