"""The probe's kernels compile for devices that are not here; those of ``attend``: test_budgets.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

from ahead import SHARED_LIMIT, compile_for, load

from sparse_compiler.codegen.spec import ProbeSpec
from sparse_compiler.runtime.triton_probe import rows_at_once


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_probe_compiles_for(target: str, tmp_path: Path) -> None:
    stages = 1 if target == "gfx942" else 3
    spec = ProbeSpec(dtype="bfloat16", head_dim=128, groups=4, num_stages=stages)
    module = load(spec, tmp_path)
    for function in ("statistics", "combine", "sums"):
        report = compile_for(spec, module, function, target)
        assert report.shared <= SHARED_LIMIT[target]
        assert report.spills <= 0


def test_probe_of_wide_float32_fits(tmp_path: Path) -> None:
    """Float32 of head size 256 needs the smallest tiles."""
    rows = rows_at_once(torch.float32, 256)
    probe = ProbeSpec(
        dtype="float32", head_dim=256, groups=1, num_rows=rows, block_k=rows, num_stages=1
    )
    report = compile_for(probe, load(probe, tmp_path), "sums", "sm_80")
    assert report.shared <= SHARED_LIMIT["sm_80"]
