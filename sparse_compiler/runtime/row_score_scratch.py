"""Memory that scoring rows needs for a while, and the launches that it is cut into."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparse_compiler.codegen.row_scores_spec import SLAB_UNIT, RowScoresSpec
from sparse_compiler.codegen.sweep_spec import SweepSpec

__all__ = ["Chunk", "Scratch", "chunks_of", "scratch_for"]

#: Bytes that are in use at once, where the smallest piece of work allows it, but no more than this
#: part of a device's memory. Fewer and larger launches were faster (docs/design/0016-estimators.md).
_BYTES = 1 << 31
_MEMORY_SHARE = 64
_LEAST_ROWS = 4096  # of a launch: fewer leave the last programs alone


@dataclass(frozen=True)
class Chunk:
    """The lines (a head of a batch entry each) and the tiles of rows of one launch."""

    first_line: int
    lines: int
    first_tile: int
    tiles: int


@dataclass(frozen=True)
class Scratch:
    """See the glossaries of row_scores.py.jinja and sweep_hopper.py.jinja.

    Args:
        scores: float16 [lines, row blocks, line size], of one chunk.
        slab: float16 [programs, rows, line size] in tiles of ``SLAB_UNIT`` x ``SLAB_UNIT``; of a swept
            chunk uint8 [lines, rows / 64, key tiles, 64, key blocks of a tile]: what a program of
            ``normalise`` reads lies together.
        tops, totals: float32 [lines, rows / 64, key tiles, 64] of a swept chunk, else without elements.
        programs: of ``score`` without a sweep, at most.
        unit: tiles of ``score`` that a sweep takes together, else 1.
    """

    scores: Tensor
    slab: Tensor
    tops: Tensor
    totals: Tensor
    programs: int
    chunks: tuple[Chunk, ...]
    unit: int

    def swept(self, chunk: Chunk, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slab, tops and totals of a chunk whose tiles have so many rows; whole tiles of the sweep."""
        rows = -(-chunk.tiles // self.unit) * self.unit * rows
        shape = (chunk.lines, rows // SLAB_UNIT, self.tops.shape[2], SLAB_UNIT)
        size, wide = math.prod(shape), self.slab.shape[-1]
        return (
            self.slab.flatten()[: size * wide].view(*shape, wide),
            self.tops.flatten()[:size].view(shape),
            self.totals.flatten()[:size].view(shape),
        )


@cache
def _programs(device: torch.device) -> int:
    """Programs of ``score`` that a device runs at once, twice as many where registers are bounded;
    two in the interpreter, to show the loop."""
    if device.type != "cuda":
        return 2
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _memory(device: torch.device) -> int:
    """Bytes of a device; no limit is known of the host's, where the interpreter runs."""
    if device.type != "cuda":
        return 1 << 62
    return torch.cuda.get_device_properties(device).total_memory


def chunks_of(
    lines: int, tiles: int, size: int, unit: int, least: int, room: int
) -> tuple[Chunk, ...]:
    """Cut ``lines`` x ``tiles`` pieces of work into launches of nearly equal size.

    Args:
        size: bytes of scratch for one tile of one line.
        unit: a launch takes a multiple of so many tiles, but for the last.
        least: tiles of a launch that are worth more than all lines at once.
        room: bytes of scratch that a launch should not exceed.
    """
    room = max(1, room // size)
    least = min(least, tiles)
    together = lines if lines * least <= room else max(1, room // least)
    together = -(-lines // -(-lines // together))
    units = -(-tiles // unit)
    most = max(1, min(units, room // together // unit))
    most = -(-units // -(-units // most)) * unit
    return tuple(
        Chunk(line, min(together, lines - line), tile, min(most, tiles - tile))
        for line in range(0, lines, together)
        for tile in range(0, tiles, most)
    )


def scratch_for(
    spec: RowScoresSpec,
    sweep: SweepSpec | None,
    lines: int,
    num_q: int,
    key_blocks: int,
    device: torch.device,
) -> Scratch:
    """Scratch and launches for so many lines of ``num_q`` rows."""
    tiles = -(-num_q // spec.rows)
    # A tile of `score` may begin at the last key block.
    line_size = -(-(key_blocks + spec.tile - 1) // SLAB_UNIT) * SLAB_UNIT
    key_tiles = -(-key_blocks // sweep.tile) if sweep is not None else 0
    size = spec.rows // spec.block_q * line_size * 2
    unit, least = 1, tiles
    if sweep is not None:
        size += spec.rows * key_tiles * (sweep.tile + 8)
        unit, least = sweep.rows // spec.rows, _LEAST_ROWS // spec.rows
    room = min(_BYTES, _memory(device) // _MEMORY_SHARE)
    chunks = chunks_of(lines, tiles, size, unit, least, room)
    most_lines = max((chunk.lines for chunk in chunks), default=0)
    most_tiles = max((chunk.tiles for chunk in chunks), default=0)
    programs = _programs(device) * (2 if spec.max_registers else 1)
    programs = min(most_lines * most_tiles, programs)
    half: dict[str, Any] = {"dtype": torch.float16, "device": device}
    parts = most_tiles * spec.rows // spec.block_q
    units = -(-most_tiles // unit) * unit * spec.rows // SLAB_UNIT
    held = (most_lines, units, key_tiles, SLAB_UNIT)
    if sweep is None:
        slab = torch.empty(programs, spec.rows, line_size, **half)
    else:
        slab = torch.empty(*held, sweep.tile, dtype=torch.uint8, device=device)
    tops = torch.empty(held, dtype=torch.float32, device=device)
    return Scratch(
        scores=torch.empty(most_lines, parts, line_size, **half),
        slab=slab,
        tops=tops,
        totals=torch.empty_like(tops),
        programs=programs,
        chunks=chunks,
        unit=unit,
    )
