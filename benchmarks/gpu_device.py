"""What the GPU benchmark stands on: the device, its clock and roofline, inputs.

A dry run puts the same code on the CPU under Triton's interpreter, with small shapes and a wall clock: it shows that
every line runs, and measures nothing.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / p) for p in ("spec", "backends/torch")]

DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

DEVICE = torch.device("cpu" if DRY else "cuda")


@dataclass(frozen=True)
class Shape:
    """Heads, head dim and windows of the comparison. `wide` counts the token itself, as FlexAttention's masks do."""

    Hq: int
    Hkv: int
    D: int
    window: int
    wide: int
    tokens: int
    """B T of a prefill."""


SHAPE = Shape(4, 1, 16, 15, 64, 64) if DRY else Shape(16, 4, 128, 511, 4096, 32768)


class Clock:
    """Seconds left of the budget."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self.end - time.monotonic()


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], clock: Clock, repeats: int = 20) -> float | None:
    """Median of CUDA-event timings; None where it fails or the time is up.

    Before each repetition the cache is flushed and the device told to wait a moment, so that the host is ahead and its
    time to launch is not counted.
    """
    if clock.left() < 5:
        return None
    try:
        run()
        synchronize()
        began = time.monotonic()
        run()
        synchronize()
        once = time.monotonic() - began
        if DRY:
            return 1e3 * once
        repeats = max(3, min(repeats, int(1.5 / max(once, 1e-5))))
        flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
        pairs = []
        for _ in range(repeats):
            flush.zero_()
            torch.cuda._sleep(3_000_000)  # cycles: a millisecond or two
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            pairs.append((start, stop))
        synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in pairs)
    except Exception as error:  # a competitor that does not run here is reported, not hidden
        print(f"    failed: {reason(error)}", flush=True)
        synchronize()
        return None


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Bytes allocated at the peak of `run`, beyond those held before it."""
    if DRY:
        return None
    try:
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    except Exception:
        return None


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def inputs(B: int, T: int, dtype: torch.dtype, D: int, Hq: int, Hkv: int) -> dict[str, Tensor]:
    """Tensors of one `rattention`, rotary tables and q/k scales included."""
    angle = torch.arange(T, device=DEVICE)[:, None] * 1e4 ** (-torch.arange(0, D, 2, device=DEVICE) / D)
    return {
        "q": normal(B, T, Hq, D, dtype=dtype, seed=1),
        "k": normal(B, T, Hkv, D, dtype=dtype, seed=2),
        "v": normal(B, T, Hkv, D, dtype=dtype, seed=3),
        "swa_weight": 1 + 0.1 * normal(Hq, D, dtype=torch.float32, seed=4),
        "rla_weight": 1 + 0.1 * normal(Hq, D, dtype=torch.float32, seed=5),
        "rope_cos": angle.cos(),
        "rope_sin": angle.sin(),
        "q_scale": 1 + 0.1 * normal(D, dtype=torch.float32, seed=6),
        "k_scale": 1 + 0.1 * normal(D, dtype=torch.float32, seed=7),
    }


def roofline(clock: Clock) -> dict[str, float | None]:
    """Copy bandwidth in bytes/s (read + written) and dense bfloat16 matmul rate in operations/s."""
    size, n = (1 << 16, 64) if DRY else (1 << 30, 8192)
    source = torch.empty(size, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    a, b = normal(n, n), normal(n, n, seed=1)
    copy = milliseconds(lambda: target.copy_(source), clock)
    matmul = milliseconds(lambda: a @ b, clock)
    return {
        "copy_bytes_per_s": 2 * size / (copy / 1e3) if copy else None,
        "matmul_ops_per_s": 2 * n**3 / (matmul / 1e3) if matmul else None,
    }
