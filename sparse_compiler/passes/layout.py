"""From an element of a node to a tensor with the axes in the order wanted, and back.

``Element`` says where (b, h, l, d) stands in a node. ``layout`` looks through the views that lead to
the node for the tensor that needs the fewest steps, so that repeated K/V heads and merged or
transposed copies are seen through, and gives the steps (views) that lead from there to
[B, heads, L, D].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import fx

from sparse_compiler.ir.site import Operand, Step, tensor_of
from sparse_compiler.passes.form import Element
from sparse_compiler.passes.operations import CASTS, operation
from sparse_compiler.passes.symbolic_reader import Index
from sparse_compiler.passes.symbolic_tensor import NotUnderstood, SymbolicTensors
from sparse_compiler.passes.symbolic_values import FloorDivide, Modulo, floor_divide, modulo
from sparse_compiler.passes.symbolic_views import VIEWS

__all__ = [
    "Operand",
    "Wanted",
    "divided",
    "inverse_steps",
    "layout",
    "replaced",
    "step_back",
    "substituted",
    "tidy",
]

_VIEW_LIMIT = 64


@dataclass(frozen=True)
class Wanted:
    """Axes of the tensor that is wanted, in order.

    Args:
        symbols: one for each dimension; None stands for a dimension of size 1.
        sizes: of the dimensions.
        head: which of them is the head axis, -1 for none.
        shared: the head axis may come out shorter: heads that share a key head.
        optional: dimensions that may come out with size 1 where the element does not depend on them.
    """

    symbols: tuple[sympy.Symbol | None, ...]
    sizes: Index
    head: int = -1
    shared: bool = False
    optional: tuple[int, ...] = ()


def layout(
    element: Element, wanted: Wanted, tensors: SymbolicTensors, reader: fx.Node, until: fx.Node
) -> tuple[Operand, int] | None:
    """The operand that holds ``element`` as a tensor over ``wanted``, and its head groups.

    Args:
        reader, until: the first node that reads the element, and where it will be read instead; what
            is written in place in between is left alone.
    Returns:
        (operand, G): with G > 1 the head dimension holds 1 / G of the heads, head h at ``h // G``.
        None where the element is no view of a tensor over these axes.
    """
    best: tuple[Operand, int] | None = None
    node, index, consumer = element.node, tuple(map(tidy, element.index)), reader
    for _ in range(_VIEW_LIMIT):
        # A cache that was written before it is read here (static caches) may be handed out.
        if not tensors.mutations.written_between(node, consumer, until):
            found = _fit(node, index, wanted, tensors)
            if found is not None and _better(found, best):
                best = found
        step = step_back(tensors, node, index, consumer)
        if step is None:
            break
        consumer, (node, index) = node, step
    return best


def _better(found: tuple[Operand, int], best: tuple[Operand, int] | None) -> bool:
    if best is None or found[1] > best[1]:
        return True
    return found[1] == best[1] and len(found[0].steps) < len(best[0].steps)


def step_back(
    tensors: SymbolicTensors, node: fx.Node, index: Index, reader: fx.Node | None = None
) -> tuple[fx.Node, Index] | None:
    """One view backward; None where the value is made, or changes before ``reader`` reads it."""
    if node.op not in ("call_function", "call_method"):
        return None
    changes = tensors.mutations.written_after(node)
    if changes and (reader is None or tensors.mutations.written_between(node, node, reader)):
        return None
    name = operation(node) or ""
    try:
        if name in CASTS:
            source = node.args[0]
            same = isinstance(source, fx.Node) and _is_same(tensors, source, node)
            return (source, index) if same else None  # type: ignore[return-value]
        view = VIEWS.get(name)
        if view is None:
            return None
        source, place = view(tensors, node, index)
        return source, tuple(map(tidy, place))
    except NotUnderstood:
        return None


def _is_same(tensors: SymbolicTensors, first: fx.Node, second: fx.Node) -> bool:
    """Whether two nodes, one a cast of the other, hold equal tensors on one device."""
    one, other = tensor_of(first), tensor_of(second)
    if one is None or other is None or one.device != other.device:
        return False
    return one.dtype == other.dtype and tensors.shape(first) == tensors.shape(second)


def tidy(expr: sympy.Expr) -> sympy.Expr:
    """``n * (x // n) + x % n`` is x, and ``x // n``, ``x % n`` of a merged ``a * n + b`` come apart."""
    expr = sympy.sympify(expr)
    if not isinstance(expr, sympy.Add):
        return expr
    for term in expr.args:
        if isinstance(term, Modulo):
            value, by = term.args
            quotient = by * floor_divide(value, by)  # type: ignore[arg-type]
            if quotient in expr.args or sympy.expand(expr - term - quotient) == 0:
                return tidy(sympy.expand(expr - term - quotient + value))
    return expr


@dataclass(frozen=True)
class _Atom:
    """A part of a dimension: a wanted axis, or the upper or lower part of the head axis."""

    position: int
    part: str = ""  # "", "upper" (h // G), "lower" (h % G)
    groups: int = 1


def _fit(
    node: fx.Node, index: Index, wanted: Wanted, tensors: SymbolicTensors
) -> tuple[Operand, int] | None:
    """Steps from ``node`` read at ``index`` to the wanted axes; None if it is not made of them."""
    shape = tensors.shape(node)
    steps: list[Step] = []
    atoms: list[_Atom] = []
    for n in reversed(range(len(shape))):
        found = _atoms(index[n], shape[n], wanted)
        if found is None:
            return None
        parts, inner = found
        if len(parts) == 2:
            steps.append(("unflatten", (n, (-1, inner))))
        elif not parts:
            steps.append(("squeeze", (n,)))
        atoms = parts + atoms
    return _arrange(node, steps, atoms, wanted)


def _atoms(expr: sympy.Expr, size: sympy.Expr, wanted: Wanted) -> tuple[list[_Atom], int] | None:
    """The wanted axes that one dimension is made of, and the size of the inner one of two."""
    if size == 1:
        return [], 0
    single = _single(expr, size, wanted)
    if single is not None:
        return [single], 0
    if isinstance(expr, sympy.Add) and len(expr.args) == 2:
        for outer, inner in (expr.args, expr.args[::-1]):
            low = _single(inner, None, wanted)
            if low is None:
                continue
            low_size = _size_of(low, wanted)
            high = _single(outer / low_size, None, wanted) if low_size else None
            if high is None or not isinstance(low_size, sympy.Integer):
                continue
            if sympy.expand(_size_of(high, wanted) * low_size - size) == 0:
                return [high, low], int(low_size)
    return None


def _size_of(atom: _Atom, wanted: Wanted) -> sympy.Expr:
    size = wanted.sizes[atom.position]
    if atom.part == "lower":
        return sympy.Integer(atom.groups)
    return size / atom.groups if atom.part == "upper" else size


def _single(expr: Any, size: sympy.Expr | None, wanted: Wanted) -> _Atom | None:
    for position, symbol in enumerate(wanted.symbols):
        if symbol is None:
            continue
        atom = None
        if expr == symbol:
            atom = _Atom(position)
        elif position == wanted.head and isinstance(expr, FloorDivide | Modulo):
            value, by = expr.args
            if value == symbol and isinstance(by, sympy.Integer):
                atom = _Atom(
                    position, "upper" if isinstance(expr, FloorDivide) else "lower", int(by)
                )
        if atom is not None and (size is None or _size_of(atom, wanted) == size):
            return atom
    return None


def _arrange(
    node: fx.Node, steps: list[Step], atoms: list[_Atom], wanted: Wanted
) -> tuple[Operand, int] | None:
    """Put the atoms into order; add what is missing."""
    groups = 1
    order: list[int] = []
    flatten = None
    inserted: list[int] = []
    for position, symbol in enumerate(wanted.symbols):
        places = [n for n, atom in enumerate(atoms) if atom.position == position]
        if position == wanted.head and len(places) == 2:
            upper = [n for n in places if atoms[n].part == "upper"]
            lower = [n for n in places if atoms[n].part == "lower"]
            same = (
                len(upper) == len(lower) == 1 and atoms[upper[0]].groups == atoms[lower[0]].groups
            )
            if not same:
                return None
            order += [upper[0], lower[0]]
            flatten = position
            continue
        if len(places) > 1:
            return None
        if not places:
            size = wanted.sizes[position]
            alone = position == wanted.head and wanted.shared
            if not (symbol is None or size == 1 or alone or position in wanted.optional):
                return None
            if alone and size != 1:
                groups = int(size)
            inserted.append(position)
            continue
        atom = atoms[places[0]]
        if atom.part == "lower" or (atom.part == "upper" and not wanted.shared):
            return None
        if atom.part == "upper":
            groups = atom.groups
        order.append(places[0])
    if order != list(range(len(order))):
        steps.append(("permute", tuple(order)))
    if flatten is not None:
        before = flatten - sum(p < flatten for p in inserted)
        steps.append(("flatten", (before, before + 1)))
    steps += [("unsqueeze", (position,)) for position in inserted]
    return Operand(node, _shortened(steps)), groups


def _shortened(steps: list[Step]) -> tuple[Step, ...]:
    """A permutation of two dimensions as a transpose; nothing that is undone again."""
    kept: list[Step] = []
    for step in steps:
        if kept and kept[-1][0] == "squeeze" and step == ("unsqueeze", kept[-1][1]):
            kept.pop()
        else:
            kept.append(step)
    for n, (method, order) in enumerate(kept):
        if method != "permute":
            continue
        moved = [i for i, place in enumerate(order) if i != place]
        if len(moved) == 2:
            kept[n] = ("transpose", tuple(moved))
    return tuple(kept)


def inverse_steps(
    element: Element, wanted: Wanted, tensors: SymbolicTensors
) -> tuple[Step, ...] | None:
    """Steps from a tensor over ``wanted`` (all axes present) to the node of ``element``."""
    shape = tensors.shape(element.node)
    atoms: list[_Atom] = []
    dims: list[tuple[int, list[_Atom]]] = []
    for n, (expr, size) in enumerate(zip(map(tidy, element.index), shape, strict=True)):
        found = _atoms(expr, size, wanted)
        if found is None:
            return None
        dims.append((n, found[0]))
        atoms += found[0]
    steps: list[Step] = []
    gone = [p for p, size in enumerate(wanted.sizes) if not any(a.position == p for a in atoms)]
    if any(wanted.sizes[p] != 1 for p in gone):
        return None
    steps += [("squeeze", (p,)) for p in reversed(gone)]
    sources = [p for p in range(len(wanted.symbols)) if p not in gone]
    # Where the head axis is split, its two parts become dimensions of their own.
    split = next((a.groups for a in atoms if a.part), 0)
    names: list[_Atom] = []
    for place, position in enumerate(sources):
        if split and position == wanted.head:
            steps.append(("unflatten", (place, (-1, split))))
            names += [_Atom(position, "upper", split), _Atom(position, "lower", split)]
        else:
            names.append(_Atom(position))
    if sorted(map(str, names)) != sorted(map(str, atoms)):
        return None
    order = [names.index(atom) for atom in atoms]
    if order != list(range(len(order))):
        steps.append(("permute", tuple(order)))
    for n, parts in dims:
        if not parts:
            steps.append(("unsqueeze", (n,)))
        elif len(parts) == 2:
            steps.append(("flatten", (n, n + 1)))
    return _shortened(steps)


def substituted(
    element: Element, mapping: dict[sympy.Symbol, sympy.Expr], tensors: SymbolicTensors
) -> Element:
    """The element with its index written in other symbols."""
    return replace(element, index=tuple(replaced(e, mapping, tensors) for e in element.index))


def replaced(
    expr: sympy.Expr, mapping: dict[sympy.Symbol, sympy.Expr], tensors: SymbolicTensors
) -> sympy.Expr:
    """``expr`` in other symbols; divisions of what was merged come apart again."""
    expr = sympy.sympify(expr)
    if isinstance(expr, sympy.Symbol):
        return mapping.get(expr, expr)
    if not expr.args or not expr.free_symbols & mapping.keys():
        return expr
    args = [replaced(a, mapping, tensors) for a in expr.args]  # type: ignore[arg-type]
    if isinstance(expr, FloorDivide | Modulo):
        return divided(type(expr), args[0], args[1], tensors)
    return tidy(sympy.expand(expr.func(*args)))


def divided(kind: Any, value: sympy.Expr, by: sympy.Expr, tensors: SymbolicTensors) -> sympy.Expr:
    """``value // by`` (kind FloorDivide) or ``value % by`` (Modulo).

    Of ``a * by + b`` that is a and b, where b is an index that is known to stay below ``by``.
    """
    if isinstance(value, sympy.Add) and len(value.args) == 2:
        for outer, inner in (value.args, value.args[::-1]):
            quotient = outer / by
            whole = isinstance(quotient, sympy.Symbol) and quotient.is_integer
            if whole and isinstance(inner, sympy.Symbol) and tensors.within(inner, by):
                return quotient if kind is FloorDivide else inner  # type: ignore[return-value]
    return floor_divide(value, by) if kind is FloorDivide else modulo(value, by)
