"""``minference search`` as a user runs it, and its report."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparse_compiler.cli import app
from sparse_compiler.cli_search import layers_of, read_prompts
from sparse_compiler.demo.records import make_prompt
from sparse_compiler.errors import OptionInvalid
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.search import HeadChoice, SearchResult, report
from sparse_compiler.search.published_config import load_config


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["search", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_bytes(bytes(make_prompt(2048, seed=0).tokens.tolist()))
    return path


def test_the_shipped_retriever_is_searched(tmp_path: Path, text: Path) -> None:
    output, engine = tmp_path / "best.json", tmp_path / "config.json"
    engine.write_text('{"dual_chunk_attention_config": {"chunk_size": 8}}')
    few = ["--candidates", "a_shape(16,*)", "--candidates", "block_sparse"]
    place = ["--prompt", text, "-o", output, "--embed", engine, "--layers", "0", "--device", "cpu"]
    done = _run("retriever", *place, "--budget", 0.5, *few)
    assert done.exit_code == 0, done.output
    assert str(output) in done.output
    layers = load_config(output)
    assert [len(layer) for layer in layers] == [6, 0, 0, 0]
    assert {head.name for head in layers[0].values()} <= {"a_shape", "block_sparse"}
    assert load_config(engine) == layers
    assert not list(tmp_path.glob("*.state"))


def test_a_folder_of_transformers_is_searched(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder, text, output = (tmp_path / name for name in ("model", "prompt.txt", "best.json"))
    words = {f"w{n}": n for n in range(50)} | {"[UNK]": 50}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=51,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    text.write_text(" ".join(f"w{n * n % 50}" for n in range(700)))
    options = ["--budget", 0.99, "--candidates", "a_shape(16,*)", "--tokens", 600]
    done = _run(folder, "--prompt", text, "-o", output, *options, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "600 tokens" in done.output
    assert [len(layer) for layer in load_config(output)] == [4, 4]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["retriever", "--budget", "2"], "budget"),
        (["retriever", "--budget", "0.01"], "at least"),
        (["retriever", "--layers", "1-"], "layers"),
        (["retriever", "--layers", "a"], "layers"),
        (["retriever", "--candidates", "no_such(*)"], "no_such"),
        (["retriever", "--cost", "guess"], "cost"),
        (["retriever", "--error", "loss"], "error"),
        (["retriever", "--device", "tpu"], "device"),
        (["retriever", "--dtype", "int8"], "dtype"),
        (["retriever", "--executor", "no_such"], "executor"),
        (["no/such/model"], "no/such/model"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(
    tmp_path: Path, text: Path, arguments: list[str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    done = _run(*arguments, "--prompt", text, "-o", tmp_path / "best.json", "--tokens", 600)
    assert done.exit_code == 2
    assert shown in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "best.json").exists()


def test_an_output_in_no_folder_and_an_engine_without_its_object_fail_first(
    tmp_path: Path, text: Path
) -> None:
    done = _run("retriever", "--prompt", text, "-o", tmp_path / "no" / "best.json")
    assert done.exit_code == 2
    assert "output" in done.output
    engine = tmp_path / "config.json"
    engine.write_text("{}")
    output = tmp_path / "best.json"
    done = _run("retriever", "--prompt", text, "-o", output, "--embed", engine)
    assert done.exit_code == 2
    assert "dual_chunk_attention_config" in done.output


def test_layers_are_numbers_and_ranges() -> None:
    assert layers_of("0-3,7, 2") == [0, 1, 2, 3, 7]
    assert layers_of("") is None
    for wrong in (",", "3-1", "-1", "1..2", "x"):
        with pytest.raises(OptionInvalid, match="layers"):
            layers_of(wrong)


def test_the_end_of_a_prompt_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(bytes(range(10)))
    [ids] = read_prompts([path], None, 4)
    assert ids.tolist() == [6, 7, 8, 9]
    path.write_bytes(b"x")
    with pytest.raises(OptionInvalid, match=r"prompt\.txt"):
        read_prompts([path], None, 0)
    with pytest.raises(OptionInvalid, match=r"nowhere\.txt"):
        read_prompts([tmp_path / "nowhere.txt"], None, 0)


# ---- the report --------------------------------------------------------------------------------


def _result(*, maps: bool = True) -> SearchResult:
    mass = bytes([128]) + bytes(
        255 if r == c else int(c < r) for r in range(128) for c in range(128)
    )
    kept = bytes([128]) + bytes(255 * (r - c < 20) for r in range(128) for c in range(128))
    choice = HeadChoice(
        HeadPattern("a_shape", 16, 300),
        "a_shape(16,*)",
        0.125,
        0.35,
        0.33,
        {"a_shape(16,*)": 0.125, "block_sparse(*,0)": 0.5},
        (mass, kept) if maps else None,
    )
    return SearchResult(({}, dict.fromkeys(range(9), choice)), 0.4, (2048,), "output", ("<note>",))


def test_the_report_is_one_page_with_everything_in_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.html"
    report.write_report(_result(), path, "Search of <b>")
    page = path.read_text()
    for part in ("Layer 1", "a_shape(16, 300)", "0.1250", "0.350", "&lt;note&gt;", "&lt;b&gt;"):
        assert part in page
    assert "Layer 0" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    [picture] = re.findall(r"base64,([^\"]+)\"", page)
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    report.write_report(_result(), path, "Search of <b>")
    assert path.read_text() == page


def test_without_matplotlib_a_report_is_refused_before_the_search(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = report.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name == "matplotlib" else find(name, *more),
    )
    output = tmp_path / "best.json"
    done = _run("retriever", "--prompt", text, "-o", output, "--report", tmp_path / "r.html")
    assert done.exit_code == 2
    assert "sparse-compiler[docs]" in done.output
    assert list(tmp_path.iterdir()) == [text]


def test_a_result_without_maps_gives_no_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(OptionInvalid, match="maps"):
        report.write_report(_result(maps=False), tmp_path / "r.html", "x")


def test_the_written_scores_are_json_numbers(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    _result().save(path)
    assert json.loads(path.read_text())[1]["0"] == ["stream_llm", 16, 300, 0.875]
