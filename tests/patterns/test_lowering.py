"""Lowering keeps what was chosen, covers each pair once, and promises only what holds."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sparse_compiler import ops
from sparse_compiler.ir.index import INDEX_FIELDS, AttentionIndex, Geometry
from sparse_compiler.patterns.lowering import compact, lower_band, lower_blocks
from sparse_compiler.runtime.reference import allowed_pairs, covered_pairs


@dataclass(frozen=True)
class Choice:
    """A random choice for the band component; ``num_k`` need not be ``q_offset + num_q``."""

    seed: int
    batch: int
    slots: int
    num_q: int
    num_k: int
    geometry: Geometry
    distance_share: float
    column_share: float
    run: int

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(columns [B, S, Lk], distances [B, S, X]), bool."""
        draw = torch.Generator().manual_seed(self.seed)
        size = self.geometry.distance_size(self.num_q)
        shape = (self.batch, self.slots)
        columns = torch.rand(*shape, self.num_k, generator=draw) < self.column_share
        starts = torch.rand(*shape, size, generator=draw) < self.distance_share
        distances = torch.zeros_like(starts)
        for shift in range(min(self.run, size)):
            distances[..., shift:] |= starts[..., : size - shift]
        distances[..., 0] = True
        return columns, distances

    def lower(self) -> AttentionIndex:
        """With exactly the capacities that the graph would ask for."""
        columns, distances = self.tensors()
        limits = [int(columns.sum(-1).max()), int(distances.sum(-1).max()), 0]
        geometry = self.geometry
        sizes = ops.capacities(
            *(self.num_q, self.num_k, geometry.q_offset, geometry.block_q, geometry.block_k), limits
        )
        lists = lower_band(columns, distances, geometry, sizes[:3])
        assert [t.shape[-1] for t in (lists[0], lists[2], lists[5], lists[7])] == list(sizes[:4])
        row_blocks = geometry.num_row_blocks(self.num_q)
        empty = torch.zeros(self.batch, 0, row_blocks, 0, dtype=torch.int32)
        slots = torch.stack([torch.arange(self.slots), torch.full((self.slots,), -1)], dim=1)
        return AttentionIndex(*lists, empty, empty.sum(-1, dtype=torch.int32), slots.int())

    def covered(self, index: AttentionIndex) -> torch.Tensor:
        return covered_pairs(index, self.geometry, self.num_q, self.num_k)

    def allowed(self) -> torch.Tensor:
        return allowed_pairs(self.batch, self.num_q, self.num_k, self.geometry)


geometries = st.builds(
    Geometry,
    q_offset=st.sampled_from([0, 0, 1, 15, 16, 17, 70]),
    left=st.sampled_from([-1, -1, 0, 1, 14, 15, 16, 40, 1000]),
    right=st.just(0),
    block_q=st.sampled_from([16, 32, 64]),
    block_k=st.sampled_from([8, 16, 32]),
)
choices = st.builds(
    Choice,
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 2),
    slots=st.integers(1, 2),
    num_q=st.sampled_from([1, 2, 31, 32, 33, 64, 90]),
    num_k=st.sampled_from([1, 7, 32, 33, 90, 130]),
    geometry=geometries,
    distance_share=st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0]),
    column_share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    run=st.sampled_from([1, 1, 7, 16, 40]),
)
ALL_KEPT = Choice(0, 1, 1, 90, 130, Geometry(40, 16, 0, 16, 8), 1.0, 1.0, 1)
ONE_ROW = Choice(0, 1, 1, 1, 130, Geometry(129, -1, 0, 64, 8), 0.05, 0.05, 1)


@given(choice=choices)
@example(choice=ALL_KEPT)
@example(choice=ONE_ROW)
def test_every_chosen_distance_and_column_that_the_mask_allows_is_covered(choice: Choice) -> None:
    columns, distances = choice.tensors()
    covered = choice.covered(choice.lower()) > 0
    allowed = choice.allowed()[:, None]
    position = torch.arange(choice.num_q)[:, None] + choice.geometry.q_offset
    distance = position - torch.arange(choice.num_k)[None]
    size = distances.shape[-1]
    wanted = distances[..., distance.clamp(0, size - 1)] & (distance >= 0) & (distance < size)
    wanted |= columns[:, :, None]
    assert not (wanted & allowed & ~covered).any()


