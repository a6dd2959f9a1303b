"""The transposed derivative of the recurrent form: one sweep forward, one backward.

The forward sweep runs the mechanism again. At each token it has all that its own outputs depend on: ring, weights and
state; so it yields the gradients of the norms, of q, and what softmax sends to the tokens in the ring. The backward
sweep carries the adjoint of the state: reading adds phi(q_t)^T d_t to it, folding token i hands it to phi(k_i) and v_i,
and the start of a segment hands it to the initial state (GRAD-2, GRAD-4).
"""

from __future__ import annotations

import numpy as np
from rattention.numpy.recurrent import Array, Mechanism, Sequence, last_tokens, phi_back, rms, rms_back, sequence, turn
from rattention.spec import Call


def attention_vjp(call: Call, t: dict[str, Array]) -> dict[str, Array]:
    """Gradients of the four operations that read a sequence; `t` holds the inputs and the cotangents."""
    s, d, attrs = sequence(call, t), call.dims, call.attributes
    B, T, N, G, Dv = d["B"], d["T"], d["Hkv"], d["Hq"] // d["Hkv"], d["Dv"]
    swa, rla = "scale" in attrs, "feature_map" in attrs
    memory = t["memory"].reshape(N, G, d["F"], Dv) if "memory" in t else None
    live = s.segment != 0
    d_out = t["d_out"].reshape(B, T, N, G, Dv)
    d_out = np.where(live[:, s.slots :, None, None, None], d_out, 0.0)  # GRAD-5

    g: dict[str, Array] = {}
    y, z = np.zeros((B, T, N, G, Dv)), np.zeros((B, T, N, G, Dv))
    d_y, d_z = d_out.copy(), d_out.copy()
    d_k, d_v = np.zeros(s.k.shape), np.zeros(s.v.shape)
    d_fq = None if s.fq is None else np.zeros(s.fq.shape)
    d_q = np.zeros(s.q.shape)
    m = Mechanism(s, s.state, memory)
    for i in range(T):
        m.begin(i)
        p = k = v = alive = None
        if swa:
            k, v, alive = m.window(i)
            p, y[:, i] = m.read_window(i, k, v, alive)
        if rla:
            z[:, i] = m.read_state(i)
        if swa and rla:
            d_y[:, i] = rms_back(y[:, i], t["swa_weight"].reshape(N, G, Dv) * d_out[:, i], attrs["eps"])
            d_z[:, i] = rms_back(z[:, i], t["rla_weight"].reshape(N, G, Dv) * d_out[:, i], attrs["eps"])
        if p is not None and k is not None and v is not None and alive is not None:
            span = m.span(i)
            d_p = np.matmul(d_y[:, i], v.transpose(0, 2, 3, 1))
            d_s = p * (d_p - np.sum(p * d_p, -1, keepdims=True))
            d_s = s.scale * np.where(alive[:, None, None], d_s, 0.0)
            d_q[:, i] = np.matmul(d_s, k.transpose(0, 2, 1, 3))
            # matmul over the G query heads of the group sums what they send to their kv head.
            to_v = np.matmul(p.swapaxes(-1, -2), d_y[:, i]).transpose(0, 2, 1, 3)
            to_k = np.matmul(d_s.swapaxes(-1, -2), s.q_rot[:, i]).transpose(0, 2, 1, 3)
            if not alive.all():  # 0 * NaN
                to_v, to_k = (np.where(alive[..., None, None], x, 0.0) for x in (to_v, to_k))
            d_v[:, span] += to_v
            d_k[:, span] += to_k
        if d_fq is not None:
            d_fq[:, i] = np.matmul(d_z[:, i], m.state.swapaxes(-1, -2))
            if memory is not None:
                d_fq[:, i] += np.matmul(d_z[:, i, :, :, None], memory.swapaxes(-1, -2))[..., 0, :]
        m.advance(i)

    if swa and rla:
        g["d_swa_weight"] = np.sum(d_out * rms(y, attrs["eps"]), (0, 1)).reshape(N * G, Dv)
        g["d_rla_weight"] = np.sum(d_out * rms(z, attrs["eps"]), (0, 1)).reshape(N * G, Dv)
    if s.cos is not None and s.sin is not None:  # the transpose of a rotation turns back
        d_k = turn(d_k, s.cos, -s.sin)
        flat = d_q.reshape(B, T, N * G, d["D"])
        d_q = turn(flat, s.cos[:, s.slots :], -s.sin[:, s.slots :]).reshape(d_q.shape)
    if d_fq is not None and s.fq is not None:
        final = t.get("d_cache_state" if "cache_length" in t else "d_final_state", np.zeros(s.state.shape))
        d_fk, d_v_state, d_state = _state_adjoint(s, d_z, final)
        d_v += d_v_state
        g["d_initial_state"] = g["d_cache_state"] = d_state
        if memory is not None:
            g["d_memory"] = np.einsum("btngf,btngv->ngfv", s.fq, d_z).reshape(N * G, d["F"], Dv)
        for name, x, d_phi in (("q", s.q, d_fq), ("k", s.k, d_fk)):
            scale = t.get(f"{name}_scale", np.ones(d["D"]))
            d_scaled = phi_back(x * scale, d_phi, attrs["feature_map"])
            g[f"d_{name}_scale"] = np.sum(d_scaled * x, tuple(range(x.ndim - 1)))
            if name == "q":
                d_q = d_q + d_scaled * scale
            else:
                d_k = d_k + d_scaled * scale
    if "cache_length" in t:
        _from_cache(t, d_k, d_v, T)
    d_k, d_v = (np.where(live[..., None, None], x, 0.0) for x in (d_k, d_v))
    g["d_q"] = np.where(live[:, s.slots :, None, None, None], d_q, 0.0).reshape(B, T, N * G, d["D"])
    g |= {"d_k": d_k[:, s.slots :], "d_v": d_v[:, s.slots :]}
    g |= {"d_cache_k": d_k[:, : s.slots], "d_cache_v": d_v[:, : s.slots]}
    return g


