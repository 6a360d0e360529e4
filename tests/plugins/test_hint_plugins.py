"""Architecture hints registered by the decorator, and wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
from plugin_models import Attention, Layers, X, assert_close, compiled, failure, sites

from sparse_compiler import plugins


def hint(**methods: Any) -> type[plugins.ArchitectureHint]:
    """A registered hint about every module, with these methods."""
    body = {"applies": lambda self, path, classes: True} | methods
    return plugins.architecture(type("Hint", (plugins.ArchitectureHint,), body))


def test_a_hint_keeps_a_layer_dense_whatever_the_options_say() -> None:
    hint(dense=lambda self, path: path.endswith("1"))
    first, second = sites(Layers(), pattern="a_shape")
    assert (first.decision, second.code) == ("rewritten", "HINT_DENSE")
    # Expected: nobody is warned, and fallback="error" does not raise.
    assert_close(compiled(Layers(), fallback="error", budget=1.0), Layers()(X))


def test_a_hint_sees_the_classes_around_an_attention() -> None:
    seen = []

    def applies(self: Any, path: str, classes: tuple[str, ...]) -> bool:
        seen.append((path, classes))
        return False

    hint(applies=applies, dense=lambda self, path: True)
    assert [s.decision for s in sites(Layers(1))] == ["rewritten"]
    ((path, classes),) = seen
    assert path == "layers.0" and classes[-1] == f"{Attention.__module__}.Attention"


def test_a_hint_numbers_the_layers_of_per_layer_patterns() -> None:
    table = {0: "vertical_slash", 5: ("a_shape", 3, 4)}
    hint(layer=lambda self, path: {"layers.0": 5, "layers.1": 0}[path])
    first, second = sites(Layers(), pattern=table)
    assert first.pattern == "2 x a_shape(3, 4)"
    assert second.pattern.startswith("2 x vertical_slash")


def test_layers_with_one_number_are_unknown() -> None:
    hint(layer=lambda self, path: 0)
    for site in sites(Layers(), pattern={0: ("a_shape", 3, 4)}):
        assert [note.code for note in site.notes] == ["LAYER_UNKNOWN"]


def test_hints_that_disagree_name_no_layer_and_no_pattern() -> None:
    hint(layer=lambda self, path: 0, pattern=lambda self, path: "a_shape")
    other = {"layer": lambda self, path: 1, "pattern": lambda self, path: "block_sparse"}
    hint(**other)
    (site,) = sites(Layers(1))
    assert site.pattern.startswith("2 x vertical_slash")
    (site,) = sites(Layers(1), pattern={0: ("a_shape", 3, 4)})
    assert [note.code for note in site.notes] == ["LAYER_UNKNOWN"]


def test_a_hint_names_a_pattern_only_where_the_user_named_none() -> None:
    hint(pattern=lambda self, path: plugins.HeadPattern("a_shape", 7, 8))
    assert sites(Layers(1))[0].pattern == "2 x a_shape(7, 8)"
    assert sites(Layers(1), pattern="block_sparse")[0].pattern.startswith("2 x block_sparse")


@pytest.mark.parametrize(
    ("methods", "text"),
    [
        ({"dense": lambda self, path: "yes"}, "True or False"),
        ({"layer": lambda self, path: -1}, "an int >= 0"),
        ({"layer": lambda self, path: True}, "an int >= 0"),
        ({"pattern": lambda self, path: 3}, "HeadPattern"),
        ({"pattern": lambda self, path: "zigzag"}, "vertical_slash"),
        ({"dense": lambda self, path: {}[path]}, "KeyError"),
    ],
    ids=["dense", "negative", "bool", "pattern", "no such", "raises"],
)
def test_a_wrong_hint_is_an_error_that_names_it(methods: dict[str, Any], text: str) -> None:
    hint(**methods)
    error = failure(Layers(1))
    assert text in str(error) and "'Hint'" in str(error)
