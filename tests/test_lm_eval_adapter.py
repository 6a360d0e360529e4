"""The adapter for lm-evaluation-harness, with and without the harness."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import lm_eval_adapter as adapter
import local_tasks

import sparse_compiler
from sparse_compiler.errors import OptionInvalid

ROOT = Path(__file__).parents[1]
TASK = ROOT / "benchmarks" / "tasks" / "records.yaml"


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def retriever(**options: Any) -> tuple[Any, Any]:
    given = {"inner": "eager", "min_tokens": 0, **options}
    return adapter.load_model({"pretrained": "retriever", **given})


def test_model_arguments_are_read_as_the_harness_reads_them() -> None:
    text = "pretrained=a/b,pattern=auto,min_tokens=8192,budget=0.25,dryrun=True,config=None,x=a=b"
    assert adapter.parse_model_args(text) == {
        "pretrained": "a/b",
        "pattern": "auto",
        "min_tokens": 8192,
        "budget": 0.25,
        "dryrun": True,
        "config": None,
        "x": "a=b",
    }
    assert adapter.parse_model_args("") == {}
    with pytest.raises(OptionInvalid, match="name=value"):
        adapter.parse_model_args("pretrained")


def test_options_go_to_the_backend_and_the_rest_to_the_harness() -> None:
    arguments = {"pretrained": "m", "dtype": "bfloat16", "pattern": "a_shape", "dynamic": True}
    options, rest = adapter.split_options(arguments)
    assert options == {"pattern": "a_shape", "dynamic": True}
    assert rest == {"pretrained": "m", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": "retriever", "batch_size": 8}, "batch_size of model 'minference'"),
        ({"pretrained": "retriever", "batch_size": "auto"}, "batch_size of model 'minference'"),
        ({"pretrained": "retriever", "patern": "auto"}, "patern"),
        ({"pattern": "auto"}, "pretrained"),
        ({"pretrained": "retriever", "budget": 2}, "budget"),
        ({"pretrained": "retriever", "pattern": "diagonal"}, "option 'pattern'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionInvalid, match=message):
        adapter.load_model(arguments)


def test_bytes_are_tokens() -> None:
    tokenizer = adapter.byte_tokenizer()
    text = "\n@ask abcd=1234\n\tß – \x7f€ "
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert bytes(tokens) == text.encode()
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert len(tokenizer) == 256
    every = [*range(1, 256)]
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(every)) == every


def test_task_has_twenty_questions_with_their_records() -> None:
    task = local_tasks.load_task(TASK)
    assert (task.name, task.until, task.max_gen_toks) == ("minference_records", ("\n",), 8)
    items = list(local_tasks.load_items(task))
    assert len(items) == 20
    for item in items:
        question = item.text[-11:]
        assert question.startswith("\n@ask ") and question.endswith("=")
        assert item.text.count(f"\n@rec {question[6:10]}={item.target}\n") == 1


@pytest.mark.parametrize("options", [{"pattern": "dense"}, {"budget": 0.7}, {}])
def test_the_twenty_are_answered(options: dict[str, Any]) -> None:
    model, tokenizer = retriever(**options)
    found = adapter.evaluate(model, tokenizer, local_tasks.load_task(TASK))
    assert found["items"] == 20
    assert found["exact_match"] == 1.0
    if options.get("pattern") == "dense":
        assert found["density"] is None
    else:
        assert found["density"] < 0.6


def test_loglikelihood_equals_the_models_own() -> None:
    model, tokenizer = retriever(budget=1.0)
    plain: Any = adapter.load_retriever(torch.float32, source="transformers")
    item = next(local_tasks.load_items(local_tasks.load_task(TASK)))
    context = tokenizer(item.text).input_ids
    for answer, likely in ((item.target, True), ("0" * 4, False)):
        wanted = tokenizer(answer).input_ids
        score, greedy = adapter.loglikelihood(model, context, wanted)
        with torch.inference_mode():
            logits = plain(input_ids=torch.tensor([context + wanted])).logits[0]
        rows = logits.log_softmax(-1)[len(context) - 1 : -1]
        expected = sum(float(row[token]) for row, token in zip(rows, wanted, strict=True))
        assert score == pytest.approx(expected, abs=1e-2)
        assert greedy is likely
    assert sparse_compiler.stats(model)
    with pytest.raises(ValueError, match="at least one token"):
        adapter.loglikelihood(model, context, [])


def test_generation_stops_at_a_text_or_at_the_limit() -> None:
    model, tokenizer = retriever(pattern="dense")
    item = next(local_tasks.load_items(local_tasks.load_task(TASK)))
    answer = item.target
    last = answer[-1]

    def generate(**more: Any) -> str:
        return adapter.generate_until(model, tokenizer, item.text, **more)

    assert generate(max_gen_toks=3) == answer[:3]
    assert generate(until=["\n"]) == answer
    assert generate(until=["nowhere", last], max_gen_toks=4) == answer[: answer.index(last)]
    with pytest.raises(ValueError, match="without tokens"):
        adapter.generate_until(model, tokenizer, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_type": "multiple_choice"}, "output_type"),
        ({"dataset_path": "squad"}, "dataset_path"),
        ({"doc_to_text": None}, "doc_to_text"),
        ({"filter_list": [{"name": "x"}]}, "filter_list"),
        ({"generation_kwargs": {"temperature": 0.7}}, "generation_kwargs"),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "data file"),
        ({"dataset_kwargs": {}}, "data_files"),
    ],
)
def test_tasks_that_need_the_harness_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    import yaml

    path = tmp_path / "task.yaml"
    path.write_text(json.dumps(yaml.safe_load(TASK.read_text()) | change))
    with pytest.raises(OptionInvalid, match=message):
        local_tasks.load_task(path)


def test_a_function_in_a_task_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text("task: x\ndoc_to_text: !function utils.text\n")
    with pytest.raises(OptionInvalid, match="plain YAML"):
        local_tasks.load_task(path)


def test_data_may_lie_beside_the_task(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text('{"context": "c", "key": "k", "value": "v"}\n')
    (tmp_path / "task.yaml").write_text(
        TASK.read_text().replace("benchmarks/tasks/records.jsonl", "elsewhere/records.jsonl")
    )
    assert list(local_tasks.load_items(local_tasks.load_task(tmp_path / "task.yaml"))) == [
        local_tasks.Item("c\n@ask k=", "v")
    ]


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed and takes over"
)
def test_local_tasks_run_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "pretrained=retriever,min_tokens=0,inner=eager"
    adapter.main(["--tasks", str(TASK), "--model_args", arguments, "--limit", "2"])
    found = json.loads(capsys.readouterr().out)
    assert (found["items"], found["exact_match"]) == (2, 1.0)
    assert found["density"] < 0.7


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_the_harness_runs_the_task() -> None:
    lm_eval: Any = importlib.import_module("lm_eval")
    tasks: Any = importlib.import_module("lm_eval.tasks")
    adapter.register()
    found = lm_eval.simple_evaluate(
        model="minference",
        model_args="pretrained=retriever,min_tokens=0,inner=eager",
        tasks=["minference_records"],
        task_manager=tasks.TaskManager(include_path=str(TASK.parent), include_defaults=False),
        bootstrap_iters=0,
    )
    scores = found["results"]["minference_records"]
    assert scores["exact_match,none"] == 1.0
