"""How the work of scoring rows is cut into launches."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from sparse_compiler.runtime.row_score_scratch import chunks_of


@given(
    lines=st.integers(1, 70),
    tiles=st.integers(1, 300),
    size=st.sampled_from([1 << 12, 1 << 20, 1 << 24, 1 << 31]),
    unit=st.sampled_from([1, 4]),
    least=st.integers(1, 64),
    room=st.sampled_from([1, 1 << 28, 1 << 31]),
)
@example(lines=32, tiles=65, size=1 << 12, unit=4, least=64, room=1 << 30)
def test_chunks_cover_everything_once(
    lines: int, tiles: int, size: int, unit: int, least: int, room: int
) -> None:
    chunks = chunks_of(lines, tiles, size, unit, least, room)
    seen = [
        (line, tile)
        for c in chunks
        for line in range(c.first_line, c.first_line + c.lines)
        for tile in range(c.first_tile, c.first_tile + c.tiles)
    ]
    assert sorted(seen) == [(line, tile) for line in range(lines) for tile in range(tiles)]
    for chunk in chunks:
        assert chunk.first_tile % unit == 0
        smallest = chunk.lines == 1 and chunk.tiles <= unit
        assert smallest or chunk.lines * chunk.tiles * size <= 2 * room
    if lines * -(-tiles // unit) * unit * size <= room:
        assert len(chunks) == 1
