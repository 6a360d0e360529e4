"""Which site is asking for a kernel; the kernel cache writes it down, nothing else depends on it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

__all__ = ["current_site", "for_site", "name_sites", "requested_by"]

P = ParamSpec("P")
R = TypeVar("R")

_names: dict[int, str] = {}
_site: ContextVar[int] = ContextVar("sparse_compiler_site", default=-1)


def name_sites(names: Mapping[int, str]) -> None:
    """Tell what the sites of a compiled graph are called: number -> path of the layer."""
    _names.update(names)


@contextmanager
def requested_by(site: int) -> Iterator[None]:
    """Kernels that the block loads are asked for by this site; -1 for none."""
    token = _site.set(site)
    try:
        yield
    finally:
        _site.reset(token)


def current_site() -> str:
    """The asking site, all layers of a model as one: ``model.layers.*.self_attn``; "" if unknown."""
    name = _names.get(_site.get(), "")
    return re.sub(r"(?<![^.\[])\d+(?![^.\]])", "*", name)


def for_site(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates an operator whose last argument is ``site``: what it loads, that site asked for."""

    @wraps(function)
    def asked(*args: P.args, **kwargs: P.kwargs) -> R:
        site = kwargs.get("site", args[-1] if args else -1)
        with requested_by(site if isinstance(site, int) else -1):
            return function(*args, **kwargs)

    return asked
