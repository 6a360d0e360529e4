"""Which rows and key blocks the Hopper kernel for whole key blocks takes: its own arithmetic, in Python.

The kernel's text is Python. Its functions without loads run here as they stand, with a stand-in for
Gluon, and are compared with what each row sees.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from row_score_specs import SWEEP

from sparse_compiler.codegen.emit import emit
from sparse_compiler.codegen.sweep_spec import SweepSpec


class Flag(int):
    """A truth value as a kernel has it: ``~``, ``&`` and ``.to``."""

    def __invert__(self) -> Flag:
        return Flag(not self)

    def to(self, kind: object) -> int:
        return int(self)


class Lanes(np.ndarray):
    """Numbers, or truth values, of neighbouring lanes."""

    def to(self, kind: object) -> Any:
        return self.astype(int)


def flag(found: Any) -> Any:
    return found if isinstance(found, Lanes) else Flag(found)


def where(test: Any, yes: Any, no: Any) -> Any:
    if isinstance(test, Lanes):
        return np.where(test, yes, no).view(Lanes)
    return yes if test else no


def largest(a: Any, b: Any) -> Any:
    return np.maximum(a, b) if isinstance(a, Lanes) or isinstance(b, Lanes) else max(a, b)


def smallest(a: Any, b: Any) -> Any:
    return np.minimum(a, b) if isinstance(a, Lanes) or isinstance(b, Lanes) else min(a, b)


def _flags(tree: ast.Module) -> ast.Module:
    """Comparisons give flags."""

    class Wrap(ast.NodeTransformer):
        def visit_Compare(self, node: ast.Compare) -> ast.AST:
            self.generic_visit(node)
            return ast.Call(ast.Name("flag", ast.Load()), [node], [])

        def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
            self.generic_visit(node)
            if isinstance(node.op, ast.BitAnd):
                return ast.Call(ast.Name("flag", ast.Load()), [node], [])
            return node

    return ast.fix_missing_locations(Wrap().visit(tree))


def functions(spec: SweepSpec) -> dict[str, Any]:
    """``swept_blocks``, ``swept_range`` and ``tiles_of_rows`` of the kernel's text."""
    wanted = ("swept_blocks", "swept_range", "tiles_of_rows")
    tree = ast.parse(emit(spec))
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in wanted]
    for function in tree.body:
        assert isinstance(function, ast.FunctionDef)
        function.decorator_list = []
    gl = SimpleNamespace(
        maximum=largest,
        minimum=smallest,
        where=where,
        arange=lambda first, past, layout: np.arange(first, past).view(Lanes),
        max=lambda lanes, axis: int(lanes.max()),
        min=lambda lanes, axis: int(lanes.min()),
        sum=lambda lanes, axis: int(lanes.sum()),
        static_range=range,
        int32=int,
    )
    names: dict[str, Any] = {
        "gl": gl,
        "flag": flag,
        "LANES": None,
        "LONGEST": spec.longest,
        "R": spec.rows,
        "T": spec.tile,
        "STEP": spec.sweep_step,
        "FAR": 2**31 - 1,
    }
    exec(compile(_flags(tree), "sweep", "exec"), names)
    return names


@settings(max_examples=150, deadline=None)
@given(
    num_q=st.integers(1, 6000),
    num_k=st.integers(1, 20000),
    offset=st.integers(0, 14000),
    left=st.sampled_from([-1, 0, 127, 287, 511, 767, 1023, 1823, 5000]),
    right=st.sampled_from([-1, 0, 0, 0, 20, 700]),
    block_k=st.sampled_from([32, 64, 128]),
    padding=st.tuples(st.integers(0, 300), st.integers(0, 300)),
    segment=st.sampled_from([1, 3, 32]),
)
@example(6000, 16384, 10000, 127, 0, 64, (0, 0), 32)
@example(6000, 16384, 10000, 511, 0, 64, (0, 0), 32)
@example(6000, 16384, 10000, 767, 0, 64, (0, 0), 3)
@example(6000, 16384, 10000, 1823, 0, 128, (0, 0), 32)
def test_every_block_that_rows_see_whole_is_taken_once(
    num_q: int,
    num_k: int,
    offset: int,
    left: int,
    right: int,
    block_k: int,
    padding: tuple[int, int],
    segment: int,
) -> None:
    spec = replace(SWEEP, block_k=block_k, per_block=block_k, window=left >= 0, causal=right >= 0)
    known = functions(spec)
    q_start, q_end = padding[0], max(padding[0], num_q - padding[1])
    interval = (q_start, q_end, padding[1], num_k, offset - left, offset + right + 1)
    row_tiles = -(-num_q // spec.rows)
    taken: dict[tuple[int, int], str] = {}
    for tile in range(-(-num_k // (block_k * spec.tile))):
        for first in range(0, row_tiles, segment):
            last = min(first + segment, row_tiles)
            begin, some, cut, whole = known["tiles_of_rows"](first, last, 0, tile, *interval)
            for i in range(begin + cut, begin + cut + whole):
                taken[i, tile] = "whole"
            for j in range(begin, begin + some - whole):
                i = j if j < begin + cut else j + whole
                assert (i, tile) not in taken
                taken[i, tile] = "cut"
            assert some == 0 or first <= begin <= begin + some <= last
    for row in range(0, num_q, spec.sweep_step):
        begin, end = known["swept_blocks"](row, *interval)
        i = row // spec.rows
        for tile in range(begin // spec.tile, -(-end // spec.tile) if end > begin else 0):
            assert (i, tile) in taken
        # Exactly the blocks that the first and the last of them that is no padding see whole.
        real, past = max(row, q_start), min(row + spec.sweep_step, q_end)
        low = max(0, padding[1], past - 1 + offset - left if left >= 0 else 0)
        high = max(0, min(num_k, real + offset + right + 1 if right >= 0 else num_k))
        whole_blocks = range(-(-low // block_k), high // block_k) if real < past else range(0)
        assert range(begin, end) == whole_blocks or (end <= begin and not whole_blocks)
    for (i, tile), how in taken.items():
        if how == "whole":
            for row in range(i * spec.rows, (i + 1) * spec.rows, spec.sweep_step):
                begin, end = known["swept_blocks"](row, *interval)
                assert begin <= tile * spec.tile
                assert (tile + 1) * spec.tile <= end
