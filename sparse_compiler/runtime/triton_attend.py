"""Launching the generated ``attend`` kernel: its spec from the arguments, its operands, its grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparse_compiler.codegen.spec import AttendSpec, power_of_two
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.runtime.kernel_cache import KernelCache, load_kernels

__all__ = [
    "Tuning",
    "attend_spec",
    "attend_tuning",
    "has_holes",
    "launch_attend",
    "rows_contiguous",
    "tma_fits",
]

_LOG2E = 1.0 / math.log(2.0)


@dataclass(frozen=True)
class Tuning:
    """Launch options of one kernel on one kind of device; fields as in ``AttendSpec``."""

    num_warps: int
    num_stages: int
    step_k: int = 64


def attend_tuning(
    dtype: torch.dtype,
    dim: int,
    geometry: Geometry,
    capability: tuple[int, int],
    *,
    has_band: bool = True,
    hip: bool = False,
) -> Tuning:
    """Launch options for one kernel; measured on H200, from shared memory elsewhere.

    Args:
        dim: the larger of D and Dv.
        capability: (0, 0) off CUDA.
        has_band: the index holds band slots.
        hip: an AMD device, with a third of the shared memory.
    """
    warps = 8 if geometry.block_q >= 128 else 4
    if dtype == torch.float32:
        narrow = dim > 128 and capability < (9, 0)  # 163 KB of shared memory, not 227
        return Tuning(8 if dim > 64 else warps, num_stages=1, step_k=16 if narrow else 32)
    if hip:
        return Tuning(num_warps=8 if dim > 128 else warps, num_stages=1, step_k=32)
    if dim > 128:
        return Tuning(num_warps=8, num_stages=2, step_k=32)
    # Three stages hide the latency of gathers, but only just leave room for a second program on a
    # Hopper multiprocessor: not with the scratch memory that a window's second test takes.
    deep = capability[0] == 9 and has_band and geometry.left < 0 and geometry.block_q < 128
    return Tuning(num_warps=warps, num_stages=3 if deep else 2, step_k=geometry.block_k)


def float32_precision() -> str:
    """Triton's ``input_precision`` of float32 products.

    Three tf32 products on the matrix units keep float32's accuracy; ``ieee`` unrolls into scalar
    code that takes minutes to compile and spills, so it is left to AMD, which has no tf32x3.
    """
    return "tf32x3" if torch.version.hip is None else "ieee"


def rows_contiguous(tensor: Tensor) -> Tensor:
    """``tensor`` itself if its last dimension is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def tma_fits(tensor: Tensor) -> bool:
    """Whether a [B, H, L, D] tensor can be read through a 4-D tensor descriptor.

    The hardware wants 16-byte aligned base and strides; a stride of 0 (an expanded dimension) and
    sizes or strides past its limits are left to pointers.
    """
    size = tensor.element_size()
    strides = [
        stride * size
        for length, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        if length > 1
    ]
    return (
        tensor.numel() > 0
        and tensor.data_ptr() % 16 == 0
        and tensor.shape[-1] * size % 16 == 0
        and all(0 < stride < 2**40 and stride % 16 == 0 for stride in strides)
        and all(length < 2**31 for length in tensor.shape)
    )


def has_holes(key_mask: Tensor, rows: Tensor) -> Tensor:
    """int32 [B], 1 where ``key_mask`` hides a key inside kv_start..kv_start+kv_len; no host sync."""
    key = torch.arange(key_mask.shape[1], device=key_mask.device)
    start, length = rows[:, 3:4], rows[:, 4:5]
    inside = (key >= start) & (key < start + length)
    return (inside & ~key_mask).any(dim=1).to(torch.int32)


def attend_spec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: AttentionIndex,
    geometry: Geometry,
    tuning: Tuning,
    *,
    softcap: float,
    key_mask: Tensor | None,
    tma: bool,
    interpret: bool,
) -> AttendSpec:
    """The kernel that these arguments need."""
    return AttendSpec(
        dtype=str(q.dtype).removeprefix("torch."),
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        groups=q.shape[1] // k.shape[1],
        causal=geometry.right >= 0,
        window=geometry.left >= 0,
        key_mask=key_mask is not None,
        block_q=geometry.block_q,
        block_k=geometry.block_k,
        has_band=index.full.shape[1] > 0,
        has_blocks=index.blocks.shape[1] > 0 and index.blocks.shape[3] > 0,
        softcap=softcap != 0.0,
        tma=tma,
        step_k=min(tuning.step_k, geometry.block_k),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        interpret=interpret,
        precision=float32_precision(),
    )


def _descriptor(tensor: Tensor, keys: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    row = tensor.shape[-1]
    strides = [
        stride if length > 1 else row
        for length, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    ]
    block = [1, 1, keys, power_of_two(row)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], block)


def launch_attend(
    cache: KernelCache,
    spec: AttendSpec,
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
) -> tuple[Tensor, Tensor]:
    """Run ``spec``'s kernel.

    Args:
        q, k, v, index, geometry, scale, softcap, rows, key_mask: as ``Executor.attend``; last
            dimensions contiguous, scale >= 0.
    """
    batch, heads, num_q, _ = q.shape
    out = torch.empty((batch, heads, num_q, v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, num_q), dtype=torch.float32, device=q.device)
    programs = geometry.num_row_blocks(num_q) * batch * heads
    if not programs:
        return out, lse
    arguments: list[Any] = [q, k, v]
    if spec.tma:
        arguments += [_descriptor(k, spec.step_k), _descriptor(v, spec.step_k)]
    kernels = load_kernels(cache, spec)
    lanes, num_lanes = _edge_lanes(kernels, spec, index)
    arguments += [out, lse, index.full, index.num_full, lanes, num_lanes]
    arguments += [index.columns, index.num_columns, index.covered, index.blocks, index.num_blocks]
    arguments += [index.slots, rows.contiguous()]
    if spec.key_mask:
        assert key_mask is not None
        mask = key_mask.contiguous()
        arguments += [mask.view(torch.uint8), has_holes(mask, rows)]
    for tensor in (q, k, v):
        arguments += tensor.stride()[:3]
    if spec.softcap:
        arguments += [2.0 * scale / softcap * _LOG2E, softcap * _LOG2E]
    else:
        arguments += [scale * _LOG2E]
    arguments += [
        heads,
        num_q,
        k.shape[2],
        geometry.left,
        geometry.right,
        index.full.shape[1],
        index.blocks.shape[1],
        index.full.shape[2],
        index.edge.shape[2],
        index.columns.shape[2],
        index.covered.shape[2],
        index.blocks.shape[3],
    ]
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    kernels.attend[(programs,)](*arguments, **options)
    return out, lse


def _edge_lanes(
    kernels: ModuleType, spec: AttendSpec, index: AttentionIndex
) -> tuple[Tensor, Tensor]:
    """Keys of the edge tiles as one list of distances per band slot, [B, S, E * N] and [B, S]."""
    batch, slots, edges = index.edge.shape
    lanes = index.edge.new_empty((batch, slots, edges * spec.block_k))
    num_lanes = torch.empty_like(index.num_edge)
    if spec.has_band:
        operands = (index.edge, index.edge_len, index.num_edge, lanes, num_lanes, edges)
        kernels.list_lanes[(batch * slots,)](*operands, num_warps=8)
    return lanes, num_lanes
