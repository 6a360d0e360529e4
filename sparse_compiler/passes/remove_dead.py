"""Remove what a replaced region leaves behind, and nothing else.

``Graph.eliminate_dead_code`` is not used: it takes in-place cache updates and collectives whose
result nobody reads for dead code.
"""

from __future__ import annotations

from torch import fx

from sparse_compiler.passes.purity import is_pure

__all__ = ["remove_dead"]


def remove_dead(graph: fx.Graph, nodes: list[fx.Node]) -> int:
    """Erase those of ``nodes`` that are pure and have no users, then their producers likewise.

    Args:
        nodes: former operands of replaced nodes.
    Returns:
        How many nodes were erased.
    """
    work, erased = list(nodes), 0
    gone: set[fx.Node] = set()
    while work:
        node = work.pop()
        if node in gone or node.users or not is_pure(node):
            continue
        work.extend(node.all_input_nodes)
        graph.erase_node(node)
        gone.add(node)
        erased += 1
    return erased
