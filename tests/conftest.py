"""Seeds, Hypothesis profiles and clean-up shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a deadline (the first call of an operator is slow) and the same cases in every run.
for _name, _examples in (("dev", 15), ("ci", 150)):
    settings.register_profile(
        _name,
        max_examples=_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


# Workers share the cores: each with all threads would wait for the other.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def compiler_reset() -> Iterator[None]:
    """Forget compiled code after a test that compiled, so that no test sees another's guards."""
    yield
    # Looked up, not imported: Dynamo costs seconds that tests without it need not pay.
    utilities = sys.modules.get("torch._dynamo.utils")
    if utilities is not None and utilities.counters["stats"]:
        torch.compiler.reset()
        utilities.counters.clear()
