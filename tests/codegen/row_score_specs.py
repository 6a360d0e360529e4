"""Specs of the kernels that score rows, as they are launched for 32 query and 8 key heads."""

from __future__ import annotations

from dataclasses import replace

from sparse_compiler.codegen.row_scores_spec import RowScoresSpec
from sparse_compiler.codegen.sweep_spec import SweepSpec

#: 16 directions of single keys.
HALF = RowScoresSpec(
    dtype="float16",
    head_dim=16,
    groups=4,
    heads=32,
    group=1,
    every=32,
    rows=64,
    tile=64,
    num_stages=3,
    half=True,
    packed=True,
    unroll=4,
    max_registers=128,
)
SWEEP = SweepSpec(dtype="float16", head_dim=16, groups=4, heads=32)
#: Behind ``SWEEP``.
SWEPT = replace(HALF, tile=SWEEP.sweep_align, sweep_blocks=SWEEP.tile)
