"""Sketches on a GPU: they tell logits as PyTorch's path does, with the same bits every time."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from sketch_cases import BALANCED, CASES, SAMPLED, Case, assert_agrees, error, scores, shifted

from sparse_compiler.patterns.base import SelectRequest
from sparse_compiler.runtime.kernel_cache import KernelCache
from sparse_compiler.runtime.triton_launch import Launcher
from sparse_compiler.runtime.triton_sketch import eight_bits, sketch, sketch_fits

pytestmark = pytest.mark.gpu
LAUNCH = Launcher()
BF16 = torch.bfloat16
LARGE = [
    Case(31, 6000, 6000, groups=3, kv_heads=2, dtype=BF16, block_k=64, decay=0.05),
    Case(32, 5000, 9345, offset=4345, dim=128, groups=4, dtype=BF16, block_k=64, decay=0.05),
    Case(33, 6000, 6000, dim=256, groups=1, padding=True, batch=2, block_k=128, decay=0.05),
    Case(34, 5000, 5000, dim=80, groups=1, strided=True, dtype=BF16, mean=20.0, decay=0.05),
]


def on_device(
    cache: KernelCache,
    request: SelectRequest,
    block_k: int,
    key_blocks: int,
    eight: bool | None = False,
) -> tuple[Tensor, Tensor, Tensor]:
    assert sketch_fits(request)
    options = {"block_k": block_k, "key_blocks": key_blocks, "interpret": False, "eight": eight}
    return sketch(cache, LAUNCH, request, **options)


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("case", CASES + SAMPLED + LARGE, ids=lambda case: str(case.seed))
def test_the_sketch_is_as_good_as_pytorchs(cache: KernelCache, case: Case, eight: bool) -> None:
    if eight and not eight_bits(torch.device("cuda")):
        pytest.skip("no numbers of 8 bits")
    case = replace(case, device="cuda")
    assert_agrees(case, lambda *request: on_device(cache, *request, eight), eight=eight)


@pytest.mark.parametrize("case", BALANCED + LARGE[:1], ids=lambda case: str(case.seed))
def test_eight_bits_are_sixteen_rounded(cache: KernelCache, case: Case) -> None:
    if not eight_bits(torch.device("cuda")):
        pytest.skip("no numbers of 8 bits")
    request = replace(case, device="cuda").request()
    exact, rounded = (
        on_device(cache, request, case.block_k, case.key_blocks, eight) for eight in (False, True)
    )
    for want, got in zip(exact[:2], rounded[:2], strict=True):
        # But for numbers that float16 rounds to the middle between two of 8 bits.
        same = want.float().clamp(-448, 448).to(got.dtype).float() == got.float()
        assert same.float().mean() > 0.99


def test_a_constant_of_all_keys_changes_nothing(cache: KernelCache) -> None:
    case = Case(1, decay=0.05, device="cuda")
    near, far = shifted(case)
    found = [on_device(cache, r, case.block_k, case.key_blocks) for r in (far, near)]
    got, want = (scores(*pair[:2], case.num_k) for pair in found)
    assert (error(got, want, near) <= 0.003 * error(want * 0, want, near)).all()


@pytest.mark.parametrize("case", LARGE, ids=lambda case: str(case.seed))
def test_the_same_bits_every_time(cache: KernelCache, case: Case) -> None:
    request = replace(case, device="cuda").request()
    first = on_device(cache, request, case.block_k, case.key_blocks, None)
    for _ in range(5):
        again = on_device(cache, request, case.block_k, case.key_blocks, None)
        pairs = zip(first, again, strict=True)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def test_no_wait_for_the_device(cache: KernelCache) -> None:
    case = Case(1, 4096, 4096, dim=128, device="cuda", block_k=64, dtype=BF16)
    request = case.request()
    on_device(cache, request, 64, 64, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_device(cache, request, 64, 64, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
