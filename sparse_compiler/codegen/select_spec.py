"""Spec of the kernels that turn scores into the lists of the band component."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_compiler.codegen.spec import KernelSpec, power_of_two

__all__ = ["MAX_TILE", "SelectSpec"]

#: Scores that one program holds at once; 32 registers a thread.
MAX_TILE = 16384


@dataclass(frozen=True, kw_only=True)
class SelectSpec(KernelSpec):
    """The two kernels of selection: ``keep`` (best scores) and ``lower`` (lists of the index).

    Args:
        heads: query heads of the layer, Hq.
        block_q, block_k: M and N, powers of two.
        tile: scores in a step of ``keep``, a power of two up to ``MAX_TILE``.
        items: kept distances in a step of ``lower``, and distances that a program of it marks.
        least_columns, least_distances: always kept of a probing head, and counted.
    """

    dtype: str = "float32"
    head_dim: int = 16
    groups: int = 1
    heads: int
    block_q: int = 64
    block_k: int = 64
    tile: int = 8192
    items: int = 1024
    least_columns: int = 0
    least_distances: int = 0
    num_stages: int = 1

    @property
    def heads_pad(self) -> int:
        return power_of_two(self.heads)

    @property
    def parts(self) -> int:
        """Most whole tiles that one kept distance can complete."""
        return -(-self.block_q // self.block_k)

    @property
    def keep_warps(self) -> int:
        return 16 if self.tile >= 8192 else 8

    @property
    def template(self) -> str:
        return "select.py.jinja"
