"""Bounds and biases on a real device, against plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from index_cases import make_inputs
from operand_cases import attend_plain, make_bias, make_bounds
from triton_gpu_cases import BANDS, CASES, LONG, TOLERANCE, launch

from sparse_compiler.runtime.kernel_cache import KernelCache
from sparse_compiler.runtime.triton_executor import TritonExecutor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

TWO_SIDED = replace(LONG, left=200, right=150, kinds=("blocks",) * 4)
OPERANDS = {
    "documents": (LONG, "documents", ""),
    "documents_bands": (BANDS, "documents", ""),
    "documents_window_holes": (replace(LONG, left=90, padding="holes"), "documents", ""),
    "documents_m128": (CASES["m128"], "documents", ""),
    "prefix": (replace(TWO_SIDED, left=-1, right=-1), "prefix", ""),
    "two_sided": (TWO_SIDED, "", ""),
    "two_sided_ragged_table": (TWO_SIDED, "ragged", "table"),
    "key": (LONG, "", "key"),
    "chunks_key_heads": (BANDS, "chunks", "key_heads"),
    "row": (LONG, "", "row"),
    "full_softcap": (replace(LONG, softcap=3.0), "", "full"),
    "permuted": (BANDS, "", "permuted"),
    "table": (BANDS, "", "table"),
    "one_table_offset": (replace(LONG, num_q=200), "documents", "one_table"),
    "least": (LONG, "", "least"),
    "fp32": (CASES["fp32"], "documents", "full"),
    "d256": (CASES["d256"], "documents", "row"),
    "blocks_m128": (replace(CASES["m128"], kinds=("blocks",) * 4), "documents", "key"),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_bounds_and_biases_match_plain_pytorch(executor: TritonExecutor, name: str) -> None:
    case, *kinds = OPERANDS[name]
    inputs = make_inputs(case)
    bounds, bias = make_bounds(case, kinds[0]), make_bias(case, kinds[1], case.dtype)
    there = inputs.to("cuda")
    out, lse = executor.attend(
        there.q,
        there.k,
        there.v,
        there.index,
        case.geometry,
        scale=case.scale,
        softcap=case.softcap,
        rows=there.rows,
        key_mask=there.key_mask,
        bounds=None if bounds is None else bounds.cuda(),
        bias=None if bias is None else bias.cuda(),
    )
    want, want_lse = attend_plain(case, inputs, inputs.k, inputs.v, bounds, bias)
    out, lse = out.cpu(), lse.cpu()
    error = (out.double() - want).norm() / want.norm()
    assert error < TOLERANCE[case.dtype] / 2, float(error)
    empty = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert not out[empty].any()
    counted = want_lse > -1e30
    torch.testing.assert_close(lse[counted].double(), want_lse[counted], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kinds", [("documents", "key"), ("", "full"), ("chunks", "table")])
def test_split_rows_with_operands(cache: KernelCache, kinds: tuple[str, str], packed: bool) -> None:
    inputs = make_inputs(BANDS)
    bounds, bias = make_bounds(BANDS, kinds[0]), make_bias(BANDS, kinds[1], BANDS.dtype)
    operands: dict[str, Any] = {
        "bounds": None if bounds is None else bounds.cuda().expand(BANDS.batch, -1, -1),
        "bias": None if bias is None else bias.cuda(),
    }
    out, lse = launch(
        cache, BANDS, inputs.to("cuda"), parts=3, wide=True, packed=packed, **operands
    )
    want, want_lse = attend_plain(BANDS, inputs, inputs.k, inputs.v, bounds, bias)
    error = (out.cpu().double() - want).norm() / want.norm()
    assert error < TOLERANCE[BANDS.dtype] / 2, float(error)
    finite = want_lse.isfinite()
    assert torch.equal(lse.cpu().isfinite(), finite)
    torch.testing.assert_close(lse.cpu()[finite].double(), want_lse[finite], rtol=1e-4, atol=1e-3)
