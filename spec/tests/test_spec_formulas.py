"""The formulas of chapters 2 to 9, transcribed index by index, against the reference.

Slow and plain on purpose: one Python loop per sum, one segment at a time, nothing shared with the reference. What is
tested here is the prose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

quadratic = pytest.importorskip("rattention.numpy.quadratic")
Arrays = dict[str, Any]


# ------------------------------------------------------------------------------------------------ chapters 2, 3, 6


def phi(x: np.ndarray, kind: str) -> np.ndarray:
    """Chapter 2."""
    if kind == "identity":
        return x
    if kind == "relu":
        return np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)])
    halves = [np.exp(s * x - np.max(s * x)) for s in (1, -1)]
    return np.concatenate([h / h.sum() for h in halves])


def phi_transposed(x: np.ndarray, g: np.ndarray, kind: str) -> np.ndarray:
    """J_phi(x)^T g of chapter 9."""
    if kind == "identity":
        return g
    D = len(x)
    plus, minus = g[:D], g[D:]
    if kind == "relu":
        return plus * (x > 0) - minus * (x < 0)
    a, b = phi(x, kind)[:D], phi(x, kind)[D:]
    return a * (plus - plus @ a) - b * (minus - minus @ b)


def rope(x: np.ndarray, c: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Chapter 3; the transpose is the same with -s."""
    x1, x2 = np.split(x, 2)
    return np.concatenate([x1 * c - x2 * s, x2 * c + x1 * s])


def mix(swa: np.ndarray, rla: np.ndarray, a: np.ndarray, c: np.ndarray, eps: float) -> np.ndarray:
    """Chapter 6, for one row."""
    return a * swa / np.sqrt(np.mean(swa**2) + eps) + c * rla / np.sqrt(np.mean(rla**2) + eps)


