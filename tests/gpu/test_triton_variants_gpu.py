"""The portable kernel and its variants on a real device: packed, split, wide, 8 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from index_cases import make_inputs, make_scales
from triton_gpu_cases import BANDS, CASES, LONG, check, launch

from sparse_compiler.runtime.attend_plan import attend_plan
from sparse_compiler.runtime.kernel_cache import KernelCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

VARIANTS = {
    "packed": (BANDS, {"packed": True}),
    "gathered": (BANDS, {"packed": False}),
    "packed_window": (replace(BANDS, left=90), {"packed": True}),
    "packed_holes": (replace(LONG, padding="holes"), {"packed": True}),
    "packed_ragged": (replace(LONG, padding="ragged"), {"packed": True}),
    "packed_d80_dv48": (replace(BANDS, dim=80, value_dim=48), {"packed": True}),
    "packed_fp32": (replace(BANDS, dtype=torch.float32, dim=64, value_dim=64), {"packed": True}),
    "packed_d256": (replace(BANDS, dim=256, value_dim=256), {"packed": True}),
    "split_2": (LONG, {"parts": 2, "packed": True}),
    "split_4": (LONG, {"parts": 4, "packed": False}),
    "split_32": (replace(LONG, num_q=70, num_k=3000), {"parts": 32, "packed": True}),
    "split_last_rows": (LONG, {"parts": 3, "first": 9}),
    "split_ragged": (replace(LONG, padding="ragged"), {"parts": 4}),
    "split_without_lse": (LONG, {"parts": 2, "lse": False}),
    "wide": (LONG, {"wide": True}),
    "wide_packed_split": (LONG, {"wide": True, "packed": True, "parts": 2}),
    "without_lse": (LONG, {"lse": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_portable_kernel_matches_the_oracle(cache: KernelCache, name: str) -> None:
    """Whatever kernel the executor prefers on this device."""
    case = CASES[name]
    inputs = make_inputs(case)
    out, lse = launch(cache, case, inputs.to("cuda"))
    check(case, inputs, out, lse, inputs.k.float(), inputs.v.float())


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_match_the_oracle(cache: KernelCache, name: str) -> None:
    case, options = VARIANTS[name]
    inputs = make_inputs(case)
    out, lse = launch(cache, case, inputs.to("cuda"), **options)
    assert lse.numel() == (0 if options.get("lse") is False else out[..., 0].numel())
    check(case, inputs, out, lse, inputs.k.float(), inputs.v.float())


@pytest.mark.skipif(
    torch.cuda.is_available()
    and torch.version.hip is None
    and torch.cuda.get_device_capability() < (8, 9),
    reason="8-bit values need compute capability 8.9",
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eight_bit_keys_and_values(cache: KernelCache, dtype: torch.dtype, packed: bool) -> None:
    case = replace(BANDS, dtype=dtype, softcap=3.0 if packed else 0.0)
    inputs = make_inputs(case)
    stored = [t.to(torch.float8_e4m3fn) for t in (inputs.k, inputs.v)]
    scales = make_scales(case)
    there = replace(inputs, k=stored[0], v=stored[1]).to("cuda")
    moved = (scales[0].cuda(), scales[1].cuda())
    out, lse = launch(cache, case, there, packed=packed, kv_scales=moved)
    k, v = (t.float() * s[..., None, None] for t, s in zip(stored, scales, strict=True))
    check(case, inputs, out, lse, k, v)


@pytest.mark.parametrize("parts", [2, 7])
def test_split_rows_give_the_same_bits_every_time(cache: KernelCache, parts: int) -> None:
    inputs = make_inputs(LONG).to("cuda")
    first = launch(cache, LONG, inputs, parts=parts, packed=True)
    for _ in range(250):
        again = launch(cache, LONG, inputs, parts=parts, packed=True)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_few_query_rows_are_split_without_being_asked(cache: KernelCache) -> None:
    case = replace(BANDS, batch=1, num_q=64, num_k=8000, spread=0.5)
    inputs = make_inputs(case).to("cuda")
    plan = attend_plan(inputs.q, inputs.k, inputs.v, inputs.index, case.geometry, 64)
    assert plan.split.parts > 1
    assert plan.split.first == 0


def test_heads_2_to_the_31_elements_apart(cache: KernelCache) -> None:
    """Real addresses past 32 bits: the same numbers as with the keys side by side."""
    case = replace(LONG, batch=1, heads=6, kv_heads=3, kinds=("band",) * 6)
    inputs = make_inputs(case).to("cuda")
    apart = torch.empty(2**31 + case.num_k * case.dim, dtype=case.dtype, device="cuda")
    shape = (1, 3, case.num_k, case.dim)
    far = apart.as_strided(shape, (2**31, 2**30, case.dim, 1))
    far.copy_(inputs.k)
    near = launch(cache, case, inputs, packed=False)
    for packed in (False, True):
        out, lse = launch(cache, case, replace(inputs, k=far), packed=packed)
        torch.testing.assert_close(out, near[0], rtol=0.02, atol=1e-2)
        torch.testing.assert_close(lse, near[1], rtol=1e-4, atol=1e-4)
