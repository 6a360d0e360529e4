"""Tests of plug-ins start with the built-in tables and leave nothing in them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparse_compiler.passes import architectures, mask_rules, matchers
from sparse_compiler.patterns import registry as patterns
from sparse_compiler.runtime import registry as executors


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it; no package of this machine takes part."""
    tables = (
        (matchers, "_added"),
        (mask_rules, "_rules"),
        (architectures, "_hints"),
        (patterns, "_PATTERNS"),
        (patterns, "_SOURCES"),
        (executors, "_added"),
    )
    for module, name in tables:
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    for module in (matchers, mask_rules, architectures, executors):
        monkeypatch.setattr(module, "_loaded", True)
    monkeypatch.setattr(patterns, "_loaded_plugins", True)
    with torch.inference_mode():
        yield
