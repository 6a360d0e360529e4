"""Decisions about integers: known truths, near misses, and agreement with enumeration."""

from __future__ import annotations

import itertools

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compiler.passes.presburger import Domain, equal, implies
from sparse_compiler.passes.symbolic_values import FloorDivide, Modulo

Q, K = sympy.symbols("q k", integer=True)
N, C = sympy.symbols("n c", integer=True, positive=True)
SQUARE = Domain(((Q, N), (K, N)))


def test_two_spellings_of_causal_are_equal():
    assert equal(K <= Q, Q + 1 > K, SQUARE).holds
    assert equal(sympy.Not(K > Q), K < Q + 1, SQUARE).holds


def test_near_misses_carry_a_witness():
    verdict = equal(K < Q, K <= Q, SQUARE)
    assert not verdict.holds
    assert "q=" in verdict.witness
    assert "n=" in verdict.witness
    assert not implies(K <= Q + 1, K <= Q, SQUARE).holds


def test_implication_uses_the_box_and_the_ranges():
    assert implies(sympy.true, sympy.Ge(Q, 0, evaluate=False), SQUARE).holds
    assert implies(sympy.true, Q < 9, Domain(((Q, N),), {N: (1, 9)})).holds
    assert not implies(sympy.true, Q < 8, Domain(((Q, N),), {N: (1, 9)})).holds


def test_chunks_by_floor_division():
    chunk = sympy.Eq(FloorDivide(Q, sympy.Integer(4)), FloorDivide(K, sympy.Integer(4)))
    digits = sympy.Eq(Q - Modulo(Q, sympy.Integer(4)), K - Modulo(K, sympy.Integer(4)))
    assert equal(chunk, digits, SQUARE).holds
    assert implies(chunk, sympy.Abs(Q - K) < 4, SQUARE).holds
    assert not implies(chunk, sympy.Abs(Q - K) < 3, SQUARE).holds


def test_what_is_not_affine_is_undecided():
    read = sympy.Function("read_mask", integer=True)
    assert equal(Q * K <= N, K <= Q, SQUARE) is None
    assert equal(sympy.Ne(read(K), 0), K <= Q, SQUARE) is None
    assert equal(FloorDivide(Q, N) <= 0, K <= Q, SQUARE) is None
    assert equal(sympy.Rational(1, 2) * Q <= K, K <= Q, SQUARE) is None


def test_opaque_sizes_prove_but_never_refute():
    domain = Domain(((Q, N * C), (K, N * C)))
    assert equal(K <= Q, K < Q + 1, domain).holds
    assert equal(K <= Q, K < Q, domain) is None


TERMS = st.builds(
    lambda a, b, c: a * Q + b * K + c, st.integers(-2, 2), st.integers(-2, 2), st.integers(-4, 4)
)
SPECIAL = st.one_of(
    TERMS,
    st.builds(lambda t, d: FloorDivide(t, sympy.Integer(d)), TERMS, st.integers(1, 4)),
    st.builds(lambda t, d: Modulo(t, sympy.Integer(d)), TERMS, st.integers(1, 4)),
    st.builds(lambda t: sympy.Abs(t, evaluate=False), TERMS),
)
KINDS = st.sampled_from([sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq, sympy.Ne])
RELATIONS = st.builds(lambda r, a, b: r(a, b, evaluate=False), KINDS, SPECIAL, TERMS)
PREDICATES = st.recursive(
    RELATIONS,
    lambda p: st.one_of(
        st.builds(sympy.And, p, p), st.builds(sympy.Or, p, p), st.builds(sympy.Not, p)
    ),
    max_leaves=4,
)


def number(expr, q, k):
    """The value of an integer expression, by Python's own arithmetic."""
    if isinstance(expr, sympy.Integer):
        return int(expr)
    if isinstance(expr, sympy.Symbol):
        return {Q: q, K: k}[expr]
    values = [number(a, q, k) for a in expr.args]
    if isinstance(expr, sympy.Mul):
        return values[0] * values[1]
    if isinstance(expr, sympy.Add):
        return sum(values)
    if isinstance(expr, sympy.Abs):
        return abs(values[0])
    return values[0] // values[1] if isinstance(expr, FloorDivide) else values[0] % values[1]


