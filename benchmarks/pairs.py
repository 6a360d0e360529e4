"""Which pairs an index computes, counted and listed, and what they should give, on some rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compiler.errors import ShapeMismatch
from sparse_compiler.ir.index import AttentionIndex, Geometry

__all__ = ["Work", "attend_rows", "count_work", "error_on_rows", "keys_of_rows", "relative_error"]


@dataclass(frozen=True)
class Work:
    """Pairs of one layer: what the mask allows and, of those, what the index covers."""

    allowed: float
    covered: float

    @property
    def density(self) -> float:
        return self.covered / self.allowed


def _check(index: AttentionIndex, geometry: Geometry) -> None:
    plain = (geometry.q_offset, geometry.left, geometry.right) == (0, -1, 0)
    if not plain or index.full.shape[0] != 1:
        raise ShapeMismatch(
            "the mask and batch",
            "causal from the first key, batch 1",
            (geometry, index.full.shape[0]),
            where="pairs of an index",
        )


def count_work(index: AttentionIndex, geometry: Geometry, num_tokens: int) -> Work:
    """Pairs of one layer under a causal mask, exactly; any mix of band and block heads.

    Args:
        index: of batch 1.
        geometry: q_offset 0, left -1, right 0.
        num_tokens: N, rows and keys; any number.
    Raises:
        ShapeMismatch: another mask, or a batch.
    """
    _check(index, geometry)
    known: dict[tuple[int, int], int] = {}
    covered = 0
    slots = [(int(band), int(listed)) for band, listed in index.slots.tolist()]
    for band, listed in slots:
        if (band, listed) not in known:
            pairs = _band_pairs(index, band, geometry.block_q, num_tokens) if band >= 0 else 0
            if listed >= 0:
                pairs += _block_pairs(index, listed, geometry, num_tokens)
            known[band, listed] = pairs
        covered += known[band, listed]
    return Work(len(slots) * num_tokens * (num_tokens + 1) / 2, float(covered))


def _band_pairs(index: AttentionIndex, slot: int, size_q: int, num_tokens: int) -> int:
    """Row r = 1..M from the block's end sees a key at distance x from there if x >= r."""
    band = index.covered[0, slot].bool()
    device = band.device
    columns = index.columns[0, slot, : int(index.num_columns[0, slot])].long()
    x = torch.arange(band.shape[0], device=device)
    total = 0
    whole, left_over = divmod(num_tokens, size_q)
    ends = torch.arange(1, whole + 1, device=device) * size_q
    cases = [(ends, 0)]
    if left_over:
        cases.append((torch.full((1,), (whole + 1) * size_q, device=device), size_q - left_over))
    for stops, missing in cases:
        rows = torch.where(band, (x.clamp(max=size_q) - missing).clamp(min=0), 0)
        # Distance x = end is key 0; larger ones lie before it.
        total += int(rows.cumsum(0)[stops].sum())
        distance = stops[:, None] - columns[None, :]
        single = (distance > 0) & ~band[distance.clamp(min=0)]
        seen = (distance.clamp(max=size_q) - missing).clamp(min=0)
        total += int(torch.where(single, seen, 0).sum())
    return total


def _block_pairs(index: AttentionIndex, slot: int, geometry: Geometry, num_tokens: int) -> int:
    lists = index.blocks[0, slot].long()
    listed = torch.arange(lists.shape[1], device=lists.device) < index.num_blocks[0, slot, :, None]
    first_row = torch.arange(lists.shape[0], device=lists.device)[:, None] * geometry.block_q
    last_row = (first_row + geometry.block_q).clamp(max=num_tokens) - 1
    first_key = lists * geometry.block_k
    width = (num_tokens - first_key).clamp(max=geometry.block_k)

    def below(reach: Tensor) -> Tensor:
        """Pairs of rows that reach 1, 2, .. ``reach`` keys into the block."""
        reach = reach.clamp(min=0)
        inside = torch.minimum(reach, width)
        return inside * (inside + 1) // 2 + (reach - inside) * width

    pairs = below(last_row - first_key + 1) - below(first_row - first_key)
    return int(torch.where(listed, pairs, 0).sum())


def keys_of_rows(
    index: AttentionIndex, geometry: Geometry, head: int, rows: Tensor, num_keys: int
) -> Tensor:
    """The keys that the index and the causal mask give to some rows of a head.

    Args:
        index, geometry: as in `count_work`.
        rows: int64 [R] positions.
    Returns:
        bool [R, num_keys].
    """
    _check(index, geometry)
    band, listed = index.slots[head].tolist()
    key = torch.arange(num_keys, device=rows.device)
    seen = torch.zeros(len(rows), num_keys, dtype=torch.bool, device=rows.device)
    block = rows // geometry.block_q
    if band >= 0:
        covered = index.covered[0, band].bool()
        column = torch.zeros(num_keys, dtype=torch.bool, device=rows.device)
        column[index.columns[0, band, : int(index.num_columns[0, band])].long()] = True
        for number, end in enumerate(((block + 1) * geometry.block_q).tolist()):
            distance = end - key
            near = covered[distance.clamp(0, covered.shape[0] - 1)] & (distance > 0)
            seen[number] = near | column
    if listed >= 0:
        for number, row_block in enumerate(block.tolist()):
            count = int(index.num_blocks[0, listed, row_block])
            chosen = index.blocks[0, listed, row_block, :count].long()
            place = chosen[:, None] * geometry.block_k + torch.arange(
                geometry.block_k, device=rows.device
            )
            seen[number, place[place < num_keys]] = True
    return seen & (key <= rows[:, None])


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    index: AttentionIndex | None = None,
    geometry: Geometry | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of some rows in float32, one head at a time.

    Args:
        q: [1, Hq, N, D].  k, v: [1, Hkv, N, D].
        rows: int64 [R] positions.
        index, geometry: only the pairs that the index lists; None is every pair.
    Returns:
        out float32 [Hq, R, Dv], 0 where a row has no key; lse float32 [Hq, R].
    """
    groups, scale = q.shape[1] // k.shape[1], q.shape[3] ** -0.5
    outs, lses = [], []
    for head in range(q.shape[1]):
        keys, values = k[0, head // groups].float(), v[0, head // groups].float()
        if index is None or geometry is None:
            seen = torch.arange(k.shape[2], device=k.device)[None, :] <= rows[:, None]
        else:
            seen = keys_of_rows(index, geometry, head, rows, k.shape[2])
        scores = (q[0, head, rows].float() @ keys.T * scale).masked_fill(~seen, float("-inf"))
        lse = scores.logsumexp(-1)
        weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[:, None]).exp_()
        outs.append(weights @ values)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def relative_error(out: Tensor, want: Tensor, rows: Tensor) -> float:
    """Norm of the difference over the norm of ``want``; inf where the output is not finite.

    Args:
        out: [1, Hq, N, Dv].  want: float32 [Hq, R, Dv].  rows: int64 [R].
    """
    got = out[0][:, rows].float()
    if not bool(got.isfinite().all()):
        return math.inf
    return float((got - want).double().norm() / want.double().norm())


def error_on_rows(out: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> float:
    """Relative error of ``out`` at some rows against dense attention in float32."""
    return relative_error(out, attend_rows(q, k, v, rows)[0], rows)
