"""Runs the kernels of sketches in Triton's interpreter against PyTorch's path; fails loudly.

A program of its own, because ``TRITON_INTERPRET`` is read when a kernel is decorated:
``TRITON_INTERPRET=1 python tests/runtime/interpreted_sketch.py CACHE_DIRECTORY``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from sketch_cases import (  # noqa: E402
    BALANCED,
    CASES,
    FEW,
    SAMPLED,
    Case,
    assert_agrees,
    error,
    scores,
    shifted,
)

from sparse_compiler.patterns import low_rank  # noqa: E402
from sparse_compiler.patterns.base import SelectRequest  # noqa: E402
from sparse_compiler.runtime.kernel_cache import KernelCache  # noqa: E402
from sparse_compiler.runtime.triton_launch import Launcher  # noqa: E402
from sparse_compiler.runtime.triton_sketch import sketch, sketch_fits  # noqa: E402


def in_the_interpreter(
    request: SelectRequest, block_k: int, key_blocks: int, *, eight: bool = False
) -> tuple[torch.Tensor, ...]:
    assert sketch_fits(request)
    options = {"block_k": block_k, "key_blocks": key_blocks, "interpret": True, "eight": eight}
    return sketch(CACHE, Launcher(), request, **options)


def in_eight_bits(
    request: SelectRequest, block_k: int, key_blocks: int
) -> tuple[torch.Tensor, ...]:
    return in_the_interpreter(request, block_k, key_blocks, eight=True)


def numbers_of_both_sides_are_of_one_size() -> None:
    """Eight bits have few exponents: neither side uses up all of them."""
    for case in BALANCED:
        queries, keys, _ = in_eight_bits(case.request(), case.block_k, case.key_blocks)
        sizes = [t.float().flatten(2, -2).square().mean(2).sqrt() for t in (queries, keys)]
        # Sampled are all rows and keys: what the directions make of them is known but for rounding.
        assert ((sizes[0] / sizes[1]).log2().abs() < 0.3).all(), (case, sizes)
        assert (sizes[0] > 0.01).all() and (sizes[0] < 8).all()


#: NaN, inf and a scale below 0, equal keys, one row that is not 0, and sizes far apart.
EIGHT = (6, 7, 9, 11, 17)


def a_constant_of_all_keys_changes_nothing() -> None:
    case = Case(1, decay=0.05)
    near, far = shifted(case)
    got, want = (in_the_interpreter(r, case.block_k, case.key_blocks) for r in (far, near))
    got, want = (scores(*found[:2], case.num_k) for found in (got, want))
    assert (error(got, want, near) <= 0.003 * error(want * 0, want, near)).all()


def the_same_rows_are_sampled() -> None:
    before = low_rank.SAMPLES
    low_rank.SAMPLES = FEW
    for case in SAMPLED:
        assert_agrees(case, in_the_interpreter)
    low_rank.SAMPLES = before


if __name__ == "__main__":
    torch.set_num_threads(1)
    CACHE = KernelCache(Path(sys.argv[1]))
    for case in CASES:
        assert_agrees(case, in_the_interpreter)
        if case.seed in EIGHT:
            assert_agrees(case, in_eight_bits, eight=True)
    numbers_of_both_sides_are_of_one_size()
    a_constant_of_all_keys_changes_nothing()
    the_same_rows_are_sampled()
