"""Attentions that stand in the graph as one call that nobody looks into, and why.

The passes that open such calls leave their reason on those that they cannot; the matcher here turns
it into a site of the report.
"""

from __future__ import annotations

import operator

from torch import fx

from sparse_compiler.ir.report import Code
from sparse_compiler.passes.axes import unread_form
from sparse_compiler.passes.form import AttentionForm
from sparse_compiler.passes.symbolic_reader import tensor_of
from sparse_compiler.passes.symbolic_tensor import SymbolicTensors

__all__ = ["REASON", "first_output", "is_item", "keep_closed", "match_opaque"]

REASON = "sparse_compiler_opaque"
"""Key of ``node.meta`` for (code, reason)."""


def keep_closed(node: fx.Node, code: Code, reason: str) -> None:
    """Note why ``node`` was not opened."""
    node.meta[REASON] = (code, reason)


def first_output(node: fx.Node) -> fx.Node | None:
    """The node that holds the call's first result, which is the attention's; None if it is unread."""
    if tensor_of(node) is not None:
        return node
    return next((user for user in node.users if is_item(user, 0)), None)


def is_item(node: fx.Node, position: int) -> bool:
    """Whether ``node`` takes one result out of a call with several."""
    return node.target is operator.getitem and node.args[1:] == (position,)


def match_opaque(node: fx.Node, tensors: SymbolicTensors) -> AttentionForm | None:
    """A form that cannot be rewritten, for a call that was left closed."""
    if REASON not in node.meta:
        return None
    result = first_output(node)
    if result is None or tensor_of(result) is None:
        return None
    return unread_form(result, result, tensors, node.meta[REASON])
