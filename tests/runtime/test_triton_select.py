"""Selection kernels without a GPU: same index as PyTorch's operations, and resources on Hopper."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this module starts the interpreter itself", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "codegen"))

from ahead import load

from sparse_compiler.codegen.select_spec import MAX_TILE, SelectSpec
from sparse_compiler.codegen.spec import ProbeSpec
from sparse_compiler.ir.index import Geometry
from sparse_compiler.patterns.base import keep_best
from sparse_compiler.patterns.vertical_slash import VerticalSlash
from sparse_compiler.runtime.ahead import TARGETS, Launch, compile_launch, report_of
from sparse_compiler.runtime.triton_launch import Launcher
from sparse_compiler.runtime.triton_probe import heads_at_once
from sparse_compiler.runtime.triton_select import select_spec

#: Two programs must fit a Hopper multiprocessor: half of 228 KB, less 1 KB that the system keeps.
HALF_OF_HOPPER = 228 * 1024 // 2 - 1024
FLOATS = {"tops": "*fp32", "totals": "*fp32", "scores": "*fp32", "first_row": "*i32"}
PROBE = ProbeSpec(dtype="bfloat16", head_dim=128, groups=4, heads=4, last_rows=True)
SELECT = SelectSpec(heads=32, tile=8192, least_columns=30, least_distances=100)


@pytest.mark.parametrize("name", ["same_scores_give_the_same_index", "the_whole_selection_agrees"])
def test_in_the_interpreter(name: str, tmp_path: Path) -> None:
    program = Path(__file__).parent / "interpreted_select.py"
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), name],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(("function", "stages"), [("statistics", 3), ("sums", 2)])
def test_two_probes_fit_a_hopper_multiprocessor(function: str, stages: int, tmp_path: Path) -> None:
    launch = Launch(PROBE, function, {"num_stages": stages}, FLOATS)
    report = report_of(compile_launch(launch, load(PROBE, tmp_path), TARGETS["sm_90"]))
    # A third stage of `statistics` takes 2 KB too many; it is faster alone all the same.
    assert report.shared <= HALF_OF_HOPPER + (2048 if function == "statistics" else 0)
    assert report.spills <= 64
    assert "wgmma.mma_async" in report.assembly
    assert "cp.async" in report.assembly


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(("function", "warps"), [("keep", 16), ("lower", 4)])
def test_selection_compiles_for(target: str, function: str, warps: int, tmp_path: Path) -> None:
    launch = Launch(SELECT, function, {"num_warps": warps}, FLOATS)
    report = report_of(compile_launch(launch, load(SELECT, tmp_path), TARGETS[target]))
    assert report.shared <= 65536
    assert report.spills <= 64


@pytest.mark.parametrize(
    ("dtype", "dim", "groups", "heads"),
    [
        (torch.bfloat16, 128, 4, 4),
        (torch.bfloat16, 128, 7, 4),
        (torch.bfloat16, 64, 2, 2),
        (torch.bfloat16, 256, 8, 2),
        (torch.float32, 128, 4, 2),
        (torch.float16, 96, 1, 1),
    ],
)
def test_heads_share_keys_as_far_as_their_rows_fit(
    dtype: torch.dtype, dim: int, groups: int, heads: int
) -> None:
    assert heads_at_once(dtype, dim, groups) == heads


def test_a_step_holds_four_times_what_is_wanted_within_bounds() -> None:
    rule = VerticalSlash.rule
    assert rule is not None
    fields: dict[str, Any] = {
        "heads": 32,
        "geometry": Geometry(0, -1, 0, 64, 64),
        "key_mask": False,
        "interpret": False,
    }
    assert select_spec({"best": rule}, most=2048, longest=1 << 17, **fields).tile == 8192
    assert select_spec({"best": rule}, most=20000, longest=1 << 17, **fields).tile == MAX_TILE
    assert select_spec({"best": rule}, most=2048, longest=3000, **fields).tile == 4096


@given(seed=st.integers(0, 10**6), wanted=st.lists(st.integers(0, 50), min_size=2, max_size=2))
def test_keep_best_gives_ties_to_the_lowest_place(seed: int, wanted: list[int]) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (1, 2, 40), generator=draw).float()
    scores[scores == 2] = float("nan")
    kept = keep_best(scores, torch.tensor(wanted), -1)
    for slot, count in enumerate(wanted):
        order = sorted(range(40), key=lambda i: (-scores[0, slot, i].nan_to_num(-9.0), i))
        assert kept[0, slot].nonzero()[:, 0].tolist() == sorted(order[:count])


class _Kernel:
    """Counts how often Triton would bind arguments, and hands out a compiled kernel."""

    def __init__(self) -> None:
        self.bound = 0
        self.launched = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*_: object, **options: int) -> Any:
            if options:
                self.bound += 1
            else:
                self.launched += 1
            return self

        return call


def test_launcher_binds_again_when_alignment_or_strides_change() -> None:
    launch, kernel = Launcher(), _Kernel()
    aligned = torch.zeros(64)
    for tensor, stride in [
        (aligned, 8),
        (aligned, 8),
        (aligned[1:], 8),
        (aligned, 9),
        (aligned, 8),
    ]:
        launch(kernel, 1, [tensor], [stride], [1.0], num_warps=4)
    assert (kernel.bound, kernel.launched) == (3, 2)
