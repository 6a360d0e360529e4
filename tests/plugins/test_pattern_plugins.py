"""Patterns and executors registered by the decorator, and wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plugin_models import Attention, X, assert_close, compiled, example, sites
from torch import Tensor

from sparse_compiler import plugins
from sparse_compiler.errors import PatternInvalid, PluginFailed
from sparse_compiler.patterns import registry as patterns
from sparse_compiler.runtime import registry as executors
from sparse_compiler.runtime.cpu_executor import CpuExecutor


def strided() -> type[plugins.Pattern]:
    """The example's pattern."""
    return plugins.pattern(example("pattern", "mylib_strided").Strided)


def test_a_decorated_pattern_is_an_option() -> None:
    strided()
    (site,) = sites(Attention(), pattern="strided")
    assert site.pattern == "2 x strided(64, 1024)"
    assert_close(compiled(Attention(), pattern={"*": ("strided", 1, 1)}), Attention()(X))


def test_a_pattern_that_chooses_wrongly_is_an_error_that_names_it() -> None:
    kind = strided()

    class Short(kind):
        name, number = "short", 1002

        def choose(self, request: plugins.SelectRequest) -> plugins.BandChoice:
            choice = super().choose(request)
            return plugins.BandChoice(choice.columns[..., :-1], choice.distances)

    class Raising(kind):
        name, number = "raising", 1003

        def choose(self, request: plugins.SelectRequest) -> plugins.BandChoice:
            raise KeyError("lost")

    for wrong, text in ((Short, "the columns of pattern"), (Raising, "KeyError: 'lost'")):
        plugins.pattern(wrong)
        with pytest.raises(PluginFailed, match=text):
            compiled(Attention(), pattern={"*": (wrong.name, 8, 8)})
        torch.compiler.reset()


def test_a_pattern_with_a_taken_number_or_no_name_is_refused() -> None:
    kind = strided()
    taken = type("Taken", (kind,), {"name": "new_name"})
    nameless = type("Nameless", (kind,), {"name": None, "number": 1004})
    for wrong in (taken, nameless, 3, kind()):
        with pytest.raises(PluginFailed):
            plugins.pattern(wrong)  # type: ignore[type-var]
    with pytest.raises(PatternInvalid):
        patterns.get("new_name")


def test_a_decorated_executor_runs_by_its_name() -> None:
    calls = []

    @plugins.executor
    class Counting(CpuExecutor):
        name = "counting"

        def attend(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            calls.append(1)
            return super().attend(*args, **kwargs)

    assert "counting" in executors.executor_names()
    out = compiled(Attention(), executor="counting", pattern={"*": ("a_shape", 80, 80)})
    assert_close(out, Attention()(X))
    assert calls


def test_a_wrong_executor_is_refused() -> None:
    taken = type("Taken", (CpuExecutor,), {"name": "cpu"})
    auto = type("Auto", (CpuExecutor,), {"name": "auto"})
    for wrong in (taken, auto, int, "cpu"):
        with pytest.raises(PluginFailed):
            plugins.executor(wrong)  # type: ignore[type-var]

    @plugins.executor
    class Unborn(CpuExecutor):
        name = "unborn"

        def __init__(self) -> None:
            raise OSError("no such device")

    with pytest.raises(PluginFailed, match=r"Unborn' .*no such device"):
        executors.executor_for("unborn", "cpu")
