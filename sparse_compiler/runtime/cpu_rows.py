"""One row block of one head on the CPU: which of its keys need a test, and attention over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compiler.ir.index import Geometry
from sparse_compiler.runtime.cpu_tile import attend_tile, bias_tile
from sparse_compiler.runtime.merge import merge

__all__ = ["BatchEntry", "Logits", "attend_row_block"]

#: Past every key address.
_FAR = 1 << 40


@dataclass(frozen=True)
class BatchEntry:
    """One batch entry's view of the work; positions are global."""

    q: Tensor  # [Hq, Lq, D]
    k: Tensor  # [Hkv, Lk, D]
    v: Tensor  # [Hkv, Lk, Dv]
    q_start: int
    q_end: int
    q_offset: int
    kv_start: int
    kv_end: int
    key_mask: Tensor | None  # bool [Lk]; None if the span has no holes
    bounds: Tensor | None = None  # int32 [Lq, 2]
    bias: Tensor | None = None  # [Hq or 1, Lq or 1, Lk] or [Hq or 1, Lq + Lk - 1]


@dataclass(frozen=True)
class Logits:
    """What turns products of queries and keys into logits."""

    scale: float
    softcap: float


def attend_row_block(
    entry: BatchEntry,
    geometry: Geometry,
    head: int,
    m: int,
    near: Tensor,
    far: Tensor,
    logits: Logits,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attend one row block of one head and write its rows of ``out`` [Lq, Dv] and ``lse`` [Lq]."""
    begin = max(m * geometry.block_q, entry.q_start)
    stop = min((m + 1) * geometry.block_q, entry.q_end)
    if begin >= stop:
        return
    first = entry.q_offset + begin
    limits = None
    if entry.bounds is not None:
        limits = _limits(entry.bounds[begin:stop], geometry, first)
        near, far = _split(near, far, entry.bounds[begin:stop], limits)
    kv_head = head // (entry.q.shape[0] // entry.k.shape[0])
    q, k, v = entry.q[head, begin:stop], entry.k[kv_head], entry.v[kv_head]

    def attend(keys: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        bias = None
        if entry.bias is not None:
            bias = bias_tile(entry.bias, head, begin, stop, keys, entry.q.shape[1])
        tile = (q, k.index_select(0, keys), v.index_select(0, keys))
        return attend_tile(*tile, scale=logits.scale, softcap=logits.softcap, seen=seen, bias=bias)

    parts = []
    if far.numel():
        parts.append(attend(far, None))
    square = slice(first, first + stop - begin)
    if (
        _causal_square(geometry, near, first, stop - begin, limits)
        and not logits.softcap
        and entry.bias is None
    ):
        parts.append(attend_tile(q, k[square], v[square], scale=logits.scale, causal=True))
    elif near.numel():
        position = torch.arange(begin, stop)[:, None] + entry.q_offset
        parts.append(attend(near, _seen(geometry, near, position, limits)))
    if not parts:
        return
    result, log_sum = parts[0] if len(parts) == 1 else merge(*parts[0], *parts[1])
    out[begin:stop] = result
    lse[begin:stop] = log_sum


def _seen(
    geometry: Geometry, keys: Tensor, position: Tensor, limits: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Which of ``keys`` [n] each row sees by position [L, 1] and limits ([L], [L]): bool [L, n]."""
    seen = torch.ones(position.shape[0], keys.numel(), dtype=torch.bool)
    if geometry.right >= 0:
        seen &= keys <= position + geometry.right
    if geometry.left >= 0:
        seen &= keys >= position - geometry.left
    if limits is not None:
        seen &= (keys >= limits[0][:, None]) & (keys <= limits[1][:, None])
    return seen


def _limits(bounds: Tensor, geometry: Geometry, first: int) -> tuple[Tensor, Tensor]:
    """(low, high) of a row block's bounds [L, 2], far away where the band says as much already.

    A packed causal document says for each row "no key after mine"; without that its last square
    stays one causal square.
    """
    low, high = bounds.long().unbind(-1)
    position = torch.arange(first, first + bounds.shape[0])
    if geometry.right >= 0:
        implied = (high >= position + geometry.right) & (low <= high)
        high = high.masked_fill(implied, _FAR)
    if geometry.left >= 0:
        implied = (low <= position - geometry.left) & (low <= high)
        low = low.masked_fill(implied, -_FAR)
    return low, high


def _split(
    near: Tensor, far: Tensor, bounds: Tensor, limits: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Drop keys that no row's bounds show; far keys that some row's bounds hide are to be tested."""
    low, high = bounds.unbind(-1)
    some = low <= high
    if not bool(some.any()):
        return near[:0], far[:0]
    least, most = int(low[some].min()), int(high[some].max())
    near, far = (keys[(keys >= least) & (keys <= most)] for keys in (near, far))
    sure = (far >= int(limits[0].max())) & (far <= int(limits[1].min()))
    return torch.cat([near, far[~sure]]), far[sure]


def _causal_square(
    geometry: Geometry,
    near: Tensor,
    first: int,
    count: int,
    limits: tuple[Tensor, Tensor] | None,
) -> bool:
    """Whether ``near`` is the row block's own keys, and nothing but causality hides any of them."""
    unwindowed = geometry.left < 0 or geometry.left >= count - 1
    if geometry.right != 0 or not unwindowed or not _is_range(near, first, count):
        return False
    return limits is None or (
        int(limits[0].max()) <= first and int(limits[1].min()) >= first + count - 1
    )


def _is_range(keys: Tensor, first: int, count: int) -> bool:
    """Whether ``keys`` are distinct and exactly first .. first + count - 1, in any order."""
    return (
        keys.numel() == count and int(keys.min()) == first and int(keys.max()) == first + count - 1
    )
