"""Smaller cases that still fail: fewer options first, then fewer of everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rattention.conformance.strategies import Recipe


def simpler(r: Recipe) -> Iterator[Recipe]:
    """Recipes one step simpler than `r`, the most telling simplifications first."""
    for option in sorted(r.options, key=lambda o: o in ("defaults", "rows", "far", "farther", "farthest")):
        # A table without positions is legal, positions without a table are not.
        yield r.without(option, "positions") if option == "rope" else r.without(option)
    if r.dtype != "float32":
        yield r.with_(dtype="float32")
    if r.family != "normal":
        yield r.with_(family="normal")
    if r.weights != "float32":
        yield r.with_(weights="float32")
    if r.scale is not None:
        yield r.with_(scale=None)
    if r.eps != 1e-6:
        yield r.with_(eps=1e-6)
    for name in ("G", "Hkv", "B"):
        size = getattr(r, name)
        if size > 1:
            yield r.with_(**{name: 1})
            if size > 2:
                yield r.with_(**{name: 2})
    if r.has("segments") and r.layout != "pair":
        yield r.with_(layout="pair")
    if r.fill not in ("mixed", "empty"):
        yield r.with_(fill="empty")
    for smaller in _down(r.T):
        yield r.with_(T=smaller)
    if r.window is not None:
        for smaller in _down(r.window):
            yield r.with_(window=smaller)
    elif r.slots > 1:
        yield r.with_(slots=1)
    if r.feature_map != "identity":
        yield r.with_(feature_map="identity")
    for smaller in (2, 4):
        if smaller < r.D:
            yield r.with_(D=smaller)
    for smaller in (1, 2):
        if smaller < r.Dv:
            yield r.with_(Dv=smaller)


def _down(size: int) -> list[int]:
    """A few smaller sizes: the smallest, then by halves, then one less."""
    return sorted({s for s in (1, 2, 3, size // 4, size // 2, (3 * size) // 4, size - 1) if 0 < s < size})


def shrink(recipe: Recipe, fails: Callable[[Recipe], bool], attempts: int) -> Recipe:
    """The simplest recipe found that still fails, trying at most `attempts` recipes.

    Greedy: the first simplification that keeps the failure is taken, and the search goes on from there, so that what is
    left is needed for the failure (as far as the attempts reach).
    """
    tried: set[Recipe] = set()
    progress = True
    while progress and attempts > 0:
        progress = False
        for candidate in simpler(recipe):
            if candidate in tried:
                continue
            tried.add(candidate)
            attempts -= 1
            if fails(candidate):
                recipe, progress = candidate, True
                break
            if attempts <= 0:
                break
    return recipe
