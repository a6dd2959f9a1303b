"""The call of a case in one line: sizes, attributes and optional tensors that the call has, and nothing else."""

from __future__ import annotations

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.strategies.recipe import Recipe
from rattention.spec import Tensor, load

SIZES = ("B", "T", "Hq", "Hkv", "H", "D", "Dv", "W", "M")
"""The free dimensions of operations.toml; the others follow from them."""
SHORT = 60
"""Characters of an attribute that is shown; only bad input has longer ones."""


def call_line(case: Case, recipe: Recipe | None = None) -> str:
    """For reports, as in `feature_map bfloat16 B=1 T=2 H=1 D=4 feature_map=relu`.

    recipe: what the case was made from; it adds how the values were drawn.
    """
    op = load().operations.get(case.op)
    if op is None or (not case.tensors and not case.attrs):
        return case.note or case.op
    attrs = [(name, case.attrs[name]) for name in op.attribute if name in case.attrs]
    whole = len(attrs) == len(case.attrs)
    given = [t for t in op.tensors if t.name in case.tensors]
    sizes: dict[str, int] = {}
    whole &= set(case.tensors) == {t.name for t in given}
    for t in given:
        shape = case.tensors[t.name].shape
        whole &= len(shape) == len(t.shape)
        for symbol, size in zip(t.shape, shape, strict=False):
            whole &= sizes.setdefault(symbol, size) == size
    storage = {str(case.tensors[t.name].dtype) for t in given if t.dtype == "storage"}
    if not whole or len(storage) > 1:
        return _spelled(case)
    words = [case.op, *storage]
    words += [
        f"{s}={sizes[s]}" for s in SIZES if s in sizes and not (s == "W" and case.attrs.get("window") is not None)
    ]
    words += [f"{name}={_short(value)}" for name, value in attrs]
    words += [f"weights={dtype}" for dtype in _weights(case, given, storage)]
    options = [t.name for t in given if t.optional]
    words += [f"[{' '.join(options)}]"] if options else []
    return " ".join([*words, *_drawn(case, recipe)])


def _weights(case: Case, given: list[Tensor], storage: set[str]) -> list[str]:
    """Dtypes of the tensors that may be float32 or of the storage dtype, where they tell anything."""
    found = {str(case.tensors[t.name].dtype) for t in given if t.dtype == "weight"}
    return ["+".join(sorted(found))] if found and storage and storage != {"float32"} else []


def _drawn(case: Case, recipe: Recipe | None) -> list[str]:
    if recipe is None:
        return []
    numbers = any(x.dtype.kind != "i" for x in case.tensors.values())
    facts = [f"values={recipe.family}"] if recipe.family != "normal" and numbers else []
    facts += [f"segments={recipe.layout}"] if "segment_ids" in case.tensors else []
    facts += [f"cache={recipe.fill}"] if "cache_length" in case.tensors else []
    inert = {"segment_ids", "lengths", "cache_length"} & case.tensors.keys()
    return facts + (["NaN and inf in what is inert"] if recipe.has("poison") and inert else [])


def _spelled(case: Case) -> str:
    """A call that is wrong on purpose has no sizes: every tensor by itself."""
    tensors = [f"{name}={x.dtype}{list(x.shape)}" for name, x in case.tensors.items()]
    return " ".join([case.op, *tensors, *(f"{name}={_short(value)}" for name, value in case.attrs.items())])


def _short(value: object) -> str:
    if isinstance(value, str):
        text = value
    elif isinstance(value, np.generic):
        text = repr(value.item())
    else:
        text = repr(value)
    return text if len(text) <= SHORT else f"{text[:SHORT]}..."
