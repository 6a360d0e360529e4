"""Values as trees of elementwise operations over what the reader understands.

The reader answers with one uninterpreted read where an operation has no meaning over the integers,
a logarithm say. Here such operations are kept as functions of their operands' elements, and so are
look-ups in tables, so that what a bias depends on is seen: the distance of key and row alone, for
one. Such a tree can be computed again on a line of distances instead of on all pairs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from sparse_compiler.passes.form import Axes, Element
from sparse_compiler.passes.grid import Emitter, Place, call
from sparse_compiler.passes.operations import IN_PLACE, KEEPING, functional, operation
from sparse_compiler.passes.origins import is_of_module
from sparse_compiler.passes.predicates import rewrite
from sparse_compiler.passes.symbolic_elementwise import ELEMENTWISE
from sparse_compiler.passes.symbolic_reader import maker
from sparse_compiler.passes.symbolic_tensor import (
    Index,
    NotUnderstood,
    SymbolicTensors,
    argument,
    tensor_of,
)
from sparse_compiler.passes.symbolic_values import Choice
from sparse_compiler.passes.symbolic_views import VIEWS

__all__ = ["Tree", "by_distance", "is_computed", "line_of", "symbols_of", "trace"]

# Operations on single elements, besides those that the reader knows.
_MORE = (
    *("log", "log2", "log10", "log1p", "exp", "exp2", "expm1", "sqrt", "rsqrt", "square", "pow"),
    *("__pow__", "__rpow__", "truediv", "true_divide", "divide", "__truediv__", "__rtruediv__"),
    *("reciprocal", "tanh", "sigmoid", "sin", "cos", "relu", "sign", "floor", "ceil", "round"),
    *("trunc", "clamp", "clip", "clamp_min", "clamp_max", "div"),
)
_MADE_FROM_NOTHING = (
    "arange",
    "diff",
    "cumsum",
    "tensor",
    "scalar_tensor",
    "full",
    "zeros",
    "ones",
    "full_like",
)
_PLACED = ("tril", "triu", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones")
_POINTWISE = (frozenset(ELEMENTWISE) | frozenset(_MORE)) - frozenset(_MADE_FROM_NOTHING + _PLACED)


@dataclass(frozen=True)
class Leaf:
    """A value of the reader, stored as `node` stores it."""

    value: Any
    node: fx.Node


@dataclass(frozen=True)
class Apply:
    """The operation of `node` on the elements of its operands."""

    node: fx.Node
    operands: tuple[tuple[fx.Node, Tree], ...]


@dataclass(frozen=True)
class Lookup:
    """``table[places]``, each place an integer tree."""

    table: fx.Node
    places: tuple[Tree, ...]


@dataclass(frozen=True)
class Joined(Apply):
    """Tensors side by side: what they depend on is known, not which of them an element comes from."""


Tree = Leaf | Apply | Lookup


def trace(
    tensors: SymbolicTensors, node: fx.Node, index: Index, moment: fx.Node | None = None
) -> Tree:
    """What element `index` of `node` is made of.

    Args:
        moment: when the value is taken out of memory; None is at any time.
    Raises:
        Mutated: some value is written in place in a way that is not followed.
    """
    value: Any = tensors.evaluate_at(node, index, moment)
    if not _reads(value):
        return Leaf(value, node)
    writer = tensors.writer(node, moment)
    made_by, operator_name = maker(node, writer)
    name = operator_name or ""
    try:
        with tensors.reading(made_by, moment):
            if made_by is node and name in VIEWS:
                source, place = VIEWS[name](tensors, node, index)
                return trace(tensors, source, place, tensors.moment(source, made_by, moment))
            if _is_pointwise(made_by, name):
                return _apply(tensors, node, made_by, index, moment)
    except NotUnderstood:
        pass
    if made_by is node and name in ("cat", "concat", "concatenate"):
        return _joined(tensors, node, index, moment)
    if made_by is node:
        found = _lookup(tensors, node, name, index, moment)
        if found is not None:
            return found
    return Leaf(value, node)


def _reads(value: Any) -> bool:
    if isinstance(value, Choice):
        return bool(value.cond.atoms(AppliedUndef))
    return isinstance(value, sympy.Basic) and bool(value.atoms(AppliedUndef))


def _is_pointwise(node: fx.Node, name: str) -> bool:
    if name in ("min", "max"):  # of two tensors; with one they reduce
        other = argument(node, 1, "other")
        return isinstance(other, fx.Node) and tensor_of(other) is not None
    return name in _POINTWISE


def _operands(node: fx.Node, name: str) -> list[fx.Node]:
    given = node.args[:1] if name in KEEPING else (node.args, node.kwargs)
    found: list[fx.Node] = []
    fx.map_arg(given, found.append)
    return [n for n in dict.fromkeys(found) if tensor_of(n) is not None]


def _apply(
    tensors: SymbolicTensors, node: fx.Node, made_by: fx.Node, index: Index, moment: fx.Node | None
) -> Tree:
    outer, operands = tensors.shape(node), []
    for operand in _operands(made_by, operation(made_by) or ""):
        shape = tensors.shape(operand)
        if len(shape) > len(outer):
            raise NotUnderstood(f"{operand.name} has more dimensions than the result")
        for size, full in zip(reversed(shape), reversed(outer), strict=False):
            if size not in (1, full):
                raise NotUnderstood(f"sizes {size} and {full} of {operand.name} may differ")
        when = tensors.moment(operand, made_by, moment)
        place = index[len(index) - len(shape) :]
        operands.append((operand, trace(tensors, operand, place, when)))
    return Apply(made_by, tuple(operands))


def _joined(
    tensors: SymbolicTensors, node: fx.Node, index: Index, moment: fx.Node | None
) -> Joined:
    parts = [n for n in argument(node, 0, "tensors") if isinstance(n, fx.Node)]
    found = [(n, trace(tensors, n, index, tensors.moment(n, node, moment))) for n in parts]
    # Which part an element comes from depends on its place along the joined dimension.
    dim = argument(node, 1, "dim", 0) % len(index)
    found.append((node, Leaf(sympy.sympify(index[dim]), node)))
    return Joined(node, tuple(found))


def _lookup(
    tensors: SymbolicTensors, node: fx.Node, name: str, index: Index, moment: fx.Node | None
) -> Tree | None:
    """Rows of a table chosen by a tensor: embeddings and ``table[ids]``."""
    if name == "embedding":
        ids, table = argument(node, 0, "input"), argument(node, 1, "weight")
        if argument(node, 3, "max_norm") is not None:
            return None
    elif name in ("getitem", "__getitem__"):
        table, ids = node.args[:2]
        ids = ids[0] if isinstance(ids, tuple) and len(ids) == 1 else ids
    else:
        return None
    if not isinstance(ids, fx.Node) or not isinstance(table, fx.Node):
        return None
    if tensor_of(ids) is None or tensor_of(table) is None:
        return None
    if tensors.dtype(ids) not in (torch.int64, torch.int32) or tensors.mutations.written(table):
        return None
    rank = len(tensors.shape(ids))
    first = trace(tensors, ids, index[:rank], tensors.moment(ids, node, moment))
    rest = (Leaf(i, node) for i in index[rank:])
    return Lookup(table, (first, *rest))


def leaves(tree: Tree) -> Iterator[Leaf]:
    """The leaves of a tree; a look-up's table is one at its places."""
    if isinstance(tree, Leaf):
        yield tree
    elif isinstance(tree, Apply):
        for _, operand in tree.operands:
            yield from leaves(operand)
    else:
        for place in tree.places:
            yield from leaves(place)


