"""Runs the kernels of row scores in Triton's interpreter against the PyTorch path; fails loudly.

A program of its own, because ``TRITON_INTERPRET`` is read when a kernel is decorated:
``TRITON_INTERPRET=1 python tests/runtime/interpreted_row_scores.py CACHE_DIRECTORY``.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, example, given, settings

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from recall_cases import assert_keeps_share  # noqa: E402
from row_score_cases import MARKS, Case, assert_agrees, cases, use_eight_bits  # noqa: E402
from sweep_definition import sweep_by_definition  # noqa: E402

from sparse_compiler.codegen.row_scores_spec import RowScoresSpec  # noqa: E402
from sparse_compiler.codegen.sweep_spec import SweepSpec  # noqa: E402
from sparse_compiler.ir.pattern import HeadPattern  # noqa: E402
from sparse_compiler.patterns import registry  # noqa: E402
from sparse_compiler.runtime import row_score_scratch, triton_row_scores  # noqa: E402
from sparse_compiler.runtime.hopper_sweep import launch_sweep, sweep_spec  # noqa: E402
from sparse_compiler.runtime.select import select_index, summarize  # noqa: E402
from sparse_compiler.runtime.triton_executor import TritonExecutor  # noqa: E402
from sparse_compiler.testing import parameters  # noqa: E402

#: Directions and keys of each query head, two heads of one key head, a broken key.
OF_EACH_HEAD: dict[str, Any] = {"dim": 40, "groups": 2, "numbers": ((20_000, 2), (5_000, 0))}
OF_EACH_HEAD["broken"] = float("inf")


@settings(max_examples=14, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases)
@example(Case(seed=1, num_q=70, num_k=70, numbers=((300_000, 1), (1, 3)), block_q=16, block_k=16))
@example(Case(seed=2, num_q=33, num_k=97, offset=64, left=40, padding=True, groups=1, block_k=32))
@example(Case(seed=4, num_q=64, num_k=300, offset=236, numbers=((1, 2**30),), name="low_rank"))
@example(Case(seed=6, num_q=300, num_k=1900, offset=1600, numbers=((1, 0),), name="low_rank"))
@example(Case(seed=7, num_q=64, num_k=1900, offset=1836, left=1000, numbers=((1, 0),), groups=1))
@example(Case(seed=3, num_q=64, num_k=64, right=-1, broken=float("nan"), batch=2, padding=True))
@example(Case(seed=8, num_q=70, num_k=130, offset=60, name="low_rank", **OF_EACH_HEAD))
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


class SmallSweep(SweepSpec):
    """Tiles of 64 rows and 16 key blocks: the interpreter is slow."""

    @property
    def tile(self) -> int:
        return 16


def small_sweep(
    spec: RowScoresSpec, device: torch.device, num_q: int, num_k: int
) -> SweepSpec | None:
    return SmallSweep(
        dtype="float16",
        head_dim=spec.head_dim,
        groups=spec.groups,
        heads=spec.heads,
        per_block=spec.per_block,
        every=spec.every,
        block_k=spec.block_k,
        rows=64,
        sweep_step=spec.rows,
        eight=spec.eight,
    )


def swept_in_pytorch(cache: object, spec: SweepSpec, *arguments: Any) -> None:
    """In place of the Hopper kernel, which no interpreter runs."""
    # The scale of cases; numbers of 8 bits have it within.
    scale = 1.0 if spec.eight else 0.5 / math.log(2)
    SWEPT.extend(sweep_by_definition(spec, *arguments, scale=scale))


SWEPT: list[tuple[int, int, slice]] = []
SWEPT_CASES = [
    Case(seed=1, num_q=300, num_k=600, offset=300, dim=16, groups=1),
    Case(seed=2, num_q=400, num_k=400, batch=2, dim=16, groups=2, block_q=64),
    Case(seed=3, num_q=200, num_k=900, offset=700, left=640, dim=16, groups=1),
    Case(seed=4, num_q=130, num_k=520, right=-1, dim=16, groups=1, numbers=((200_000, 2),)),
    Case(
        *(6, 300, 600, 300),
        dim=16,
        groups=1,
        batch=2,
        real=((70, 210, 300, 37, 520), (0, 300, 300, 0, 600)),
    ),
    # A block that the first key cuts holds most of the mass.
    Case(9, 300, 600, 300, dim=16, groups=1, sink=6.0, real=((0, 300, 300, 3, 597),)),
    # All but one block are far below the best of their tile.
    Case(7, 300, 600, 300, dim=16, groups=1, sink=120.0, numbers=((1, 0),)),
    Case(seed=5, num_q=300, num_k=600, offset=300, **OF_EACH_HEAD),
]


def what_was_swept_before_counts() -> None:
    """``score`` leaves out what another kernel did, takes its sums, and works in pieces."""
    triton_row_scores.sweep_spec = small_sweep
    triton_row_scores.launch_sweep = swept_in_pytorch
    row_score_scratch._LEAST_ROWS = 64
    for size in (1 << 30, 1 << 18):
        row_score_scratch._BYTES = size
        for case in SWEPT_CASES:
            SWEPT.clear()
            assert_agrees(replace(case, name="low_rank"), EXECUTOR, MARKS)
            assert SWEPT, case
            # The last rows see most.
            assert max(place for _, place, _ in SWEPT) + 64 >= case.num_q, case


def shares_are_kept_behind_a_sweep() -> None:
    """Marks that are no numbers add nothing up, and stay where all shall."""
    for share in (1000, 950):
        case = replace(SWEPT_CASES[-2], name="low_rank_recall", numbers=((share, 600),))
        for sink in (0.0, 40.0):
            SWEPT.clear()
            assert_keeps_share(replace(case, sink=sink), EXECUTOR, blurred=MARKS)
            assert SWEPT


def eight_bits_are_read() -> None:
    """The kernels list what PyTorch lists from the same rounded numbers."""
    undo = use_eight_bits()
    for case in EIGHT:
        assert_agrees(case, EXECUTOR)
    triton_row_scores.sweep_spec = small_sweep
    triton_row_scores.launch_sweep = swept_in_pytorch
    SWEPT.clear()
    assert_agrees(replace(SWEPT_CASES[-1], name="low_rank"), EXECUTOR, MARKS)
    assert SWEPT
    triton_row_scores.sweep_spec = sweep_spec
    triton_row_scores.launch_sweep = launch_sweep
    undo()


EIGHT = [
    Case(seed=8, num_q=70, num_k=130, offset=60, name="low_rank", **OF_EACH_HEAD),
    Case(seed=9, num_q=70, num_k=70, padding=True, batch=2, dim=64, groups=3, name="low_rank"),
    Case(seed=10, num_q=64, num_k=200, left=50, offset=136, dim=32, name="low_rank"),
]

if __name__ == "__main__":
    torch.set_num_threads(1)
    EXECUTOR = TritonExecutor(Path(sys.argv[1]))
    a_mixed_layer_is_listed_pattern_by_pattern()
    the_lists_agree()
    eight_bits_are_read()
    what_was_swept_before_counts()
    shares_are_kept_behind_a_sweep()
