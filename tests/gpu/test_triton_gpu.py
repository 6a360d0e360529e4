"""The triton executor on a real device, against the oracle; run by ``make test-gpu``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from index_cases import make_inputs
from triton_gpu_cases import BASE, CASES, TOLERANCE, run

from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.runtime.probe import probe_torch
from sparse_compiler.runtime.reference import attend_reference
from sparse_compiler.runtime.triton_executor import TritonExecutor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


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
