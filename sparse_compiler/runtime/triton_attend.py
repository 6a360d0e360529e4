"""Launching the generated ``attend`` kernel: its spec from the arguments, its operands, its grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparse_compiler.codegen.offsets import LIMIT
from sparse_compiler.codegen.spec import AttendSpec, power_of_two
from sparse_compiler.errors import ShapeMismatch
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.runtime.attend_plan import AttendPlan, attend_plan
from sparse_compiler.runtime.kernel_cache import KernelCache, load_kernels
from sparse_compiler.runtime.triton_operands import bias_kind, bias_strides
from sparse_compiler.runtime.work_list import build_work_list

__all__ = [
    "Tuning",
    "attend_spec",
    "attend_tuning",
    "descriptor_strides",
    "edge_lanes",
    "launch_attend",
    "logit_factors",
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
    max_registers: int = 0


def attend_tuning(
    dtype: torch.dtype,
    dim: int,
    geometry: Geometry,
    capability: tuple[int, int],
    *,
    has_band: bool = True,
    hip: bool = False,
    bounds: bool = False,
    bias: str = "",
) -> Tuning:
    """Launch options for one kernel; measured on H200, from shared memory elsewhere.

    Args:
        dim: the larger of D and Dv.
        capability: (0, 0) off CUDA.
        has_band: the index holds band slots.
        hip: an AMD device, with a third of the shared memory.
        bounds, bias: as in ``AttendSpec``; what fits was compiled, not measured.
    """
    warps = 8 if geometry.block_q >= 128 else 4
    if dtype == torch.float32:
        narrow = dim > 128 and capability < (9, 0)  # 163 KB of shared memory, not 227
        return Tuning(8 if dim > 64 else warps, num_stages=1, step_k=16 if narrow else 32)
    if hip:
        return Tuning(num_warps=8 if dim > 128 else warps, num_stages=1, step_k=32)
    if dim > 128:
        return Tuning(num_warps=8, num_stages=2, step_k=32)
    # The lists of a band leave no registers for whole steps with bounds or a bias; a bias by pair
    # takes as many as the logits.
    if (bounds or bias) and capability >= (8, 0) and (has_band or capability < (9, 0)):
        by_pair, older = bias in ("row", "distance"), capability < (9, 0)
        return Tuning(
            num_warps=8 if by_pair or older else warps,
            num_stages=3 if capability[0] == 9 and geometry.left < 0 and not by_pair else 2,
            step_k=16 if by_pair and older else 32,
            max_registers=255 if capability[0] >= 10 else 0,
        )
    if dim > 64 and (8, 0) <= capability < (9, 0):
        return Tuning(num_warps=warps, num_stages=2, step_k=32)  # 64 keys spill 24 bytes
    # Three stages hide the latency of gathers, but only just leave room for a second program on a
    # Hopper multiprocessor: not with the scratch memory that a window's second test takes.
    deep = capability[0] == 9 and has_band and geometry.left < 0 and geometry.block_q < 128
    # Blackwell's assembler aims at three programs a multiprocessor and spills; two fit anyway.
    return Tuning(
        num_warps=warps,
        num_stages=3 if deep else 2,
        step_k=geometry.block_k,
        max_registers=255 if capability[0] >= 10 else 0,
    )


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
    lse: bool = True,
    plan: AttendPlan | None = None,
    bounds: Tensor | None = None,
    bias: Tensor | None = None,
) -> AttendSpec:
    """The kernel that these arguments need.

    Args:
        lse: the log-sum-exp is wanted.
        plan: what was decided about the launch; None decides here.
        bounds, bias: as ``Executor.attend``.
    """
    step = min(tuning.step_k, geometry.block_k)
    plan = plan or attend_plan(q, k, v, index, geometry, step, bounds=bounds, bias=bias)
    return AttendSpec(
        dtype=str(q.dtype).removeprefix("torch."),
        kv_dtype=str(k.dtype).removeprefix("torch.") if k.dtype != q.dtype else "",
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
        step_k=step,
        packed=plan.packed_size > 0,
        split=plan.split.parts > 1,
        lse=lse,
        wide=plan.wide,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        max_registers=tuning.max_registers,
        bounds=bounds is not None,
        bias=bias_kind(bias),
        interpret=interpret,
        precision=float32_precision(),
    )


def descriptor_strides(tensor: Tensor) -> list[int]:
    """Strides for a tensor descriptor: those of dimensions of size 1 may be anything, so a row."""
    row = tensor.shape[-1]
    pairs = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return [*(stride if length > 1 else row for length, stride in pairs), 1]


def logit_factors(scale: float, softcap: float) -> list[float]:
    """What the kernels multiply by, in base 2: [scale], or [scale inside tanh, cap]."""
    if softcap:
        return [2.0 * scale / softcap * _LOG2E, softcap * _LOG2E]
    return [scale * _LOG2E]


def _descriptor(tensor: Tensor, keys: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    block = [1, 1, keys, power_of_two(tensor.shape[-1])]
    return TensorDescriptor(tensor, list(tensor.shape), descriptor_strides(tensor), block)


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
    kv_scales: tuple[Tensor, Tensor] | None = None,
    plan: AttendPlan | None = None,
    bounds: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``spec``'s kernels.

    Args:
        q, k, v, index, geometry, scale, softcap, rows, key_mask, bounds, bias: as
            ``Executor.attend``; last dimensions but the bias's contiguous, scale >= 0.
        kv_scales: (k_scale, v_scale), positive, broadcastable to [B, Hkv], of an 8-bit k and v.
        plan: as given to ``attend_spec``.
    Returns:
        (out, lse); lse has no elements where the spec does not write it.
    Raises:
        ShapeMismatch: 32-bit offsets are too narrow for these sizes; scales do not fit [B, Hkv].
    """
    plan = plan or attend_plan(q, k, v, index, geometry, spec.step_k, bounds=bounds, bias=bias)
    _check_width(spec, plan, (q, k, v))
    batch, heads, num_q, _ = q.shape
    out = torch.empty((batch, heads, num_q, v.shape[-1]), dtype=q.dtype, device=q.device)
    lse_shape = (batch, heads, num_q) if spec.lse else (0,)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    row_blocks = geometry.num_row_blocks(num_q)
    if not row_blocks * batch * heads:
        return out, lse
    kernels, rows = load_kernels(cache, spec), rows.contiguous()
    mask = [key_mask.contiguous()] if spec.key_mask and key_mask is not None else []
    scratch, grid, late = _scratch(plan, out, row_blocks, geometry.block_q)
    outputs = [out, lse] if spec.lse else [out]
    arguments: list[Any] = [q, k, v]
    if spec.tma:
        arguments += [_descriptor(k, spec.step_k), _descriptor(v, spec.step_k)]
    arguments += _packed(kernels, spec, plan, k, v, index, rows, mask, heads)
    if spec.kv_dtype:
        arguments += _scales(kv_scales, k)
    lanes = edge_lanes(kernels, spec, index, plan.lanes_size)
    work = build_work_list(
        cache,
        spec.work_list,
        index,
        geometry,
        num_q,
        k.shape[2],
        rows=rows,
        key_mask=mask[0] if mask else None,
        lanes=lanes,
        bounds=bounds,
    )
    arguments += [*outputs, *scratch, index.full, lanes[0], index.columns, index.covered]
    arguments += [index.blocks, index.slots, rows, work]
    arguments += [hidden.view(torch.uint8) for hidden in mask]
    arguments += [tensor for tensor in (bounds, bias) if tensor is not None]
    arguments += [stride for tensor in (q, k, v) for stride in tensor.stride()[:3]]
    if bounds is not None:
        arguments.append(bounds.stride(0))
    arguments += bias_strides(bias, (batch, heads, num_q, k.shape[2]))
    arguments += _numbers(spec, q, k, index, geometry, plan, scale, softcap)
    kernels.attend[(grid,)](*arguments, **spec.launch_options)
    if spec.split:
        joined = (*scratch, rows, *outputs, heads, num_q, plan.split.first, plan.split.parts)
        kernels.combine[(late,)](*joined, num_warps=4)
    return out, lse


