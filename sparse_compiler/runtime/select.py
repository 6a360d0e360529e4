"""Summaries and indices: runs the patterns' estimators and lowers their choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_compiler import ops
from sparse_compiler.errors import PatternInvalid, PluginFailed
from sparse_compiler.ir.index import INDEX_FIELDS, AttentionIndex, Geometry
from sparse_compiler.patterns import lowering, registry
from sparse_compiler.patterns.base import (
    BandChoice,
    BandRule,
    BlockChoice,
    BlockRule,
    Pattern,
    SelectRequest,
)
from sparse_compiler.patterns.relation import block_relation
from sparse_compiler.patterns.visible import visible_keys
from sparse_compiler.plugin_loading import blamed
from sparse_compiler.runtime.executor import Executor

__all__ = ["default_rows", "empty_index", "full_index", "select_index", "summarize"]

Choice = TypeVar("Choice", BandChoice, BlockChoice)


def default_rows(
    batch: int, num_q: int, num_k: int, q_offset: int, key_mask: Tensor | None, device: torch.device
) -> Tensor:
    """The ``rows`` tensor of a plain or padded batch, int32 [B, 5]; no host synchronisation.

    With ``key_mask`` the key range is the span from its first to its last visible key; holes in
    between stay hidden by the mask itself. Made anew at each call: a tensor kept from one call to
    the next would belong to the stream, or to the CUDA graph's memory, that made it.
    """
    rows = torch.zeros(batch, 5, dtype=torch.int32, device=device)
    for column, value in ((1, num_q), (2, q_offset), (4, num_k)):
        if value:
            rows[:, column].fill_(value)
    if key_mask is None:
        return rows
    visible = key_mask.to(torch.uint8)
    first = visible.argmax(-1)
    last = num_k - visible.flip(-1).argmax(-1)
    rows[:, 3] = first.to(torch.int32)
    rows[:, 4] = torch.where(key_mask.any(-1), last - first, 0).to(torch.int32)
    return rows


def summarize(k: Tensor, rows: Tensor, key_mask: Tensor | None, group: int) -> Tensor:
    """Mean of the visible keys of each group of neighbours, [B, Hkv, groups, D] in k.dtype.

    A group without a visible key gets 0; selection never ranks it.
    """
    batch, heads, num_k, dim = k.shape
    groups = -(-num_k // group)
    weight = visible_keys(rows, key_mask, num_k, group).view(batch, 1, groups, group, 1)
    pad = groups * group - num_k
    keys = torch.nn.functional.pad(k, (0, 0, 0, pad)).view(batch, heads, groups, group, dim)
    total = torch.where(weight, keys, 0).sum(3, dtype=torch.float32)
    return (total / weight.sum(3).clamp(min=1)).to(k.dtype)


def _slot_heads(params: Tensor, column: int, num_slots: int) -> Tensor:
    """The query head that holds each slot, int64 [num_slots]; inverts a column of ``params``."""
    slots = params[:, column].long()
    heads = torch.arange(params.shape[0], device=params.device)
    place = torch.where(slots >= 0, slots, num_slots)
    return torch.zeros(num_slots + 1, dtype=torch.int64, device=params.device).scatter_(
        0, place, heads
    )[:num_slots]


def _numbers(
    pattern: Pattern,
    params: Tensor,
    heads: Tensor,
    budget: float,
    request: SelectRequest,
    *,
    as_blocks: bool,
) -> tuple[Tensor, Tensor]:
    """Both numbers of each slot's head, int64 [S]."""
    if budget < 0:
        return params[:, 1].long()[heads], params[:, 2].long()[heads]
    geometry, num_k = request.geometry, request.k.shape[2]
    # A band pattern in a block slot pays for whole blocks, whatever the mask.
    causal = geometry.right == 0 and not (as_blocks and pattern.component == "band")
    head = pattern.from_budget(budget, num_k, geometry.block_q, causal)
    return torch.full_like(heads, head.first), torch.full_like(heads, head.second)


def _index(*tensors: Tensor) -> AttentionIndex:
    """An index from its tensors in the order of ``INDEX_FIELDS``."""
    return AttentionIndex(**dict(zip(INDEX_FIELDS, tensors, strict=True)))


