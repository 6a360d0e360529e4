"""Predicates over integers, decided by isl.

A predicate is a sympy Boolean made of And, Or, Not and relations between affine expressions of
index symbols and size symbols, with floor division and modulo by positive constants, abs, min and
max. Index symbols become dimensions of an isl set, every other symbol a parameter, so that an
answer holds for all sizes. What is not of this form is undecidable here: the functions answer
None, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import islpy as isl
import sympy
from sympy.core.function import AppliedUndef

from sparse_compiler.passes.symbolic_values import FloorDivide, Modulo

__all__ = ["Decider", "Domain", "Undecidable", "Verdict", "equal", "implies"]

# Bounds the work of one decider; ordinary masks need a few thousand of isl's operations.
_MAX_OPERATIONS = 3_000_000


class Undecidable(Exception):
    """The predicate is not Presburger, or isl gave up; the text says why."""


@dataclass(frozen=True)
class Domain:
    """Where a predicate is decided.

    Args:
        indices: index symbols, each with its size: 0 <= index < size.
        bounds: known inclusive range of size symbols; None is unbounded. A symbol that is not
            named here is unbounded on the side that its sympy assumptions leave open.
        facts: predicates that hold everywhere in the domain.
    """

    indices: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    bounds: Mapping[sympy.Symbol, tuple[int | None, int | None]] = field(default_factory=dict)
    facts: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds; if not, `witness` is a point where it fails, as text."""

    holds: bool
    witness: str = ""


