"""Packed documents and padding: what `segment_ids [B, T]` says about each token (SEG-1 .. SEG-8)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from rattention.torch.eager.groups import Groups
from torch import Tensor


class Documents(NamedTuple):
    """One row of tokens as documents. Id 0 is padding."""

    ids: Tensor
    """`[B, T]`, as given."""

    live: Tensor
    """`[B, T]` bool: not padding."""

    index: Tensor
    """`[B, T]`: index within the own document (SEG-3); 0 for padding."""

    left: Tensor
    """`[B, T]`: tokens of the own document from this one to its end, itself included."""

    alive: Tensor
    """`[B, T + 1]`: the document that a state belongs to before token t. It outlives the padding behind it, and the
    first document owns the state from the beginning, padding in front included (SEG-6). Last column: the last one."""


def documents(ids: Tensor) -> Documents:
    """Read `ids [B, T]`, T >= 1, without looking at values on the host."""
    T = ids.shape[1]
    t = torch.arange(T, device=ids.device).expand(ids.shape)
    live = ids != 0
    differs = ids[:, 1:] != ids[:, :-1]
    edge = torch.ones_like(ids[:, :1], dtype=torch.bool)
    start = torch.where(torch.cat((edge, differs), 1), t, 0).cummax(1).values
    end = torch.where(torch.cat((differs, edge), 1), t + 1, T).flip(1).cummin(1).values.flip(1)
    latest = torch.where(live, t, -1).cummax(1).values
    first = ids.gather(1, live.long().argmax(1, keepdim=True))
    alive = torch.where(latest < 0, first, ids.gather(1, latest.clamp(min=0)))
    return Documents(ids, live, torch.where(live, t - start, 0), end - t, torch.cat((first, alive), 1))


def lagging(docs: Documents | None, T: int, window: int | None) -> tuple[int, Groups | None]:
    """How many keys, from the first, the linear branch reads at all, and who reads which.

    The keys are shifted by the window: key j is read by queries behind j + w of its document. The last w tokens of a
    document stay out of its state (RLA-6), and no query of the document reads them.
    """
    w = T if window is None else max(window, 0)
    J = max(T - w, 0)
    if docs is None:
        return J, None
    owners = torch.where(docs.live & (docs.left > w), docs.ids, -1)[:, :J]
    return J, Groups(docs.ids, owners, docs.alive[:, : J + 1])
