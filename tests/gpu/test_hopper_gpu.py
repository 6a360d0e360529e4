"""The Hopper kernel against the oracle, on the only device that can run it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from index_cases import Case, make_inputs

from sparse_compiler.runtime.kernel_cache import KernelCache
from sparse_compiler.runtime.reference import attend_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs compute capability 9",
    ),
]

BASE = Case(
    heads=3,
    kv_heads=1,
    num_q=1100,
    num_k=1100,
    block_q=128,
    block_k=64,
    dim=128,
    value_dim=128,
    kinds=("blocks", "none", "blocks"),
    dtype=torch.bfloat16,
    spread=0.4,
)
TWO = replace(BASE, batch=2, num_q=500, num_k=500)
WIDE = replace(BASE, block_k=128)
CASES = {
    "narrow": BASE,
    "wide": WIDE,
    "groups": replace(BASE, heads=4, kv_heads=2, kinds=("blocks",) * 4),
    "offset": replace(BASE, num_q=150, num_k=470),
    "left_padding": replace(TWO, padding="left"),
    "ragged_rows": replace(TWO, padding="ragged", block_k=128),
    "holes": replace(TWO, padding="holes"),
    "holes_wide": replace(TWO, padding="holes", block_k=128),
    "window": replace(BASE, left=100),
    "two_sided_window": replace(WIDE, left=70, right=70),
    "softcap": replace(BASE, softcap=2.0),
    "d64": replace(WIDE, dim=64, value_dim=64),
    "d80_dv128": replace(BASE, dim=80),
    "fp16": replace(BASE, dtype=torch.float16),
    "strided": replace(BASE, layout="blhd"),
    "dense": replace(WIDE, spread=2.0),
    "no_causal_order": replace(BASE, right=-1),
    "long": replace(WIDE, num_q=4000, num_k=4000, spread=0.1),
}
#: Relative error of an output; dense attention in the same dtype makes half of it.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    from sparse_compiler.runtime.hopper_attend import hopper_fits, hopper_spec, launch_hopper

    case = CASES[name]
    inputs = make_inputs(case)
    there = inputs.to("cuda")
    geometry, softcap = case.geometry, case.softcap
    assert hopper_fits(there.q, there.k, there.v, geometry, there.index, softcap)
    spec = hopper_spec(
        there.q, there.k, there.v, geometry, softcap=softcap, key_mask=there.key_mask
    )
    out, lse = launch_hopper(
        KernelCache(tmp_path_factory.getbasetemp() / "hopper"),
        spec,
        there.q,
        there.k,
        there.v,
        there.index,
        geometry,
        scale=case.scale,
        softcap=softcap,
        rows=there.rows,
        key_mask=there.key_mask,
    )
    want, want_lse = attend_reference(
        inputs.q.float(),
        inputs.k.float(),
        inputs.v.float(),
        inputs.index,
        geometry,
        scale=case.scale,
        softcap=softcap,
        rows=inputs.rows,
        key_mask=inputs.key_mask,
    )
    out, lse = out.cpu(), lse.cpu()
    empty = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert not out[empty].any()
    assert float((out.float() - want).norm() / want.norm()) < TOLERANCE[case.dtype]
    assert float((out.float() - want).abs().max()) < 20 * TOLERANCE[case.dtype]
    torch.testing.assert_close(lse[~empty], want_lse[~empty], rtol=1e-5, atol=1e-4)
