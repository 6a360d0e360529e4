"""Made for measuring: indices of known numbers of tiles, keys and blocks; keys that stand out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparse_compiler.codegen.attention_work import Covered
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.ir.shape import SiteShape

__all__ = ["BandPlan", "band_index", "block_index", "with_few_directions"]

_DIRECTIONS = 16
_SPREAD = 4.0


@dataclass(frozen=True)
class BandPlan:
    """What every head's band holds.

    Args:
        tiles: whole tiles, side by side.
        edges, edge_keys: short ranges after them, and keys in each.
        columns: single keys, evenly spread.
    """

    tiles: int = 0
    edges: int = 0
    edge_keys: int = 16
    columns: int = 0


def _int32(values: list[int] | np.ndarray, heads: int, device: torch.device) -> Tensor:
    """The same list for every slot, int32 [1, heads, count], at least one place wide."""
    row = torch.tensor(np.asarray(values, dtype=np.int32), device=device)
    if row.numel() == 0:
        row = row.new_zeros(1)
    return row.expand(1, heads, -1).contiguous()


def _count(number: int, heads: int, device: torch.device) -> Tensor:
    return torch.full((1, heads), number, dtype=torch.int32, device=device)


def band_index(
    shape: SiteShape, geometry: Geometry, plan: BandPlan, device: torch.device
) -> tuple[AttentionIndex, Covered]:
    """An index whose heads all hold ``plan``, and its pairs over all heads; causal, batch 1."""
    size_q, size_k, heads = geometry.block_q, geometry.block_k, shape.heads
    space = geometry.distance_size(shape.num_q)
    near = size_q + size_k - 1
    tiles = near + size_k * np.arange(plan.tiles)
    tiles = tiles[tiles < space]
    after = (int(tiles[-1]) if len(tiles) else near) + 1
    edges = after + plan.edge_keys + (plan.edge_keys + 1) * np.arange(plan.edges)
    edges = edges[edges < space]
    columns = np.unique(np.linspace(0, shape.num_k - 1, plan.columns).astype(np.int64))
    lanes = (edges[:, None] - np.arange(plan.edge_keys)[None, :]).reshape(-1)
    covered = torch.zeros(1, heads, space, dtype=torch.uint8, device=device)
    ranges = (tiles[:, None] - np.arange(size_k)[None, :]).reshape(-1)
    marked = torch.tensor(np.concatenate([ranges, lanes]), device=device)
    covered[:, :, marked] = 1
    index = AttentionIndex(
        full=_int32(tiles, heads, device),
        num_full=_count(len(tiles), heads, device),
        edge=_int32(edges, heads, device),
        edge_len=_int32([plan.edge_keys] * len(edges), heads, device),
        num_edge=_count(len(edges), heads, device),
        columns=_int32(columns, heads, device),
        num_columns=_count(len(columns), heads, device),
        covered=covered,
        blocks=torch.zeros(
            1, 0, geometry.num_row_blocks(shape.num_q), 0, dtype=torch.int32, device=device
        ),
        num_blocks=torch.zeros(
            1, 0, geometry.num_row_blocks(shape.num_q), dtype=torch.int32, device=device
        ),
        slots=_slots(heads, 0, device),
    )
    ends = np.arange(size_q, geometry.num_row_blocks(shape.num_q) * size_q + 1, size_q)
    ends = ends + geometry.q_offset
    # A tile that reaches past the first key is worked at whole.
    whole = np.searchsorted(np.sort(tiles - size_k), ends, side="left").sum() * size_k
    single = np.searchsorted(np.sort(lanes), ends, side="right").sum()
    column = np.searchsorted(columns, ends, side="left").sum()
    pairs = float(size_q * heads)
    return index, Covered(
        wanted=pairs * float(whole + single + column),
        whole=pairs * float(whole),
        edge=pairs * float(single),
        columns=pairs * float(column),
    )


def block_index(
    shape: SiteShape, geometry: Geometry, blocks: int, device: torch.device
) -> tuple[AttentionIndex, Covered]:
    """An index with up to ``blocks`` evenly spread key blocks a row block; causal, batch 1."""
    size_q, size_k, heads = geometry.block_q, geometry.block_k, shape.heads
    rows = geometry.num_row_blocks(shape.num_q)
    ends = geometry.q_offset + size_q * np.arange(1, rows + 1)
    visible = np.minimum(-(-ends // size_k), geometry.num_key_blocks(shape.num_k))
    counts = np.minimum(visible, blocks)
    lists = np.zeros((rows, blocks), dtype=np.int32)
    for row in range(rows):
        count = counts[row]
        lists[row, :count] = np.arange(count) * visible[row] // count
    listed = torch.tensor(lists, device=device).expand(1, heads, -1, -1).contiguous()
    number = torch.tensor(counts.astype(np.int32), device=device)
    none = torch.zeros(1, 0, 0, dtype=torch.int32, device=device)
    zero = torch.zeros(1, 0, dtype=torch.int32, device=device)
    index = AttentionIndex(
        full=none,
        num_full=zero,
        edge=none,
        edge_len=none,
        num_edge=zero,
        columns=none,
        num_columns=zero,
        covered=none.to(torch.uint8),
        blocks=listed,
        num_blocks=number.expand(1, heads, -1).contiguous(),
        slots=_slots(heads, 1, device),
    )
    pairs = float(size_q * size_k * heads) * float(counts.sum())
    return index, Covered(wanted=pairs, blocks=pairs)


def with_few_directions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Random queries and keys, changed so that each row has keys that stand out.

    Logits of plain random inputs are all alike: no key holds a share of a row's mass, lists stay
    empty, and choosing among many blocks would cost nothing. With most of the norm in few directions
    logits spread by 4 (standard deviation), and lists are as long as they may be.

    Args:
        q, k: [B, H, L, D] of independent normal entries; changed in place.
    """
    for tensor in (q, k):
        directions = min(_DIRECTIONS, tensor.shape[-1])
        factor = (_SPREAD * math.sqrt(tensor.shape[-1] / directions)) ** 0.5
        tensor[..., :directions] *= factor
    return q, k


def _slots(heads: int, component: int, device: torch.device) -> Tensor:
    slots = torch.full((heads, 2), -1, dtype=torch.int32, device=device)
    slots[:, component] = torch.arange(heads, dtype=torch.int32, device=device)
    return slots
