"""Spec of the kernels that score keys row by row and list the blocks that hold the best."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparse_compiler.codegen.spec import KernelSpec, power_of_two
from sparse_compiler.patterns.ranking import PEAK_WHOLE, PEAKS

__all__ = ["MAX_LINE", "SLAB_UNIT", "RowScoresSpec"]

#: The slab of ``score`` lies in tiles of so many rows and key blocks; no tile of blocks is larger.
#: Lines of scores are a multiple of so many.
SLAB_UNIT = 64

#: Key blocks of one row block that one program ranks.
MAX_LINE = 32768


@dataclass(frozen=True, kw_only=True)
class RowScoresSpec(KernelSpec):
    """The two kernels of row scores: ``score`` and ``choose``; ``head_dim`` is that of what is scored.

    Args:
        heads: query heads of the layer, Hq.
        group: keys for which one vector stands, a power of two that divides ``block_k``.
        every: one of so many groups counts for a row's normaliser, a power of two.
        block_q, block_k: M and N, powers of two from 16.
        rows: rows of a program of ``score``, a multiple of ``block_q``.
        tile: key blocks of one step.
        line: key blocks that a program of ``choose`` ranks, a power of two.
        max_registers: of a thread of ``score``; 0 leaves it to the assembler.
        half: products are added up in float16: queries and keys have no more bits, and few directions.
        packed: maxima are taken of two float16 numbers at once, by NVIDIA's instruction.
        unroll: products of one turn of the inner loop; divides the groups of a block.
        sweep_blocks: key blocks of a tile of the ``SweepSpec`` kernel that goes before; 0 without one.
        recall: blocks are kept for a share of the mass, not by a threshold (``BlockRule``).
        eight: queries and keys have 8 bits, e4m3, whatever ``dtype`` says; ``head_dim`` is 32 or more.
    """

    heads: int
    group: int = 8
    every: int = 4
    block_q: int = 64
    block_k: int = 64
    rows: int = 128
    tile: int = 64
    line: int = 2048
    max_registers: int = 0
    half: bool = False
    packed: bool = False
    unroll: int = 1
    sweep_blocks: int = 0
    recall: bool = False
    eight: bool = False

    @property
    def swept(self) -> bool:
        return self.sweep_blocks > 0

    @property
    def slab_unit(self) -> int:
        return SLAB_UNIT

    @property
    def tiles_at_once(self) -> int:
        """Tiles of the sweep that a program of ``normalise``, one warp, takes: 16 blocks a thread."""
        return max(1, 512 // self.sweep_blocks)

    @property
    def rows_at_once(self) -> int:
        """Rows that a thread of ``normalise`` takes together; they divide ``block_q``."""
        return 4

    @property
    def normalise_stages(self) -> int:
        """Steps of ``normalise`` whose marks are on their way."""
        return 3

    @property
    def normalise_options(self) -> dict[str, int]:
        """Triton's options for ``normalise``."""
        return {"num_warps": 1, "num_stages": 1}

    @property
    def per_pad(self) -> int:
        """Columns of a product with the groups of one key block."""
        return max(16, self.per_block)

    @property
    def sweep_step(self) -> int:
        return self.rows

    @property
    def launch_options(self) -> dict[str, int]:
        """Triton's options for ``score``."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})

    @property
    def per_block(self) -> int:
        return self.block_k // self.group

    @property
    def heads_pad(self) -> int:
        return power_of_two(self.heads)

    @property
    def peaks_log2(self) -> float:
        return math.log2(PEAKS)

    @property
    def whole(self) -> int:
        return PEAK_WHOLE

    @property
    def choose_warps(self) -> int:
        return max(1, min(32, self.line // 512))

    @property
    def template(self) -> str:
        return "row_scores.py.jinja"
