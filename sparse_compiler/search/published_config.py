"""The published per-head configuration format: read, write, and compare with a model.

One object per layer; key = query head as text, value = ``[pattern, first, second, score]``. The
layers come as a JSON list, as an object by layer number, or inside the ``config.json`` of a serving
engine under ``dual_chunk_attention_config`` -> ``sparse_attention_config``. Patterns that the
format does not know have our names. The score is kept only when it is given back.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import msgspec

from sparse_compiler.config import MAX_NUMBER
from sparse_compiler.errors import ConfigCorrupt
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry

__all__ = [
    "check_config",
    "check_embeddable",
    "check_model",
    "embed_config",
    "encode_config",
    "load_config",
    "save_config",
]

Tables = list[dict[int, HeadPattern]]
Scores = Sequence[Mapping[int, float]]

_OUTER, _INNER = "dual_chunk_attention_config", "sparse_attention_config"
_ENTRY = "[pattern, first, second, score]"
_LAYERS = (
    f"a JSON list with one object per layer, {{head: {_ENTRY}}}, an object {{layer: {{head: "
    f"{_ENTRY}}}}}, or one with either under {_OUTER} -> {_INNER}"
)


def load_config(path: str | os.PathLike[str]) -> Tables:
    """Patterns per layer and head; a head that a layer does not name is absent.

    Raises:
        ConfigCorrupt: unreadable, not JSON, or not of the format; says where.
    """
    where = str(path)
    layers = _layers(_read(path), where)
    return [_layer(layer, number, where) for number, layer in enumerate(layers)]


def _read(path: str | os.PathLike[str]) -> Any:
    where = str(path)
    try:
        return json.loads(Path(path).read_bytes(), object_pairs_hook=_object)
    except OSError as error:
        raise ConfigCorrupt(
            "the configuration", "a readable file", str(error), where=where
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigCorrupt("the configuration", _LAYERS, str(error), where=where) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice in one object")
    return found


def _layers(data: Any, where: str) -> list[Any]:
    """The layers in order; of an object by number, those that it leaves out are empty."""
    if isinstance(data, dict) and _OUTER in data:
        inner = data[_OUTER]
        if not isinstance(inner, dict) or _INNER not in inner:
            raise ConfigCorrupt(f"{_OUTER}", f"an object with {_INNER}", _kind(inner), where=where)
        data, where = inner[_INNER], f"{where}, {_OUTER}.{_INNER}"
    if isinstance(data, list):
        return data
    if not isinstance(data, dict) or not data:
        raise ConfigCorrupt("the configuration", _LAYERS, _kind(data), where=where)
    for key in data:
        if not _number(key) or int(key) > MAX_NUMBER:
            raise ConfigCorrupt("the configuration", _LAYERS, key, where=where)
    count = max(map(int, data)) + 1
    if count > 2 * len(data) + 1024:
        raise ConfigCorrupt("a layer's number", "near the others", str(count - 1), where=where)
    return [data.get(str(number), {}) for number in range(count)]


def _kind(value: Any) -> str:
    text = str(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


def _number(key: str) -> bool:
    return key.isascii() and key.isdecimal() and str(int(key)) == key


def _layer(layer: Any, number: int, where: str) -> dict[int, HeadPattern]:
    place = f"{where}, layer {number}"
    if not isinstance(layer, dict):
        raise ConfigCorrupt("a layer", f"an object {{head: {_ENTRY}}}", _kind(layer), where=place)
    found = {}
    for head, entry in layer.items():
        if not _number(head):
            raise ConfigCorrupt(
                "a head's key",
                "a number >= 0 as text, without leading zeros",
                head,
                where=place,
            )
        found[int(head)] = _pattern(entry, f"{place}, head {head}")
    return found


def _pattern(entry: Any, place: str) -> HeadPattern:
    if not (isinstance(entry, list) and len(entry) == 4 and isinstance(entry[0], str)):
        raise ConfigCorrupt("an entry", _ENTRY, _kind(entry), where=place)
    name, first, second, score = entry
    if not _finite(score):
        raise ConfigCorrupt("an entry's score", "a number", score, where=place)
    pattern = registry.by_config_name(name) or _own(name)
    if pattern is None:
        known = (registry.get(n) for n in registry.names())
        names = ", ".join(p.config_name or p.name for p in known)
        raise ConfigCorrupt("a pattern's name", f"one of {names}", name, where=place)
    if any(not _finite(n) or n != int(n) or not 0 <= n <= MAX_NUMBER for n in (first, second)):
        raise ConfigCorrupt(
            "a pattern's numbers",
            f"whole numbers from 0 to {MAX_NUMBER}",
            [first, second],
            where=place,
        )
    # The format's numbers for block_sparse mean nothing, as published, and the second is not 0
    # there; ours is, and the first counts blocks.
    if pattern.name == "block_sparse" and (second or not first):
        return pattern.default()
    return HeadPattern(pattern.name, int(first), int(second))


def _own(name: str) -> Any:
    """A pattern by our name, where the format has none for it."""
    if name not in registry.names():
        return None
    pattern = registry.get(name)
    return pattern if pattern.config_name is None else None


def _finite(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_config(layers: Tables, heads: Sequence[int], where: str = "") -> None:
    """Compare a configuration with a model.

    Args:
        layers: from ``load_config``.
        heads: query heads of each layer of the model.
        where: the file, for the message.
    Raises:
        ConfigCorrupt: other layers than the model's, or a head that its layer has not.
    """
    place = f"{where}, " if where else ""
    if len(layers) != len(heads):
        more = len(layers) > len(heads)
        raise ConfigCorrupt(
            "layers of the configuration",
            f"as many as the model's {len(heads)}",
            len(layers),
            where=f"{place}layer {min(len(layers), len(heads))} is {'extra' if more else 'missing'}",
        )
    for number, (layer, count) in enumerate(zip(layers, heads, strict=True)):
        extra = sorted(head for head in layer if head >= count)
        if extra:
            raise ConfigCorrupt(
                "a head of the configuration",
                f"below {count}, the query heads of the layer",
                extra[0],
                where=f"{place}layer {number}, head {extra[0]}",
            )


def check_model(path: str | os.PathLike[str], model: Any) -> None:
    """Compare a configuration with a transformers model; models that do not say their sizes pass.

    Raises:
        ConfigCorrupt: as ``load_config`` and ``check_config``.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    sizes: list[Any] = [
        getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads")
    ]
    # An encoder and a decoder count their layers each from 0.
    if getattr(config, "is_encoder_decoder", False) or not all(isinstance(n, int) for n in sizes):
        return
    check_config(load_config(path), [int(sizes[1])] * int(sizes[0]), str(path))


