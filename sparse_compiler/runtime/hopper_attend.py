"""Launching the Hopper ``attend`` kernel: its work list, its descriptors, its grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_compiler.codegen.hopper_spec import HopperSpec
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.runtime.kernel_cache import KernelCache, load_kernels
from sparse_compiler.runtime.triton_attend import descriptor_strides, logit_factors, tma_fits
from sparse_compiler.runtime.work_list import build_work_list

__all__ = ["hopper_fits", "hopper_spec", "launch_hopper"]

_BLOCKING = {(128, 64): 6, (128, 128): 3}  # (M, N) -> stages


def hopper_fits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    index: AttentionIndex,
    softcap: float,
    *,
    bounds: Tensor | None = None,
    bias: Tensor | None = None,
) -> bool:
    """Whether the Hopper kernel takes this call on sm_90; the portable one takes the others.

    Needs an index of blocks alone, 16-bit inputs, D and Dv up to 128, rows in blocks of 128, K and
    V that the tensor memory accelerator can address, and neither bounds nor a bias.
    """
    return (
        bounds is None
        and bias is None
        and index.full.shape[1] == 0
        and (geometry.block_q, geometry.block_k) in _BLOCKING
        and (not softcap or geometry.block_k == 64)  # at 128 the capped scores spill registers
        and q.dtype in (torch.float16, torch.bfloat16)
        and k.dtype == v.dtype == q.dtype
        and 16 <= q.shape[-1] <= 128
        and 16 <= v.shape[-1] <= 128
        and tma_fits(k)
        and tma_fits(v)
        and q.shape[0] * q.shape[1] * geometry.num_row_blocks(q.shape[2]) < 2**31
    )


def hopper_spec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    *,
    softcap: float,
    key_mask: Tensor | None,
    interpret: bool = False,
) -> HopperSpec:
    """The kernel that these arguments need."""
    return HopperSpec(
        dtype=str(q.dtype).removeprefix("torch."),
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        groups=q.shape[1] // k.shape[1],
        causal=geometry.right >= 0,
        window=geometry.left >= 0,
        key_mask=key_mask is not None,
        block_q=geometry.block_q,
        block_k=geometry.block_k,
        stages=_BLOCKING[geometry.block_q, geometry.block_k],
        softcap=softcap != 0.0,
        interpret=interpret,
    )


def _descriptor(tensor: Tensor, keys: int, width: int, layout: Any) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    strides = descriptor_strides(tensor)
    return TensorDescriptor(tensor, list(tensor.shape), strides, [1, 1, keys, width], layout)


def launch_hopper(
    cache: KernelCache,
    spec: HopperSpec,
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
    """Run ``spec``'s kernel; arguments and results as ``launch_attend``."""
    batch, heads, num_q, _ = q.shape
    num_k = k.shape[2]
    out = torch.empty((batch, heads, num_q, v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, num_q), dtype=torch.float32, device=q.device)
    row_blocks = geometry.num_row_blocks(num_q)
    items = row_blocks * batch * heads
    if not items:
        return out, lse
    rows = rows.contiguous()
    mask = None if key_mask is None else key_mask.contiguous()
    work = build_work_list(
        cache, spec.work_list, index, geometry, num_q, num_k, rows=rows, key_mask=mask
    )
    module = load_kernels(cache, spec)
    layout = module.TILE.value
    arguments: list[Any] = [
        q,
        _descriptor(k, spec.block_k, spec.head_pad, layout),
        _descriptor(v, spec.block_k, spec.value_pad, layout),
    ]
    arguments += [out, lse, work, rows, index.slots, index.blocks]
    if mask is not None:
        arguments.append(mask.view(torch.uint8))
    arguments += q.stride()[:3]
    arguments += (
        logit_factors(scale, softcap) if spec.softcap else [*logit_factors(scale, 0.0), 0.0]
    )
    arguments += [
        row_blocks,
        heads,
        num_q,
        num_k,
        geometry.left,
        max(geometry.right, 0),
        index.blocks.shape[1],
        index.blocks.shape[3],
    ]
    module.attend[(items,)](*arguments, num_warps=spec.num_warps)
    return out, lse
