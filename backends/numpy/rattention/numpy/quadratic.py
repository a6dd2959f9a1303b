"""The quadratic form of the reference: every operation and its vjp by explicit masks over all pairs of tokens.

`run` gives float64 values; `evaluate` is the same code over another array namespace (see `budget.py`). The formulas are
in `branches.py`, the masks in `reads.py`; this file arranges heads, selects the live tokens and names the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from rattention.numpy import branches as br
from rattention.numpy import exact
from rattention.numpy.reads import Reads, from_cache, from_segments, next_slots
from rattention.numpy.tables import rope_table
from rattention.spec import Call, validate

INTEGERS = ("positions", "segment_ids", "cache_length", "lengths")
Array = Any


def check(op: str, tensors: Mapping[str, Any], attrs: Mapping[str, Any]) -> Call:
    """Validate a call whose tensors are all on the host; float64 is accepted, for derivatives by differences."""
    return validate(op, tensors, attrs, extra_dtypes=("float64",))


def run(op: str, tensors: Mapping[str, Any], attrs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One operation, or its `.vjp`, in float64, unrounded (`cache_length` in int32).

    Raises:
        SpecError: the call is invalid.
    """
    call = check(op, tensors, attrs)
    return evaluate(exact, call, lift(exact, call, tensors))


def lift(xp: Any, call: Call, tensors: Mapping[str, Any]) -> dict[str, Array]:
    """Float tensors as arrays of the namespace, integer tensors as NumPy arrays; absent ones are left out."""
    stored = {t.name for t in call.operation.tensors if t.dtype == "storage"}
    out: dict[str, Array] = {}
    for name in call.given:
        x = np.asarray(tensors[name])
        same = name in stored or str(x.dtype) == call.storage
        out[name] = x.astype(np.int64) if name in INTEGERS else xp.lift(x, same)
    return out


def evaluate(xp: Any, call: Call, t: dict[str, Array]) -> dict[str, Array]:
    """Run a validated call over the namespace `xp`; the outputs are arrays of `xp`."""
    name = call.operation.name
    base = name.removesuffix(".vjp")
    if base == "rope_table":
        cos, sin = rope_table(t["positions"], call.attributes["head_dim"], call.attributes["theta"])
        return {"rope_cos": cos, "rope_sin": sin}
    outputs = {
        "feature_map": _feature_map,
        "rms_mix": _rms_mix,
        "sliding_window_attention": _attention,
        "residual_linear_attention": _attention,
        "rattention": _attention,
        "rattention_extend": _attention,
    }[base](xp, call, t, call.operation.is_vjp)
    return {o.name: outputs[o.name] for o in call.operation.outputs if call.has_output(o.name)}


def _feature_map(xp: Any, call: Call, t: dict[str, Array], vjp: bool) -> dict[str, Array]:
    kind = call.attributes["feature_map"]
    if vjp:
        return {"d_x": br.feature_map_vjp(xp, t["x"], kind, t["d_out"])}
    return {"out": br.feature_map(xp, t["x"], kind)}


def _rms_mix(xp: Any, call: Call, t: dict[str, Array], vjp: bool) -> dict[str, Array]:
    eps = call.attributes["eps"]
    if not vjp:
        return {"out": br.rms_mix(xp, t["swa"], t["rla"], t["swa_weight"], t["rla_weight"], eps)}
    outputs = {}
    for branch in ("swa", "rla"):
        d_x, d_weight = br.rms_mix_vjp(xp, t[branch], t[f"{branch}_weight"], eps, t["d_out"], False)
        outputs |= {f"d_{branch}": d_x, f"d_{branch}_weight": xp.sum(d_weight, (0, 1))}
    return outputs


# ------------------------------------------------------------------------------------------------ heads


