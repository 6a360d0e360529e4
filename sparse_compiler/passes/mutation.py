"""Which storages a graph writes to in place, and where.

Tensors that share memory share a storage in the fake tensors that tracing left on the nodes, so
views are followed exactly. A callable whose effects cannot be known is taken to write to all its
tensor arguments. Separate graph inputs are taken not to overlap.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from sparse_compiler.ir.site import example_of
from sparse_compiler.passes.mask_rules import rule_for

__all__ = ["INPLACE_OPERATORS", "MutationMap", "storage_of", "written_by"]

INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in (
        *("setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift", "imatmul", "iconcat"),
    )
)
_DUNDERS_THAT_START_WITH_I = frozenset({"__invert__", "__int__", "__index__", "__init__"})
# Higher-order operators that only read their tensors.
_PURE_HIGHER_ORDER = frozenset({"flex_attention"})
_TRUSTED_MODULES = ("torch", "_operator", "operator", "builtins", "math", "einops")


class MutationMap:
    """Where the storages of a graph's tensors are written.

    Args:
        graph: a graph with `meta["example_value"]` on its tensor nodes; read once, here.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._position = {node: n for n, node in enumerate(graph.nodes)}
        self._nodes = list(self._position)
        self._writes: dict[object, list[int]] = {}
        for node, position in self._position.items():
            for target in written_by(node):
                self._writes.setdefault(storage_of(target), []).append(position)

    def written(self, node: fx.Node) -> bool:
        """Whether the memory of `node` is written anywhere in the graph."""
        return storage_of(node) in self._writes

    def last_write(self, node: fx.Node, moment: fx.Node) -> fx.Node | None:
        """The last node before `moment` that writes to the memory of `node`."""
        until = self._position[moment]
        earlier = [p for p in self._writes.get(storage_of(node), ()) if p < until]
        return self._nodes[max(earlier)] if earlier else None

    def writes(self, node: fx.Node) -> bool:
        """Whether `node` itself writes to its first argument."""
        position = self._position[node]
        first = node.args[0] if node.args else None
        return isinstance(first, fx.Node) and position in self._writes.get(storage_of(first), ())

    def same_memory(self, left: fx.Node, right: fx.Node) -> bool:
        """Whether two nodes share a storage."""
        return storage_of(left) == storage_of(right)

    def written_after(self, node: fx.Node, moment: fx.Node | None = None) -> bool:
        """Whether the memory of `node` is written later than `moment` (`node` itself if None)."""
        mine = self._position[moment or node]
        return any(p > mine for p in self._writes.get(storage_of(node), ()))

    def written_between(self, node: fx.Node, start: fx.Node, stop: fx.Node) -> bool:
        """Whether the memory of `node` is written after `start` and before `stop`."""
        first, last = self._position[start], self._position[stop]
        return any(first < p < last for p in self._writes.get(storage_of(node), ()))


def storage_of(node: fx.Node) -> object:
    """A key that nodes share whose tensors lie in one memory."""
    value = example_of(node)
    if isinstance(value, torch.Tensor):
        try:
            return value.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # subclasses without one storage
            return node
    return node


def written_by(node: fx.Node) -> Iterable[fx.Node]:
    """The arguments of ``node`` whose memory it writes to, or may write to."""
    if node.op == "call_method":
        return _written_by_method(node)
    if node.op == "call_module":
        return _nodes((node.args, node.kwargs))
    if node.op != "call_function":
        return ()
    return _written_by_function(node, node.target)


def _written_by_method(node: fx.Node) -> Iterable[fx.Node]:
    name = str(node.target)
    dunder = name.startswith("__")
    inplace = name.endswith("_") and not dunder
    inplace |= name in ("__setitem__", "__delitem__")
    inplace |= name.startswith("__i") and name not in _DUNDERS_THAT_START_WITH_I
    return _nodes(node.args[:1]) if inplace else _nodes(node.kwargs.get("out"))


def _written_by_function(node: fx.Node, target: Any) -> Iterable[fx.Node]:
    if isinstance(target, torch._ops.OpOverload):
        return _written_by_schemas(node, [target._schema])
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
        return _written_by_schemas(node, [o._schema for o in overloads])
    if isinstance(target, torch._ops.HigherOrderOperator):
        pure = target.name() in _PURE_HIGHER_ORDER
        return () if pure else _nodes((node.args, node.kwargs))
    if target in INPLACE_OPERATORS:
        return _nodes(node.args[:1])
    module = getattr(target, "__module__", None) or ""
    trusted = module.split(".")[0] in _TRUSTED_MODULES
    if not trusted:
        # Who gives a function a mask rule promises that it only reads.
        return () if rule_for(node) is not None else _nodes((node.args, node.kwargs))
    name = getattr(target, "__name__", "")
    inplace = name.endswith("_") and module.split(".")[0] not in ("_operator", "operator")
    if inplace or _asks_inplace(node, target):
        return _nodes(node.args[:1] or (node.kwargs,))
    return _nodes(node.kwargs.get("out"))


def _asks_inplace(node: fx.Node, target: Any) -> bool:
    """`torch.nn.functional` style ``inplace=True``, by keyword or position."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    code = getattr(target, "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code is not None else ()
    if "inplace" not in names:
        return False
    position = names.index("inplace")
    return len(node.args) > position and node.args[position] is not False


def _written_by_schemas(node: fx.Node, schemas: list[Any]) -> Iterable[fx.Node]:
    found: list[fx.Node] = []
    for schema in schemas:
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            if position < len(node.args):
                found += _nodes(node.args[position])
            found += _nodes(node.kwargs.get(argument.name))
    return found


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, lambda n: found.append(n))
    return found
