"""The Hopper kernel that sweeps over whole key blocks compiles for sm_90, and so do those behind it.

It is written in Gluon, for which there is no interpreter: its numbers are tested on a GPU, what the
kernels behind it make of them in `tests/runtime/interpreted_row_scores.py`.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from ahead import load
from row_score_specs import HALF, SWEEP, SWEPT

from sparse_compiler.codegen.emit import emit
from sparse_compiler.codegen.row_scores_spec import RowScoresSpec
from sparse_compiler.codegen.sweep_spec import SweepSpec
from sparse_compiler.runtime.ahead import (
    SHARED_LIMIT,
    TARGETS,
    Launch,
    Report,
    compile_launch,
    report_of,
)

BEHIND = {
    "q": "*fp8e4nv",
    "keys": "*fp8e4nv",
    "slab": "*u8",
    "scores": "*fp16",
    "scale_log2": "fp32",
}
SHIPPED: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": True},
    "no_causal_order": {"causal": False},
    "half": {"eight": False},
    "shared": {"eight": False, "head_dim": 16, "groups": 4},
    "small_blocks": {"block_k": 32, "per_block": 32},
    "large_blocks": {"block_k": 128, "per_block": 128},
    "large_halves": {"block_k": 128, "per_block": 128, "eight": False},
}


def swept(spec: SweepSpec, folder: Path) -> Report:
    module = load(spec, folder)
    box = [spec.per_block, spec.tile, spec.head_dim]
    element = "fp8e4nv" if spec.eight else "fp16"
    types = {"slab": "*u8", "key_source": f"tensordesc<{element}{box},{module.WHOLE.value!r}>"}
    types["q"] = "*i32"
    return report_of(compile_launch(Launch(spec, "sweep", {}, types), module, TARGETS["sm_90"]))


@pytest.mark.parametrize("name", SHIPPED)
def test_keys_stay_and_nothing_spills(name: str, tmp_path: Path) -> None:
    spec = replace(SWEEP, **SHIPPED[name])
    report = swept(spec, tmp_path)
    assert report.registers <= 65536 // (32 * spec.num_warps), "one program a multiprocessor"
    assert report.spills == 0
    keys = spec.width * spec.per_block * spec.tile * spec.head_dim
    assert keys <= report.shared <= min(keys + 1024, SHARED_LIMIT["sm_90"])
    kind = r"k32\.f16\.e4m3\.e4m3" if spec.eight else r"k16\.f16\.f16\.f16"
    for columns in (256, spec.tile):  # all groups, the sampled ones
        product = rf"wgmma\.mma_async\S*\.m64n{columns}{kind}"
        assert re.search(product, report.assembly)
    assert "cp.async.bulk.tensor.3d" in report.assembly
    assert "max.f16x2" in report.assembly
    # Bytes of a row that lie in one thread are stored together.
    stored = {64: "v4.b32", 32: "v2.b32", 16: "b32"}[spec.tile]
    assert f"st.global.{stored}" in report.assembly
    assert "st.global.b8" not in report.assembly
    assert "ex2" not in report.assembly


@pytest.mark.parametrize("name", ["plain", "window", "no_causal_order"])
def test_no_barrier_between_warp_groups(name: str, tmp_path: Path) -> None:
    """Behind the wait for the keys, the warp groups never meet."""
    assembly = swept(replace(SWEEP, **SHIPPED[name]), tmp_path).assembly
    assert "bar.sync" not in assembly[assembly.index("wgmma.mma_async") :]


@pytest.mark.parametrize("window", [False, True])
def test_four_programs_of_the_rest_fit_a_multiprocessor(window: bool, tmp_path: Path) -> None:
    spec: RowScoresSpec = replace(SWEPT, window=window)
    module = load(spec, tmp_path)
    launch = Launch(spec, "score", spec.launch_options, BEHIND)
    report = report_of(compile_launch(launch, module, TARGETS["sm_90"]))
    assert report.registers <= 128
    assert report.spills == 0
    assert re.search(r"wgmma\.mma_async\S*k32\.f16\.e4m3\.e4m3", report.assembly)
    assert report.shared <= 56 * 1024


@pytest.mark.parametrize("rows", [64, 128])
def test_scores_are_read_at_memory_speed(rows: int, tmp_path: Path) -> None:
    spec = replace(SWEPT, rows=rows, block_q=rows)
    launch = Launch(spec, "normalise", spec.normalise_options, BEHIND)
    report = report_of(compile_launch(launch, load(spec, tmp_path), TARGETS["sm_90"]))
    assert report.spills == 0
    # Marks are on their way to shared memory while others are compared.
    assert re.search(r"cp\.async\S*\.cg\S* \[.*\], \[.*\], 0x10", report.assembly)
    # Threads have rows of their own: no number passes between them.
    assert report.assembly.count("shfl.sync") <= 8


def test_offsets_are_wide() -> None:
    """A slab of a launch is 2^30 bytes at least; a line of 2^20 tokens has more than 2^31 of them."""
    text = emit(SWEEP)
    assert "part_line = at.to(gl.int64) * key_tiles * chunk_rows" in text
    assert "to_row = part_line + (i * R).to(gl.int64) * key_tiles" in text
    assert "slab + to_row * T" in text
    text = emit(SWEPT)
    assert "sums = at.to(tl.int64) * key_tiles * chunk_rows" in text
    assert "(row // UNIT * key_tiles + tile).to(tl.int64) * UNIT" in text
    assert "slab + place[:, :, None] * SWEPT" in text
    assert "(at * parts + own).to(tl.int64) * (slab_units * UNIT)" in text
    assert "at.to(tl.int64) * parts * slab_units * UNIT" in emit(HALF)
