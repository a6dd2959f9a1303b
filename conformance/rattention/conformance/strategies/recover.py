"""From a case back to a recipe: what a diagnosis asks about a case that was read from a file."""

from __future__ import annotations

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.strategies.build import CACHE, OPTIONS, TOKENS, inert_tokens, unused_slots
from rattention.conformance.strategies.recipe import Recipe
from rattention.spec import load


def recipe_of(case: Case) -> Recipe:
    """A recipe with the sizes, attributes and options of a case. It does not give the same tensors: seed and family of
    the values are not in a file."""
    op = load().operations[case.op]
    sizes = {s: n for t in op.tensors if t.name in case.tensors
             for s, n in zip(t.shape, case.tensors[t.name].shape, strict=False)}  # fmt: skip
    heads = sizes.get("Hkv", sizes.get("Hq", sizes.get("H", 1)))
    storage = [str(case.tensors[t.name].dtype) for t in op.tensors if t.dtype == "storage" and t.name in case.tensors]
    weights = {str(case.tensors[t.name].dtype) for t in op.tensors if t.dtype == "weight" and t.name in case.tensors}
    options = dict.fromkeys(OPTIONS.get(t.name, t.name) for t in op.tensors if t.optional and t.name in case.tensors)
    recipe = Recipe(
        case.op,
        storage[0] if storage else "float32",
        B=sizes.get("B", 1),
        T=sizes.get("T", 1),
        Hkv=heads,
        G=max(sizes.get("Hq", heads) // max(heads, 1), 1),
        D=sizes.get("D", 1),
        Dv=sizes.get("Dv", 1),
        options=tuple(options) + (("poison",) if _poisoned(case) else ()),
        slots=sizes.get("W", 0),
        weights="storage" if weights and weights != {"float32"} else "float32",
        seed=case.seed or 0,
    )
    known = {n: case.attrs.get(n, a.default) for n, a in op.attribute.items()}
    return recipe.with_(**{n: v for n, v in known.items() if n in ("window", "feature_map", "scale", "eps")})


def _poisoned(case: Case) -> bool:
    """Whether an inert element is not finite."""
    for names, where in ((TOKENS, inert_tokens(case.tensors)), (CACHE, unused_slots(case.tensors))):
        for name in names:
            x = case.tensors.get(name)
            if where is None or x is None or where.shape != x.shape[: where.ndim]:
                continue
            if not np.isfinite(x[where].astype(np.float64)).all():
                return True
    return False
