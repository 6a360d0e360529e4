"""Material for tests of patterns, executors and kernels: inputs with structure, indices, tolerances.

For this package's own tests and for those of plug-ins. Everything is made from a seed, so that a
failing case can be written down as a few integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import Limits

__all__ = [
    "POISON",
    "Layout",
    "assert_close",
    "assert_lse_close",
    "parameters",
    "random_index",
    "random_qkv",
    "sparse_attention",
    "tolerance",
]

Layout = Literal["contiguous", "tokens_first", "gaps", "reversed_heads"]

POISON = 2**30 + 12345
"""What lists hold past their counts: whoever reads it faults or shows."""


def tolerance(dtype: torch.dtype, length: int) -> float:
    """Allowed difference of two attentions over ``length`` keys whose values are of order 1.

    One rounding of weights and output in ``dtype``; sums in float32 (float64 for float64), whose
    error grows like the root of their length, with room for scores of magnitude about 20.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums = 16 * torch.finfo(wide).eps * math.sqrt(length + 16)
    return sums if dtype == wide else 2 * torch.finfo(dtype).eps + sums


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    length: int,
    dtype: torch.dtype | None = None,
    equal_nan: bool = False,
) -> None:
    """Compare attention outputs within ``tolerance``, relative to the largest expected value.

    Args:
        actual, expected: same shape; compared in float64.
        length: keys that a row may sum over.
        dtype: of the arithmetic under test, where it is not the dtype of ``actual``.
        equal_nan: NaN agrees with NaN.
    """
    finite = expected[torch.isfinite(expected)]
    size = max(1.0, float(finite.abs().max()) if finite.numel() else 1.0)
    bound = tolerance(dtype or actual.dtype, length) * size
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0.0, atol=bound, equal_nan=equal_nan
    )


def assert_lse_close(
    actual: Tensor, expected: Tensor, *, length: int, dtype: torch.dtype = torch.float32
) -> None:
    """Compare log-sum-exps: -inf in the same rows, the others within the scores' rounding."""
    assert actual.dtype == torch.float32, f"lse is float32, got {actual.dtype}"
    # Always summed in float32; products of low-precision operands are exact there.
    bound = 4 * tolerance(torch.float32, length)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=bound, atol=bound)


def _laid_out(tensor: Tensor, layout: Layout) -> Tensor:
    """The same values with other strides; the last dimension stays dense."""
    if layout == "tokens_first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "gaps":
        batch, heads, length, dim = tensor.shape
        room = tensor.new_full((batch, heads, length + 2, dim + 5), float("nan"))
        view = room[:, :, 1 : length + 1, 3 : dim + 3]
        view.copy_(tensor)
        return view
    if layout == "reversed_heads":
        # Strides do not fall from left to right, as after a permute of (heads, batch).
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor.contiguous()