def encode_config(layers: Tables, scores: Scores | None = None) -> list[dict[str, list[Any]]]:
    """The format as plain data.

    Args:
        layers: patterns per layer and head.
        scores: recall per layer and head, 1 where absent.
    Raises:
        ConfigCorrupt: a pattern that nobody registered.
    """
    data: list[dict[str, list[Any]]] = []
    for number, layer in enumerate(layers):
        row: dict[str, list[Any]] = {}
        for head, chosen in sorted(layer.items()):
            if chosen.name not in registry.names():
                raise ConfigCorrupt(
                    "a pattern",
                    f"one of {', '.join(registry.names())}",
                    chosen.name,
                    where=f"layer {number}, head {head}",
                )
            name = registry.get(chosen.name).config_name or chosen.name
            second = 0 if chosen.name == "block_sparse" else chosen.second
            score = scores[number].get(head, 1.0) if scores else 1.0
            row[str(head)] = [name, chosen.first, second, score]
        data.append(row)
    return data


def save_config(path: str | os.PathLike[str], layers: Tables, scores: Scores | None = None) -> None:
    """Write the format atomically; arguments and errors as for ``encode_config``."""
    _write(path, msgspec.json.encode(encode_config(layers, scores)))


def embed_config(
    path: str | os.PathLike[str], layers: Tables, scores: Scores | None = None
) -> None:
    """Put the layers into a serving engine's ``config.json``; everything else in it stays.

    Args:
        path: a file that has a ``dual_chunk_attention_config``.
        layers, scores: as for ``encode_config``.
    Raises:
        ConfigCorrupt: there is no such file or object in it, or a pattern that nobody registered.
    """
    data = check_embeddable(path)
    data[_OUTER][_INNER] = encode_config(layers, scores)
    _write(path, json.dumps(data, indent=2, ensure_ascii=False).encode() + b"\n")


def check_embeddable(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a serving engine's ``config.json`` holds; errors as for ``embed_config``."""
    data = _read(path)
    if not isinstance(data, dict) or not isinstance(data.get(_OUTER), dict):
        raise ConfigCorrupt(
            "the engine's configuration",
            f"an object with the object {_OUTER}, whose sizes only the model's owner knows",
            _kind(data if not isinstance(data, dict) else data.get(_OUTER)),
            where=str(path),
        )
    return data


def _write(path: str | os.PathLike[str], content: bytes) -> None:
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
