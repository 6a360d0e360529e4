"""Launching the generated ``probe`` kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sparse_compiler.codegen.select_spec import MAX_TILE
from sparse_compiler.codegen.spec import ProbeSpec
from sparse_compiler.ir.index import Geometry
from sparse_compiler.runtime.kernel_cache import KernelCache, load_kernels
from sparse_compiler.runtime.triton_attend import float32_precision, rows_contiguous
from sparse_compiler.runtime.triton_launch import Launcher

__all__ = [
    "Scores",
    "device_capability",
    "empty_scores",
    "heads_at_once",
    "launch_probe",
    "probe_by_head",
    "probe_operands",
    "probe_spec",
    "rows_at_once",
]

_LOG2E = 1.0 / math.log(2.0)
_ROW = 64  # scores of a line are padded to a multiple of so many
_QUERY_BYTES = 65536  # shared memory for the probe rows; two programs fit a Hopper multiprocessor


@dataclass(frozen=True)
class Scores:
    """What a probe found.

    Args:
        data: float32 [2, B * S, row_size], by column and by distance; past num_k and X undefined.
        row_size: a multiple of 64.
    """

    data: Tensor
    row_size: int


def empty_scores(lines: int, row_size: int, device: torch.device) -> Tensor:
    """Undefined scores, float32 [2, lines, row_size], with room behind them for whole vectors."""
    size = 2 * lines * row_size
    flat = torch.empty(size + MAX_TILE, dtype=torch.float32, device=device)
    return flat[:size].view(2, lines, row_size)


def rows_at_once(dtype: torch.dtype, dim: int) -> int:
    """Probe rows of one launch and keys of its tiles; more rows are taken in turns."""
    return 32 if dtype == torch.float32 and dim > 128 else 64


def heads_at_once(
    dtype: torch.dtype, dim: int, groups: int, capability: tuple[int, int] = (9, 0)
) -> int:
    """Heads of a group that one program serves, so that it reads each key once for all."""
    if torch.version.hip is not None:  # a third of the shared memory
        return 1
    pad = 1 << (dim - 1).bit_length()
    fitting = _QUERY_BYTES // (rows_at_once(dtype, dim) * pad * dtype.itemsize)
    # Products of other devices than Hopper leave no registers for four heads.
    wanted = 4 if groups >= 3 and capability[0] == 9 else min(groups, 2)
    return max(1, min(wanted, fitting))


def probe_operands(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    """q, k and scale as the kernels take them: last dimensions contiguous, scale positive."""
    if scale < 0:
        q, scale = -q, -scale
    elif scale == 0:
        q, scale = torch.zeros_like(q), 1.0
    return rows_contiguous(q), rows_contiguous(k), scale


def probe_spec(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    *,
    key_mask: Tensor | None,
    num_rows: int,
    interpret: bool,
    last_rows: bool = False,
) -> ProbeSpec:
    """The kernels that these arguments need; ``num_rows`` is at most ``rows_at_once``."""
    hip = torch.version.hip is not None
    wide = hip or q.dtype == torch.float32 or q.shape[-1] > 128
    groups = q.shape[1] // k.shape[1]
    return ProbeSpec(
        dtype=str(q.dtype).removeprefix("torch."),
        head_dim=q.shape[-1],
        groups=groups,
        causal=geometry.right >= 0,
        window=geometry.left >= 0,
        key_mask=key_mask is not None,
        num_rows=num_rows,
        heads=heads_at_once(q.dtype, q.shape[-1], groups, device_capability(q.device)),
        last_rows=last_rows,
        num_warps=4,
        num_stages=1 if wide else 2,
        interpret=interpret,
        precision=float32_precision(),
    )


@cache
def device_capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device; Hopper's for the interpreter, which shows its kernels."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@cache
def _programs(device: torch.device) -> int:
    """Programs that a device runs at once."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _chunks(spec: ProbeSpec, groups: int, num_k: int, device: torch.device) -> tuple[int, int]:
    """(chunks, tiles of a chunk): one wave of programs, as each repeats a tile of its neighbour."""
    needed = -(-num_k // spec.rows_pad) + 1
    if spec.interpret:
        tiles = 2  # the interpreter's time is the number of tiles; two show every seam
    else:
        parts = groups * -(-spec.groups // spec.heads)
        tiles = max(4, -(-needed // max(1, _programs(device) // parts)))
    return -(-needed // tiles), tiles


def launch_probe(
    cache: KernelCache,
    launch: Launcher,
    spec: ProbeSpec,
    q: Tensor,
    k: Tensor,
    params: Tensor,
    first_row: Tensor | None,
    geometry: Geometry,
    *,
    num_slots: int,
    probed: int,
    scale: float,
    rows: Tensor,
    key_mask: Tensor | None,
) -> Scores:
    """Run ``spec``'s kernels.

    Args:
        q, k, geometry, rows, key_mask: as ``Executor.probe``; num_k > 0, last dimension contiguous.
        params: int32 [Hq, 5] as in ``ops``; heads whose pattern is ``probed`` write the line of
            their band slot, other lines stay undefined.
        first_row: int64 [B], unless the spec takes the last rows.
        num_slots: S > 0.
        scale: of the scores, positive.
    """
    (batch, heads, num_q, _), num_k = q.shape, k.shape[2]
    size = geometry.distance_size(num_q)
    row_size = -(-max(num_k, size) // _ROW) * _ROW
    groups = batch * k.shape[1]
    chunks, tiles = _chunks(spec, groups, num_k, q.device)
    scores = empty_scores(batch * num_slots, row_size, q.device)
    partial = torch.empty(
        (2, batch * heads * chunks * spec.rows_pad), dtype=torch.float32, device=q.device
    )
    tops, totals = partial[0], partial[1]
    inputs = [q, k, params, rows if first_row is None else first_row, rows]
    if spec.key_mask:
        assert key_mask is not None
        inputs.append(key_mask.contiguous().view(torch.uint8))
    strides = [*q.stride()[:3], *k.stride()[:3]]
    numbers = [scale * _LOG2E, groups, heads, num_slots, num_q, num_k]
    numbers += [geometry.left, geometry.right, chunks, tiles, size, row_size, probed]
    module = load_kernels(cache, spec)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    programs = groups * -(-spec.groups // spec.heads) * chunks
    # Sums need shared memory for the shear; with a third stage only one program would fit.
    deep = {**options, "num_stages": spec.num_stages + 1} if spec.num_stages > 1 else options
    launch(module.statistics, programs, [*inputs, tops, totals], strides, numbers, **deep)
    launch(module.sums, programs, [*inputs, tops, totals, scores], strides, numbers, **options)
    return Scores(scores, row_size)


def probe_by_head(
    cache: KernelCache,
    launch: Launcher,
    spec: ProbeSpec,
    q: Tensor,
    k: Tensor,
    heads: Tensor,
    first_row: Tensor,
    geometry: Geometry,
    *,
    scale: float,
    rows: Tensor,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``Executor.probe`` for ``spec.num_rows`` rows; ``heads`` may repeat a head."""
    batch, num_heads, num_q, _ = q.shape
    num_k, size = k.shape[2], geometry.distance_size(num_q)
    shape = (batch, heads.shape[0])
    if not heads.shape[0] or not batch or not num_k:
        return q.new_zeros((*shape, num_k), dtype=torch.float32), q.new_zeros(
            (*shape, size), dtype=torch.float32
        )
    # Every head has a slot of its own number; those that nobody asks for have another pattern.
    number = torch.arange(num_heads, dtype=torch.int32, device=q.device)
    params = number[:, None].repeat(1, 5)
    params[:, 0] = torch.ones_like(number).index_fill_(0, heads, 0)
    found = launch_probe(
        cache,
        launch,
        spec,
        q,
        k,
        params,
        first_row,
        geometry,
        num_slots=num_heads,
        probed=0,
        scale=scale,
        rows=rows,
        key_mask=key_mask,
    )
    lines = found.data.view(2, batch, num_heads, found.row_size).index_select(2, heads)
    return lines[0, ..., :num_k], lines[1, ..., :size]
