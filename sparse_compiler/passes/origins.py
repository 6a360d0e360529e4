"""Whose a tensor of a graph is: the model's, or a caller's."""

from __future__ import annotations

import torch
from torch import fx

from sparse_compiler.ir.site import tensor_of

__all__ = ["is_of_module", "is_parameter"]


def is_parameter(node: fx.Node) -> bool:
    """Whether ``node`` itself is a parameter or names an attribute of the graph's module.

    Buffers that are inputs are none: a model may write keys and values to them.
    """
    return isinstance(tensor_of(node), torch.nn.Parameter) or node.op == "get_attr"


def is_of_module(node: fx.Node) -> bool:
    """Whether a graph input is a parameter, a buffer or an attribute of a module."""
    if is_parameter(node):
        return True
    source = getattr(node.meta.get("grapharg"), "source", None)
    source = source or getattr(node, "_dynamo_source", None)
    return "NN_MODULE" in getattr(getattr(source, "guard_source", None), "name", "")
