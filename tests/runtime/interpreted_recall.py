"""Runs the kernel that keeps a share of the mass in Triton's interpreter against PyTorch's scores.

A program of its own, because ``TRITON_INTERPRET`` is read when a kernel is decorated:
``TRITON_INTERPRET=1 python tests/runtime/interpreted_recall.py CACHE_DIRECTORY``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, example, given, settings

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from recall_cases import RULE, assert_keeps_share, recall_cases  # noqa: E402
from row_score_cases import Case, case_request, marked  # noqa: E402

from sparse_compiler.runtime.triton_executor import TritonExecutor  # noqa: E402
from sparse_compiler.testing import parameters  # noqa: E402


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=recall_cases)
@example(Case(1, 40, 300, 260, numbers=((900, 500), (1, 500)), name="low_rank_recall"))
@example(Case(4, 32, 200, 168, numbers=((1000, 500),), name="low_rank_recall"))
@example(Case(2, 70, 70, numbers=((950, 2),), padding=True, batch=2, name="low_rank_recall"))
def what_goes_is_the_least_and_as_much_as_may(case: Case) -> None:
    assert_keeps_share(case, EXECUTOR)


def equal_scores_go_from_the_end() -> None:
    """Rows without a preference keep as large a share of all blocks, the first of them."""
    case = Case(3, 32, 640, 608, groups=1, numbers=((890, 500),), name="low_rank_recall")
    request = case.request()
    request.q.zero_()
    params = parameters(case.heads, causal=False)
    found = EXECUTOR.select_blocks(request, params, RULE, 40, 1)
    assert found is not None
    kept = marked(*found, 40)[0, 0, 0]
    expected = case.pattern.choose(case_request(request, 0, case.heads[0])).blocks[0, 0, 0]
    assert torch.equal(kept, expected), (kept, expected)
    assert int(kept.sum()) == 36
    assert kept[:34].all()
    assert kept[-2:].all()


if __name__ == "__main__":
    torch.set_num_threads(1)
    EXECUTOR = TritonExecutor(Path(sys.argv[1]))
    equal_scores_go_from_the_end()
    what_goes_is_the_least_and_as_much_as_may()
