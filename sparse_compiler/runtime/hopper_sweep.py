"""Launching the Hopper ``sweep`` kernel, which goes before ``score`` and leaves it what masks cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_compiler.codegen.emit import PLAIN_SIZES
from sparse_compiler.codegen.row_scores_spec import RowScoresSpec
from sparse_compiler.codegen.sweep_spec import SweepSpec
from sparse_compiler.runtime.kernel_cache import KernelCache, load_kernels
from sparse_compiler.runtime.triton_probe import device_capability

__all__ = ["launch_sweep", "sweep_spec"]

#: Jobs of a launch for each multiprocessor, so that the last ones do not keep the others waiting.
_WAVES = 8


def sweep_spec(
    spec: RowScoresSpec, device: torch.device, num_q: int, num_k: int
) -> SweepSpec | None:
    """The kernel that goes before ``spec``'s, or None where it does not fit or does not pay."""
    if not spec.half or not spec.packed or spec.interpret or spec.key_mask:
        return None
    if spec.head_dim not in ((32,) if spec.eight else (16, 32)) or spec.per_block < 4:
        return None
    if device.type != "cuda" or device_capability(device)[0] != 9:
        return None
    sweep = SweepSpec(
        dtype="float16",
        head_dim=spec.head_dim,
        groups=spec.groups,
        causal=spec.causal,
        window=spec.window,
        heads=spec.heads,
        per_block=spec.per_block,
        every=spec.every,
        block_k=spec.block_k,
        sweep_step=spec.rows,
        eight=spec.eight,
    )
    pays = num_q >= sweep.rows and num_k >= 2 * sweep.tile * sweep.block_k
    return sweep if sweep.tile >= 16 and sweep.rows % spec.rows == 0 and pays else None


def launch_sweep(
    cache: KernelCache,
    spec: SweepSpec,
    queries: Tensor,
    keys: Tensor,
    params: Tensor,
    rows: Tensor,
    slab: Tensor,
    tops: Tensor,
    totals: Tensor,
    sizes: Mapping[str, int],
) -> None:
    """Fill what ``score`` then reads, for the rows and key blocks that ``swept_blocks`` names.

    Args:
        queries: [B, Hq, Lq, D], of type float8_e4m3fn with ``spec.eight``, else float16; their
            products with keys are in units of log2.
        keys: [B, H, PER, key blocks, D] of that type, contiguous; H is Hq / ``spec.groups``.
        params, rows: int32, as ``score`` reads them.
        slab: uint8 [lines, rows / 64, key tiles, 64, key blocks of a tile].
        tops, totals: float32 [lines, rows / 64, key tiles, 64]; rows are a multiple of ``spec.rows``.
        sizes: the arguments of ``score`` by name, and ``first_row``.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    lines, units, key_tiles, unit = tops.shape
    row_tiles = -(-min(units * unit, sizes["num_q"] - sizes["first_row"]) // spec.rows)
    processors = torch.cuda.get_device_properties(queries.device).multi_processor_count
    # Half of the tiles lie behind a causal mask.
    work = lines * key_tiles * row_tiles // (2 if spec.causal else 1)
    span = max(1, min(spec.longest, row_tiles, work // (_WAVES * processors)))
    segments = -(-row_tiles // span)
    known = {**sizes, "row_tiles": row_tiles, "segments": segments, "span": span}
    module = load_kernels(cache, spec)
    flat = keys.view(-1, *keys.shape[-2:])
    tile = [spec.per_block, spec.tile, spec.head_dim]
    source: Any = TensorDescriptor(
        flat, list(flat.shape), list(flat.stride()), tile, module.WHOLE.value
    )
    words = queries.view(torch.int32)
    module.sweep[(lines * key_tiles * segments,)](
        words,
        source,
        params,
        rows,
        slab,
        tops,
        totals,
        *words.stride()[:3],
        *(known[name] for name in PLAIN_SIZES[spec.template]),
        num_warps=spec.num_warps,
    )
