"""Specs of the kernels that score rows, as they are launched for 32 query and 8 key heads."""

from __future__ import annotations

from dataclasses import replace

from sparse_compiler.codegen.row_scores_spec import RowScoresSpec
from sparse_compiler.codegen.sweep_spec import SweepSpec

#: 32 directions of single keys, each query head its own, in float16.
HALF = RowScoresSpec(
    dtype="float16",
    head_dim=32,
    groups=1,
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
#: The same in 8 bits.
EIGHT = replace(HALF, eight=True)
SWEEP = SweepSpec(dtype="float16", head_dim=32, groups=1, heads=32, eight=True)
#: Behind ``SWEEP``.
SWEPT = replace(EIGHT, max_registers=0, num_stages=1, sweep_blocks=SWEEP.tile)
