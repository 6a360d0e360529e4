"""What plug-ins know about an architecture: its layers' numbers, and which of them must stay dense.

A hint never makes a site more than the proofs allow. It may keep a layer dense, say which layer a
module path is, and name the pattern of a layer about which the user said nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import fx

from sparse_compiler.errors import PluginFailed
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.passes.layers import module_classes, module_path, outermost_number
from sparse_compiler.patterns import registry
from sparse_compiler.plugin_loading import Source, blamed, load_plugins, source_of

__all__ = ["ENTRY_POINT_GROUP", "Advice", "ArchitectureHint", "advice", "architecture"]

ENTRY_POINT_GROUP = "sparse_compiler.architectures"


class ArchitectureHint:
    """What is known about the attentions of one architecture; a plug-in overrides what it knows.

    Paths are those of the modules that hold an attention, e.g. ``stages.1.blocks.0.attention``, from
    the module that was compiled.
    """

    def applies(self, path: str, classes: tuple[str, ...]) -> bool:
        """Whether the hint is about an attention; the other methods are asked about no other.

        Args:
            path: of its module; "" where the graph does not say.
            classes: qualified names of the classes of the modules around it, outermost first, e.g.
                ``mylib.models.Block``.
        """
        raise NotImplementedError

    def layer(self, path: str) -> int | None:
        """The layer's number in configurations; None for not known. By default the first number."""
        return outermost_number(path)

    def dense(self, path: str) -> bool:
        """Whether the layer must stay dense, whatever the options say."""
        return False

    def pattern(self, path: str) -> HeadPattern | str | None:
        """The pattern of all heads of the layer where the user left the choice to the compiler.

        A name takes the pattern's own numbers; None is no opinion.
        """
        return None


@dataclass(frozen=True)
class Advice:
    """What all hints together say about one attention.

    Args:
        layer: its number, None where unknown or where hints disagree.
        dense: who keeps it dense, "" for nobody.
        pattern: of all heads, None where no hint names one or where hints disagree.
        origin: who names the pattern.
    """

    layer: int | None = None
    dense: str = ""
    pattern: HeadPattern | None = None
    origin: str = ""


Kind = TypeVar("Kind", bound=Callable[[], ArchitectureHint])

_hints: dict[Any, tuple[ArchitectureHint, Source]] = {}
"""Class -> its instance and who gave it."""
_loaded = False


def architecture(kind: Kind) -> Kind:
    """Register a hint; a decorator of a subclass of ``ArchitectureHint`` that takes no arguments.

    Raises:
        PluginFailed: it is no such class.
    """
    _register(kind, source_of("architecture hint", kind))
    return kind


def advice(node: fx.Node) -> Advice:
    """What the hints say about the attention that ``node`` holds.

    Raises:
        PluginFailed: a hint raised, or returned what its method must not.
    """
    global _loaded
    if not _loaded:
        _loaded = True
        load_plugins(ENTRY_POINT_GROUP, "architecture hint", _register)
    path, classes = module_path(node), module_classes(node)
    mine = [
        (hint, source)
        for hint, source in _hints.values()
        if _asked(source, path, bool, hint.applies, path, classes)
    ]
    if not mine:
        return Advice(layer=outermost_number(path))
    layers = {_asked(source, path, (int, type(None)), hint.layer, path) for hint, source in mine}
    keeps = [str(s) for hint, s in mine if _asked(s, path, bool, hint.dense, path)]
    named = {_pattern(hint, source, path): str(source) for hint, source in mine}
    named.pop(None, None)
    pattern, origin = named.popitem() if len(named) == 1 else (None, "")
    return Advice(
        layer=layers.pop() if len(layers) == 1 else None,
        dense=" and ".join(keeps),
        pattern=pattern,
        origin=origin,
    )


def _register(kind: Any, source: Source) -> None:
    if not (isinstance(kind, type) and issubclass(kind, ArchitectureHint)):
        raise PluginFailed(str(source), "a subclass of ArchitectureHint", kind)
    with blamed(source, "it is made"):
        _hints[kind] = (kind(), source)


def _asked(source: Source, path: str, wanted: Any, method: Callable[..., Any], *given: Any) -> Any:
    where = f"module {path!r}"
    name = method.__name__
    with blamed(source, f"{name}() is asked", where=where):
        found = method(*given)
    kinds = wanted if isinstance(wanted, tuple) else (wanted,)
    # A bool is no layer number, though Python counts it as an int.
    fits = isinstance(found, kinds) and (bool in kinds or not isinstance(found, bool))
    if not fits or (isinstance(found, int) and found < 0):
        names: dict[Any, str] = {bool: "True or False", int: "an int >= 0", type(None): "None"}
        texts = [names.get(kind) or str(kind.__name__) for kind in kinds]
        raise PluginFailed(
            f"what {name}() of {source} returns", " or ".join(texts), found, where=where
        )
    return found


def _pattern(hint: ArchitectureHint, source: Source, path: str) -> HeadPattern | None:
    found = _asked(source, path, (HeadPattern, str, type(None)), hint.pattern, path)
    if found is None:
        return None
    name = found if isinstance(found, str) else found.name
    if name not in registry.names():
        raise PluginFailed(
            f"the pattern that {source} names",
            f"one of {', '.join(registry.names())}",
            name,
            where=f"module {path!r}",
        )
    return registry.get(name).default() if isinstance(found, str) else found
