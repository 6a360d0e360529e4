"""Spec of the kernels that find a query head's directions and project queries and keys on them."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_compiler.codegen.spec import KernelSpec

__all__ = ["SketchSpec"]

#: float32 numbers that one step of a sum over parts holds.
_HELD = 8192


@dataclass(frozen=True, kw_only=True)
class SketchSpec(KernelSpec):
    """The three kernels of a sketch: ``moments``, ``directions`` and ``project``.

    Args:
        rank: directions, a power of two from 16; less than ``head_dim``.
        turns: of the subspace iteration, two steps each.
        block_k: N, a power of two from 16.
        rows: rows of a tile of ``project``, a multiple of ``block_k``.
        steps: tiles that a program of ``project`` takes one after another.
        samples: rows of a step of ``moments``, a power of two from 16.
        query_parts, key_parts: programs that share a query head's samples, and those of its keys,
            powers of two.
        search_warps: warps of ``directions``; 0 takes as many as a GPU by NVIDIA needs.
        eight: what is projected is kept in 8 bits, e4m3; else in float16.
    """

    rank: int = 32
    turns: int = 2
    block_k: int = 64
    rows: int = 128
    steps: int = 4
    samples: int = 64
    query_parts: int = 8
    key_parts: int = 8
    search_warps: int = 0
    eight: bool = False

    @property
    def tile(self) -> int:
        """Rows and columns of a matrix of moments that one program holds."""
        return min(128, self.head_pad)

    @property
    def tiles(self) -> int:
        """Programs of ``moments`` for each part of a query head."""
        return (self.head_pad // self.tile) ** 2

    @property
    def parts(self) -> int:
        return self.query_parts + self.key_parts

    def launch_options(self, function: str) -> dict[str, int]:
        """Triton's options for one of the kernels."""
        if function == "project":
            # Two stages: three programs then fit a Hopper multiprocessor.
            return {"num_warps": self.num_warps, "num_stages": 2}
        if function == "moments":
            warps = 8 if self.head_pad >= 128 else 4
            return {"num_warps": warps, "num_stages": self.num_stages}
        warps = self.search_warps or (8 if self.head_pad > 128 else 4)
        return {"num_warps": warps, "num_stages": 2}

    @property
    def inner(self) -> int:
        """Columns of a step of a product of directions and a matrix, as many as registers hold."""
        return 32 if self.head_pad <= 128 else 16

    def rows_of_sum(self, parts: int) -> int:
        """Rows of a matrix that ``directions`` adds up at once over ``parts`` parts."""
        return min(self.head_pad, max(1, _HELD // (parts * self.head_pad)))

    @property
    def at_moments(self) -> int:
        """Where A and then B begin in a query head's part of ``work``, in numbers; so below."""
        return self.parts * self.head_pad**2

    @property
    def at_sums(self) -> int:
        return self.at_moments + 2 * self.head_pad**2

    @property
    def at_origin(self) -> int:
        return self.at_sums + self.key_parts * 2 * self.head_pad

    @property
    def at_basis(self) -> int:
        return self.at_origin + self.head_pad

    @property
    def at_found(self) -> int:
        return self.at_basis + 2 * self.rank * self.head_pad

    @property
    def at_units(self) -> int:
        return self.at_found + 2 * self.rank * self.head_pad

    @property
    def line(self) -> int:
        """Numbers of a query head in ``work``, a multiple of 64."""
        return -(-(self.at_units + 3 * self.rank) // 64) * 64

    @property
    def template(self) -> str:
        return "sketch.py.jinja"