def split_heads(x: Array, groups: int) -> Array:
    """[B, T, H, D] -> [B, groups, H / groups, T, D]."""
    B, T, H, D = x.shape
    return x.swapaxes(1, 2).reshape(B, groups, H // groups, T, D)


def join_heads(x: Array) -> Array:
    """[B, N, G, T, D] -> [B, T, N G, D]."""
    B, N, G, T, D = x.shape
    return x.reshape(B, N * G, T, D).swapaxes(1, 2)


def by_head(x: Array, groups: int) -> Array:
    """A tensor with one row per query head, [Hq, ...] -> [Hkv, G, ...]; None stays None."""
    return None if x is None else x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def gains(weight: Array, groups: int) -> Array:
    """[Hq, Dv] -> [Hkv, G, 1, Dv], to broadcast over tokens."""
    return weight.reshape(groups, weight.shape[0] // groups, 1, weight.shape[1])


# ------------------------------------------------------------------------------------------------ attention


def _attention(xp: Any, call: Call, t: dict[str, Array], vjp: bool) -> dict[str, Array]:
    """The four operations that read a sequence. They differ in which branches run and in what stands before it."""
    name, dims, attrs = call.operation.name.removesuffix(".vjp"), call.dims, call.attributes
    B, T, N, w = dims["B"], dims["T"], dims["Hkv"], attrs["window"]
    extend = name == "rattention_extend"
    has_swa, has_rla = name != "residual_linear_attention", name != "sliding_window_attention"
    mixes = has_swa and has_rla
    slots = dims["W"] if extend else 0
    if extend:
        reads = from_cache(T, slots, w, t["cache_length"], t.get("lengths"))
    else:
        reads = from_segments(B, T, w, t.get("segment_ids"), t.get("positions"))

    # Inert tokens and slots are replaced by zeros before any arithmetic (SEG-5, EXT-7, EXT-9).
    live = reads.live[:, None, None, :, None]
    readable = reads.readable[:, None, None, :, None]
    keys, vals = t["k"], t["v"]
    if extend:
        keys, vals = xp.concat([t["cache_k"], keys], 1), xp.concat([t["cache_v"], vals], 1)
    q = xp.where(live, split_heads(t["q"], N))
    k = xp.where(readable, split_heads(keys, N))
    v = xp.where(readable, split_heads(vals, N))
    state = t.get("cache_state") if extend else t.get("initial_state")
    state = None if state is None else state.reshape(B, N, 1, *state.shape[2:])
    memory = by_head(t.get("memory"), N)
    window, behind = reads.window[:, None, None], reads.behind[:, None, None]

    swa = rla = p = sq = sk = fq = fk = None
    scale = 0.0
    if has_swa:
        scale = 1.0 / math.sqrt(dims["D"]) if attrs["scale"] is None else attrs["scale"]  # SWA-2
        sq, sk = _rotated(xp, t, reads, q, k, 1.0)  # ROPE-5: the softmax branch alone
        swa, p = br.window_attention(xp, sq, sk, v, window, scale)
    if has_rla:
        fq = xp.where(live, br.feature_map(xp, _scaled(q, t.get("q_scale")), attrs["feature_map"]))
        fk = xp.where(readable, br.feature_map(xp, _scaled(k, t.get("k_scale")), attrs["feature_map"]))
        rla = br.linear_attention(xp, fq, fk, v, behind, live & reads.carried[:, None, None, :, None], state, memory)

    if not vjp:
        outputs: dict[str, Array] = {}
        if mixes:  # RAT-1; RAT-3: nothing is rounded between the branches and the norms
            w_swa, w_rla = gains(t["swa_weight"], N), gains(t["rla_weight"], N)
            mixed = br.rms_mix(xp, swa, rla, w_swa, w_rla, attrs["eps"])
        else:
            mixed = swa if has_swa else rla
        outputs["out"] = join_heads(xp.where(live, mixed))  # SEG-4, EXT-7
        if has_rla:
            final = br.final_state(xp, fk, v, reads.folded, reads.keeps, state)
            outputs["cache_state" if extend else "final_state"] = final
        if extend:
            source, held = next_slots(dims["Wnext"], slots, T, reads)
            outputs["cache_k"] = join_heads(xp.where(held[:, None, None, :, None], _slots(xp, k, source)))  # EXT-3
            outputs["cache_v"] = join_heads(xp.where(held[:, None, None, :, None], _slots(xp, v, source)))
            outputs["cache_length"] = (t["cache_length"] + reads.live.sum(-1)).astype(np.int32)  # EXT-6
        return outputs

    # GRAD-5: a cotangent at an inert token is selected away before it is used.
    d_out = xp.where(live, split_heads(t["d_out"], N))
    grads: dict[str, Array] = {}
    d_swa = d_rla = d_out
    if mixes:
        parts = {}
        for branch, x in (("swa", swa), ("rla", rla)):
            weight = gains(t[f"{branch}_weight"], N)
            parts[branch], d_weight = br.rms_mix_vjp(xp, x, weight, attrs["eps"], d_out, True)
            d_weight = xp.sum(d_weight, (0, 3))
            grads[f"d_{branch}_weight"] = d_weight.reshape(dims["Hq"], dims["Dv"])
        d_swa, d_rla = parts["swa"], parts["rla"]

    d_q = d_k = d_v = None
    if has_swa:
        d_sq, d_sk, d_v = br.window_attention_vjp(xp, sq, sk, v, window, scale, swa, p, d_swa)
        d_q, d_k = _rotated(xp, t, reads, d_sq, d_sk, -1.0)
    if has_rla:
        carried = live & reads.carried[:, None, None, :, None]
        d_fq, d_fk, d_v2, d_state, d_memory = br.linear_attention_vjp(
            xp, fq, fk, v, behind, carried, state, memory, d_rla
        )
        d_final = t.get("d_cache_state" if extend else "d_final_state")
        if d_final is not None:
            d_fk3, d_v3, d_kept = br.final_state_vjp(xp, fk, v, reads.folded, reads.keeps, d_final, dims["Hq"] // N)
            d_fk, d_v2 = d_fk + d_fk3, d_v2 + d_v3
            d_state = None if d_state is None else d_state + d_kept
        d_q2, grads["d_q_scale"] = _feature_side(xp, attrs["feature_map"], q, t.get("q_scale"), d_fq)
        d_k2, grads["d_k_scale"] = _feature_side(xp, attrs["feature_map"], k, t.get("k_scale"), d_fk)
        d_q = d_q2 if d_q is None else d_q + d_q2
        d_k = d_k2 if d_k is None else d_k + d_k2
        d_v = d_v2 if d_v is None else d_v + d_v2
        grads["d_cache_state" if extend else "d_initial_state"] = d_state
        grads["d_memory"] = None if d_memory is None else d_memory.reshape(dims["Hq"], dims["F"], dims["Dv"])
    if extend:
        source, held = next_slots(dims["Wnext"], slots, T, reads)
        d_k = _slots_vjp(xp, d_k, t.get("d_cache_k"), source, held, N)
        d_v = _slots_vjp(xp, d_v, t.get("d_cache_v"), source, held, N)
    d_k, d_v = join_heads(xp.where(readable, d_k)), join_heads(xp.where(readable, d_v))
    grads |= {"d_q": join_heads(xp.where(live, d_q)), "d_k": d_k[:, slots:], "d_v": d_v[:, slots:]}
    if extend:
        grads |= {"d_cache_k": d_k[:, :slots], "d_cache_v": d_v[:, :slots]}
    return grads


def _scaled(x: Array, scale: Array | None) -> Array:
    return x if scale is None else x * scale  # RLA-3


def _feature_side(xp: Any, kind: str, x: Array, scale: Array | None, d_phi: Array) -> tuple[Array, Array | None]:
    """Gradients of x and of its scale through phi(x * scale)."""
    d_scaled = br.feature_map_vjp(xp, _scaled(x, scale), kind, d_phi)
    if scale is None:
        return d_scaled, None
    return d_scaled * scale, xp.sum(d_scaled * x, (0, 1, 2, 3))


def _rotated(xp: Any, t: dict[str, Array], reads: Reads, q: Array, k: Array, sign: float) -> tuple[Array, Array]:
    """q and k rotated by their positions (ROPE-4); sign -1 turns back, which is the transpose."""
    if "rope_cos" not in t:
        return q, k
    rotated = []
    for x, positions, live in ((q, reads.query_positions, reads.live), (k, reads.key_positions, reads.readable)):
        rows = np.where(live, positions, 0)
        chosen = live[:, None, None, :, None]
        if not t["rope_cos"].shape[0]:  # an empty table: no token is live (ERR-9)
            rotated.append(x)
            continue
        # Cached keys of a row without a query are rotated for nobody: the table need not reach them (ERR-9).
        rows = np.minimum(rows, t["rope_cos"].shape[0] - 1)
        cos = t["rope_cos"][rows][:, None, None]
        sin = t["rope_sin"][rows][:, None, None]
        rotated.append(xp.where(chosen, br.rotate(xp, x, xp.where(chosen, cos), xp.where(chosen, sin) * sign)))
    return rotated[0], rotated[1]


def _slots(xp: Any, x: Array, source: np.ndarray) -> Array:
    """Keys [B, N, 1, S, D] gathered into the slots of the next cache."""
    if not x.shape[-2]:
        return x[..., :0, :]
    return xp.take(x, source[:, None, None, :])


def _slots_vjp(xp: Any, d_x: Array, d_slots: Array | None, source: np.ndarray, held: np.ndarray, groups: int) -> Array:
    """Add the cotangent of the next cache to the gradient of the keys that it holds (GRAD-4)."""
    if d_slots is None or not held.any():
        return d_x
    S = d_x.shape[-2]
    back = np.full((len(source), S + 1), len(source[0]), np.int64)  # for each key, the slot it went to
    rows, slots = np.nonzero(held)
    back[rows, source[rows, slots]] = slots
    back = back[:, :S]
    went = back < len(source[0])
    d = split_heads(d_slots, groups)
    moved = xp.take(d, np.where(went, back, 0)[:, None, None, :])
    return d_x + xp.where(went[:, None, None, :, None], moved)
