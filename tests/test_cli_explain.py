"""``minference explain`` on models built from configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparse_compiler.cli import app

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["explain", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_config_file_is_built_with_few_layers_and_explained(
    tmp_path: Path, attention: str
) -> None:
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=40)
    config.save_pretrained(tmp_path)
    report = tmp_path / "report.json"
    code, text = run(
        *(str(tmp_path), "--tokens", "70", "--padded"),
        *("--attention", attention, "--json", str(report)),
    )
    assert code == 0, text
    assert "2 rewritten, 0 declined" in text
    assert "causal, key padding" in text
    sites = [site for part in json.loads(report.read_text()) for site in part["sites"]]
    assert [site["decision"] for site in sites] == ["rewritten"] * 2


def test_short_prompts_are_declined_when_asked(tmp_path: Path) -> None:
    transformers.LlamaConfig(**SIZES, num_hidden_layers=2).save_pretrained(tmp_path)
    code, text = run(str(tmp_path / "config.json"), "--tokens", "64", "--min-tokens", "auto")
    assert code == 0, text
    assert "SHORT" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("no_such_model",), "no_such_model"),
        (("llama", "--attention", "flash"), "sdpa or eager"),
        (("llama", "--min-tokens", "few"), "a number or auto"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(arguments: tuple[str, ...], says: str) -> None:
    code, text = run(*arguments)
    assert code != 0
    assert says in text
