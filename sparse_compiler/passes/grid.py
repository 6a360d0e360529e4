"""Nodes that compute what the reader read: the way back from sympy to the graph.

A value over some axes becomes a tensor with one dimension for each axis, of the axis's size or of
size 1 where the value does not depend on it. Reads of the graph's tensors become views where they
name each element once, else indexing.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from sparse_compiler.ir.site import example_of
from sparse_compiler.passes.form import Axes
from sparse_compiler.passes.symbolic_tensor import NotUnderstood, SymbolicTensors, tensor_of
from sparse_compiler.passes.symbolic_values import Choice, FloorDivide, Modulo

__all__ = ["Axis", "Emitter", "call", "emit", "emit_element", "full"]

Axis = tuple[sympy.Symbol, sympy.Expr]
SizeOf = Callable[[sympy.Expr], Any]
_ZERO = sympy.Integer(0)


def emit(
    graph: fx.Graph,
    tensors: SymbolicTensors,
    value: Any,
    axes: Sequence[Axis],
    size_of: SizeOf,
    device: torch.device | str,
) -> fx.Node:
    """Nodes for `value` at the graph's insertion point.

    Args:
        graph: where to insert; the nodes that `value` reads stand before the insertion point.
        tensors: the reader that made `value`.
        value: predicate (bool result) or integer expression (int64), in the symbols of `axes`.
        axes: (symbol, size) of each dimension of the result.
        size_of: an int or a node holding a SymInt for a size expression.
        device: of the result; reads must be there.
    Returns:
        A tensor node [n0|1, n1|1, ...].
    Raises:
        NotUnderstood: `value` holds something that cannot be computed here.
    """
    emitter = Emitter(graph, tensors, axes, size_of, device)
    return emitter.tensor(emitter.value(value))


@dataclass(frozen=True)
class Place:
    """Where the operands of one attention's mask are computed.

    Args:
        graph: nodes are inserted at its insertion point.
        tensors: the reader of the graph.
        axes: of the attention.
        size_of: an int or a node holding a SymInt for a size expression.
        device: of the operands.
    """

    graph: fx.Graph
    tensors: SymbolicTensors
    axes: Axes
    size_of: SizeOf
    device: torch.device | str

    def emit(self, value: Any, letters: str) -> fx.Node:
        """``value`` over the axes that the letters of ``bhqk`` name, see `emit`."""
        pairs = dict(zip("bhqk", self.axes.pairs, strict=True))
        axes = [pairs[letter] for letter in letters]
        return emit(self.graph, self.tensors, value, axes, self.size_of, self.device)


def emit_element(
    graph: fx.Graph,
    tensors: SymbolicTensors,
    node: fx.Node,
    index: Sequence[sympy.Expr],
    axes: Sequence[Axis],
    size_of: SizeOf,
) -> fx.Node:
    """``node[index]`` over the axes, as `emit`, in the dtype and on the device of `node`."""
    value = tensor_of(node)
    assert value is not None
    return Emitter(graph, tensors, axes, size_of, value.device).element(node, tuple(index))


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call at the insertion point with the fake value of its result on it.

    Args:
        target: a function, or the name of a method.
    """
    if isinstance(target, str):
        node = graph.call_method(target, args, kwargs)
        function: Any = functools.partial(_method, target)
    else:
        node = graph.call_function(target, args, kwargs)
        function = target
    fake_args, fake_kwargs = fx.map_arg((args, kwargs), example_of)
    with _fake_mode(graph):
        node.meta["example_value"] = function(*fake_args, **fake_kwargs)
    return node


