"""The ``triton`` executor: generated kernels for CUDA and ROCm, and for Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from sparse_compiler.codegen.choose import break_even_tokens, choose_tile
from sparse_compiler.errors import ExecutorUnavailable, ShapeMismatch, TensorInvalid
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.ir.pattern import HeadPattern, LayerPatterns
from sparse_compiler.ir.shape import NEVER, SiteShape, Tile
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import BandRule, BlockRule, SelectRequest
from sparse_compiler.runtime.attend_plan import attend_plan
from sparse_compiler.runtime.executor import Executor, Problem
from sparse_compiler.runtime.hopper_attend import hopper_fits, hopper_spec, launch_hopper
from sparse_compiler.runtime.kernel_cache import KernelCache
from sparse_compiler.runtime.probe import probe_torch
from sparse_compiler.runtime.triton_attend import (
    attend_spec,
    attend_tuning,
    launch_attend,
    rows_contiguous,
    tma_fits,
)
from sparse_compiler.runtime.triton_launch import Launcher
from sparse_compiler.runtime.triton_operands import bias_kind, check_bias, checked_bounds
from sparse_compiler.runtime.triton_probe import (
    probe_by_head,
    probe_operands,
    probe_spec,
    rows_at_once,
)
from sparse_compiler.runtime.triton_row_scores import select_by_rows
from sparse_compiler.runtime.triton_select import select_band
from sparse_compiler.runtime.tune import Loaded, load_constants

__all__ = ["TritonExecutor"]

#: Below it the break-even of the cost model is not trusted.
_SHORTEST = 4096
#: From where on rows are scored on devices, and under masks, that nobody measured. An H200 breaks
#: even below that, docs/design/0016-estimators.md.
_BY_ROWS = 32768
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@lru_cache(maxsize=1)
def _triton_found() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    """Whether Triton interprets kernels; Triton's own switch, read when a kernel is decorated."""
    if not _triton_found():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _device_obstacles() -> list[str]:
    if not torch.cuda.is_available():
        return ["no CUDA or ROCm device is available"]
    capability = _capability(torch.cuda.current_device())
    if torch.version.hip is None and capability < (8, 0):
        return [f"compute capability {capability[0]}.{capability[1]} is below 8.0"]
    return []


@lru_cache(maxsize=16)
def _constants(device: str) -> Loaded:
    return load_constants(device)


def _by_rows(patterns: LayerPatterns) -> bool:
    """Whether some head scores every row."""
    return any(isinstance(registry.get(name).rule, BlockRule) for name in patterns.names)


@lru_cache(maxsize=256)
def _tile(shape: SiteShape, patterns: LayerPatterns, usual: Tile, device: str) -> Tile:
    """The fastest tile by the fitted cost model; the usual one where nothing was measured."""
    loaded = _constants(device)
    # With a budget the patterns' numbers follow from the length, which the model does not know.
    if loaded.code == "ESTIMATE" or patterns.budget is not None:
        return usual
    constants, target = loaded.constants, loaded.target
    ranking = choose_tile(shape, patterns, constants, target=target, reports=loaded.reports)
    # Patterns count key blocks, so their size stays; how many rows share them is free.
    sparse = ranking.sparse(usual.block_k)
    if sparse is None:
        return usual
    tile = sparse.candidate
    tokens = break_even_tokens(shape, patterns, constants, target=target, block_k=usual.block_k)
    tokens = NEVER if tokens is None else max(tokens, _SHORTEST)
    return Tile(tile.block_q, tile.block_k, tokens)


def _check_blocks(geometry: Geometry) -> None:
    for name, size in (("block_q", geometry.block_q), ("block_k", geometry.block_k)):
        if size < 16 or size & (size - 1):
            raise ShapeMismatch(name, "a power of two from 16", size, where="geometry")


