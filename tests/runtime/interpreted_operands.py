"""Runs ``attend`` with bounds and biases in Triton's interpreter and prints its errors as JSON.

A program of its own, because ``TRITON_INTERPRET`` is read when a kernel is decorated:
``TRITON_INTERPRET=1 python tests/runtime/interpreted_operands.py CACHE_DIRECTORY``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from index_cases import Case, make_inputs, make_scales  # noqa: E402
from interpreted import FP8, Variant, launch  # noqa: E402
from operand_cases import attend_plain, make_bias, make_bounds  # noqa: E402

BASE = Case(batch=1, heads=3, kv_heads=1, num_q=90, num_k=90, kinds=("band", "blocks", "none"))
TWO = replace(BASE, batch=2, spread=0.3)
BAND = replace(BASE, heads=2, kinds=("band",) * 2, spread=0.5)
LISTED = replace(TWO, kinds=("blocks",) * 3, block_q=16)
GROUPS = replace(BASE, heads=4, kv_heads=2, kinds=("blocks", "band", "band", "blocks"), spread=0.3)
LONG = replace(BAND, num_q=150, num_k=150)


@dataclass(frozen=True)
class Operands(Variant):
    """A variant with bounds and a bias.

    Args:
        bounds, bias: kinds of ``operand_cases``.
        bias_dtype: of the bias.
        chosen: by the executor, not by ``parts`` and what follows it.
    """

    bounds: str = ""
    bias: str = ""
    bias_dtype: torch.dtype = torch.float32
    chosen: bool = False


def _chosen(case: Case, bounds: str = "", bias: str = "", **fields: Any) -> Operands:
    return Operands(case, bounds=bounds, bias=bias, chosen=True, **fields)


CASES = {
    "documents": _chosen(TWO, "documents"),
    "documents_long": _chosen(LONG, "documents"),
    "documents_window": _chosen(replace(TWO, left=17), "documents"),
    "documents_holes": _chosen(replace(TWO, padding="holes"), "documents"),
    "documents_ragged_rows": _chosen(replace(TWO, padding="ragged"), "documents"),
    "documents_softcap": _chosen(replace(GROUPS, softcap=2.0), "documents"),
    "documents_offset": _chosen(replace(TWO, num_q=50, num_k=170), "documents"),
    "chunks_both_ways": _chosen(replace(LISTED, right=-1), "chunks"),
    "prefix": _chosen(replace(LISTED, right=-1), "prefix"),
    "ragged": _chosen(replace(TWO, right=-1), "ragged"),
    "ragged_holes": _chosen(replace(LISTED, right=-1, padding="holes"), "ragged"),
    "two_sided": _chosen(replace(LISTED, left=30, right=20)),
    "lookahead": _chosen(replace(LISTED, right=9)),
    "two_sided_documents": _chosen(replace(LISTED, left=30, right=20), "documents"),
    "lookahead_documents": _chosen(replace(LISTED, right=9), "documents", "key"),
    "two_sided_table": _chosen(replace(LISTED, left=30, right=20), "ragged", "table"),
    "full_mask_row": _chosen(replace(LISTED, right=-1, padding="right"), bias="row"),
    "full_mask_window": _chosen(replace(LISTED, left=20, right=-1), "chunks", "full"),
    "key": _chosen(TWO, bias="key"),
    "key_heads": _chosen(GROUPS, bias="key_heads"),
    "key_expanded": _chosen(TWO, bias="expanded"),
    "row": _chosen(TWO, bias="row"),
    "full": _chosen(replace(TWO, padding="holes"), bias="full"),
    "permuted": _chosen(GROUPS, bias="permuted"),
    "table": _chosen(GROUPS, bias="table"),
    "table_offset": _chosen(replace(TWO, num_q=33, num_k=101), bias="table"),
    "one_table_window": _chosen(replace(TWO, left=17), bias="one_table"),
    "softcap_row": _chosen(replace(TWO, softcap=2.0), bias="row"),
    "least": _chosen(TWO, bias="least"),
    "dense_row": _chosen(replace(TWO, spread=4.0), bias="row"),
    "steps_of_a_tile": _chosen(
        replace(BASE, block_q=64, block_k=64, num_q=130, num_k=130, spread=0.5), "documents", "full"
    ),
    "bf16": _chosen(
        replace(TWO, dtype=torch.bfloat16), "documents", "row", bias_dtype=torch.bfloat16
    ),
    "half_table": _chosen(
        replace(GROUPS, dtype=torch.float16), "chunks", "table", bias_dtype=torch.float16
    ),
    "one_row": _chosen(replace(BASE, num_q=1, num_k=64, spread=0.5), "documents", "full"),
    "double": _chosen(BASE, bias="key", bias_dtype=torch.float64),
}
for _name, _more in {
    "gathered": {"packed": False},
    "packed": {"packed": True},
    "split": {"packed": False, "parts": 3},
    "packed_split": {"packed": True, "parts": 3, "first": 2},
}.items():
    CASES |= {
        f"{_name}_documents": Operands(LONG, bounds="documents", **_more),
        f"{_name}_window_key": Operands(
            replace(BAND, left=40, batch=2, padding="holes"), bounds="chunks", bias="key", **_more
        ),
        f"{_name}_ragged_table": Operands(GROUPS, bounds="ragged", bias="table", **_more),
    }
CASES |= {
    "packed_softcap_row": Operands(replace(BAND, softcap=2.0), bias="row", packed=True),
    "wide_row": Operands(
        replace(TWO, softcap=2.0), bounds="chunks", bias="row", wide=True, packed=True
    ),
    "wide_table_split": Operands(GROUPS, bias="table", wide=True, parts=2),
    "fp8": Operands(replace(TWO, dtype=torch.float16), bounds="documents", bias="row", stored=FP8),
    "fp8_packed": Operands(BAND, bounds="chunks", bias="key", stored=FP8, packed=True, lse=False),
}


def errors(executor: Any, directory: str, operands: Operands) -> dict[str, Any]:
    """Largest errors of out and lse, and whether empty rows are exactly (0, -inf)."""
    case = operands.case
    inputs = make_inputs(case)
    bounds = make_bounds(case, operands.bounds)
    if bounds is not None and not operands.chosen:
        bounds = bounds.expand(case.batch, -1, -1)
    bias = make_bias(case, operands.bias, operands.bias_dtype)
    k, v = inputs.k.float(), inputs.v.float()
    if operands.stored is not None:
        k_scale, v_scale = (t[..., None, None] for t in make_scales(case))
        k, v = k.to(FP8).float() * k_scale, v.to(FP8).float() * v_scale
    want, want_lse = attend_plain(case, inputs, k, v, bounds, bias)
    if operands.chosen:
        out, lse = executor.attend(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.index,
            case.geometry,
            scale=case.scale,
            softcap=case.softcap,
            rows=inputs.rows,
            key_mask=inputs.key_mask,
            bounds=bounds,
            bias=bias,
        )
    else:
        _, out, lse = launch(directory, operands, inputs, bounds=bounds, bias=bias)
    empty = want_lse == float("-inf")
    # Of a row whose logits are all the least finite number only `out` means anything.
    counted = want_lse > -1e30
    return {
        "out": float((out.double() - want).abs().max()),
        "lse": float((lse - want_lse)[counted].abs().max()) if operands.lse else 0.0,
        "empty": not out[empty].any()
        and (not operands.lse or bool(torch.equal(lse == float("-inf"), empty))),
        "some_rows": bool(counted.any()),
        "some_empty": bool(empty.any()),
    }


def main() -> None:
    from sparse_compiler.runtime.triton_executor import TritonExecutor

    torch.set_num_threads(1)
    directory = sys.argv[1]
    executor = TritonExecutor(directory)
    wanted = sys.argv[2:] or list(CASES)
    print(json.dumps({name: errors(executor, directory, CASES[name]) for name in wanted}))


if __name__ == "__main__":
    main()
