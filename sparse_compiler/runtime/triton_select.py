"""Launching the generated selection kernels: from scores to the lists of the band component."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_compiler.codegen.select_spec import MAX_TILE, SelectSpec
from sparse_compiler.codegen.spec import power_of_two
from sparse_compiler.ir.index import Geometry
from sparse_compiler.patterns.base import BandRule, Limits, SelectRequest
from sparse_compiler.runtime.kernel_cache import KernelCache, load_kernels
from sparse_compiler.runtime.triton_launch import Launcher
from sparse_compiler.runtime.triton_probe import (
    Scores,
    launch_probe,
    probe_operands,
    probe_spec,
    rows_at_once,
)

__all__ = ["launch_select", "select_band", "select_spec"]

_ABSENT = -1 << 16
_LEAST_TILE = 4096


def select_spec(
    rules: Mapping[str, BandRule],
    *,
    heads: int,
    geometry: Geometry,
    most: int,
    longest: int,
    key_mask: bool,
    interpret: bool,
) -> SelectSpec:
    """The kernels that a layer needs.

    Args:
        rules: by kind.
        heads: Hq.
        most: columns or distances that one head may list.
        longest: scores of one line.
    """
    best = rules.get("best", BandRule(0, "best"))
    # With four times as many maxima as are wanted, about 1.15 times as many candidates remain.
    tile = min(MAX_TILE, max(_LEAST_TILE, power_of_two(4 * max(1, most))))
    tile = min(tile, max(_LEAST_TILE, power_of_two(longest)))
    return SelectSpec(
        heads=heads,
        block_q=geometry.block_q,
        block_k=geometry.block_k,
        key_mask=key_mask,
        tile=32 if interpret else tile,
        items=16 if interpret else 1024,
        least_columns=best.least_columns,
        least_distances=best.least_distances,
        interpret=interpret,
    )


def launch_select(
    cache: KernelCache,
    launch: Launcher,
    spec: SelectSpec,
    scores: Scores | None,
    params: Tensor,
    rules: Mapping[str, BandRule],
    numbers: Mapping[str, tuple[int, int]],
    geometry: Geometry,
    sizes: tuple[int, int, int, int],
    *,
    num_slots: int,
    num_k: int,
    most_distances: int,
    rows: Tensor,
    key_mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """The band component's tensors in the order of ``INDEX_FIELDS``, and ``slots``.

    Args:
        scores: of the heads of kind ``best``; None if there is none.
        params: int32 [Hq, 5] as in ``ops``.
        rules: by kind; the mask is causal.
        numbers: by kind, (first, second) that take the place of the parameters'; may be empty.
        sizes: capacities (F, E, C, X).
        num_slots: S > 0.
        most_distances: that one head may list, -1 for no limit.
        rows, key_mask: as ``Executor.probe``.
    """
    full_size, edge_size, columns_size, size = sizes
    batch, device = rows.shape[0], rows.device
    shape = (batch, num_slots)

    def ints(*tail: int) -> Tensor:
        return torch.empty((*shape, *tail), dtype=torch.int32, device=device)

    full, num_full = ints(full_size), ints()
    edge, edge_len, num_edge = ints(edge_size), ints(edge_size), ints()
    columns, num_columns = ints(columns_size), ints()
    covered = torch.empty((*shape, size), dtype=torch.uint8, device=device)
    slots = torch.empty((params.shape[0], 2), dtype=torch.int32, device=device)
    lines = batch * num_slots
    kept_size = size if most_distances < 0 else min(size, most_distances)
    scratch = torch.empty(
        2 * lines * spec.tile + lines * (kept_size + 1), dtype=torch.int32, device=device
    )
    candidates, kept, num_kept = scratch.split([2 * lines * spec.tile, lines * kept_size, lines])
    row_size = 0 if scores is None else scores.row_size
    slices = -(-size // spec.items)
    plain = [params.shape[0], num_slots, num_k, geometry.left, size, row_size, kept_size]
    plain += [kept_size.bit_length(), slices, full_size, edge_size, columns_size]
    plain += [
        rules[kind].number if kind in rules else _ABSENT for kind in ("best", "nearest", "all")
    ]
    for kind in ("best", "nearest"):
        plain += numbers.get(kind, (-1, -1))
    module = load_kernels(cache, spec)
    inputs = [scratch.view(torch.float32) if scores is None else scores.data, params, rows]
    if spec.key_mask:
        assert key_mask is not None
        inputs.append(key_mask.contiguous().view(torch.uint8))
    inputs += [candidates, columns, num_columns, kept, num_kept]
    launch(module.keep, 2 * lines, inputs, (), plain, num_warps=spec.keep_warps, num_stages=1)
    outputs = [params, kept, num_kept, full, num_full, edge, edge_len, num_edge, covered, slots]
    launch(module.lower, lines * (1 + slices), outputs, (), plain, num_warps=4, num_stages=1)
    return full, num_full, edge, edge_len, num_edge, columns, num_columns, covered, slots


def select_band(
    cache: KernelCache,
    launch: Launcher,
    request: SelectRequest,
    params: Tensor,
    rules: Mapping[str, BandRule],
    numbers: Mapping[str, tuple[int, int]],
    sizes: tuple[int, int, int, int],
    num_slots: int,
    *,
    interpret: bool,
) -> tuple[Tensor, ...] | None:
    """See ``Executor.select_band``; four launches, or None where a launch takes too few rows."""
    geometry, key_mask, limits = request.geometry, request.key_mask, request.limits
    q, k, scale = probe_operands(request.q, request.k, request.scale)
    best = rules.get("best")
    if best is not None and best.probe_rows > rows_at_once(q.dtype, q.shape[-1]):
        return None
    rows, params = request.rows.contiguous(), params.contiguous()
    num_k = k.shape[2]
    scores = None
    if best is not None:
        spec = probe_spec(
            q,
            k,
            geometry,
            key_mask=key_mask,
            num_rows=best.probe_rows,
            interpret=interpret,
            last_rows=True,
        )
        scores = launch_probe(
            cache,
            launch,
            spec,
            q,
            k,
            params,
            None,
            geometry,
            num_slots=num_slots,
            probed=best.number,
            scale=scale,
            rows=rows,
            key_mask=key_mask,
        )
    selection = select_spec(
        rules,
        heads=params.shape[0],
        geometry=geometry,
        most=_most(limits, num_k, sizes[3]),
        longest=max(num_k, sizes[3]),
        key_mask=key_mask is not None,
        interpret=interpret,
    )
    return launch_select(
        cache,
        launch,
        selection,
        scores,
        params,
        rules,
        numbers,
        geometry,
        sizes,
        num_slots=num_slots,
        num_k=num_k,
        most_distances=limits.distances,
        rows=rows,
        key_mask=key_mask,
    )


def _most(limits: Limits, num_k: int, size: int) -> int:
    """Columns or distances that one head may list."""
    columns = num_k if limits.columns < 0 else limits.columns
    return max(columns, size if limits.distances < 0 else limits.distances)