class Decider:
    """Builds isl sets over one domain and compares them. Cheap to make; not thread safe.

    Attributes:
        opaque: parameters that stand for a non-affine expression of sizes. A claim proved for all
            their values holds; a refutation may use values that cannot occur, so it does not count.
    """

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.context = isl.Context()
        self.context.set_max_operations(_MAX_OPERATIONS)
        self.index_names = {s: f"i{n}" for n, (s, _) in enumerate(domain.indices)}
        self.param_names: dict[sympy.Expr, str] = {}
        self.opaque: set[sympy.Expr] = set()
        self._affine_memo: dict[sympy.Expr, Any] = {}
        self._set_memo: dict[Any, Any] = {}
        self._space([])
        self.box = self._guarded(self._build_box)

    def set_of(self, pred: Any) -> Any:
        """The isl set of the points of the domain where `pred` holds; raises Undecidable."""
        return self._guarded(lambda: self._set(pred).intersect(self._box_now()).coalesce())

    def everywhere(self) -> Any:
        """The isl set of all the points of the domain, for the sizes that occurred so far."""
        return self._guarded(self._box_now)

    def affine(self, expr: sympy.Expr) -> Any:
        """The isl piecewise affine function of `expr`; raises Undecidable."""
        return self._guarded(lambda: self._affine(expr))

    def run(self, work: Callable[[], Any]) -> Any:
        """Runs isl calls, turning isl's errors (too much work) into Undecidable."""
        return self._guarded(work)

    def equal(self, left: Any, right: Any) -> Verdict | None:
        """Do both hold at the same points, for all sizes? None: undecidable here."""
        return self._verdict(left, right, both_ways=True)

    def implies(self, left: Any, right: Any) -> Verdict | None:
        """Does `right` hold wherever `left` does, for all sizes? None: undecidable here."""
        return self._verdict(left, right, both_ways=False)

    def witness(self, points: Any) -> str:
        """One point of a non-empty isl set as text, e.g. ``q=0, k=1 (s0=2)``."""
        point = self._guarded(points.sample_point)

        def value(kind: Any, pos: int) -> int:
            return point.get_coordinate_val(kind, pos).to_python()

        space = point.get_space()
        parts = [
            f"{symbol.name}={value(isl.dim_type.set, n)}"
            for n, (symbol, _) in enumerate(self.domain.indices)
        ]
        names = {name: expr for expr, name in self.param_names.items()}
        sizes = []
        for n in range(space.dim(isl.dim_type.param)):
            expr = names[space.get_dim_name(isl.dim_type.param, n)]
            sizes.append(f"{expr}={value(isl.dim_type.param, n)}")
        return ", ".join(parts) + (f" ({', '.join(sizes)})" if sizes else "")

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except isl.Error as error:
            raise Undecidable(f"isl gave up: {error}") from error

    def _verdict(self, left: Any, right: Any, *, both_ways: bool) -> Verdict | None:
        try:
            a, b = self.set_of(left), self.set_of(right)
            apart = self._guarded(lambda: a.subtract(b))
            if both_ways:
                apart = self._guarded(lambda: apart.union(b.subtract(a)))
            if self._guarded(apart.is_empty):
                return Verdict(True)
            return None if self.opaque else Verdict(False, self.witness(apart))
        except Undecidable:
            return None

    def _space(self, params: Sequence[str]) -> None:
        space = isl.Space.create_from_names(
            self.context, set=list(self.index_names.values()), params=list(params)
        )
        self._local = isl.LocalSpace.from_space(space)

    def _build_box(self) -> Any:
        box = isl.Set.universe(self._local.get_space())
        zero = self._constant(0)
        for symbol, size in self.domain.indices:
            index = self._affine(symbol)
            box = box.intersect(index.ge_set(zero)).intersect(index.lt_set(self._affine(size)))
        for fact in self.domain.facts:
            box = box.intersect(self._set(fact))
        return box

    def _box_now(self) -> Any:
        """The box met with the ranges of all the parameters that occurred so far."""
        box = self.box
        for expr in self.param_names:
            low, high = self._range(expr)
            param = self._affine(expr)
            if low is not None:
                box = box.intersect(param.ge_set(self._constant(low)))
            if high is not None:
                box = box.intersect(param.le_set(self._constant(high)))
        return box

    def _range(self, expr: sympy.Expr) -> tuple[int | None, int | None]:
        low, high = (
            self.domain.bounds.get(expr, (None, None))
            if isinstance(expr, sympy.Symbol)
            else (None, None)
        )
        if low is None and expr.is_positive:
            low = 1
        if low is None and expr.is_nonnegative:
            low = 0
        return low, high

    # -- expressions ---------------------------------------------------------------------------

    def _constant(self, value: int) -> Any:
        aff = isl.Aff.zero_on_domain(self._local)
        return isl.PwAff.from_aff(aff.set_constant_val(self._val(value)))

    def _val(self, value: int) -> Any:
        if abs(value) < 2**62:
            return isl.Val.int_from_si(self.context, value)
        raise Undecidable(f"the constant {value} is too large")

    def _affine(self, expr: Any) -> Any:
        known = self._affine_memo.get(expr)
        if known is None:
            known = self._affine_memo[expr] = self._affine_new(expr)
        return known

    def _affine_new(self, expr: Any) -> Any:
        if isinstance(expr, sympy.Integer):
            return self._constant(int(expr))
        if isinstance(expr, sympy.Symbol):
            return self._variable(expr)
        try:
            handler = _EXPRESSIONS.get(type(expr).__name__)
            if handler is None:
                raise Undecidable(f"{expr} is not affine")
            return handler(self, expr)
        except Undecidable:
            if expr.free_symbols & self.index_names.keys() or expr.atoms(AppliedUndef):
                raise
            if not expr.is_integer:
                raise
            self.opaque.add(expr)
            return self._variable(expr)

    def _variable(self, expr: sympy.Expr) -> Any:
        if expr in self.index_names:
            position = list(self.index_names).index(expr)  # type: ignore[arg-type]
            return isl.PwAff.var_on_domain(self._local, isl.dim_type.set, position)
        name = self.param_names.setdefault(expr, f"p{len(self.param_names)}")
        space = isl.Space.create_from_names(
            self.context, set=list(self.index_names.values()), params=[name]
        )
        # isl aligns named parameters by itself when spaces meet.
        return isl.PwAff.var_on_domain(isl.LocalSpace.from_space(space), isl.dim_type.param, 0)

    def _add(self, expr: Any) -> Any:
        total = self._affine(expr.args[0])
        for arg in expr.args[1:]:
            total = total.add(self._affine(arg))
        return total

    def _mul(self, expr: Any) -> Any:
        factor, rest = 1, []
        for arg in expr.args:
            if isinstance(arg, sympy.Integer):
                factor *= int(arg)
            else:
                rest.append(arg)
        if len(rest) != 1:
            raise Undecidable(f"{expr} is not affine")
        return self._affine(rest[0]).scale_val(self._val(factor))

    def _divisor(self, expr: Any) -> tuple[Any, Any]:
        value, by = expr.args[0], expr.args[1]
        if not (isinstance(by, sympy.Integer) and by > 0):
            raise Undecidable(f"{expr} divides by something else than a positive constant")
        return self._affine(value), self._val(int(by))

    def _floor_div(self, expr: Any) -> Any:
        value, by = self._divisor(expr)
        return value.scale_down_val(by).floor()

    def _mod(self, expr: Any) -> Any:
        value, by = self._divisor(expr)
        return value.mod_val(by)

    def _abs(self, expr: Any) -> Any:
        value = self._affine(expr.args[0])
        return value.max(value.neg())

    def _max(self, expr: Any) -> Any:
        values = [self._affine(a) for a in expr.args]
        for other in values[1:]:
            values[0] = values[0].max(other)
        return values[0]

    def _min(self, expr: Any) -> Any:
        values = [self._affine(a) for a in expr.args]
        for other in values[1:]:
            values[0] = values[0].min(other)
        return values[0]

    def _piecewise(self, expr: Any) -> Any:
        """The first piece whose condition holds; the last condition must be true."""
        if expr.args[-1].args[1] is not sympy.true:
            raise Undecidable(f"{expr} leaves cases out")
        rest = isl.Set.universe(self._local.get_space())
        total = None
        for value, cond in (piece.args for piece in expr.args):
            here = self._set(cond)
            part = self._affine(value).intersect_domain(rest.intersect(here))
            total = part if total is None else total.union_add(part)
            rest = rest.subtract(here)
        return total

    # -- predicates ----------------------------------------------------------------------------

    def _set(self, pred: Any) -> Any:
        known = self._set_memo.get(pred)
        if known is None:
            known = self._set_memo[pred] = self._set_new(pred)
        return known

    def _set_new(self, pred: Any) -> Any:
        space = self._local.get_space()
        if pred is sympy.true:
            return isl.Set.universe(space)
        if pred is sympy.false:
            return isl.Set.empty(space)
        relation = _RELATIONS.get(type(pred))
        if relation is not None:
            return relation(self._affine(pred.args[0]), self._affine(pred.args[1]))
        if isinstance(pred, sympy.Not):
            return self._set(pred.args[0]).complement()
        if isinstance(pred, sympy.And | sympy.Or):
            meet = isinstance(pred, sympy.And)
            total = self._set(pred.args[0])
            for arg in pred.args[1:]:
                other = self._set(arg)
                total = total.intersect(other) if meet else total.union(other)
            return total
        raise Undecidable(f"{pred} is not a relation")


