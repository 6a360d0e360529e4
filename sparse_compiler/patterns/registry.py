"""The patterns that exist: the built-in ones, and those that plug-ins add."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeVar

from sparse_compiler.errors import PatternInvalid, PluginFailed
from sparse_compiler.patterns.a_shape import AShape
from sparse_compiler.patterns.adaptive import Adaptive
from sparse_compiler.patterns.antidiagonal import Antidiagonal
from sparse_compiler.patterns.base import WHOLE_BLOCKS, Pattern
from sparse_compiler.patterns.block_sparse import BlockSparse
from sparse_compiler.patterns.dense import Dense
from sparse_compiler.patterns.key_groups import KeyGroups
from sparse_compiler.patterns.key_means import KeyMeans
from sparse_compiler.patterns.low_rank import LowRank
from sparse_compiler.patterns.low_rank_recall import LowRankRecall
from sparse_compiler.patterns.switching import Switching, SwitchingRecall
from sparse_compiler.patterns.tri_shape import TriShape
from sparse_compiler.patterns.vertical_slash import VerticalSlash
from sparse_compiler.plugin_loading import Source, blamed, load_plugins, source_of

__all__ = [
    "ENTRY_POINT_GROUP",
    "by_config_name",
    "by_number",
    "get",
    "names",
    "pattern",
    "recall_names",
    "register",
    "source",
    "summary_group",
]

ENTRY_POINT_GROUP = "sparse_compiler.patterns"

Kind = TypeVar("Kind", bound=type[Pattern])

_PATTERNS: dict[str, Pattern] = {}
_SOURCES: dict[str, Source] = {}
"""Who gave a pattern; built-in ones have no entry."""
_loaded_plugins = False


def register(pattern: Pattern) -> Pattern:
    """Add a pattern; its name and number must be new.

    Raises:
        PatternInvalid: the name or the number is taken by another class.
    """
    if hasattr(pattern, "reads_summary"):
        raise PatternInvalid(
            f"attribute 'reads_summary' of pattern {pattern.name!r}",
            "summary_keys, the number of keys that share a mean",
            pattern.reads_summary,  # type: ignore[attr-defined]
            fix="Say summary_keys = WHOLE_BLOCKS, of patterns.base, for a mean of each key block.",
        )
    for other in _PATTERNS.values():
        same_class = _qualified(other) == _qualified(pattern)
        if not same_class and (other.name == pattern.name or other.number == pattern.number):
            raise PatternInvalid(
                f"pattern {pattern.name!r} (number {pattern.number})",
                "new in both name and number",
                f"{other.name!r} (number {other.number})",
                fix="Choose another name and number.",
            )
    _PATTERNS[pattern.name] = pattern
    return pattern


def _qualified(pattern: Pattern) -> tuple[str, str]:
    """The same for a module that is loaded again, as notebooks do."""
    return type(pattern).__module__, type(pattern).__qualname__


for _pattern in (
    Dense(),
    AShape(),
    VerticalSlash(),
    BlockSparse(),
    KeyGroups(),
    LowRank(),
    TriShape(),
    Adaptive(),
    KeyMeans(),
    Antidiagonal(),
    Switching(),
    LowRankRecall(),
    SwitchingRecall(),
):
    register(_pattern)


def pattern(kind: Kind) -> Kind:
    """Register a pattern; a decorator of a subclass of ``Pattern`` that takes no arguments.

    Raises:
        PluginFailed: it is no such class, or its name or number is taken.
    """
    _register(kind, source_of("pattern", kind))
    return kind


def source(pattern: Pattern) -> Source | None:
    """Who gave a pattern; None for a built-in one."""
    return _SOURCES.get(pattern.name)


def _register(kind: Any, source: Source) -> None:
    if not (isinstance(kind, type) and issubclass(kind, Pattern)):
        raise PluginFailed(str(source), "a subclass of Pattern", kind)
    with blamed(source, "it is made"):
        made: Any = kind()
        for name, wanted in (("name", str), ("number", int)):
            if not isinstance(getattr(made, name, None), wanted):
                raise PluginFailed(
                    f"the {name} of {source}", wanted.__name__, getattr(made, name, None)
                )
        if made.component not in ("band", "blocks"):
            raise PluginFailed(f"the component of {source}", "band or blocks", made.component)
        register(made)
    _SOURCES[made.name] = source


def _load_plugins() -> None:
    global _loaded_plugins
    if not _loaded_plugins:
        _loaded_plugins = True
        load_plugins(ENTRY_POINT_GROUP, "pattern", _register)


def names() -> tuple[str, ...]:
    """Names of all patterns, built-in ones first."""
    _load_plugins()
    return tuple(_PATTERNS)


def recall_names() -> tuple[str, ...]:
    """Names of the patterns that can keep a share of the mass (``Pattern.from_recall``)."""
    _load_plugins()
    return tuple(name for name, made in _PATTERNS.items() if _knows_recall(made))


def _knows_recall(pattern: Pattern) -> bool:
    found = source(pattern)
    if found is None:
        return pattern.from_recall(0.5) is not None
    with blamed(found, "it is asked for a recall"):
        return pattern.from_recall(0.5) is not None


def get(name: str) -> Pattern:
    """The pattern of that name.

    Raises:
        PatternInvalid: there is none.
    """
    _load_plugins()
    if name not in _PATTERNS:
        raise PatternInvalid("pattern", f"one of {', '.join(_PATTERNS)}", name)
    return _PATTERNS[name]


def by_number(number: int) -> Pattern:
    """The pattern with that id in a parameter tensor."""
    _load_plugins()
    for pattern in _PATTERNS.values():
        if pattern.number == number:
            return pattern
    raise PatternInvalid(
        "pattern number", f"one of {[p.number for p in _PATTERNS.values()]}", number
    )


def by_config_name(name: str) -> Pattern | None:
    """The pattern that the published configuration format calls ``name``."""
    _load_plugins()
    return next((p for p in _PATTERNS.values() if p.config_name == name), None)


def summary_group(patterns: Iterable[Pattern], block_k: int) -> int:
    """Keys that share a mean in the one summary which these patterns read; 0 if none reads it.

    The smallest wish holds: larger groups' means follow from it (``summaries.means_of``).
    """
    wanted = [p.summary_keys for p in patterns if p.summary_keys]
    return min(
        (block_k if keys == WHOLE_BLOCKS else math.gcd(keys, block_k) for keys in wanted),
        default=0,
    )
