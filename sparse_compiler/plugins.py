"""Everything that a plug-in imports: the decorators that register one, and the types it is made of.

Loaded on first use, so that importing this module loads neither torch nor the compiler. How to write
each kind is in ``docs/plugins.md``, with installable examples in ``examples/plugins``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_compiler.errors import PluginFailed
    from sparse_compiler.ir.index import Geometry
    from sparse_compiler.ir.pattern import HeadPattern
    from sparse_compiler.ir.report import Code
    from sparse_compiler.passes.architectures import ArchitectureHint, architecture
    from sparse_compiler.passes.axes import fix_sizes, shared_axes, unread_form
    from sparse_compiler.passes.form import AttentionForm, Axes, Element, MaskTerm
    from sparse_compiler.passes.mask_rules import mask_rule
    from sparse_compiler.passes.matchers import matcher
    from sparse_compiler.passes.operations import calls
    from sparse_compiler.passes.products import broadcast
    from sparse_compiler.passes.sdpa import sdpa_form
    from sparse_compiler.passes.symbolic_reader import SymbolicReader, argument, tensor_of
    from sparse_compiler.passes.symbolic_values import (
        Choice,
        NotUnderstood,
        Value,
        as_bool,
        choose,
        compare,
        conj,
        disj,
        floor_divide,
        modulo,
        neg,
    )
    from sparse_compiler.patterns.base import (
        BandChoice,
        BandRule,
        BlockChoice,
        Limits,
        Pattern,
        SelectRequest,
    )
    from sparse_compiler.patterns.registry import pattern
    from sparse_compiler.patterns.relation import request_relation
    from sparse_compiler.runtime.executor import Executor, Problem
    from sparse_compiler.runtime.registry import executor

__all__ = [
    "ArchitectureHint",
    "AttentionForm",
    "Axes",
    "BandChoice",
    "BandRule",
    "BlockChoice",
    "Choice",
    "Code",
    "Element",
    "Executor",
    "Geometry",
    "HeadPattern",
    "Limits",
    "MaskTerm",
    "NotUnderstood",
    "Pattern",
    "PluginFailed",
    "Problem",
    "SelectRequest",
    "SymbolicReader",
    "Value",
    "architecture",
    "argument",
    "as_bool",
    "broadcast",
    "calls",
    "choose",
    "compare",
    "conj",
    "disj",
    "executor",
    "fix_sizes",
    "floor_divide",
    "mask_rule",
    "matcher",
    "modulo",
    "neg",
    "pattern",
    "request_relation",
    "sdpa_form",
    "shared_axes",
    "tensor_of",
    "unread_form",
]

_NAMES: dict[str, tuple[str, ...]] = {
    "errors": ("PluginFailed",),
    "ir.index": ("Geometry",),
    "ir.pattern": ("HeadPattern",),
    "ir.report": ("Code",),
    "passes.architectures": ("ArchitectureHint", "architecture"),
    "passes.axes": ("fix_sizes", "shared_axes", "unread_form"),
    "passes.form": ("AttentionForm", "Axes", "Element", "MaskTerm"),
    "passes.mask_rules": ("mask_rule",),
    "passes.matchers": ("matcher",),
    "passes.operations": ("calls",),
    "passes.products": ("broadcast",),
    "passes.sdpa": ("sdpa_form",),
    "passes.symbolic_reader": ("SymbolicReader", "argument", "tensor_of"),
    "passes.symbolic_values": (
        *("Choice", "NotUnderstood", "Value", "as_bool", "choose", "compare"),
        *("conj", "disj", "floor_divide", "modulo", "neg"),
    ),
    "patterns.base": (
        "BandChoice",
        "BandRule",
        "BlockChoice",
        "Limits",
        "Pattern",
        "SelectRequest",
    ),
    "patterns.registry": ("pattern",),
    "patterns.relation": ("request_relation",),
    "runtime.executor": ("Executor", "Problem"),
    "runtime.registry": ("executor",),
}
_HOMES = {name: f"sparse_compiler.{home}" for home, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