def truth(pred, q, k):
    """Whether a predicate holds at a point, by Python's own logic."""
    if pred in (sympy.true, sympy.false):
        return pred is sympy.true
    if isinstance(pred, sympy.Not):
        return not truth(pred.args[0], q, k)
    if isinstance(pred, sympy.And):
        return all(truth(a, q, k) for a in pred.args)
    if isinstance(pred, sympy.Or):
        return any(truth(a, q, k) for a in pred.args)
    a, b = (number(x, q, k) for x in pred.args)
    return {
        sympy.Le: a <= b,
        sympy.Lt: a < b,
        sympy.Ge: a >= b,
        sympy.Gt: a > b,
        sympy.Eq: a == b,
        sympy.Ne: a != b,
    }[type(pred)]


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(PREDICATES, PREDICATES, st.integers(1, 5), st.integers(1, 5))
def test_verdicts_agree_with_enumeration(left, right, num_q, num_k):
    domain = Domain(((Q, sympy.Integer(num_q)), (K, sympy.Integer(num_k))))
    points = list(itertools.product(range(num_q), range(num_k)))
    same = all(truth(left, *p) == truth(right, *p) for p in points)
    follows = all(truth(right, *p) for p in points if truth(left, *p))
    assert equal(left, right, domain).holds == same
    assert implies(left, right, domain).holds == follows


# -- a second opinion ----------------------------------------------------------------------------


def in_z3(z3, expr, names):
    """A predicate or expression in z3's terms."""
    if expr in (sympy.true, sympy.false):
        return z3.BoolVal(expr is sympy.true)
    if isinstance(expr, sympy.Integer):
        return z3.IntVal(int(expr))
    if isinstance(expr, sympy.Symbol):
        return names[expr]
    parts = [in_z3(z3, a, names) for a in expr.args]
    if isinstance(expr, sympy.Add | sympy.Mul):
        total = parts[0]
        for part in parts[1:]:
            total = total + part if isinstance(expr, sympy.Add) else total * part
        return total
    joins = {sympy.And: z3.And, sympy.Or: z3.Or}
    if type(expr) in joins:
        return joins[type(expr)](*parts)
    first, second = parts[0], parts[-1]
    return {
        "Abs": lambda: z3.If(first >= 0, first, -first),
        # z3 rounds divisions by positive numbers down, as Python does.
        "FloorDivide": lambda: first / second,
        "Modulo": lambda: first % second,
        "Not": lambda: z3.Not(first),
        "LessThan": lambda: first <= second,
        "StrictLessThan": lambda: first < second,
        "GreaterThan": lambda: first >= second,
        "StrictGreaterThan": lambda: first > second,
        "Equality": lambda: first == second,
        "Unequality": lambda: first != second,
    }[type(expr).__name__]()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(PREDICATES, PREDICATES)
def test_verdicts_for_all_sizes_agree_with_z3(left, right):
    z3 = pytest.importorskip("z3")
    q, k, n, c = z3.Ints("q k n c")
    names = {Q: q, K: k, N: n, C: c}
    solver = z3.Solver()
    solver.set("timeout", 2000)
    solver.add(q >= 0, q < n, k >= 0, k < c, n >= 1, c >= 1)
    solver.add(in_z3(z3, left, names) != in_z3(z3, right, names))
    answer = solver.check()
    verdict = equal(left, right, Domain(((Q, N), (K, C))))
    if answer != z3.unknown and verdict is not None:
        assert verdict.holds == (answer == z3.unsat)


def test_pieces_are_taken_in_order():
    stairs = sympy.Piecewise((Q, Q >= 3), (3, True), evaluate=False)
    assert equal(stairs >= K, sympy.Max(Q, 3) >= K, SQUARE).holds
    assert not equal(stairs >= K, K <= Q, SQUARE).holds
    assert equal(sympy.Piecewise((Q, Q >= 3)) >= K, K <= Q, SQUARE) is None


def test_facts_narrow_the_domain():
    domain = Domain(SQUARE.indices, facts=(sympy.Le(K, Q, evaluate=False),))
    assert implies(sympy.true, K <= Q, domain).holds
