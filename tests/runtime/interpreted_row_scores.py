"""Runs the kernels of row scores in Triton's interpreter against the PyTorch path; fails loudly.

A program of its own, because ``TRITON_INTERPRET`` is read when a kernel is decorated:
``TRITON_INTERPRET=1 python tests/runtime/interpreted_row_scores.py CACHE_DIRECTORY``.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import HealthCheck, example, given, settings

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from row_score_cases import Case, assert_agrees, cases  # noqa: E402

from sparse_compiler.ir.pattern import HeadPattern  # noqa: E402
from sparse_compiler.patterns import registry  # noqa: E402
from sparse_compiler.runtime.select import select_index, summarize  # noqa: E402
from sparse_compiler.runtime.triton_executor import TritonExecutor  # noqa: E402
from sparse_compiler.testing import parameters  # noqa: E402


@settings(max_examples=14, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases)
@example(Case(seed=1, num_q=70, num_k=70, numbers=((300_000, 1), (1, 3)), block_q=16, block_k=16))
@example(Case(seed=2, num_q=33, num_k=97, offset=64, left=40, padding=True, groups=1, block_k=32))
@example(Case(seed=4, num_q=64, num_k=300, offset=236, numbers=((1, 2**30),), name="low_rank"))
@example(Case(seed=3, num_q=64, num_k=64, right=-1, broken=float("nan"), batch=2, padding=True))
def the_lists_agree(case: Case) -> None:
    assert_agrees(case, EXECUTOR)


def a_mixed_layer_is_listed_pattern_by_pattern() -> None:
    """Heads of low_rank, key_groups and block_sparse side by side, each as if it were alone."""
    case = Case(seed=5, num_q=90, num_k=90, numbers=((20_000, 0),) * 3, groups=1, block_q=16)
    request = case.request()
    names = ("low_rank", "block_sparse", "key_groups")
    used = [registry.get(name) for name in names]
    group = registry.summary_group(used, case.block_k)
    summary = summarize(request.k, request.rows, None, group)
    request = replace(request, summary=summary, group=group)

    def listed(wanted: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        heads = [HeadPattern(n, 2 if n == "block_sparse" else 20_000, 3) for n in wanted]
        numbers = list(dict.fromkeys(registry.get(n).number for n in wanted))
        params = parameters(heads, causal=False)
        index = select_index(request, params, numbers, [0, 3], [0, 0, 6], -1.0, EXECUTOR)
        listed = torch.arange(index.blocks.shape[-1]) < index.num_blocks[..., None]
        return torch.where(listed, index.blocks, -1), index.num_blocks

    mixed = listed(names)
    for slot, name in enumerate(names):
        alone = listed((name,) * 3)
        for got, want in zip(mixed, alone, strict=True):
            assert torch.equal(got[:, slot], want[:, slot]), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    EXECUTOR = TritonExecutor(Path(sys.argv[1]))
    a_mixed_layer_is_listed_pattern_by_pattern()
    the_lists_agree()
