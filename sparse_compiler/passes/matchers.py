"""The spellings of attention that are read, and how plug-ins add theirs.

A matcher looks at one node and answers with the ``AttentionForm`` of an attention whose last, or only,
characteristic operation it is, or None. The first matcher that answers wins; plug-ins are asked before
the built-in ones, so that they may read better what a general matcher declines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.errors import PluginFailed
from sparse_compiler.ir.report import Code
from sparse_compiler.passes.flex import match_flex
from sparse_compiler.passes.form import AttentionForm, Element
from sparse_compiler.passes.opaque import match_opaque
from sparse_compiler.passes.sdpa import match_sdpa
from sparse_compiler.passes.softmax_chain import match_softmax_chain
from sparse_compiler.passes.symbolic_reader import tensor_of
from sparse_compiler.passes.symbolic_tensor import Mutated, NotUnderstood, SymbolicTensors
from sparse_compiler.plugin_loading import Source, blamed, load_plugins, source_of

__all__ = ["ENTRY_POINT_GROUP", "Matcher", "matcher", "matchers"]

ENTRY_POINT_GROUP = "sparse_compiler.matchers"

Matcher = Callable[[fx.Node, SymbolicTensors], AttentionForm | None]

_BUILT_IN: tuple[Matcher, ...] = (match_opaque, match_flex, match_sdpa, match_softmax_chain)
_added: dict[Matcher, Matcher] = {}
"""What plug-ins registered -> the same, checked."""
_loaded = False


def matcher(function: Matcher) -> Matcher:
    """Register a matcher; usable as a decorator.

    Raises:
        PluginFailed: it cannot be called.
    """
    _register(function, source_of("matcher", function))
    return function


def matchers() -> tuple[Matcher, ...]:
    """All matchers in the order in which they are asked; those of plug-ins are checked."""
    global _loaded
    if not _loaded:
        _loaded = True
        load_plugins(ENTRY_POINT_GROUP, "matcher", _register)
    return (*_added.values(), *_BUILT_IN)


def _register(function: Any, source: Source) -> None:
    if not callable(function):
        raise PluginFailed(str(source), "a function of a node and a reader", function)
    # Decorated and named by an entry point as well: one matcher, called as its package is.
    known: Any = function
    _added[known] = partial(_ask, known, source)


def _ask(
    function: Matcher, source: Source, node: fx.Node, tensors: SymbolicTensors
) -> AttentionForm | None:
    """What the plug-in answers; None where it does not understand what it sees.

    Raises:
        PluginFailed: it raised, or what it returned is no form.
    """
    try:
        with blamed(source, "it reads a graph", NotUnderstood, Mutated, where=f"node {node.name}"):
            form = function(node, tensors)
            if form is not None:
                _check(form, source, node)
    except (NotUnderstood, Mutated):
        return None
    return form


def _check(form: Any, source: Source, node: fx.Node) -> None:
    """Refuse a form whose parts do not fit together; what it means is the plug-in's word."""
    where = f"returned by {source} for node {node.name}"
    if not isinstance(form, AttentionForm):
        raise PluginFailed("an attention", "an AttentionForm or None", form, where=where)
    for name, element, letters in _elements(form, where):
        if not isinstance(element, Element) or element.node.graph is not node.graph:
            raise PluginFailed(name, "an Element of a node of the graph", element, where=where)
        if form.obstacle[0]:
            continue
        value = tensor_of(element.node)
        if value is None or value.dim() != len(element.index):
            raise PluginFailed(
                f"the index of {name}",
                f"one expression for each dimension of tensor {element.node.name}",
                element.index,
                where=where,
            )
        allowed = {s for s, n in zip(_symbols(form), "bhqkdv", strict=True) if n in letters}
        extra = set().union(*(sympy.sympify(i).free_symbols for i in element.index)) - allowed
        if any(isinstance(symbol, sympy.Dummy) for symbol in extra):
            raise PluginFailed(
                f"the index of {name}", f"over the axes {letters} only", element.index, where=where
            )
    code = form.obstacle[0]
    if code and code not in list(Code):
        raise PluginFailed("the code of an obstacle", "one of Code", code, where=where)


def _symbols(form: AttentionForm) -> tuple[sympy.Symbol, ...]:
    axes = form.axes
    return (axes.batch, axes.head, axes.query, axes.key, axes.dim, axes.value_dim)


def _elements(form: AttentionForm, where: str) -> Iterator[tuple[str, Any, str]]:
    """(name, element, letters of the axes that its index may use) of each part."""
    operands = ((form.query, "bhqd"), (form.key, "bhkd"), (form.value, "bhkv"))
    for (element, letters), name in zip(operands, ("query", "key", "value"), strict=True):
        yield name, element, letters
    yield "output", form.output, "bhqv"
    if form.sinks is not None:
        yield "sinks", form.sinks, "h"
    for element, _ in form.factors:
        yield "a factor", element, "bhq"
    for term in form.terms:
        value = tensor_of(term.where.node)
        bool_wanted = term.kind != "add"
        if value is not None and (value.dtype == torch.bool) != bool_wanted:
            wanted = "a bool tensor" if bool_wanted else "a tensor of numbers"
            raise PluginFailed(f"a term that is to {term.kind}", wanted, value.dtype, where=where)
        yield "a term", term.where, "bhqk"
