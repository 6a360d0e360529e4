"""Launching the generated ``probe`` kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_compiler.codegen.spec import ProbeSpec
from sparse_compiler.ir.index import Geometry
from sparse_compiler.runtime.kernel_cache import KernelCache, load_kernels
from sparse_compiler.runtime.triton_attend import float32_precision

__all__ = ["launch_probe", "probe_spec", "rows_at_once"]

_LOG2E = 1.0 / math.log(2.0)


def rows_at_once(dtype: torch.dtype, dim: int) -> int:
    """Probe rows of one launch, and the least keys of its tiles; more rows are taken in turns."""
    return 32 if dtype == torch.float32 and dim > 128 else 64


def probe_spec(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    *,
    key_mask: Tensor | None,
    num_rows: int,
    interpret: bool,
) -> ProbeSpec:
    """The kernels that these arguments need; ``num_rows`` is at most ``rows_at_once``."""
    hip = torch.version.hip is not None  # a third of the shared memory
    wide = hip or q.dtype == torch.float32 or q.shape[-1] > 128
    return ProbeSpec(
        dtype=str(q.dtype).removeprefix("torch."),
        head_dim=q.shape[-1],
        groups=q.shape[1] // k.shape[1],
        causal=geometry.right >= 0,
        window=geometry.left >= 0,
        key_mask=key_mask is not None,
        num_rows=num_rows,
        block_k=rows_at_once(q.dtype, q.shape[-1]),
        # The interpreter's time is the number of tiles; two show every seam.
        tiles=2 if interpret else 32,
        num_warps=4,
        num_stages=1 if wide else 3,
        interpret=interpret,
        precision=float32_precision(),
    )


def launch_probe(
    cache: KernelCache,
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
    """Run ``spec``'s kernels; arguments and results as ``Executor.probe``."""
    batch, num_q, num_k = q.shape[0], q.shape[2], k.shape[2]
    slots = batch * heads.shape[0]
    shape = (batch, heads.shape[0])
    size = geometry.distance_size(num_q)
    columns = torch.empty((*shape, num_k), dtype=torch.float32, device=q.device)
    distances = torch.zeros((*shape, size), dtype=torch.float32, device=q.device)
    if not slots or not num_k:
        return columns, distances
    chunks = -(-num_k // (spec.tiles * spec.block_k))
    partial = torch.empty((2, slots, chunks, spec.rows_pad), dtype=torch.float32, device=q.device)
    lse = torch.empty((slots, spec.rows_pad), dtype=torch.float32, device=q.device)
    inputs: list[Any] = [q, k, heads, first_row, rows.contiguous()]
    if spec.key_mask:
        assert key_mask is not None
        inputs.append(key_mask.contiguous().view(torch.uint8))
    sizes: list[Any] = [*q.stride()[:3], *k.stride()[:3], scale * _LOG2E]
    sizes += [slots, heads.shape[0], num_q, num_k, geometry.left, geometry.right, chunks, size]
    module = load_kernels(cache, spec)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    grid = (slots * chunks,)
    module.statistics[grid](*inputs, partial[0], partial[1], *sizes, **options)
    module.combine[(slots,)](partial[0], partial[1], lse, chunks, num_warps=4)
    module.sums[grid](*inputs, lse, columns, distances, *sizes, **options)
    return columns, distances
