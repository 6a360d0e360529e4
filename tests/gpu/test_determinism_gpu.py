"""The same bits from run to run on a real device, index included."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from inputs import block_mask_index, structured_inputs
from sparse import Sparse

from sparse_compiler.ir.index import AttentionIndex
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.runtime.registry import executor_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

REPEATS = 250
HEADS, KV_HEADS = 8, 2
COUNTS = {
    "full": "num_full",
    "edge": "num_edge",
    "edge_len": "num_edge",
    "columns": "num_columns",
    "blocks": "num_blocks",
}
VERTICAL_SLASH = HeadPattern("vertical_slash", 512, 2048)
CASES = {
    "vertical_slash": (16384, [VERTICAL_SLASH] * HEADS),
    "vertical_slash_ragged": (20001, [HeadPattern("vertical_slash", 1000, 1000)] * HEADS),
    "a_shape": (16384, [HeadPattern("a_shape", 128, 3968)] * HEADS),
    "block_sparse": (16384, [HeadPattern("block_sparse", 100)] * HEADS),
    "mixed": (
        32768,
        [VERTICAL_SLASH, HeadPattern("block_sparse", 100), HeadPattern("a_shape", 64, 1024)] * 2
        + [HeadPattern("dense"), HeadPattern("vertical_slash", 3500, 100)],
    ),
}


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def results(sparse: Sparse) -> dict[str, Tensor]:
    """Output, lse and what the lists say; what lies past a count means nothing."""
    index = AttentionIndex(*sparse.select())
    out, lse = sparse.attend(index)
    found: dict[str, Tensor] = {"out": out, "lse": lse}
    for name, count in COUNTS.items():
        lists, number = getattr(index, name), getattr(index, count)
        listed = torch.arange(lists.shape[-1], device=lists.device) < number[..., None]
        found[name] = torch.where(listed, lists, -1)
        found[count] = number
    return found | {"covered": index.covered, "slots": index.slots}


def count_differences(sparse: Sparse) -> dict[str, int]:
    """In how many of the repeats each tensor differed from the first run's."""
    first = {name: bits(tensor).clone() for name, tensor in results(sparse).items()}
    changed = dict.fromkeys(first, torch.zeros((), dtype=torch.int64, device=sparse.q.device))
    side, load = torch.cuda.Stream(), torch.randn(2048, 2048, device=sparse.q.device)
    for number in range(REPEATS):
        if number % 2:
            # Work beside it changes which programs run together and when they end.
            with torch.cuda.stream(side):
                torch.mm(load, load)
        for name, tensor in results(sparse).items():
            changed[name] = changed[name] + (bits(tensor) != first[name]).any()
    torch.cuda.synchronize()
    return {name: int(count) for name, count in changed.items() if int(count)}


def default_blocks() -> tuple[int, int]:
    executor = executor_for("triton", "cuda")
    return executor.block_q, executor.block_k


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_250_repeats_give_the_same_bits(name: str) -> None:
    tokens, heads = CASES[name]
    inputs = structured_inputs(tokens, heads=HEADS, kv_heads=KV_HEADS)
    assert count_differences(Sparse(*inputs, heads, default_blocks())) == {}


@pytest.mark.parametrize("blocks", [(64, 64), (128, 128)])
@torch.inference_mode()
def test_250_repeats_over_a_block_mask_give_the_same_bits(blocks: tuple[int, int]) -> None:
    inputs = structured_inputs(16384, heads=HEADS, kv_heads=KV_HEADS)
    index = block_mask_index(16384, HEADS, blocks, 0.1)
    assert count_differences(Sparse(*inputs, None, blocks, index=index)) == {}
