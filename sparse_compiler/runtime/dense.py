"""Dense attention inside the operators: for lengths at which sparse does not pay."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

from sparse_compiler.ir.index import Geometry
from sparse_compiler.runtime.executor import Executor, given
from sparse_compiler.runtime.select import full_index

__all__ = ["attend_dense"]


def attend_dense(
    executor: Executor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    *,
    scale: float,
    softcap: float,
    rows: Tensor,
    key_mask: Tensor | None,
    plain_rows: bool,
    bounds: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every pair that the mask allows; arguments and results as ``Executor.attend``.

    A mask that PyTorch's fused kernels know (none, or causal aligned to the first key) goes to
    them if there is no bias and no soft cap; every other goes to the executor with an index that covers everything, so that no mask is
    ever built.

    Args:
        plain_rows: ``rows`` says nothing beyond the arguments.
    """
    aligned = geometry.right == 0 and geometry.q_offset == 0
    known = geometry.left < 0 and (aligned or geometry.right < 0) and scale > 0
    plain = plain_rows and key_mask is None and bounds is None and bias is None
    if known and plain and softcap == 0:
        fused = _fused(q, k, v, aligned, scale)
        if fused is not None:
            return fused
    band = geometry.right == 0
    device = q.device
    heads = torch.arange(q.shape[1], device=device, dtype=torch.int32)
    slot = torch.zeros_like(heads)
    none = torch.full_like(heads, -1)
    slots = torch.stack([slot, none] if band else [none, slot], dim=1)
    index = full_index(
        *(q, k, slots, rows, key_mask, geometry, [1, 0] if band else [0, 1], [0, -1, -1]),
        bounds=bounds,
    )
    return executor.attend(
        *(q, k, v, index, geometry),
        scale=scale,
        softcap=softcap,
        rows=rows,
        key_mask=key_mask,
        **given(bounds=bounds, bias=bias),
    )


def _fused(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor] | None:
    """PyTorch's own kernels, asked for directly because they also return lse; None if none fits."""
    num_q, aten = q.shape[2], torch.ops.aten
    groups = q.shape[1] // k.shape[1]
    if q.device.type == "cpu" and q.shape[3] == v.shape[3]:
        if groups > 1:
            k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
        return out, lse.float()
    if q.device.type != "cuda":
        return None
    # The CUDA kernels read the smaller K and V of grouped queries as they are.
    params = SDPAParams(q, k, v, None, 0.0, causal, groups > 1)
    if can_use_cudnn_attention(params):
        found = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
    elif can_use_flash_attention(params) and q.shape[3] % 8 == 0:
        # Other sizes are padded by F.scaled_dot_product_attention, not by the kernel.
        found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    else:
        return None
    return found[0], found[1].float().reshape(q.shape[0], q.shape[1], -1)[..., :num_q]
