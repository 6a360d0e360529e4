"""Indices built by hand from random distances, columns and blocks; they share no code with patterns.

``python -c`` programs and pytest both import this file, so it depends on the contracts alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_compiler.ir.index import AttentionIndex, Geometry


@dataclass(frozen=True)
class Case:
    """Shapes and mask of one attention with a random index.

    Args:
        kinds: per query head ``band``, ``blocks`` or ``none`` (a head without any entry).
        padding: ``none``, ``left``, ``right``, ``ragged`` (each batch entry its own span and rows)
            or ``holes`` (keys hidden inside the span).
        spread: share of distances, columns and blocks that are kept.
    """

    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    num_q: int = 100
    num_k: int = 100
    dim: int = 32
    value_dim: int = 32
    left: int = -1
    right: int = 0
    block_q: int = 32
    block_k: int = 16
    kinds: tuple[str, ...] = ("band", "blocks")
    padding: str = "none"
    softcap: float = 0.0
    spread: float = 0.1
    dtype: torch.dtype = torch.float32
    layout: str = "bhld"
    seed: int = 0

    @property
    def geometry(self) -> Geometry:
        offset = self.num_k - self.num_q
        return Geometry(offset, self.left, self.right, self.block_q, self.block_k)

    @property
    def scale(self) -> float:
        return self.dim**-0.5


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    index: AttentionIndex
    rows: Tensor
    key_mask: Tensor | None

    def to(self, device: str) -> Inputs:
        moved = {
            name: tensor.to(device)
            for name in ("q", "k", "v", "rows")
            if isinstance(tensor := getattr(self, name), Tensor)
        }
        mask = None if self.key_mask is None else self.key_mask.to(device)
        index = AttentionIndex(*(t.to(device) for t in self.index.tensors()))
        return replace(self, **moved, index=index, key_mask=mask)


def _pad(lists: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, padded with a value that faults or shows when it is used."""
    width = max((len(row) for row in lists), default=0) + 1
    padded = [row + [2**30 - 7] * (width - len(row)) for row in lists]
    counts = torch.tensor([len(row) for row in lists], dtype=torch.int32)
    return torch.tensor(padded, dtype=torch.int32).view(len(lists), width), counts


def band_tiles(covered: Tensor, geometry: Geometry) -> tuple[list[int], list[int], list[int]]:
    """Cut the covered distances into (full, edge, edge_len); ranges end where the tiles do."""
    size_q, size_k = geometry.block_q, geometry.block_k
    full, edge, lengths = [], [], []
    x, size = 1, covered.shape[0]
    while x < size:
        if not covered[x]:
            x += 1
            continue
        length = 1
        while length < size_k and x + length < size and covered[x + length]:
            length += 1
        far = x + length - 1
        # Keys e - far .. e - x: the nearest lies before the first row, the farthest in its window.
        whole = length == size_k and (geometry.right < 0 or x + geometry.right >= size_q)
        whole = whole and (geometry.left < 0 or far <= geometry.left + 1)
        if whole:
            full.append(far)
        else:
            edge.append(far)
            lengths.append(length)
        x += length
    return full, edge, lengths


