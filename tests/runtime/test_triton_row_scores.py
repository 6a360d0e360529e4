"""Kernels of row scores without a GPU: the lists of PyTorch's operations, and resources."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this module starts the interpreter itself", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "codegen"))

from ahead import load
from row_score_specs import HALF

from sparse_compiler.codegen.row_scores_spec import RowScoresSpec
from sparse_compiler.runtime.ahead import TARGETS, Launch, Report, compile_launch, report_of

COMMON = {"keys": "*fp16", "slabs": "*fp16", "scores": "*fp16", "broken": "*u8"}


def test_in_the_interpreter(tmp_path: Path) -> None:
    program = Path(__file__).parent / "interpreted_row_scores.py"
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def _compiled(spec: RowScoresSpec, function: str, target: str, folder: Path) -> Report:
    options = {"num_warps": spec.choose_warps, "num_stages": 1}
    if function == "score":
        options = spec.launch_options
    types = {**COMMON, "scale_log2": "fp32"}
    return report_of(
        compile_launch(Launch(spec, function, options, types), load(spec, folder), TARGETS[target])
    )


def test_four_programs_fit_a_hopper_multiprocessor(tmp_path: Path) -> None:
    report = _compiled(HALF, "score", "sm_90", tmp_path)
    # What spills is the code for blocks that are cut; the loop over whole ones does not.
    assert report.registers <= 128
    assert report.shared <= 56 * 1024
    assert re.search(r"wgmma\.mma_async\S*\.m64n64k16\.f16\.f16\.f16", report.assembly)
    assert "max.f16x2" in report.assembly
    assert "cp.async" in report.assembly


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_choice_compiles_for(target: str, tmp_path: Path) -> None:
    report = _compiled(HALF, "choose", target, tmp_path)
    assert report.shared <= 65536
    assert report.spills <= 64
