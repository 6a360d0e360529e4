"""How an element of an elementwise operation or of a factory is computed from its position."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from sparse_compiler.passes.operations import KEEPING
from sparse_compiler.passes.symbolic_reader import (
    Evaluate,
    Index,
    SymbolicReader,
    argument,
    tensor_of,
)
from sparse_compiler.passes.symbolic_values import (
    Choice,
    NotUnderstood,
    Value,
    as_bool,
    choose,
    combine,
    compare,
    conj,
    disj,
    is_bool,
    neg,
    round_value,
)

__all__ = ["ELEMENTWISE"]


def _arange(reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
    args = [a for a in node.args if a is not None]
    if len(args) == 1:
        start, step = node.kwargs.get("start", 0), node.kwargs.get("step", 1)
        if "end" in node.kwargs:  # arange(start, end=...)
            start = args[0]
    else:
        start, step = argument(node, 0, "start", 0), argument(node, 2, "step", 1)
    start, step = _integer(reader, start), _integer(reader, step)
    if reader.dtype(node) not in (torch.int64, torch.int32):
        raise NotUnderstood(f"arange stored as {reader.dtype(node)}")
    return start + index[0] * step


def _integer(reader: SymbolicReader, value: Any) -> sympy.Expr:
    if isinstance(value, fx.Node) and tensor_of(value) is not None:
        raise NotUnderstood(f"{value.name} is a tensor used as a number")
    return reader.size(value)


def _filled(position: int, name: str, reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
    value = reader.evaluate_scalar(argument(node, position, name), ())
    return round_value(value, reader.dtype(node))


def _constant(value: float, reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
    return round_value(value, reader.dtype(node))


def _tensor(reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
    data = argument(node, 0, "data")
    if not isinstance(data, bool | int | float):
        raise NotUnderstood("only single numbers are read from torch.tensor")
    return round_value(reader.evaluate_scalar(data, ()), reader.dtype(node))


def _cast(reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
    """A conversion of dtype or device; also the ops that keep everything."""
    source = argument(node, 0, "input")
    value = reader.operand(node, source, index)
    old, new = reader.dtype(source), reader.dtype(node)
    if old == new:
        return value
    if new == torch.bool:
        return as_bool(value)
    if isinstance(value, sympy.Expr) and not isinstance(value, sympy.Integer):
        if old.is_floating_point:
            raise NotUnderstood(f"a cast of an unread {old}")
        if value.atoms(AppliedUndef) and new != torch.int64:
            raise NotUnderstood(f"a cast of unread integers to {new}")
    return round_value(value, new)


def _relation(kind: str, reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
    sides = argument(node, 0, "input"), argument(node, 1, "other")
    left, right = (_checked(reader, node, side, index) for side in sides)
    if is_bool(left) and is_bool(right) and kind in ("eq", "ne"):
        return choose(left, *((right, neg(right)) if kind == "eq" else (neg(right), right)))
    return compare(kind, left, right)


def _checked(reader: SymbolicReader, node: fx.Node, operand: Any, index: Index) -> Value:
    """An operand; unread floats are refused since NaN breaks the algebra of relations."""
    value = reader.operand(node, operand, index)
    if isinstance(operand, fx.Node):
        tensor = tensor_of(operand)
        unread = isinstance(value, sympy.Expr) and not isinstance(value, sympy.Integer)
        if tensor is not None and tensor.dtype.is_floating_point and unread:
            raise NotUnderstood(f"{operand.name} is an unread float")
    return value


def _arithmetic(
    kind: str, reader: SymbolicReader, node: fx.Node, index: Index, *, swap: bool = False
) -> Value:
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        raise NotUnderstood("a scaled sum")
    left = _checked(reader, node, argument(node, 0, "input"), index)
    right = _checked(reader, node, argument(node, 1, "other"), index)
    if swap:
        left, right = right, left
    dtype = reader.dtype(node)
    if dtype == torch.bool:
        if kind == "mul" and is_bool(left) and is_bool(right):
            return conj(left, right)
        raise NotUnderstood(f"{kind} of bools")
    return combine(kind, left, right, dtype)


def _divide(reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
    if node.kwargs.get("rounding_mode") != "floor":
        raise NotUnderstood("a division that does not round down")
    return _arithmetic("floor_divide", reader, node, index)


def _negative(reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
    value = _checked(reader, node, argument(node, 0, "input"), index)
    zero = 0.0 if reader.dtype(node).is_floating_point else sympy.Integer(0)
    return combine("sub", zero, value, reader.dtype(node))


def _absolute(reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
    value = reader.operand(node, argument(node, 0, "input"), index)
    if not isinstance(value, sympy.Expr) or reader.dtype(node) not in (torch.int64, torch.int32):
        raise NotUnderstood("abs of something else than an index")
    return sympy.Abs(value)


def _clamp(reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
    value = reader.operand(node, argument(node, 0, "input"), index)
    name = getattr(node.target, "__name__", str(node.target))
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if name == "clamp_max":
        low, high = None, argument(node, 1, "max")
    if not isinstance(value, sympy.Expr) or reader.dtype(node) not in (torch.int64, torch.int32):
        raise NotUnderstood("clamp of something else than an index")
    for bound, kind in ((low, "maximum"), (high, "minimum")):
        if bound is not None:
            value = combine(kind, value, _integer(reader, bound), reader.dtype(node))
    return value


def _difference(reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
    """``diff`` with one value put in front, where the first step is like all the others."""
    source, before = argument(node, 0, "input"), argument(node, 3, "prepend")
    rank, dim = len(index), argument(node, 2, "dim", -1)
    plain = argument(node, 1, "n", 1) == 1 and argument(node, 4, "append") is None
    if not plain or not isinstance(before, fx.Node) or not isinstance(dim, int):
        raise NotUnderstood("diff by another spelling")
    at = dim % rank
    if reader.shape(before)[at] != 1 or reader.dtype(node) != torch.int64:
        raise NotUnderstood("diff by another spelling")

    def value(part: fx.Node, place: sympy.Expr) -> sympy.Expr:
        found = reader.evaluate(part, (*index[:at], place, *index[at + 1 :]))
        if not isinstance(found, sympy.Expr):
            raise NotUnderstood("diff of choices")
        return found

    zero = sympy.Integer(0)
    first = sympy.expand(value(source, zero) - value(before, zero))
    step = sympy.expand(value(source, index[at]) - value(source, index[at] - 1))
    if first != step:
        raise NotUnderstood("diff of steps that are not seen to be equal")
    return step


def _running_sum(reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
    """``cumsum`` of one number."""
    dim = argument(node, 1, "dim")
    value = reader.operand(node, argument(node, 0, "input"), index)
    value = round_value(value, torch.int64)
    if isinstance(value, Choice) and value.cond in (sympy.true, sympy.false):
        value = sympy.Integer(value.yes if value.cond is sympy.true else value.no)
    if not isinstance(value, sympy.Integer) or not isinstance(dim, int) or not index:
        raise NotUnderstood("a running sum of more than one number")
    if reader.dtype(node) != torch.int64:
        raise NotUnderstood(f"a running sum stored as {reader.dtype(node)}")
    return value * (index[dim % len(index)] + 1)


def _logical(
    join: Callable[..., Any], bools_only: bool, reader: SymbolicReader, node: fx.Node, index: Index
) -> Value:
    if bools_only and reader.dtype(node) != torch.bool:
        raise NotUnderstood("a bitwise operation on integers")
    names = ("input", "other")
    count = 1 if join is neg else 2
    return join(*(reader.truth(argument(node, n, names[n]), node, index) for n in range(count)))


def _exclusive(left: Any, right: Any) -> Any:
    return choose(left, neg(right), right)


def _where(reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
    if argument(node, 1, "input") is None:
        raise NotUnderstood("where with one argument lists positions")
    method = node.op == "call_method"  # x.where(cond, y)
    cond, yes = node.args[:2] if len(node.args) > 1 else (argument(node, 0, "condition"), None)
    if method:
        cond, yes = yes, cond
    no = argument(node, 2, "other")
    if yes is None or no is None:
        raise NotUnderstood("where with keyword operands")
    dtype = reader.dtype(node)
    left, right = (round_value(_checked(reader, node, v, index), dtype) for v in (yes, no))
    return choose(reader.truth(cond, node, index), left, right)


def _masked_fill(reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
    dtype = reader.dtype(node)
    kept = reader.operand(node, argument(node, 0, "input"), index)
    cond = reader.truth(argument(node, 1, "mask"), node, index)
    fill = round_value(reader.operand(node, argument(node, 2, "value"), index), dtype)
    return choose(cond, fill, kept)


def _triangle(lower: bool, reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
    diagonal = _integer(reader, argument(node, 1, "diagonal", 0))
    value = reader.operand(node, argument(node, 0, "input"), index)
    distance = index[-1] - index[-2]
    relation = sympy.Le if lower else sympy.Ge
    kept: Any = relation(distance, diagonal, evaluate=False)
    if isinstance(distance, sympy.Integer) and isinstance(diagonal, sympy.Integer):
        kept = relation(distance, diagonal)
    if reader.dtype(node) == torch.bool:
        return conj(kept, as_bool(value))
    if isinstance(value, Choice) and len({value.yes, value.no}) == 1:
        value = value.yes if isinstance(value.yes, float) else sympy.Integer(value.yes)
    return choose(kept, value, round_value(sympy.Integer(0), reader.dtype(node)))


def _table() -> dict[str, Evaluate]:
    table: dict[str, Evaluate] = {
        "arange": _arange,
        "tensor": _tensor,
        "scalar_tensor": partial(_filled, 0, "s"),
        "full": partial(_filled, 1, "fill_value"),
        "full_like": partial(_filled, 1, "fill_value"),
        "new_full": partial(_filled, 2, "fill_value"),
        "div": _divide,
        "neg": _negative,
        "negative": _negative,
        "__neg__": _negative,
        **dict.fromkeys(("abs", "__abs__"), _absolute),
        "absolute": _absolute,
        "clamp": _clamp,
        "clip": _clamp,
        "clamp_min": _clamp,
        "clamp_max": _clamp,
        "diff": _difference,
        "cumsum": _running_sum,
        "where": _where,
        "masked_fill": _masked_fill,
        "tril": partial(_triangle, True),
        "triu": partial(_triangle, False),
        "rsub": partial(_arithmetic, "sub", swap=True),
        "__rsub__": partial(_arithmetic, "sub", swap=True),
    }
    for value in (0, 1):
        stem = ("zeros", "ones")[value]
        for name in (stem, f"{stem}_like", f"new_{stem}"):
            table[name] = partial(_constant, float(value))
    table.update(dict.fromkeys(KEEPING, _cast))
    for kind in ("le", "lt", "ge", "gt", "eq", "ne"):
        table[kind] = table[f"__{kind}__"] = partial(_relation, kind)
    longer = {"less_equal": "le", "less": "lt", "greater_equal": "ge", "greater": "gt"}
    for name, kind in {**longer, "not_equal": "ne"}.items():
        table[name] = partial(_relation, kind)
    spelled = {
        "add": "add __add__ __radd__",
        "sub": "sub subtract __sub__",
        "mul": "mul multiply __mul__ __rmul__",
        "floor_divide": "floordiv floor_divide __floordiv__",
        "remainder": "mod remainder __mod__",
        "minimum": "minimum",
        "maximum": "maximum",
    }
    for kind, names in spelled.items():
        table.update(dict.fromkeys(names.split(), partial(_arithmetic, kind)))
    joins: list[tuple[str, Callable[..., Any], bool]] = [
        ("and_ __and__ __rand__ bitwise_and", conj, True),
        ("or_ __or__ __ror__ bitwise_or", disj, True),
        ("xor __xor__ bitwise_xor", _exclusive, True),
        ("invert inv __invert__ bitwise_not", neg, True),
        ("logical_and", conj, False),
        ("logical_or", disj, False),
        ("logical_xor", _exclusive, False),
        ("logical_not", neg, False),
    ]
    for names, join, bools_only in joins:
        table.update(dict.fromkeys(names.split(), partial(_logical, join, bools_only)))
    return table


ELEMENTWISE: dict[str, Evaluate] = _table()
