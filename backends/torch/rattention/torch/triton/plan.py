"""What one call of the kernels is made of: sizes, segments, and the launches shared by forward and backward."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton.language as tl
from rattention.torch.triton.config import Config
from rattention.torch.triton.launch import configuration, launch, target_kind
from rattention.torch.triton.rotary import rotate_keys
from rattention.torch.triton.states import carry_states, local_states
from rattention.torch.triton.tiles import NOWHERE
from torch import Tensor

LARGEST_HEAD_DIM = 256


class Rows(NamedTuple):
    """Segments of each batch row. Absent segments are token NOWHERE."""

    start: Tensor
    """[B, T] int32: first token of the token's segment; NOWHERE for padding."""
    first: Tensor
    """[B] int32: first token of the row's first segment."""
    last: Tensor
    """[B] int32: first token of the row's last segment."""
    fold_end: Tensor
    """[B] int32: final_state sums the last segment's tokens before this one."""


def rows_of(segment_ids: Tensor, window: int | None) -> Rows:
    """Where segments begin and end, from ids [B, T] alone and without waiting for the device."""
    B, T = segment_ids.shape
    index = torch.arange(T, dtype=torch.int32, device=segment_ids.device).expand(B, T)
    before = torch.nn.functional.pad(segment_ids, (1, 0))[:, :T]
    begins = torch.where(segment_ids != before, index, 0)
    live = segment_ids != 0
    nowhere = NOWHERE.value
    start = torch.where(live, torch.cummax(begins, 1).values, nowhere).to(torch.int32)
    if T == 0:
        none = torch.full((B,), nowhere, dtype=torch.int32, device=segment_ids.device)
        return Rows(start, none, none, torch.zeros_like(none))
    first = start.amin(1)
    last = torch.where(live, start, -1).amax(1)
    last = torch.where(last < 0, nowhere, last).to(torch.int32)
    end = torch.where(live, index + 1, 0).amax(1)
    fold = torch.zeros_like(end) if window is None else (end - max(window, 0)).clamp_min(0)
    return Rows(start.contiguous(), first.contiguous(), last.contiguous(), fold.to(torch.int32).contiguous())


def readable(x: Tensor) -> Tensor:
    """`x` itself if the kernels can address it: unit stride along channels, tile offsets that fit 32 bits."""
    if x.numel() == 0:
        return x
    if (x.shape[-1] > 1 and x.stride(-1) != 1) or max(abs(s) for s in x.stride()[1:-1]) >= 2**22:
        return x.contiguous()
    return x


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, least: int = 16) -> int:
    return max(least, 1 << max(n - 1, 0).bit_length())