def _state_adjoint(s: Sequence, d_z: Array, d_final: Array) -> tuple[Array, Array, Array]:
    """Backward sweep: gradients of phi(k), of v and of the initial state. d_z [B, T, N, G, Dv]."""
    assert s.fq is not None
    assert s.fk is not None
    fk, adjoint = s.fk, d_final.copy()
    d_fk, d_v, d_initial = np.zeros(fk.shape), np.zeros(s.v.shape), np.zeros(s.state.shape)

    def unfold(i: int, t: int) -> None:
        joins = (s.segment[:, i] == s.segment[:, t + s.slots]) & (s.segment[:, i] != 0)
        if joins.any():
            chosen = joins[:, None, None]
            d_fk[:, i] += np.where(chosen, np.matmul(adjoint, s.v[:, i, :, :, None])[..., 0], 0.0)
            d_v[:, i] += np.where(chosen, np.matmul(fk[:, i, :, None], adjoint)[..., 0, :], 0.0)

    for t in range(d_z.shape[1] - 1, -1, -1):
        if s.window is not None and s.window >= 0:
            unfold(t, t)
        adjoint = adjoint + np.matmul(s.fq[:, t].swapaxes(-1, -2), d_z[:, t])
        if s.window == -1:
            unfold(t + s.slots, t)
        opens, first = s.opens[:, t, None, None, None], s.first[:, t, None, None, None]
        d_initial += np.where(opens & first, adjoint, 0.0)
        adjoint = np.where(opens, 0.0, adjoint)
    return d_fk, d_v, d_initial + adjoint


def _from_cache(t: dict[str, Array], d_k: Array, d_v: Array, tokens: int) -> None:
    """Add the cotangents of the next ring to the tokens that stand in it (GRAD-4); its empty slots are inert."""
    for name, d_x in (("d_cache_k", d_k), ("d_cache_v", d_v)):
        if name not in t:
            continue
        new = t.get("lengths", np.full(len(d_x), tokens))
        for b, n in enumerate(new):
            source, target = last_tokens(int(n), tokens, d_x.shape[1], t[name].shape[1])
            d_x[b, source] += t[name][b, target]
