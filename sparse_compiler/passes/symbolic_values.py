"""Values that a tensor's element can have when it is read as a function of its position.

An element is one of: a sympy integer expression (integer tensors), a sympy Boolean (bool tensors), a
Python float (float constants) or a `Choice` between two numbers (what casts of predicates and
additive masks are made of). Relations stay unevaluated: sympy's own simplification costs
milliseconds and islpy decides them anyway.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import sympy
import sympy.tensor.tensor
import torch
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue

__all__ = [
    "Choice",
    "FloorDivide",
    "Modulo",
    "NotUnderstood",
    "Value",
    "as_bool",
    "as_choice",
    "choose",
    "combine",
    "compare",
    "conj",
    "conjuncts",
    "disj",
    "floor_divide",
    "is_bool",
    "modulo",
    "neg",
    "round_value",
]

Number = int | float
# Constants beyond this could overflow int32 index arithmetic; such masks are left alone.
_LARGEST_CONSTANT = 2**30


class NotUnderstood(Exception):
    """An operation that the interpreter does not read; the text says which and why."""


class FloorDivide(sympy.Function):
    """`floor(a / b)` for integers, left alone by sympy."""

    is_integer = True


class Modulo(sympy.Function):
    """`a mod b` with the sign of `b`, for integers, left alone by sympy."""

    is_integer = True


@dataclass(frozen=True)
class Choice:
    """`yes` where `cond` holds, else `no`.

    ``exact`` is False where `no` only stands for "as low as the dtype's minimum": such a value may
    be looked at as a mask but not computed with.
    """

    cond: Boolean
    yes: Number
    no: Number
    exact: bool = True

    @property
    def free_symbols(self) -> set[Any]:
        """The symbols that decide."""
        return set(self.cond.free_symbols)

    def atoms(self, *types: Any) -> set[Any]:
        """The atoms of what decides, as sympy's."""
        return self.cond.atoms(*types)


Value = sympy.Expr | Boolean | Choice | float


def is_bool(value: Value) -> TypeGuard[Boolean]:
    """Whether the value is a truth value (a sympy Symbol is a Boolean by class, so ask this)."""
    return isinstance(value, Boolean) and not isinstance(value, sympy.Expr)


def conj(*args: Boolean) -> Boolean:
    """And, with constants removed."""
    kept = [a for a in args if not isinstance(a, BooleanTrue)]
    if any(isinstance(a, BooleanFalse) for a in kept):
        return sympy.false
    return kept[0] if len(kept) == 1 else sympy.And(*kept) if kept else sympy.true


def disj(*args: Boolean) -> Boolean:
    """Or, with constants removed."""
    kept = [a for a in args if not isinstance(a, BooleanFalse)]
    if any(isinstance(a, BooleanTrue) for a in kept):
        return sympy.true
    return kept[0] if len(kept) == 1 else sympy.Or(*kept) if kept else sympy.false


_NEGATED: dict[type, Any] = {
    sympy.Le: sympy.Gt,
    sympy.Lt: sympy.Ge,
    sympy.Ge: sympy.Lt,
    sympy.Gt: sympy.Le,
    sympy.Eq: sympy.Ne,
    sympy.Ne: sympy.Eq,
}


def neg(pred: Boolean) -> Boolean:
    """Not; a relation is turned around (integers only: there is no NaN here)."""
    turned = _NEGATED.get(type(pred))
    if turned is not None:
        return turned(*pred.args, evaluate=False)
    return sympy.Not(pred)


def conjuncts(pred: Any) -> list[Boolean]:
    """The parts of `pred` whose And is `pred`, as fine as De Morgan's rules give."""
    if isinstance(pred, BooleanTrue):
        return []
    if isinstance(pred, sympy.And):
        return [part for arg in pred.args for part in conjuncts(arg)]
    if isinstance(pred, sympy.Not):
        inner: Any = pred.args[0]
        if isinstance(inner, sympy.Or):
            return [part for arg in inner.args for part in conjuncts(neg(arg))]
        if isinstance(inner, sympy.Not):
            return conjuncts(inner.args[0])
        if isinstance(inner, tuple(_NEGATED)):
            return conjuncts(neg(inner))
    return [pred]


def as_choice(value: Value) -> Choice:
    """A value that takes at most two constants, as a `Choice`; raises NotUnderstood otherwise."""
    if isinstance(value, Choice):
        if not value.exact:
            raise NotUnderstood("arithmetic on a sum of additive masks")
        return value
    if is_bool(value):
        return Choice(value, 1, 0)
    if isinstance(value, sympy.Integer):
        return Choice(sympy.true, int(value), int(value))
    if isinstance(value, float):
        return Choice(sympy.true, value, value)
    raise NotUnderstood("neither a constant nor a choice of two constants")


