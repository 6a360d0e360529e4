"""Models that tests of plug-ins compile, and where the example packages are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_compiler
from sparse_compiler.errors import PluginFailed
from sparse_compiler.ir.report import SiteReport

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "plugins"
OPTIONS: dict[str, Any] = {"min_tokens": 0, "inner": "eager", "executor": "cpu"}


class Attention(nn.Module):
    """Attention over a mask that ``make(length)`` builds."""

    def __init__(self, make: Callable[[int], Tensor] | None = None) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        if self.make is None:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=self.make(x.shape[2]))


class Layers(nn.Module):
    """Attentions in a list."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


X = torch.randn(1, 2, 80, 16)


def sites(model: nn.Module, **options: Any) -> list[SiteReport]:
    return sparse_compiler.explain(model, (X,), options=OPTIONS | options).sites


def compiled(model: nn.Module, **options: Any) -> Tensor:
    return torch.compile(model, backend="minference", options=OPTIONS | options)(X)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def failure(model: nn.Module, **options: Any) -> PluginFailed:
    """The error of a compilation, found behind what Dynamo wraps it into."""
    with pytest.raises(Exception, match="must be") as caught:
        sites(model, **options)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, PluginFailed):
        error = error.__cause__ or getattr(error, "inner_exception", None)
    assert isinstance(error, PluginFailed), caught.value
    return error


def example(kind: str, module: str) -> Any:
    """The module of an example that is not installed."""
    sys.path.insert(0, str(EXAMPLES / kind))
    try:
        return import_module(module)
    finally:
        sys.path.remove(str(EXAMPLES / kind))
