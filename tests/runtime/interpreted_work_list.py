"""Runs the work list's kernels in Triton's interpreter and compares their pairs with the oracle's.

A program of its own, because ``TRITON_INTERPRET`` is read when a kernel is decorated:
``TRITON_INTERPRET=1 python tests/runtime/interpreted_work_list.py CACHE_DIRECTORY``. Prints, as JSON,
a complaint for each case, empty if every pair is right.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from index_cases import Case, Inputs, make_inputs  # noqa: E402

from sparse_compiler.codegen.hopper_spec import HopperSpec  # noqa: E402
from sparse_compiler.runtime.hopper_attend import hopper_spec  # noqa: E402
from sparse_compiler.runtime.kernel_cache import KernelCache  # noqa: E402
from sparse_compiler.runtime.reference import allowed_pairs, covered_pairs  # noqa: E402
from sparse_compiler.runtime.work_list import build_work_list  # noqa: E402

BASE = Case(
    batch=1,
    heads=3,
    kv_heads=1,
    num_q=330,
    num_k=330,
    block_q=128,
    block_k=64,
    kinds=("blocks", "none", "blocks"),
    dtype=torch.float16,
    spread=0.4,
)
TWO = replace(BASE, batch=2, num_q=200, num_k=200)
CASES = {
    "plain": BASE,
    "long": replace(BASE, num_q=1100, num_k=1100),
    "groups": replace(BASE, heads=4, kv_heads=2, kinds=("blocks",) * 4),
    "offset": replace(BASE, num_q=150, num_k=470),
    "left_padding": replace(TWO, padding="left"),
    "right_padding": replace(TWO, padding="right"),
    "ragged_rows": replace(TWO, padding="ragged"),
    "holes": replace(TWO, padding="holes"),
    "window": replace(BASE, left=100),
    "window_holes": replace(TWO, left=40, padding="holes"),
    "dense": replace(BASE, spread=2.0),
    "wide_tiles": replace(BASE, block_k=128, num_q=700, num_k=700),
    "lookahead": replace(BASE, right=9),
    "two_sided_window": replace(BASE, left=70, right=70),
    "no_causal_order": replace(BASE, right=-1),
}


class Complaint(Exception):
    """What is wrong with a work list."""


def _tiles(
    spec: HopperSpec, inputs: Inputs, items: torch.Tensor, b: int, h: int, m: int
) -> list[tuple[str, torch.Tensor]]:
    """(kind, keys) of every tile of one item, in the order of the kernel."""
    index = inputs.index
    begin, low, high, finish = items[b, h, m].tolist()
    plain = high - low
    slot = int(index.slots[h, 1])
    where = [*range(low, high), *range(low - 1, begin - 1, -1), *range(high, finish)]
    tiles = []
    for place, at in enumerate(where):
        start = int(index.blocks[b, slot, m, at]) * spec.block_k
        kind = "plain" if place < plain else "tested"
        tiles.append((kind, start + torch.arange(spec.block_k)))
    return tiles


def _pairs_of_item(
    spec: HopperSpec, inputs: Inputs, items: torch.Tensor, case: Case, b: int, h: int, m: int
) -> torch.Tensor:
    """How often the item's tiles count each pair, int [M, Lk]."""
    q_offset, kv_start, kv_len = (int(inputs.rows[b, i]) for i in (2, 3, 4))
    position = (m * spec.block_q + torch.arange(spec.block_q))[:, None] + q_offset
    seen = torch.zeros(spec.block_q, case.num_k, dtype=torch.int64)
    for kind, keys in _tiles(spec, inputs, items, b, h, m):
        inside = (keys >= max(kv_start, 0)) & (keys < min(kv_start + kv_len, case.num_k))
        if inputs.key_mask is not None:
            inside &= inputs.key_mask[b, torch.where(inside, keys, 0)]
        if kind == "plain":
            if not bool(inside.all()):
                raise Complaint(f"a plain tile of head {h}, block {m} leaves the keys")
            counts = torch.ones(spec.block_q, keys.shape[0], dtype=torch.bool)
        else:
            counts = inside.expand(spec.block_q, -1)
        if kind == "tested":
            if spec.causal:
                counts = counts & (keys <= position + case.right)
            if spec.window:
                counts = counts & (keys + case.left >= position)
        at = torch.where(inside, keys, 0).long()
        seen.index_add_(1, at, torch.where(inside, counts, False).long())
    return seen


def complaint(case: Case, cache: KernelCache) -> str:
    inputs = make_inputs(case)
    spec = hopper_spec(
        inputs.q,
        inputs.k,
        inputs.v,
        case.geometry,
        softcap=0.0,
        key_mask=inputs.key_mask,
        interpret=True,
    )
    items = build_work_list(
        cache,
        spec.work_list,
        inputs.index,
        case.geometry,
        case.num_q,
        case.num_k,
        rows=inputs.rows,
        key_mask=inputs.key_mask,
    )
    allowed = allowed_pairs(
        case.batch,
        case.num_q,
        case.num_k,
        case.geometry,
        rows=inputs.rows,
        key_mask=inputs.key_mask,
        device=inputs.q.device,
    )
    want = (
        covered_pairs(inputs.index, case.geometry, case.num_q, case.num_k, rows=inputs.rows)
        * allowed[:, None].long()
    )
    try:
        for b in range(case.batch):
            for h in range(case.heads):
                for m in range(case.geometry.num_row_blocks(case.num_q)):
                    first = m * spec.block_q
                    seen = _pairs_of_item(spec, inputs, items, case, b, h, m)
                    seen = seen[: case.num_q - first]
                    rows = torch.arange(first, first + seen.shape[0])
                    q_start, q_len = int(inputs.rows[b, 0]), int(inputs.rows[b, 1])
                    seen[(rows < q_start) | (rows >= q_start + q_len)] = 0
                    wanted = want[b, h, first : first + spec.block_q].long()
                    if not torch.equal(seen, wanted):
                        wrong = (seen != wanted).nonzero()[0].tolist()
                        raise Complaint(f"b {b}, head {h}, block {m}: first wrong pair {wrong}")
    except Complaint as found:
        return str(found)
    return ""


if __name__ == "__main__":
    kernels = KernelCache(sys.argv[1])
    print(json.dumps({name: complaint(case, kernels) for name, case in CASES.items()}))
