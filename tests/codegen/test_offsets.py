"""Offset widths: the proof, its threshold, and what it says of a million tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import sympy

from sparse_compiler.codegen.offsets import (
    ATTEND_OPERANDS,
    LIMIT,
    SIZES,
    Operand,
    farthest,
    largest_offsets,
    needs_wide,
)


def sizes(tokens: int, heads: int = 32, kv_heads: int = 8, dim: int = 128) -> dict[str, int]:
    """Contiguous q, k and v of one layer with a band index."""
    values = dict.fromkeys(SIZES, 0)
    values |= {"batch": 1, "heads": heads, "kv_heads": kv_heads, "num_q": tokens, "num_k": tokens}
    values |= {"head_dim": dim, "value_dim": dim, "block_q": 64, "block_k": 64}
    values |= {"row_blocks": -(-tokens // 64), "band_slots": heads, "distances_size": tokens + 65}
    values |= {"full_size": 4000, "lanes_size": 70_000, "columns_size": 1000, "packed_size": 1024}
    for name in "qkv":
        values[f"{name}_stride_h"] = tokens * dim
        values[f"{name}_stride_l"] = dim
    return values


def test_a_million_tokens_need_64_bits() -> None:
    found = largest_offsets(sizes(1 << 20))
    assert found["q"] == 2**32 - 1
    assert found["out"] == 2**32 - 1
    assert needs_wide(sizes(1 << 20))


def test_128k_tokens_do_not() -> None:
    assert not needs_wide(sizes(1 << 17))
    assert needs_wide(sizes(1 << 17) | {"batch": 5, "q_stride_b": 2**29})


def test_the_threshold_is_one_element_wide() -> None:
    at = sizes(64, heads=2, kv_heads=1, dim=16)
    edge = LIMIT - 1 - (63 * 16 + 15)
    assert not needs_wide(at | {"q_stride_h": edge})
    assert needs_wide(at | {"q_stride_h": edge + 1})


def test_a_list_per_row_block_needs_64_bits_where_it_is_long() -> None:
    blocks = {"block_slots": 32, "blocks_size": 16384}
    assert not needs_wide(sizes(1 << 18, dim=16) | blocks), "its last offset is 2**31 - 1"
    assert needs_wide(sizes(1 << 18, dim=16) | blocks | {"blocks_size": 16385})


@pytest.mark.parametrize("name", ATTEND_OPERANDS)
def test_the_far_corner_is_the_largest_of_all_offsets(name: str) -> None:
    operand = ATTEND_OPERANDS[name]
    small = {symbol: 2 + place % 2 for place, symbol in enumerate(SIZES)}
    symbols = {sympy.Symbol(n, integer=True, nonnegative=True): v for n, v in small.items()}
    ranges = [range(int(end.subs(symbols))) for _, end in operand.ends]
    places = [place for place, _ in operand.ends]
    offset = sympy.lambdify(places, operand.offset.subs(symbols))
    largest = max(offset(*point) for point in product(*ranges))
    assert largest_offsets(small)[name] == largest


def test_an_offset_that_may_fall_is_not_proved() -> None:
    operand = ATTEND_OPERANDS["q"]
    row = operand.ends[2][0]
    assert farthest(operand) is not None
    assert farthest(replace(operand, offset=operand.offset - 2 * row)) is None
    assert farthest(Operand(sympy.Mod(row, 7), ((row, sympy.Integer(9)),))) is None
