"""The published per-head configuration format: read and write.

A JSON list with one object per layer; key = query head as a string, value =
``[pattern, first, second, score]``. The score slot is kept only when it is given back.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from sparse_compiler.config import MAX_NUMBER
from sparse_compiler.errors import ConfigCorrupt
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry

__all__ = ["load_config", "save_config"]

_Entry = tuple[str, int | float, int | float, float]


def load_config(path: str | os.PathLike[str]) -> list[dict[int, HeadPattern]]:
    """Patterns per layer and head; a head that a layer does not name is absent.

    Raises:
        ConfigCorrupt: unreadable, not JSON, or not of the format; says where.
    """
    where = str(path)
    try:
        layers = msgspec.json.decode(Path(path).read_bytes(), type=list[dict[str, _Entry]])
    except OSError as error:
        raise ConfigCorrupt(
            "the configuration", "a readable file", str(error), where=where
        ) from error
    except msgspec.MsgspecError as error:
        raise ConfigCorrupt(
            "the configuration",
            "a JSON list with one object per layer: {head: [pattern, first, second, score]}",
            str(error),
            where=where,
        ) from error
    return [
        {
            _head_number(head, number, where): _pattern(entry, number, head, where)
            for head, entry in layer.items()
        }
        for number, layer in enumerate(layers)
    ]


def _head_number(head: str, layer: int, where: str) -> int:
    if not head.isdecimal() or str(int(head)) != head:
        raise ConfigCorrupt(
            "a head's key",
            "a number >= 0 as text, without leading zeros",
            head,
            where=f"{where}, layer {layer}",
        )
    return int(head)


def _pattern(entry: _Entry, layer: int, head: str, where: str) -> HeadPattern:
    name, first, second, _score = entry
    place = f"{where}, layer {layer}, head {head}"
    pattern = registry.by_config_name(name)
    if pattern is None:
        names = [p.config_name for n in registry.names() if (p := registry.get(n)).config_name]
        raise ConfigCorrupt(
            "a pattern's name", f"one of {', '.join(map(str, names))}", name, where=place
        )
    if any(n != int(n) or not 0 <= n <= MAX_NUMBER for n in (first, second)):
        raise ConfigCorrupt(
            "a pattern's numbers",
            f"whole numbers from 0 to {MAX_NUMBER}",
            [first, second],
            where=place,
        )
    if pattern.name == "block_sparse":
        return pattern.default()  # the format's numbers for it are ignored, as published
    return HeadPattern(pattern.name, int(first), int(second))


def save_config(
    path: str | os.PathLike[str],
    layers: list[dict[int, HeadPattern]],
    scores: list[dict[int, float]] | None = None,
) -> None:
    """Write the format atomically.

    Args:
        layers: patterns per layer and head; ``dense`` has no place in the format.
        scores: recall per layer and head, 1 where absent.
    Raises:
        ConfigCorrupt: a pattern that the format cannot express.
    """
    data: list[dict[str, list[Any]]] = []
    for number, layer in enumerate(layers):
        row: dict[str, list[Any]] = {}
        for head, chosen in sorted(layer.items()):
            known = chosen.name in registry.names()
            name = registry.get(chosen.name).config_name if known else None
            if name is None:
                raise ConfigCorrupt(
                    "a pattern",
                    "one that the format can express",
                    chosen.name,
                    where=f"layer {number}, head {head}",
                )
            score = scores[number].get(head, 1.0) if scores else 1.0
            row[str(head)] = [name, chosen.first, chosen.second, score]
        data.append(row)
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(data))
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