def mix_transposed(x: np.ndarray, weight: np.ndarray, o: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Cotangents of one branch and of its weight (chapter 9)."""
    r = np.sqrt(np.mean(x**2) + eps)
    hat, y = x / r, weight * o
    return (y - hat * (y @ hat) / len(x)) / r, o * hat


# ------------------------------------------------------------------------------------------------ chapters 4 to 9


class Segment:
    """One segment of one row, or one row of a continuation: keys and values by position, queries at some of them."""

    def __init__(self, t: Arrays, attrs: Arrays, tokens: list[tuple[str, int]], first_query: int, b: int, start: int):
        """`tokens[r]` is (tensor suffix, index) of the r-th token: ("", 3) is k[b, 3], ("cache_", 1) cache_k[b, 1].

        `first_query` is the first r that is a query; `start` the position of token 0.
        """
        self.t, self.tokens, self.first, self.b, self.start = t, tokens, first_query, b, start
        self.kind = attrs.get("feature_map", "softmax")
        self.w = attrs["window"] if attrs["window"] is not None else 10**9
        self.eps = attrs.get("eps", 1e-6)
        self.G = t["q"].shape[2] // t["k"].shape[2]
        self.scale = attrs.get("scale")
        if self.scale is None:
            self.scale = 1 / np.sqrt(t["q"].shape[3])

    def source(self, name: str, r: int) -> tuple[str, tuple[int, int]]:
        prefix, index = self.tokens[r]
        return f"{prefix}{name}", (self.b, index)

    def get(self, name: str, r: int, head: int) -> np.ndarray:
        tensor, place = self.source(name, r)
        return self.t[tensor][place][head]

    def table(self, r: int) -> tuple[np.ndarray, np.ndarray]:
        half = self.t["q"].shape[3] // 2
        if "rope_cos" not in self.t:
            return np.ones(half), np.zeros(half)
        row = self.start + r
        if "positions" in self.t:
            row = self.t["positions"][self.b, self.tokens[r][1]]
        return self.t["rope_cos"][row], self.t["rope_sin"][row]

    def queries(self) -> range:
        return range(self.first, len(self.tokens))

    def softmax(self, r: int, h: int) -> tuple[list[int], np.ndarray]:
        """Window of token r and its weights (chapter 4)."""
        window = [i for i in range(len(self.tokens)) if r - self.w <= i <= r]
        q = rope(self.get("q", r, h), *self.table(r))
        s = np.array([self.scale * (q @ rope(self.get("k", i, h // self.G), *self.table(i))) for i in window])
        p = np.exp(s - s.max()) if window else s
        return window, p / p.sum() if window else p

    def swa(self, r: int, h: int) -> np.ndarray:
        window, p = self.softmax(r, h)
        return sum((p[n] * self.get("v", i, h // self.G) for n, i in enumerate(window)), np.zeros(self.dv))

    @property
    def dv(self) -> int:
        return self.t["v"].shape[3]

    def scaled(self, name: str, r: int, head: int) -> np.ndarray:
        return self.get(name, r, head) * self.t.get(f"{name}_scale", 1.0)

    def state_read(self, r: int, h: int, initial: np.ndarray) -> np.ndarray:
        """A_t of chapter 5."""
        A = initial[h // self.G].copy()
        if "memory" in self.t:
            A += self.t["memory"][h]
        for i in range(r - self.w):
            A += np.outer(phi(self.scaled("k", i, h // self.G), self.kind), self.get("v", i, h // self.G))
        return A

    def folded(self) -> range:
        """Tokens of the final state."""
        return range(max(len(self.tokens) - max(self.w, 0), 0))

    def final_state(self, initial: np.ndarray) -> np.ndarray:
        S = initial.copy()
        for g in range(len(S)):
            for i in self.folded():
                S[g] += np.outer(phi(self.scaled("k", i, g), self.kind), self.get("v", i, g))
        return S

    def forward(self, initial: np.ndarray, out: np.ndarray) -> None:
        """Write `out` at the places of the queries."""
        for r in self.queries():
            for h in range(out.shape[2]):
                rla = phi(self.scaled("q", r, h), self.kind) @ self.state_read(r, h, initial)
                row = mix(self.swa(r, h), rla, self.t["swa_weight"][h], self.t["rla_weight"][h], self.eps)
                out[self.b, self.tokens[r][1], h] = row

    def backward(self, initial: np.ndarray, d_final: np.ndarray, d: Arrays, own_final: bool) -> np.ndarray:
        """Add to every gradient in `d`; return the cotangent of `initial`."""
        t, G, F = self.t, self.G, initial.shape[1]
        R = {(i, g): np.zeros((F, self.dv)) for i in range(len(self.tokens)) for g in range(len(initial))}
        d_initial = np.zeros_like(initial)
        if own_final:
            for i in self.folded():
                for g in range(len(initial)):
                    R[i, g] += d_final[g]
        for r in self.queries():
            for h in range(t["q"].shape[2]):
                g, o = h // G, t["d_out"][self.b, self.tokens[r][1], h]
                A, a = self.state_read(r, h, initial), phi(self.scaled("q", r, h), self.kind)
                d_swa, da = mix_transposed(self.swa(r, h), t["swa_weight"][h], o, self.eps)
                d_rla, dc = mix_transposed(a @ A, t["rla_weight"][h], o, self.eps)
                d["d_swa_weight"][h] += da
                d["d_rla_weight"][h] += dc
                # The linear branch.
                d_initial[g] += np.outer(a, d_rla)
                if "memory" in t:
                    d["d_memory"][h] += np.outer(a, d_rla)
                for i in range(r - self.w):
                    R[i, g] += np.outer(a, d_rla)
                self.scatter("q", r, h, phi_transposed(self.scaled("q", r, h), A @ d_rla, self.kind), d)
                # The softmax branch.
                window, p = self.softmax(r, h)
                c, s = self.table(r)
                delta = d_swa @ self.swa(r, h)
                for n, i in enumerate(window):
                    ds = p[n] * (d_swa @ self.get("v", i, g) - delta) * self.scale
                    ci, si = self.table(i)
                    self.add("v", i, g, p[n] * d_swa, d)
                    self.add("q", r, h, rope(ds * rope(self.get("k", i, g), ci, si), c, -s), d)
                    self.add("k", i, g, rope(ds * rope(self.get("q", r, h), c, s), ci, -si), d)
        for (i, g), back in R.items():
            k = self.scaled("k", i, g)
            self.add("v", i, g, phi(k, self.kind) @ back, d)
            self.scatter("k", i, g, phi_transposed(k, back @ self.get("v", i, g), self.kind), d)
        return d_initial

    def add(self, name: str, r: int, head: int, value: np.ndarray, d: Arrays) -> None:
        tensor, place = self.source(name, r)
        d[f"d_{tensor}"][place][head] += value

    def scatter(self, name: str, r: int, head: int, value: np.ndarray, d: Arrays) -> None:
        """A gradient of the scaled vector, passed on to the vector and to its scale."""
        self.add(name, r, head, value * self.t.get(f"{name}_scale", 1.0), d)
        if f"{name}_scale" in self.t:
            d[f"d_{name}_scale"] += value * self.get(name, r, head)


def zeros_like_inputs(t: Arrays) -> Arrays:
    return {f"d_{n}": np.zeros(x.shape) for n, x in t.items() if x.dtype.kind == "f" and n[:2] != "d_"}


def rattention_by_formula(t: Arrays, attrs: Arrays) -> tuple[Arrays, Arrays]:
    """Chapter 7: outputs, and gradients where `t` has cotangents."""
    B, T, Hq, D = t["q"].shape
    Hkv, dv = t["v"].shape[2:]
    F = D if attrs.get("feature_map") == "identity" else 2 * D
    zero = np.zeros((Hkv, F, dv))
    out, final = np.zeros((B, T, Hq, dv)), np.zeros((B, Hkv, F, dv))
    d = zeros_like_inputs(t)
    for b in range(B):
        ids = t["segment_ids"][b] if "segment_ids" in t else np.ones(T, int)
        order = [i for n, i in enumerate(ids) if i != 0 and i not in ids[:n]]
        initial = t["initial_state"][b] if "initial_state" in t else zero
        final[b] = initial
        d_initial = t["d_final_state"][b].copy() if len(order) < 2 and "d_out" in t else zero.copy()
        for n, segment in enumerate(order):
            tokens = [("", int(i)) for i in np.flatnonzero(ids == segment)]
            one = Segment(t, attrs, tokens, 0, b, 0)
            start = initial if n == 0 else zero
            one.forward(start, out)
            final[b] = one.final_state(start)
            if "d_out" in t:
                back = one.backward(start, t["d_final_state"][b], d, n == len(order) - 1)
                d_initial = d_initial + back if n == 0 else d_initial
        if "initial_state" in t:
            d["d_initial_state"][b] = d_initial
    return {"out": out, "final_state": final}, d


def extend_by_formula(t: Arrays, attrs: Arrays) -> tuple[Arrays, Arrays]:
    """Chapter 8: outputs, and gradients where `t` has cotangents."""
    B, T, Hq, _ = t["q"].shape
    slots, w = t["cache_k"].shape[1], attrs["window"]
    keep = slots + T if w is None else slots
    out = np.zeros((B, T, Hq, t["v"].shape[3]))
    new = {
        "cache_k": np.zeros((B, keep, *t["cache_k"].shape[2:])),
        "cache_v": np.zeros((B, keep, *t["cache_v"].shape[2:])),
        "cache_state": np.zeros(t["cache_state"].shape),
        "cache_length": t["cache_length"] + t["lengths"],
    }
    d = zeros_like_inputs(t)
    for b in range(B):
        n, count = int(t["cache_length"][b]), int(t["lengths"][b])
        valid = min(n, slots)
        tokens = [("cache_", slots - valid + s) for s in range(valid)] + [("", i) for i in range(count)]
        row = Segment(t, attrs, tokens, valid, b, n - valid)
        row.forward(t["cache_state"][b], out)
        new["cache_state"][b] = row.final_state(t["cache_state"][b])
        kept = range(len(tokens))[-keep:] if keep else range(0)
        for name in ("k", "v"):
            for slot, r in zip(range(keep - len(kept), keep), kept, strict=True):
                tensor, place = row.source(name, r)
                new[f"cache_{name}"][b, slot] = t[tensor][place]
                if "d_out" in t:
                    d[f"d_{tensor}"][place] += t[f"d_cache_{name}"][b, slot]
        if "d_out" in t:
            back = row.backward(t["cache_state"][b], t["d_cache_state"][b], d, True)
            d["d_cache_state"][b] = t["d_cache_state"][b] + back
    return {"out": out, **new}, d


# ------------------------------------------------------------------------------------------------ the comparison


def draw(rng: np.random.Generator, window: int | None, kind: str, extend: bool) -> tuple[Arrays, Arrays]:
    B, T, Hkv, G, D, dv = 2, int(rng.integers(1, 9)), int(rng.integers(1, 3)), int(rng.integers(1, 4)), 4, 3
    Hq, F = Hkv * G, D if kind == "identity" else 2 * D
    shapes = {"q": (B, T, Hq, D), "k": (B, T, Hkv, D), "v": (B, T, Hkv, dv), "swa_weight": (Hq, dv)}
    shapes |= {"rla_weight": (Hq, dv), "q_scale": (D,), "k_scale": (D,), "memory": (Hq, F, dv), "d_out": (B, T, Hq, dv)}
    shapes |= {"rope_cos": (24, D // 2), "rope_sin": (24, D // 2)}
    t: Arrays = {}
    if extend:
        slots = int(rng.integers(0, 6)) if window is None else max(window, 0)
        keep = slots + T if window is None else slots
        shapes |= {"cache_k": (B, slots, Hkv, D), "cache_v": (B, slots, Hkv, dv), "cache_state": (B, Hkv, F, dv)}
        shapes |= {"d_cache_k": (B, keep, Hkv, D), "d_cache_v": (B, keep, Hkv, dv), "d_cache_state": (B, Hkv, F, dv)}
        t["cache_length"] = rng.integers(0, slots + 1 if window is None else 12, B).astype(np.int32)
        t["lengths"] = rng.integers(0, T + 1, B).astype(np.int32)
    else:
        shapes |= {"initial_state": (B, Hkv, F, dv), "d_final_state": (B, Hkv, F, dv)}
        t["segment_ids"] = np.sort(rng.integers(0, 3, (B, T)), axis=1).astype(np.int32)[:, :: rng.choice([1, -1])]
        if rng.random() < 0.5:
            t["positions"] = rng.integers(0, 24, (B, T)).astype(np.int32)
    t |= {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return t, {"window": window, "feature_map": kind, "scale": float(rng.normal()), "eps": 1e-3}


@pytest.mark.parametrize("extend", [False, True], ids=["rattention", "rattention_extend"])
@pytest.mark.parametrize("kind", ["softmax", "relu", "identity"])
@pytest.mark.parametrize("window", [-1, 0, 1, 3, 7, 20, None])
def test_formulas_are_those_of_the_reference(window: int | None, kind: str, extend: bool):
    rng = np.random.default_rng(sum(map(ord, f"{window} {kind} {extend}")))
    op = "rattention_extend" if extend else "rattention"
    formula = extend_by_formula if extend else rattention_by_formula
    for _ in range(3):
        t, attrs = draw(rng, window, kind, extend)
        outputs, gradients = formula(t, attrs)
        given = {n: x for n, x in t.items() if n[:2] != "d_"}
        for name, expected in quadratic.run(op, given, attrs).items():
            np.testing.assert_allclose(outputs[name], expected, rtol=1e-10, atol=1e-11, err_msg=name)
        for name, expected in quadratic.run(f"{op}.vjp", t, attrs).items():
            np.testing.assert_allclose(gradients[name], expected, rtol=1e-9, atol=1e-10, err_msg=name)
