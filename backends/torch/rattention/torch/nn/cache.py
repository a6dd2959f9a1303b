"""The cache of a layer in generation: a `Cache` that is updated in place, row by row."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from rattention.spec import SpecError, Unsupported
from rattention.torch.arguments import has_values, is_dense, is_empty_shell, on_host
from rattention.torch.cache import Cache, as_int
from rattention.torch.nn.moment import Moment
from torch import Tensor


class GenerationCache:
    """What one layer remembers of a batch of sequences. Each row has its own length; a finished row can be reset.

    Args:
        tensors: the canonical `rattention.torch.Cache`.
        limit: an upper bound on the length of every row. Without it the lengths are read, from a device too.
        adopts_dtype: the first call, and the first after `reset()`, may change the storage dtype to that of its q, k
            and v. `RAttention.new_cache` sets it where its caller names no dtype.

    Attributes:
        limit: the bound, kept on the host so that no call has to read a device. It falls when rows are reset. On the
            CPU it is the length of the longest row.

    Raises:
        SpecError: what is given is no `Cache` of tensors (ERR-14) of the right shapes (ERR-2, ERR-3) and a `length`
            of int32 (ERR-4), or `limit` is no bound on the lengths (ERR-5).
        ValueError: no `limit`, and lengths that a transformation traces.
    """

    def __init__(self, tensors: Cache, *, limit: int | None = None, adopts_dtype: bool = False):
        _check(tensors)
        if limit is not None:
            bound = as_int(limit)
            longest = max(tensors.length.tolist(), default=0) if on_host(tensors.length) else 0
            if bound is None or bound < longest:
                expected = f"an int >= {longest}, the longest length, or None"
                raise SpecError("GenerationCache", "limit", expected, repr(limit), "ERR-5")
            limit = bound
        if limit is None and not has_values(tensors.length) and not is_empty_shell(tensors.length):
            raise ValueError("GenerationCache: limit: expected the longest length, since lengths are traced, got None")
        self._tensors, self._adopts_dtype = tensors, adopts_dtype
        self._lags: dict[int, int] = {}  # row b has at most limit - _lags.get(b, 0) tokens
        self._exact, self._grows = True, False  # _grows: every token has a slot, since the window is None
        self._made = Moment()
        self._was_read, self._moved_on = False, False  # _moved_on: it has changed since somebody read it
        self.limit = 0 if limit is None else limit
        if limit is None:
            self.read_lengths()

    @property
    def tensors(self) -> Cache:
        """The canonical cache. Setting it, say with the rows in another order, sets `limit` anew from its lengths.
        Where these are traced `limit` stays, and no row may be longer than that.

        Raises:
            SpecError: what is set is no `Cache`, as in the constructor; nothing changes then.
            Unsupported: tensors that `vmap` batches, in a cache from outside of it. Or a backward pass is at work, as
                activation checkpointing makes it: nothing can be set, nor read if it has changed since it was read.
        """
        if not torch.compiler.is_compiling():
            if self._moved_on:  # a second run of the code that read it would read something else
                self._made.refuse_backward()
            self._was_read = True
        return self._tensors

    @tensors.setter
    def tensors(self, tensors: Cache) -> None:
        _check(tensors)
        self.refuse_recomputation()
        self._made.refuse_batched(tensors)
        self._replace(tensors)
        self._lags, self._exact = {}, False
        self.read_lengths()

    def _replace(self, tensors: Cache) -> None:
        self._tensors, self._moved_on = tensors, self._moved_on or self._was_read

    @property
    def length(self) -> Tensor:
        """`[B]` int32: tokens seen so far in each row. Read as `tensors` are."""
        return self.tensors.length

    def read_lengths(self) -> None:
        """Set `limit` to the length of the longest row. This waits for a device; lengths without values are left."""
        length = self._tensors.length
        if has_values(length):
            self.limit = max(length.tolist(), default=0)
            self._lags, self._exact = {}, True

    def refuse_recomputation(self) -> None:
        """Refuse to change inside of a backward pass, unless this cache was made in it.

        Activation checkpointing runs a forward pass again in backward. The cache has moved on by then, so the second
        run would continue another past, and its gradients would be wrong.
        """
        self._made.refuse_backward()

    def refuse_gradients(self, *inputs: Tensor | None) -> None:
        """Refuse inputs that need a gradient if this cache was made in inference mode: autograd cannot save it."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return
        if self._tensors.k.is_inference() and any(t is not None and t.requires_grad for t in inputs):
            raise Unsupported(
                "RAttention: cache: made or filled in torch.inference_mode, and this call needs gradients. Make it "
                "anew outside of inference mode, or call under torch.no_grad or torch.inference_mode"
            )

    def update(self, tensors: Cache, tokens: int, *, ragged: bool = False, grows: bool = False) -> None:
        """Take the cache after a call with at most `tokens` new tokens per row.

        Args:
            ragged: some rows had fewer.
            grows: the window is None, so that each call adds slots.

        Raises:
            Unsupported: tensors that `vmap` batches, in a cache from outside of it; nothing changes then.
        """
        self._made.refuse_batched(tensors)
        self._replace(tensors)
        self.limit, self._grows = self.limit + tokens, grows
        if on_host(tensors.length):
            self.read_lengths()
        elif ragged:
            self._exact = False
        if not torch.compiler.is_compiling():
            self._drop_empty_slots()

    def _drop_empty_slots(self) -> None:
        """Keep the last `limit` slots of a cache that grows. Tokens stand at the right: the others are empty."""
        k, v, state, length = self._tensors
        surplus = k.shape[1] - self.limit if self._grows else 0
        if surplus > 0:
            # A view would keep the memory of the slots that go.
            self._tensors = Cache(k[:, surplus:].clone(), v[:, surplus:].clone(), state, length)

    def rows_for(self, tokens: int, rows: int) -> int:
        """How many rows a rotary table needs for `tokens` more tokens, if it has `rows` now.

        Rows that wait let the bound run ahead of the lengths. So before a table grows for a bound that may be too high,
        the lengths are read.
        """
        if self.limit + tokens > rows and not self._exact and not _capturing(self._tensors.length.device):
            self.read_lengths()
        return self.limit + tokens

    def adopt(self, q: Tensor) -> Cache:
        """The tensors for a call with `q`, whose storage dtype they take if nothing has been stored yet.

        Raises:
            SpecError: the cache has another dtype and keeps it, because it holds tokens or its maker chose the dtype.
        """
        k, v, state, length = self._tensors
        if k.dtype == q.dtype:
            return self._tensors
        if self.limit > 0 or not self._adopts_dtype:
            came, has = (str(x.dtype).removeprefix("torch.") for x in (q, k))
            why = "one autocast setting for all calls" if self.limit > 0 else "or new_cache without dtype"
            raise SpecError(
                "RAttention", "cache", f"storage dtype {came}, that of q, k and v in this call ({why})", has, "ERR-4"
            )
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self._tensors = Cache(k.to(q.dtype), v.to(q.dtype), state.to(wide), length)
        return self._tensors

    def reset(self, rows: int | Sequence[int] | Sequence[bool] | np.ndarray | Tensor | None = None) -> None:
        """Forget everything in `rows`, so that they start new sequences.

        Args:
            rows: an index, indices (negative ones count from the end, none resets nothing), or a bool mask `[B]`;
                default all. A tensor on a device is read, which waits for it; a traced one has to be a mask.

        Raises:
            IndexError: an index outside the batch, or a mask of another length.
            TypeError: neither indices nor bools, such as a mask of uint8, or no values to read.
            Unsupported: a mask that `vmap` batches, for a cache from outside of it; or a backward pass is at work.
        """
        self.refuse_recomputation()
        k = self._tensors.k
        batch = k.shape[0]
        if isinstance(rows, Tensor) and not has_values(rows):
            if rows.device.type == "meta" and k.device.type != "meta":
                raise TypeError(f"reset: rows: expected indices or a bool mask with values, got {_kind(rows)} on meta")
            if rows.dtype != torch.bool or rows.shape != (batch,):
                raise TypeError(
                    f"reset: rows: expected a bool mask [B={batch}] where rows are traced, got {_kind(rows)}"
                )
            gone, indices = rows.to(k.device), []
        else:
            mask = [True] * batch if rows is None else _mask(rows, batch)
            gone = torch.tensor(mask, dtype=torch.bool, device=k.device)
            indices = [b for b in range(batch) if mask[b]]
        cleared = Cache(*(torch.where(gone.view(-1, *(1,) * (x.ndim - 1)), 0, x) for x in self._tensors))
        self._made.refuse_batched(cleared)
        self._replace(cleared)
        # A new dict each time: a copy of this object may hold the old one.
        self._lags = self._lags | dict.fromkeys(indices, self.limit)
        if self._lags and len(self._lags) == batch:  # no row is as long as the bound any more
            surplus = min(self._lags.values())
            self.limit -= surplus
            self._lags = {b: lag - surplus for b, lag in self._lags.items()}
        if on_host(cleared.length):
            self.read_lengths()
        self._drop_empty_slots()


