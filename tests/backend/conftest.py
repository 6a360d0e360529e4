"""The tests of the backend compile for inference; those that ask for ``gradients`` do not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def gradients() -> None:
    """Asked for by tests that run with gradients on."""


@pytest.fixture(autouse=True)
def inference(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.inference_mode("gradients" not in request.fixturenames):
        yield
