"""Launching the kernels of row scores: from queries and keys to lists of key blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from sparse_compiler.codegen.row_scores_spec import MAX_LINE, RowScoresSpec
from sparse_compiler.codegen.spec import power_of_two
from sparse_compiler.ir.index import Geometry, automatic_blocks
from sparse_compiler.patterns.base import BlockRule, Scored, SelectRequest
from sparse_compiler.patterns.summaries import visible_in_groups
from sparse_compiler.runtime.kernel_cache import KernelCache, load_kernels
from sparse_compiler.runtime.triton_attend import float32_precision, rows_contiguous
from sparse_compiler.runtime.triton_launch import Launcher
from sparse_compiler.runtime.triton_probe import device_capability

__all__ = ["row_scores_spec", "select_by_rows"]

_LOG2E = 1.4426950408889634
#: Directions whose products float16 adds up well enough for a score.
_FEW = 32
_FLOAT16 = 60000.0
#: Bytes of scores that are kept at once.
_SCORES = 1 << 30


def row_scores_spec(
    rule: BlockRule,
    scored: Scored,
    geometry: Geometry,
    *,
    groups: int,
    heads: int,
    key_blocks: int,
    key_mask: bool,
    interpret: bool,
) -> RowScoresSpec:
    """The kernels that a layer needs.

    Args:
        groups: query heads per key head.
        heads: Hq.
        key_blocks: of a whole line.
    """
    dtype, dim = scored.queries.dtype, scored.queries.shape[-1]
    per_block = geometry.block_k // scored.group
    hip = torch.version.hip is not None
    hopper = not hip and device_capability(scored.queries.device)[0] == 9
    wide = hip or dtype == torch.float32 or dim > 128
    half = dtype == torch.float16 and dim <= _FEW
    return RowScoresSpec(
        dtype=str(dtype).removeprefix("torch."),
        head_dim=dim,
        groups=groups,
        causal=geometry.right >= 0,
        window=geometry.left >= 0,
        key_mask=key_mask,
        heads=heads,
        group=scored.group,
        every=min(rule.every, per_block),
        block_q=geometry.block_q,
        block_k=geometry.block_k,
        rows=max(geometry.block_q, 64 if wide or interpret or half else 128),
        tile=16 if interpret else 32 if wide else 64,
        line=max(16, power_of_two(key_blocks)),
        # On Hopper the loop over whole blocks fits in so many registers, and four programs then run
        # at once; what spills is the code for blocks that are cut.
        max_registers=128 if half and hopper and not interpret else 0,
        num_warps=4 if wide or half else 8,
        num_stages=2 if wide else 3,
        half=half,
        packed=half and not hip,
        unroll=4 if half and per_block >= 4 else 1,
        interpret=interpret,
        precision=float32_precision(),
    )


@cache
def _programs(device: torch.device) -> int:
    """Programs of ``score`` that a device runs at once, twice as many where registers are bounded;
    two in the interpreter, to show the loop."""
    if device.type != "cuda":
        return 2
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def select_by_rows(
    cache: KernelCache,
    launch: Launcher,
    request: SelectRequest,
    params: Tensor,
    rule: BlockRule,
    capacity: int,
    num_slots: int,
    out: tuple[Tensor, Tensor] | None = None,
    *,
    interpret: bool,
) -> tuple[Tensor, Tensor] | None:
    """See ``Executor.select_blocks``; None for what the kernels do not know."""
    geometry, num_k = request.geometry, request.k.shape[2]
    key_blocks = geometry.num_key_blocks(num_k)
    if request.bounds is not None or request.bias is not None or key_blocks > MAX_LINE:
        return None
    scored = _in_half(rule.operands(request))
    queries = rows_contiguous(scored.queries)
    (batch, heads, num_q, _), kv_heads = queries.shape, scored.keys.shape[1]
    spec = row_scores_spec(
        rule,
        scored,
        geometry,
        groups=heads // kv_heads,
        heads=heads,
        key_blocks=key_blocks,
        key_mask=request.key_mask is not None,
        interpret=interpret,
    )
    keys, broken = _by_block(scored, key_blocks, spec.per_block)
    rows, params = request.rows.contiguous(), params.contiguous()
    row_blocks, tiles = geometry.num_row_blocks(num_q), -(-num_q // spec.rows)
    shape = (batch, num_slots, row_blocks)
    device = queries.device
    if out is None:
        # A slot that no head of the pattern holds has an empty list.
        out = (
            torch.empty(*shape, capacity, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
        )
    blocks, counts = out
    of_groups, of_blocks = _visible(request, scored.group) if spec.key_mask else ([], [])
    every = batch * num_slots
    step = max(1, min(every, _SCORES // (2 * row_blocks * key_blocks)))
    scores = torch.empty(step, row_blocks, key_blocks, dtype=torch.float16, device=device)
    programs = min(step * tiles, _programs(device) * (2 if spec.max_registers else 1))
    slab_size = (key_blocks // spec.tile + 1) * spec.tile
    slabs = torch.empty(programs, spec.rows, slab_size, dtype=torch.float16, device=device)
    module = load_kernels(cache, spec)
    for first in range(0, every, step):
        lines = min(step, every - first)
        plain = [lines, first, tiles, row_blocks, key_blocks, slab_size, heads, num_slots]
        plain += [num_q, num_k, geometry.left, geometry.right, rule.number]
        plain += [automatic_blocks(num_k, geometry.block_k), capacity]
        launch(
            module.score,
            min(programs, lines * tiles),
            [queries, keys, params, rows, *of_groups, slabs, scores],
            queries.stride()[:3],
            [scored.scale * _LOG2E, *plain],
            **spec.launch_options,
        )
        launch(
            module.choose,
            lines * row_blocks,
            [scores, params, rows, broken, *of_blocks, blocks, counts],
            (),
            plain,
            num_warps=spec.choose_warps,
            num_stages=1,
        )
    return blocks, counts


def _in_half(scored: Scored) -> Scored:
    """With few directions, 16-bit operands in float16, the scale within the queries.

    Hopper adds such products up in float16 registers and compares two at once.
    """
    if scored.scale == 0:
        scored = replace(scored, queries=torch.zeros_like(scored.queries), scale=1.0)
    if scored.queries.dtype == torch.float32 or scored.queries.shape[-1] > _FEW:
        return scored
    queries = (scored.queries.float() * (scored.scale * _LOG2E)).clamp(-_FLOAT16, _FLOAT16)
    keys = scored.keys.float().clamp(-_FLOAT16, _FLOAT16)
    return replace(scored, queries=queries.half(), keys=keys.half(), scale=1.0 / _LOG2E)


def _by_block(scored: Scored, key_blocks: int, per_block: int) -> tuple[Tensor, Tensor]:
    """Vectors [B, Hkv, PER, key blocks, R], so that neighbouring blocks lie side by side; and
    whether a block is broken, uint8 [B, Hkv, key blocks]."""
    pad = key_blocks * per_block - scored.keys.shape[2]
    keys = torch.nn.functional.pad(scored.keys, (0, 0, 0, pad)).unflatten(2, (-1, per_block))
    broken = torch.nn.functional.pad(scored.broken, (0, pad)).unflatten(2, (-1, per_block))
    return keys.transpose(2, 3).contiguous(), broken.any(-1).view(torch.uint8)


def _visible(request: SelectRequest, group: int) -> tuple[list[Tensor], list[Tensor]]:
    """Whether padding leaves a key of each group, and of each key block, uint8 [B, ...].

    Groups are as many as whole key blocks have.
    """
    block_k = request.geometry.block_k
    by_group, by_block = (visible_in_groups(request, keys) > 0 for keys in (group, block_k))
    pad = by_block.shape[1] * (block_k // group) - by_group.shape[1]
    by_group = torch.nn.functional.pad(by_group, (0, pad))
    return [by_group.contiguous().view(torch.uint8)], [by_block.view(torch.uint8)]
