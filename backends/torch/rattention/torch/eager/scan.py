"""Linear attention over keys that lag behind the queries, with a carried state (RLA-1 .. RLA-9).

The first `lead = T - J` queries of `q [B, T, Hq, D]` come before every key; key j of `k [B, Hkv, J, D]` is read by the
queries i > j + lead, and by i = j + lead too where `inclusive`. So the window is a shift: query t reads token t - w - 1
and older when the keys are the tokens 0 .. T-w-1.

Forward, per chunk of C keys and the C queries beside them: phi of both, rows times the state before the chunk, plus a
C x C triangle inside it; then the chunk's keys are folded into the state. States are kept for the backward pass, one
per chunk, and everything else is computed again there. The state is a sum over chunks of sums over tokens, in the dtype
given (float32): two levels, so that rounding grows with the number of chunks and not of tokens (NUM-3).

Groups: `alive[b, 0]` is the document that the initial state belongs to and `alive[b, j + 1]` the one that the state
belongs to once key j is in. A chunk's queries read the state where `group_q == alive` at the chunk's start; at a change
of document the state restarts (SEG-2). A key whose `group_k` is negative is read by nobody.
"""

from __future__ import annotations

import torch
from rattention.torch.eager import composed
from rattention.torch.eager.batching import Block, blocks, flat, merge_into_batch, put_rows, rows
from rattention.torch.eager.chunks import full_precision, heads_at_once, scan_chunk, spans
from rattention.torch.eager.groups import Groups, groups_of
from rattention.torch.eager.kernel import Kernel
from rattention.torch.eager.maps import features, phi, phi_backward
from rattention.torch.tangents import refuse_tangents
from torch import Tensor


def linear_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    groups: Groups | None,
    inclusive: bool,
    feature_map: str,
    reduced: bool = False,
) -> tuple[Tensor, Tensor]:
    """Linear attention, differentiable in q, k, v and state.

    Args:
        q: `[B, T, Hq, D]`, k: `[B, Hkv, J, D]`, J <= T, both before phi. v: `[B, Hkv, J, Dv]`. One dtype.
        state: `[B, Hkv, F, Dv]` before the first key; None for zeros, which no query reads.
        groups: documents, or None for one document per row.
        inclusive: query j + lead reads key j as well.
        feature_map: phi.
        reduced: float32 products may use the reduced precision that PyTorch is set to.

    Returns:
        `[B, T, Hq, Dv]`, and the state after the last key, `[B, Hkv, F, Dv]`.
    """
    g = (None, None, None) if groups is None else tuple(groups)
    out, final, *_ = _KERNEL(q, k, v, state, *g, inclusive, feature_map, reduced)
    return out, final


