"""Rows of a generation cache repeated, turned round, picked and joined by one function over all of its leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rattention.jax.nn import GenerationCache, RAttention

B, PROMPT, HIDDEN, W = 4, 6, 16, 3
rng = np.random.default_rng(3)
MODEL = RAttention(HIDDEN, 4, 2, 8, window=W, memory=True, qk_norm=True, rngs=nnx.Rngs(0))
GRAPH, STATE = nnx.split(MODEL)
X = jnp.asarray(rng.standard_normal((B, PROMPT, HIDDEN)), jnp.float32)
NEXT = jnp.asarray(rng.standard_normal((12, HIDDEN)), jnp.float32)
# Outputs are near 1, in float32; a table that was moved with the rows makes them differ by 0.1 and more.
SAME_SUMS: dict[str, Any] = {"atol": 1e-6}  # of one row, in another program
OTHER_BATCH: dict[str, Any] = {"atol": 1e-5}  # of one row, batched once more by vmap
OTHER_SUMS: dict[str, Any] = {"atol": 2e-5}  # of the parallel form, which goes from token to token without a state

PICKED = jnp.array([2, 0, 3, 3])

forward = nnx.jit(lambda model, x: model(x))
CACHE = nnx.jit(lambda model, x, cache: model.prefill(x, cache))(MODEL, X, MODEL.new_cache(B, max_length=64))[1]

# A function of one leaf, and the rows that it makes.
IDIOMS: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "repeat": (lambda t: jnp.repeat(t, 2, axis=0), [0, 0, 1, 1, 2, 2, 3, 3]),
    "reversal": (lambda t: t[::-1], [3, 2, 1, 0]),
    "pick": (lambda t: t[PICKED], PICKED.tolist()),
    "pick, negative": (lambda t: t[jnp.array([-1, -3])], [3, 1]),
    "take, clip": (lambda t: jnp.take(t, PICKED, axis=0, mode="clip"), PICKED.tolist()),
    "concatenate": (lambda t: jnp.concatenate([t, t]), [0, 1, 2, 3] * 2),
    "head": (lambda t: t[:2], [0, 1]),
    "set": (lambda t: t.at[jnp.array([1, 3])].set(t[jnp.array([2, 0])]), [0, 2, 2, 0]),
}


def step(state: Any, x: Any, cache: GenerationCache) -> tuple[jax.Array, GenerationCache]:
    return nnx.merge(GRAPH, state).step(x, cache)


@pytest.mark.parametrize("name", IDIOMS)
def test_what_is_done_to_all_leaves_is_done_to_rows(name: str) -> None:
    """Against the same rows picked from the canonical tensors alone, and against the parallel form of each sequence;
    eager, compiled, and compiled with the change inside."""
    change, rows = IDIOMS[name]
    tokens = NEXT[: len(rows)]
    alone = CACHE._replace(tensors=jax.tree.map(lambda t: t[jnp.array(rows)], CACHE.tensors))
    expected, after = jax.jit(step)(STATE, tokens, alone)
    whole = forward(MODEL, jnp.concatenate([X[jnp.array(rows)], tokens[:, None]], axis=1))[:, -1]
    np.testing.assert_allclose(expected, whole, **OTHER_SUMS)
    inside = jax.jit(lambda state, x, cache: step(state, x, jax.tree.map(change, cache)))
    changed = jax.tree.map(change, CACHE)
    for y, found in (
        MODEL.step(tokens, changed),
        jax.jit(step)(STATE, tokens, changed),
        inside(STATE, tokens, CACHE),
    ):
        np.testing.assert_allclose(y, expected, **SAME_SUMS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SAME_SUMS), found.tensors, after.tensors)


def test_beam_search_as_a_scan() -> None:
    """From one prompt to three beams, which are reordered at each step; the carry keeps its shapes."""
    one = jax.tree.map(lambda t: t[:1], CACHE)
    beams = jax.tree.map(lambda t: jnp.repeat(t, 3, axis=0), one)
    orders = jnp.array([[0, 0, 2], [2, 1, 0], [1, 1, 1]])
    tokens = NEXT[:9].reshape(3, 3, HIDDEN)

    @jax.jit
    def search(state: Any, cache: GenerationCache) -> Any:
        def turn(cache: GenerationCache, given: Any) -> Any:
            x, order = given
            y, cache = step(state, x, cache)
            return jax.tree.map(lambda t: t[order], cache), y

        return jax.lax.scan(turn, cache, (tokens, orders))[1]

    found = search(STATE, beams)
    sequences = [X[0]] * 3
    for turn, order in enumerate(orders.tolist()):
        sequences = [jnp.concatenate([s, x[None]]) for s, x in zip(sequences, tokens[turn], strict=True)]
        np.testing.assert_allclose(found[turn], forward(MODEL, jnp.stack(sequences))[:, -1], **OTHER_SUMS)
        sequences = [sequences[i] for i in order]


def test_caches_of_many_requests_stack() -> None:
    """`vmap` over stacked caches; a mask over all leaves takes rows from one cache or the other."""
    again = nnx.jit(lambda model, x, cache: model.step(x, cache))(MODEL, NEXT[:B], CACHE)[1]
    both = jax.tree.map(lambda *t: jnp.stack(t), CACHE, again)
    tokens = NEXT[4 : 4 + B]
    found = jax.jit(jax.vmap(lambda cache: step(STATE, tokens, cache)[0]))(both)
    for y, cache in zip(found, (CACHE, again), strict=True):
        np.testing.assert_allclose(y, jax.jit(step)(STATE, tokens, cache)[0], **OTHER_BATCH)
    first = jnp.array([True, False, False, True])
    mixed = jax.tree.map(lambda a, b: jnp.where(first.reshape(-1, *(1,) * (a.ndim - 1)), a, b), CACHE, again)
    np.testing.assert_allclose(
        jax.jit(step)(STATE, tokens, mixed)[0], jnp.where(first[:, None], found[0], found[1]), **OTHER_BATCH
    )


def test_a_table_without_rows_of_its_own_axis_is_refused() -> None:
    """Slices that leave nothing of the axis that stands for the batch, and tables of the old form `[rows, D/2]`."""
    for wrong, shape in (
        (jax.tree.map(lambda t: t[2:], CACHE), r"\[0, 64, 4\]"),
        (CACHE._replace(rope_cos=CACHE.table()[0]), r"\[64, 4\]"),
    ):
        for run in (MODEL.step, lambda x, cache: jax.jit(step)(STATE, x, cache)):
            with pytest.raises(ValueError, match=rf"cache: rope_cos: expected shape \[1, max_length, D/2\].*{shape}"):
                run(NEXT[:2], wrong)
    with pytest.raises(TypeError, match=r"cache: rope_sin: expected a jax.Array or numpy.ndarray, got builtins.list"):
        MODEL.step(NEXT[:B], CACHE._replace(rope_sin=[0.0]))  # pyright: ignore[reportArgumentType]


def test_a_pick_that_fills_is_loud() -> None:
    """`jnp.take` writes NaN for rows that are not there, also in the table."""
    filled = jax.tree.map(lambda t: jnp.take(t, PICKED, axis=0), CACHE)
    tokens = NEXT[: len(PICKED)]
    assert filled.rope_cos is not None
    assert np.isnan(np.asarray(filled.rope_cos)).any()
    y, _ = jax.jit(step)(STATE, tokens, filled)
    assert np.isnan(np.asarray(y)).any()


def test_a_cache_through_files_and_donation() -> None:
    from flax import serialization

    restored: Any = serialization.from_bytes(MODEL.new_cache(B, max_length=64), serialization.to_bytes(CACHE))
    expected, _ = jax.jit(step)(STATE, NEXT[:B], CACHE)
    np.testing.assert_allclose(MODEL.step(NEXT[:B], restored)[0], expected, **SAME_SUMS)
    given = jax.tree.map(jnp.copy, CACHE)
    y, after = jax.jit(step, donate_argnums=2)(STATE, NEXT[:B], given)
    np.testing.assert_allclose(y, expected, **SAME_SUMS)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, CACHE)
    tokens, saved = NEXT[:B], jax.tree.map(np.asarray, CACHE)
    with jax.transfer_guard("disallow"):
        MODEL.step(tokens, saved)
