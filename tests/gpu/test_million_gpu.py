"""A million tokens on a real device: no overflow, nothing unwritten, the oracle's numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from inputs import block_mask_index, structured_inputs
from million import MILLION, check_layer, failures
from sparse import Sparse

from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.runtime.registry import executor_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
    pytest.mark.timeout(900),
]

GIB = 2**30


def needs_memory(gib: int) -> None:
    """Skip where the device has less free memory than the test's tensors take."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free device memory, {free / GIB:.0f} there")


def blocks() -> tuple[int, int]:
    executor = executor_for("triton", "cuda")
    return executor.block_q, executor.block_k


@torch.inference_mode()
def test_one_layer_of_a_million_tokens_has_no_overflow() -> None:
    """All 32 heads: q and out hold 2**32 elements, so every 32-bit offset would wrap."""
    needs_memory(60)
    pattern = HeadPattern("vertical_slash", 512, 2048)
    result = check_layer(Sparse(*structured_inputs(MILLION), pattern, blocks()))
    assert not failures(result), result
    assert result["index_mib"] <= 64, result


@torch.inference_mode()
def test_heads_of_several_patterns_at_a_million_tokens() -> None:
    needs_memory(40)
    inputs = structured_inputs(MILLION, heads=8, kv_heads=2)
    kinds = [
        HeadPattern("vertical_slash", 1000, 6096),
        HeadPattern("a_shape", 128, 3968),
        HeadPattern("vertical_slash", 3500, 100),
        HeadPattern("vertical_slash", 30, 800),
    ]
    result = check_layer(Sparse(*inputs, kinds * 2, blocks()))
    assert not failures(result), result


@torch.inference_mode()
def test_block_lists_of_more_than_two_to_the_31_bytes() -> None:
    """The lists themselves: 32 heads of 16384 rows with room for some 1700 blocks each."""
    needs_memory(70)
    index = block_mask_index(MILLION, 32, (64, 64), 0.1)
    assert index.blocks.numel() * index.blocks.element_size() > 2**31
    inputs = structured_inputs(MILLION)
    result = check_layer(Sparse(*inputs, None, (64, 64), index=index))
    assert not failures(result), result
