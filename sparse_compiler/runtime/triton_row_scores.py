"""Launching the kernels of row scores: from queries and keys to lists of key blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_compiler.codegen.emit import PLAIN_SIZES
from sparse_compiler.codegen.row_scores_spec import MAX_LINE, SLAB_UNIT, RowScoresSpec
from sparse_compiler.codegen.spec import power_of_two
from sparse_compiler.codegen.sweep_spec import SweepSpec
from sparse_compiler.ir.index import Geometry, automatic_blocks
from sparse_compiler.patterns.base import BlockRule, Scored, SelectRequest
from sparse_compiler.patterns.low_rank import sketches
from sparse_compiler.patterns.summaries import visible_in_groups
from sparse_compiler.runtime.hopper_sweep import launch_sweep, sweep_spec
from sparse_compiler.runtime.kernel_cache import KernelCache, load_kernels
from sparse_compiler.runtime.row_score_scratch import Chunk, Scratch, scratch_for
from sparse_compiler.runtime.triton_attend import float32_precision, rows_contiguous
from sparse_compiler.runtime.triton_launch import Launcher
from sparse_compiler.runtime.triton_probe import device_capability
from sparse_compiler.runtime.triton_sketch import sketch, sketch_fits

__all__ = ["Vectors", "by_block", "in_half", "row_scores_spec", "select_by_rows"]

_LOG2E = 1.4426950408889634
#: Directions whose products float16 adds up well enough for a score.
_FEW = 32
_FLOAT16 = 60000.0


@dataclass(frozen=True)
class Vectors:
    """What the kernels score rows against.

    Args:
        queries: [B, Hq, Lq, R].
        keys: [B, H, PER, key blocks, R]: vector ``sub`` of block n at [sub, n]; as in ``Scored``, H
            is Hkv or Hq.
        broken: uint8 [B, H, key blocks], blocks with a NaN or inf.
        group: keys for which a vector stands.
        scale: of the products, to natural logarithms.
    """

    queries: Tensor
    keys: Tensor
    broken: Tensor
    group: int
    scale: float


def row_scores_spec(
    rule: BlockRule, vectors: Vectors, geometry: Geometry, *, key_mask: bool, interpret: bool
) -> RowScoresSpec:
    """The kernels that a layer needs."""
    queries, (_, key_heads, per_block, key_blocks, dim) = vectors.queries, vectors.keys.shape
    dtype, heads = queries.dtype, queries.shape[1]
    hip = torch.version.hip is not None
    hopper = not hip and device_capability(queries.device)[0] == 9
    wide = hip or dtype == torch.float32 or dim > 128
    eight = dtype == torch.float8_e4m3fn
    half = eight or (dtype == torch.float16 and dim <= _FEW)
    return RowScoresSpec(
        dtype="float16" if eight else str(dtype).removeprefix("torch."),
        head_dim=dim,
        groups=heads // key_heads,
        causal=geometry.right >= 0,
        window=geometry.left >= 0,
        key_mask=key_mask,
        heads=heads,
        group=vectors.group,
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
        recall=rule.recall,
        eight=eight,
        interpret=interpret,
        precision=float32_precision(),
    )


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
    vectors = _vectors(cache, launch, request, rule, key_blocks, interpret=interpret)
    spec = row_scores_spec(
        rule, vectors, geometry, key_mask=request.key_mask is not None, interpret=interpret
    )
    (batch, heads, num_q, _), device = vectors.queries.shape, vectors.queries.device
    shape = (batch, num_slots, geometry.num_row_blocks(num_q))
    if out is None:
        # A slot that no head of the pattern holds has an empty list.
        out = (
            torch.empty(*shape, capacity, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
        )
    sweep = sweep_spec(spec, device, num_q, num_k)
    if sweep is not None:
        spec = replace(spec, max_registers=0, num_stages=1, sweep_blocks=sweep.tile)
    scratch = scratch_for(spec, sweep, batch * num_slots, num_q, key_blocks, device)
    sizes = {
        "row_blocks": shape[2],
        "key_blocks": key_blocks,
        "key_tiles": scratch.tops.shape[2] if sweep is not None else 0,
        "slab_units": scratch.scores.shape[2] // SLAB_UNIT,
        "num_heads": heads,
        "num_slots": num_slots,
        "num_q": num_q,
        "num_k": num_k,
        "left": geometry.left,
        "right": geometry.right,
        "scored": rule.number,
        "automatic": automatic_blocks(num_k, geometry.block_k),
        "capacity": capacity,
    }
    _launch_all(cache, launch, request, params, vectors, spec, sweep, scratch, sizes, out)
    return out


def _launch_all(
    cache: KernelCache,
    launch: Launcher,
    request: SelectRequest,
    params: Tensor,
    vectors: Vectors,
    spec: RowScoresSpec,
    sweep: SweepSpec | None,
    scratch: Scratch,
    known: Mapping[str, int],
    out: tuple[Tensor, Tensor],
) -> None:
    """Score and choose, chunk by chunk; ``known``: the kernels' sizes that chunks share."""
    module = load_kernels(cache, spec)
    queries, keys = vectors.queries, vectors.keys
    of_groups, of_blocks = _visible(request, vectors.group) if spec.key_mask else ([], [])
    rows, params = request.rows.contiguous(), params.contiguous()
    for chunk in scratch.chunks:
        sizes = _sizes_of(chunk, spec, known)
        places, programs = [scratch.slab], min(scratch.programs, chunk.lines * chunk.tiles)
        if sweep is not None:
            swept = scratch.swept(chunk, spec.rows)
            places, programs = [*swept], chunk.lines * chunk.tiles
            sizes["chunk_rows"] = swept[1].shape[1] * SLAB_UNIT
            launch_sweep(cache, sweep, queries, keys, params, rows, *swept, sizes)
        plain = [sizes[name] for name in PLAIN_SIZES[spec.template]]
        launch(
            module.score,
            programs,
            [queries, keys, params, rows, *of_groups, *places, scratch.scores],
            queries.stride()[:3],
            [vectors.scale * _LOG2E, *plain],
            **spec.launch_options,
        )
        if sweep is not None:
            pieces = -(-known["key_tiles"] // spec.tiles_at_once)
            launch(
                module.normalise,
                chunk.lines * chunk.tiles * pieces,
                [params, rows, *places, scratch.scores],
                (),
                plain,
                **spec.normalise_options,
            )
        launch(
            module.choose,
            chunk.lines * sizes["parts"],
            [scratch.scores, params, rows, vectors.broken, *of_blocks, *out],
            (),
            plain,
            num_warps=spec.choose_warps,
            num_stages=1,
        )


def _sizes_of(chunk: Chunk, spec: RowScoresSpec, known: Mapping[str, int]) -> dict[str, int]:
    """The kernels' sizes of one chunk."""
    first_row = chunk.first_tile * spec.rows
    parts = chunk.tiles * spec.rows // spec.block_q
    return {
        **known,
        "lines": chunk.lines,
        "first_line": chunk.first_line,
        "first_tile": chunk.first_tile,
        "first_row": first_row,
        "tiles": chunk.tiles,
        "parts": min(parts, known["row_blocks"] - first_row // spec.block_q),
        "chunk_rows": chunk.tiles * spec.rows,
    }


def _vectors(
    cache: KernelCache,
    launch: Launcher,
    request: SelectRequest,
    rule: BlockRule,
    key_blocks: int,
    *,
    interpret: bool,
) -> Vectors:
    """The rule's operands, by kernels of their own where there are some."""
    block_k = request.geometry.block_k
    if rule.operands is sketches and sketch_fits(request):
        queries, keys, broken = sketch(
            cache, launch, request, block_k=block_k, key_blocks=key_blocks, interpret=interpret
        )
        return Vectors(queries, keys, broken, 1, 1.0 / _LOG2E)
    scored = in_half(rule.operands(request))
    keys, broken = by_block(scored, key_blocks, block_k // scored.group)
    return Vectors(rows_contiguous(scored.queries), keys, broken, scored.group, scored.scale)


def in_half(scored: Scored) -> Scored:
    """With few directions, 16-bit operands in float16, the scale within the queries.

    Hopper adds such products up in float16 registers and compares two at once. Operands of 8 bits
    stay as they are.
    """
    if scored.queries.dtype == torch.float8_e4m3fn:
        return scored
    if scored.scale == 0:
        scored = replace(scored, queries=torch.zeros_like(scored.queries), scale=1.0)
    if scored.queries.dtype == torch.float32 or scored.queries.shape[-1] > _FEW:
        return scored
    queries = (scored.queries.float() * (scored.scale * _LOG2E)).clamp(-_FLOAT16, _FLOAT16)
    keys = scored.keys.float().clamp(-_FLOAT16, _FLOAT16)
    return replace(scored, queries=queries.half(), keys=keys.half(), scale=1.0 / _LOG2E)


def by_block(scored: Scored, key_blocks: int, per_block: int) -> tuple[Tensor, Tensor]:
    """Vectors [B, H, PER, key blocks, R], so that neighbouring blocks lie side by side; and
    whether a block is broken, uint8 [B, H, key blocks]. H as in ``Scored``."""
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
