"""What a search has finished so far, in a file beside its output."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from sparse_compiler.errors import OptionInvalid

__all__ = ["LayerRecord", "SearchState", "digest_of", "digest_of_model", "load_state", "save_state"]

FORMAT = 2
_SAMPLED = 64

Numbers = tuple[int, int]


class LayerRecord(msgspec.Struct):
    """One layer; lists go by sample, candidate and head, as far as they do.

    Args:
        heads: query heads.
        grown: numbers of each candidate for each head, None where it cannot be used.
        carried: the same for the length that was asked for; empty where that is the sample's.
        least: cost of each candidate's smallest numbers.
        reasons: why a candidate cannot be used at all, "" where it can.
        errors, costs, densities: of each sample that is done; costs and densities at the length that
            was asked for.
        maps: of the last sample, a (mass, kept) pair for each head; see ``maps``.
    """

    heads: int = 0
    grown: list[list[Numbers | None]] = []
    carried: list[list[Numbers | None]] = []
    least: list[float] = []
    reasons: list[str] = []
    errors: list[list[list[float]]] = []
    costs: list[list[list[float]]] = []
    densities: list[list[list[float]]] = []
    maps: list[tuple[bytes, bytes]] = []


class SearchState(msgspec.Struct):
    """A search that may not be finished.

    Args:
        inputs: digests of what it depends on, by name.
        layers: by number.
        passes: samples through which the whole model has gone.
        unknown: attentions whose layer the compiler does not know.
    """

    format: int = FORMAT
    inputs: dict[str, str] = {}
    layers: dict[int, LayerRecord] = {}
    passes: int = 0
    unknown: int = 0


def digest_of(*parts: bytes) -> str:
    """Of bytes, lengths included."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def digest_of_model(model: nn.Module) -> str:
    """Of class, names, shapes and some elements of each tensor: enough to tell checkpoints apart."""
    tensors: Iterable[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            flat = tensor.detach().reshape(-1)
            place = (
                torch.arange(_SAMPLED, device=flat.device) * (flat.numel() - 1) // (_SAMPLED - 1)
            )
            sample = flat[place].to("cpu").contiguous().view(torch.uint8)
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def load_state(path: Path, inputs: Mapping[str, str]) -> SearchState:
    """What the file holds; a new state where there is none.

    Raises:
        OptionInvalid: it is broken, or belongs to a search of other inputs; names those.
    """
    fresh = "Give --fresh (resume=False) to search again from the start, or another output."
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return SearchState(inputs=dict(inputs))
    except OSError as error:
        raise OptionInvalid(
            "the state of the search", "readable", str(error), where=str(path)
        ) from error
    try:
        state = msgspec.msgpack.decode(content, type=SearchState)
    except msgspec.MsgspecError as error:
        raise OptionInvalid(
            "the state of the search", "readable", str(error), where=str(path), fix=fresh
        ) from error
    if state.format != FORMAT:
        raise OptionInvalid(
            "the format of the state", FORMAT.__str__(), state.format, where=str(path), fix=fresh
        )
    names = sorted({*state.inputs, *inputs})
    other = [n for n in names if state.inputs.get(n) != inputs.get(n)]
    if other:
        raise OptionInvalid(
            "the state beside the output",
            "of a search of the same inputs",
            f"one with another {', another '.join(other)}",
            where=str(path),
            fix=fresh,
        )
    return state


def save_state(path: Path, state: SearchState) -> None:
    """Atomically."""
    content: Any = msgspec.msgpack.encode(state)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
