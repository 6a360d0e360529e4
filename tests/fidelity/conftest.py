"""The benchmark is no part of the package: it is imported from the repository root."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparse_compiler.patterns import registry

sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture(scope="module", autouse=True)
def patterns_of_others() -> Iterator[None]:
    """Take the benchmark's pattern away again: other tests go through all that are registered."""
    yield
    registry._PATTERNS.pop("block_retrieval", None)
