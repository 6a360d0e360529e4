"""Options of the backend, checked strictly, and the only reader of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import platformdirs

from sparse_compiler.errors import OptionInvalid

__all__ = [
    "PatternTable",
    "SparseConfig",
    "cache_directory",
    "check_invariants",
    "shared_cache_directory",
]

PATTERNS = (
    "auto",
    "vertical_slash",
    "block_sparse",
    "a_shape",
    "key_groups",
    "low_rank",
    "tri_shape",
    "adaptive",
    "key_means",
    "antidiagonal",
    "switching",
    "low_rank_recall",
    "switching_recall",
    "dense",
)
RECALL_PATTERNS = ("adaptive", "antidiagonal", "low_rank_recall", "switching_recall")
"""Those whose numbers can say what share of the mass they keep."""
ANY = "*"
MAX_NUMBER = 2**31 - 1
"""Patterns' numbers travel as int32."""

HeadSpec = tuple[str, int, int]
PatternTable = dict[int | str, dict[int | str, HeadSpec]]
"""Layer number or ``*`` -> head number or ``*`` -> (pattern, first, second)."""


@dataclass(frozen=True)
class SparseConfig:
    """Options of ``torch.compile(model, backend="minference", options=...)``.

    Args:
        pattern: ``auto``, the name of a pattern for every head, or a table: layer number (or ``*``)
            -> head number (or ``*``) -> (pattern, first, second). Short forms: a list counts as
            layers 0, 1, ...; an entry in place of a layer's table serves all its heads; a bare name
            takes the pattern's own numbers; numbers may be text.
        config: path of a per-head configuration file in the published JSON format, or None.
        min_tokens: prompts with fewer keys stay dense; ``auto`` takes the executor's break-even.
        budget: share of the allowed pairs to compute, 0 < budget <= 1; 1.0 computes every pair
            that the mask allows. None uses the patterns' own numbers.
        target_recall: in place of a budget, the share of the attention's estimated mass that the kept
            keys shall hold for every row, 0 < r <= 1; 1.0 computes every pair that the mask allows.
            With ``pattern`` ``auto`` or one that can express a share.
        executor: ``auto``, ``triton``, ``cpu``, ``reference`` or a plug-in's name. One asked for by
            name never falls back silently.
        inner: what compiles the rest of the graph: ``inductor`` or ``eager``.
        inner_options: passed on to Inductor.
        fallback: what an unexpected decline does: ``warn``, ``error`` or ``silent``.
        dryrun: report, change nothing.
    """

    pattern: str | PatternTable = "auto"
    config: str | None = None
    min_tokens: int | Literal["auto"] = "auto"
    budget: float | None = None
    target_recall: float | None = None
    executor: str = "auto"
    inner: Literal["inductor", "eager"] = "inductor"
    inner_options: Mapping[str, Any] = field(default_factory=dict)
    fallback: Literal["warn", "error", "silent"] = "warn"
    dryrun: bool = False

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, Any] | None,
        *,
        patterns: Sequence[str] = PATTERNS,
        executors: Sequence[str] = ("auto", "triton", "cpu", "reference"),
        recalls: Sequence[str] = RECALL_PATTERNS,
    ) -> SparseConfig:
        """Check ``options`` and freeze them.

        Args:
            options: as given to ``torch.compile``; None and {} mean the defaults.
            patterns, executors: the names that exist, plug-ins included.
            recalls: the patterns that can express ``target_recall``.
        Raises:
            OptionInvalid: unknown key, wrong type or impossible value; names what is allowed.
        """
        if options is not None and not isinstance(options, Mapping):
            raise OptionInvalid("options of backend 'minference'", "a dict or None", options)
        options = dict(options or {})
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                raise OptionInvalid(
                    "an option of backend 'minference'", f"one of {', '.join(known)}", key
                )
        if "pattern" in options:
            options["pattern"] = _pattern(options["pattern"], patterns)
        _choice(options, "executor", executors)
        _choice(options, "inner", ("inductor", "eager"))
        _choice(options, "fallback", ("warn", "error", "silent"))
        _check_numbers(options)
        config = options.get("config")
        if config is not None:
            if not isinstance(config, str | os.PathLike):
                raise OptionInvalid("option 'config'", "a path to a JSON file, or None", config)
            if not Path(config).is_file():
                raise OptionInvalid("option 'config'", "a path to an existing file", str(config))
            options["config"] = str(config)
            if options.get("pattern", "auto") != "auto":
                raise OptionInvalid(
                    "option 'pattern'",
                    "'auto' (or absent) where 'config' is given",
                    options["pattern"],
                    fix="Give one of the two.",
                )
        _check_recall(options, recalls)
        if not isinstance(options.get("inner_options", {}), Mapping):
            raise OptionInvalid("option 'inner_options'", "a dict", options["inner_options"])
        options["inner_options"] = MappingProxyType(dict(options.get("inner_options", {})))
        if not isinstance(options.get("dryrun", False), bool):
            raise OptionInvalid("option 'dryrun'", "True or False", options["dryrun"])
        return cls(**options)


