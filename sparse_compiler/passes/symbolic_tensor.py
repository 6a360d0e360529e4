"""The symbolic reader with all that it knows: views, elementwise operations, factories."""

from __future__ import annotations

from torch import fx

from sparse_compiler.passes.symbolic_elementwise import ELEMENTWISE
from sparse_compiler.passes.symbolic_reader import (
    Evaluate,
    Index,
    Mutated,
    SymbolicReader,
    argument,
    functional,
    operation,
    tensor_of,
)
from sparse_compiler.passes.symbolic_values import NotUnderstood
from sparse_compiler.passes.symbolic_views import VIEWS, View

__all__ = [
    "Index",
    "Mutated",
    "NotUnderstood",
    "SymbolicTensors",
    "argument",
    "functional",
    "operation",
    "tensor_of",
]


def _through(view: View) -> Evaluate:
    """An element of a view is the element of its source at the rewritten index."""

    def evaluate(reader: SymbolicReader, node: fx.Node, index: Index):
        source, place = view(reader, node, index)
        return reader.evaluate(source, place)

    return evaluate


HANDLERS: dict[str, Evaluate] = {
    **ELEMENTWISE,
    **{name: _through(view) for name, view in VIEWS.items()},
}


class SymbolicTensors(SymbolicReader):
    """Lazy reader of one graph's tensors as functions of their position.

    Args:
        graph: a graph as Dynamo hands it to a backend, fake values in `meta["example_value"]`.
    """

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph, HANDLERS)
