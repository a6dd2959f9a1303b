"""What the TPU kernels of a traced program move across HBM, and what they hold on chip, in bytes.

Counted from the program itself: the grid, the block of every operand and result, and the function that gives its place
at each step of the grid. A block is fetched or written back whenever its place changes along the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp


class Traffic(NamedTuple):
    """Of one call of one kernel."""

    hbm_bytes: int
    vmem_bytes: int
    """Scratch and blocks, without the compiler's own."""


def kernels(f: Callable[..., Any], *args: Any) -> dict[str, Traffic]:
    """Every Pallas kernel in the program of `f`, by name."""
    return {call["name"]: traffic(call) for call in _calls(jax.make_jaxpr(f)(*args).jaxpr)}


def traffic(call: dict[str, Any]) -> Traffic:
    """Of one `pallas_call`, given its parameters."""
    grid, blocks = call["grid_mapping"].grid, call["grid_mapping"].block_mappings
    scratch = call["grid_mapping"].scratch_avals
    moved = held = 0
    for block in blocks:
        size = _bytes(block.block_aval)
        buffers = 2 if block.pipeline_mode is None else block.pipeline_mode.buffer_count
        moved += size * _fetches(block.index_map_jaxpr, grid)
        held += size * buffers
    return Traffic(moved * math.prod(grid[:2]), held + sum(map(_bytes, scratch)))


def _calls(jaxpr: Any) -> Iterator[dict[str, Any]]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield {"name": equation.params["name"]} | equation.params
            continue
        for inner in equation.params.values():
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from _calls(getattr(inner, "jaxpr", inner))


def _fetches(place: Any, grid: tuple[int, ...]) -> int:
    """Fetches of one block in one row of the grid. Batch rows and heads repeat one pattern, except for what they share,
    which is small either way."""
    if len(grid) < 3:
        return 1
    steps = jnp.arange(grid[2], dtype=jnp.int32)
    at = jax.vmap(lambda s: jax.core.eval_jaxpr(place.jaxpr, place.consts, jnp.int32(0), jnp.int32(0), s))(steps)
    line = jnp.stack([jnp.broadcast_to(x, steps.shape) for x in at], axis=1)
    return 1 + int(jnp.sum(jnp.any(line[1:] != line[:-1], axis=1)))


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * jnp.dtype(aval.dtype).itemsize