@given(choice=choices)
@example(choice=ALL_KEPT)
@example(choice=ONE_ROW)
def test_no_pair_is_covered_twice(choice: Choice) -> None:
    assert choice.covered(choice.lower()).max() <= 1


@given(choice=choices)
@example(choice=ALL_KEPT)
def test_band_covers_no_more_than_the_dilated_distances_and_the_columns(choice: Choice) -> None:
    """x is in the band only if some kept distance o has x - M <= o <= x - 1."""
    columns, distances = choice.tensors()
    index, size_q = choice.lower(), choice.geometry.block_q
    for x in range(index.covered.shape[-1]):
        kept = distances[..., max(0, x - size_q) : x].any(-1)
        assert not (index.covered[..., x].bool() & ~kept).any(), x
    for b in range(choice.batch):
        for s in range(choice.slots):
            listed = index.columns[b, s, : int(index.num_columns[b, s])].long()
            assert columns[b, s, listed].all()


@given(choice=choices)
@example(choice=ALL_KEPT)
def test_a_full_tile_is_cut_by_no_test_in_any_row_block(choice: Choice) -> None:
    index, geometry = choice.lower(), choice.geometry
    for b in range(choice.batch):
        for s in range(choice.slots):
            for x in index.full[b, s, : int(index.num_full[b, s])].tolist():
                for m in range(geometry.num_row_blocks(choice.num_q)):
                    end = geometry.q_offset + (m + 1) * geometry.block_q
                    # Virtual rows and keys too: a kernel reads the tile without any comparison.
                    row = torch.arange(end - geometry.block_q, end)[:, None]
                    key = torch.arange(end - x, end - x + geometry.block_k)[None]
                    assert (key <= row).all(), (x, m)
                    assert geometry.left < 0 or (key >= row - geometry.left).all(), (x, m)


@given(choice=choices)
@example(choice=ALL_KEPT)
@example(choice=ONE_ROW)
def test_counts_fit_the_capacities_and_lists_keep_their_order(choice: Choice) -> None:
    index, size_k = choice.lower(), choice.geometry.block_k
    for name in ("full", "edge", "columns"):
        values, counts = getattr(index, name), getattr(index, f"num_{name}")
        assert values.dtype == counts.dtype == torch.int32
        assert values.is_contiguous()
        assert int(counts.min()) >= 0
        assert int(counts.max()) <= values.shape[-1], f"{name} overflows"
        for row, count in zip(values.flatten(0, 1), counts.flatten().tolist(), strict=True):
            assert (row[:count].diff() > 0).all(), f"{name} must ascend"
    assert index.covered.dtype == torch.uint8
    for lengths, count in zip(
        index.edge_len.flatten(0, 1), index.num_edge.flatten().tolist(), strict=True
    ):
        assert ((lengths[:count] >= 1) & (lengths[:count] <= size_k)).all()


@given(choice=choices)
@example(choice=ALL_KEPT)
def test_tiles_and_covered_tell_the_same_story(choice: Choice) -> None:
    """``covered`` decides whether a column counts; the tiles decide what is computed."""
    index = choice.lower()
    for b in range(choice.batch):
        for s in range(choice.slots):
            tiles = torch.zeros(index.covered.shape[-1] + choice.geometry.block_k, dtype=torch.int)
            for x in index.full[b, s, : int(index.num_full[b, s])].tolist():
                tiles[x - choice.geometry.block_k + 1 : x + 1] += 1
            for t in range(int(index.num_edge[b, s])):
                far, length = int(index.edge[b, s, t]), int(index.edge_len[b, s, t])
                tiles[far - length + 1 : far + 1] += 1
            assert torch.equal(tiles[: index.covered.shape[-1]], index.covered[b, s].int())
            assert tiles[index.covered.shape[-1] :].sum() == 0
            assert tiles[0] == 0


@given(choice=choices)
def test_every_row_keeps_its_own_position(choice: Choice) -> None:
    covered = choice.covered(choice.lower())
    for i in range(choice.num_q):
        position = i + choice.geometry.q_offset
        if position < choice.num_k:
            assert (covered[:, :, i, position] == 1).all()


