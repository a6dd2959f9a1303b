"""Linear attention over keys that lag behind the queries, with a carried state (RLA-1 .. RLA-9).

Heads are flat as in `band`. The first `lead = T - J` queries of `phi_q [N, T, G, F]` come before every key; key j of
`phi_k [N, J, F]` is read by the queries i > j + lead, and by i = j + lead too where `inclusive`. So the window is a
shift: query t reads token t - w - 1 and older when the keys are the tokens 0 .. T-w-1.

Forward, per chunk of C keys and the C queries beside them: rows times the state before the chunk, plus a C x C triangle
inside it; then the chunk's keys are folded into the state. States are kept for the backward pass, one per chunk, and
everything else is computed again there. The state is a sum over chunks of sums over tokens, in the dtype given
(float32): two levels, so that rounding grows with the number of chunks and not of tokens (NUM-3).

Groups: `alive[n, 0]` is the document that the initial state belongs to and `alive[n, j + 1]` the one that the state
belongs to once key j is in. A chunk's queries read the state where `group_q == alive` at the chunk's start; at a change
of document the state restarts (SEG-2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from rattention.torch.eager.batching import merge_into_heads
from rattention.torch.eager.chunks import full_precision, heads_at_once, scan_chunk, spans
from torch import Tensor


class Groups(NamedTuple):
    """Documents of queries `[N, T]`, of keys `[N, J]`, and of the state before key j `[N, J + 1]`."""

    q: Tensor
    k: Tensor
    alive: Tensor


def linear_scan(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    state: Tensor,
    groups: Groups | None,
    inclusive: bool,
    reduced: bool = False,
) -> tuple[Tensor, Tensor]:
    """Linear attention, differentiable in phi_q, phi_k, v and state.

    Args:
        phi_q: `[N, T, G, F]`. phi_k: `[N, J, F]`, J <= T. v: `[N, J, Dv]`. One dtype.
        state: `[N, F, Dv]` before the first key.
        groups: documents, or None for one document per row.
        inclusive: query j + lead reads key j as well.
        reduced: float32 products may use the reduced precision that PyTorch is set to.

    Returns:
        `[N, T, G, Dv]`, and the state after the last key, `[N, F, Dv]`.
    """
    g = (None, None, None) if groups is None else tuple(groups)
    out, final, _ = _Scan.apply(phi_q, phi_k, v, state, *g, inclusive, reduced)  # pyright: ignore
    return out, final


class _Scan(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return scan_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        states = output[2]
        ctx.mark_non_differentiable(states)
        ctx.save_for_backward(*inputs[:4], states, *inputs[4:7])
        ctx.inclusive, ctx.reduced = inputs[7:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor, _: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = scan_backward(d_out, d_final, *ctx.saved_tensors, ctx.inclusive, ctx.reduced)
        return (*grads, None, None, None, None, None)


class _Chunks:
    """The walk over chunks of keys and the queries beside them, and the masks within and between."""

    def __init__(self, phi_q: Tensor, phi_k: Tensor, groups: Groups | None, inclusive: bool):
        self.N, self.T, self.G, self.F = phi_q.shape
        self.J = phi_k.shape[1]
        self.lead = self.T - self.J
        self.groups = groups
        self.chunk = min(scan_chunk(self.G, self.F), max(self.J, 1))
        self.count = -(-self.J // self.chunk)
        self.heads = heads_at_once(self.N, self.chunk * self.G * max(self.chunk, self.F))
        steps = torch.arange(self.chunk, device=phi_q.device)
        self.unread = steps[:, None] < steps if inclusive else steps[:, None] <= steps

    def blocks(self):
        return (slice(*s) for s in spans(0, self.N, self.heads))

    def chunks(self) -> list[tuple[int, slice, slice, slice]]:
        """Number of the chunk, its keys, its queries, and its rows: queries x heads of the group."""
        out = []
        for c, (j0, j1) in enumerate(spans(0, self.J, self.chunk)):
            t0, t1 = j0 + self.lead, j1 + self.lead
            out.append((c, slice(j0, j1), slice(t0, t1), slice(t0 * self.G, t1 * self.G)))
        return out

    def inside(self, scores: Tensor, n: slice, t: slice, j: slice) -> Tensor:
        """Zero the pairs of one tile that do not read each other."""
        C = j.stop - j.start
        tile = scores.view(scores.shape[0], C, self.G, C)
        tile.masked_fill_(self.unread[:C, None, :C], 0)
        if self.groups is not None:
            tile.masked_fill_((self.groups.q[n, t, None] != self.groups.k[n, None, j])[:, :, None], 0)
        return scores

    def readers(self, rows: Tensor, n: slice, t: slice, before: int) -> Tensor:
        """Rows of the queries that read the state as it stands before key `before`, the others zero."""
        if self.groups is None:
            return rows
        reads = self.groups.q[n, t] == self.groups.alive[n, before, None]
        return torch.where(reads[:, :, None, None], rows.unflatten(1, (-1, self.G)), 0).flatten(1, 2)

    def folded(self, rows: Tensor, n: slice, j: slice) -> Tensor:
        """Rows of the keys that are part of the state after chunk j, the others zero."""
        if self.groups is None:
            return rows
        stays = self.groups.k[n, j] == self.groups.alive[n, j.stop, None]
        return torch.where(stays[:, :, None], rows, 0)

    def carried(self, state: Tensor, n: slice, j: slice) -> Tensor:
        """The part of the state before chunk j that is still part of the state after it."""
        if self.groups is None:
            return state
        alive = self.groups.alive
        return torch.where((alive[n, j.start] == alive[n, j.stop])[:, None, None], state, 0)


def _groups(q: Tensor | None, k: Tensor | None, alive: Tensor | None) -> Groups | None:
    return None if q is None or k is None or alive is None else Groups(q, k, alive)


@torch.library.custom_op("rattention::scan_forward", mutates_args=())
def scan_forward(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    state: Tensor,
    group_q: Tensor | None,
    group_k: Tensor | None,
    alive: Tensor | None,
    inclusive: bool,
    reduced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    walk = _Chunks(phi_q, phi_k, _groups(group_q, group_k, alive), inclusive)
    N, T, G, F, Dv = *phi_q.shape, v.shape[-1]
    rows, out = phi_q.reshape(N, T * G, F), phi_q.new_empty(N, T * G, Dv)
    final, states = state.new_empty(state.shape), state.new_empty(N, walk.count, F, Dv)
    start = slice(0, walk.lead)
    with full_precision(v.device, reduced):
        for n in walk.blocks():
            S = state[n]
            r = slice(0, walk.lead * G)
            if walk.lead:
                out[n, r] = torch.bmm(walk.readers(rows[n, r], n, start, 0), S)
            for c, j, t, r in walk.chunks():
                states[n, c] = S
                f, x = rows[n, r], phi_k[n, j]
                tile = walk.inside(torch.bmm(f, x.transpose(1, 2)), n, t, j)
                o = torch.bmm(walk.readers(f, n, t, j.start), S)
                out[n, r] = o.baddbmm_(tile, v[n, j])
                S = torch.baddbmm(walk.carried(S, n, j), walk.folded(x, n, j).transpose(1, 2), v[n, j])
            final[n] = S
    return out.view(N, T, G, Dv), final, states


@scan_forward.register_fake
def _(phi_q, phi_k, v, state, group_q, group_k, alive, inclusive, reduced):
    N, T, G, F = phi_q.shape
    J, Dv = v.shape[1:]
    chunk = scan_chunk(G, F)
    count = (J + chunk - 1) // chunk
    return phi_q.new_empty(N, T, G, Dv), state.new_empty(state.shape), state.new_empty(N, count, F, Dv)


@torch.library.custom_op("rattention::scan_backward", mutates_args=())
def scan_backward(
    d_out: Tensor,
    d_final: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    state: Tensor,
    states: Tensor,
    group_q: Tensor | None,
    group_k: Tensor | None,
    alive: Tensor | None,
    inclusive: bool,
    reduced: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of phi_q, phi_k, v and state.

    The gradient of the state runs from the last chunk to the first: what the queries of a chunk read, plus what is
    carried past it.
    """
    walk = _Chunks(phi_q, phi_k, _groups(group_q, group_k, alive), inclusive)
    N, T, G, F, Dv = *phi_q.shape, v.shape[-1]
    rows, d_rows = phi_q.reshape(N, T * G, F), d_out.reshape(N, T * G, Dv)
    d_q, d_k, d_v = phi_q.new_zeros(N, T * G, F), phi_k.new_empty(phi_k.shape), v.new_empty(v.shape)
    d_state, start = state.new_empty(state.shape), slice(0, walk.lead)
    with full_precision(v.device, reduced):
        for n in walk.blocks():
            dS = d_final[n]
            for c, j, t, r in reversed(walk.chunks()):
                f, x, y, d_o = rows[n, r], phi_k[n, j], v[n, j], d_rows[n, r]
                tile = walk.inside(torch.bmm(f, x.transpose(1, 2)), n, t, j)
                d_v[n, j] = torch.bmm(walk.folded(x, n, j), dS).baddbmm_(tile.transpose(1, 2), d_o)
                d_x = walk.folded(torch.bmm(y, dS.transpose(1, 2)), n, j)
                d_tile = walk.inside(torch.bmm(d_o, y.transpose(1, 2)), n, t, j)
                d_k[n, j] = torch.baddbmm(d_x, d_tile.transpose(1, 2), f)
                d_f = walk.readers(torch.bmm(d_o, states[n, c].transpose(1, 2)), n, t, j.start)
                d_q[n, r] = torch.baddbmm(d_f, d_tile, x)
                dS = torch.baddbmm(walk.carried(dS, n, j), walk.readers(f, n, t, j.start).transpose(1, 2), d_o)
            if walk.lead:
                r = slice(0, walk.lead * G)
                d_q[n, r] = walk.readers(torch.bmm(d_rows[n, r], state[n].transpose(1, 2)), n, start, 0)
                dS = torch.baddbmm(dS, walk.readers(rows[n, r], n, start, 0).transpose(1, 2), d_rows[n, r])
            d_state[n] = dS
    return d_q.view(N, T, G, F), d_k, d_v, d_state


@scan_backward.register_fake
def _(d_out, d_final, phi_q, phi_k, v, state, states, group_q, group_k, alive, inclusive, reduced):
    return tuple(x.new_empty(x.shape) for x in (phi_q, phi_k, v, state))


scan_forward.register_vmap(merge_into_heads(scan_forward))
scan_backward.register_vmap(merge_into_heads(scan_backward))
