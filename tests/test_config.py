"""Options are checked strictly; the published per-head format survives a round trip."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_compiler.config import SparseConfig, cache_directory, check_invariants
from sparse_compiler.errors import ConfigCorrupt, OptionInvalid
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.search.published_config import load_config, save_config

parse = SparseConfig.from_options

# ---- options -----------------------------------------------------------------------------------


def test_no_options_and_empty_options_are_the_defaults() -> None:
    assert parse(None) == parse({}) == SparseConfig()
    defaults = SparseConfig()
    assert (defaults.pattern, defaults.min_tokens, defaults.budget) == ("auto", "auto", None)
    assert (defaults.executor, defaults.inner, defaults.fallback) == ("auto", "inductor", "warn")
    assert not defaults.dryrun


GOOD: list[dict[str, Any]] = [
    {"pattern": "vertical_slash"},
    {"pattern": "dense"},
    {"min_tokens": 0},
    {"min_tokens": 10**7},
    {"min_tokens": "auto"},
    {"budget": 1.0},
    {"budget": 1},
    {"budget": 1e-6},
    {"budget": None},
    {"executor": "reference"},
    {"inner": "eager"},
    {"inner_options": {"max_autotune": True}},
    {"fallback": "error"},
    {"dryrun": True},
    {"config": None},
]


@pytest.mark.parametrize("options", GOOD, ids=str)
def test_every_allowed_value_is_kept(options: dict[str, Any]) -> None:
    config = parse(options)
    [(key, value)] = options.items()
    assert getattr(config, key) == value


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_that_exists_is_kept_as_text(tmp_path: Path, kind: type) -> None:
    path = tmp_path / "best.json"
    path.write_text("[]")
    assert parse({"config": kind(path)}).config == str(path)
    with pytest.raises(OptionInvalid, match="nowhere"):
        parse({"config": kind(tmp_path / "nowhere.json")})


BAD: list[tuple[str, Any]] = [
    ("pattern", "vertical_and_slash"),
    ("pattern", "VERTICAL_SLASH"),
    ("pattern", ""),
    ("pattern", None),
    ("pattern", 3),
    ("pattern", True),
    ("pattern", {"vertical_slash"}),
    ("config", 3),
    ("config", True),
    ("config", b"x.json"),
    ("min_tokens", -1),
    ("min_tokens", True),
    ("min_tokens", False),
    ("min_tokens", 1.0),
    ("min_tokens", "4096"),
    ("min_tokens", "automatic"),
    ("min_tokens", None),
    ("budget", 0),
    ("budget", 0.0),
    ("budget", -0.5),
    ("budget", 1.0001),
    ("budget", 2),
    ("budget", True),
    ("budget", False),
    ("budget", "0.5"),
    ("budget", float("nan")),
    ("budget", float("inf")),
    ("budget", [0.5]),
    ("executor", "gpu"),
    ("executor", None),
    ("executor", 1),
    ("inner", "aot_eager"),
    ("inner", None),
    ("inner", True),
    ("inner_options", None),
    ("inner_options", ["max_autotune"]),
    ("inner_options", "max_autotune"),
    ("fallback", "ignore"),
    ("fallback", None),
    ("fallback", True),
    ("dryrun", 1),
    ("dryrun", 0),
    ("dryrun", "yes"),
    ("dryrun", None),
]


@pytest.mark.parametrize(("key", "value"), BAD, ids=str)
def test_an_impossible_value_is_refused_with_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(OptionInvalid) as caught:
        parse({key: value})
    text = str(caught.value)
    assert key in text
    assert repr(value) in text or str(value) in text, text


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("pattern", "x", ["vertical_slash", "block_sparse", "a_shape", "dense", "auto"]),
        ("executor", "x", ["auto", "triton", "cpu", "reference"]),
        ("inner", "x", ["inductor", "eager"]),
        ("fallback", "x", ["warn", "error", "silent"]),
        ("budget", 7, ["0", "1"]),
        ("min_tokens", "x", ["auto"]),
    ],
)
def test_a_refusal_names_what_is_allowed(key: str, value: Any, allowed: list[str]) -> None:
    with pytest.raises(OptionInvalid) as caught:
        parse({key: value})
    for name in allowed:
        assert name in str(caught.value)


@pytest.mark.parametrize("key", ["budgte", "Budget", "max_autotune", "", "pattern "])
def test_an_unknown_key_is_refused_with_the_keys_that_exist(key: str) -> None:
    with pytest.raises(OptionInvalid) as caught:
        parse({key: 1})
    text = str(caught.value)
    assert repr(key) in text or key in text
    for field in dataclasses.fields(SparseConfig):
        assert field.name in text


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(OptionInvalid):
        parse({1: "a"})  # type: ignore[dict-item]


@pytest.mark.parametrize("options", [["pattern"], "dense", 3, [("budget", 0.5)]])
def test_options_that_are_no_mapping_are_refused(options: Any) -> None:
    with pytest.raises(OptionInvalid):
        parse(options)


def test_names_of_plug_ins_are_allowed_where_they_exist() -> None:
    config = parse(
        {"pattern": "mine", "executor": "yours"}, patterns=("auto", "mine"), executors=("yours",)
    )
    assert (config.pattern, config.executor) == ("mine", "yours")
    with pytest.raises(OptionInvalid, match="mine"):
        parse({"pattern": "a_shape"}, patterns=("auto", "mine"))


def test_a_pattern_beside_a_file_is_refused(tmp_path: Path) -> None:
    """Never one of them dropped silently."""
    path = tmp_path / "best.json"
    path.write_text("[]")
    assert parse({"pattern": "auto", "config": str(path)}).config == str(path)
    with pytest.raises(OptionInvalid, match="config"):
        parse({"pattern": "a_shape", "config": str(path)})


def test_the_config_is_frozen_and_keeps_no_reference_to_the_callers_tables() -> None:
    inner = {"max_autotune": True}
    table = {0: {"*": ("a_shape", 4, 16)}}
    config = parse({"inner_options": inner, "pattern": table})
    inner["other"] = True
    table[0]["*"] = ("dense", 0, 0)
    table[1] = {}
    assert dict(config.inner_options) == {"max_autotune": True}
    assert config.pattern == {0: {"*": ("a_shape", 4, 16)}}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 0.5  # type: ignore[misc]


# ---- tables ------------------------------------------------------------------------------------

HEAD = ("vertical_slash", 1000, 512)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({0: {0: HEAD}}, {0: {0: HEAD}}),
        ({"*": {"*": HEAD}}, {"*": {"*": HEAD}}),
        ({0: {"*": HEAD}, "*": {1: HEAD}}, {0: {"*": HEAD}, "*": {1: HEAD}}),
        ([{0: HEAD}, {"*": HEAD}], {0: {0: HEAD}, 1: {"*": HEAD}}),
        ({0: {0: list(HEAD)}}, {0: {0: HEAD}}),
        ({0: {0: ("dense", 0, 0)}}, {0: {0: ("dense", 0, 0)}}),
        ({0: HEAD}, {0: {"*": HEAD}}),
        ({"0": {"3": HEAD}}, {0: {3: HEAD}}),
    ],
)
def test_tables_are_kept_in_one_form(table: Any, expected: Any) -> None:
    assert parse({"pattern": table}).pattern == expected


BAD_TABLES: list[tuple[Any, str]] = [
    ({-1: {0: HEAD}}, "-1"),
    ({True: {0: HEAD}}, "True"),
    ({"layer": {0: HEAD}}, "layer"),
    ({0.0: {0: HEAD}}, "0.0"),
    ({0: {-1: HEAD}}, "-1"),
    ({0: {True: HEAD}}, "True"),
    ({0: {"all": HEAD}}, "all"),
    ({0: {0: ("a_shape", 1, 2, 3)}}, "a_shape"),
    ({0: {0: ("vertical_and_slash", 1, 2)}}, "vertical_and_slash"),
    ({0: {0: ("auto", 1, 2)}}, "auto"),
    ({0: {0: ("a_shape", -1, 2)}}, "-1"),
    ({0: {0: ("a_shape", 1, -2)}}, "-2"),
    ({0: {0: ("a_shape", 1.0, 2)}}, "1.0"),
    ({0: {0: ("a_shape", True, 2)}}, "True"),
    ({0: {0: (3, 1, 2)}}, "3"),
    ({0: {0: None}}, "None"),
    ({0: None}, "None"),
    ([None], "None"),
    ([[HEAD]], "vertical_slash"),
]


@pytest.mark.parametrize(("table", "shown"), BAD_TABLES, ids=str)
def test_a_table_with_a_mistake_is_refused_and_the_mistake_shown(table: Any, shown: str) -> None:
    with pytest.raises(OptionInvalid) as caught:
        parse({"pattern": table})
    assert shown in str(caught.value)


@pytest.mark.parametrize("table", [{}, [], {0: {}}, [{}]])
def test_an_empty_table_is_refused_or_says_nothing_about_any_head(table: Any) -> None:
    try:
        parsed = parse({"pattern": table}).pattern
    except OptionInvalid:
        return
    assert isinstance(parsed, dict)
    assert not any(parsed.values())


def test_an_error_names_the_layer_and_the_head() -> None:
    with pytest.raises(OptionInvalid) as caught:
        parse({"pattern": {7: {13: ("a_shape", "x", 2)}}})
    assert "7" in str(caught.value)
    assert "13" in str(caught.value)


# ---- environment -------------------------------------------------------------------------------


def test_the_cache_directory_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSE_COMPILER_CACHE", str(tmp_path / "kernels"))
    assert cache_directory() == tmp_path / "kernels"
    monkeypatch.delenv("SPARSE_COMPILER_CACHE")
    assert cache_directory().is_absolute()
    assert "sparse" in str(cache_directory())


def test_an_empty_cache_variable_is_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_COMPILER_CACHE", "")
    assert cache_directory().is_absolute()


@pytest.mark.parametrize(("value", "on"), [("0", False), ("1", True), (None, True)])
def test_checks_are_on_unless_turned_off(
    monkeypatch: pytest.MonkeyPatch, value: str | None, on: bool
) -> None:
    if value is None:
        monkeypatch.delenv("SPARSE_COMPILER_CHECK", raising=False)
    else:
        monkeypatch.setenv("SPARSE_COMPILER_CHECK", value)
    assert check_invariants() is on


# ---- the published file format -----------------------------------------------------------------

patterns = st.one_of(
    st.builds(
        HeadPattern, st.just("vertical_slash"), st.integers(0, 30_000), st.integers(0, 30_000)
    ),
    st.builds(HeadPattern, st.just("a_shape"), st.integers(0, 5000), st.integers(0, 5000)),
)
layers = st.lists(st.dictionaries(st.integers(0, 40), patterns, max_size=5), max_size=4)


@given(config=layers)
def test_patterns_survive_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, config: list[dict[int, HeadPattern]]
) -> None:
    path = tmp_path_factory.mktemp("config") / "best.json"
    save_config(path, config)
    assert load_config(path) == config
    assert load_config(str(path)) == config


def test_block_sparse_is_a_hundred_blocks_whatever_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    path.write_text('[{"0": ["block_sparse", 1000, 6096, 0.9], "3": ["block_sparse", 100, 0, 1]}]')
    [layer] = load_config(path)
    assert {layer[head].first for head in (0, 3)} == {100}
    save_config(path, [layer])
    assert load_config(path) == [layer]


def test_the_file_is_the_published_format(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    layer = {
        0: HeadPattern("vertical_slash", 1000, 6096),
        11: HeadPattern("a_shape", 1024, 4096),
        2: HeadPattern("block_sparse", 100),
    }
    save_config(path, [layer, {}], [{0: 0.75}])
    [first, second] = json.loads(path.read_text())
    assert second == {}
    assert set(first) == {"0", "2", "11"}
    assert first["0"] == ["vertical_and_slash", 1000, 6096, 0.75]
    assert first["11"] == ["stream_llm", 1024, 4096, 1]
    assert first["2"][0] == "block_sparse"


def test_published_spellings_are_read(tmp_path: Path) -> None:
    """Scores are recalls or, in older files, error counts; heads may be missing."""
    path = tmp_path / "best.json"
    path.write_text(
        '[{"0": ["vertical_and_slash", 1000, 6096, 336379.7],'
        ' "1": ["stream_llm", 128, 896, 0.99], "5": ["vertical_and_slash", 30, 800, 1]}, {}]'
    )
    first, second = load_config(path)
    assert first == {
        0: HeadPattern("vertical_slash", 1000, 6096),
        1: HeadPattern("a_shape", 128, 896),
        5: HeadPattern("vertical_slash", 30, 800),
    }
    assert second == {}


CORRUPT = [
    "",
    "nonsense",
    "[",
    "{}",
    "null",
    "3",
    '"text"',
    "[3]",
    "[[]]",
    '[{"0": 3}]',
    '[{"0": []}]',
    '[{"0": ["vertical_and_slash"]}]',
    '[{"0": ["vertical_and_slash", 1, 2]}]',
    '[{"0": ["vertical_and_slash", 1, 2, 3, 4]}]',
    '[{"0": ["vertical_slash", 1, 2, 1]}]',
    '[{"0": ["no_such", 1, 2, 1]}]',
    '[{"0": [3, 1, 2, 1]}]',
    '[{"0": ["vertical_and_slash", "1", 2, 1]}]',
    '[{"0": ["vertical_and_slash", -1, 2, 1]}]',
    '[{"0": ["vertical_and_slash", 1, -2, 1]}]',
    '[{"0": ["vertical_and_slash", 1.5, 2, 1]}]',
    '[{"0": ["vertical_and_slash", true, 2, 1]}]',
    '[{"0": ["vertical_and_slash", null, 2, 1]}]',
    '[{"0": ["vertical_and_slash", 1, 2, "good"]}]',
    '[{"0": ["vertical_and_slash", 1e400, 2, 1]}]',
    '[{"head": ["vertical_and_slash", 1, 2, 1]}]',
    '[{"-1": ["vertical_and_slash", 1, 2, 1]}]',
    '[{"1.0": ["vertical_and_slash", 1, 2, 1]}]',
    '[{"": ["vertical_and_slash", 1, 2, 1]}]',
    '[{"0": ["vertical_and_slash", 1, 2, 1], "00": ["stream_llm", 1, 2, 1]}]',
    '[{"0": ["vertical_and_slash", 99999999999, 2, 1]}]',
]


@pytest.mark.parametrize("text", CORRUPT)
def test_a_corrupt_file_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigCorrupt, match=r"broken\.json"):
        load_config(path)


def test_a_mistake_inside_the_file_names_layer_and_head(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    good = '{"0": ["vertical_and_slash", 1, 2, 1]}'
    path.write_text(f'[{good}, {good}, {{"17": ["vertical_slash", 1, 2, 1]}}]')
    with pytest.raises(ConfigCorrupt) as caught:
        load_config(path)
    assert "17" in str(caught.value)
    assert "2" in str(caught.value)
    assert "vertical_slash" in str(caught.value)
    assert "vertical_and_slash" in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x00" * 10])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ConfigCorrupt):
        load_config(path)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(ConfigCorrupt, match=path.name):
            load_config(path)


@pytest.mark.parametrize("head", [HeadPattern("no_such", 1, 2), HeadPattern("stream_llm", 1, 2)])
def test_what_the_format_cannot_say_is_refused_and_nothing_is_written(
    tmp_path: Path, head: HeadPattern
) -> None:
    path = tmp_path / "best.json"
    with pytest.raises(ConfigCorrupt):
        save_config(path, [{0: HeadPattern("a_shape", 1, 2), 1: head}])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "best.json"
    old = [{0: HeadPattern("a_shape", 1, 2)}]
    save_config(path, old)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    for name in ("os.replace", "os.rename", "pathlib.Path.replace", "pathlib.Path.rename"):
        monkeypatch.setattr(name, fail)
    with pytest.raises((OSError, ConfigCorrupt)):
        save_config(path, [{0: HeadPattern("a_shape", 3, 4)}])
    monkeypatch.undo()
    assert load_config(path) == old
    assert [p.name for p in tmp_path.iterdir()] == ["best.json"]


def test_saving_over_an_old_file_replaces_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    save_config(path, [{h: HeadPattern("a_shape", 1, h) for h in range(40)}] * 5)
    save_config(path, [{0: HeadPattern("a_shape", 1, 2)}])
    assert load_config(path) == [{0: HeadPattern("a_shape", 1, 2)}]
    assert [p.name for p in tmp_path.iterdir()] == ["best.json"]
