"""Spec of the Hopper kernel that finds the best groups of whole key blocks for many rows."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from sparse_compiler.codegen.row_scores_spec import SLAB_UNIT
from sparse_compiler.codegen.spec import KernelSpec, power_of_two

__all__ = ["SweepSpec"]

#: Bytes of keys in shared memory; little else is beside them.
_KEYS = 128 * 1024
_WARPS = 16
_WIDEST = 256  # columns of one instruction
#: The power of two that a mark of 255 stands for among ``weights``, times by how much these exceed
#: powers of two on average.
_WEIGHT_OF_255 = 1.9922


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
        sweep_step: rows of a program of ``score``, which takes blocks that a mask cuts for one of them.
        longest: tiles of rows of one job, a power of two; its keys are loaded once.
        eight: operands have 8 bits, whatever ``dtype`` says; products are added up in float16 too.
    """

    heads: int
    per_block: int = 64
    every: int = 32
    block_k: int = 64
    rows: int = 16 * _WARPS
    sweep_step: int = 64
    longest: int = 32
    num_warps: int = _WARPS
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
    def at_once(self) -> int:
        """Groups of each of ``tile`` key blocks that one instruction multiplies, a power of two."""
        return min(self.per_block, _WIDEST // self.tile)

    @property
    def levels(self) -> int:
        """How often a product is halved until one group of each key block is left."""
        return self.at_once.bit_length() - 1

    @property
    def row_levels(self) -> int:
        """How often a row of scores is halved until 8 are left, which belong to 4 threads."""
        return self.tile.bit_length() - 4

    @property
    def mark_bases(self) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """[row, place] steps of registers, lanes and warps of marks, see the template's glossary.

        As those of Hopper's matrix unit, but for the order of a thread's numbers and of a row's.
        """
        own = [[0, 1 << bit] for bit in range(self.tile.bit_length() - 3)]
        lanes = [[0, self.tile // 4], [0, self.tile // 2], [1, 0], [2, 0], [4, 0]]
        warps = [[16 << bit, 0] for bit in range(self.num_warps.bit_length() - 1)]
        return [*own, [8, 0]], lanes, warps

    @property
    def words(self) -> int:
        """Numbers of 32 bits that hold a query."""
        return self.head_dim * self.width // 4

    @property
    def word_bases(self) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """[row, word] steps of registers, lanes and warps of queries, as Hopper multiplies them."""
        own = [[8, 0], *([0, 4 << bit] for bit in range(self.words.bit_length() - 3))]
        return own, [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], self.mark_bases[2]

    @property
    def weight_of_255(self) -> float:
        return _WEIGHT_OF_255

    @property
    def every_twice(self) -> str:
        """``every`` as two numbers of 16 bits."""
        return "0x" + 2 * struct.pack(">e", float(self.every)).hex().upper()

    @property
    def heads_pad(self) -> int:
        return power_of_two(self.heads)

    @property
    def template(self) -> str:
        return "sweep_hopper.py.jinja"