def test_one_distance_makes_tiles_of_m_keys_whose_far_tile_is_partial() -> None:
    """The trap of a merged range: its last block is partial, and lanes beyond it count twice."""
    geometry = Geometry(0, -1, 0, block_q=32, block_k=24)
    distances = torch.zeros(1, 1, geometry.distance_size(128), dtype=torch.bool)
    distances[..., 0] = distances[..., 64] = True
    columns = torch.ones(1, 1, 128, dtype=torch.bool)
    sizes = ops.capacities(128, 128, 0, 32, 24, [128, 2, 0])
    full, num_full, edge, edge_len, num_edge, *_ = lower_band(
        columns, distances, geometry, sizes[:3]
    )
    keys = [set(range(x - 24 + 1, x + 1)) for x in full[0, 0, : int(num_full)].tolist()]
    for t in range(int(num_edge)):
        far, length = int(edge[0, 0, t]), int(edge_len[0, 0, t])
        keys.append(set(range(far - length + 1, far + 1)))
    assert sorted(x for tile in keys for x in tile) == [*range(1, 33), *range(65, 97)]


def test_no_slots_give_empty_lists() -> None:
    geometry = Geometry(0, -1, 0, 16, 8)
    columns = torch.zeros(1, 0, 32, dtype=torch.bool)
    distances = torch.zeros(1, 0, geometry.distance_size(32), dtype=torch.bool)
    sizes = ops.capacities(32, 32, 0, 16, 8, [0, 0, 0])
    lists = lower_band(columns, distances, geometry, sizes[:3])
    assert all(t.shape[:2] == (1, 0) for t in lists)


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 40),
    lead=st.sampled_from([(), (3,), (2, 3)]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    room=st.integers(0, 3),
)
def test_compact_keeps_order_and_pads_with_zero(
    seed: int, size: int, lead: tuple[int, ...], share: float, room: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    keep = torch.rand(*lead, size, generator=draw) < share
    values = torch.randint(1, 1000, (size,), generator=draw)
    most = int(keep.sum(-1).max()) if keep.numel() else 0
    packed, counts = compact(values, keep, most + room)
    assert packed.dtype == counts.dtype == torch.int32
    assert packed.shape == (*lead, most + room)
    assert counts.shape == lead
    rows = keep.view(-1, size)
    flat = zip(rows, packed.view(len(rows), most + room), counts.view(-1), strict=True)
    for row, got, count in flat:
        expected = values[row].int()
        assert int(count) == expected.numel()
        assert torch.equal(got[: expected.numel()], expected)
        assert (got[expected.numel() :] == 0).all()


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 4),
    keys=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_block_lists_are_the_chosen_blocks_in_order(
    seed: int, rows: int, keys: int, share: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.rand(2, 3, rows, keys, generator=draw) < share
    capacity = int(chosen.sum(-1).max())
    blocks, counts = lower_blocks(chosen, capacity)
    assert blocks.shape == (2, 3, rows, capacity)
    assert torch.equal(counts.long(), chosen.sum(-1))
    back = torch.zeros_like(chosen)
    for place in torch.cartesian_prod(
        torch.arange(2), torch.arange(3), torch.arange(rows)
    ).tolist():
        listed = blocks[tuple(place)][: int(counts[tuple(place)])]
        assert (listed.diff() > 0).all()
        back[tuple(place)][listed.long()] = True
    assert torch.equal(back, chosen)


@given(
    num_q=st.integers(1, 300),
    num_k=st.integers(1, 300),
    offset=st.integers(0, 300),
    block_q=st.sampled_from([16, 64]),
    block_k=st.sampled_from([16, 64]),
    limits=st.tuples(*[st.integers(-1, 400)] * 3),
)
def test_capacities_grow_with_what_is_asked_for(
    num_q: int, num_k: int, offset: int, block_q: int, block_k: int, limits: tuple[int, int, int]
) -> None:
    """No limit is the largest; one more column, distance or block never shrinks a list."""
    sizes = (num_q, num_k, offset, block_q, block_k)
    asked = ops.capacities(*sizes, list(limits))
    for place in range(3):
        more = list(limits)
        if more[place] >= 0:
            more[place] += 1
        assert all(a <= b for a, b in zip(asked, ops.capacities(*sizes, more), strict=True))
    assert all(a <= b for a, b in zip(asked, ops.capacities(*sizes, [-1] * 3), strict=True))


@pytest.mark.parametrize("field", INDEX_FIELDS)
def test_shapes_of_the_operators_name_every_field_of_the_index(field: str) -> None:
    shapes = ops.index_shapes(1, 2, 30, 40, 10, 16, 8, [1, 1], [-1, -1, -1])
    assert list(shapes)[INDEX_FIELDS.index(field)] == field
