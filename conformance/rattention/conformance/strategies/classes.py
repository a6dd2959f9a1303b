"""The classes of a recipe: of what kind its sizes, attributes, options and values are, among the kinds that matter.

A run is judged by the pairs of classes that its recipes hold (`coverage`), and recipes are made for those that chance
left out (`pairs`). For each factor of an operation this table says which classes there are, which of them a recipe has,
and how a recipe of a class is drawn. The order is that of drawing: what a later factor depends on comes first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from rattention.conformance.strategies.layouts import LAYOUTS
from rattention.conformance.strategies.plan import Plan, inside
from rattention.conformance.strategies.recipe import Recipe
from rattention.conformance.strategies.values import FAMILIES
from rattention.spec import load
from rattention.spec.operations import REQUIRED


class Chance(Protocol):
    """What draws from levels: a generator of random numbers, or `CHEAPEST`."""

    def choice(self, levels: Sequence[Any], /) -> Any: ...

    def integers(self, low: int, high: int, /) -> Any: ...


class _Cheapest:
    """Takes the first of every list of levels; they begin with what costs least."""

    def choice(self, levels: Sequence[Any], /) -> Any:
        return levels[0]

    def integers(self, low: int, high: int, /) -> int:
        return low


CHEAPEST = _Cheapest()
Draw = Callable[[Recipe, str, Chance], Recipe]


@dataclass(frozen=True)
class Factor:
    """One thing that varies: its classes, the one that a recipe has, and a recipe changed to be of another."""

    name: str
    classes: tuple[str, ...]
    of: Callable[[Recipe], str]
    draw: Draw


# ---------------------------------------------------------------------------------------------- sizes

SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "B": {"0": (0,), "1": (1,), "2 to 16": (2, 2, 3, 5, 16), "over 16": (17, 18, 33)},
    "T": {
        "0": (0,),
        "1": (1,),
        "2 to 16": (5, 2, 3, 4, 6, 7, 8, 9, 11, 15, 16),
        "17 to 256": (17, 23, 31, 32, 33, 40, 63, 64, 65, 100, 127, 129),
        "over 256": (257, 261, 300),
    },
    "Hkv": {"1": (1,), "2 to 8": (2, 2, 3, 4, 5, 8), "over 8": (9, 10, 17)},
    "G": {"1": (1,), "2 to 4": (2, 3, 4), "over 4": (5, 6, 8)},
    "D": {
        "1": (1,),
        "2 to 16": (4, 2, 3, 5, 6, 7, 8, 12, 16),
        "17 to 128": (18, 24, 33, 40, 64, 80, 96, 128),
        "over 128": (130, 129, 160, 192, 256),
    },
    "Dv": {
        "1": (1,),
        "2 to 16": (4, 2, 3, 5, 8, 16),
        "17 to 128": (18, 33, 40, 64, 96, 128),
        "over 128": (130, 129, 160, 200, 256),
    },
}
"""Classes of each size and what is drawn from them, the cheapest first; whatever lies between belongs to its class."""

OVER = 100_000
"""What a recipe may cost (`cost`), unless the classes that it is for cost more; past it, the cheapest of each."""


def cost(r: Recipe) -> float:
    """What a case costs the reference, in pairs of a query and a key of few channels: tenths of a microsecond each.

    Pairs count with their channels, states and rotary tables with their elements.
    """
    cached = max(r.window, 0) if r.window is not None else r.slots
    slots = cached if r.base_op == "rattention_extend" else 0
    heads, channels = r.B * r.Hkv * r.G, r.D + r.Dv
    pairs = heads * r.T * (r.T + slots) * (1 + channels / 64) + heads * (r.T + slots) * channels / 8
    states = 2 * r.D * r.Dv * (r.B * r.Hkv + r.Hkv * r.G * r.has("memory")) if r.base_op not in NO_STATE else 0
    rows = next((2**n for name, n in (("farther", 15), ("far", 12)) if r.has(name)), 0) if r.has("rope") else 0
    return (pairs + states) * (3 if r.is_vjp else 1) + rows * r.D / 8


NO_STATE = ("feature_map", "rope_table", "rms_mix", "sliding_window_attention")


def _size_class(name: str, value: int) -> str:
    return next((c for c, sizes in reversed(SIZES[name].items()) if value >= min(sizes)), next(iter(SIZES[name])))


def _size(name: str, *, but: str = "") -> Factor:
    def draw(r: Recipe, wanted: str, rng: Chance) -> Recipe:
        sizes = SIZES[name][wanted]
        if name == "D" and (r.has("rope") or r.base_op == "rope_table"):
            sizes = tuple(d for d in sizes if d % 2 == 0)
        return r.with_(**{name: int(rng.choice(sizes))})

    return Factor(name, tuple(c for c in SIZES[name] if c != but), lambda r: _size_class(name, getattr(r, name)), draw)


def _draw_heads(r: Recipe, wanted: str, rng: Chance) -> Recipe:
    return r.with_(Hkv=int(rng.choice(SIZES["Hkv"][wanted])), G=1)


HEADS = Factor("H", tuple(SIZES["Hkv"]), lambda r: _size_class("Hkv", r.Hkv * r.G), _draw_heads)
"""Heads of an operation that does not tell query heads from key/value heads."""


# ---------------------------------------------------------------------------------------------- windows

WIDTHS = ("-1", "0", "1 to T-2", "T-1", "T or more", "2^15 or more", "2^31 or more", "none")
CACHED_WIDTHS = ("-1", "0", "1 to 16", "17 to 128", "over 128", "none, no slots", "none, slots", "none, over 128 slots")
_WINDOW = load().operations["rattention"].attribute["window"]
assert _WINDOW.maximum is not None
LARGEST = int(_WINDOW.maximum)


def _width(r: Recipe) -> str:
    w, T = r.window, r.T
    if w is None or w < 1:
        return "none" if w is None else str(w)
    if w >= 2**15:
        return "2^31 or more" if w >= 2**31 else "2^15 or more"
    return "T or more" if w >= T else "T-1" if w == T - 1 else "1 to T-2"


def _draw_width(r: Recipe, wanted: str, rng: Chance) -> Recipe:
    if (wanted == "1 to T-2" and r.T < 3) or (wanted == "T-1" and r.T < 2):
        r = r.with_(T=3)
    inner = max(r.T - 2, 1)
    levels: dict[str, Sequence[int | None]] = {
        "-1": (-1,),
        "0": (0,),
        "1 to T-2": (1, inner, max(r.T // 3, 1), int(rng.integers(1, inner + 1))),
        "T-1": (r.T - 1,),
        "T or more": (max(r.T, 1), r.T + 1, r.T + 3, r.T + 40),
        "2^15 or more": (2**15, 2**15 + 3, 2**16 + 2),
        "2^31 or more": (2**31, 2**31 + 1, 2**32 + 2, LARGEST),
        "none": (None,),
    }
    return r.with_(window=levels[wanted][int(rng.integers(0, len(levels[wanted])))])


def _cached_width(r: Recipe) -> str:
    if r.window is None:
        return "none, over 128 slots" if r.slots > 128 else "none, slots" if r.slots else "none, no slots"
    if r.window < 1:
        return str(r.window)
    return "over 128" if r.window > 128 else "17 to 128" if r.window > 16 else "1 to 16"


def _draw_cached_width(r: Recipe, wanted: str, rng: Chance) -> Recipe:
    slots = {"none, no slots": (0,), "none, slots": (4, 1, 7, 40), "none, over 128 slots": (130, 300, 600)}
    if wanted in slots:
        levels = [n for n in slots[wanted] if n > 1 or r.fill not in ("partial", "mixed")] or [0]
        return r.with_(window=None, slots=int(rng.choice(levels)))
    widths = {
        "-1": (-1,),
        "0": (0,),
        "1 to 16": (2, 3, 5, 9, 16, *((1,) if r.fill not in ("partial", "mixed") else ())),
        "17 to 128": (17, 31, 33, 64, 100, 127, 128),
        "over 128": (129, 255, 256, 511, 512, 1024, 2**15 + 2),
    }[wanted]
    return r.with_(window=int(rng.choice(widths)), slots=0)


# -------------------------------------------------------------------------------------------- documents, caches, tables

SEGMENTS = ("none", *LAYOUTS)
DOCUMENTS = ("one", "empty")
"""Layouts that a row of one token has."""


def _draw_segments(r: Recipe, wanted: str, rng: Chance) -> Recipe:
    if wanted == "none":
        return r.without("segments")
    if wanted not in DOCUMENTS and r.T < 5:
        r = r.with_(T=5)  # room for what the layout is named after
    return r.without("segments").with_(options=(*r.without("segments").options, "segments"), layout=wanted)


FAR = {"far": "past 2^12", "farther": "past 2^15", "farthest": "past 2^24"}
"""Options of a recipe, and what they say of caches and positions."""


def _far(r: Recipe) -> str:
    return next((FAR[o] for o in ("farthest", "farther", "far") if r.has(o)), "")


def _set_far(r: Recipe, wanted: str) -> Recipe:
    return r.without(*FAR).with_(options=(*r.without(*FAR).options, *(o for o, c in FAR.items() if c == wanted)))


FILLS = ("empty", "partial", "full", "beyond", "mixed", *FAR.values())


def _fill(r: Recipe) -> str:
    far = _far(r)
    return far if r.fill == "beyond" and far and r.window is not None else r.fill


def _draw_fill(r: Recipe, wanted: str, rng: Chance) -> Recipe:
    return _set_far(r, wanted).with_(fill="beyond" if wanted in FAR.values() else wanted)


TABLES = ("none", "table", "no row spared")
POSITIONS = ("positions", "positions past 2^12", "positions past 2^15")


def _table(r: Recipe) -> str:
    if not r.has("rope"):
        return "none"
    if r.has("positions"):
        far = _far(r)
        return f"positions {far}" if far else "positions"
    return "no row spared" if r.has("rows") else "table"


def _draw_table(r: Recipe, wanted: str, rng: Chance) -> Recipe:
    r = r.without("rope", "positions", "rows")
    wide = {"none": (), "table": ("rope",), "no row spared": ("rope", "rows")}.get(wanted, ("rope", "positions"))
    r = r.with_(options=(*r.options, *wide))
    return _set_far(r, wanted.removeprefix("positions ")) if "positions" in wide else r


# ------------------------------------------------------------------------------------------ attributes, options, values

SCALES = {"0": (0.0,), "negative": (-0.7, -1.5), "positive": (0.3, 1.0, 2.0, 0.11)}
EPS = {"1e-6": (1e-6,), "smaller": (1e-12, 1e-8), "larger": (1e-5, 1e-2, 1.0)}


def _scale(r: Recipe) -> str:
    return "default" if r.scale is None else "0" if r.scale == 0 else "negative" if r.scale < 0 else "positive"


def _draw_scale(r: Recipe, wanted: str, rng: Chance) -> Recipe:
    return r.with_(scale=None if wanted == "default" else float(rng.choice(SCALES[wanted])))


def _eps(r: Recipe) -> str:
    return "1e-6" if r.eps == 1e-6 else "smaller" if r.eps < 1e-6 else "larger"


def _draw_eps(r: Recipe, wanted: str, rng: Chance) -> Recipe:
    return r.with_(eps=float(rng.choice(EPS[wanted])))


def _field(name: str, field: str, classes: Sequence[str]) -> Factor:
    """A field of the recipe whose values are the classes."""
    return Factor(name, tuple(classes), lambda r: str(getattr(r, field)), lambda r, c, rng: r.with_(**{field: c}))


GIVEN = ("absent", "given")
"""Classes of an optional tensor."""


def _flag(name: str, words: tuple[str, str] = GIVEN) -> Factor:
    """An option of the recipe."""

    def draw(r: Recipe, wanted: str, rng: Chance) -> Recipe:
        return r.without(name).with_(
            options=(*r.without(name).options, name) if wanted == words[1] else r.without(name).options
        )

    return Factor(name, words, lambda r: words[r.has(name)], draw)


# ---------------------------------------------------------------------------------------------- the table


@functools.cache
def factors(op: str) -> tuple[Factor, ...]:
    """Every factor of an operation, from its tensors and attributes."""
    spec = load().operations[op]
    base = op.removesuffix(".vjp")
    given = set(spec.tensor)
    symbols = {s for t in spec.tensors for s in t.shape}
    if base == "rope_table":
        return (_size("T"), _size("D", but="1"), _field("values", "family", list(FAMILIES)))
    extend = base == "rattention_extend"
    found = [_field("dtype", "dtype", load().storage_dtypes), _size("T")]
    if "segment_ids" in given:
        found.append(Factor("segments", SEGMENTS, lambda r: r.layout if r.has("segments") else "none", _draw_segments))
    if "rope_cos" in given:
        found.append(Factor("tables", TABLES + (() if extend else POSITIONS), _table, _draw_table))
    if extend:
        found.append(Factor("cache", FILLS, _fill, _draw_fill))
    found += [_size("B"), *((_size("Hkv"), _size("G")) if "Hkv" in symbols else (HEADS,))]
    found += [_size("D")] if "D" in symbols else []
    found += [_size("Dv")] if "Dv" in symbols else []
    if "window" in spec.attribute:
        found.append(
            Factor("window", CACHED_WIDTHS, _cached_width, _draw_cached_width)
            if extend
            else Factor("window", WIDTHS, _width, _draw_width)
        )
    if "feature_map" in spec.attribute:
        found.append(_field("feature_map", "feature_map", ("softmax", "relu", "identity")))
    if "scale" in spec.attribute:
        found.append(Factor("scale", ("default", *SCALES), _scale, _draw_scale))
    if "eps" in spec.attribute:
        found.append(Factor("eps", tuple(EPS), _eps, _draw_eps))
    tables = ("rope_cos", "rope_sin", "positions", "segment_ids")
    found += [_flag(t.name) for t in spec.tensors if t.optional and t.name not in tables]
    if any(t.dtype == "weight" for t in spec.tensors):
        found.append(_field("weights", "weights", ("float32", "storage", "mixed")))
    found += [_field("values", "family", list(FAMILIES)), _flag("poison", ("zeros", "poison"))]
    if any(a.default is not REQUIRED for a in spec.attribute.values()):
        found.append(_flag("defaults", ("written", "left out")))
    return tuple(found)


def classes(recipe: Recipe) -> dict[str, str]:
    """Factor to class, for every factor of the recipe's operation."""
    return {f.name: f.of(recipe) for f in factors(recipe.op)}