def select_index(
    request: SelectRequest,
    params: Tensor,
    pattern_ids: list[int],
    num_slots: list[int],
    limits: list[int],
    budget: float,
    executor: Executor | None = None,
) -> AttentionIndex:
    """Estimate and lower for all heads of a layer.

    Args:
        request: with ``heads``, ``first`` and ``second`` still to be filled per component.
        params, pattern_ids, num_slots, limits, budget: as in ``ops``.
        executor: may do the band in its own kernels; None leaves all to PyTorch operations.
    Raises:
        PatternInvalid: band slots under a mask that is not causal, or a pattern without a choice
            for it.
    """
    geometry, q, k = request.geometry, request.q, request.k
    if num_slots[0] and geometry.right != 0:
        raise PatternInvalid(
            f"the mask of {num_slots[0]} heads with slots in the band",
            "causal",
            f"left={geometry.left}, right={geometry.right}",
            fix="Give every head a block slot: Pattern.component_for(causal=False).",
        )
    num_q, num_k = q.shape[2], k.shape[2]
    if budget >= 1:
        slots = params[:, 3:5]
        return full_index(
            *(q, k, slots, request.rows, request.key_mask, geometry, num_slots, limits),
            bounds=request.bounds,
        )
    sizes = ops.capacities(
        num_q, num_k, geometry.q_offset, geometry.block_q, geometry.block_k, limits
    )
    patterns = [registry.by_number(number) for number in pattern_ids]
    listed = _list_blocks(request, params, patterns, num_slots, budget, sizes[4], executor)
    band = [pattern for pattern in patterns if pattern.component == "band"]
    rules = {p.rule.kind: p.rule for p in band if isinstance(p.rule, BandRule)}
    # Two patterns of one kind, or one without a rule: their own methods say what they choose.
    if executor is not None and num_slots[0] and geometry.right == 0 and len(rules) == len(band):
        numbers = _numbers_by_kind(band, budget, num_k, geometry.block_q)
        found = executor.select_band(request, params, rules, numbers, sizes[:4], num_slots[0])
        if found is not None:
            return _index(*found[:8], *listed, found[8])
    columns, distances = _choose_band(request, params, band, num_slots[0], budget)
    lists = lowering.lower_band(columns, distances, geometry, (sizes[0], sizes[1], sizes[2]))
    return _index(*lists, *listed, params[:, 3:5].contiguous())


def _numbers_by_kind(
    patterns: list[Pattern], budget: float, num_k: int, block_q: int
) -> Mapping[str, tuple[int, int]]:
    if budget < 0:
        return {}
    heads = {
        p.rule.kind: p.from_budget(budget, num_k, block_q)
        for p in patterns
        if isinstance(p.rule, BandRule)
    }
    return {kind: (head.first, head.second) for kind, head in heads.items()}


def _choose_band(
    request: SelectRequest, params: Tensor, patterns: list[Pattern], num_slots: int, budget: float
) -> tuple[Tensor, Tensor]:
    """Columns bool [B, S, Lk] and distances bool [B, S, X] that the patterns keep."""
    geometry, q = request.geometry, request.q
    num_k = request.k.shape[2]
    shape = (q.shape[0], num_slots)
    size = geometry.distance_size(q.shape[2])
    columns = torch.zeros(*shape, num_k, dtype=torch.bool, device=q.device)
    distances = torch.zeros(*shape, size, dtype=torch.bool, device=q.device)
    heads = _slot_heads(params, 3, num_slots)
    for pattern in patterns if num_slots else []:
        first, second = _numbers(pattern, params, heads, budget, request, as_blocks=False)
        asked = replace(request, heads=heads, first=first, second=second)
        choice = _chosen(pattern, pattern.choose, asked, BandChoice)
        mine = (params[:, 0].long()[heads] == pattern.number)[:, None]
        columns |= choice.columns & mine
        distances |= choice.distances & mine
    # Every row keeps its own position, whatever a plug-in chose.
    distances[..., 0] = True
    if request.key_mask is not None:
        columns &= request.key_mask[:, None]
    return columns, distances


def _chosen(
    pattern: Pattern,
    choose: Callable[[SelectRequest], Any],
    request: SelectRequest,
    kind: type[Choice],
) -> Choice:
    """What a pattern chooses.

    Raises:
        PluginFailed: that of a plug-in raised, or chose what nothing can be made of.
    """
    source = registry.source(pattern)
    if source is None:
        return choose(request)
    batch, slots = request.q.shape[0], request.heads.shape[0]
    num_q, num_k, geometry = request.q.shape[2], request.k.shape[2], request.geometry
    shapes = {
        "columns": (batch, slots, num_k),
        "distances": (batch, slots, geometry.distance_size(num_q)),
        "blocks": (batch, slots, geometry.num_row_blocks(num_q), geometry.num_key_blocks(num_k)),
    }
    with blamed(source, "it chooses", PatternInvalid, torch.OutOfMemoryError):
        choice = choose(request)
        if not isinstance(choice, kind):
            raise PluginFailed(f"what {source} chooses", f"a {kind.__name__}", choice)
        for name, tensor in vars(choice).items():
            if tensor.dtype != torch.bool or tuple(tensor.shape) != shapes[name]:
                got = f"{tensor.dtype} {list(tensor.shape)}"
                raise PluginFailed(f"the {name} of {source}", f"bool {list(shapes[name])}", got)
    return choice


