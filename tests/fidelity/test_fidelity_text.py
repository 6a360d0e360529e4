"""Text tasks with a byte tokenizer and a tiny Llama that is made here."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks.fidelity.cli import main
from benchmarks.fidelity.results import read
from benchmarks.fidelity.subjects import Subject
from benchmarks.fidelity.tasks import Item
from benchmarks.fidelity.text_tasks import TextTasks, matches
from sparse_compiler.errors import OptionInvalid

transformers = pytest.importorskip("transformers")

TEXT = "def filler(number):\n    return number + 1\n\n" * 400


def byte_tokenizer(start: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if start:
        made.add_special_tokens(["<s>"])
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module")
def maker() -> TextTasks:
    return TextTasks(byte_tokenizer(start=True), TEXT, 257, 0.25, 0)


@pytest.mark.parametrize("name", ["needle", "needles", "key-value", "tracking", "loss"])
def test_prompts_have_exactly_the_length_asked_for(maker: TextTasks, name: str) -> None:
    make = maker.tasks()[name].make
    for tokens in (1024, 2001):
        item = make(tokens, 3)
        assert item.tokens.shape == (tokens,)
        assert int(item.tokens[0]) == 256 and not (item.tokens[1:] == 256).any()
        assert torch.equal(item.tokens, make(tokens, 3).tokens)
        assert not torch.equal(item.tokens, make(tokens, 4).tokens)


def text_of(maker: TextTasks, item: Item) -> str:
    return str(maker.tokenizer.decode(item.tokens.tolist(), skip_special_tokens=True))


def test_questions_can_be_answered_from_the_prompt(maker: TextTasks) -> None:
    tasks = maker.tasks()
    for number in range(6):
        for name, statement, count in (
            ("needle", r"The secret number of (\w+) is (\d+)\.", 1),
            ("needles", r"The secret number of (\w+) is (\d+)\.", 4),
            ("key-value", r"\nrecord (\w+): (\d+)\n", None),
        ):
            item = tasks[name].make(2048, number)
            text = text_of(maker, item)
            facts = dict(re.findall(statement, text))
            asked = re.search(r"(\w+)(?: is|:)$", text)
            assert asked is not None and facts[asked.group(1)] == item.answer
            assert count is None or len(facts) == count
        assert len(facts) == 2048 // 4 // len("\nrecord bababa: 1234567\n")


def test_tracked_variables_lead_to_the_answer(maker: TextTasks) -> None:
    for number in range(6):
        item = maker.tasks()["tracking"].make(1500, number)
        text = text_of(maker, item)
        assignments = dict(re.findall(r"\nVAR (\w+) = (?:VAR )?(\w+)\n", text))
        assert len(assignments) == 12
        value = text.rsplit("VAR ", 1)[1].removesuffix(" =")
        hops = 0
        while not value.isdigit():
            assert text.index(f"VAR {value} =") < text.rindex("Question")
            value, hops = assignments[value], hops + 1
        assert value == item.answer and hops == 4


def test_a_prompt_that_does_not_fit_is_refused(maker: TextTasks) -> None:
    with pytest.raises(OptionInvalid, match="--tokens must be at least"):
        maker.tasks()["needle"].make(64, 0)
    with pytest.raises(OptionInvalid, match="tokens of the filler text"):
        maker.tasks()["loss"].make(1 << 20, 0)


@pytest.mark.parametrize(
    ("generated", "right"),
    [
        ("1234567", True),
        (" 1234567.\n", True),
        (' "1234567"', True),
        ("12345678", False),
        ("7 1234567", False),
        ("", False),
        ("123456", False),
    ],
)
def test_an_answer_must_be_the_number_itself(generated: str, right: bool) -> None:
    assert matches(generated, "1234567") is right


class _Scripted(nn.Module):
    """Says a text byte by byte; a prefill gives its first byte."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.script = tokenizer.encode(text, add_special_tokens=False)

    def forward(self, input_ids: torch.Tensor, logits_to_keep: Any, **rest: Any) -> Any:
        step = 0 if rest.get("past_key_values") is None else rest["past_key_values"]
        if step:
            assert int(input_ids) == self.script[step - 1]
        logits = torch.nn.functional.one_hot(torch.tensor(self.script[step]), 257).float()
        output = type("Output", (), {})()
        output.logits, output.past_key_values = logits.expand(1, 2, 257), step + 1
        return output


@pytest.mark.parametrize(("said", "right"), [(" 1234567\n\n", True), (" 1234568\n\n", False)])
def test_generated_answers_are_judged(maker: TextTasks, said: str, right: bool) -> None:
    model = _Scripted(said + "....", maker.tokenizer)
    subject = Subject("scripted", model, {}, torch.device("cpu"), {}, "", maker.tokenizer)
    item = maker.tasks()["needle"].make(512, 0)
    item = Item(item.tokens, item.positions, item.targets, 1, "1234567")
    assert subject.answer(model, subject.place(item)).right == [right]


def test_a_model_of_a_folder_runs_from_the_command_line(tmp_path: Path) -> None:
    byte_tokenizer(start=False).save_pretrained(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    console = Console(file=io.StringIO(), width=120)
    arguments = ["--model", str(tmp_path), "--device", "cpu", "--tokens", "1024", "--prompts", "1"]
    arguments += ["--single-prompts", "2", "--variants", "a_shape:16:64", "--layers"]
    arguments += ["--option", "inner=eager", "--tasks", "tracking,loss"]
    main([*arguments, "--json", str(tmp_path / "results.json")], console)
    results = read(tmp_path / "results.json")
    assert [(c.task, c.variant, c.prompts) for c in results.cells] == [
        ("tracking", "dense", 2),
        ("tracking", "a_shape:16:64", 2),
        ("loss", "dense", 1),
        ("loss", "a_shape:16:64", 1),
    ]
    way = results.way("a_shape:16:64")
    assert (way.sites, way.rewritten, way.graphs, way.failures) == (2, 2, 1, [])
    assert len(results.layers) == 2 and results.stopped == ""
    loss, sparse_loss = results.cell("loss", 1024, "a_shape:16:64").mean_loss or (0, 0)
    assert 5 < loss < 7 and sparse_loss != loss
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "dense: 0 right" in text and "2 of 2" in text
