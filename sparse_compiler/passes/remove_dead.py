"""Remove what a replaced region leaves behind, and nothing else.

``Graph.eliminate_dead_code`` is not used: it takes in-place cache updates and collectives whose
result nobody reads for dead code.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import fx

from sparse_compiler.passes.mutation import storage_of, written_by
from sparse_compiler.passes.purity import is_collective, is_mutating, is_pure

__all__ = ["remove_dead"]


def remove_dead(
    graph: fx.Graph, nodes: Iterable[fx.Node], owned: Collection[fx.Node] = ()
) -> tuple[int, tuple[str, ...]]:
    """Erase those of ``nodes`` that are pure and have no users, then their producers likewise.

    Args:
        nodes: former operands of replaced nodes.
        owned: nodes of replaced regions. Those that write in place go as well, where all that is
            left of the memory they write to is owned and unread.
    Returns:
        How many nodes were erased, and the targets of those that wrote in place.
    """
    work, erased, effects = list(nodes), 0, []
    gone: set[fx.Node] = set()
    while work:
        node = work.pop()
        if node in gone or node.users:
            continue
        if not is_pure(node):
            if node not in owned or is_collective(node) or not is_mutating(node):
                continue
            if not _alone(graph, node, owned):
                continue
            effects.append(str(node.target))
        work.extend(node.all_input_nodes)
        graph.erase_node(node)
        gone.add(node)
        erased += 1
    return erased, tuple(effects)


def _alone(graph: fx.Graph, node: fx.Node, owned: Collection[fx.Node]) -> bool:
    """Whether nobody outside of the region can see what ``node`` writes to."""
    memory = {storage_of(target) for target in written_by(node)}
    return all(n in owned for n in graph.nodes if storage_of(n) in memory)
