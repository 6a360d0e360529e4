"""Runs the triton executor's cases in Triton's interpreter and prints their errors as JSON.

A program of its own, because ``TRITON_INTERPRET`` is read when a kernel is decorated:
``TRITON_INTERPRET=1 python tests/runtime/interpreted.py CACHE_DIRECTORY``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from index_cases import Case, make_inputs  # noqa: E402

from sparse_compiler.ir.index import AttentionIndex  # noqa: E402
from sparse_compiler.runtime.probe import probe_torch  # noqa: E402
from sparse_compiler.runtime.reference import attend_reference, covered_pairs  # noqa: E402

BASE = Case(batch=1, heads=3, kv_heads=1, num_q=90, num_k=90, kinds=("band", "blocks", "none"))
TWO = replace(BASE, batch=2)
ATTEND = {
    "plain": TWO,
    "groups": replace(BASE, heads=4, kv_heads=2, kinds=("blocks", "band", "band", "blocks")),
    "ragged_length": replace(BASE, num_q=77, num_k=77),
    "offset": replace(BASE, num_q=50, num_k=170),
    "offset_odd": replace(BASE, num_q=33, num_k=101),
    "left_padding": replace(TWO, padding="left"),
    "right_padding": replace(TWO, padding="right"),
    "ragged_rows": replace(TWO, padding="ragged"),
    "holes": replace(TWO, padding="holes"),
    "window": replace(BASE, left=40),
    "window_holes": replace(TWO, left=40, padding="holes"),
    "narrow_window": replace(BASE, left=5),
    "lookahead": replace(BASE, right=9, kinds=("blocks",) * 3),
    "full_mask": replace(BASE, right=-1, kinds=("blocks",) * 3),
    "full_mask_band": replace(BASE, right=-1, spread=0.3),
    "softcap": replace(BASE, softcap=2.0),
    "dense_band": replace(BASE, spread=2.0),
    "only_band": replace(BASE, kinds=("band",) * 3),
    "value_dim": replace(BASE, dim=24, value_dim=40),
    "wide": replace(BASE, dim=80, value_dim=128),
    "strided": replace(BASE, layout="blhd"),
    "unaligned": replace(BASE, layout="padded"),
    "half": replace(BASE, dtype=torch.float16),
    "bf16": replace(BASE, dtype=torch.bfloat16),
    "small_blocks": replace(BASE, block_q=16, block_k=32, num_q=90, num_k=90),
    "step_of_a_tile": replace(BASE, block_q=64, block_k=64, num_q=130, num_k=130),
    "one_row": replace(BASE, num_q=1, num_k=64),
}
PROBE = {
    "plain": (replace(BASE, kinds=("band",) * 3, num_q=90, num_k=90), 64),
    "groups": (replace(BASE, heads=4, kv_heads=2, kinds=("band",) * 4, num_q=70, num_k=150), 64),
    "window": (replace(BASE, kinds=("band",) * 3, left=20), 64),
    "holes": (replace(TWO, kinds=("band",) * 3, padding="holes"), 64),
    "ragged_rows": (replace(TWO, kinds=("band",) * 3, padding="ragged"), 64),
    "few_rows": (replace(BASE, kinds=("band",) * 3), 5),
    "many_rows": (replace(BASE, kinds=("band",) * 3, num_q=120, num_k=120), 100),
    "full_mask": (replace(BASE, kinds=("band",) * 3, right=-1), 64),
    "wide": (replace(BASE, kinds=("band",) * 3, dim=144), 64),
    "several_chunks": (replace(BASE, batch=1, heads=1, kinds=("band",), num_q=64, num_k=300), 64),
}


def attend_errors(executor: Any, case: Case) -> dict[str, Any]:
    """Largest errors of out and lse, and whether empty rows are exactly (0, -inf)."""
    inputs = make_inputs(case)
    covered = covered_pairs(inputs.index, case.geometry, case.num_q, case.num_k)
    options = {
        "scale": case.scale,
        "softcap": case.softcap,
        "rows": inputs.rows,
        "key_mask": inputs.key_mask,
    }
    out, lse = executor.attend(inputs.q, inputs.k, inputs.v, inputs.index, case.geometry, **options)
    q, k, v = inputs.q.float(), inputs.k.float(), inputs.v.float()
    want, want_lse = attend_reference(q, k, v, inputs.index, case.geometry, **options)
    empty = want_lse == float("-inf")
    return {
        "twice": int(covered.max()) > 1,
        "out": float((out.float() - want).abs().max()),
        "lse": float((lse - want_lse)[~empty].abs().max()),
        "empty": bool(torch.equal(lse == float("-inf"), empty) and not out[empty].any()),
        "dtype": out.dtype == case.dtype and lse.dtype == torch.float32,
        "some_rows": bool((~empty).any()),
    }


def probe_errors(executor: Any, case: Case, num_rows: int) -> dict[str, Any]:
    inputs = make_inputs(case)
    heads = torch.arange(case.heads).flip(0)
    first = (inputs.rows[:, 0] + inputs.rows[:, 1] - num_rows).long()
    options = {
        "scale": case.scale,
        "rows": inputs.rows,
        "key_mask": inputs.key_mask,
        "num_rows": num_rows,
    }
    got = executor.probe(inputs.q, inputs.k, heads, first, case.geometry, **options)
    want = probe_torch(inputs.q, inputs.k, heads, first, case.geometry, **options)
    return {
        "shapes": [tuple(t.shape) for t in got] == [tuple(t.shape) for t in want],
        "columns": float((got[0] - want[0]).abs().max()),
        "distances": float((got[1] - want[1]).abs().max()),
        "mass": float(got[0].sum()),
    }


def nan_shows(executor: Any) -> dict[str, Any]:
    """A NaN key reaches exactly the rows that see it; a NaN query its own row alone."""
    case = replace(BASE, batch=1, kinds=("band",) * 3)
    inputs = make_inputs(case)
    inputs.k[0, 0, 20, 3] = float("nan")
    inputs.q[0, 1, 70, 0] = float("nan")
    options = {"scale": case.scale, "softcap": 0.0, "rows": inputs.rows, "key_mask": None}
    out, lse = executor.attend(inputs.q, inputs.k, inputs.v, inputs.index, case.geometry, **options)
    _, want = attend_reference(inputs.q, inputs.k, inputs.v, inputs.index, case.geometry, **options)
    return {
        "lse": bool(torch.equal(lse.isnan(), want.isnan())) and bool(want.isnan().any()),
        "out": bool(torch.equal(out.isnan().any(-1), want.isnan())),
    }


def empty_lists(executor: Any) -> dict[str, Any]:
    """Slots whose lists are all empty, and an index without capacity for anything."""
    case = replace(BASE, batch=1)
    inputs = make_inputs(case)
    zero = {
        name: torch.zeros_like(getattr(inputs.index, name))
        for name in ("num_full", "num_edge", "num_columns", "num_blocks")
    }
    options = {"scale": case.scale, "softcap": 0.0, "rows": inputs.rows, "key_mask": None}
    out, lse = executor.attend(
        inputs.q,
        inputs.k,
        inputs.v,
        replace(inputs.index, **zero),
        case.geometry,
        **options,
    )
    none = AttentionIndex(
        *(torch.zeros((1, 0, *t.shape[2:]), dtype=t.dtype) for t in inputs.index.tensors()[:-1]),
        slots=torch.full((3, 2), -1, dtype=torch.int32),
    )
    second = executor.attend(inputs.q, inputs.k, inputs.v, none, case.geometry, **options)
    return {
        "empty": not out.any() and bool((lse == float("-inf")).all()),
        "no_capacity": not second[0].any() and bool((second[1] == float("-inf")).all()),
    }


def main() -> None:
    from sparse_compiler.runtime.triton_executor import TritonExecutor

    torch.set_num_threads(1)
    executor = TritonExecutor(sys.argv[1])
    results = {
        "attend": {name: attend_errors(executor, case) for name, case in ATTEND.items()},
        "probe": {name: probe_errors(executor, *case) for name, case in PROBE.items()},
        "nan": nan_shows(executor),
        "empty": empty_lists(executor),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