def _equals(value: Choice, number: Number) -> Boolean:
    """Where `value` is `number`."""
    hit = (value.yes == number, value.no == number)
    table: dict[tuple[bool, bool], Callable[[], Boolean]] = {
        (True, True): lambda: sympy.true,
        (True, False): lambda: value.cond,
        (False, True): lambda: neg(value.cond),
        (False, False): lambda: sympy.false,
    }
    return table[hit]()


def _possible(value: Choice) -> set[Number]:
    if isinstance(value.cond, BooleanTrue):
        return {value.yes}
    return {value.no} if isinstance(value.cond, BooleanFalse) else {value.yes, value.no}


def _if(cond: Boolean, yes: Boolean, no: Boolean) -> Boolean:
    if yes == no:
        return yes
    if isinstance(no, BooleanFalse):
        return conj(cond, yes)
    if isinstance(yes, BooleanTrue):
        return disj(cond, no)
    if isinstance(yes, BooleanFalse):
        return conj(neg(cond), no)
    if isinstance(no, BooleanTrue):
        return disj(neg(cond), yes)
    return disj(conj(cond, yes), conj(neg(cond), no))


def choose(cond: Boolean, yes: Value, no: Value) -> Value:
    """`torch.where(cond, yes, no)` for one element."""
    if is_bool(yes) and is_bool(no):
        return _if(cond, yes, no)
    if isinstance(cond, BooleanTrue) or yes == no:
        return yes
    if isinstance(cond, BooleanFalse):
        return no
    first, second = as_choice(yes), as_choice(no)
    values = sorted(_possible(first) | _possible(second))
    if len(values) > 2 or any(v != v for v in values):
        raise NotUnderstood("a choice among more than two numbers")
    top = values[-1]
    return Choice(_if(cond, _equals(first, top), _equals(second, top)), top, values[0])


def as_bool(value: Value) -> Boolean:
    """What a cast to bool gives: nonzero is True."""
    if is_bool(value):
        return value
    if isinstance(value, Choice):
        if not value.exact:
            raise NotUnderstood("a cast of a sum of additive masks")
        return _if(value.cond, _constant(value.yes != 0), _constant(value.no != 0))
    if isinstance(value, float):
        return _constant(value != 0)
    if isinstance(value, sympy.Integer):
        return _constant(value != 0)
    return sympy.Ne(value, 0, evaluate=False)  # type: ignore[return-value]


def _constant(truth: bool) -> Boolean:
    return sympy.true if truth else sympy.false


_RELATIONS: dict[str, tuple[Any, Callable[[Any, Any], bool]]] = {
    "le": (sympy.Le, operator.le),
    "lt": (sympy.Lt, operator.lt),
    "ge": (sympy.Ge, operator.ge),
    "gt": (sympy.Gt, operator.gt),
    "eq": (sympy.Eq, operator.eq),
    "ne": (sympy.Ne, operator.ne),
}


def compare(kind: str, left: Value, right: Value) -> Boolean:
    """An elementwise comparison; `kind` is one of le lt ge gt eq ne."""
    relation, check = _RELATIONS[kind]
    symbolic = [isinstance(v, sympy.Expr) and not v.is_Integer for v in (left, right)]
    if any(symbolic):
        if not (isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr)):
            raise NotUnderstood("a comparison of an index with a choice or a float")
        return relation(left, right, evaluate=False)
    first, second = as_choice(left), as_choice(right)
    outcome = [
        [_constant(check(a, b)) for b in (second.yes, second.no)] for a in (first.yes, first.no)
    ]
    return _if(first.cond, _if(second.cond, *outcome[0]), _if(second.cond, *outcome[1]))


def round_value(value: Value, dtype: torch.dtype) -> Value:
    """The value as `dtype` stores it; raises NotUnderstood where it could wrap or lose digits."""
    if dtype == torch.bool:
        return as_bool(value)
    if isinstance(value, Choice):
        yes, no = (_round_number(v, dtype) for v in (value.yes, value.no))
        return Choice(value.cond, yes, no, value.exact)
    if is_bool(value):
        return Choice(value, _round_number(1, dtype), _round_number(0, dtype))
    if isinstance(value, float | sympy.Integer):
        number = float(value) if isinstance(value, float) else int(value)
        rounded = _round_number(number, dtype)
        return sympy.Integer(rounded) if isinstance(rounded, int) else rounded
    if dtype not in (torch.int64, torch.int32):
        raise NotUnderstood(f"an index stored as {dtype}")
    return value


def _round_number(number: Number, dtype: torch.dtype) -> Number:
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        if number != number or not info.min <= number <= info.max or number != int(number):
            raise NotUnderstood(f"{number} does not fit {dtype}")
        return int(number)
    return float(torch.tensor(float(number), dtype=torch.float64).to(dtype).item())


