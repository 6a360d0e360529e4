"""The patterns that exist: the built-in ones, and those that plug-ins add."""

from __future__ import annotations

from importlib.metadata import entry_points

from sparse_compiler.errors import PatternInvalid
from sparse_compiler.patterns.a_shape import AShape
from sparse_compiler.patterns.base import Pattern
from sparse_compiler.patterns.block_sparse import BlockSparse
from sparse_compiler.patterns.dense import Dense
from sparse_compiler.patterns.vertical_slash import VerticalSlash

__all__ = ["ENTRY_POINT_GROUP", "by_config_name", "by_number", "get", "names", "register"]

ENTRY_POINT_GROUP = "sparse_compiler.patterns"

_PATTERNS: dict[str, Pattern] = {}
_loaded_plugins = False


def register(pattern: Pattern) -> Pattern:
    """Add a pattern; its name and number must be new.

    Raises:
        PatternInvalid: the name or the number is taken by another class.
    """
    for other in _PATTERNS.values():
        same_class = type(other) is type(pattern)
        if not same_class and (other.name == pattern.name or other.number == pattern.number):
            raise PatternInvalid(
                f"pattern {pattern.name!r} (number {pattern.number})",
                "new in both name and number",
                f"{other.name!r} (number {other.number})",
                fix="Choose another name and number.",
            )
    _PATTERNS[pattern.name] = pattern
    return pattern


for _pattern in (Dense(), AShape(), VerticalSlash(), BlockSparse()):
    register(_pattern)


def _load_plugins() -> None:
    global _loaded_plugins
    if _loaded_plugins:
        return
    _loaded_plugins = True
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        register(entry.load()())


def names() -> tuple[str, ...]:
    """Names of all patterns, built-in ones first."""
    _load_plugins()
    return tuple(_PATTERNS)


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
