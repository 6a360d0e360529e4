"""The triton executor on a real device, against the oracle; run by ``make test-gpu``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from index_cases import Case, Inputs, make_inputs, make_scales
from operand_cases import attend_plain, make_bias, make_bounds

from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.runtime.attend_plan import Split, attend_plan
from sparse_compiler.runtime.kernel_cache import KernelCache
from sparse_compiler.runtime.probe import probe_torch
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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

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


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> TritonExecutor:
    return TritonExecutor(tmp_path_factory.mktemp("kernels"))


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


@pytest.mark.parametrize("name", CASES)
def test_attend_matches_the_oracle(executor: TritonExecutor, name: str) -> None:
    case = CASES[name]
    inputs = make_inputs(case)
    out, lse = (tensor.cpu() for tensor in run(executor, case, inputs.to("cuda")))
    want, want_lse = attend_reference(
        inputs.q.float(),
        inputs.k.float(),
        inputs.v.float(),
        inputs.index,
        case.geometry,
        scale=case.scale,
        softcap=case.softcap,
        rows=inputs.rows,
        key_mask=inputs.key_mask,
    )
    assert out.dtype == case.dtype
    assert torch.equal(lse == float("-inf"), want_lse == float("-inf"))
    assert not out[want_lse == float("-inf")].any()
    error = (out.float() - want).norm() / want.norm()
    assert error < TOLERANCE[case.dtype] / 2, float(error)
    torch.testing.assert_close(out.float(), want, rtol=0.05, atol=3 * TOLERANCE[case.dtype])
    finite = want_lse.isfinite()
    torch.testing.assert_close(lse[finite], want_lse[finite], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["bf16", "d128", "window", "holes", "fp32", "offset", "d80_dv48"])
def test_probe_matches_plain_pytorch(executor: TritonExecutor, name: str) -> None:
    case = replace(CASES[name], kinds=("band",) * 4)
    inputs = make_inputs(case).to("cuda")
    heads = torch.tensor([3, 0, 2], device="cuda")
    last = (inputs.rows[:, 0] + inputs.rows[:, 1] - 64).long()
    options = {
        "scale": case.scale,
        "rows": inputs.rows,
        "key_mask": inputs.key_mask,
        "num_rows": 64,
    }
    got = executor.probe(inputs.q, inputs.k, heads, last, case.geometry, **options)
    want = probe_torch(inputs.q, inputs.k, heads, last, case.geometry, **options)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)
    again = executor.probe(inputs.q, inputs.k, heads, last, case.geometry, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_twenty_runs_give_the_same_bits(executor: TritonExecutor) -> None:
    case = replace(CASES["d128"], num_q=1500, num_k=1500)
    inputs = make_inputs(case).to("cuda")
    first = run(executor, case, inputs)
    for _ in range(20):
        again = run(executor, case, inputs)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_nan_in_a_seen_key_shows(executor: TritonExecutor) -> None:
    case = BASE
    inputs = make_inputs(case)
    inputs.k[0, 0, 0, 0] = float("nan")
    inputs.index.columns[:, :, 0] = 0
    out, lse = run(executor, case, inputs.to("cuda"))
    _want, want_lse = attend_reference(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.index,
        case.geometry,
        scale=case.scale,
        rows=inputs.rows,
    )
    assert want_lse.isnan().any()
    assert torch.equal(lse.cpu().isnan(), want_lse.isnan())
    assert out.cpu().isnan().any(-1)[want_lse.isnan()].all()


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


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> KernelCache:
    return KernelCache(tmp_path_factory.mktemp("variants"))


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


def test_a_million_tokens(executor: TritonExecutor) -> None:
    """Sinks, a local band and one far diagonal over 2**20 tokens; sampled rows against the oracle."""
    size, dim, block_q, block_k = 1 << 20, 64, executor.block_q, executor.block_k
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, 1, size, dim, device="cuda", generator=generator, dtype=torch.bfloat16)
        for _ in range(3)
    )
    geometry = Geometry(0, -1, 0, block_q, block_k)
    covered = torch.zeros(1, 1, geometry.distance_size(size), dtype=torch.uint8)
    local = 16 * block_k
    far = 900_000
    covered[..., 1 : local + 1] = 1
    covered[..., far - block_k + 1 : far + 1] = 1
    tested = -(-(block_q + block_k) // block_k)
    tiles = torch.arange(1, 17, dtype=torch.int32) * block_k
    full = torch.cat([tiles[tested:], torch.tensor([far], dtype=torch.int32)])
    edge = tiles[:tested]
    sinks = torch.arange(5, dtype=torch.int32) * 1000
    count = torch.ones(1, 1, dtype=torch.int32)
    index = AttentionIndex(
        full=full[None, None],
        num_full=count * full.numel(),
        edge=edge[None, None],
        edge_len=torch.full_like(edge, block_k)[None, None],
        num_edge=count * edge.numel(),
        columns=sinks[None, None],
        num_columns=count * sinks.numel(),
        covered=covered,
        blocks=torch.zeros(1, 0, geometry.num_row_blocks(size), 0, dtype=torch.int32),
        num_blocks=torch.zeros(1, 0, geometry.num_row_blocks(size), dtype=torch.int32),
        slots=torch.tensor([[0, -1]], dtype=torch.int32),
    )
    index = AttentionIndex(*(tensor.cuda() for tensor in index.tensors()))
    rows = torch.tensor([[0, size, 0, 0, size]], dtype=torch.int32, device="cuda")
    out, lse = executor.attend(
        q, k, v, index, geometry, scale=dim**-0.5, softcap=0.0, rows=rows, key_mask=None
    )
    place = torch.arange(size, device="cuda")
    for row in (0, 63, 64, 5000, 899_999, 900_100, size - 1):
        end = row // block_q * block_q + block_q
        distance = (end - place).clamp(0, covered.shape[-1] - 1)
        seen = (place <= row) & (index.covered[0, 0][distance] != 0) & (place < end)
        seen[sinks.long().cuda()] |= sinks.cuda() <= row
        keys, values = k[0, 0, seen].float(), v[0, 0, seen].float()
        scores = keys @ q[0, 0, row].float() * dim**-0.5
        want = scores.softmax(0) @ values
        torch.testing.assert_close(out[0, 0, row].float(), want, rtol=0.05, atol=2e-2)
        torch.testing.assert_close(lse[0, 0, row], scores.logsumexp(0), rtol=1e-3, atol=1e-3)


def test_probe_of_long_prompts_adds_up(executor: TritonExecutor) -> None:
    size, heads = 100_001, 4
    q = torch.randn(1, heads, size, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 2, size, 64, device="cuda", dtype=torch.bfloat16)
    rows = torch.tensor([[0, size, 0, 0, size]], dtype=torch.int32, device="cuda")
    columns, distances = executor.probe(
        q,
        k,
        torch.arange(heads, device="cuda"),
        torch.tensor([size - 64], device="cuda"),
        Geometry(0, -1, 0, executor.block_q, executor.block_k),
        scale=0.125,
        rows=rows,
        key_mask=None,
        num_rows=64,
    )
    for sums in (columns, distances):
        torch.testing.assert_close(
            sums.sum(-1), torch.full_like(sums[..., 0], 64.0), rtol=1e-3, atol=1e-2
        )