def _check_width(spec: AttendSpec, plan: AttendPlan, tensors: tuple[Tensor, ...]) -> None:
    if plan.wide and not spec.wide:
        raise ShapeMismatch(
            "a kernel with 32-bit offsets",
            f"given tensors whose offsets stay below {LIMIT}",
            tuple(tuple(t.shape) for t in tensors),
            where="attend",
            fix="Use a spec with wide=True.",
        )


def _numbers(
    spec: AttendSpec,
    q: Tensor,
    k: Tensor,
    index: AttentionIndex,
    geometry: Geometry,
    plan: AttendPlan,
    scale: float,
    softcap: float,
) -> list[Any]:
    """Scales and sizes, in the order of ``codegen.emit.PLAIN_SIZES``."""
    numbers: list[Any] = logit_factors(scale, softcap)
    numbers += [q.shape[1], q.shape[2], k.shape[2], geometry.left, geometry.right]
    numbers += [index.full.shape[1], index.blocks.shape[1], index.full.shape[2], plan.lanes_size]
    numbers += [index.columns.shape[2], plan.packed_size]
    numbers += [index.covered.shape[2], index.blocks.shape[3]]
    return [*numbers, plan.split.first, plan.split.parts] if spec.split else numbers


def _scratch(
    plan: AttendPlan, out: Tensor, row_blocks: int, size_q: int
) -> tuple[list[Tensor], int, int]:
    """([partial, stats] or nothing, programs of ``attend``, programs of ``combine``)."""
    batch, heads, _, value_dim = out.shape
    split = plan.split
    if split.parts == 1:
        return [], row_blocks * batch * heads, 0
    late = row_blocks - split.first
    shape = (batch, heads, late * size_q, split.parts)
    partial = torch.empty((*shape, value_dim), dtype=torch.float32, device=out.device)
    stats = torch.empty((*shape, 2), dtype=torch.float32, device=out.device)
    grid = (split.first + late * split.parts) * batch * heads
    return [partial, stats], grid, late * batch * heads