EMPTY = {
    "segments": ("none", "one"),
    "tables": ("none", "table"),
    "cache": ("empty",),
    "values": ("normal",),
    "poison": ("zeros",),
}
"""What no rows and no tokens can be told apart in."""
NO_SLOTS = ("-1", "0", "none, no slots")


def apart(a: str, x: str, b: str, y: str) -> str:
    """Why class x of factor a and class y of factor b cannot meet in one call; "" where they can."""
    return _apart(a, x, b, y) or _apart(b, y, a, x)


def _apart(a: str, x: str, b: str, y: str) -> str:
    if a in ("B", "T") and x == "0" and b in EMPTY and y not in EMPTY[b]:
        return "" if (a, b) == ("T", "cache") else "nothing to see without tokens"
    if a == "T" and x == "1" and b == "segments" and y not in ("none", *DOCUMENTS):
        return "one token is one document"
    if a == "T" and x in ("0", "1") and b == "window" and y in ("1 to T-2", "T-1"):
        return "there is no such window"
    if a == "D" and x == "1" and b == "tables" and y != "none":
        return "a rotary table needs an even D (ERR-7)"
    if a == "cache" and b == "window" and x in ("beyond", *FAR.values()) and y.startswith("none"):
        return "without a window the cache holds every token (ERR-11)"
    if a == "cache" and b == "window" and x in ("partial", "full") and y in NO_SLOTS:
        return "a cache without slots is empty"
    if a == "cache" and b == "window" and x == "mixed" and y == "none, no slots":
        return "a cache without slots is empty"
    if a == "cache" and b == "B" and x == "mixed" and y == "1":
        return "one row is no mixture"
    if a == "cache" and b == "tables" and x == "past 2^24" and y != "none":
        return "a table of so many rows is too large"
    if a == "weights" and b == "dtype" and x != "float32" and y == "float32":
        return "the weight's dtype is the storage dtype"
    return ""


OPTION_OF = {"tables": "rope", "segments": "segments"}


def declared(plan: Plan, factor: Factor, wanted: str) -> bool:
    """Whether the backend takes calls of this class at all, by its capabilities, dtypes and limits."""
    name = factor.name
    if name == "dtype":
        return wanted in plan.dtypes
    optional = name in OPTION_OF or factor.classes == GIVEN
    if optional and wanted in ("none", "absent"):
        return True
    if name == "tables" and wanted.startswith("positions") and not plan.allows("positions"):
        return False
    if optional and not plan.allows(OPTION_OF.get(name, name)):
        return False
    rng = np.random.default_rng(0)
    draws = (factor.draw(Recipe("rattention"), wanted, rng) for _ in range(8))
    return not plan.limits or any(inside(recipe, plan.limits) for recipe in draws)
