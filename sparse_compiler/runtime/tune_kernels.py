"""How ``minference tune`` calls the generated kernels and the selection operator."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_compiler.codegen.constants import tile_key
from sparse_compiler.codegen.resources import DEVICE_LIMITS, Resources, obstacles
from sparse_compiler.errors import ExecutorUnavailable
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import BlockRule
from sparse_compiler.runtime.kernel_cache import KernelCache, load_kernels

__all__ = ["generated", "select", "target_of"]

Attend = Callable[[Tensor, Tensor, Tensor, AttentionIndex, Geometry], Any]


def target_of(device: torch.device) -> str:
    """The compilation target whose limits hold on a device; a key of ``DEVICE_LIMITS``."""
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    if name in DEVICE_LIMITS:
        return name
    return "sm_100" if major >= 10 else "sm_80"


def _rows(q: Tensor, k: Tensor) -> Tensor:
    row = [0, q.shape[2], k.shape[2] - q.shape[2], 0, k.shape[2]]
    return torch.tensor([row] * q.shape[0], dtype=torch.int32, device=q.device)


def generated(
    device: torch.device, directory: Path, reports: dict[str, Resources]
) -> dict[str, Attend]:
    """Schedule -> a call of its generated kernel; each new kernel leaves a compiler's report.

    Args:
        directory: of generated sources.
        reports: filled by ``key:size:dtype``.
    Raises:
        ExecutorUnavailable: Triton is missing; a call raises it where its kernel does not fit.
    """
    if importlib.util.find_spec("triton") is None:
        raise ExecutorUnavailable(
            "package triton", "installed, since tuning measures generated kernels", "not installed"
        )
    cache = KernelCache(directory)
    target = target_of(device)
    calls: dict[str, Attend] = {"plain": _plain(cache, device, target, reports)}
    if target == "sm_90":
        calls["hopper"] = _hopper(cache)
    return calls


def _plain(
    cache: KernelCache, device: torch.device, target: str, reports: dict[str, Resources]
) -> Attend:
    from sparse_compiler.runtime.triton_attend import (
        attend_spec,
        attend_tuning,
        launch_attend,
        tma_fits,
    )

    hip = torch.version.hip is not None
    capability = torch.cuda.get_device_capability(device)

    def call(q: Tensor, k: Tensor, v: Tensor, index: AttentionIndex, geometry: Geometry) -> Any:
        tuning = attend_tuning(
            q.dtype,
            max(q.shape[-1], v.shape[-1]),
            geometry,
            capability,
            has_band=index.full.shape[1] > 0,
            hip=hip,
        )
        tma = not hip and capability >= (9, 0) and tma_fits(k) and tma_fits(v)
        spec = attend_spec(
            q, k, v, index, geometry, tuning, softcap=0.0, key_mask=None, tma=tma, interpret=False
        )
        key = f"{tile_key('plain', spec.block_q, spec.block_k)}:{spec.head_dim}:{spec.dtype}"
        if key not in reports:
            reports[key] = _compiled(cache, spec, target)
        stopped = obstacles(reports[key], DEVICE_LIMITS[target], schedule="plain")
        if stopped:
            raise ExecutorUnavailable(f"kernel {key}", "within the device's limits", stopped[0])
        scale = q.shape[-1] ** -0.5
        return launch_attend(
            cache,
            spec,
            q,
            k,
            v,
            index,
            geometry,
            scale=scale,
            softcap=0.0,
            rows=_rows(q, k),
            key_mask=None,
        )

    return call


def _compiled(cache: KernelCache, spec: Any, target: str) -> Resources:
    from sparse_compiler.runtime.ahead import compile_for

    report = compile_for(spec, load_kernels(cache, spec), "attend", target)
    width = 64 if target.startswith("gfx") else 32
    return Resources(report.shared, report.registers, report.spills, width * spec.num_warps)


def _hopper(cache: KernelCache) -> Attend:
    from sparse_compiler.runtime.hopper_attend import hopper_fits, hopper_spec, launch_hopper

    def call(q: Tensor, k: Tensor, v: Tensor, index: AttentionIndex, geometry: Geometry) -> Any:
        if not hopper_fits(q, k, v, geometry, index, 0.0):
            blocks = (geometry.block_q, geometry.block_k)
            raise ExecutorUnavailable("the hopper schedule", "written for this tile", blocks)
        spec = hopper_spec(q, k, v, geometry, softcap=0.0, key_mask=None)
        scale = q.shape[-1] ** -0.5
        return launch_hopper(
            cache,
            spec,
            q,
            k,
            v,
            index,
            geometry,
            scale=scale,
            softcap=0.0,
            rows=_rows(q, k),
            key_mask=None,
        )

    return call


def select(pattern: str, q: Tensor, k: Tensor) -> Callable[[], Any]:
    """A call of selection as a rewritten graph makes it: every head with one pattern."""
    import sparse_compiler.runtime.dispatch  # noqa: F401  installs the operators

    found = registry.get(pattern)
    band = found.component == "band"
    head = found.default()
    if not isinstance(found.rule, BlockRule):
        head = replace(head, first=512, second=2048) if band else replace(head, first=100, second=0)
    first, second = head.first, head.second
    heads = q.shape[1]
    slots = [[slot, -1] if band else [-1, slot] for slot in range(heads)]
    params = torch.tensor(
        [[found.number, first, second, *slots[h]] for h in range(heads)],
        dtype=torch.int32,
        device=q.device,
    )
    limits = [first, second, 0] if band else [0, 0, found.limits(head, 64, 64).blocks]
    operators = torch.ops.sparse_compiler
    numbers = [found.number]

    def call() -> Any:
        summary = operators.summarize_keys(
            k, None, None, registry.summary_group([found], 64), -1.0, 0, "triton", -1
        )
        return operators.select(
            q,
            k,
            summary,
            params,
            *(None, None, None, None),
            k.shape[2] - q.shape[2],
            -1,
            0,
            q.shape[3] ** -0.5,
            64,
            64,
            numbers,
            [heads, 0] if band else [0, heads],
            limits,
            -1.0,
            0,
            "triton" if q.is_cuda else "auto",
            -1,
        )

    return call
