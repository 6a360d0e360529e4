"""The error of the model's logits when one head follows a pattern and all else stays dense."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_compiler.errors import OptionInvalid
from sparse_compiler.search.state import LayerRecord

__all__ = ["ROWS", "errors", "of"]

ROWS = 64
"""Last rows that are compared."""


def of(output: Any) -> Tensor:
    """The last rows of what a model returns, float32 [B, at most 64, vocabulary].

    Raises:
        OptionInvalid: there are no logits in it.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.dim() != 3:
        raise OptionInvalid(
            "the model's output",
            "logits [B, L, vocabulary], or an object with them, for error='logits'",
            type(output).__name__,
        )
    return found[:, -ROWS:].float()


def errors(
    record: LayerRecord, dense: Tensor, swapped: Callable[[int, int], Tensor]
) -> list[list[float]]:
    """Relative L2 error by candidate and head; infinite where a candidate cannot be used.

    Args:
        dense: from ``of``.
        swapped: (candidate, head) -> the logits with that head sparse.
    """
    size = dense.square().sum(dtype=torch.float64).sqrt()

    def error(candidate: int, head: int) -> float:
        if record.grown[candidate][head] is None:
            return math.inf
        missed = (swapped(candidate, head) - dense).square().sum(dtype=torch.float64).sqrt()
        found = float(missed / size) if float(size) else float(missed)
        return found if math.isfinite(found) else math.inf

    return [
        [error(candidate, head) for head in range(record.heads)]
        for candidate in range(len(record.grown))
    ]
