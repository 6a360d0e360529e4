"""Runs the kernels of row scores in Triton's interpreter against the PyTorch path; fails loudly.

A program of its own, because ``TRITON_INTERPRET`` is read when a kernel is decorated:
``TRITON_INTERPRET=1 python tests/runtime/interpreted_row_scores.py CACHE_DIRECTORY``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, example, given, settings

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from row_score_cases import Case, assert_agrees, cases  # noqa: E402

from sparse_compiler.runtime.triton_executor import TritonExecutor  # noqa: E402


@settings(max_examples=14, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases)
@example(Case(seed=1, num_q=70, num_k=70, numbers=((300_000, 1), (1, 3)), block_q=16, block_k=16))
@example(Case(seed=2, num_q=33, num_k=97, offset=64, left=40, padding=True, groups=1, block_k=32))
@example(Case(seed=3, num_q=64, num_k=64, right=-1, broken=float("nan"), batch=2, padding=True))
def the_lists_agree(case: Case) -> None:
    assert_agrees(case, EXECUTOR)


if __name__ == "__main__":
    torch.set_num_threads(1)
    EXECUTOR = TritonExecutor(Path(sys.argv[1]))
    the_lists_agree()