def _method(name: str, self: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(self, name)(*args, **kwargs)


def _fake_mode(graph: fx.Graph) -> Any:
    for node in graph.nodes:
        mode = getattr(example_of(node), "fake_mode", None)
        if mode is not None:
            return mode
    return contextlib.nullcontext()


def full(
    graph: fx.Graph, node: fx.Node, axis: Axis, size_of: SizeOf, dim: int | None = None
) -> fx.Node:
    """`node` expanded to the axis's size along the last dimension, or along `dim`."""
    value = node.meta["example_value"]
    at = value.dim() - 1 if dim is None else dim
    if not isinstance(value.shape[at], int) or value.shape[at] != 1 or axis[1] == 1:
        return node
    sizes = [size_of(axis[1]) if n == at else -1 for n in range(value.dim())]
    return call(graph, "expand", node, sizes)


class Emitter:
    """Emits values over one tuple of axes and shares what they have in common.

    Args: those of `emit`.
    """

    def __init__(
        self,
        graph: fx.Graph,
        tensors: SymbolicTensors,
        axes: Sequence[Axis],
        size_of: SizeOf,
        device: torch.device | str,
    ) -> None:
        self.graph, self.tensors, self.axes = graph, tensors, tuple(axes)
        self.size_of, self.device = size_of, device
        self._position = {symbol: n for n, (symbol, _) in enumerate(self.axes)}
        self._memo: dict[Any, Any] = {}

    def tensor(self, value: Any) -> fx.Node:
        """A value as a tensor of the axes' rank; numbers become tensors of size 1."""
        if isinstance(value, fx.Node) and tensor_of(value) is not None:
            return value
        shape = (1,) * len(self.axes)
        if isinstance(value, bool):
            return self._call(torch.full, shape, value, dtype=torch.bool, device=self.device)
        if isinstance(value, int):
            return self._call(torch.full, shape, value, dtype=torch.int64, device=self.device)
        zero = self._call(torch.zeros, shape, dtype=torch.int64, device=self.device)
        return self._call(operator.add, zero, value)

    def value(self, value: Any) -> Any:
        """A tensor node of the axes' rank, a node holding a size, or a number."""
        if isinstance(value, Choice):
            value = sympy.Piecewise((value.yes, value.cond), (value.no, True), evaluate=False)
        known = self._memo.get(value)
        if known is None:
            known = self._memo[value] = self._value(value)
        return known

    def element(self, node: fx.Node, index: Sequence[sympy.Expr]) -> fx.Node:
        """``node[index]`` over the axes: a view where that is one."""
        shape = self.tensors.shape(node)
        place = [_ZERO if n == 1 else i for i, n in zip(index, shape, strict=True)]
        seen = self._view(node, place, shape)
        return self._gather(node, place) if seen is None else seen

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call(self.graph, target, *args, **kwargs)

    # -- expressions -----------------------------------------------------------------------------

    def _value(self, value: Any) -> Any:
        if value in (sympy.true, sympy.false):
            return value is sympy.true
        if isinstance(value, sympy.Integer):
            return int(value)
        if value in self._position:
            return self._arange(value)
        if isinstance(value, AppliedUndef):
            return self._read(value)
        depends = value.atoms(AppliedUndef) or value.free_symbols & self._position.keys()
        if not depends and isinstance(value, sympy.Expr) and not value.has(*_OURS):
            return self.size_of(value)
        handler = _HANDLERS.get(type(value).__name__)
        if handler is None:
            raise NotUnderstood(f"{type(value).__name__} cannot be computed in the graph")
        return handler(self, value)

    def _arange(self, symbol: sympy.Symbol) -> fx.Node:
        at = self._position[symbol]
        size = self.size_of(self.axes[at][1])
        line = self._call(torch.arange, size, device=self.device)
        return self._call("reshape", line, [-1 if n == at else 1 for n in range(len(self.axes))])

    def _fold(self, function: Callable[[Any, Any], Any], value: Any) -> Any:
        parts = [self.value(arg) for arg in value.args]
        return functools.reduce(lambda a, b: self._apply(function, a, b), parts)

    def _apply(self, function: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        if not isinstance(left, fx.Node) and not isinstance(right, fx.Node):
            return function(left, right)
        return self._call(function, left, right)

    def _extreme(self, function: Any, value: Any) -> Any:
        parts = [self.tensor(self.value(arg)) for arg in value.args]
        return functools.reduce(lambda a, b: self._call(function, a, b), parts)

    def _logic(self, function: Any, value: Any) -> fx.Node:
        parts = [self.tensor(self.value(arg)) for arg in value.args]
        return functools.reduce(lambda a, b: self._call(function, a, b), parts)

    def _relation(self, function: Any, value: Any) -> fx.Node:
        left, right = value.args
        if function is operator.ne and right == 0 and isinstance(left, AppliedUndef):
            seen = self.value(left)
            truth = tensor_of(seen)
            if truth is not None and truth.dtype == torch.bool:
                return seen
        first = self._number(self.tensor(self.value(left)))
        second = self.value(right)
        if isinstance(second, fx.Node):
            second = self._number(second)
        return self._call(function, first, second)

    def _number(self, node: fx.Node) -> fx.Node:
        value = tensor_of(node)
        if value is not None and value.dtype == torch.bool:
            return self._call("to", node, torch.int64)
        return node

    def _piecewise(self, value: Any) -> Any:
        *pieces, (last, always) = (piece.args for piece in value.args)
        if always is not sympy.true:
            raise NotUnderstood("a choice that leaves cases out")
        result = self.tensor(self.value(last))
        for chosen, cond in reversed(pieces):
            yes = self.tensor(self.value(chosen))
            result = self._call(torch.where, self.tensor(self.value(cond)), yes, result)
        return result

    def _negated(self, value: Any) -> fx.Node:
        return self._call(torch.logical_not, self.tensor(self.value(value.args[0])))

    def _absolute(self, value: Any) -> fx.Node:
        return self._call(torch.abs, self.tensor(self.value(value.args[0])))

    # -- reads -----------------------------------------------------------------------------------

    def _read(self, value: Any) -> fx.Node:
        segment = self.tensors.segments.get(value.func)
        if segment is not None:
            return self._segment(*segment, value.args)
        node = self.tensors.reads.get(value.func)
        if node is None:
            raise NotUnderstood(f"{value.func} is no read of this graph")
        early = value.func not in self.tensors.late
        return self.element(self._snapshot(node) if early else node, value.args)

    def _segment(self, node: fx.Node, side: str, index: tuple[Any, ...]) -> fx.Node:
        """First or last position along the last dimension with the same id as `index`."""
        symbol = index[-1]
        if symbol not in self._position:
            raise NotUnderstood("a segment at a place that is no axis")
        at = self._position[symbol]
        ids = self.element(node, index)
        ids = self._call("contiguous", self._call("movedim", ids, at, -1))
        found = self._call(torch.searchsorted, ids, ids, right=side == "end")
        if side == "end":
            found = self._call(operator.sub, found, 1)
        return self._call("movedim", found, -1, at)

    def _snapshot(self, node: fx.Node) -> fx.Node:
        """`node` as it was before the graph wrote to its memory; reads are never later."""
        if not self.tensors.mutations.written(node):
            return node
        key = ("snapshot", node)
        if key not in self._memo:
            self._memo[key] = _copy(self.graph, node)
        return self._memo[key]

    def _view(self, node: fx.Node, place: list[Any], shape: Sequence[Any]) -> fx.Node | None:
        """The element by plain indexing, if every dimension is a number or one axis."""
        items: list[Any] = []
        seen: list[int] = []
        for index, size in zip(place, shape, strict=True):
            free = index.free_symbols & self._position.keys()
            if index.atoms(AppliedUndef):
                return None
            if not free:
                items.append(self.size_of(index))
                continue
            (symbol, *more), extent = free, self.axes
            at = self._position[symbol]
            offset, extent = index - symbol, self.axes[at][1]
            if more or offset.free_symbols & self._position.keys() or at in seen:
                return None
            seen.append(at)
            items.append(self._slice(offset, extent, size))
        whole = all(isinstance(i, slice) and i == slice(None) for i in items)
        if items and not whole:
            node = self._call(operator.getitem, node, tuple(items))
        order = sorted(range(len(seen)), key=lambda n: seen[n])
        if order != list(range(len(seen))):
            node = self._call("permute", node, order)
        if len(seen) < len(self.axes):
            new = tuple(slice(None) if n in seen else None for n in range(len(self.axes)))
            node = self._call(operator.getitem, node, new)
        return node

    def _slice(self, offset: Any, extent: Any, size: Any) -> slice:
        if offset == 0 and extent == size:
            return slice(None)
        start = self.size_of(sympy.sympify(offset))
        end = self.size_of(sympy.expand(offset + extent))
        return slice(start, end)

    def _gather(self, node: fx.Node, place: list[Any]) -> fx.Node:
        items = [self.value(index) for index in place]
        # A plain tuple of tensors: numbers would be seen as views by the indexing rules.
        return self._call(operator.getitem, node, tuple(self.tensor(item) for item in items))


def _copy(graph: fx.Graph, node: fx.Node) -> fx.Node:
    after = node
    while after.next.op == "placeholder":
        after = after.next
    with graph.inserting_after(after if node.op == "placeholder" else node):
        return call(graph, "clone", node)


# Size expressions of the graph itself have none of these; they are computed here.
_OURS = (sympy.Min, sympy.Max, sympy.Abs, sympy.Piecewise, FloorDivide, Modulo)
_HANDLERS: dict[str, Callable[[Emitter, Any], Any]] = {
    "Add": lambda e, v: e._fold(operator.add, v),
    "Mul": lambda e, v: e._fold(operator.mul, v),
    "FloorDivide": lambda e, v: e._fold(operator.floordiv, v),
    "FloorDiv": lambda e, v: e._fold(operator.floordiv, v),
    "Modulo": lambda e, v: e._fold(operator.mod, v),
    "Mod": lambda e, v: e._fold(operator.mod, v),
    "PythonMod": lambda e, v: e._fold(operator.mod, v),
    "Min": lambda e, v: e._extreme(torch.minimum, v),
    "Max": lambda e, v: e._extreme(torch.maximum, v),
    "Abs": Emitter._absolute,
    "Piecewise": Emitter._piecewise,
    "And": lambda e, v: e._logic(operator.and_, v),
    "Or": lambda e, v: e._logic(operator.or_, v),
    "Not": Emitter._negated,
    "LessThan": lambda e, v: e._relation(operator.le, v),
    "StrictLessThan": lambda e, v: e._relation(operator.lt, v),
    "GreaterThan": lambda e, v: e._relation(operator.ge, v),
    "StrictGreaterThan": lambda e, v: e._relation(operator.gt, v),
    "Equality": lambda e, v: e._relation(operator.eq, v),
    "Unequality": lambda e, v: e._relation(operator.ne, v),
}
