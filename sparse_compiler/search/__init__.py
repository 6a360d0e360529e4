"""Per-head configurations: reading, writing, and searching them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_compiler.search.offline import search
    from sparse_compiler.search.result import HeadChoice, SearchResult

__all__ = ["HeadChoice", "SearchResult", "search"]

# On first use: the backend reads configurations and needs nothing of the rest.
_HOMES = {"search": "offline", "HeadChoice": "result", "SearchResult": "result"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
