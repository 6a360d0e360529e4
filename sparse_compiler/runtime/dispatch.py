"""Implements the operators of ``ops``: picks the executor, decides sparse or dense, keeps statistics.

Importing this module installs the implementations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_compiler import ops
from sparse_compiler.errors import ExecutorUnavailable, ShapeMismatch, TensorInvalid
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.ir.pattern import fewest_queries
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import Limits, SelectRequest
from sparse_compiler.runtime import observe, recorder, select
from sparse_compiler.runtime.dense import attend_dense
from sparse_compiler.runtime.executor import Executor, Problem, given
from sparse_compiler.runtime.merge import with_sinks
from sparse_compiler.runtime.registry import executor_for
from sparse_compiler.runtime.requester import for_site

__all__ = ["attend", "select_keys", "stays_dense", "summarize_keys"]


def _executor(name: str, q: Tensor, k: Tensor, value_dim: int, softcap: float) -> Executor:
    problem = Problem(
        device_type=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[3],
        value_dim=value_dim,
        groups=q.shape[1] // max(1, k.shape[1]),
        softcap=softcap,
    )
    executor = executor_for(name, q.device.type)
    obstacles = executor.obstacles(problem)
    if obstacles:
        raise ExecutorUnavailable(
            f"executor {executor.name!r}",
            "able to run this attention",
            "; ".join(obstacles),
            fix="Choose executor='auto', or keep this model dense with pattern='dense'.",
        )
    return executor


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    rows: Tensor | None,
    key_mask: Tensor | None,
    heads: int,
) -> None:
    """Host-side checks only: ranks, sizes, dtypes and devices."""
    tensors = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            raise ShapeMismatch(name, "of rank 4, [B, heads, L, D]", tuple(tensor.shape))
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise TensorInvalid(
                name, f"{q.dtype} on {q.device} like q", f"{tensor.dtype} on {tensor.device}"
            )
        if not tensor.dtype.is_floating_point:
            raise TensorInvalid(name, "of a floating-point dtype", tensor.dtype)
    batch, num_heads, _, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ShapeMismatch("k", f"[{batch}, Hkv, Lk, {dim}] to fit q", tuple(k.shape))
    if k.shape[1] == 0 or num_heads % k.shape[1]:
        raise ShapeMismatch(
            "heads of q", f"a multiple of the {k.shape[1]} heads of k", num_heads, where="q, k"
        )
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ShapeMismatch("v", f"{tuple(k.shape[:3])} + [Dv] to fit k", tuple(v.shape))
    _check_rows(rows, key_mask, batch, k.shape[2])
    if heads != num_heads:
        raise ShapeMismatch("parameters", f"one row for each of {num_heads} query heads", heads)


def _check_rows(rows: Tensor | None, key_mask: Tensor | None, batch: int, num_k: int) -> None:
    if rows is not None:
        if rows.dtype != torch.int32:
            raise TensorInvalid("rows", "int32", rows.dtype)
        if tuple(rows.shape) != (batch, 5):
            raise ShapeMismatch("rows", f"[{batch}, 5], one row per batch entry", tuple(rows.shape))
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TensorInvalid("key_mask", "bool, True where a key is visible", key_mask.dtype)
        if tuple(key_mask.shape) != (batch, num_k):
            raise ShapeMismatch("key_mask", f"[{batch}, {num_k}]", tuple(key_mask.shape))


def _check_operands(
    q: Tensor, k: Tensor, bounds: Tensor | None, bias: Tensor | None, sinks: Tensor | None
) -> None:
    (batch, heads, num_q, _), num_k = q.shape, k.shape[2]
    if bounds is not None:
        if bounds.dtype != torch.int32 or bounds.device != q.device:
            raise TensorInvalid(
                "bounds", f"int32 on {q.device}", f"{bounds.dtype} on {bounds.device}"
            )
        if bounds.dim() != 3 or bounds.shape[0] not in (1, batch) or bounds.shape[1:] != (num_q, 2):
            raise ShapeMismatch("bounds", f"[{batch} or 1, {num_q}, 2]", tuple(bounds.shape))
    for name, tensor in (("bias", bias), ("sinks", sinks)):
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point or tensor.device != q.device:
            raise TensorInvalid(
                name, f"floating-point on {q.device}", f"{tensor.dtype} on {tensor.device}"
            )
    if bias is not None:
        pairs = (heads, num_q + num_k - 1) if bias.dim() == 2 else (batch, heads, num_q, num_k)
        wanted = " or 1, ".join(str(size) for size in pairs[:-1]) + f" or 1, {pairs[-1]}"
        fits = bias.dim() == len(pairs) and bias.shape[-1] == pairs[-1]
        if not fits or any(a not in (1, b) for a, b in zip(bias.shape, pairs, strict=True)):
            raise ShapeMismatch(
                "bias",
                f"[{wanted}]",
                tuple(bias.shape),
                fix="A table by distance has rank 2, [Hq or 1, Lq + Lk - 1].",
            )
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ShapeMismatch("sinks", f"[{heads}], one for each query head", tuple(sinks.shape))


def stays_dense(num_q: int, num_k: int, min_tokens: int, executor: Executor) -> bool:
    """Whether a call of these sizes is answered by dense attention."""
    return num_k < min_tokens or num_q < fewest_queries(executor.min_queries, min_tokens)


def summarize_keys(
    k: Tensor,
    rows: Tensor | None,
    key_mask: Tensor | None,
    group: int,
    budget: float,
    min_tokens: int,
    executor: str,
    site: int,
) -> Tensor:
    """``sparse_compiler::summarize_keys``, see ``ops``."""
    if k.dim() != 4:
        raise ShapeMismatch("k", "of rank 4, [B, heads, L, D]", tuple(k.shape))
    _check_rows(rows, key_mask, k.shape[0], k.shape[2])
    if not group or k.shape[2] < min_tokens or budget >= 1:
        return k.new_zeros(ops.summary_shape(k.shape, group))
    if rows is None:
        rows = select.default_rows(k.shape[0], 0, k.shape[2], 0, key_mask, k.device)
    return select.summarize(k, rows, key_mask, group)


@for_site
def select_keys(
    q: Tensor,
    k: Tensor,
    summary: Tensor,
    params: Tensor,
    rows: Tensor | None,
    key_mask: Tensor | None,
    bounds: Tensor | None,
    bias: Tensor | None,
    q_offset: int,
    left: int,
    right: int,
    scale: float,
    block_q: int,
    block_k: int,
    pattern_ids: list[int],
    num_slots: list[int],
    limits: list[int],
    budget: float,
    min_tokens: int,
    executor: str,
    site: int,
) -> tuple[Tensor, ...]:
    """``sparse_compiler::select``, see ``ops``."""
    _check(q, k, None, rows, key_mask, params.shape[0])
    _check_operands(q, k, bounds, bias, None)
    if bounds is not None:
        bounds = bounds.expand(q.shape[0], -1, -1)
    geometry = Geometry(q_offset, left, right, block_q, block_k)
    runner = _executor(executor, q, k, q.shape[3], 0.0)
    num_q, num_k = q.shape[2], k.shape[2]
    if stays_dense(num_q, num_k, min_tokens, runner) or q.numel() == 0 or k.numel() == 0:
        return select.empty_index(q, k, params, geometry, num_slots, limits).tensors()
    if rows is None:
        rows = select.default_rows(q.shape[0], num_q, num_k, q_offset, key_mask, q.device)
    band_rows = rows

    def probe(heads: Tensor, first_row: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        return runner.probe(
            q,
            k,
            heads,
            first_row,
            geometry,
            scale=scale,
            rows=band_rows,
            key_mask=key_mask,
            num_rows=num_rows,
            **given(bounds=bounds, bias=bias),
        )

    observe.selected(site, params)
    none = torch.zeros(0, dtype=torch.int64, device=q.device)
    request = SelectRequest(
        q=q,
        k=k,
        summary=summary,
        heads=none,
        first=none,
        second=none,
        geometry=geometry,
        rows=rows,
        key_mask=key_mask,
        scale=scale,
        limits=Limits(*limits),
        probe=probe,
        bounds=bounds,
        bias=bias,
        group=registry.summary_group(map(registry.by_number, pattern_ids), block_k),
    )
    with recorder.timed(site, q.device) as record:
        index = select.select_index(request, params, pattern_ids, num_slots, limits, budget, runner)
        record(index, geometry, rows, num_q, num_k, bounds)
    return index.tensors()


@for_site
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    full: Tensor,
    num_full: Tensor,
    edge: Tensor,
    edge_len: Tensor,
    num_edge: Tensor,
    columns: Tensor,
    num_columns: Tensor,
    covered: Tensor,
    blocks: Tensor,
    num_blocks: Tensor,
    slots: Tensor,
    rows: Tensor | None,
    key_mask: Tensor | None,
    bounds: Tensor | None,
    bias: Tensor | None,
    q_offset: int,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    block_q: int,
    block_k: int,
    budget: float,
    min_tokens: int,
    executor: str,
    site: int,
) -> tuple[Tensor, Tensor]:
    """``sparse_compiler::attend``, see ``ops``."""
    _check(q, k, v, rows, key_mask, slots.shape[0])
    _check_operands(q, k, bounds, bias, sinks)
    # PyTorch's fused kernels take the last stride for 1, unchecked.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    runner = _executor(executor, q, k, v.shape[3], softcap)
    geometry = Geometry(q_offset, left, right, block_q, block_k)
    num_q, num_k = q.shape[2], k.shape[2]
    keywords: dict[str, Any] = {"scale": scale, "softcap": softcap, "key_mask": key_mask}
    keywords |= given(bounds=bounds, bias=bias)
    if bounds is not None:
        keywords["bounds"] = bounds.expand(q.shape[0], -1, -1)
    if rows is None:
        keywords["rows"] = select.default_rows(
            q.shape[0], num_q, num_k, q_offset, key_mask, q.device
        )
    else:
        keywords["rows"] = rows
    if q.numel() == 0 or k.numel() == 0:
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    elif stays_dense(num_q, num_k, min_tokens, runner):
        out, lse = attend_dense(runner, q, k, v, geometry, plain_rows=rows is None, **keywords)
    else:
        index = AttentionIndex(
            full,
            num_full,
            edge,
            edge_len,
            num_edge,
            columns,
            num_columns,
            covered,
            blocks,
            num_blocks,
            slots,
        )
        out, lse = runner.attend(q, k, v, index, geometry, **keywords)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)

    def shown(params: Tensor | None) -> observe.AttentionCall:
        more = {"bounds": None, "bias": None, "sinks": sinks, "executor": runner.name} | keywords
        return observe.AttentionCall(
            *(params, q, k, v, geometry), **more, banded=full.shape[1] > 0, out=out, lse=lse
        )

    out = observe.attended(site, shown, out)
    return out.contiguous(), lse.contiguous()


ops.set_implementation("summarize_keys", summarize_keys)
ops.set_implementation("select", select_keys)
ops.set_implementation("attend", attend)
