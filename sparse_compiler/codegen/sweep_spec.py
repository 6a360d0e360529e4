"""Spec of the Hopper kernel that finds the best groups of whole key blocks for many rows."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_compiler.codegen.row_scores_spec import SLAB_UNIT
from sparse_compiler.codegen.spec import KernelSpec, power_of_two

__all__ = ["SweepSpec"]

#: Bytes of keys in shared memory; little else is beside them.
_KEYS = 128 * 1024
_WARPS = 16


@dataclass(frozen=True, kw_only=True)
class SweepSpec(KernelSpec):
    """The ``sweep`` kernel of sm_90: ``head_dim`` of 16 or 32 in float16, of 32 in 8 bits (e4m3).

    32 directions of 8 bits have the bytes of 16 in float16, and one instruction multiplies as many.

    Args:
        heads: query heads of the layer, Hq.
        per_block: groups of a key block, a power of two from 4.
        every: one of so many groups counts for a row's normaliser, a power of two.
        block_k: N.
        rows: that pass together, 64 for each warp group.
        sweep_step, sweep_align: rows and key blocks of a tile of ``score``, which takes the rest; few
            blocks, because most are cut.
        unroll: products that are under way at once; divides ``per_block``.
        eight: operands have 8 bits, whatever ``dtype`` says; products are added up in float16 too.
    """

    heads: int
    per_block: int = 64
    every: int = 32
    block_k: int = 64
    rows: int = 16 * _WARPS
    sweep_step: int = 64
    sweep_align: int = 16
    num_warps: int = _WARPS
    unroll: int = 4
    eight: bool = False

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return 1 if self.eight else 2

    @property
    def tile(self) -> int:
        """Key blocks of a program: what fits in shared memory, and in registers."""
        return min(64, _KEYS // (self.width * self.per_block * self.head_dim))

    @property
    def slab_unit(self) -> int:
        return SLAB_UNIT

    @property
    def heads_pad(self) -> int:
        return power_of_two(self.heads)

    @property
    def template(self) -> str:
        return "sweep_hopper.py.jinja"
