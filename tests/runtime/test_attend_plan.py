"""What the host decides about a launch: room for lists, packed columns, splitting, memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_compiler import ops
from sparse_compiler.ir.index import Geometry
from sparse_compiler.patterns.lowering import lower_band
from sparse_compiler.runtime.attend_plan import (
    MAX_PARTS,
    PACKED_FLOOR,
    Split,
    attend_plan,
    lane_capacity,
    packed_bytes,
    split_plan,
)
from sparse_compiler.testing import random_index

MILLION = 1 << 20


@given(
    seed=st.integers(0, 10_000),
    kept=st.integers(1, 200),
    near=st.booleans(),
    blocks=st.sampled_from([(64, 64), (64, 32), (32, 64), (128, 64)]),
    left=st.sampled_from([-1, 70, 900]),
)
def test_lists_of_single_keys_never_exceed_their_room(
    seed: int, kept: int, near: bool, blocks: tuple[int, int], left: int
) -> None:
    size = 3000
    geometry = Geometry(0, left, 0, *blocks)
    draw = torch.Generator().manual_seed(seed)
    x = geometry.distance_size(size)
    distances = torch.zeros(1, 1, x, dtype=torch.bool)
    picked = torch.randperm(x - 1, generator=draw)[: kept // (2 if near else 1)]
    distances[..., picked] = True
    if near:  # pairs of distances: each range ends in a partial tile
        distances[..., picked + 1] = True
    distances[..., 0] = True
    most = int(distances.sum()) - 1
    capacities = ops.capacities(size, size, 0, *blocks, [0, most, 0])
    columns = torch.zeros(1, 1, size, dtype=torch.bool)
    lists = lower_band(columns, distances, geometry, capacities[:3])
    edge_len, num_edge = lists[3][0, 0], int(lists[4])
    lanes = int(edge_len[:num_edge].sum())
    assert lanes <= lane_capacity(capacities[1], geometry, x)


def index_bytes(vertical: int, slash: int, heads: int = 32) -> int:
    """Bytes of a layer's index and of its lists of single keys at 2**20 tokens."""
    geometry = Geometry(0, -1, 0, 64, 64)
    shapes = ops.index_shapes(
        1, heads, MILLION, MILLION, 0, 64, 64, [heads, 0], [vertical, slash, 0]
    )
    sizes = {
        name: torch.Size(shape).numel() * (1 if name == "covered" else 4)
        for name, shape in shapes.items()
    }
    edges = shapes["edge"][2]
    lanes = lane_capacity(edges, geometry, geometry.distance_size(MILLION))
    assert lanes < edges * 64 * 0.6, "tighter than a whole tile for each edge"
    return sum(sizes.values()) + 4 * heads * (lanes + 1)


@pytest.mark.parametrize(("vertical", "slash"), [(512, 2048), (1000, 6096)])
def test_index_of_a_million_tokens_stays_below_64_megabytes(vertical: int, slash: int) -> None:
    assert index_bytes(vertical, slash) < 64e6


def test_small_lists_have_room_for_any_index() -> None:
    geometry = Geometry(0, -1, 0, 64, 64)
    index = random_index(0, geometry, batch=1, num_q=900, num_k=900, kinds=("band",))
    q = torch.zeros(1, 1, 900, 64)
    lanes = attend_plan(q, q, q, index, geometry, 64).lanes_size
    assert lanes >= int(index.edge_len[0, 0, : int(index.num_edge)].sum())


def test_packed_columns_are_bounded_by_keys_and_values() -> None:
    assert packed_bytes(1000, 1, 32, 512) == 1024 * 32 * 516
    geometry = Geometry(0, -1, 0, 64, 64)
    index = random_index(0, geometry, batch=1, num_q=512, num_k=512, kinds=("band",))
    q = torch.zeros(1, 1, 512, 64)
    columns = index.columns.shape[2]
    plan = attend_plan(q, q, q, index, geometry, 64)
    assert plan.packed_size == -(-columns // 64) * 64
    # Heads that share one key head: a copy for each would exceed both bounds.
    heads = 4 * PACKED_FLOOR // packed_bytes(columns, 1, 1, 512)
    many = q.expand(1, heads, 512, 64)
    assert attend_plan(many, q, q, index, geometry, 64).packed_size == 0
    assert attend_plan(q[:, :, :64], q, q, index, geometry, 64).packed_size == 0, "no sharing"


@pytest.mark.parametrize(
    ("row_blocks", "heads", "keys", "processors", "want"),
    [
        (1000, 32, 100_000, 132, Split(1000)),
        (1, 8, 1_000_000, 132, Split(0, 32)),
        (1, 32, 1_000_000, 132, Split(0, 8)),
        (2, 32, 1_000_000, 132, Split(0, 4)),
        (1, 32, 1100, 132, Split(0, 2)),
        (1, 32, 600, 132, Split(1)),
        (1, 32, 1_000_000, 0, Split(1)),
        (0, 32, 1_000_000, 132, Split(0)),
    ],
)
def test_rows_are_split_where_programs_are_too_few(
    row_blocks: int, heads: int, keys: int, processors: int, want: Split
) -> None:
    found = split_plan(row_blocks, heads, keys, processors)
    assert found == want
    assert found.parts <= MAX_PARTS
    programs = row_blocks * heads * found.parts
    assert found.parts == 1 or programs <= 2 * processors, "scratch is bounded by them"
