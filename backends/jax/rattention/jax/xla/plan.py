"""How a call is cut into chunks: the static half of the XLA form."""

from __future__ import annotations

from typing import NamedTuple

from jax import lax

CHUNK = 64
"""Queries per chunk. Larger ones mask more of their work; at 64 tokens a group's rows already fill a matrix product."""


class Plan(NamedTuple):
    """Everything the compiled program depends on besides shapes. Hashable, so it can be a static argument.

    All tokens of a call stand on one axis: `prefix` slots of tokens before the first query (the cache of an extend,
    zeros in a forward), then the T tokens that also are queries, zeros up to a multiple of the chunk. Query i stands
    at index prefix + i of that axis. With prefix = max(w, 0), its window is the indices i .. i + prefix, and what the
    linear branch reads is j < i (j <= i for w = -1): aligned with the chunks of queries, whatever w is.
    """

    prefix: int
    chunk: int
    chunks: int
    full: bool  # window None: softmax over the whole past, the linear branch reads no token
    softmax: bool  # the softmax branch has tokens to read (w >= 0)
    linear: bool  # tokens are folded into the state (w is not None)
    mix: bool  # both branches, normalised and mixed; otherwise the one branch asked for
    inclusive: bool  # w = -1: the linear branch reads the token itself
    segmented: bool
    feature_map: str
    precision: lax.Precision

    @property
    def width(self) -> int:
        """Keys that one chunk sees: those of its window, or without a softmax branch the chunk that leaves it."""
        return self.span if self.softmax else self.chunk

    @property
    def span(self) -> int:
        """Keys that one chunk of queries looks at in the softmax branch."""
        return self.prefix + (self.chunk * self.chunks if self.full else self.chunk)


def chunk_size(tokens: int) -> int:
    """One chunk for a short call, whose program then has no loop; else `CHUNK`."""
    return tokens if tokens <= CHUNK + CHUNK // 2 else CHUNK


def default_precision(storage: str) -> lax.Precision:
    """Precision of the matrix products, for the inputs as float32.

    float32 storage gets true float32 (NUM-2). For 16-bit storage operands may be rounded to storage: bfloat16 takes
    one pass of the matrix unit; float16 takes the three-pass form, since one bfloat16 pass would lose three bits.
    On a CPU all of them are float32.
    """
    return {"bfloat16": lax.Precision.DEFAULT, "float16": lax.Precision.HIGH}.get(storage, lax.Precision.HIGHEST)


def named_precision(precision: object) -> lax.Precision | None:
    """`precision=` of the public functions: a `jax.lax.Precision`, one of its names in either case, or None.

    Raises:
        ValueError: anything else.
    """
    if precision is None or isinstance(precision, lax.Precision):
        return precision
    if isinstance(precision, str):  # the enumeration would take the numbers 0 to 2 as well, and so True
        try:
            return lax.Precision(precision.lower())
        except ValueError:
            pass
    raise ValueError(f"precision: expected default, high, highest, a jax.lax.Precision, or None, got {precision!r}")


def as_precision(precision: object, storage: str) -> lax.Precision:
    """The precision asked for, or that of the storage dtype."""
    return named_precision(precision) or default_precision(storage)