@dataclass
class Plan:
    """One call: tensors that all kernels share, and every size they are compiled for."""

    q: Tensor
    k: Tensor
    v: Tensor
    window: int | None
    scale: float | None
    feature_map: str
    eps: float
    mode: str
    """"mix", "soft" or "linear": what the call returns."""
    reduced: bool = False
    """Whether float32 products may run in TF32."""
    swa_weight: Tensor | None = None
    rla_weight: Tensor | None = None
    rope_cos: Tensor | None = None
    rope_sin: Tensor | None = None
    positions: Tensor | None = None
    segment_ids: Tensor | None = None
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    memory: Tensor | None = None
    initial_state: Tensor | None = None
    rows: Rows | None = field(init=False, default=None)
    config: Config = field(init=False)

    def __post_init__(self):
        self.q, self.k, self.v = readable(self.q), readable(self.k), readable(self.v)
        for name in ("swa_weight", "rla_weight", "rope_cos", "rope_sin", "positions", "q_scale", "k_scale", "memory",
                     "initial_state"):  # fmt: skip
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.contiguous())
        self.B, self.Tq, self.Hq, self.D = self.q.shape
        self.Tk, self.Hkv, self.Dv = self.k.shape[1], self.k.shape[2], self.v.shape[3]
        self.G = self.Hq // self.Hkv
        self.F = self.D if self.feature_map == "identity" else 2 * self.D
        self.offset = self.Tk - self.Tq
        self.config = configuration(self.q, self.D, self.Dv)
        half = power_of_two((self.D + 1) // 2)
        self.DB = min(half, 64)
        self.ND = 2 * half // self.DB
        self.DVP = power_of_two(self.Dv)
        self.soft = self.window != -1 and self.mode != "linear"
        self.linear = self.window is not None and self.mode != "soft"
        self.w = self.Tk if self.window is None else min(self.window, self.Tk)
        if self.segment_ids is not None:
            self.rows = rows_of(self.segment_ids, self.window)

    # ------------------------------------------------------------------ sizes

    @property
    def empty(self) -> bool:
        return self.B == 0 or self.Tk == 0

    @property
    def chunks(self) -> int:
        """Saved states per row: one for each border p_c = c N that a query or final_state may read."""
        if not self.linear:
            return 1
        return max(self.Tk - self.w, self.Tk - max(self.w, 0), 0) // self.config.chunk + 1

    @property
    def fold_end(self) -> int:
        """Tokens of a row without segments that final_state sums."""
        return 0 if self.window is None else max(self.Tk - max(self.window, 0), 0)

    @property
    def reads_states(self) -> bool:
        """Whether some query may read a saved state that is not zero."""
        return self.mode != "soft" and (self.initial_state is not None or (self.linear and self.chunks > 1))

    @property
    def state_block(self) -> int:
        """Elements of the state that one program carries."""
        return min(self.config.elements, power_of_two(self.F * self.Dv))

    def heads(self, rows: int, memory: bool) -> int:
        """Query heads packed into one row tile. The memory is one matrix per query head: its rows stand alone."""
        return 1 if memory else min(power_of_two(self.G, 1), rows)

    # ------------------------------------------------------------------ arguments by group

    @property
    def segments(self) -> tuple[Any, ...]:
        return self.rows or (None, None, None, None)

    @cached_property
    def precision(self) -> dict[str, Any]:
        storage = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[self.q.dtype]
        wide = tl.float32 if storage == tl.float16 else storage
        exact = storage == tl.float32
        # TF32 has float16's mantissa; where the matrix units have no TF32, three bfloat16 products hold more.
        tf32 = "bf16x3" if target_kind(self.q).startswith("gfx") else "tf32"
        # What is not float32 has no precision to choose; "ieee" stands for it on every target.
        reduced = tf32 if self.reduced and exact else "ieee"
        if self.turned_dtype != self.q.dtype:
            storage, narrow = wide, tf32
        else:
            narrow = reduced
        return {
            "NARROW": storage,
            "WIDE": wide,
            "PRECISION": narrow,
            "WIDE_PRECISION": tf32 if self.q.dtype == torch.float16 else reduced,
        }

    @property
    def wide_dtype(self) -> torch.dtype:
        return torch.float32 if self.q.dtype == torch.float16 else self.q.dtype

    @property
    def turned_dtype(self) -> torch.dtype:
        """Of rotated queries and keys, and then of the operands beside them: a rotation lengthens a channel by up to
        sqrt(2), past the range of float16."""
        return self.q.dtype if self.rope_cos is None else self.wide_dtype

    @property
    def shape(self) -> dict[str, Any]:
        return {"D": self.D, "DB": self.DB, "ND": self.ND, "DV": self.Dv}

    @property
    def rope(self) -> dict[str, Any]:
        return {
            "HAS_ROPE": self.rope_cos is not None,
            "HAS_POSITIONS": self.positions is not None,
            "HAS_SEGMENTS": self.rows is not None,
        }

    @property
    def scale_log2(self) -> float:
        scale = 1.0 / math.sqrt(self.D) if self.scale is None else self.scale
        return scale / math.log(2.0)

    @property
    def table_rows(self) -> int:
        return 0 if self.rope_cos is None else self.rope_cos.shape[0]

    # ------------------------------------------------------------------ shared launches

    def rotated_keys(self) -> Tensor:
        """K turned by the rotary table, or K itself without one."""
        if self.rope_cos is None or not self.soft or self.empty:
            return self.k
        out = torch.empty(self.k.shape, dtype=self.turned_dtype, device=self.k.device)
        tile = self.config.states
        launch(
            rotate_keys, ceil_div(self.Tk, tile.keys) * self.Hkv * self.B,
            self.k, self.rope_cos, self.rope_sin, self.positions, self.segments[0], out,
            *self.k.stride()[:3], self.Tk, self.Hkv, self.table_rows,
            D=self.D, DB=self.DB, ND=self.ND, BN=tile.keys, HAS_POSITIONS=self.positions is not None,
            HAS_SEGMENTS=self.rows is not None, warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
        return out

    def local_sums(
        self, x: Tensor, y: Tensor, scale: Tensor | None, mode: str, H: int, chunk: int, chunks: int
    ) -> Tensor:
        """sum phi(x)^T y per chunk [B, H, chunks, F, Dv] float32; x and y have H G heads of their own G."""
        out = torch.empty((self.B, H, chunks, self.F, self.Dv), dtype=torch.float32, device=x.device)
        tile = self.config.states
        G = x.shape[2] // H
        GP = power_of_two(G, 1)  # one tile of the sum holds all heads of the group
        DVB = min(self.DVP, self.config.values)
        start, first, last, fold_end = self.segments
        launch(
            local_states, ceil_div(self.Dv, DVB) * chunks * H * self.B,
            x, y, scale, start, first, last, fold_end, out, *x.stride()[:3], *y.stride()[:3],
            self.Tk, 0 if mode == "keys" else self.offset, self.w, self.fold_end, chunk, chunks, H, G,
            **self.shape, DVB=DVB, GP=GP, BN=max(1, tile.keys // GP),
            MAP=self.feature_map, MODE=mode, HAS_SCALE=scale is not None, HAS_SEGMENTS=self.rows is not None,
            WIDE=self.precision["WIDE"], PRECISION=self.precision["WIDE_PRECISION"],
            warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
        return out

    def states(self) -> tuple[Tensor | None, Tensor]:
        """H_c [B, Hkv, chunks, F, Dv] in the operand dtype, and final_state. None where no query reads a state."""
        shape = (self.B, self.Hkv, self.F, self.Dv)
        if self.mode == "soft":
            return None, torch.empty(0, dtype=torch.float32, device=self.q.device)
        if self.empty or not (self.linear or self.initial_state is not None):
            if self.initial_state is not None:
                return None, self.initial_state.clone()
            return None, torch.zeros(shape, dtype=torch.float32, device=self.q.device)
        local = self.local_sums(self.k, self.v, self.k_scale, "keys", self.Hkv, self.config.chunk, self.chunks)
        states = torch.empty(local.shape, dtype=self.wide_dtype, device=self.q.device)
        final = torch.empty(shape, dtype=torch.float32, device=self.q.device)
        size = self.F * self.Dv
        block = self.state_block
        launch(
            carry_states, ceil_div(size, block) * self.B * self.Hkv,
            local, self.initial_state, *self.segments, states, final,
            self.Tk, self.fold_end, self.config.chunk, self.chunks, self.Hkv, size,
            BE=block, HAS_INITIAL=self.initial_state is not None, HAS_SEGMENTS=self.rows is not None,
            warps=4, stages=2,
        )  # fmt: skip
        return states if self.reads_states else None, final