def _scales(kv_scales: tuple[Tensor, Tensor] | None, k: Tensor) -> list[Tensor]:
    shape = k.shape[:2]
    if kv_scales is None:
        return [torch.ones(shape, dtype=torch.float32, device=k.device)] * 2
    found = []
    for name, scales in zip(("k_scale", "v_scale"), kv_scales, strict=True):
        try:
            found.append(scales.to(torch.float32).expand(shape).contiguous())
        except RuntimeError:
            raise ShapeMismatch(
                name, f"broadcastable to {tuple(shape)} ([B, Hkv])", tuple(scales.shape)
            ) from None
    return found


def edge_lanes(
    kernels: ModuleType, spec: AttendSpec, index: AttentionIndex, lanes_size: int
) -> tuple[Tensor, Tensor]:
    """Keys of the edge tiles as one list of distances per band slot, [B, S, lanes_size] and [B, S].

    A list that does not fit gets the count -1, and ``attend`` answers NaN for its head.
    """
    batch, slots, edges = index.edge.shape
    lanes = index.edge.new_empty((batch, slots, lanes_size))
    num_lanes = torch.empty_like(index.num_edge)
    if spec.has_band:
        operands = (index.edge, index.edge_len, index.num_edge, lanes, num_lanes, edges, lanes_size)
        kernels.list_lanes[(batch * slots,)](*operands, num_warps=8)
    return lanes, num_lanes


def _packed(
    kernels: ModuleType,
    spec: AttendSpec,
    plan: AttendPlan,
    k: Tensor,
    v: Tensor,
    index: AttentionIndex,
    rows: Tensor,
    mask: list[Tensor],
    heads: int,
) -> list[Any]:
    """Each head's columns as dense tiles, and their positions; nothing for an unpacked spec."""
    if not spec.packed:
        return []
    shape = (k.shape[0], heads, plan.packed_size)
    packed = [t.new_empty((*shape, t.shape[-1])) for t in (k, v)]
    places = torch.empty(shape, dtype=torch.int32, device=k.device)
    # Eight-bit values are copied as bytes: not every device knows them.
    sources, targets = (
        [t.view(torch.uint8) if t.element_size() == 1 else t for t in pair]
        for pair in ((k, v), packed)
    )
    operands = [*sources, index.columns, index.num_columns, index.slots, rows.contiguous()]
    operands += [t.view(torch.uint8) for t in mask]
    operands += [*targets, places, *k.stride()[:3], *v.stride()[:3], heads, k.shape[2]]
    operands += [index.columns.shape[1], index.columns.shape[2], plan.packed_size]
    programs = shape[0] * heads * (plan.packed_size // spec.step_k)
    kernels.pack_columns[(programs,)](*operands, num_warps=4)
    tiles = [_descriptor(t, spec.step_k) for t in packed] if spec.tma else packed
    return [*tiles, places]
