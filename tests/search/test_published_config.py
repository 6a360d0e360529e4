"""The published per-head format in all its variants; mistakes are named by layer and head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparse_compiler
from sparse_compiler.errors import ConfigCorrupt
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.search.published_config import (
    check_config,
    embed_config,
    load_config,
    save_config,
)

Layers = list[dict[int, HeadPattern]]

_number = st.integers(0, 2**31 - 1)
_names = sorted(set(registry.names()) - {"block_sparse"})
_head = st.one_of(
    st.builds(HeadPattern, st.sampled_from(_names), _number, _number),
    st.builds(HeadPattern, st.just("block_sparse"), st.integers(1, 2**31 - 1)),
)
_layers = st.lists(st.dictionaries(st.integers(0, 60), _head, max_size=5), max_size=5)


@given(layers=_layers)
def test_every_pattern_survives_a_round_trip_in_every_variant(
    tmp_path_factory: pytest.TempPathFactory, layers: Layers
) -> None:
    folder = tmp_path_factory.mktemp("config")
    path, engine, numbered = (folder / name for name in ("best.json", "config.json", "n.json"))
    save_config(path, layers)
    assert load_config(path) == layers
    engine.write_text('{"model_type": "x", "dual_chunk_attention_config": {"chunk_size": 8}}')
    embed_config(engine, layers)
    assert load_config(engine) == layers
    written = json.loads(engine.read_text())
    assert written["model_type"] == "x"
    assert written["dual_chunk_attention_config"]["chunk_size"] == 8
    if layers:
        numbered.write_text(json.dumps(dict(enumerate(json.loads(path.read_text())))))
        assert load_config(numbered) == layers


@given(score=st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers()))
def test_scores_of_both_kinds_are_read(
    tmp_path_factory: pytest.TempPathFactory, score: float
) -> None:
    path = tmp_path_factory.mktemp("config") / "best.json"
    try:
        float(score)
    except OverflowError:
        return
    path.write_text(json.dumps([{"3": ["stream_llm", 4, 16, score]}]))
    assert load_config(path) == [{3: HeadPattern("a_shape", 4, 16)}]


def test_numbers_of_a_searched_block_sparse_head_are_kept_and_published_ones_are_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "best.json"
    save_config(path, [{0: HeadPattern("block_sparse", 37)}])
    assert load_config(path) == [{0: HeadPattern("block_sparse", 37)}]
    path.write_text('[{"0": ["block_sparse", 1000, 6096, 1], "1": ["block_sparse", 8, 1, 0.5]}]')
    assert load_config(path) == [dict.fromkeys((0, 1), HeadPattern("block_sparse", 100))]


def test_patterns_that_the_format_does_not_know_have_our_names(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    save_config(path, [{0: HeadPattern("dense"), 1: HeadPattern("a_shape", 1, 2)}])
    [layer] = json.loads(path.read_text())
    assert layer["0"][0] == "dense"
    assert layer["1"][0] == "stream_llm"
    assert load_config(path)[0][0] == HeadPattern("dense")


def test_layers_by_number_may_leave_some_out(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    path.write_text('{"2": {"0": ["stream_llm", 1, 2, 1]}, "0": {}}')
    assert load_config(path) == [{}, {}, {0: HeadPattern("a_shape", 1, 2)}]


GOOD = '["stream_llm", 1, 2, 1]'


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f'[{{}}, {{"5": {GOOD}, "9": 3}}]', ["layer 1", "head 9", "[pattern"]),
        (f'[{{}}, {{"5": {GOOD}, "9": ["stream_llm", 1, 2]}}]', ["layer 1", "head 9"]),
        ('[{"9": ["no_such", 1, 2, 1]}]', ["layer 0", "head 9", "no_such", "stream_llm", "dense"]),
        ('[{"9": ["a_shape", 1, 2, 1]}]', ["layer 0", "head 9", "a_shape", "stream_llm"]),
        ('[{"9": ["stream_llm", 1.5, 2, 1]}]', ["layer 0", "head 9", "1.5"]),
        ('[{"9": ["stream_llm", 1, NaN, 1]}]', ["layer 0", "head 9"]),
        ('[{"9": ["stream_llm", 1, 2, "x"]}]', ["layer 0", "head 9", "score"]),
        ('[{"9": ["stream_llm", 1, 2, Infinity]}]', ["layer 0", "head 9", "score"]),
        ('[{}, {}, {"x": 1}]', ["layer 2", "'x'"]),
        ("[{}, 3]", ["layer 1"]),
        (f'[{{"4": {GOOD}, "4": {GOOD}}}]', ["'4'", "twice"]),
        ('{"a": {}}', ["'a'"]),
        ('{"4000000": {}}', ["4000000"]),
        ('{"01": {}}', ["'01'"]),
        ('{"dual_chunk_attention_config": 3}', ["dual_chunk_attention_config"]),
        ('{"dual_chunk_attention_config": {}}', ["sparse_attention_config"]),
        (
            '{"dual_chunk_attention_config": {"sparse_attention_config": [{"7": 3}]}}',
            ["layer 0", "head 7"],
        ),
        ('{"model_type": "llama"}', ["model_type"]),
    ],
)
def test_a_mistake_is_named_by_layer_and_head(tmp_path: Path, text: str, shown: list[str]) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ConfigCorrupt) as caught:
        load_config(path)
    for part in (*shown, "broken.json"):
        assert part in str(caught.value)


def test_a_deep_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ConfigCorrupt, match=r"deep\.json"):
        load_config(path)


@pytest.mark.parametrize(
    ("layers", "shown"),
    [
        ([{}], ["2", "layer 1", "missing"]),
        ([{}, {}, {}], ["2", "layer 2", "extra"]),
        ([{}, {3: HeadPattern("dense"), 4: HeadPattern("dense")}], ["layer 1", "head 4", "4"]),
    ],
)
def test_a_configuration_of_another_model_is_refused(layers: Layers, shown: list[str]) -> None:
    with pytest.raises(ConfigCorrupt) as caught:
        check_config(layers, [4, 4], "best.json")
    for part in (*shown, "best.json"):
        assert part in str(caught.value)


def test_a_configuration_of_the_model_fits() -> None:
    check_config([{0: HeadPattern("dense")}, {3: HeadPattern("dense")}], [4, 4])


def test_compiling_a_model_with_another_ones_configuration_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model, path = transformers.LlamaForCausalLM(config), tmp_path / "best.json"
    for text, shown in (
        (f'[{{"0": {GOOD}}}]', "layer 1 is missing"),
        (f'[{{}}, {{"2": {GOOD}}}]', "layer 1, head 2"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigCorrupt, match=shown):
            sparse_compiler.compile(model, config=path)
    path.write_text(f'[{{}}, {{"1": {GOOD}}}]')
    sparse_compiler.restore(sparse_compiler.compile(model, config=path))


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"dual_chunk_attention_config": []}', "nonsense", None]
)
def test_nothing_is_put_into_what_is_no_configuration_of_an_engine(
    tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigCorrupt, match=r"config\.json"):
        embed_config(path, [{}])
    assert (path.read_text() if path.exists() else None) == text


def test_the_rest_of_an_engines_file_keeps_its_order_and_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    data: dict[str, Any] = {
        "z": 1e-05,
        "dual_chunk_attention_config": {"b": 1, "sparse_attention_config": [], "a": 2},
        "a": "é",
    }
    path.write_text(json.dumps(data))
    embed_config(path, [{0: HeadPattern("a_shape", 1, 2)}], [{0: 0.5}])
    found = json.loads(path.read_text())
    assert list(found) == ["z", "dual_chunk_attention_config", "a"]
    inner = found["dual_chunk_attention_config"]
    assert list(inner) == ["b", "sparse_attention_config", "a"]
    assert inner["sparse_attention_config"] == [{"0": ["stream_llm", 1, 2, 0.5]}]
    assert (found["z"], found["a"]) == (1e-05, "é")
