"""The shipped kernels compile for devices that are not here, within registers and shared memory."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

from ahead import SHARED_LIMIT, compile_for, load

from sparse_compiler.codegen.spec import AttendSpec, ProbeSpec
from sparse_compiler.ir.index import Geometry
from sparse_compiler.runtime.triton_attend import attend_tuning
from sparse_compiler.runtime.triton_executor import TritonExecutor
from sparse_compiler.runtime.triton_probe import rows_at_once

#: Two programs must fit a Hopper multiprocessor: half of 228 KB, less 1 KB that the system keeps.
HALF_OF_HOPPER = 228 * 1024 // 2 - 1024
CAPABILITY = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0), "gfx942": (9, 4)}


def shipped(target: str, dtype: str = "bfloat16", dim: int = 128, **fields: Any) -> AttendSpec:
    """The spec that the executor uses on ``target``."""
    executor = TritonExecutor
    left = 4095 if fields.get("window") else -1
    geometry = Geometry(0, left, 0, executor.block_q, executor.block_k)
    tuning = attend_tuning(
        getattr(torch, dtype),
        dim,
        geometry,
        CAPABILITY[target],
        has_band=fields.get("has_band", True),
        hip=target.startswith("gfx"),
    )
    return AttendSpec(
        dtype=dtype,
        head_dim=dim,
        value_dim=dim,
        groups=4,
        block_q=geometry.block_q,
        block_k=geometry.block_k,
        tma=target in ("sm_90", "sm_100"),
        **asdict(tuning),
        **fields,
    )


@pytest.mark.parametrize("target", CAPABILITY)
def test_attend_compiles_for(target: str, tmp_path: Path) -> None:
    spec = shipped(target)
    report = compile_for(spec, load(spec, tmp_path), "attend", target)
    assert report.shared <= SHARED_LIMIT[target]
    matrix = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
    assert matrix.get(target, "v_mfma") in report.assembly
    if target == "sm_90":
        assert report.spills == 0
        assert 2 * 128 * report.registers <= 65536, "two programs per multiprocessor"
        assert report.shared <= HALF_OF_HOPPER
        assert "cp.async.bulk.tensor.4d" in report.assembly, "tiles come through descriptors"


@pytest.mark.parametrize(
    "fields",
    [
        {"has_blocks": True},
        {"has_blocks": True, "has_band": False},
        {"window": True, "key_mask": True, "softcap": True, "has_blocks": True},
    ],
    ids=["mixed", "blocks", "window_mask_softcap"],
)
def test_other_kinds_of_work_fit_twice_on_hopper(fields: dict[str, Any], tmp_path: Path) -> None:
    spec = shipped("sm_90", **fields)
    report = compile_for(spec, load(spec, tmp_path), "attend", "sm_90")
    assert report.spills == 0
    assert report.shared <= HALF_OF_HOPPER


@pytest.mark.parametrize(("dtype", "dim"), [("float16", 64), ("bfloat16", 256), ("float32", 64)])
def test_other_sizes_compile_without_spills(dtype: str, dim: int, tmp_path: Path) -> None:
    spec = shipped("sm_90", dtype, dim)
    report = compile_for(spec, load(spec, tmp_path), "attend", "sm_90")
    assert report.spills == 0
    assert report.shared <= SHARED_LIMIT["sm_90"]


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
