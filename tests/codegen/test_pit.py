"""Derived axes against PIT's table, and against evaluation with permuted axes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import sympy
from evaluate_expression import close, evaluate
from hypothesis import assume, given
from hypothesis import strategies as st

from sparse_compiler.codegen import library
from sparse_compiler.codegen.pit import AxisCode, pit_axes
from sparse_compiler.ir.expression import (
    Access,
    Axis,
    Statement,
    TensorExpression,
    axis_symbol,
    split_axis,
)
from sparse_compiler.ir.monoid import AFFINE, MAX, SUM, component

G = library.size("G")
GROUPED = library.attention(alibi=True, window=True)
SPLIT = split_axis(GROUPED, "h", G, ("kv", "r"))
LEGAL = {
    # name: (expression, legal axes, others with their codes, axes whose coordinate travels)
    "matmul": (library.matmul(), "m k o", {}, ""),
    "attention": (library.attention(grouped=False), "b h m n d e", {}, "m n"),
    "no mask": (library.attention(causal=False), "b m n d e", {"h": "COMPOUND"}, ""),
    "grouped attention": (library.attention(), "b m n d e", {"h": "COMPOUND"}, "m n"),
    "grouped, alibi": (GROUPED, "b m n d e", {"h": "COMPOUND"}, "m n"),
    "heads split": (SPLIT, "b kv r m n d e", {}, "m n"),
    "experts": (library.grouped_matmul(), "t x k o", {}, ""),
    "experts by look-up": (library.routed_matmul(), "k o", {"t": "LOOKUP"}, ""),
    "sparse ffn": (library.sparse_ffn(), "t k f o", {}, ""),
    "cumulative sum": (library.cumulative_sum(), "b", {"t": "ORDER"}, ""),
    "scan": (library.affine_scan(), "b", {"t": "MONOID"}, ""),
    "convolution": (library.convolution(), "c", {"p": "COMPOUND", "s": "COMPOUND"}, ""),
}


@pytest.mark.parametrize("name", LEGAL)
def test_pit_axes_are_those_of_the_table(name: str) -> None:
    expression, legal, others, travelling = LEGAL[name]
    verdicts = pit_axes(expression)
    assert [v.axis for v in verdicts.values() if v.legal] == legal.split()
    assert {v.axis: v.code for v in verdicts.values() if not v.legal} == others
    assert [v.axis for v in verdicts.values() if v.coordinate_travels] == travelling.split()
    assert all(v.reason for v in verdicts.values())


def test_reasons_name_the_access_and_the_way_out() -> None:
    head = pit_axes(library.attention())["h"]
    assert head.reason == "index floor(h/G) in K[b, floor(h/G), n, d] is compound"
    assert "h_outer and h_inner may be permuted" in head.remedy
    key = pit_axes(library.attention())["n"]
    assert key.gathered == (("K", 2), ("V", 2))
    assert key.scattered == ()
    assert key.reduced_by == ("online_softmax",)
    assert key.splittable
    assert "coordinate travels" in key.reason
    row = pit_axes(library.attention())["m"]
    assert (row.gathered, row.scattered) == ((("Q", 2),), (("O", 2),))
    hidden = pit_axes(library.sparse_ffn())["f"]
    assert hidden.gathered == (("U", 1), ("W", 0))
    step = pit_axes(library.affine_scan())["t"]
    assert step.splittable, "associative: parts may be combined, in order"


@dataclass(frozen=True)
class Numbers:
    """An expression with sizes and data."""

    expression: TensorExpression
    lengths: dict[str, int]
    inputs: dict[str, np.ndarray]
    constants: dict[str, Any]

    def run(self, order: dict[str, tuple[int, ...]] | None = None, *, travel: bool = True) -> Any:
        return evaluate(
            self.expression,
            self.inputs,
            self.lengths,
            order=order,
            travel=travel,
            constants=self.constants,
        )


def numbers(expression: TensorExpression, lengths: dict[str, int], seed: int = 0) -> Numbers:
    """Random arrays, large enough for every index."""
    generator = np.random.default_rng(seed)
    constants = {"G": 2, "scale": 0.7, "offset": 1, "left": 2, "expert": lambda t: t % 2}
    # An index reaches at most the sum of the lengths in it.
    room = max(lengths.values()) * 2
    arrays = {}
    for _, access in expression.accesses():
        if access.tensor in expression.inputs:
            arrays[access.tensor] = generator.normal(size=(room,) * len(access.index))
    return Numbers(expression, lengths, arrays, constants)


def small(name: str) -> Numbers:
    expression = LEGAL[name][0]
    lengths = {axis.name: 3 for axis in expression.axes} | {"b": 2, "d": 2, "e": 2, "h": 4}
    lengths = {axis.name: lengths[axis.name] for axis in expression.axes}
    return numbers(expression, lengths | ({"kv": 2, "r": 2} if "kv" in lengths else {}))


@pytest.mark.parametrize("name", LEGAL)
def test_permuting_a_claimed_axis_changes_nothing(name: str) -> None:
    case = small(name)
    plain = case.run()
    for verdict in pit_axes(case.expression).values():
        if verdict.legal:
            order = tuple(reversed(range(case.lengths[verdict.axis])))
            rolled = (*order[1:], order[0])
            for moved in (order, rolled):
                assert close(case.run(dict.fromkeys(verdict.members, moved)), plain), verdict


@pytest.mark.parametrize("name", [n for n, row in LEGAL.items() if row[2]])
def test_a_declined_axis_has_a_permutation_that_changes_the_result(name: str) -> None:
    case = small(name)
    plain = case.run()
    for axis in LEGAL[name][2]:
        orders = itertools.permutations(range(case.lengths[axis]))
        assert any(not close(case.run({axis: order}), plain) for order in orders), axis


@pytest.mark.parametrize("axis", ["m", "n"])
def test_a_coordinate_that_stays_behind_changes_the_result(axis: str) -> None:
    case = small("attention")
    orders = itertools.permutations(range(case.lengths[axis]))
    plain = case.run()
    assert any(not close(case.run({axis: order}, travel=False), plain) for order in orders)


def test_entries_that_equal_the_identity_may_be_left_out() -> None:
    """Hidden units that are zero for all rows: the packed two-layer FFN equals the whole one."""
    case = small("sparse ffn")
    case.inputs["U"][:, 1] = -np.abs(case.inputs["U"][:, 1])
    case.inputs["X"][:] = np.abs(case.inputs["X"])
    assert close(case.run({"f": (2, 0)}), case.run())
    assert not close(case.run({"f": (2, 1)}), case.run())


# Random expressions: indices of one or two axes, masks, coordinates, one or two statements.
LETTERS = ("a", "b", "c")
SYMBOLS = [axis_symbol(letter) for letter in LETTERS]
LENGTH = 3


def bare() -> st.SearchStrategy[sympy.Expr]:
    return st.sampled_from(SYMBOLS)


def compound() -> st.SearchStrategy[sympy.Expr]:
    pair = st.tuples(bare(), bare()).filter(lambda two: two[0] != two[1])
    return st.one_of(
        bare().map(lambda s: sympy.floor(s / 2)), pair.map(sum), bare().map(lambda s: s + 1)
    )


@st.composite
def expressions(draw: st.DrawFn) -> TensorExpression:
    index = st.one_of(bare(), bare(), compound())
    operands = [
        Access(name, tuple(draw(st.lists(index, min_size=1, max_size=2))))
        for name in draw(st.sampled_from(["X", "XY", "XYZ"]))
    ]
    used = sorted({s for o in operands for s in o.axes}, key=str)
    kept = draw(st.lists(st.sampled_from(used), unique=True, max_size=2))
    reduced = [s for s in used if s not in kept]
    body: sympy.Expr = sympy.Mul(*(o.value for o in operands))
    if draw(st.booleans()):
        body = body + draw(st.sampled_from(used)) * operands[0].value
    when = sympy.true
    if len(used) > 1 and draw(st.booleans()):
        when = used[0] <= used[1]
    monoid = draw(st.sampled_from([SUM, MAX, AFFINE])) if reduced else None
    if when is not sympy.true and not reduced:
        when = sympy.true
    parts = (body,) if monoid is not AFFINE else (operands[0].value, body)
    result = component("b") if monoid is AFFINE else None
    first = Statement(Access("T", tuple(kept)), tuple(operands), parts, monoid, when, result)
    statements = [first]
    if kept and draw(st.booleans()):
        again = Access("T", tuple(draw(st.permutations(kept))))
        weight = Access("W", (kept[0],))
        product = again.value * weight.value
        statements.append(Statement(Access("U", tuple(kept[1:])), (again, weight), (product,), SUM))
    axes = tuple(Axis(str(s), sympy.Integer(LENGTH)) for s in used)
    return TensorExpression("random", axes, tuple(statements))


@given(expression=expressions(), seed=st.integers(0, 1000))
def test_random_expressions_agree_with_their_verdicts(
    expression: TensorExpression, seed: int
) -> None:
    case = numbers(expression, {axis.name: LENGTH for axis in expression.axes}, seed)
    plain = case.run()
    orders = list(itertools.permutations(range(LENGTH)))
    for verdict in pit_axes(expression).values():
        same = [close(case.run(dict.fromkeys(verdict.members, o)), plain) for o in orders]
        if verdict.legal:
            assert all(same), verdict
        elif matters(expression, verdict.axis):
            assert not all(same), verdict


def matters(expression: TensorExpression, axis: str) -> bool:
    """Whether the axis is gathered or scattered at all, so that an illegal order can show."""
    symbol = axis_symbol(axis)
    return any(
        symbol in access.index
        for _, access in expression.accesses()
        if access.tensor in (*expression.inputs, *expression.outputs)
    )


@given(expression=expressions())
def test_every_decline_has_a_code_and_every_legal_axis_a_place(
    expression: TensorExpression,
) -> None:
    assume(expression.inputs)
    for verdict in pit_axes(expression).values():
        assert verdict.legal == (verdict.code is AxisCode.PIT)
        assert not verdict.legal or verdict.gathered or verdict.scattered
