"""What estimators of key blocks share: bounds of their lists, what is always kept, and the cut."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compiler.ir.index import automatic_blocks, capacity_blocks
from sparse_compiler.patterns.base import SelectRequest
from sparse_compiler.patterns.block_sparse import PUBLISHED_BLOCK
from sparse_compiler.patterns.two_sided import sink_blocks
from sparse_compiler.patterns.visible import bias_of_rows, row_intervals

__all__ = [
    "CHUNK",
    "PEAKS",
    "PEAK_WHOLE",
    "budget_blocks",
    "density_of_blocks",
    "edge_blocks",
    "first_blocks",
    "keep_best_blocks",
    "keep_share",
    "pooled_bias",
    "real_rows",
    "wanted_for_share",
]

CHUNK = 1 << 24
"""The most elements of a large tensor that are looked at together."""
PEAKS = 4
"""A key block is taken to hold as much mass as so many keys like its best; see ``low_rank_recall``."""
PEAK_WHOLE = 1 << 30
"""All of a row's mass, where blocks' masses are summed as integers; each fits into 32 bits."""

#: Shares of a mass are summed as integers of this unit, so that no order of the sum shows.
_WHOLE = 1 << 32
_LARGEST = torch.finfo(torch.float32).max


def budget_blocks(budget: float, num_keys: int, causal: bool) -> int:
    """Blocks of 64 keys that come near ``budget`` of the allowed pairs; at least 2."""
    # A row of a causal mask sees half of the keys.
    seen = num_keys / 2 if causal else num_keys
    return max(2, round(budget * seen / PUBLISHED_BLOCK))


def density_of_blocks(second: int, num_keys: int, block_q: int) -> float:
    """Most of the causal pairs that ``second`` blocks of 64 keys take; 0 grows with the length."""
    most = second or automatic_blocks(num_keys, PUBLISHED_BLOCK)
    # The first key's block and a row block's own ones are kept whatever the number says.
    return min(1.0, 2 * ((most + 1) * PUBLISHED_BLOCK + block_q) / num_keys)


def first_blocks(request: SelectRequest) -> Tensor:
    """Blocks of the first key that a row may see, bool [B, row blocks or 1, key blocks]."""
    return sink_blocks(request, torch.ones_like(request.heads[:1]))


def edge_blocks(request: SelectRequest) -> Tensor:
    """Blocks of the first visible key and of each row's last one, bool [B, row blocks, key blocks].

    A group that reaches past what a row sees is never scored for it; its block is kept instead.
    """
    geometry, num_q = request.geometry, request.q.shape[2]
    blocks = geometry.num_key_blocks(request.k.shape[2])
    low, high = row_intervals(geometry, num_q, request.rows, request.bounds)
    place = torch.where(low <= high, high // geometry.block_k, blocks).clamp(0, blocks)
    pad = -num_q % geometry.block_q
    place = torch.nn.functional.pad(place, (0, pad), value=blocks).unflatten(
        1, (-1, geometry.block_q)
    )
    last = torch.zeros(*place.shape[:2], blocks + 1, dtype=torch.bool, device=place.device)
    return last.scatter_(2, place, True)[..., :blocks] | first_blocks(request)


def keep_best_blocks(
    request: SelectRequest, slot: int, scores: Tensor, wanted: Tensor, always: Tensor, own: Tensor
) -> Tensor:
    """Wanted blocks, of each row block no more than the slot's ``second`` allows, the best of them.

    Args:
        scores: float32 [B, row blocks, key blocks], without NaN.
        wanted, always, own: bool like ``scores``, each holds the next one. What is ``always`` kept
            counts, and is kept beyond the number too; where even the list is too short for it,
            ``own`` blocks go first.
    """
    found, most = _ranked(request, slot, scores.masked_fill(~wanted, -math.inf), always, own)
    rank = torch.arange(found.shape[-1], device=scores.device)
    kept = torch.zeros_like(wanted).scatter_(-1, found, (rank < most).expand(found.shape))
    return kept & wanted


def keep_share(
    request: SelectRequest,
    slot: int,
    share: Tensor,
    mass: Tensor,
    visible: Tensor,
    always: Tensor,
    own: Tensor,
) -> Tensor:
    """The fewest blocks that hold a share of a row block's mass together with those always kept.

    Args:
        share: int64, per mille; from 1000 on every visible block is wanted.
        mass: float32 [B, row blocks, key blocks], not negative; inf is kept, and is no mass.
        visible, always, own: bool like ``mass``, each holds the next one; see ``keep_best_blocks``.
    """
    found, most = _ranked(request, slot, mass.masked_fill(~visible, -math.inf), always, own)
    rank = torch.arange(found.shape[-1], device=mass.device)
    finite = mass.masked_fill((mass == math.inf) | ~visible, 0.0)
    total = finite.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    parts = (finite.gather(-1, found) / total * _WHOLE).long()
    before = parts.cumsum(-1) - parts
    needed = (before < share * _WHOLE // 1000) | (share >= 1000)
    needed = needed | ((mass == math.inf) | always).gather(-1, found)
    kept = torch.zeros_like(visible).scatter_(-1, found, needed & (rank < most))
    return kept & visible


def wanted_for_share(share: Tensor, scores: Tensor, visible: Tensor, always: Tensor) -> Tensor:
    """Blocks that stay when others go, the least first, while what goes may.

    A block counts for ``PEAKS`` times its best key, and for no more than all of a row's mass. What
    goes may add up to the rest of ``share``, of all mass, or of the sum over the row block's blocks
    where that is less: attention that is broad everywhere shows as a small sum.

    Args:
        share: int64, per mille; from 1000 on every block with a score stays.
        scores: float32 [B, row blocks, key blocks], logs of the mass of blocks' best keys, without
            NaN; -inf where no row sees a key.
        visible, always: bool like ``scores``. What is always kept is no loss.
    Returns:
        bool like ``scores``; of equal scores the last blocks go first.
    """
    known = visible & (scores > -math.inf)
    mass = (scores + math.log(PEAKS)).clamp(max=0.0).exp() * PEAK_WHOLE
    mass = torch.where(known, mass, 0.0).long()
    total = mass.sum(-1, keepdim=True).clamp(max=PEAK_WHOLE)
    allowed = torch.where(share >= 1000, -1, (1000 - share) * total // 1000)
    loose = known & ~always
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    parts = torch.where(loose, mass, 0).gather(-1, order)
    lost = parts.flip(-1).cumsum(-1).flip(-1)
    stays = torch.zeros_like(loose).scatter_(-1, order, lost > allowed)
    return (loose & stays) | always


def _ranked(
    request: SelectRequest, slot: int, scores: Tensor, always: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Places of the best blocks in falling order, as many as a list holds, and how many may stay.

    Returns:
        int64 [B, row blocks, count] and int64 [B, row blocks, 1].
    """
    num_k, block_k = request.k.shape[2], request.geometry.block_k
    ranked = scores.clamp(max=_LARGEST / 2).masked_fill(always, _LARGEST)
    ranked = ranked.masked_fill(own & always, math.inf)
    automatic = min(scores.shape[-1], automatic_blocks(num_k, block_k))
    second = request.second[slot]
    asked = (second * PUBLISHED_BLOCK + block_k - 1) // block_k
    most = torch.where(second > 0, asked, automatic)
    count = capacity_blocks(request.limits.blocks, num_k, block_k)
    found = torch.topk(ranked, count, dim=-1, sorted=True).indices
    return found, torch.maximum(most, always.sum(-1, keepdim=True))


