"""Attentions on a real device, launches of the portable kernel, and the comparison with the oracle."""

from __future__ import annotations

from dataclasses import replace

import torch
from index_cases import Case, Inputs

from sparse_compiler.runtime.attend_plan import Split, attend_plan
from sparse_compiler.runtime.kernel_cache import KernelCache
from sparse_compiler.runtime.reference import attend_reference
from sparse_compiler.runtime.triton_attend import (
    attend_spec,
    attend_tuning,
    launch_attend,
    rows_contiguous,
    tma_fits,
)
from sparse_compiler.runtime.triton_executor import TritonExecutor
from sparse_compiler.runtime.triton_operands import bias_kind

#: Largest error allowed, as a share of the largest reference value.
TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 2e-5}
MIXED = ("band", "blocks", "band", "none")
BASE = Case(
    batch=2,
    heads=4,
    kv_heads=2,
    num_q=333,
    num_k=333,
    dim=64,
    value_dim=64,
    block_q=64,
    block_k=64,
    kinds=MIXED,
    spread=0.2,
    dtype=torch.bfloat16,
)
CASES = {
    "bf16": BASE,
    "fp16": replace(BASE, dtype=torch.float16),
    "fp32": replace(BASE, dtype=torch.float32),
    "d128": replace(BASE, dim=128, value_dim=128, num_q=700, num_k=700),
    "d256": replace(BASE, dim=256, value_dim=256),
    "fp32_d256": replace(BASE, dim=256, value_dim=256, dtype=torch.float32),
    "d80_dv48": replace(BASE, dim=80, value_dim=48),
    "offset": replace(BASE, num_q=100, num_k=500, kv_heads=1),
    "window": replace(BASE, left=90, num_q=500, num_k=500),
    "left": replace(BASE, padding="left"),
    "right": replace(BASE, padding="right"),
    "ragged": replace(BASE, padding="ragged"),
    "holes": replace(BASE, padding="holes"),
    "full_mask": replace(BASE, right=-1, kinds=("blocks",) * 4),
    "softcap": replace(BASE, softcap=3.0),
    "blhd": replace(BASE, layout="blhd", dim=128, value_dim=128),
    "unaligned": replace(BASE, layout="padded"),
    "m128": replace(BASE, block_q=128, dim=128, value_dim=128, num_q=700, num_k=700),
    "m128_n128": replace(BASE, block_q=128, block_k=128, num_q=700, num_k=700),
}


def run(executor: TritonExecutor, case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return executor.attend(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.index,
        case.geometry,
        scale=case.scale,
        softcap=case.softcap,
        rows=inputs.rows,
        key_mask=inputs.key_mask,
    )


def launch(
    cache: KernelCache,
    case: Case,
    inputs: Inputs,
    *,
    parts: int = 1,
    first: int = 0,
    packed: bool | None = None,
    wide: bool = False,
    lse: bool = True,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    bounds: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The portable kernel with a plan of our choice; k and v may be stored in 8 bits."""
    q, k, v = (rows_contiguous(t) for t in (inputs.q, inputs.k, inputs.v))
    capability = torch.cuda.get_device_capability()
    hip = torch.version.hip is not None
    tma = not hip and capability >= (9, 0) and tma_fits(k) and tma_fits(v)
    dim, band = max(case.dim, case.value_dim), "band" in case.kinds
    more = {"bounds": bounds is not None, "bias": bias_kind(bias)}
    tuning = attend_tuning(q.dtype, dim, case.geometry, capability, has_band=band, hip=hip, **more)
    operands = (q, k, v, inputs.index, case.geometry)
    step = min(tuning.step_k, case.block_k)
    given = {"bounds": bounds, "bias": bias}
    plan = attend_plan(*operands, step, split=Split(first, parts), packed=packed, **given)
    plan = replace(plan, wide=plan.wide or wide)
    options = {"softcap": case.softcap, "key_mask": inputs.key_mask, "plan": plan, **given}
    spec = attend_spec(*operands, tuning, tma=tma, interpret=False, lse=lse, **options)
    assert (spec.split, spec.wide, spec.lse) == (parts > 1, plan.wide, lse)
    assert packed is None or spec.packed == packed
    return launch_attend(
        cache,
        spec,
        *operands,
        scale=case.scale,
        rows=inputs.rows,
        kv_scales=kv_scales,
        **options,
    )


LONG = replace(BASE, num_q=700, num_k=700, dim=128, value_dim=128)
BANDS = replace(LONG, kinds=("band",) * 4)


def check(
    case: Case,
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """Compare with the oracle on the CPU, over ``k`` and ``v`` in float32."""
    want, want_lse = attend_reference(
        inputs.q.float(),
        k,
        v,
        inputs.index,
        case.geometry,
        scale=case.scale,
        softcap=case.softcap,
        rows=inputs.rows,
        key_mask=inputs.key_mask,
    )
    error = (out.cpu().float() - want).norm() / want.norm()
    assert error < TOLERANCE[case.dtype] / 2, float(error)
    assert not out.cpu()[want_lse == float("-inf")].any()
    if lse.numel():
        assert torch.equal(lse.cpu() == float("-inf"), want_lse == float("-inf"))
        finite = want_lse.isfinite()
        torch.testing.assert_close(lse.cpu()[finite], want_lse[finite], rtol=1e-4, atol=1e-3)
