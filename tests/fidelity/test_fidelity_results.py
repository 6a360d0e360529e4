"""Counting, intervals, the file, the tables, the figures, and names that stand for nothing."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.fidelity.cli import main
from benchmarks.fidelity.figures import draw
from benchmarks.fidelity.results import (
    Cell,
    Failure,
    LayerRow,
    Results,
    Tally,
    Way,
    read,
    wilson,
)
from benchmarks.fidelity.tables import kept_text, print_results
from benchmarks.fidelity.variants import default_names, parse_variants
from sparse_compiler.errors import OptionInvalid


@pytest.mark.parametrize(
    ("good", "total", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (64, 64, 0.9434, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_gives_the_published_values(good: int, total: int, low: float, high: float) -> None:
    assert wilson(good, total) == pytest.approx((low, high), abs=5e-5)


def test_more_good_than_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and total"):
        wilson(3, 2)


def test_kept_counts_only_what_dense_has_right() -> None:
    tally = Tally()
    tally.add([True, True, False, False], [True, False, True, False])
    tally.add([True], [True])
    assert (tally.asked, tally.dense_right, tally.right, tally.both) == (5, 3, 3, 2)
    assert tally.kept == pytest.approx(2 / 3)
    assert tally.kept95 == wilson(2, 3)
    assert Tally(4, 0, 2, 0).kept is None
    assert kept_text(Tally(4, 0, 2, 0)) == "dense: 0 right"
    with pytest.raises(ValueError, match=r"shorter|longer"):
        tally.add([True], [])


def test_a_share_is_never_rounded_to_all_or_nothing() -> None:
    assert kept_text(Tally(400, 400, 399, 399)).startswith("399/400 >.99 (")
    assert kept_text(Tally(400, 400, 1, 1)).startswith("1/400 <.01 (")
    assert kept_text(Tally(4000, 4000, 3999, 3999)).startswith("3999/4000 >.999 (")
    assert kept_text(Tally(4000, 4000, 1, 1)).startswith("1/4000 <.001 (")
    assert kept_text(Tally(1024, 949, 940, 931)) == "931/949 .981 (.970-.988)"
    assert kept_text(Tally(64, 64, 64, 64)) == "64/64 1.00 (.94-1.00)"


@pytest.fixture
def results() -> Results:
    found = Results(
        "command", "a device", {"torch": "2"}, "model", "float32", "abc", {"fill": 0.25}
    )
    for name, density in (("dense", 1.0), ("a_shape:64:256", 0.1), ("broken", 0.5)):
        options = None if name == "dense" else {"pattern": name}
        way = Way(name, options, 4, 4, 1, {2048: 2.0}, {2048: [0.1, 0.3, 0.2]})
        found.ways.append(way)
        for task in ("needle", "end-1", "loss"):
            right = 1 if name == "dense" else 0
            cell = Cell(task, 2048, name, 2, Tally(2, 2, 2 * right, 2 * right))
            cell.densities = [density]
            if task == "needle":
                cell.depths = {"0.00": Tally(1, 1, right, right), "1.00": Tally(1, 1, 1, 1)}
            if task == "loss":
                cell.tally, cell.loss = Tally(), [(100, 50.0, 60.0 if options else 50.0)]
            found.cells.append(cell)
        if options:
            found.layers.append(
                LayerRow(name, 2048, "needle", "m.0.attn", density, 0.9, 0.8, 0.7, 0.2)
            )
    found.ways[-1].failures.append(Failure(4096, "end-1", "out of [memory]"))
    found.stopped = "after 9 s, with 1 of 2 prompts done"
    return found


def test_the_file_gives_back_what_was_written(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.json"
    results.write(path)
    assert read(path) == results
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]", '{"command": 1}', None],
    ids=["empty", "object", "list", "type", "gone"],
)
def test_a_file_that_is_none_says_so(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionInvalid, match="--from must be a file written by --json"):
        read(path)


def test_a_file_of_another_schema_is_refused(results: Results, tmp_path: Path) -> None:
    results.schema = 99
    results.write(tmp_path / "results.json")
    with pytest.raises(OptionInvalid, match="schema"):
        read(tmp_path / "results.json")


def test_tables_show_everything(results: Results) -> None:
    console = Console(file=io.StringIO(), width=120)
    print_results(results, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for wanted in (
        *("2048 tokens", "needle", "end-1", "dense", "a_shape:64:256", "0/2 .00 (.00-.66)"),
        *("0.2000", "0.100", "+20.00 %", "0.6000", "0.800", "4 of 4", "2048: 2.0"),
        *("broken failed at 4096 tokens in end-1: out of [memory]", "Stopped after 9 s", "abc"),
    ):
        assert wanted in text, wanted


def test_figures_are_written(results: Results, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = draw(results, tmp_path)
    assert [path.name for path in made] == ["needle.png", "kept.png", "layers-2048.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    results.cells, results.layers = [], []
    assert draw(results, tmp_path) == []


def test_from_shows_a_file_again(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "results.json")
    console = Console(file=io.StringIO(), width=120)
    main(["--from", str(tmp_path / "results.json")], console)
    assert "a_shape:64:256" in console.file.getvalue()  # type: ignore[attr-defined]


def test_variants_stand_for_options() -> None:
    names = ["auto", "a_shape:64:4096", "vertical_slash:10", "block_retrieval", "budget=.05"]
    found = {variant.name: variant.options for variant in parse_variants(names)}
    assert found == {
        "dense": None,
        "auto": {"min_tokens": 0},
        "a_shape:64:4096": {"pattern": {"*": ("a_shape", 64, 4096)}, "min_tokens": 0},
        "vertical_slash:10": {"pattern": {"*": ("vertical_slash", 10, 0)}, "min_tokens": 0},
        "block_retrieval": {"pattern": "block_retrieval", "min_tokens": 0},
        "budget=.05": {"budget": 0.05, "min_tokens": 0},
    }
    assert {"auto", "a_shape", "vertical_slash", "block_sparse", "block_retrieval"} <= set(
        default_names()
    )
    assert parse_variants(["auto", "dense"])[0].name == "dense"
    assert parse_variants(["auto"], {"inner": "eager"})[1].options == {
        "min_tokens": 0,
        "inner": "eager",
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "a variant must be dense, auto, budget=SHARE"),
        ("dense:1", "a variant must be"),
        ("a_shape:1:2:3", "a variant must be"),
        ("a_shape:many", "a number in variant 'a_shape:many' must be an integer"),
        ("a_shape:-1", "an entry of option 'pattern'"),
        ("budget=2", "option 'budget'"),
        ("budget=x", "a number in variant"),
        ("config=/nowhere", "option 'config'"),
    ],
)
def test_a_variant_that_stands_for_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(OptionInvalid, match=message):
        parse_variants([name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "nothing"], "a variant must be"),
        (["--tasks", "nothing"], "a task of retriever must be one of needle, needles, end-1"),
        (["--tasks", "tracking"], "The retriever knows one kind of question"),
        (["--option", "inner"], "--option must be KEY=VALUE"),
        (["--option", "iner=eager"], "an option of backend"),
        (["--fill", "2"], "--fill must be in"),
        (["--model", "/no/such/model"], "--model must be retriever, or a model"),
        (["--text", "/no/such/text"], "--text must be a readable file"),
        (["--from", "/no/such/file"], "--from must be"),
        (["--tokens", "2048", "--tasks", "anywhere", "--device", "cpu"], "at least 64"),
    ],
)
def test_a_wrong_option_ends_with_a_message(arguments: list[str], message: str) -> None:
    console = Console(file=io.StringIO(), width=500)
    with pytest.raises(SystemExit) as stopped:
        main(arguments, console)
    assert stopped.value.code == 2
    assert message in console.file.getvalue()  # type: ignore[attr-defined]


def test_figures_without_matplotlib_are_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.fidelity.figures.importlib.util.find_spec", lambda name: None)
    console = Console(file=io.StringIO(), width=500)
    with pytest.raises(SystemExit):
        main(["--figures", "somewhere"], console)
    assert "pip install matplotlib" in console.file.getvalue()  # type: ignore[attr-defined]