def random_qkv(
    seed: int,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    num_q: int = 128,
    num_k: int = 128,
    dim: int = 32,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "contiguous",
    sinks: int = 4,
    columns: int = 3,
    slashes: int = 2,
    local: int = 8,
    strength: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose attention looks like a long prompt's, from a seed.

    Args:
        sinks, columns: first keys, and keys at random places, that every query looks at.
        slashes: random distances at which queries look at single keys.
        local: nearest keys that share a code with their query.
        strength: size of the structure against noise of size 1; 0 is noise alone.
    Returns:
        q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv]; row i has position Lk - Lq + i.
    """
    draw = torch.Generator().manual_seed(seed)
    groups, value_dim = heads // max(1, kv_heads), value_dim or dim
    q = torch.randn(batch, heads, num_q, dim, generator=draw)
    k = torch.randn(batch, kv_heads, num_k, dim, generator=draw)
    v = torch.randn(batch, kv_heads, num_k, value_dim, generator=draw)
    popular = torch.randn(dim, generator=draw)
    codes = torch.randn(kv_heads, num_k, dim, generator=draw)
    if strength and num_k and num_q:
        k += strength / 2 * codes
        heavy = torch.randint(num_k, (columns,), generator=draw)
        k[:, :, torch.cat([torch.arange(min(sinks, num_k)), heavy])] += strength * popular
        q += popular
        position = torch.arange(num_q) + num_k - num_q
        far = torch.randint(num_k, (slashes,), generator=draw).tolist()
        for distance in [*far, *range(local)]:
            weight = strength / 2 if distance in far else strength / (2 * local)
            key = (position - distance).clamp(0, num_k - 1)
            q += weight * codes.repeat_interleave(groups, dim=0)[:, key]
    q, k, v = (_laid_out(tensor.to(dtype), layout) for tensor in (q, k, v))
    return q, k, v


def _padded(lists: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
    values = [[*row, *[POISON] * (width - len(row))] for row in lists]
    counts = torch.tensor([len(row) for row in lists], dtype=torch.int32)
    return torch.tensor(values, dtype=torch.int32).view(len(lists), width), counts


def _band(covered: list[int], geometry: Geometry) -> tuple[list[int], list[int], list[int]]:
    """Cut covered distances into whole tiles that nothing can cut, and tested tiles."""
    size_q, size_k, last = geometry.block_q, geometry.block_k, len(covered)
    full, edge, lengths, x = [], [], [], 1
    while x < last:
        length = 0
        while length < size_k and x + length < last and covered[x + length]:
            length += 1
        if length:
            far = x + length - 1
            before = geometry.right < 0 or x >= size_q - geometry.right
            inside = geometry.left < 0 or far <= geometry.left + 1
            if length == size_k and before and inside:
                full.append(far)
            else:
                edge.append(far)
                lengths.append(length)
        x += max(1, length)
    return full, edge, lengths


def random_index(
    seed: int,
    geometry: Geometry,
    *,
    batch: int,
    num_q: int,
    num_k: int,
    kinds: Sequence[Literal["band", "blocks", "none"]] = ("band", "blocks"),
    share: float = 0.2,
) -> AttentionIndex:
    """A legal index that no pattern would make: random tiles, columns and blocks, some rows empty.

    Args:
        kinds: for each query head, the part of the index that it uses.
        share: about this share of distances, columns and blocks is kept.
    Returns:
        Lists padded with ``POISON``; no key is covered twice.
    """
    draw = torch.Generator().manual_seed(seed)
    bands, listed = (sum(kind == name for kind in kinds) for name in ("band", "blocks"))
    size, row_blocks = geometry.distance_size(num_q), geometry.num_row_blocks(num_q)
    run = torch.rand(batch * bands, size, generator=draw) < share / 8
    # Runs of random length, so that tiles are partial as often as whole.
    stretch = int(torch.randint(1, 2 * geometry.block_k + 1, (1,), generator=draw))
    covered = torch.zeros(batch * bands, size, dtype=torch.uint8)
    for shift in range(min(stretch, size)):
        covered[:, shift:] |= run[:, : size - shift].to(torch.uint8)
    covered[:, 0] = 0
    tiles = [_band(row.tolist(), geometry) for row in covered]
    picked = torch.rand(batch * bands, num_k, generator=draw) < share
    chosen = (
        torch.rand(batch * listed * row_blocks, geometry.num_key_blocks(num_k), generator=draw)
        < 2 * share
    )
    parts: dict[str, Tensor] = {"covered": covered.view(batch, bands, size)}
    lists = {
        "full": ([t[0] for t in tiles], (batch, bands)),
        "edge": ([t[1] for t in tiles], (batch, bands)),
        "edge_len": ([t[2] for t in tiles], (batch, bands)),
        "columns": ([r.nonzero()[:, 0].tolist() for r in picked], (batch, bands)),
        "blocks": ([r.nonzero()[:, 0].tolist() for r in chosen], (batch, listed, row_blocks)),
    }
    for name, (values, shape) in lists.items():
        width = max((len(row) for row in values), default=0) + 1
        filled, counts = _padded(values, width)
        parts[name] = filled.view(*shape, width)
        if name != "edge_len":
            parts[f"num_{name}"] = counts.view(shape)
    return AttentionIndex(slots=_slots(kinds), **parts)


def _slots(kinds: Sequence[str]) -> Tensor:
    slots = torch.full((len(kinds), 2), -1, dtype=torch.int32)
    for column, name in enumerate(("band", "blocks")):
        for slot, head in enumerate(h for h, kind in enumerate(kinds) if kind == name):
            slots[head, column] = slot
    return slots


def parameters(heads: Sequence[HeadPattern], *, causal: bool = True) -> Tensor:
    """The parameter tensor of the operators, int32 [Hq, 5], one slot for each head.

    ``causal``: the mask is; else every slot is a block slot.
    """
    patterns = [registry.get(head.name) for head in heads]
    slots = _slots([pattern.component_for(causal) for pattern in patterns]).tolist()
    rows = [
        [pattern.number, head.first, head.second, *slot]
        for pattern, head, slot in zip(patterns, heads, slots, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int32).view(len(heads), 5)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Sequence[HeadPattern],
    geometry: Geometry,
    *,
    executor: str = "reference",
    scale: float | None = None,
    softcap: float = 0.0,
    budget: float = -1.0,
    min_tokens: int = 0,
    rows: Tensor | None = None,
    key_mask: Tensor | None = None,
    bounds: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    site: int = -1,
    causal: bool | None = None,
) -> tuple[Tensor, Tensor, AttentionIndex]:
    """The three operators one after the other, as a rewritten graph calls them.

    Args:
        heads: pattern of each query head.
        geometry: band of the mask, and the blocking to ask for.
        executor, budget, min_tokens, rows, key_mask, bounds, bias, sinks, site: as in ``sparse_compiler.ops``.
        causal: False puts every head into a block slot; None asks the geometry.
    Returns:
        (out, lse, index).
    """
    import sparse_compiler.runtime.dispatch  # noqa: F401 - installs the implementations

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    used = [registry.get(name) for name in dict.fromkeys(head.name for head in heads)]
    # The band holds causal masks only.
    causal = geometry.right == 0 if causal is None else causal
    limits = Limits()
    for head in heads:
        pattern = registry.get(head.name)
        limits = limits.join(pattern.limits(head, geometry.block_q, geometry.block_k, causal))
    if budget >= 0:
        limits = Limits(-1, -1, -1)
    params = parameters(heads, causal=causal).to(q.device)
    counts = [int((params[:, column] >= 0).sum()) for column in (3, 4)]
    band = (rows, key_mask, bounds, bias, geometry.q_offset, geometry.left, geometry.right)
    blocking = (geometry.block_q, geometry.block_k)
    choice = (budget, min_tokens, executor, site)
    ops = torch.ops.sparse_compiler
    group = registry.summary_group(used, geometry.block_k)
    summary = ops.summarize_keys(k, rows, key_mask, group, *choice)
    index = ops.select(
        *(q, k, summary, params, *band, scale, *blocking),
        *([p.number for p in used], counts),
        [limits.columns, limits.distances, limits.blocks],
        *choice,
    )
    out, lse = ops.attend(q, k, v, *index, *band, scale, softcap, sinks, *blocking, *choice)
    return out, lse, AttentionIndex(*index)
