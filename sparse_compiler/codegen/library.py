"""Expressions that the package knows; everything said of attention anywhere in codegen is here.

Letters: b batch, h query head, m query, n key, d head size, e value size; t token, f hidden unit,
x expert, o output feature.
"""

from __future__ import annotations

import sympy

from sparse_compiler.ir.expression import Access, Axis, Statement, TensorExpression
from sparse_compiler.ir.monoid import AFFINE, ONLINE_SOFTMAX, SUM, component

__all__ = [
    "affine_scan",
    "attention",
    "convolution",
    "cumulative_sum",
    "grouped_matmul",
    "matmul",
    "routed_matmul",
    "size",
    "sparse_ffn",
]


def size(name: str) -> sympy.Symbol:
    """A length known when a kernel is built or launched; a positive integer."""
    return sympy.Symbol(name, integer=True, positive=True)


def _axes(letters: dict[str, str]) -> tuple[Axis, ...]:
    return tuple(Axis(letter, size(length)) for letter, length in letters.items())


def _product(output: Access, *operands: Access) -> Statement:
    body = sympy.Mul(*(operand.value for operand in operands))
    return Statement(output, operands, (body,), SUM)


def attention(
    *, grouped: bool = True, causal: bool = True, window: bool = False, alibi: bool = False
) -> TensorExpression:
    """Softmax attention, online: scores, then the reduction over keys.

    Args:
        grouped: query head h reads key head h // G; else K and V have all heads.
        causal: key n is visible to query m if n <= m + offset.
        window: and if n >= m + offset - left.
        alibi: adds slope[h] * (n - m - offset) to the scores.
    """
    axes = _axes({"b": "B", "h": "Hq", "m": "Lq", "n": "Lk", "d": "D", "e": "Dv"})
    b, h, m, n, d, e = (axis.symbol for axis in axes)
    kv = sympy.floor(h / size("G")) if grouped else h
    offset = sympy.Symbol("offset", integer=True)
    query, key = Access("Q", (b, h, m, d)), Access("K", (b, kv, n, d))
    value, score = Access("V", (b, kv, n, e)), Access("S", (b, h, m, n))
    operands = [score, value]
    logit = sympy.Symbol("scale", positive=True) * score.value
    if alibi:
        slope = Access("slope", (h,))
        operands.append(slope)
        logit += slope.value * (n - m - offset)
    seen = sympy.true
    if causal:
        seen = sympy.And(seen, n <= m + offset)
    if window:
        seen = sympy.And(seen, n >= m + offset - sympy.Symbol("left", integer=True))
    softmax = Statement(
        Access("O", (b, h, m, e)),
        tuple(operands),
        (logit, sympy.Integer(1), value.value),
        ONLINE_SOFTMAX,
        when=seen,
        result=component("acc") / component("l"),
    )
    return TensorExpression("attention", axes, (_product(score, query, key), softmax))


def matmul() -> TensorExpression:
    """C[m, o] = sum over k of A[m, k] * B[k, o]; zero rows of A are micro-tiles along m."""
    axes = _axes({"m": "M", "k": "K", "o": "O"})
    m, k, o = (axis.symbol for axis in axes)
    return TensorExpression(
        "matmul", axes, (_product(Access("C", (m, o)), Access("A", (m, k)), Access("B", (k, o))),)
    )


def grouped_matmul() -> TensorExpression:
    """Experts: Y[t, o] = sum over x, k of gate[t, x] * X[t, k] * W[x, k, o]; gates mostly zero."""
    axes = _axes({"t": "T", "x": "X", "k": "K", "o": "O"})
    t, x, k, o = (axis.symbol for axis in axes)
    statement = _product(
        Access("Y", (t, o)), Access("gate", (t, x)), Access("X", (t, k)), Access("W", (x, k, o))
    )
    return TensorExpression("grouped_matmul", axes, (statement,))


def routed_matmul() -> TensorExpression:
    """Experts by look-up, Y[t, o] = sum over k of X[t, k] * W[expert(t), k, o]."""
    axes = _axes({"t": "T", "k": "K", "o": "O"})
    t, k, o = (axis.symbol for axis in axes)
    expert = sympy.Function("expert", integer=True, nonnegative=True)(t)
    statement = _product(Access("Y", (t, o)), Access("X", (t, k)), Access("W", (expert, k, o)))
    return TensorExpression("routed_matmul", axes, (statement,))


def sparse_ffn() -> TensorExpression:
    """Y = relu(X @ U) @ W; a hidden unit that is zero for every row of a tile is left out."""
    axes = _axes({"t": "T", "k": "K", "f": "F", "o": "O"})
    t, k, f, o = (axis.symbol for axis in axes)
    before, hidden = Access("Z", (t, f)), Access("H", (t, f))
    rectify = Statement(hidden, (before,), (sympy.Max(before.value, 0),))
    return TensorExpression(
        "sparse_ffn",
        axes,
        (
            _product(before, Access("X", (t, k)), Access("U", (k, f))),
            rectify,
            _product(Access("Y", (t, o)), hidden, Access("W", (f, o))),
        ),
    )


def cumulative_sum() -> TensorExpression:
    """Y[b, t] = Y[b, t - 1] + X[b, t]: a recurrence."""
    axes = _axes({"b": "B", "t": "T"})
    b, t = (axis.symbol for axis in axes)
    before, here = Access("Y", (b, t - 1)), Access("X", (b, t))
    statement = Statement(Access("Y", (b, t)), (before, here), (before.value + here.value,))
    return TensorExpression("cumulative_sum", axes, (statement,))


def affine_scan() -> TensorExpression:
    """The last state of s -> a[t] s + x[t], from s = 0: a reduction, but an ordered one."""
    axes = _axes({"b": "B", "t": "T"})
    b, t = (axis.symbol for axis in axes)
    factor, term = Access("A", (b, t)), Access("X", (b, t))
    statement = Statement(
        Access("Y", (b,)), (factor, term), (factor.value, term.value), AFFINE, result=component("b")
    )
    return TensorExpression("affine_scan", axes, (statement,))


def convolution() -> TensorExpression:
    """Y[c, p] = sum over s of X[c, p + s] * W[c, s]; both places share an index."""
    axes = _axes({"c": "C", "p": "P", "s": "S"})
    c, p, s = (axis.symbol for axis in axes)
    statement = _product(Access("Y", (c, p)), Access("X", (c, p + s)), Access("W", (c, s)))
    return TensorExpression("convolution", axes, (statement,))
