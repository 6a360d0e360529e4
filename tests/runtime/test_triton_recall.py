"""The kernel that keeps a share of the mass, without a GPU."""

from __future__ import annotations

import os
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
from row_score_specs import HALF

from sparse_compiler.codegen.emit import emit
from sparse_compiler.runtime.ahead import TARGETS, Launch, compile_launch, report_of


def test_in_the_interpreter(tmp_path: Path) -> None:
    program = Path(__file__).parent / "interpreted_recall.py"
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_other_kernels_say_nothing_of_it() -> None:
    # The first lines say all fields of the spec.
    plain, recall = (
        emit(spec).partition("import triton")[2] for spec in (HALF, replace(HALF, recall=True))
    )
    for word in ("PEAKS_LOG2", "WHOLE", "allowed", "int64)) * PEAKS"):
        assert word not in plain
    assert "PEAKS_LOG2" in recall
    # Of `score` not a line differs.
    assert plain.partition("def choose(")[0] == recall.partition("def choose(")[0].replace(
        "PEAKS_LOG2 = tl.constexpr(2.0)\nWHOLE = tl.constexpr(1073741824)\n", ""
    )


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_choice_compiles_for(target: str, tmp_path: Path) -> None:
    spec = replace(HALF, recall=True)
    types = {"keys": "*fp16", "slabs": "*fp16", "scores": "*fp16", "broken": "*u8"}
    options = {"num_warps": spec.choose_warps, "num_stages": 1}
    launch = Launch(spec, "choose", options, {**types, "scale_log2": "fp32"})
    report = report_of(compile_launch(launch, load(spec, tmp_path), TARGETS[target]))
    assert report.shared <= 65536
    assert report.spills <= 64
