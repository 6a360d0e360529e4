"""What the host decides about one ``attend`` launch, from sizes that it knows: nothing here waits.

How the launch is divided (rows split into parts where there are too few programs), whether columns
are packed first, how much room the lists of single keys get, and how wide offsets are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sparse_compiler.codegen.offsets import needs_wide
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.runtime.triton_operands import operand_strides

__all__ = [
    "AttendPlan",
    "Split",
    "attend_plan",
    "lane_capacity",
    "packed_bytes",
    "processors_of",
    "split_plan",
]

#: Parts of a row block at most: `combine` reads them one after another.
MAX_PARTS = 32
#: A part with fewer keys than this costs more in the joining than it saves.
MIN_PART_KEYS = 512
#: Programs that run at once on one multiprocessor; the kernels are budgeted for it.
PROGRAMS_AT_ONCE = 2
#: Row blocks that must share a head's packed columns to pay for the copy.
MIN_ROW_BLOCKS_TO_PACK = 4
#: Packed columns may take this many bytes, or as many as K and V where that is more.
PACKED_FLOOR = 32 << 20
#: Lists of single keys below this many bytes get room for any index whatever.
LANES_FLOOR = 8 << 20


@dataclass(frozen=True)
class Split:
    """Row blocks ``first`` and later are computed by ``parts`` programs each; 1 is no splitting."""

    first: int = 0
    parts: int = 1


@dataclass(frozen=True)
class AttendPlan:
    """Host-side facts of one launch.

    Args:
        split: which row blocks are cut into parts.
        packed_size: columns that a head's packed tiles have room for, a multiple of the step; 0
            where columns are gathered by every row block instead.
        lanes_size: room for the single keys of one band slot.
        wide: offsets do not fit 32 bits, or nobody could prove that they do.
    """

    split: Split
    packed_size: int
    lanes_size: int
    wide: bool


@cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a CUDA or ROCm device, 0 elsewhere."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def lane_capacity(edges: int, geometry: Geometry, distances: int) -> int:
    """Most keys that the edge tiles of one band slot can hold.

    ``edges`` is the capacity that ``ops.capacities`` gives the list of edge tiles: one for each
    range of covered distances and a few at the ends of the mask. A range of one isolated distance
    covers M distances, which is whole tiles if N divides M; so each partial tile but the last
    belongs to a range of two distances or more, and takes N - 1 keys at most.

    Args:
        edges: E.
        distances: X, the size of distance space.
    """
    size_q, size_k = geometry.block_q, geometry.block_k
    ends = (
        2 * (size_q + size_k) + size_k
    )  # tiles near the diagonal, the window's and the space's end
    ranges = max(0, edges - 2 * (-(-(2 * size_q + size_k) // size_k) + 1))
    limited = ranges < distances // (size_q + 1) + 1  # by the distances kept, not by their room
    partial = (ranges + 1) // 2 if limited and size_q % size_k == 0 else ranges
    return min(edges * size_k, distances, partial * (size_k - 1) + ends)


def _lanes_size(index: AttentionIndex, geometry: Geometry, distances: int) -> int:
    batch, slots, edges = index.edge.shape
    room = min(edges * geometry.block_k, distances)
    if 4 * batch * slots * room <= LANES_FLOOR:
        return room
    return lane_capacity(edges, geometry, distances)


def packed_bytes(columns: int, batch: int, heads: int, row_bytes: int, step: int = 64) -> int:
    """Bytes of the packed columns of a layer: C, rounded up to a step, times heads times a row.

    Args:
        columns: C, the capacity of a head's list.
        row_bytes: of one row of K and one of V together, (D + Dv) times their element's size.
    """
    return -(-columns // step) * step * batch * heads * (row_bytes + 4)


def _packed_size(
    q: Tensor, k: Tensor, v: Tensor, index: AttentionIndex, geometry: Geometry, step: int
) -> int:
    columns = index.columns.shape[2] if index.columns.shape[1] else 0
    enough = geometry.num_row_blocks(q.shape[2]) >= MIN_ROW_BLOCKS_TO_PACK
    row_bytes = (k.shape[3] + v.shape[3]) * k.element_size()
    room = max(PACKED_FLOOR, k.shape[0] * k.shape[1] * k.shape[2] * row_bytes)
    needed = packed_bytes(columns, q.shape[0], q.shape[1], row_bytes, step)
    return -(-columns // step) * step if columns and enough and needed <= room else 0


def split_plan(row_blocks: int, rows_of_blocks: int, most_keys: int, processors: int) -> Split:
    """How a launch of ``row_blocks * rows_of_blocks`` programs is split.

    A launch with too few programs for the device leaves it idle: chunked prefill with few query
    rows and long keys, or few local heads under tensor parallelism. Its scratch memory is bounded
    by the programs that run at once: 2 a multiprocessor, each M * (Dv + 2) floats, 9 MB on an H200.

    Args:
        row_blocks: of one head.
        rows_of_blocks: heads times batch entries.
        most_keys: keys that one row block can have at most.
        processors: multiprocessors of the device; 0 never splits.
    """
    programs = row_blocks * rows_of_blocks
    if not programs:
        return Split(row_blocks)
    parts = PROGRAMS_AT_ONCE * processors // programs
    parts = min(parts, MAX_PARTS, most_keys // MIN_PART_KEYS)
    return Split(0, parts) if parts > 1 else Split(row_blocks)


def attend_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: AttentionIndex,
    geometry: Geometry,
    step: int,
    *,
    split: Split | None = None,
    packed: bool | None = None,
    bounds: Tensor | None = None,
    bias: Tensor | None = None,
) -> AttendPlan:
    """The plan of one launch.

    Args:
        q, k, v, index, geometry: as ``Executor.attend``.
        step: keys of one step of the kernel.
        split, packed: fixed instead of chosen.
        bounds, bias: as ``Executor.attend``; how wide offsets are depends on their strides.
    """
    row_blocks = geometry.num_row_blocks(q.shape[2])
    distances = geometry.distance_size(q.shape[2])
    lanes = _lanes_size(index, geometry, distances)
    packed_size = _packed_size(q, k, v, index, geometry, step)
    if packed is not None:
        columns = index.columns.shape[2] if index.columns.shape[1] else 0
        packed_size = -(-columns // step) * step if packed else 0
    band = index.full.shape[2] * geometry.block_k + lanes + index.columns.shape[2]
    listed = index.blocks.shape[3] * geometry.block_k
    band, listed = band * (index.full.shape[1] > 0), listed * (index.blocks.shape[1] > 0)
    if split is None:
        most_keys = min(k.shape[2], max(band, listed))
        split = split_plan(row_blocks, q.shape[0] * q.shape[1], most_keys, processors_of(q.device))
    sizes = _sizes(q, k, v, index, geometry)
    sizes |= {
        "lanes_size": lanes,
        "packed_size": packed_size,
        "parts": split.parts,
        "split_blocks": row_blocks - split.first if split.parts > 1 else 0,
    }
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    sizes |= operand_strides(bounds, bias, shape)
    return AttendPlan(split, packed_size, lanes, needs_wide(sizes))


def _sizes(
    q: Tensor, k: Tensor, v: Tensor, index: AttentionIndex, geometry: Geometry
) -> dict[str, int]:
    sizes = {
        "batch": q.shape[0],
        "heads": q.shape[1],
        "kv_heads": k.shape[1],
        "num_q": q.shape[2],
        "num_k": k.shape[2],
        "head_dim": q.shape[3],
        "value_dim": v.shape[3],
        "row_blocks": geometry.num_row_blocks(q.shape[2]),
        "block_q": geometry.block_q,
        "block_k": geometry.block_k,
        "band_slots": index.full.shape[1],
        "block_slots": index.blocks.shape[1],
        "full_size": index.full.shape[2],
        "columns_size": index.columns.shape[2],
        "distances_size": index.covered.shape[2],
        "blocks_size": index.blocks.shape[3],
    }
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        for axis, stride in zip("bhl", tensor.stride()[:3], strict=True):
            sizes[f"{name}_stride_{axis}"] = stride
    return sizes