def _check(tensors: Any) -> None:
    """Refuse what is no `Cache`, and fields that no call returns."""
    if not isinstance(tensors, Cache):
        got = type(tensors).__qualname__
        raise SpecError("GenerationCache", "tensors", "a rattention.torch.Cache", got, "ERR-14")
    shapes = {"k": "[B, W, Hkv, D]", "v": "[B, W, Hkv, Dv]", "state": "[B, Hkv, F, Dv]", "length": "[B]"}
    for (name, shape), x in zip(shapes.items(), tensors, strict=True):
        where = f"tensors.{name}"
        if not isinstance(x, Tensor):
            got = f"{type(x).__module__}.{type(x).__qualname__}"
            raise SpecError("GenerationCache", where, "a torch.Tensor", got, "ERR-14")
        if x.ndim != 1 + shape.count(","):
            raise SpecError("GenerationCache", where, f"shape {shape}", str(list(x.shape)), "ERR-2")
        if x.dtype.is_floating_point != (name != "length") or (name == "length" and x.dtype != torch.int32):
            expected = "dtype int32" if name == "length" else "a floating dtype"
            raise SpecError("GenerationCache", where, expected, str(x.dtype).removeprefix("torch."), "ERR-4")
        if x.shape[0] != tensors.k.shape[0]:
            got = str(list(x.shape))
            raise SpecError("GenerationCache", where, f"shape {shape} with B={tensors.k.shape[0]}, as k", got, "ERR-3")


