"""Which layer an attention belongs to, as far as the module path says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from torch import fx

__all__ = ["layer_numbers", "module_classes", "module_path", "outermost_number"]


def module_path(node: fx.Node) -> str:
    """Path of the module whose call traced ``node``; "" where the graph does not say."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\['(\w+)'\]\.?", "", path)
    return re.sub(r"_modules\['([^']+)'\]", r"\1", path)


def module_classes(node: fx.Node) -> tuple[str, ...]:
    """Qualified names of the classes of the modules around ``node``, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    # An exported program keeps names where a traced one keeps classes.
    kinds = (entry[1] for entry in stack.values())
    return tuple(k if isinstance(k, str) else f"{k.__module__}.{k.__qualname__}" for k in kinds)


def outermost_number(path: str) -> int | None:
    """The first part of a module path that is a number."""
    numbers = [part for part in path.split(".") if part.isdecimal()]
    return int(numbers[0]) if numbers else None


def layer_numbers(
    nodes: Sequence[fx.Node], number_of: Callable[[fx.Node], int | None] | None = None
) -> dict[fx.Node, int | None]:
    """The layer of each attention of one graph; None where it is unknown or not unique.

    Unless ``number_of`` says so, the layer is the outermost number in the module path, e.g. 3 in ``model.layers.3.self_attn`` and in
    ``decoder.block.3.layer.0.SelfAttention``. It is unknown where there is no number (one layer was
    compiled alone: its graph may serve all of them), where one module runs several times (layers
    that share weights), and where attentions of one kind differ in an inner number only (stages of
    blocks: numbers that no configuration counts so).
    """
    paths = {node: module_path(node) for node in nodes}
    calls = Counter(paths.values())
    given = {
        n: outermost_number(p) if number_of is None else number_of(n) for n, p in paths.items()
    }
    kinds: dict[tuple[int, str], set[str]] = {}
    for node, path in paths.items():
        number = given[node]
        if number is not None:
            kinds.setdefault((number, _without_numbers(path)), set()).add(path)
    found: dict[fx.Node, int | None] = {}
    for node, path in paths.items():
        number = given[node]
        unique = (
            number is not None
            and calls[path] == 1
            and len(kinds[number, _without_numbers(path)]) == 1
        )
        found[node] = number if unique else None
    return found


def _without_numbers(path: str) -> str:
    return ".".join(part for part in path.split(".") if not part.isdecimal())
