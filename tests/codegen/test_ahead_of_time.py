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
from sparse_compiler.runtime.triton_probe import heads_at_once, rows_at_once


@pytest.mark.parametrize(
    ("target", "heads", "stages"),
    [("sm_90", 4, 2), ("sm_90", 1, 2), ("sm_80", 2, 2), ("sm_100", 2, 2), ("gfx942", 1, 1)],
)
def test_probe_compiles_for(target: str, heads: int, stages: int, tmp_path: Path) -> None:
    spec = ProbeSpec(
        dtype="bfloat16", head_dim=128, groups=4, heads=heads, last_rows=True, num_stages=stages
    )
    module = load(spec, tmp_path)
    for function in ("statistics", "sums"):
        report = compile_for(spec, module, function, target)
        assert report.shared <= SHARED_LIMIT[target]
        # Several heads at once take every register that a thread can have.
        assert report.spills <= (64 if heads > 1 else 0)


@pytest.mark.parametrize(("dtype", "dim"), [("bfloat16", 256), ("float32", 128), ("float32", 256)])
def test_probe_of_wide_heads_fits(dtype: str, dim: int, tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    spec = ProbeSpec(
        dtype=dtype,
        head_dim=dim,
        groups=4,
        num_rows=rows_at_once(kind, dim),
        heads=heads_at_once(kind, dim, 4),
        num_stages=1,
    )
    report = compile_for(spec, load(spec, tmp_path), "sums", "sm_80")
    assert report.shared <= SHARED_LIMIT["sm_80"]