def _kind(rows: Any) -> str:
    if isinstance(rows, Tensor) and rows.is_nested:
        return "a nested tensor"  # it has no shape
    dtype = getattr(rows, "dtype", None)
    return type(rows).__qualname__ if dtype is None else f"{dtype} {list(rows.shape)}"


def _mask(rows: Any, batch: int) -> list[bool]:
    """Which of the `batch` rows are meant."""
    wrong = TypeError(f"reset: rows: expected indices or a bool mask [B={batch}], got {_kind(rows)}")
    if isinstance(rows, np.ma.MaskedArray | str | bytes | bytearray | memoryview | bool | np.bool_ | Mapping | Set):
        raise wrong
    # PyTorch once had masks of uint8. As indices they would mean rows 0 and 1.
    if getattr(rows, "dtype", None) in (torch.uint8, np.uint8) or (isinstance(rows, Tensor) and not is_dense(rows)):
        raise wrong
    if isinstance(rows, Tensor | np.ndarray):
        if rows.ndim == 0:
            rows = [rows.item()]
        elif rows.ndim > 1:
            raise wrong
        elif rows.dtype in (torch.bool, np.bool_) and len(rows) != batch:
            raise IndexError(f"reset: rows: expected a bool mask [B={batch}], got {len(rows)} entries")
        else:
            rows = rows.tolist()
    try:
        rows = [operator.index(rows)] if hasattr(rows, "__index__") else [_entry(row) for row in rows]
        bools = sum(isinstance(row, bool | np.bool_) for row in rows)
        indices = [] if bools else [operator.index(row) for row in rows]
    except TypeError:
        raise wrong from None
    if bools:
        if bools != len(rows):
            raise wrong
        if bools != batch:
            raise IndexError(f"reset: rows: expected a bool mask [B={batch}], got {bools} entries")
        return [bool(row) for row in rows]
    outside = next((i for i in indices if not -batch <= i < batch), None)
    if outside is not None:
        raise IndexError(f"reset: rows: expected indices below the batch of B={batch}, got {outside}")
    chosen = {i % batch for i in indices}
    return [b in chosen for b in range(batch)]


def _entry(row: Any) -> Any:
    """The bool or number in an entry of a list, which may be a tensor or array without axes."""
    one = isinstance(row, Tensor | np.ndarray | np.generic) and row.ndim == 0
    if not one:
        return row
    if row.dtype in (torch.uint8, np.uint8) or (isinstance(row, Tensor) and row.device.type == "meta"):
        raise TypeError("no index")
    return row.item()


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded, in which nothing may be read."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
