"""Kernels of row scores without a GPU: the lists of PyTorch's operations, and resources."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this module starts the interpreter itself", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "codegen"))

from ahead import load
from row_score_specs import EIGHT, HALF

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
    if spec.eight:
        types |= {"q": "*fp8e4nv", "keys": "*fp8e4nv"}
    return report_of(
        compile_launch(Launch(spec, function, options, types), load(spec, folder), TARGETS[target])
    )


@pytest.mark.parametrize("spec", [EIGHT, HALF], ids=["eight", "half"])
def test_four_programs_fit_a_hopper_multiprocessor(spec: RowScoresSpec, tmp_path: Path) -> None:
    report = _compiled(spec, "score", "sm_90", tmp_path)
    # What spills is the code for blocks that are cut; the loop over whole ones does not.
    assert report.registers <= 128
    assert report.shared <= 56 * 1024
    kind = r"k32\.f16\.e4m3\.e4m3" if spec.eight else r"k16\.f16\.f16\.f16"
    assert re.search(r"wgmma\.mma_async\S*\.m64n64" + kind, report.assembly)
    assert "max.f16x2" in report.assembly
    assert "cp.async" in report.assembly


@pytest.mark.parametrize(
    ("target", "eight"), [("sm_80", False), ("sm_100", True), ("gfx942", False)]
)
def test_scores_elsewhere_compile_for(target: str, eight: bool, tmp_path: Path) -> None:
    spec = replace(EIGHT if eight else HALF, max_registers=0, packed=target != "gfx942")
    report = _compiled(spec, "score", target, tmp_path)
    product = {"sm_80": "mma.sync", "sm_100": "kind::f8f6f4", "gfx942": "v_mfma"}
    assert product[target] in report.assembly
    assert report.spills <= 64


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_choice_compiles_for(target: str, tmp_path: Path) -> None:
    report = _compiled(HALF, "choose", target, tmp_path)
    assert report.shared <= 65536
    assert report.spills <= 64
