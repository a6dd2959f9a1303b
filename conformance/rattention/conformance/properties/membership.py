"""One-hot probes: which token reached which output, decided exactly at any dtype.

Each marked token owns one channel of v, in which it alone is not zero. An output element is then zero exactly where its
query does not read the marked token: a bfloat16 budget could hide one token among a thousand, a zero hides nothing.
In `rattention` the softmax branch has weight 1 and the linear branch -1, so that the sign says which branch read.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.context import Context
from rattention.conformance.features import among
from rattention.conformance.judge import Violation, heat
from rattention.conformance.masks import Reads, reads
from rattention.conformance.properties.agreement import FILLS
from rattention.conformance.properties.base import register
from rattention.conformance.strategies import Plan, Recipe, build
from rattention.conformance.strategies.pools import recipes

OPS = ("sliding_window_attention", "residual_linear_attention", "rattention", "rattention_extend")
SIZES = {
    "small": (4, 30, 0.14),
    "medium": (1, 12, 0.17),
    "tile": (1, 6, 0.34),
    "span": (0, 5, 0.2),
    "long": (0, 4, 0.5),
    "vast": (0, 2, 1.0),
    "deep": (0, 12, 0.2),
}
"""Cases of smoke and quick by size class, and the share of them that backends with costly programs get."""
NARROW = (0, -1, 3, 1)
"""Windows of every second long probe."""
POWERS = tuple(2**n for n in range(6, 12))
"""Tokens where faults of size begin: their own channels come first."""
CLAUSES = (
    *("SWA-1", "SWA-5", "SWA-6", "RLA-1", "RLA-6", "RLA-7", "RLA-9", "RAT-2", "RAT-4"),
    *("SEG-1", "SEG-2", "SEG-4", "SEG-7", "EXT-4", "EXT-5", "EXT-6", "EXT-7", "EXT-9", "EXT-10"),
)

FORWARD: dict[str | None, tuple[str, ...]] = {
    "softmax": ("SWA-1", "SWA-5", "SWA-6", "SEG-1"),
    "linear": ("RLA-1", "RLA-9", "SEG-2"),
}
"""Clauses of each branch that a gradient shows as well."""


def _draw(plan: Plan) -> Iterator[Recipe]:
    yield from _probes(plan, OPS)


def _draw_vjp(plan: Plan) -> Iterator[Recipe]:
    yield from _probes(plan, tuple(f"{op}.vjp" for op in OPS))


def _probes(plan: Plan, ops: tuple[str, ...]) -> Iterator[Recipe]:
    for op in ops:
        if not plan.has(op):
            continue
        extend = op.startswith("rattention_extend")
        for size, (smoke, quick, share) in SIZES.items():
            if (size == "deep") != extend and size in ("deep", "vast"):
                continue  # what a long sequence is to the others, a deep cache is to an extension
            if plan.cost == "interpreted" and size == "vast":
                continue
            number = plan.count(smoke, quick, compiled=share) if smoke or plan.profile != "smoke" else 0
            if number:
                for i, recipe in enumerate(recipes(plan, op, size, number, "membership", lambda r: True, Dv=16)):
                    if size in ("long", "vast") and plan.cost == "direct" and not extend:
                        recipe = _far(recipe, size, i)
                    yield recipe.with_(fill=FILLS[i % 4]) if size == "deep" else recipe


def _far(recipe: Recipe, size: str, i: int) -> Recipe:
    """The long probes in turn: a narrow window, since a wide one leaves few queries to read what lies far behind it;
    and a full window over one document, since packed ones are short."""
    if size == "long" and i % 2 == 0:
        return recipe.with_(window=NARROW[i // 2 % len(NARROW)])
    return recipe.without("segments").with_(window=None, slots=0) if i % 4 == 1 else recipe


def marked(recipe: Recipe, total: int, borders: tuple[int, ...]) -> np.ndarray:
    """Tokens that own a channel: both ends, the surroundings of borders, the rest at random; all where they fit."""
    if total <= recipe.Dv:
        return np.arange(total)
    rng = recipe.rng("marks")
    near = [b + d for b in borders for d in (-2, -1, 0, 1, 2) if 0 <= b + d < total]
    powers = [p for p in POWERS if p < total]
    free = max(recipe.Dv - len(powers), 0) // 2
    first = [0, total - 1, *powers, *(rng.permutation(near)[:free].tolist() if near else [])]
    rest = [int(x) for x in rng.permutation(total) if x not in set(first)]
    return np.array(list(dict.fromkeys([*first, *rest]))[: recipe.Dv])


def _positive(case: Case, recipe: Recipe) -> None:
    """q, k and the scales positive, so that every feature and every weight is: no product cancels.

    States that every query reads, and cotangents of states, are zero: what is seen comes through the sets alone.
    """
    t = case.tensors
    for name in ("initial_state", "memory", "cache_state", "d_final_state", "d_cache_state", "d_cache_k", "d_cache_v"):
        if name in t:
            t[name] = np.zeros_like(t[name])
    for name in ("q_scale", "k_scale"):
        if name in t:
            t[name] = np.ones_like(t[name])
    if case.attrs.get("scale") is not None:
        case.attrs["scale"] = min(max(case.attrs["scale"], 0.0), 1.0)
    for name in ("q", "k", "cache_k"):
        if name in case.tensors:
            x = case.tensors[name]
            rng = recipe.rng(f"positive {name}")
            case.tensors[name] = rng.uniform(0.3, 0.6, x.shape).astype(x.dtype)


def _borders(recipe: Recipe, plan: Plan, total: int) -> tuple[int, ...]:
    tiles = plan.token_tiles() or (16, 64)
    found = [c for t in tiles for c in range(t, total, t)][:16]
    if recipe.window is not None and recipe.window > 0:
        found += [total - recipe.window, recipe.window, total - 1 - recipe.window]
    return tuple(b for b in found if 0 <= b < total)


def _make(plan: Plan, recipe: Recipe) -> Case | None:
    if recipe.Dv < 1 or recipe.T < 1:
        return None
    case = build(recipe, plan.token_tiles())
    _positive(case, recipe)
    t = case.tensors
    W = t["cache_v"].shape[1] if "cache_v" in t else 0
    marks = marked(recipe, W + recipe.T, _borders(recipe, plan, W + recipe.T))
    channel = (np.arange(W + recipe.T)[:, None] == marks[None, :]).astype(float)
    channel = np.pad(channel, ((0, 0), (0, recipe.Dv - len(marks))))[None, :, None, :]
    t["v"] = np.broadcast_to(channel[:, W:], t["v"].shape).astype(t["v"].dtype)
    if "cache_v" in t:
        t["cache_v"] = np.broadcast_to(channel[:, :W], t["cache_v"].shape).astype(t["cache_v"].dtype)
    if "swa_weight" in t:
        t["swa_weight"] = np.ones_like(t["swa_weight"])
        t["rla_weight"] = -np.ones_like(t["rla_weight"])
    case.params = {"marks": marks.tolist()}
    case.clauses = _clauses(case)
    return case if case.clauses else None


def _clauses(case: Case) -> tuple[str, ...]:
    """Clauses whose breach the zeros show: of one branch alone where the case looks at one."""
    branch, labels = case.params.get("branch"), CLAUSES
    if case.is_vjp:
        labels = ("GRAD-2", "GRAD-5", *FORWARD["softmax"], *FORWARD["linear"])
    hidden = {"softmax": "linear", "linear": "softmax"}.get(str(branch))
    return among(case.op, case.tensors, case.attrs, tuple(x for x in labels if x not in FORWARD.get(hidden, ())))


@register("membership", "one-hot probes show which token reached which output", CLAUSES, _draw, _make)
def check(ctx: Context, case: Case) -> list[Violation]:
    """Sign and zero of every output element against the sets of the specification."""
    got = ctx.run(case.op, case.tensors, case.attrs)
    who = reads(case.tensors, case.attrs["window"])
    marks = np.array(case.params["marks"], int)
    found = [_out(case, got["out"].astype(np.float64), who, marks)]
    state = got.get("final_state", got.get("cache_state"))
    if state is not None:
        found.append(_state(case, state.astype(np.float64), who, marks))
    if "cache_v" in got:
        found += _cache(case, got)
    return [v for v in found if v]


def _out(case: Case, out: np.ndarray, who: Reads, marks: np.ndarray) -> Violation | None:
    softmax, linear = who.softmax[:, :, None, marks], who.linear[:, :, None, marks]
    width = len(marks)
    base = case.base_op
    sign = {"sliding_window_attention": softmax * 1, "residual_linear_attention": linear * 1}.get(
        base, softmax * 1 - linear * 1
    )
    expected = np.zeros(out.shape)
    expected[..., :width] = np.broadcast_to(sign, (*out.shape[:3], width))
    with np.errstate(invalid="ignore"):
        wrong = ~(np.sign(out) == expected)
    if not wrong.any():
        return None
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    b, t, _, c = at
    token = int(marks[c]) if c < width else -1
    W = case.tensors["cache_v"].shape[1] if "cache_v" in case.tensors else 0
    got_sign, want = np.sign(out[at]), expected[at]
    words = {1.0: "the softmax branch", -1.0: "the linear branch", 0.0: "no branch"}
    if base == "residual_linear_attention":
        words = {1.0: "the linear branch", 0.0: "no branch", -1.0: "a branch with the wrong sign"}
    clauses = _blame(case, b, t, token, float(got_sign), float(want), W)
    name = f"token {token - W}" if token >= W else f"cache slot {token}"
    message = (
        f"out: query {t} of row {b} read {name} in {words.get(float(got_sign), 'NaN')}, "
        f"the specification says {words.get(float(want), 'nothing')}; window {case.attrs['window']}; "
        f"{int(wrong.sum())} of {wrong.size} elements wrong"
    )
    guess = "window border" if not clauses[0].startswith(("SEG", "EXT")) else "segments or cache"
    if np.isnan(got_sign):
        guess = "NaN leak"
    return Violation(
        clauses,
        message,
        "membership",
        "out",
        at,
        float(out[at]),
        float(want),
        0.0,
        float("inf"),
        float(wrong.mean()),
        heat(wrong * 2.0),
        guess,
    )


def _blame(case: Case, b: int, t: int, token: int, got: float, want: float, W: int) -> tuple[str, ...]:
    """Which clause a wrong read breaks: first what the pair of tokens says, then the branch."""
    base, window, labels = case.base_op, case.attrs["window"], []
    ids = case.tensors.get("segment_ids")
    if ids is not None and token >= 0:
        if ids[b, t] == 0:
            labels.append("SEG-4")
        elif ids[b, token] == 0:
            labels.append("SEG-5")
        elif ids[b, t] != ids[b, token]:
            linear = base == "residual_linear_attention" or (base == "rattention" and got < 0)
            labels += ["SEG-2", "RLA-1"] if linear else ["SEG-1", "SWA-1"]
    if "cache_length" in case.tensors:
        lengths = case.tensors.get("lengths")
        if lengths is not None and t >= lengths[b]:
            labels.append("EXT-7")
        elif 0 <= token < W:
            labels += ["EXT-9"] if token < W - int(case.tensors["cache_length"][b]) else ["EXT-5"]
    softmax = ("SWA-5",) if window == -1 else ("SWA-6",) if window is None else ("SWA-1",)
    linear = ("RLA-9",) if window is None else ("RLA-1",)
    both = base.startswith("rattention")
    if base == "sliding_window_attention" or (both and (got > 0 or want > 0)):
        labels += softmax
    if base == "residual_linear_attention" or (both and (got < 0 or want < 0)):
        labels += linear
    return tuple(dict.fromkeys([*labels, *(["RAT-2"] if both else [])])) or ("NUM-1",)


def _state(case: Case, state: np.ndarray, who: Reads, marks: np.ndarray) -> Violation | None:
    """A column of the state is zero exactly where the marked token is not folded into it."""
    some = (np.abs(state) > 0).any(2) | np.isnan(state).any(2)
    expected = np.zeros(some.shape, bool)
    expected[..., : len(marks)] = who.folded[:, None, marks]
    wrong = some != expected
    if not wrong.any():
        return None
    b, h, c = (int(i) for i in np.argwhere(wrong)[0])
    extend = case.base_op == "rattention_extend"
    labels = ["EXT-5"] if extend else ["RLA-6"]
    labels += ["RAT-4"] if case.base_op == "rattention" else []
    if case.attrs["window"] is None:
        labels.insert(0, "EXT-10" if extend else "RLA-9")
    if "segment_ids" in case.tensors:
        labels = ["SEG-7", "SEG-2", *labels]
    if "lengths" in case.tensors:
        labels.append("EXT-7")
    what = "lacks" if expected[b, h, c] else "holds"
    token = int(marks[c]) if c < len(marks) else -1
    name = "cache_state" if extend else "final_state"
    message = f"{name}: the state of row {b} {what} token {token}; window {case.attrs['window']}"
    return Violation(tuple(labels), message, "membership", name, (b, h, 0, c), guess="state")


def _cache(case: Case, got: dict[str, np.ndarray]) -> list[Violation]:
    """EXT-3, EXT-4 and EXT-6: the cache holds the last tokens, bit for bit, behind zeros."""
    t, window = case.tensors, case.attrs["window"]
    W = t["cache_k"].shape[1]
    T = t["q"].shape[1]
    seen = t["cache_length"].astype(np.int64)
    new = t.get("lengths", np.full(len(seen), T)).astype(np.int64)
    found = []
    length = seen + new
    if not np.array_equal(got["cache_length"], length):
        message = f"cache_length: {got['cache_length'].tolist()}, expected {length.tolist()}"
        found.append(Violation(("EXT-6",), message, "membership", "cache_length"))
    slots = W if window is not None else W + T
    for name, fresh in (("cache_k", t["k"]), ("cache_v", t["v"])):
        want = np.zeros((len(seen), slots, *fresh.shape[2:]), fresh.dtype)
        for b in range(len(seen)):
            held = int(min(seen[b], W))
            row = np.concatenate([t[name][b, W - held :], fresh[b, : new[b]]])
            keep = min(len(row), slots)
            want[b, slots - keep :] = row[len(row) - keep :]
        if got[name].tobytes() != want.tobytes() and not np.array_equal(got[name], want):
            bad = ~(got[name] == want)
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            label = ("EXT-10", "EXT-4") if window is None else ("EXT-4",)
            label = ("EXT-3", *label) if name == "cache_k" and "rope_cos" in t else label
            message = f"{name}: differs from the last tokens in order, first at {list(at)}"
            found.append(Violation(label, message, "membership", name, at))
    return found


# ---------------------------------------------------------------------------------------------- gradients


def _make_vjp(plan: Plan, recipe: Recipe) -> Case | None:
    if recipe.T < 1 or recipe.B < 1:
        return None
    case = build(recipe, plan.token_tiles())
    _positive(case, recipe)
    t = case.tensors
    T = recipe.T
    branch = str(recipe.rng("branch").choice(["softmax", "linear"]))
    d = np.zeros(t["d_out"].shape)
    if "swa_weight" in t:
        # One marked query per row, and one branch: the norms mix channels, the sets of queries must not overlap.
        marks = recipe.rng("marks").integers(0, T, recipe.B)
        rng = recipe.rng("cotangent")
        for b, m in enumerate(marks):
            d[b, m] = rng.uniform(0.5, 2.0, d.shape[2:]) * rng.choice([-1.0, 1.0], d.shape[2:])
        one, zero = np.ones_like(t["swa_weight"]), np.zeros_like(t["swa_weight"])
        t["swa_weight"], t["rla_weight"] = (one, zero) if branch == "softmax" else (zero, one)
        for name in ("v", "cache_v"):
            if name in t:
                t[name] = recipe.rng(name).uniform(0.5, 1.5, t[name].shape).astype(t[name].dtype)
        params = {"marks": marks.tolist(), "branch": branch}
    else:
        marks = marked(recipe, T, _borders(recipe, plan, T))
        d[:, marks, :, np.arange(len(marks))] = 1.0
        params = {"marks": marks.tolist()}
    t["d_out"] = d.astype(t["d_out"].dtype)
    case.params = params
    case.clauses = _clauses(case)
    return case if case.clauses else None


@register(
    "membership of gradients",
    "one-hot cotangents show which token's gradient each query reached",
    ("GRAD-2", "GRAD-5", *CLAUSES),
    _draw_vjp,
    _make_vjp,
)
def check_vjp(ctx: Context, case: Case) -> list[Violation]:
    """d_v is zero exactly where no marked query reads the token."""
    got = ctx.run(case.op, case.tensors, case.attrs)
    who = reads(case.tensors, case.attrs["window"])
    B = case.tensors["q"].shape[0]
    W = case.tensors["cache_k"].shape[1] if "cache_k" in case.tensors else 0
    d_v = got["d_v"].astype(np.float64)
    if W:
        d_v = np.concatenate([got["d_cache_v"].astype(np.float64), d_v], 1)
    if "branch" in case.params:
        if case.params["branch"] not in ("softmax", "linear"):
            raise ValueError(f"branch {case.params['branch']!r}, expected softmax or linear")
        sets = who.softmax if case.params["branch"] == "softmax" else who.linear
        expected = sets[np.arange(B), np.array(case.params["marks"], int)][:, :, None]
        some = (np.abs(d_v) > 0).any(-1) | np.isnan(d_v).any(-1)
        linear = case.params["branch"] == "linear"
    else:
        marks = np.array(case.params["marks"], int)
        linear = case.base_op == "residual_linear_attention"
        sets = who.linear if linear else who.softmax
        expected = np.zeros(d_v.shape, bool)
        expected[..., : len(marks)] = sets[:, marks, :].transpose(0, 2, 1)[:, :, None, :]
        some = (np.abs(d_v) > 0) | np.isnan(d_v)
    wrong = some != np.broadcast_to(expected, some.shape)
    if wrong.any() and "branch" in case.params:
        # The derivative of a norm may vanish (over one channel the norm is a sign but for eps): there, 0 is a rounding.
        bounds = ctx.bounds(case.op, case.tensors, case.attrs)
        names = ("d_cache_v", "d_v") if W else ("d_v",)
        plain = np.concatenate([np.abs(bounds[n][0]) > bounds[n][1] for n in names], 1).any(-1)
        wrong &= some | plain
    if not wrong.any():
        return []
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    b, i = at[0], at[1]
    window = case.attrs["window"]
    label = ("RLA-9" if window is None else "RLA-1") if linear else ("SWA-6" if window is None else "SWA-1")
    labels = ["GRAD-2", label]
    if "segment_ids" in case.tensors:
        ids = case.tensors["segment_ids"]
        labels = (["GRAD-5", "GRAD-2"] if ids[b, i - W] == 0 else ["GRAD-2"]) + ["SEG-2" if linear else "SEG-1", label]
    if W and i < W and i < W - int(case.tensors["cache_length"][b]):
        labels = ["GRAD-5", "EXT-9", *labels]
    what = "misses" if np.broadcast_to(expected, some.shape)[at] else "reaches"
    name = f"token {i - W}" if i >= W else f"cache slot {i}"
    branch = "linear" if linear else "softmax"
    message = (
        f"d_v: the gradient of the {branch} branch {what} {name} of row {b} against the window {window}; "
        f"{int(wrong.sum())} of {wrong.size} elements wrong"
    )
    return [
        Violation(tuple(labels), message, "membership", "d_v", at, wrong=float(wrong.mean()), guess="window border")
    ]