def real_rows(request: SelectRequest) -> tuple[Tensor, Tensor]:
    """First row and end of the rows that are no padding, int64 [B] each; end <= first for none.

    Where rows and keys are the same tokens, as they are under a causal mask, the keys that padding
    hides are rows without a meaning.
    """
    rows, geometry = request.rows.long(), request.geometry
    start, stop = rows[:, 0], rows[:, 0] + rows[:, 1]
    if geometry.right == 0 or request.q.shape[2] + geometry.q_offset == request.k.shape[2]:
        start = torch.maximum(start, rows[:, 3] - rows[:, 2])
        stop = torch.minimum(stop, rows[:, 3] + rows[:, 4] - rows[:, 2])
    return start, stop


def pooled_bias(request: SelectRequest, head: Tensor, row: Tensor, size: int) -> Tensor:
    """Logarithm of the mean of exp(bias) over pairs that are seen, by runs of rows and key blocks.

    Args:
        request: with a bias.
        head: int64 [1], a query head.
        row: int64 [B, R] addresses of rows; those from Lq on see nothing.
        size: rows of a run, a divisor of R.
    Returns:
        float32 [B, R / size, key blocks]; -inf where no pair is seen or the bias hides all.
    """
    assert request.bias is not None
    num_q, num_k = request.q.shape[2], request.k.shape[2]
    at = row.clamp(max=num_q - 1)
    low, high = row_intervals(request.geometry, num_q, request.rows, request.bounds)
    low, high = (t.gather(1, at)[..., None] for t in (low, high))
    key = torch.arange(num_k, device=row.device)
    seen = (key >= low) & (key <= high) & (row < num_q)[..., None]
    if request.key_mask is not None:
        seen &= request.key_mask[:, None]
    bias = bias_of_rows(request.bias, head, at, num_q, num_k).float()
    bias = bias.masked_fill(~seen, -math.inf)

    def tiles(values: Tensor, nothing: float) -> Tensor:
        pad = (0, -num_k % request.geometry.block_k)
        values = torch.nn.functional.pad(values, pad, value=nothing)
        return values.unflatten(2, (-1, request.geometry.block_k)).unflatten(1, (-1, size))

    count = tiles(seen, False).sum((2, 4)).clamp(min=1)
    return tiles(bias, -math.inf).logsumexp((2, 4)) - count.log()
