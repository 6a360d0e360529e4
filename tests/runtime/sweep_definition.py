"""What the Hopper kernel that sweeps over whole key blocks does, in PyTorch's operations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_compiler.codegen.sweep_spec import SweepSpec


def sweep_by_definition(
    spec: SweepSpec,
    queries: Tensor,
    keys: Tensor,
    params: Tensor,
    rows: Tensor,
    slab: Tensor,
    tops: Tensor,
    totals: Tensor,
    sizes: Mapping[str, int],
    scale: float = 1.0,
) -> list[tuple[int, int, slice]]:
    """Fill slab, tops and totals; where nothing was swept, with what nobody should read.

    Args:
        scale: of products, to units of log2.
    Returns:
        The line, the first of ``spec.sweep_step`` rows and the key blocks of each part.
    """
    swept = []
    slab.fill_(77)
    tops.fill_(float("nan"))
    totals.fill_(float("nan"))
    lines, units, _, unit, wide = slab.shape
    size, step = spec.block_k, spec.sweep_step
    place_of = places(wide).to(slab.device)
    for line in range(lines):
        b, slot = divmod(sizes["first_line"] + line, sizes["num_slots"])
        head = int((params[:, 4] == slot).nonzero()[0])
        q_start, q_rows, shift, kv_start, kv_keys = rows[b].tolist()
        for row in range(0, units * unit, step):
            place = sizes["first_row"] + row
            real = max(place, q_start)
            past = min(place + step, q_start + q_rows, sizes["num_q"])
            if real >= past:
                continue
            low, high = max(0, kv_start), min(kv_start + kv_keys, sizes["num_k"])
            if sizes["left"] >= 0:
                low = max(low, past - 1 + shift - sizes["left"])
            if sizes["right"] >= 0:
                high = min(high, real + shift + sizes["right"] + 1)
            begin, end = -(-low // size), max(0, high) // size
            for tile in range(begin // wide, -(-end // wide) if end > begin else 0):
                part = slice(max(begin, tile * wide), min(end, (tile + 1) * wide))
                swept.append((line, place, part))
                # The last row again where there are no more.
                those = torch.arange(place, place + step).clamp(max=sizes["num_q"] - 1)
                asked = queries[b, head].float()[those.to(queries.device)]
                near = keys[b, head // spec.groups, :, part].float()
                scores = scale * torch.einsum("rd,pnd->rnp", asked, near)
                best = scores.amax(-1)
                top = best.amax(-1)
                marks = mark_of(best, top[:, None])
                at = place_of[part.start - tile * wide : part.stop - tile * wide]
                here = torch.arange(row, row + step, device=slab.device)
                here = line, here // unit, tile, here % unit
                slab[(*(t[:, None] if isinstance(t, Tensor) else t for t in here), at)] = (
                    marks.byte()
                )
                sampled = scores[..., spec.every // 2 :: spec.every]
                sampled = spec.every * weight_of(mark_of(sampled, top[:, None, None])).sum((1, 2))
                tops[here] = top
                weight = (weight_of(marks).sum(-1) + sampled) / spec.weight_of_255
                totals[here] = weight
    return swept


def places(wide: int) -> Tensor:
    """Where a row of the slab has each of so many blocks: block j * 8 + c * 2 + e at [c, j, e]."""
    block = torch.arange(wide)
    return block // 2 % 4 * (wide // 4) + block // 8 * 2 + block % 2


def mark_of(score: Tensor, top: Tensor) -> Tensor:
    """Sixteenths of log2 above 15.9375 below the top, int32."""
    return (255 + 16 * (score - top)).round().clamp(0, 255).int()


def weight_of(mark: Tensor) -> Tensor:
    return (64 * mark).to(torch.int16).view(torch.float16).float()
