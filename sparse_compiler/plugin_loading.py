"""Finds what other packages add through entry points, and says whose fault it is when that fails."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sparse_compiler.errors import PluginFailed

__all__ = ["Source", "blamed", "load_plugins", "source_of"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a plug-in comes from.

    Args:
        kind: what it is, e.g. ``matcher``.
        name: of the entry point or the decorated object.
        package: distribution and version, or the module of a decorated object.
    """

    kind: str
    name: str
    package: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} of {self.package}"


def source_of(kind: str, decorated: Any) -> Source:
    """The source of something that a decorator was applied to."""
    name = getattr(decorated, "__qualname__", None) or type(decorated).__qualname__
    module = getattr(decorated, "__module__", None) or type(decorated).__module__
    return Source(kind, name.replace("<locals>.", ""), f"module {module}")


@contextlib.contextmanager
def blamed(
    source: Source, doing: str, *passing: type[Exception], where: str = ""
) -> Iterator[None]:
    """Any exception but ``passing`` becomes one that names the plug-in.

    Args:
        source: of the code that runs inside.
        doing: what it is asked to do, after "while".
        where: node, layer or argument.
    Raises:
        PluginFailed: with the exception as its cause.
    """
    try:
        yield
    except (PluginFailed, *passing):
        raise
    except Exception as problem:
        raise PluginFailed(
            str(source),
            f"free of errors while {doing}",
            f"{type(problem).__name__}: {problem}",
            where=where,
            fix="Repair the plug-in, or uninstall its package.",
        ) from problem


def load_plugins(group: str, kind: str, register: Callable[[Any, Source], None]) -> None:
    """Load every entry point of ``group`` and hand its object to ``register``, sorted by name.

    One that cannot be loaded, or that ``register`` refuses, is left out with a warning that names it:
    the compiler works without it.
    """
    found = {(entry.name, entry.value): entry for entry in entry_points(group=group)}
    for entry in (found[key] for key in sorted(found)):
        source = Source(kind, entry.name, _package(entry))
        try:
            with blamed(source, "it is loaded"):
                register(entry.load(), source)
        except PluginFailed as problem:
            warnings.warn(f"minference leaves a plug-in out: {problem}", UserWarning, stacklevel=2)
        else:
            logger.debug("%s: %s", source, entry.value)


def _package(entry: EntryPoint) -> str:
    if entry.dist is None:
        return f"module {entry.module}"
    return f"{entry.dist.name} {entry.dist.version}"