def _least(left: sympy.Expr, right: sympy.Expr) -> sympy.Expr:
    # Unevaluated: sympy's search for simpler forms costs tens of milliseconds.
    if left == right:
        return left
    plain = left.is_Integer and right.is_Integer
    return min(left, right) if plain else sympy.Min(left, right, evaluate=False)


def _greatest(left: sympy.Expr, right: sympy.Expr) -> sympy.Expr:
    if left == right:
        return left
    plain = left.is_Integer and right.is_Integer
    return max(left, right) if plain else sympy.Max(left, right, evaluate=False)


def _index_multiply(left: sympy.Expr, right: sympy.Expr) -> sympy.Expr:
    return left * right


_INDEX_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": _index_multiply,
    "minimum": _least,
    "maximum": _greatest,
}
_NUMBER_ARITHMETIC: dict[str, Callable[[Any, Any], Number]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "minimum": min,
    "maximum": max,
}


def combine(kind: str, left: Value, right: Value, dtype: torch.dtype) -> Value:
    """Elementwise arithmetic (add sub mul minimum maximum floor_divide remainder) in `dtype`."""
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        return _combine_indices(kind, left, right, dtype)
    if kind not in _NUMBER_ARITHMETIC:
        raise NotUnderstood(f"{kind} of a choice")
    if kind == "add" and dtype.is_floating_point:
        met = _meet_additive(left, right, dtype)
        if met is not None:
            return met
    first, second = as_choice(left), as_choice(right)
    compute = _NUMBER_ARITHMETIC[kind]

    def number(a: Number, b: Number) -> Number:
        return _round_number(compute(a, b), dtype)

    if len(_possible(second)) == 1:
        b = next(iter(_possible(second)))
        return Choice(first.cond, number(first.yes, b), number(first.no, b))
    if len(_possible(first)) == 1:
        a = next(iter(_possible(first)))
        return Choice(second.cond, number(a, second.yes), number(a, second.no))
    if first.cond == second.cond:
        return Choice(first.cond, number(first.yes, second.yes), number(first.no, second.no))
    yes = choose(second.cond, *(_lift(number(first.yes, b)) for b in (second.yes, second.no)))
    no = choose(second.cond, *(_lift(number(first.no, b)) for b in (second.yes, second.no)))
    return choose(first.cond, yes, no)


def _lift(number: Number) -> Value:
    return number if isinstance(number, float) else sympy.Integer(number)


def _combine_indices(
    kind: str, left: sympy.Expr, right: sympy.Expr, dtype: torch.dtype
) -> sympy.Expr:
    for side in (left, right):
        if isinstance(side, sympy.Integer) and abs(int(side)) > _LARGEST_CONSTANT:
            raise NotUnderstood(f"the constant {side} could overflow index arithmetic")
    if dtype not in (torch.int64, torch.int32) or (kind == "mul" and dtype == torch.int32):
        raise NotUnderstood(f"{kind} of indices stored as {dtype}")
    if kind == "floor_divide":
        return floor_divide(left, right)
    if kind == "remainder":
        return modulo(left, right)
    return _INDEX_ARITHMETIC[kind](left, right)


def _meet_additive(left: Value, right: Value, dtype: torch.dtype) -> Choice | None:
    """The sum of two additive masks (0 or the dtype's minimum or lower); None if they are not."""
    lowest = torch.finfo(dtype).min
    visible: list[Boolean] = []
    for value in (left, right):
        if not isinstance(value, Choice):
            return None
        if value.yes == 0 and value.no <= lowest:
            visible.append(value.cond)
        elif value.no == 0 and value.yes <= lowest:
            visible.append(neg(value.cond))
        else:
            return None
    return Choice(conj(*visible), 0.0, float("-inf"), exact=False)


def floor_divide(left: sympy.Expr, right: sympy.Expr) -> sympy.Expr:
    """floor(left / right) with the obvious cases done."""
    if right == 1 or left == 0:
        return left
    if isinstance(left, sympy.Integer) and isinstance(right, sympy.Integer) and right != 0:
        return sympy.Integer(int(left) // int(right))
    return FloorDivide(left, right)  # type: ignore[return-value]


def modulo(left: sympy.Expr, right: sympy.Expr) -> sympy.Expr:
    """left mod right (sign of right) with the obvious cases done."""
    if right == 1 or left == 0:
        return sympy.Integer(0)
    if isinstance(left, sympy.Integer) and isinstance(right, sympy.Integer) and right != 0:
        return sympy.Integer(int(left) % int(right))
    return Modulo(left, right)  # type: ignore[return-value]
