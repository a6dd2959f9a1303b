"""What a kernel costs in one call, in closed form: XLA's scheduler places other work around a kernel by it.

Counted are the matrix products (a multiplication and an addition are two operations), the exponentials of softmax and
feature map, and every operand and result once across HBM.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from rattention.jax.pallas import decode
from rattention.jax.pallas.plan import Plan


def forward(p: Plan) -> tuple[int, int]:
    """Operations and exponentials of the forward kernel."""
    chunks = p.batch * (p.steps - p.prefix) * p.m
    pairs, features = p.C * p.C, p.C * p.F
    soft, border = _tiles(p)
    product = soft * pairs * (p.key_dim + p.value_dim)
    product += border * pairs * (p.F + p.value_dim) + _reads(p) * features * p.value_dim
    fold = features * p.value_dim if p.folds else 0
    exponentials = (soft - p.paired) * pairs + (features if p.linear and _exponential(p) else 0)
    of_keys = border * features if _exponential(p) else 0
    return (
        2 * chunks * (p.q_heads * product + p.kv_heads * fold),
        chunks * (p.q_heads * exponentials + p.kv_heads * of_keys),
    )


def backward(p: Plan) -> tuple[int, int]:
    """Operations and exponentials of the backward kernel: each product of the forward, and two for its gradient."""
    products, exponentials = forward(p)
    again = (p.C**2 * len(range(*p.loop))) if p.softmax else 0  # weights of looped tiles are made twice
    return 3 * products, exponentials + p.batch * p.steps * p.m * p.q_heads * again


def decoding(p: Plan, slots: int) -> tuple[int, int]:
    """Operations and exponentials of the decode kernel over `slots` cached tokens."""
    rows, keys, edge = p.G * p.tokens, slots + p.tokens, decode.border(p, slots)
    product = rows * keys * (p.key_dim + p.value_dim) + (rows * (1 + p.memory) + edge) * p.F * p.value_dim
    product += rows * edge * (p.F + p.value_dim) if p.tokens > 1 else 0
    exponentials = rows * keys + ((rows + edge) * p.F if _exponential(p) else 0)
    return 2 * p.batch * p.kv_heads * product, p.batch * p.kv_heads * exponentials


def estimate(work: tuple[int, int], arrays: Iterable[Any]) -> pl.CostEstimate:
    """`work` is operations and exponentials; `arrays` are the operands and results."""
    moved = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
    return pl.CostEstimate(flops=work[0], transcendentals=work[1], bytes_accessed=moved)


def _tiles(p: Plan) -> tuple[int, int]:
    """Key tiles that a chunk of queries reads by softmax, and by the linear branch outside the state."""
    soft = len(p.softmax_tiles) + len(p.inner_tiles) if p.softmax else 0
    return soft, len(p.linear_tiles) if p.linear else 0


def _reads(p: Plan) -> int:
    """States that a query reads: the carried one and the memory."""
    return p.linear * (p.state + p.memory)


def _exponential(p: Plan) -> bool:
    return p.feature_map == "softmax"