def _choice(options: Mapping[str, Any], key: str, allowed: Sequence[str]) -> None:
    if key in options and options[key] not in allowed:
        raise OptionInvalid(f"option {key!r}", f"one of {', '.join(allowed)}", options[key])


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_numbers(options: dict[str, Any]) -> None:
    tokens = options.get("min_tokens", "auto")
    if tokens != "auto" and not (_is_int(tokens) and tokens >= 0):
        raise OptionInvalid("option 'min_tokens'", "'auto' or an int >= 0", tokens)
    for key in ("budget", "target_recall"):
        share = options.get(key)
        if share is None:
            continue
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not (number and 0 < share <= 1):
            raise OptionInvalid(f"option {key!r}", f"None or a number with 0 < {key} <= 1", share)
        options[key] = float(share)


def _check_recall(options: Mapping[str, Any], recalls: Sequence[str]) -> None:
    """Refuse what ``target_recall`` contradicts; everything else is checked already."""
    recall = options.get("target_recall")
    if recall is None:
        return
    for key, what in (("budget", "a share of the pairs"), ("config", "numbers for every head")):
        if options.get(key) is not None:
            raise OptionInvalid(
                "option 'target_recall'",
                f"absent where {key!r} gives {what}",
                recall,
                fix="Give one of the two.",
            )
    pattern = options.get("pattern", "auto")
    if pattern != "auto" and pattern not in recalls:
        raise OptionInvalid(
            "option 'pattern'",
            f"auto, {', '.join(recalls)} where 'target_recall' says what to keep",
            pattern,
            fix="Choose one of these, or give a budget or the pattern's own numbers.",
        )


def _pattern(value: object, names: Sequence[str]) -> str | PatternTable:
    allowed = (*names, *(() if "auto" in names else ("auto",)))
    if isinstance(value, str):
        if value not in allowed:
            raise OptionInvalid(
                "option 'pattern'", f"one of {', '.join(allowed)}, or a table", value
            )
        return value
    if isinstance(value, Sequence):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        raise OptionInvalid(
            "option 'pattern'",
            f"one of {', '.join(allowed)}, or a table layer -> head -> (pattern, first, second)",
            value,
        )
    return {
        _number_or_any(layer, "layer"): _heads(heads, layer, names)
        for layer, heads in value.items()
    }


def _number_or_any(key: object, what: str) -> int | str:
    if isinstance(key, str) and key.isdecimal():
        key = int(key)
    if key == ANY or (_is_int(key) and key >= 0):  # type: ignore[operator]
        return key  # type: ignore[return-value]
    raise OptionInvalid(f"a {what} in option 'pattern'", f"an int >= 0 or {ANY!r}", key)


def _heads(value: object, layer: object, names: Sequence[str]) -> dict[int | str, HeadSpec]:
    if isinstance(value, Mapping):
        return {
            _number_or_any(head, "head"): _head(spec, layer, head, names)
            for head, spec in value.items()
        }
    return {ANY: _head(value, layer, ANY, names)}


def _head(value: object, layer: object, head: object, names: Sequence[str]) -> HeadSpec:
    where = f"layer {layer}, head {head}"
    parts: list[Any] = [value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        parts = list(value)
    if parts and parts[0] in names and parts[0] != "auto":
        numbers = parts[1:]
        if len(numbers) <= 2 and all(_is_int(n) and 0 <= n <= MAX_NUMBER for n in numbers):
            first, second = (*numbers, 0, 0)[:2] if numbers else (-1, -1)
            return str(parts[0]), first, second
    raise OptionInvalid(
        "an entry of option 'pattern'",
        f"(pattern, first, second) with a pattern of {', '.join(n for n in names if n != 'auto')} "
        "and ints >= 0",
        value,
        where=where,
    )


def cache_directory() -> Path:
    """Where generated kernels are kept: SPARSE_COMPILER_CACHE, or the user's cache directory."""
    override = os.environ.get("SPARSE_COMPILER_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("sparse_compiler"))


def shared_cache_directory() -> Path | None:
    """A team's cache, read and never written: SPARSE_COMPILER_SHARED_CACHE; None if unset.

    Setting it says that the owner of that directory is trusted: see SECURITY.md.
    """
    shared = os.environ.get("SPARSE_COMPILER_SHARED_CACHE")
    return Path(shared) if shared else None


def check_invariants() -> bool:
    """Whether passes are checked: SPARSE_COMPILER_CHECK=0 turns the checks off."""
    return os.environ.get("SPARSE_COMPILER_CHECK", "1") != "0"
