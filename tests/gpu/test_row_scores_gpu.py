"""Row scores on a GPU: the kernels list what PyTorch's operations list, and the same every time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from row_score_cases import Case, assert_agrees

from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.runtime.registry import executor_for
from sparse_compiler.testing import sparse_attention

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COMMON = {"device": "cuda", "block_q": 64, "block_k": 64}
CASES = [
    Case(1, 700, 700, dtype=BF16, dim=128, groups=4, numbers=((5000, 0), (20000, 3)), **COMMON),
    Case(2, 700, 900, 200, dtype=BF16, dim=128, groups=4, name="low_rank", **COMMON),
    Case(
        3, 999, 999, dtype=BF16, dim=64, groups=3, padding=True, batch=2, name="low_rank", **COMMON
    ),
    Case(4, 500, 500, right=-1, dtype=FP16, dim=80, broken=float("nan"), name="low_rank", **COMMON),
    Case(5, 500, 500, left=100, dtype=FP32, dim=64, name="low_rank", **COMMON),
    Case(6, 600, 600, dtype=BF16, dim=256, name="key_means", **COMMON),
    Case(7, 600, 600, dtype=BF16, dim=16, groups=1, name="low_rank", **COMMON),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.seed}")
def test_the_kernels_list_what_pytorch_lists(case: Case) -> None:
    assert_agrees(case, executor_for("triton", "cuda"))


@pytest.mark.parametrize("block_q", [64, 128])
def test_the_same_bits_and_no_wait_for_the_device(block_q: int) -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, 8, 8192, 128, device="cuda", dtype=BF16, generator=draw)
    k, v = (torch.randn(1, 2, 8192, 128, device="cuda", dtype=BF16, generator=draw) for _ in "kv")
    heads = [HeadPattern("low_rank", 7000, 0)] * 8
    geometry = Geometry(0, -1, 0, block_q, 64)
    first = sparse_attention(q, k, v, heads, geometry, executor="triton")
    for _ in range(3):
        again = sparse_attention(q, k, v, heads, geometry, executor="triton")
        assert torch.equal(first[0], again[0])
        counts = first[2].num_blocks
        assert torch.equal(counts, again[2].num_blocks)
        listed = torch.arange(first[2].blocks.shape[-1], device="cuda") < counts[..., None]
        assert torch.equal(first[2].blocks[listed], again[2].blocks[listed])
