"""Antidiagonal: key blocks by sums of logits along antidiagonals of small tiles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compiler.patterns.base import BlockChoice, SelectRequest
from sparse_compiler.patterns.listed import Listed
from sparse_compiler.patterns.ranking import CHUNK, edge_blocks, keep_share
from sparse_compiler.patterns.relation import request_relation
from sparse_compiler.patterns.visible import bias_of_rows, row_intervals, visible_keys

__all__ = ["STRIDE", "Antidiagonal", "tile_mass"]

STRIDE = 16
"""Rows and keys of a tile."""


class Antidiagonal(Listed):
    """Keep the fewest key blocks that hold ``first`` per mille of a row block's antidiagonal mass.

    Rows and keys are cut into tiles of 16 x 16. A tile counts as the mean of the 16 logits on its
    antidiagonal, which every column through the tile meets, and every other diagonal; a softmax over
    a row of tiles makes them shares, summed over the row block and the key block. ``second`` is the
    most key blocks of 64 keys that a row block keeps; 0 lets this grow with the length. A row block's
    own blocks and those of the first and of each row's last visible key are always kept.

    Source: XAttention (arXiv 2503.16428) with stride 16, its reversed queries and its shares; not its
    search for the smallest share of each head.

    Costs 1/16 of dense attention's score products. Misses pairs off the antidiagonals: a key that one
    row alone wants is seen in one of 16 places; a diagonal at an even distance passes between the
    pairs of every antidiagonal; and a lone column shows only by 1/16 of its logit. Tiles follow
    addresses, so that an offset moves what is seen. Under a causal mask the
    choice for a row block depends on nothing after it.
    """

    name = "antidiagonal"
    number = 8
    usual = 900
    widest = 1000
    is_share = True

    def choose(self, request: SelectRequest) -> BlockChoice:
        visible, own = request_relation(request)
        always = (own | edge_blocks(request)) & visible
        kept = [
            keep_share(
                *(request, slot, request.first[slot], tile_mass(request, slot)),
                *(visible, always, own),
            )
            for slot in range(request.heads.shape[0])
        ]
        return BlockChoice(torch.stack(kept, 1))


def tile_mass(request: SelectRequest, slot: int) -> Tensor:
    """Estimated mass of each key block for a row block, summed over its rows of tiles.

    Returns:
        float32 [B, row blocks, key blocks]; inf where a NaN or inf is seen.
    """
    geometry, num_q, num_k = request.geometry, request.q.shape[2], request.k.shape[2]
    size = math.gcd(STRIDE, geometry.block_q, geometry.block_k)
    head = request.heads[slot : slot + 1]
    low, high = row_intervals(geometry, num_q, request.rows, request.bounds)
    real = low <= high
    queries = torch.where(real[..., None], request.q.index_select(1, head)[:, 0], 0)
    shown = visible_keys(request.rows, request.key_mask, num_k, size)
    keys = request.k.index_select(1, head // (request.q.shape[1] // request.k.shape[1]))[:, 0]
    keys = torch.nn.functional.pad(keys, (0, 0, 0, shown.shape[1] - num_k))
    keys = torch.where(shown[..., None], keys, 0).float()
    # Key t of a tile meets row size - 1 - t: side by side they are one long vector each.
    keys = keys.unflatten(1, (-1, size)).flatten(2).transpose(-1, -2)
    shown = shown.unflatten(1, (-1, size)).float().transpose(-1, -2)
    seen = _Seen(request, size, low, high)
    step = max(1, CHUNK * size // (keys.shape[0] * keys.shape[2] * geometry.block_q))
    parts = []
    for first in range(0, num_q, step * geometry.block_q):
        rows = slice(first, min(num_q, first + step * geometry.block_q))
        pad = -(rows.stop - rows.start) % geometry.block_q

        def reversed_rows(values: Tensor, rows: slice = rows, pad: int = pad) -> Tensor:
            padded = torch.nn.functional.pad(values[:, rows].float(), (0, 0, 0, pad))
            return padded.unflatten(1, (-1, size)).flip(2).flatten(2)

        count = torch.matmul(reversed_rows(real[..., None]), shown)
        logits = torch.matmul(reversed_rows(queries), keys) * request.scale / count.clamp(min=1)
        visible = seen.tiles(rows.start // size, count.shape[1]) & (count > 0)
        weight = count.log()
        if request.bias is not None:
            weight = weight + _tile_bias(request, head, rows, size)
        parts.append(_block_sums(request, logits, weight, visible))
    return torch.cat(parts, 1)


class _Seen:
    """Which tiles a row of tiles sees in any part.

    A tile that reaches past the last key that its row block sees is left out: ``edge_blocks`` has it.

    Args:
        size: rows and keys of a tile.
        low, high: of all rows, from ``row_intervals``.
    """

    def __init__(self, request: SelectRequest, size: int, low: Tensor, high: Tensor) -> None:
        num_k, geometry = request.k.shape[2], request.geometry
        pad = (0, -low.shape[1] % geometry.block_q)
        empty = low > high
        low = torch.nn.functional.pad(low.masked_fill(empty, num_k), pad, value=num_k)
        high = torch.nn.functional.pad(high.masked_fill(empty, -1), pad, value=-1)
        self._low = low.unflatten(1, (-1, size)).amin(-1, keepdim=True)
        self._high = high.unflatten(1, (-1, size)).amax(-1, keepdim=True)
        last = high.unflatten(1, (-1, geometry.block_q)).amax(-1)
        self._last = last.repeat_interleave(geometry.block_q // size, 1)[..., None]
        self._start = torch.arange(0, num_k, size, device=low.device)
        # The last tile ends with the last key that padding leaves.
        key_end = (request.rows[:, 3] + request.rows[:, 4]).long().clamp(max=num_k)
        self._end = torch.minimum(self._start + size, key_end[:, None, None]) - 1

    def tiles(self, first: int, count: int) -> Tensor:
        """bool [B, count, tiles of keys] for ``count`` rows of tiles from ``first`` on."""
        rows = slice(first, first + count)
        seen = (self._low[:, rows] <= self._end) & (self._start <= self._high[:, rows])
        return seen & (self._end <= self._last[:, rows])


def _block_sums(request: SelectRequest, logits: Tensor, weight: Tensor, visible: Tensor) -> Tensor:
    """Softmax over each row of tiles [B, G, H], summed to [B, row blocks, key blocks]."""
    geometry = request.geometry
    broken = ~logits.isfinite() | weight.isnan() | (weight == math.inf)
    logits = (logits + weight).masked_fill(~visible | broken, -math.inf)
    # A row of tiles that sees nothing gives NaN by softmax.
    mass = torch.softmax(logits, dim=-1).nan_to_num(0.0).masked_fill(broken & visible, math.inf)
    size = math.gcd(STRIDE, geometry.block_q, geometry.block_k)
    per_row, per_key = geometry.block_q // size, geometry.block_k // size
    mass = torch.nn.functional.pad(mass, (0, -mass.shape[2] % per_key))
    return mass.unflatten(2, (-1, per_key)).sum(3).unflatten(1, (-1, per_row)).sum(2)


def _tile_bias(request: SelectRequest, head: Tensor, rows: slice, size: int) -> Tensor:
    """Mean of the bias on each tile's antidiagonal without what is -inf, float32 [B, G, H].

    -inf where all of it is.
    """
    assert request.bias is not None
    batch, num_q, num_k = request.q.shape[0], request.q.shape[2], request.k.shape[2]
    row = torch.arange(rows.start, rows.stop, device=request.q.device).expand(batch, -1)
    bias = bias_of_rows(request.bias, head, row, num_q, num_k).float()
    pad = (0, -num_k % size, 0, -(rows.stop - rows.start) % request.geometry.block_q)
    bias = torch.nn.functional.pad(bias, pad, value=-math.inf)
    bias = bias.unflatten(2, (-1, size)).unflatten(1, (-1, size)).flip(2)
    bias = bias.diagonal(dim1=2, dim2=4)
    shown = bias != -math.inf
    count = shown.sum(-1)
    mean = torch.where(shown, bias, 0.0).sum(-1) / count.clamp(min=1)
    return torch.where(count > 0, mean, -math.inf)