def make_index(case: Case, generator: torch.Generator) -> AttentionIndex:
    """A random index that covers no key twice."""
    geometry, spread = case.geometry, case.spread
    size_q, _size_k = geometry.block_q, geometry.block_k
    bands = [h for h, kind in enumerate(case.kinds) if kind == "band"]
    listed = [h for h, kind in enumerate(case.kinds) if kind == "blocks"]
    size = geometry.distance_size(case.num_q)
    row_blocks = geometry.num_row_blocks(case.num_q)
    key_blocks = geometry.num_key_blocks(case.num_k)
    covered = torch.zeros(case.batch, len(bands), size, dtype=torch.uint8)
    full, edge, lengths, columns, blocks = [], [], [], [], []
    for b in range(case.batch):
        for s in range(len(bands)):
            keep = torch.rand(size, generator=generator) < spread / 4
            keep[0] = True
            for distance in keep.nonzero()[:, 0].tolist():
                covered[b, s, distance + 1 : distance + 1 + size_q] = 1
            tiles = band_tiles(covered[b, s], geometry)
            full.append(tiles[0])
            edge.append(tiles[1])
            lengths.append(tiles[2])
            picked = torch.rand(case.num_k, generator=generator) < spread
            columns.append(picked.nonzero()[:, 0].tolist())
        for _ in range(len(listed) * row_blocks):
            chosen = torch.rand(key_blocks, generator=generator) < 3 * spread
            blocks.append(chosen.nonzero()[:, 0].tolist())
    tensors: dict[str, Tensor] = {"covered": covered}
    for name, lists, shape in (
        ("full", full, (case.batch, len(bands))),
        ("edge", edge, (case.batch, len(bands))),
        ("columns", columns, (case.batch, len(bands))),
        ("blocks", blocks, (case.batch, len(listed), row_blocks)),
    ):
        values, counts = _pad(lists)
        tensors[name] = values.view(*shape, values.shape[1] if values.ndim == 2 else 1)
        tensors[f"num_{name}"] = counts.view(shape)
    tensors["edge_len"] = _pad(lengths)[0].view(tensors["edge"].shape)
    slots = torch.full((case.heads, 2), -1, dtype=torch.int32)
    for column, heads in enumerate((bands, listed)):
        for slot, head in enumerate(heads):
            slots[head, column] = slot
    return AttentionIndex(slots=slots, **tensors)


def make_rows(case: Case) -> tuple[Tensor, Tensor | None]:
    """(rows, key_mask) of the case's padding."""
    num_q, num_k = case.num_q, case.num_k
    rows, mask = [], torch.ones(case.batch, num_k, dtype=torch.bool)
    for b in range(case.batch):
        start, length, kv_start, kv_len = 0, num_q, 0, num_k
        cut = (7 + 13 * b) % max(1, num_k // 2)
        if case.padding == "left":
            kv_start, kv_len = cut, num_k - cut
            start = min(cut, num_q - 1)
            length = num_q - start
        elif case.padding == "right":
            kv_len = num_k - cut
            length = max(1, num_q - cut)
        elif case.padding == "ragged":
            kv_start, kv_len = cut // 2, num_k - cut
            start, length = (b * 5) % num_q, 0 if b == 1 else num_q // 2
        elif case.padding == "holes" and b % 2 == 0:
            mask[b, cut::3] = False
        rows.append([start, length, num_k - num_q, kv_start, kv_len])
        mask[b, :kv_start] = False
        mask[b, kv_start + kv_len :] = False
    masked = case.padding in ("left", "holes")
    return torch.tensor(rows, dtype=torch.int32), mask if masked else None


def make_inputs(case: Case) -> Inputs:
    """Random q, k, v and index; the same for the same case."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(heads: int, length: int, dim: int) -> Tensor:
        if case.layout == "blhd":
            shape = (case.batch, length, heads, dim)
            return torch.randn(shape, generator=generator).to(case.dtype).transpose(1, 2)
        if case.layout == "padded":
            shape = (case.batch, heads, length, dim + 3)
            return torch.randn(shape, generator=generator).to(case.dtype)[..., 1 : dim + 1]
        return torch.randn(case.batch, heads, length, dim, generator=generator).to(case.dtype)

    q = draw(case.heads, case.num_q, case.dim)
    k = draw(case.kv_heads, case.num_k, case.dim)
    v = draw(case.kv_heads, case.num_k, case.value_dim)
    rows, key_mask = make_rows(case)
    return Inputs(q, k, v, make_index(case, generator), rows, key_mask)


def make_scales(case: Case) -> tuple[Tensor, Tensor]:
    """(k_scale, v_scale), float32 [B, Hkv], different for each head."""
    head = torch.arange(case.batch * case.kv_heads, dtype=torch.float32)
    head = head.view(case.batch, case.kv_heads)
    return 0.5 + 0.25 * head, 1.5 - 0.125 * head