def _list_blocks(
    request: SelectRequest,
    params: Tensor,
    patterns: list[Pattern],
    num_slots: list[int],
    budget: float,
    capacity: int,
    executor: Executor | None,
) -> tuple[Tensor, Tensor]:
    """Block lists of all block slots, (blocks, num_blocks), by the executor's kernels or not."""
    band_slots, listed = num_slots
    if executor is None or not listed:
        return _choose_blocks(request, params, patterns, num_slots, budget, capacity)
    holders = [p for p in patterns if p.component == "blocks" or not band_slots]
    ruled = [p for p in holders if _block_rule(p) is not None]
    out = None
    for pattern in ruled:
        rule, asked = _block_rule(pattern), params
        assert rule is not None
        if budget >= 0:
            geometry, asked = request.geometry, params.clone()
            head = pattern.from_budget(
                budget, request.k.shape[2], geometry.block_q, geometry.right == 0
            )
            asked[:, 1], asked[:, 2] = head.first, head.second
        out = executor.select_blocks(request, asked, rule, capacity, listed, out)
        if out is None:  # what the kernels do not know of one pattern, they know of none
            return _choose_blocks(request, params, patterns, num_slots, budget, capacity)
    others = [p for p in holders if p not in ruled]
    if out is None or not others:
        return out or _choose_blocks(request, params, patterns, num_slots, budget, capacity)
    rest = _choose_blocks(request, params, others, num_slots, budget, capacity)
    numbers = params[:, 0].long()[_slot_heads(params, 4, listed)]
    held = torch.stack([numbers == pattern.number for pattern in ruled]).any(0)[:, None]
    return torch.where(held[..., None], out[0], rest[0]), torch.where(held, out[1], rest[1])


def _block_rule(pattern: Pattern) -> BlockRule | None:
    """The rule of a pattern that chooses by it, under the pattern's own number.

    A subclass inherits a rule, and may have a choice of its own.
    """
    rule = pattern.rule
    if not isinstance(rule, BlockRule):
        return None
    maker = next(c for c in type(pattern).__mro__ if "rule" in vars(c))
    chooser = next(c for c in type(pattern).__mro__ if "choose" in vars(c))
    return replace(rule, number=pattern.number) if issubclass(maker, chooser) else None


def _choose_blocks(
    request: SelectRequest,
    params: Tensor,
    patterns: list[Pattern],
    num_slots: list[int],
    budget: float,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """Block lists of all block slots, (blocks, num_blocks)."""
    band_slots, listed = num_slots
    geometry, q, num_k = request.geometry, request.q, request.k.shape[2]
    shape = (q.shape[0], listed, geometry.num_row_blocks(q.shape[2]))
    if not listed:
        empty = torch.empty((*shape, capacity), dtype=torch.int32, device=q.device)
        return empty, torch.empty(shape, dtype=torch.int32, device=q.device)
    blocks = torch.zeros(*shape, geometry.num_key_blocks(num_k), dtype=torch.bool, device=q.device)
    heads = _slot_heads(params, 4, listed)
    for pattern in patterns:
        # Where no head has a band slot, band patterns hold block slots too.
        if pattern.component != "blocks" and band_slots:
            continue
        first, second = _numbers(pattern, params, heads, budget, request, as_blocks=True)
        asked = replace(request, heads=heads, first=first, second=second)
        choice = _chosen(pattern, pattern.choose_two_sided, asked, BlockChoice)
        mine = (params[:, 0].long()[heads] == pattern.number)[:, None]
        blocks |= choice.blocks & mine[..., None]
    return lowering.lower_blocks(blocks, capacity)


def full_index(
    q: Tensor,
    k: Tensor,
    slots: Tensor,
    rows: Tensor,
    key_mask: Tensor | None,
    geometry: Geometry,
    num_slots: list[int],
    limits: list[int],
    *,
    bounds: Tensor | None = None,
) -> AttentionIndex:
    """The index that covers every pair which the mask allows."""
    batch, num_q, num_k = q.shape[0], q.shape[2], k.shape[2]
    sizes = ops.capacities(
        num_q, num_k, geometry.q_offset, geometry.block_q, geometry.block_k, limits
    )
    columns = torch.zeros(batch, num_slots[0], num_k, dtype=torch.bool, device=q.device)
    distances = torch.ones(
        batch, num_slots[0], geometry.distance_size(num_q), dtype=torch.bool, device=q.device
    )
    visible, _ = block_relation(geometry, num_q, num_k, rows, key_mask, bounds)
    blocks = visible[:, None].expand(-1, num_slots[1], -1, -1)
    band = lowering.lower_band(columns, distances, geometry, (sizes[0], sizes[1], sizes[2]))
    listed = lowering.lower_blocks(blocks, sizes[4])
    return _index(*band, *listed, slots.contiguous())


def empty_index(
    q: Tensor,
    k: Tensor,
    params: Tensor,
    geometry: Geometry,
    num_slots: list[int],
    limits: list[int],
) -> AttentionIndex:
    """Lists of the promised shapes with nothing in them, for calls that stay dense."""
    shapes = ops.index_shapes(
        q.shape[0],
        q.shape[1],
        q.shape[2],
        k.shape[2],
        geometry.q_offset,
        geometry.block_q,
        geometry.block_k,
        num_slots,
        limits,
    )
    # Only counts are read of an index without entries; on a device each fill is a launch.
    fill = q.device.type == "cpu"
    tensors = {
        name: (torch.zeros if fill or name.startswith("num_") else torch.empty)(
            shape, dtype=torch.uint8 if name == "covered" else torch.int32, device=q.device
        )
        for name, shape in shapes.items()
    }
    tensors["slots"] = params[:, 3:5].contiguous()
    return AttentionIndex(**tensors)
