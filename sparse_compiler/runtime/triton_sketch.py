"""Launching the kernels that sketch queries and keys in few directions; see ``patterns.low_rank``.

The PyTorch operations of ``sketches`` define what is computed; three launches take the place of
about a hundred. Directions are found in float32 instead of float64, so they are not the same
numbers, but span what explains as much of the products.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparse_compiler.codegen.sketch_spec import SketchSpec
from sparse_compiler.codegen.spec import power_of_two
from sparse_compiler.patterns import low_rank
from sparse_compiler.patterns.base import SelectRequest
from sparse_compiler.patterns.low_rank import RANK
from sparse_compiler.runtime.kernel_cache import KernelCache, load_kernels
from sparse_compiler.runtime.triton_attend import float32_precision, rows_contiguous
from sparse_compiler.runtime.triton_launch import Launcher
from sparse_compiler.runtime.triton_probe import device_capability

__all__ = ["eight_bits", "sketch", "sketch_fits", "sketch_spec"]

_MAX_DIM = 256
#: Programs of ``moments`` for queries that a large device runs at once, beside as many for keys.
_PROGRAMS = 66


def sketch_fits(request: SelectRequest) -> bool:
    """Whether the kernels know these queries and keys; else PyTorch's operations take them."""
    q, k = request.q, request.k
    return (
        q.dtype == k.dtype
        and q.dtype in (torch.float16, torch.bfloat16)
        and RANK < q.shape[3] <= _MAX_DIM
        and q.numel() > 0
        and k.numel() > 0
    )


@lru_cache(maxsize=256)
def sketch_spec(
    dtype: torch.dtype,
    dim: int,
    groups: int,
    lines: int,
    *,
    block_k: int,
    key_mask: bool,
    capability: tuple[int, int],
    hip: bool,
    interpret: bool,
    eight: bool = False,
) -> SketchSpec:
    """The kernels that a layer needs.

    Args:
        dim: D.
        groups: query heads per key head.
        lines: query heads of all batch entries.
        block_k: keys of a block, a power of two from 16.
        capability: of a CUDA device.
        eight: 8-bit numbers; else float16.
    """
    # Triton 3.6 fails to pipeline the loop of `moments` for Blackwell's matrix units.
    plain = capability[0] >= 10 and not hip
    tile = 128 if dim <= 64 else 64
    # In the interpreter few, which are more than one of each.
    share = 8 if interpret else max(1, _PROGRAMS // lines)
    parts = max(2, min(16, power_of_two(share + 1) // 2))
    return SketchSpec(
        dtype=str(dtype).removeprefix("torch."),
        head_dim=dim,
        groups=groups,
        key_mask=key_mask,
        rank=RANK,
        turns=low_rank.TURNS,
        block_k=block_k,
        # 512 rows of a program; three programs then fit a Hopper multiprocessor with D up to 128.
        rows=max(block_k, tile),
        steps=max(1, 512 // max(block_k, tile)),
        query_parts=parts,
        key_parts=parts,
        samples=32 if plain else 64,
        num_stages=1 if plain else 2 if hip else 3,
        interpret=interpret,
        search_warps=4 if hip else 0,
        precision="ieee" if hip else float32_precision(),
        eight=eight,
    )


def eight_bits(device: torch.device) -> bool:
    """Whether the device multiplies numbers of 8 bits, e4m3."""
    return torch.version.hip is None and device_capability(device) >= (8, 9)


def sketch(
    cache: KernelCache,
    launch: Launcher,
    request: SelectRequest,
    *,
    block_k: int,
    key_blocks: int,
    interpret: bool,
    eight: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys in ``RANK`` directions, laid out as the kernels of row scores read them.

    Args:
        request: one that ``sketch_fits``.
        block_k: keys of a block, a power of two from 16.
        key_blocks: of a whole line, at least ceil(Lk / block_k).
        eight: numbers of 8 bits; None where a device has them, not in the interpreter.
    Returns:
        [B, Hq, Lq, RANK] queries, rows with a NaN or inf 0; [B, Hq, block_k, key_blocks, RANK] keys
        less their mean, 0 past the last key and where a NaN or inf was; both float8_e4m3fn or float16,
        their products in units of log2, their sizes balanced; uint8 [B, Hq, key_blocks], whether a
        NaN or inf was. No host synchronisation.
    """
    q, k = rows_contiguous(request.q), rows_contiguous(request.k)
    (batch, heads, num_q, dim), (_, kv_heads, num_k, _) = q.shape, k.shape
    geometry, mask, device = request.geometry, request.key_mask, q.device
    lines = batch * heads
    eight = eight_bits(device) and not interpret if eight is None else eight
    spec = sketch_spec(
        q.dtype,
        dim,
        heads // kv_heads,
        lines,
        block_k=block_k,
        key_mask=mask is not None,
        capability=device_capability(device),
        hip=torch.version.hip is not None,
        interpret=interpret,
        eight=eight,
    )
    dtype = torch.float8_e4m3fn if eight and not interpret else torch.float16
    work = torch.empty(lines * spec.line, dtype=torch.float32, device=device)
    queries = torch.empty(batch, heads, num_q, RANK, dtype=dtype, device=device)
    keys = torch.empty(batch, heads, block_k, key_blocks, RANK, dtype=dtype, device=device)
    broken = torch.empty(batch, heads, key_blocks, dtype=torch.uint8, device=device)
    every_q, every_k = (-(-n // low_rank.SAMPLES) for n in (num_q, num_k))
    samples = (-(-num_q // every_q), -(-num_k // every_k))
    aligned = geometry.right == 0 or num_q + geometry.q_offset == num_k
    chunk = spec.rows * spec.steps
    q_chunks, k_chunks = -(-num_q // chunk), -(-key_blocks * block_k // chunk)
    q_programs = batch * heads * q_chunks
    plain = [num_q, num_k, kv_heads, every_q, every_k, *samples, int(aligned)]
    plain += [q_chunks, k_chunks, q_programs, key_blocks]
    strides = (*q.stride()[:3], *k.stride()[:3])
    masks = [] if mask is None else [mask.contiguous().view(torch.uint8)]
    rows, module = request.rows.contiguous(), load_kernels(cache, spec)
    launch(
        module.moments,
        lines * spec.parts * spec.tiles,
        [q, k, rows, *masks, work],
        strides,
        plain,
        **spec.launch_options("moments"),
    )
    launch(module.directions, lines, [work], (), plain, **spec.launch_options("directions"))
    launch(
        module.project,
        q_programs + lines * k_chunks,
        [q, k, work, queries, keys, broken],
        strides,
        [request.scale, *plain],
        **spec.launch_options("project"),
    )
    if eight and interpret:
        queries, keys = queries.to(torch.float8_e4m3fn), keys.to(torch.float8_e4m3fn)
    return queries, keys, broken