class _Chunks:
    """The walk over chunks of keys and the queries beside them, and the masks within and between."""

    def __init__(self, q: Tensor, k: Tensor, groups: Groups | None, inclusive: bool, F: int):
        self.B, self.T = q.shape[:2]
        self.Hkv, self.J = k.shape[1:3]
        self.G = q.shape[2] // self.Hkv
        self.lead = self.T - self.J
        self.groups = groups
        full = scan_chunk(self.G)
        self.count = -(-self.J // full)
        self.chunk = min(full, max(self.T, 1))
        self.heads = heads_at_once(self.B * self.Hkv, self.chunk * self.G * max(self.chunk, F))
        steps = torch.arange(self.chunk, device=q.device)
        self.unread = steps[:, None] < steps if inclusive else steps[:, None] <= steps

    def blocks(self):
        return blocks(self.B, self.Hkv, self.heads)

    def early(self):
        """Queries before the first key: they read the initial state alone."""
        return (slice(*s) for s in spans(0, self.lead, self.chunk))

    def chunks(self) -> list[tuple[int, slice, slice]]:
        """Number of the chunk, its keys, and its queries."""
        cuts = enumerate(spans(0, self.J, self.chunk))
        return [(c, slice(j0, j1), slice(j0 + self.lead, j1 + self.lead)) for c, (j0, j1) in cuts]

    def inside(self, scores: Tensor, at: Block, t: slice, j: slice) -> Tensor:
        """Zero the pairs of one tile that do not read each other."""
        C = j.stop - j.start
        tile = scores.view(scores.shape[0], C, self.G, C)
        tile.masked_fill_(self.unread[:C, None, :C], 0)
        if self.groups is not None:
            apart = self.groups.q[at.b, t, None] != self.groups.k[at.b, None, j]
            tile.unflatten(0, (apart.shape[0], -1)).masked_fill_(apart[:, None, :, None], 0)
        return scores

    def readers(self, x: Tensor, at: Block, t: slice, before: int) -> Tensor:
        """Rows `[n, C*G, ...]` of the queries that read the state as it stands before key `before`, the others zero."""
        if self.groups is None:
            return x
        reads = self.groups.q[at.b, t] == self.groups.alive[at.b, before, None]
        b, C = reads.shape
        shaped = x.view(b, x.shape[0] // b, C, self.G, x.shape[2])
        return torch.where(reads[:, None, :, None, None], shaped, 0).view(x.shape)

    def folded(self, x: Tensor, at: Block, j: slice) -> Tensor:
        """Rows `[n, C, ...]` of the keys that are part of the state after chunk j, the others zero."""
        if self.groups is None:
            return x
        stays = self.groups.k[at.b, j] == self.groups.alive[at.b, j.stop, None]
        b, C = stays.shape
        return torch.where(stays[:, None, :, None], x.view(b, x.shape[0] // b, C, x.shape[2]), 0).view(x.shape)

    def carried(self, state: Tensor, at: Block, j: slice) -> Tensor:
        """The part of the state `[n, F, Dv]` before chunk j that is still part of the state after it."""
        if self.groups is None:
            return state
        same = self.groups.alive[at.b, j.start] == self.groups.alive[at.b, j.stop]
        shaped = state.view(same.shape[0], -1, *state.shape[1:])
        return torch.where(same[:, None, None, None], shaped, 0).view(state.shape)


def fill_scan(
    out: Tensor,
    states: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    groups: Groups | None,
    inclusive: bool,
    feature_map: str,
    reduced: bool,
) -> Tensor:
    """Write the forward pass into `out [B, T, Hq, Dv]` and, where wanted, the state before each chunk into `states`.
    Returns the final state, `[B, Hkv, F, Dv]` in memory of its own."""
    F = features(q.shape[3], feature_map)
    walk = _Chunks(q, k, groups, inclusive, F)
    if state is None:
        final = q.new_zeros(walk.B, walk.Hkv, F, v.shape[3])
        out[:, : walk.lead] = 0
    else:
        final = state.clone(memory_format=torch.contiguous_format)
    with full_precision(q.device, reduced):
        for at in walk.blocks():
            S = final[at.b, at.h].flatten(0, 1).clone()
            for t in walk.early() if state is not None else ():
                f = walk.readers(phi(rows(q, at, t, walk.G), feature_map), at, t, 0)
                put_rows(out, torch.bmm(f, S), at, t, walk.G)
            for c, j, t in walk.chunks():
                if states is not None:
                    flat(states, at, c).copy_(S)
                f, x, y = phi(rows(q, at, t, walk.G), feature_map), phi(flat(k, at, j), feature_map), flat(v, at, j)
                tile = walk.inside(torch.bmm(f, x.transpose(1, 2)), at, t, j)
                o = torch.bmm(walk.readers(f, at, t, j.start), S)
                put_rows(out, o.baddbmm_(tile, y), at, t, walk.G)
                S = torch.baddbmm(walk.carried(S, at, j), walk.folded(x, at, j).transpose(1, 2), y)
            final[at.b, at.h] = S.view_as(final[at.b, at.h])
    return final


def new_states(q: Tensor, v: Tensor, J: int, feature_map: str) -> Tensor:
    """Room for the state before each chunk of J keys, `[B, Hkv, chunks, F, Dv]`."""
    B, _, Hq, D = q.shape
    Hkv, F = v.shape[1], features(D, feature_map)
    chunk = scan_chunk(Hq // Hkv)
    return q.new_empty(B, Hkv, (J + chunk - 1) // chunk, F, v.shape[3])


def one_state(states: Tensor) -> Tensor:
    """A state of zeros, `[B, Hkv, F, Dv]`, beside those of `new_states`."""
    return states.new_zeros(*states.shape[:2], *states.shape[3:])


@torch.library.custom_op("rattention::scan_forward", mutates_args=())
def scan_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    group_q: Tensor | None,
    group_k: Tensor | None,
    alive: Tensor | None,
    inclusive: bool,
    feature_map: str,
    reduced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    refuse_tangents()
    out, states = q.new_empty(*q.shape[:3], v.shape[3]), new_states(q, v, v.shape[2], feature_map)
    groups = groups_of(group_q, group_k, alive)
    final = fill_scan(out, states, q, k, v, state, groups, inclusive, feature_map, reduced)
    return out, final, states


@scan_forward.register_fake
def _(q, k, v, state, group_q, group_k, alive, inclusive, feature_map, reduced):
    states = new_states(q, v, v.shape[2], feature_map)
    return q.new_empty(*q.shape[:3], v.shape[3]), one_state(states), states


def fill_scan_backward(
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_out: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    states: Tensor,
    groups: Groups | None,
    inclusive: bool,
    feature_map: str,
    reduced: bool,
) -> Tensor:
    """Write the gradient of q, add those of k and v, and return that of the state in memory of its own.

    The gradient of the state runs from the last chunk to the first: what the queries of a chunk read, plus what is
    carried past it.
    """
    walk = _Chunks(q, k, groups, inclusive, states.shape[3])
    G = walk.G
    d_state = d_final.clone(memory_format=torch.contiguous_format)
    if state is None:
        d_q[:, : walk.lead] = 0
    with full_precision(q.device, reduced):
        for at in walk.blocks():
            dS = d_state[at.b, at.h].flatten(0, 1).clone()
            for c, j, t in reversed(walk.chunks()):
                a, b, y, d_o = rows(q, at, t, G), flat(k, at, j), flat(v, at, j), rows(d_out, at, t, G)
                f, x, S = phi(a, feature_map), phi(b, feature_map), flat(states, at, c)
                tile = walk.inside(torch.bmm(f, x.transpose(1, 2)), at, t, j)
                flat(d_v, at, j).add_(torch.bmm(walk.folded(x, at, j), dS).baddbmm_(tile.transpose(1, 2), d_o))
                d_tile = walk.inside(torch.bmm(d_o, y.transpose(1, 2)), at, t, j)
                d_x = walk.folded(torch.bmm(y, dS.transpose(1, 2)), at, j)
                d_x = torch.baddbmm(d_x, d_tile.transpose(1, 2), f)
                flat(d_k, at, j).add_(phi_backward(b, x, d_x, feature_map))
                d_f = walk.readers(torch.bmm(d_o, S.transpose(1, 2)), at, t, j.start)
                d_f = torch.baddbmm(d_f, d_tile, x)
                put_rows(d_q, phi_backward(a, f, d_f, feature_map), at, t, G)
                dS = torch.baddbmm(walk.carried(dS, at, j), walk.readers(f, at, t, j.start).transpose(1, 2), d_o)
            for t in walk.early():
                if state is None:
                    break
                a, d_o, S = rows(q, at, t, G), rows(d_out, at, t, G), state[at.b, at.h].flatten(0, 1)
                f = phi(a, feature_map)
                d_f = walk.readers(torch.bmm(d_o, S.transpose(1, 2)), at, t, 0)
                put_rows(d_q, phi_backward(a, f, d_f, feature_map), at, t, G)
                dS = torch.baddbmm(dS, walk.readers(f, at, t, 0).transpose(1, 2), d_o)
            d_state[at.b, at.h] = dS.view_as(d_state[at.b, at.h])
    return d_state


@torch.library.custom_op("rattention::scan_backward", mutates_args=())
def scan_backward(
    d_out: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    group_q: Tensor | None,
    group_k: Tensor | None,
    alive: Tensor | None,
    states: Tensor,
    inclusive: bool,
    feature_map: str,
    reduced: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and state."""
    d_q, d_k, d_v = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    groups = groups_of(group_q, group_k, alive)
    rest = (q, k, v, state, states, groups, inclusive, feature_map, reduced)
    return d_q, d_k, d_v, fill_scan_backward(d_q, d_k, d_v, d_out, d_final, *rest)


@scan_backward.register_fake
def _(d_out, d_final, q, k, v, state, group_q, group_k, alive, states, inclusive, feature_map, reduced):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, d_final))


scan_forward.register_vmap(merge_into_batch(scan_forward))
scan_backward.register_vmap(merge_into_batch(scan_backward))

_KERNEL = Kernel(
    scan_forward, scan_backward, lambda *args: composed.scan(*args[:-1]), inputs=4, constants=3, outputs=2, attributes=3
)