def symbols_of(tree: Tree) -> set[Any]:
    """The symbols that a tree's value may depend on."""
    return set().union(*(getattr(leaf.value, "free_symbols", set()) for leaf in leaves(tree)))


def is_computed(tensors: SymbolicTensors, tree: Tree) -> bool:
    """Whether a tree depends on positions and the model's own tensors only, on no input."""
    sources = [node for leaf in leaves(tree) for node in tensors.read_nodes(leaf.value)]
    sources += list(_tables(tree))
    seen: set[fx.Node] = set()
    for node in sources:
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" and tensor_of(node) is not None and not is_of_module(node):
            return False
        sources += node.all_input_nodes
    return True


def _tables(tree: Tree) -> Iterator[fx.Node]:
    if isinstance(tree, Apply):
        for _, operand in tree.operands:
            yield from _tables(operand)
    elif isinstance(tree, Lookup):
        yield tree.table
        for place in tree.places:
            yield from _tables(place)


# -- on a line of distances ----------------------------------------------------------------------

_DISTANCE = sympy.Dummy("distance", integer=True)


def by_distance(axes: Axes, tree: Tree) -> bool:
    """Whether a tree depends on row and key by ``k - q`` alone, and on no batch entry."""
    if _has_joined(tree):
        return False
    free = set()
    for leaf in leaves(tree):
        free |= getattr(_at_distance(axes, leaf.value), "free_symbols", set())
    return not free & {axes.query, axes.key, axes.batch}


