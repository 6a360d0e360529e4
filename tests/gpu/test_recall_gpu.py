"""Lists of the kernel that keeps a share of the mass on a CUDA device: those of PyTorch's scores."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from recall_cases import RULE, TOLERANCE, assert_keeps_share, recall_cases
from row_score_cases import MARKS, Case, in_eight

from sparse_compiler.runtime import triton_row_scores, triton_sketch
from sparse_compiler.runtime.registry import executor_for

pytestmark = pytest.mark.gpu


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=recall_cases)
def test_what_goes_is_the_least_and_as_much_as_may(case: Case) -> None:
    assert_keeps_share(replace(case, device="cuda"), executor_for("triton", "cuda"))


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_lists(dtype: torch.dtype, eight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch's directions: those of the kernels are others, as good (test_sketch_gpu.py)."""
    if eight and not triton_sketch.eight_bits(torch.device("cuda")):
        pytest.skip("no numbers of 8 bits")
    monkeypatch.setattr(triton_row_scores, "sketch_fits", lambda request: False)
    case = Case(
        *(7, 512, 8192, 7680),
        block_q=64,
        block_k=64,
        groups=4,
        dim=128,
        numbers=((900, 512),),
        dtype=dtype,
        device="cuda",
        name="low_rank_recall",
    )
    rule = replace(RULE, operands=in_eight) if eight else RULE
    # On Hopper a sweep goes before.
    blurred = MARKS if torch.cuda.get_device_capability()[0] == 9 else TOLERANCE
    assert_keeps_share(case, executor_for("triton", "cuda"), rule, blurred)
