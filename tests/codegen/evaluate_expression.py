"""Evaluates tensor expressions point by point, in the order of a tile; the oracle for ``pit_axes``.

A tile holds a permuted axis at places 0, 1, ...: place p holds entry ``order[p]``. What is bare is
gathered and scattered by entry, every other index is computed from places by the dense loops, and
the body reads the coordinate that travelled with the data (or, without travelling, the place).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sympy

from sparse_compiler.ir.expression import Access, Statement, TensorExpression
from sparse_compiler.ir.monoid import component

Values = dict[tuple[int, ...], float]
Point = dict[sympy.Symbol, int]


def evaluate(
    expression: TensorExpression,
    inputs: Mapping[str, np.ndarray],
    lengths: Mapping[str, int],
    *,
    order: Mapping[str, Sequence[int]] | None = None,
    travel: bool = True,
    constants: Mapping[str, Any] | None = None,
) -> dict[str, Values]:
    """Every output as {index: value}.

    Args:
        inputs: one array for each input tensor.
        lengths: of every axis, by letter.
        order: permutation (or part) of some axes, by letter.
        travel: bodies read an entry's coordinate, not its place.
        constants: numbers and functions for the other symbols, by name.
    """
    order = {axis: list(entries) for axis, entries in (order or {}).items()}
    constants = dict(constants or {})
    places = {
        axis.symbol: range(len(order.get(axis.name, range(lengths[axis.name]))))
        for axis in expression.axes
    }
    moved = {expression.axis(name).symbol: entries for name, entries in order.items()}
    tiles: dict[str, Values] = {}
    for statement in expression.statements:
        tiles[statement.output.tensor] = _run(
            expression, statement, inputs, tiles, places, moved, travel, constants
        )
    found = {}
    for statement in expression.statements:
        output = statement.output
        if output.tensor in expression.outputs:
            found[output.tensor] = {
                tuple(
                    moved[index][place] if index in moved else place
                    for index, place in zip(output.index, at, strict=True)
                ): value
                for at, value in tiles[output.tensor].items()
            }
    return found


def _run(
    expression: TensorExpression,
    statement: Statement,
    inputs: Mapping[str, np.ndarray],
    tiles: dict[str, Values],
    places: Mapping[sympy.Symbol, range],
    moved: Mapping[sympy.Symbol, list[int]],
    travel: bool,
    constants: Mapping[str, Any],
) -> Values:
    loops = sorted(statement.loops(expression.symbols), key=str)
    kept = [s for s in loops if s in statement.output.axes]
    reduced = [s for s in loops if s not in statement.output.axes]
    made: Values = tiles.setdefault(statement.output.tensor, {})
    values = [operand.value for operand in statement.operands]
    symbols = [*values, *loops]
    body = [_function(symbols, b, constants) for b in statement.body]
    when = _function(loops, statement.when, constants)
    indices = {
        access: [_function(loops, i, constants) for i in access.index]
        for access in (*statement.operands, statement.output)
    }

    def read(access: Access, place: Point) -> float:
        at = [int(f(*place.values())) for f in indices[access]]
        if access.tensor not in inputs:
            return tiles[access.tensor].get(tuple(at), 0.0)
        for dimension, index in enumerate(access.index):
            if index in moved:
                at[dimension] = moved[index][place[index]]
        return float(inputs[access.tensor][tuple(at)])

    for outer in itertools.product(*(places[s] for s in kept)):
        contributions = []
        for inner in itertools.product(*(places[s] for s in reduced)):
            bound = dict(zip(kept, outer, strict=True)) | dict(zip(reduced, inner, strict=True))
            place = {s: bound[s] for s in loops}
            seen = {s: moved[s][p] if travel and s in moved else p for s, p in place.items()}
            if not when(*seen.values()):
                continue
            read_values = [read(operand, place) for operand in statement.operands]
            contributions.append([float(f(*read_values, *seen.values())) for f in body])
        at = dict.fromkeys(loops, 0) | dict(zip(kept, outer, strict=True))
        target = tuple(int(f(*at.values())) for f in indices[statement.output])
        made[target] = _reduce(statement, contributions)
    return made


def _function(
    symbols: list[sympy.Symbol], expression: sympy.Basic, names: Mapping[str, Any]
) -> Any:
    numbers = {
        s: names[str(s)]
        for s in expression.free_symbols
        if s not in symbols and not callable(names.get(str(s)))
    }
    functions = {name: f for name, f in names.items() if callable(f)}
    return sympy.lambdify(symbols, expression.subs(numbers), modules=[functions, "math"])


def _reduce(statement: Statement, parts: list[list[float]]) -> float:
    monoid = statement.monoid
    if monoid is None:
        return parts[0][0]
    sides = [*monoid.symbols("a"), *monoid.symbols("b")]
    combine = sympy.lambdify(sides, list(monoid.combined), modules="math")
    state = None
    for part in parts:
        # The identity is never combined with itself: exp(-oo + oo) is no number.
        state = part if state is None else combine(*state, *part)
    if state is None:
        state = [float(value) for value in monoid.identity]
    if statement.result is None:
        return state[0]
    components = [component(name) for name in monoid.state]
    if not parts:
        return 0.0
    return sympy.lambdify(components, statement.result, modules="math")(*state)


def close(one: dict[str, Values], other: dict[str, Values]) -> bool:
    """Whether two evaluations agree up to the rounding of a changed order."""
    return one.keys() == other.keys() and all(
        one[name].keys() == other[name].keys()
        and all(
            math.isclose(value, other[name][at], rel_tol=1e-9, abs_tol=1e-9)
            for at, value in one[name].items()
        )
        for name in one
    )