class TritonExecutor(Executor):
    """Generated Triton kernels; one launch for all heads of a layer, whatever their patterns.

    Args:
        cache_dir: where generated sources go; None is the user's cache directory.
    """

    name = "triton"
    block_q = 64
    block_k = 64
    # For devices that nobody measured, see ``tile``; cautious: an H200 breaks even at about half.
    # The cost of selection grows with keys alone, hence the second bound.
    min_tokens = 24576
    min_queries = 1024
    auto = HeadPattern("low_rank", 7000, 0)

    def __init__(self, cache_dir: str | os.PathLike[str] | None = None) -> None:
        self._cache = KernelCache(cache_dir)
        self._launch = Launcher()

    def obstacles(self, problem: Problem) -> list[str]:
        found = []
        if not _triton_found():
            return ["triton is not installed"]
        if problem.device_type == "cuda":
            found += _device_obstacles()
        elif not _interpreting():
            found.append(f"device is {problem.device_type}, not cuda")
        if problem.dtype not in _DTYPES:
            found.append(f"dtype {problem.dtype} is not float16, bfloat16 or float32")
        for what, size in (("head", problem.head_dim), ("value", problem.value_dim)):
            if not 16 <= size <= 256:
                found.append(f"{what} size {size} is not in 16..256")
        return found

    def tile(self, shape: SiteShape | None, patterns: LayerPatterns) -> Tile:
        usual = super().tile(shape, patterns)
        if shape is None or not torch.cuda.is_available():
            return usual
        scored = _by_rows(patterns)
        if scored:
            usual = Tile(usual.block_q, usual.block_k, _BY_ROWS)
        parts = {registry.get(name).component for name in patterns.names}
        # The model knows columns and distances of causal masks only; and among masks that are not
        # causal are those that no kernel scores.
        if not shape.causal and (scored or "band" in parts):
            return usual
        if scored and shape.dtype == "float32":
            return usual  # PyTorch's operations find what rows are scored against: never measured
        return _tile(shape, patterns, usual, torch.cuda.get_device_name())

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
        kv_scales: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As ``Executor.attend``.

        Args:
            kv_scales: positive (k_scale, v_scale), broadcastable to [B, Hkv], of a k and v in
                float8_e4m3fn; None is 1.
        """
        self._check(q, k, v, softcap, kv_scales)
        _check_blocks(geometry)
        sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        bounds = checked_bounds(bounds, sizes)
        check_bias(bias, sizes)
        if scale < 0:
            q, scale = -q, -scale
        q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
        interpret = _interpreting()
        capability = _capability(q.device.index or 0) if q.is_cuda else (0, 0)
        hip = torch.version.hip is not None
        options: Any = {"scale": scale, "softcap": softcap, "rows": rows, "key_mask": key_mask}
        # The Hopper kernel masks before it scales, which a scale of 0 would turn into NaN.
        hopper = capability[0] == 9 and not hip and scale > 0
        if hopper and hopper_fits(q, k, v, geometry, index, softcap, bounds=bounds, bias=bias):
            spec = hopper_spec(q, k, v, geometry, softcap=softcap, key_mask=key_mask)
            with device_of(q):
                return launch_hopper(self._cache, spec, q, k, v, index, geometry, **options)
        descriptors = not interpret and not hip and capability >= (9, 0)
        tma = descriptors and tma_fits(k) and tma_fits(v)
        tuning = attend_tuning(
            q.dtype,
            max(q.shape[-1], v.shape[-1]),
            geometry,
            capability,
            has_band=index.full.shape[1] > 0,
            hip=hip,
            bounds=bounds is not None,
            bias=bias_kind(bias),
        )
        more: Any = {"bounds": bounds, "bias": bias}
        step = min(tuning.step_k, geometry.block_k)
        more["plan"] = attend_plan(q, k, v, index, geometry, step, **more)
        spec = attend_spec(
            q,
            k,
            v,
            index,
            geometry,
            tuning,
            softcap=softcap,
            key_mask=key_mask,
            tma=tma,
            interpret=interpret,
            **more,
        )
        with device_of(q):
            return launch_attend(
                self._cache,
                spec,
                q,
                k,
                v,
                index,
                geometry,
                kv_scales=kv_scales,
                **options,
                **more,
            )

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
        """As ``Executor.probe``; with bounds or a bias in PyTorch operations, not by our kernels."""
        self._check(q, k, k, 0.0)
        if bounds is not None or bias is not None:
            sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
            bounds = checked_bounds(bounds, sizes)
            check_bias(bias, sizes)
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
        q, k, scale = probe_operands(q, k, scale)
        columns = distances = None
        with device_of(q):
            step = rows_at_once(q.dtype, q.shape[-1])
            for start in range(0, num_rows, step):
                spec = probe_spec(
                    q,
                    k,
                    geometry,
                    key_mask=key_mask,
                    num_rows=min(step, num_rows - start),
                    interpret=_interpreting(),
                )
                part = probe_by_head(
                    self._cache,
                    self._launch,
                    spec,
                    q,
                    k,
                    heads,
                    first_row + start if start else first_row,
                    geometry,
                    scale=scale,
                    rows=rows.contiguous(),
                    key_mask=key_mask,
                )
                columns = part[0] if columns is None else columns + part[0]
                distances = part[1] if distances is None else distances + part[1]
        assert columns is not None
        assert distances is not None
        return columns, distances

    def select_band(
        self,
        request: SelectRequest,
        params: Tensor,
        rules: Mapping[str, BandRule],
        numbers: Mapping[str, tuple[int, int]],
        sizes: tuple[int, int, int, int],
        num_slots: int,
    ) -> tuple[Tensor, ...] | None:
        # The kernels know neither: the patterns' own methods take them, through ``probe``.
        if request.bounds is not None or request.bias is not None:
            return None
        self._check(request.q, request.k, request.k, 0.0)
        _check_blocks(request.geometry)
        with device_of(request.q):
            return select_band(
                self._cache,
                self._launch,
                request,
                params,
                rules,
                numbers,
                sizes,
                num_slots,
                interpret=_interpreting(),
            )

    def select_blocks(
        self,
        request: SelectRequest,
        params: Tensor,
        rule: BlockRule,
        capacity: int,
        num_slots: int,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        self._check(request.q, request.k, request.k, 0.0)
        _check_blocks(request.geometry)
        arguments = (self._cache, self._launch, request, params, rule, capacity, num_slots, out)
        with device_of(request.q):
            return select_by_rows(*arguments, interpret=_interpreting())

    def _check(
        self, q: Tensor, k: Tensor, v: Tensor, softcap: float, kv_scales: object = None
    ) -> None:
        if kv_scales is not None and k.dtype != torch.float8_e4m3fn:
            raise TensorInvalid("k and v with kv_scales", "of float8_e4m3fn", k.dtype)
        if q.shape[1] % k.shape[1] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
            raise ShapeMismatch(
                "shapes of q, k and v",
                "[B, Hq, Lq, D], [B, Hkv, Lk, D] and [B, Hkv, Lk, Dv] with Hq a multiple of Hkv",
                (tuple(q.shape), tuple(k.shape), tuple(v.shape)),
            )
        eight_bit = k.dtype == v.dtype == torch.float8_e4m3fn
        if not eight_bit and not q.dtype == k.dtype == v.dtype:
            raise TensorInvalid(
                "q, k and v",
                "of one dtype, or k and v of float8_e4m3fn",
                (q.dtype, k.dtype, v.dtype),
            )
        problem = Problem(
            q.device.type, q.dtype, q.shape[3], v.shape[3], q.shape[1] // k.shape[1], softcap
        )
        found = self.obstacles(problem)
        if eight_bit and q.is_cuda and torch.version.hip is None:
            capability = _capability(q.device.index or 0)
            if capability < (8, 9):
                found.append(f"float8 needs compute capability 8.9, not {capability}")
        if found:
            raise ExecutorUnavailable(
                "executor 'triton'", "able to run this attention", "; ".join(found)
            )
