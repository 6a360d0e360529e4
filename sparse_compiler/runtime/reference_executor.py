"""The oracle behind the executor interface, so that whole models can be run on it."""

from __future__ import annotations

from torch import Tensor

from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.runtime.executor import Executor, Problem
from sparse_compiler.runtime.probe import probe_torch
from sparse_compiler.runtime.reference import attend_reference

__all__ = ["ReferenceExecutor"]


class ReferenceExecutor(Executor):
    """Any device and dtype, float64 included; memory Lq x Lk a head."""

    name = "reference"
    block_q = 64
    block_k = 64
    min_tokens = 0
    min_queries = 2
    auto = HeadPattern("vertical_slash", 1000, 1000)

    def obstacles(self, problem: Problem) -> list[str]:
        return []

    def probe(
        self,
        q: Tensor,
        k: Tensor,
        heads: Tensor,
        first_row: Tensor,
        geometry: Geometry,
        *,
        scale: float,
        rows: Tensor,
        key_mask: Tensor | None,
        num_rows: int,
        bounds: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return probe_torch(
            q,
            k,
            heads,
            first_row,
            geometry,
            scale=scale,
            rows=rows,
            key_mask=key_mask,
            num_rows=num_rows,
            bounds=bounds,
            bias=bias,
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: AttentionIndex,
        geometry: Geometry,
        *,
        scale: float,
        softcap: float,
        rows: Tensor,
        key_mask: Tensor | None,
        bounds: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return attend_reference(
            *(q, k, v, index, geometry),
            scale=scale,
            softcap=softcap,
            rows=rows,
            key_mask=key_mask,
            bounds=bounds,
            bias=bias,
        )
