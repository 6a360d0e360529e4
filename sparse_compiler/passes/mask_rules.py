"""Operations that plug-ins teach the symbolic reader: a project's own ways to make a mask.

A rule belongs to one operator or function and gives an element of its result as a function of the
element's position. It is the plug-in's word, where a built-in operation was tested against PyTorch's,
so it cannot replace one of those: the registration is refused.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch import fx

from sparse_compiler.errors import PluginFailed
from sparse_compiler.ir.site import example_of
from sparse_compiler.passes.operations import operation_of, overloads_of
from sparse_compiler.passes.symbolic_values import Choice, NotUnderstood, Value, round_value
from sparse_compiler.plugin_loading import Source, blamed, load_plugins, source_of

if TYPE_CHECKING:
    from sparse_compiler.passes.symbolic_reader import Index, SymbolicReader

__all__ = ["ENTRY_POINT_GROUP", "MaskRule", "mask_rule", "rule_for"]

ENTRY_POINT_GROUP = "sparse_compiler.mask_rules"

MaskRule = Callable[["SymbolicReader", fx.Node, "Index"], Value]


@dataclass(frozen=True)
class _Rule:
    """One registered rule and who gave it; called like a built-in one."""

    function: MaskRule
    source: Source

    def __call__(self, reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
        """The element, as the result's dtype stores it.

        Raises:
            NotUnderstood, Mutated: the rule's own; the node stays unread.
            PluginFailed: it raised anything else, or returned what is no value of an element.
        """
        from sparse_compiler.passes.symbolic_reader import Mutated

        where = f"node {node.name}, {node.target}"
        with blamed(self.source, "it reads a mask", NotUnderstood, Mutated, where=where):
            value = self.function(reader, node, index)
            if isinstance(value, bool):
                value = sympy.true if value else sympy.false
            elif isinstance(value, int):
                value = sympy.Integer(value)
            if not isinstance(value, sympy.Expr | Boolean | Choice | float):
                raise PluginFailed(
                    f"what {self.source} returns",
                    "a sympy expression or predicate, a Choice or a number",
                    value,
                    where=where,
                )
            _check_known(value, self.source, reader, node, index)
            return round_value(value, reader.dtype(node))


_rules: dict[Any, _Rule] = {}
"""Operator overload or function -> its rule."""
_loaded = False


def mask_rule(*targets: Any) -> Callable[[MaskRule], MaskRule]:
    """Decorator: the function reads calls of ``targets``.

    Args:
        targets: operator overloads (``torch.ops.mylib.block_mask.default``), operators (all of their
            overloads), results of ``torch.library.custom_op``, or functions that stand in graphs as
            they are (``torch.compiler.allow_in_graph``). None of them may write to its arguments: of
            operators the schema is checked, of functions the plug-in promises it.
    Raises:
        PluginFailed: a target that cannot stand in a graph or writes to its arguments, one that the
            reader knows itself, or one that has a rule already.
    """

    def register(function: MaskRule) -> MaskRule:
        source = source_of("mask rule", function)
        keys = [key for target in targets for key in _keys(target, source)]
        if not keys:
            raise PluginFailed(str(source), "about at least one operator or function", targets)
        for key in keys:
            _check_free(key, function, source)
        for key in keys:
            _rules[key] = _Rule(function, source)
        return function

    return register


def rule_for(node: fx.Node) -> _Rule | None:
    """The rule that reads a node's result, or None."""
    global _loaded
    if not _loaded:
        _loaded = True
        load_plugins(ENTRY_POINT_GROUP, "mask rule", _adopt)
    if node.op != "call_function" or not _rules:
        return None
    found = {_rules.get(target) for target in overloads_of(node.target)}
    return found.pop() if len(found) == 1 else None


def _adopt(loaded: Any, source: Source) -> None:
    """Name the rules of an entry point, a decorated function or a module of them, by their package."""
    if isinstance(loaded, types.ModuleType):
        keys = [k for k, r in _rules.items() if r.function.__module__ == loaded.__name__]
    else:
        keys = [k for k, r in _rules.items() if r.function is loaded]
    if not keys:
        raise PluginFailed(str(source), "a function decorated with mask_rule, or a module", loaded)
    for key in keys:
        _rules[key] = _Rule(_rules[key].function, source)


def _keys(target: Any, source: Source) -> list[Any]:
    keys = overloads_of(target)
    for key in keys:
        kinds = torch._ops.OpOverload | types.FunctionType | types.BuiltinFunctionType
        if not isinstance(key, kinds):
            raise PluginFailed(
                str(source), "about operators or functions that stand in graphs", key
            )
    return keys


def _check_free(target: Any, function: MaskRule, source: Source) -> None:
    from sparse_compiler.passes.symbolic_elementwise import ELEMENTWISE
    from sparse_compiler.passes.symbolic_views import VIEWS

    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        raise PluginFailed(
            str(source), "about operators that write to no argument", str(target._schema)
        )
    name = operation_of(target)
    if name in ELEMENTWISE or name in VIEWS:
        raise PluginFailed(
            str(source),
            "about an operation that the reader does not know",
            str(target),
            fix="Built-in operations cannot be replaced; write a matcher, or report what is wrong.",
        )
    known = _rules.get(target)
    if known is not None and _qualified(known.function) != _qualified(function):
        raise PluginFailed(
            str(source), "about an operation without a rule", f"{target}: {known.source}"
        )


def _qualified(function: Any) -> tuple[str, str]:
    """The same for a module that is loaded again, as notebooks do."""
    return function.__module__, function.__qualname__


def _check_known(
    value: Any, source: Source, reader: SymbolicReader, node: fx.Node, index: Index
) -> None:
    """A value may only depend on its position, on sizes, and on elements that the reader gave."""
    if isinstance(value, float):
        return
    known = set(reader.size_bounds)
    known |= set().union(*(sympy.sympify(i).free_symbols for i in index))
    for part in (node, *node.all_input_nodes):
        example = example_of(part)
        sizes = example.shape if isinstance(example, torch.Tensor) else (example,)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                known |= size.node.expr.free_symbols
    strange = value.free_symbols - known
    reads = (atom.func for atom in value.atoms(AppliedUndef))
    strange |= {f for f in reads if f not in reader.reads and f not in reader.segments}
    if strange:
        raise PluginFailed(
            f"what {source} returns",
            "made of the index, of sizes, and of what reader.evaluate gives",
            sorted(map(str, strange)),
            where=f"node {node.name}, {node.target}",
        )