# By name, so that torch's own integer functions (which sizes contain) are read as well.
_EXPRESSIONS: dict[str, Callable[[Decider, Any], Any]] = {
    "Add": Decider._add,
    "Mul": Decider._mul,
    FloorDivide.__name__: Decider._floor_div,
    "FloorDiv": Decider._floor_div,
    "CleanDiv": Decider._floor_div,
    Modulo.__name__: Decider._mod,
    "Mod": Decider._mod,
    "PythonMod": Decider._mod,
    "Abs": Decider._abs,
    "Max": Decider._max,
    "Min": Decider._min,
    "Piecewise": Decider._piecewise,
}

_RELATIONS: dict[type, Callable[[Any, Any], Any]] = {
    sympy.Le: lambda a, b: a.le_set(b),
    sympy.Lt: lambda a, b: a.lt_set(b),
    sympy.Ge: lambda a, b: a.ge_set(b),
    sympy.Gt: lambda a, b: a.gt_set(b),
    sympy.Eq: lambda a, b: a.eq_set(b),
    sympy.Ne: lambda a, b: a.ne_set(b),
}


def equal(left: Any, right: Any, domain: Domain) -> Verdict | None:
    """Whether two predicates hold at the same points of `domain`, for all sizes.

    Returns:
        A verdict with a counter-example where it is No; None where this cannot be decided here.
    """
    try:
        return Decider(domain).equal(left, right)
    except Undecidable:
        return None


def implies(left: Any, right: Any, domain: Domain) -> Verdict | None:
    """Whether `right` holds wherever `left` does in `domain`; None: undecidable here."""
    try:
        return Decider(domain).implies(left, right)
    except Undecidable:
        return None
