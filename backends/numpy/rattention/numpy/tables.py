"""Rotary tables in float64 (ROPE-1, ROPE-2)."""

from __future__ import annotations

import numpy as np


def angles(positions: np.ndarray, head_dim: int, theta: float) -> np.ndarray:
    """position * theta^(-2j/D) for j = 0 .. D/2-1, [M, D/2] float64."""
    frequency = float(theta) ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    return positions.astype(np.float64)[:, None] * frequency


def rope_table(positions: np.ndarray, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the angles, unrounded."""
    angle = angles(positions, head_dim, theta)
    return np.cos(angle), np.sin(angle)
