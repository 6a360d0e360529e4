"""Names of the ways to run a model, and the backend options that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.fidelity import retrieval_memory
from benchmarks.fidelity.results import DENSE
from sparse_compiler.backend import parse_options
from sparse_compiler.errors import OptionInvalid
from sparse_compiler.patterns import registry

__all__ = ["Variant", "default_names", "parse_variants"]


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Args:
        name: as on the command line.
        options: of the backend; None is the stock model in eager mode.
    """

    name: str
    options: dict[str, Any] | None


def default_names() -> list[str]:
    """dense, auto, and every pattern that is registered, with its own numbers."""
    return [DENSE, "auto", *(name for name in _patterns() if name != DENSE)]


def parse_variants(names: Sequence[str], extra: Mapping[str, Any] | None = None) -> list[Variant]:
    """Read names; dense is put first, and added where it is missing, since all is compared with it.

    Args:
        names: ``dense``, ``auto``, ``PATTERN[:first[:second]]``, ``budget=SHARE``, ``config=FILE``.
        extra: more options of every variant, e.g. ``{"inner": "eager"}``.
    Raises:
        OptionInvalid: a name stands for nothing, or for options that the backend refuses.
    """
    found = {DENSE: Variant(DENSE, None)}
    for name in names:
        name = name.strip()
        if name and name != DENSE:
            options = {**_options(name), "min_tokens": 0, **(extra or {})}
            parse_options(options)
            found[name] = Variant(name, options)
    return list(found.values())


def _patterns() -> tuple[str, ...]:
    retrieval_memory.register()
    return registry.names()


def _options(name: str) -> dict[str, Any]:
    if name == "auto":
        return {}
    kind, _, value = name.partition("=")
    if value and kind == "config":
        return {"config": value}
    if value and kind == "budget":
        return {"budget": _number(name, value, float)}
    pattern, *numbers = name.split(":")
    if pattern not in _patterns() or pattern == DENSE or len(numbers) > 2:
        known = ", ".join(p for p in _patterns() if p != DENSE)
        raise OptionInvalid(
            "a variant",
            f"dense, auto, budget=SHARE, config=FILE or PATTERN[:first[:second]] with a pattern of {known}",
            name,
        )
    if not numbers:
        return {"pattern": pattern}
    first, second = (*(_number(name, n, int) for n in numbers), 0)[:2]
    return {"pattern": {"*": (pattern, first, second)}}


def _number(name: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError as error:
        raise OptionInvalid(
            f"a number in variant {name!r}", "an integer" if kind is int else "a number", text
        ) from error