def _has_joined(tree: Tree) -> bool:
    if isinstance(tree, Joined):
        return True
    if isinstance(tree, Apply):
        return any(_has_joined(operand) for _, operand in tree.operands)
    return isinstance(tree, Lookup) and any(map(_has_joined, tree.places))


def _at_distance(axes: Axes, value: Any) -> Any:
    """`value` with the key written as row + distance and relations brought to one side."""
    if isinstance(value, Choice):
        return Choice(_at_distance(axes, value.cond), value.yes, value.no, value.exact)
    if not isinstance(value, sympy.Basic):
        return value
    moved = rewrite(value, {axes.key: axes.query + _DISTANCE}.get)

    def aside(part: Any) -> Any:
        if isinstance(part, sympy.core.relational.Relational):
            sides = [rewrite(side, aside) for side in part.args]
            return type(part)(sympy.expand(sides[0] - sides[1]), 0, evaluate=False)
        return None

    moved = rewrite(moved, aside)
    return sympy.expand(moved) if isinstance(moved, sympy.Expr) else moved


def line_of(place: Place, element: Element) -> fx.Node:
    """A table [Hq|1, Lq + Lk - 1] of an element that depends on ``k - q``: ``table[h, k - q + Lq
    - 1]`` is its value at (h, q, k).
    """
    tensors, axes, size_of = place.tensors, place.axes, place.size_of
    tree = trace(tensors, element.node, element.index)
    num_q, num_k = axes.sizes[2:4]
    x = tensors.new_index("x", num_q + num_k - 1)
    value = tensor_of(element.node)
    assert value is not None
    line = ((axes.head, axes.sizes[1]), (x, num_q + num_k - 1))
    emitter = Emitter(place.graph, tensors, line, size_of, value.device)
    found = _Line(emitter, axes, x - num_q + 1).node(tree)
    size = tensor_of(found)
    assert size is not None
    if isinstance(size.shape[1], int) and size.shape[1] == 1:
        found = call(place.graph, "expand", found, -1, size_of(num_q + num_k - 1))
    return found


class _Line:
    """Computes a tree over (head, distance)."""

    def __init__(self, emitter: Emitter, axes: Axes, distance: sympy.Expr) -> None:
        self.emitter, self.axes, self.distance = emitter, axes, distance

    def node(self, tree: Tree) -> fx.Node:
        """The tree's values, in the dtype that the graph gives them."""
        if isinstance(tree, Leaf):
            return self._as(self._leaf(tree.value), self.emitter.tensors.dtype(tree.node))
        if isinstance(tree, Lookup):
            return self._looked_up(tree)
        return self._applied(tree)

    def _leaf(self, value: Any) -> fx.Node:
        if isinstance(value, float):
            kind = {"dtype": torch.float64, "device": self.emitter.device}
            return call(self.emitter.graph, torch.full, (1, 1), value, **kind)
        moved = _at_distance(self.axes, value)
        if isinstance(moved, Choice):
            cond = self._leaf(moved.cond)
            numbers = [self._leaf(float(number)) for number in (moved.yes, moved.no)]
            return call(self.emitter.graph, torch.where, cond, *numbers)
        moved = rewrite(moved, {_DISTANCE: self.distance}.get)
        return self.emitter.tensor(self.emitter.value(moved))

    def _looked_up(self, tree: Lookup) -> fx.Node:
        first, *rest = tree.places
        places = [self.node(first)]
        for leaf in rest:
            assert isinstance(leaf, Leaf)
            places.append(self._leaf(leaf.value))
        return call(self.emitter.graph, operator.getitem, tree.table, tuple(places))

    def _applied(self, tree: Apply) -> fx.Node:
        graph, node = self.emitter.graph, tree.node
        known = {operand: self.node(value) for operand, value in tree.operands}
        dtype = self.emitter.tensors.dtype(node)
        name = operation(node) or ""
        if name in KEEPING:
            return self._as(known[tree.operands[0][0]], dtype)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known.get(n, n))
        target: Any = node.target
        plain = functional(node)
        if name in IN_PLACE:
            target = getattr(operator, IN_PLACE[name])
        elif plain is not None:
            target = plain  # a method
        return self._as(call(graph, target, *args, **kwargs), dtype)

    def _as(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        value = tensor_of(node)
        if value is not None and value.dtype == dtype:
            return node
        return call(self.emitter.graph, "to", node, dtype)
