"""Families of values. Each draws a whole array from a generator: the standard normal alone hides faults."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The storage dtypes as NumPy dtypes."""

POISON = (np.nan, np.inf, -np.inf, 6e4)
"""What inert elements hold: each would show if it were multiplied by zero instead of being left out."""

Family = Callable[[np.random.Generator, tuple[int, ...], str], np.ndarray]


def _normal(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    return rng.standard_normal(shape)


def _offset(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Mean 0.5: sums grow with length, as they do for real values (TRAPS: 16-bit states are seen here first)."""
    return 0.5 + 0.5 * rng.standard_normal(shape)


def _large(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Logits of a hundred and more: a softmax without its maximum subtracted overflows."""
    return rng.standard_normal(shape) * (12.0 if role in ("q", "k", "x") else 1.0)


def _tiny(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Everything small: an eps of the wrong size, or one outside the root, shows here."""
    return rng.standard_normal(shape) * (2.0**-9 if role in ("v", "x", "cotangent") else 2.0**-4)


def _onehot(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    if role not in ("q", "k", "x"):
        return rng.standard_normal(shape)
    index = rng.integers(0, shape[-1], shape[:-1])
    sign = rng.choice([-1.0, 1.0], shape[:-1])
    return (np.arange(shape[-1]) == index[..., None]) * (4.0 * sign)[..., None]


def _constant(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Every token the same in q and k: flat weights, so that each token of the window counts the same."""
    if role not in ("q", "k") or len(shape) < 3:
        return rng.standard_normal(shape)
    one = rng.standard_normal((shape[0], 1, *shape[2:]))
    return np.broadcast_to(one, shape)


def _powers(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Signed powers of two: products are exact at any dtype."""
    return np.ldexp(rng.choice([-1.0, 1.0], shape), rng.integers(-3, 3, shape))


def _mixed(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Another magnitude per head and per channel: an index that is off reads a number of another size."""
    x = rng.standard_normal(shape)
    if len(shape) >= 2:
        x = x * np.ldexp(1.0, rng.integers(-2, 3, shape[-2]))[:, None]
    return x * np.ldexp(1.0, rng.integers(-2, 2, shape[-1])) if shape else x


def _integers(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    return rng.integers(-3, 4, shape).astype(float)


def _needle(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Now and then a key that every query agrees with: one token inside or outside the window decides the output."""
    x = 0.25 * rng.standard_normal(shape)
    if role == "q":
        return np.abs(x) + 2.0
    if role == "k" and len(shape) == 4:
        tokens = rng.random(shape[:3]) < min(0.5, 4.0 / max(shape[1], 1))
        return x + 6.0 * tokens[..., None]
    return rng.standard_normal(shape) * 2.0 if role == "v" else x


def _trend(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Values that grow along the sequence: what is read one token late or early differs in size."""
    x = rng.standard_normal(shape)
    if len(shape) == 4 and shape[1] > 1:
        x = x * np.linspace(0.1, 3.0, shape[1])[None, :, None, None]
    return x


def _huge(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Values whose sums overflow float16 long before the normalised output does."""
    return rng.standard_normal(shape) * (900.0 if role == "v" else 1.0)


def _zeros(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Some tokens all zero: ties, empty rows, the corner of relu."""
    x = rng.standard_normal(shape)
    return x * (rng.random(shape[:2]) < 0.6)[..., None, None] if len(shape) == 4 else x


def _equal(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """One number throughout a tensor: means are that number, rows and differences of neighbours cancel."""
    return np.full(shape, rng.choice([1.0, -1.0, 0.0, rng.standard_normal()], p=[0.3, 0.2, 0.1, 0.4]))


def _ramp(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Sorted along tokens and channels, of one sign: no average hides an index that is off, no term cancels."""
    if len(shape) < 3:
        return rng.uniform(0.5, 1.5, shape)
    tokens = np.linspace(0.5, 2.0, shape[1]).reshape(-1, *(1,) * (len(shape) - 2))
    return np.broadcast_to(rng.choice([-1.0, 1.0]) * tokens * np.linspace(0.5, 1.0, shape[-1]), shape)


def _tied(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Query, key and value of a token are one vector, the same in each head: every score matrix is symmetric."""
    if len(shape) != 4:
        return rng.standard_normal(shape)
    return np.broadcast_to(rng.standard_normal((*shape[:2], 1, shape[3])), shape)


FAMILIES: dict[str, Family] = {
    "normal": _normal,
    "offset": _offset,
    "large": _large,
    "tiny": _tiny,
    "onehot": _onehot,
    "constant": _constant,
    "powers": _powers,
    "mixed": _mixed,
    "integers": _integers,
    "needle": _needle,
    "trend": _trend,
    "huge": _huge,
    "zeros": _zeros,
    "equal": _equal,
    "ramp": _ramp,
    "tied": _tied,
}

ROLES = {
    "q": "q",
    "k": "k",
    "cache_k": "k",
    "v": "v",
    "cache_v": "v",
    "swa": "v",
    "rla": "v",
    "x": "x",
    "swa_weight": "weight",
    "rla_weight": "weight",
    "q_scale": "scale",
    "k_scale": "scale",
    "memory": "state",
    "initial_state": "state",
    "cache_state": "state",
}


def stream(family: str, name: str) -> str:
    """Which stream of random numbers tensor `name` is drawn from: its own, or one that tied tensors share."""
    return "tied" if family == "tied" and ROLES.get(name) in ("q", "k", "v") else name


def draw(family: str, rng: np.random.Generator, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Float64 values of tensor `name`; weights, scales and states have families of their own kind."""
    role = ROLES.get(name, "cotangent" if name.startswith("d_") else "other")
    if role == "scale":
        return rng.uniform(0.4, 1.8, shape) * rng.choice([1.0, 1.0, -1.0], shape)
    if role == "weight":
        return rng.uniform(0.3, 1.7, shape) * rng.choice([1.0, 1.0, -1.0], shape)
    if role == "state" and family not in ("integers", "powers", "mixed"):
        return rng.standard_normal(shape) * (0.05 if family == "tiny" else 1.5)
    return FAMILIES[family](rng, shape, role)


def poisoned(x: np.ndarray, inert: np.ndarray) -> np.ndarray:
    """A copy of `x [B, T, ...]` that holds `POISON` in turn where `inert [B, T]` is true."""
    out = x.copy()
    count = int(inert.sum())
    if count:
        width = int(np.prod(x.shape[2:]))
        out[inert] = np.resize(np.array(POISON), (count, width)).reshape(count, *x.shape[2:]).astype(x.dtype)
    return out
