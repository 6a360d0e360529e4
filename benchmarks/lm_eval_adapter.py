"""Sparse prefill under lm-evaluation-harness: the model name ``minference``.

With lm_eval installed all its tasks run whose data are at hand (RULER, LongBench, InfiniteBench),
with the options of the backend among the model's arguments::

    python benchmarks/lm_eval_adapter.py --model minference --tasks ruler \\
        --model_args pretrained=MODEL,pattern=auto,min_tokens=8192 \\
        --metadata '{"max_seq_lengths": [32768]}'
    python benchmarks/lm_eval_adapter.py --model minference --device cpu \\
        --tasks minference_records --include_path benchmarks/tasks \\
        --model_args pretrained=retriever,min_tokens=0,inner=eager

Without it, generation tasks whose data are a local JSON-lines file::

    python benchmarks/lm_eval_adapter.py --tasks benchmarks/tasks/records.yaml \\
        --model_args pretrained=retriever,min_tokens=0,inner=eager

``pretrained=retriever`` is the model that ships with the package. ``pattern=dense`` compares; only
names of patterns can be written there, tables and ``inner_options`` only from Python.

The batch size is 1. Where the harness scores continuations it pads the shorter rows of a batch on
the right without a mask, and sparse attention would choose keys from rows of padding.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from local_tasks import MAX_NEW_TOKENS, Task, load_items, load_task
from torch import Tensor, nn

import sparse_compiler
from sparse_compiler.config import SparseConfig
from sparse_compiler.demo.checkpoint import load_retriever
from sparse_compiler.errors import OptionInvalid

__all__ = [
    "byte_tokenizer",
    "check_batch_size",
    "evaluate",
    "generate_until",
    "load_model",
    "loglikelihood",
    "main",
    "parse_model_args",
    "register",
    "split_options",
]

RETRIEVER = "retriever"
END_OF_TEXT = "<|end|>"
_OPTIONS = (*(field.name for field in fields(SparseConfig)), "dynamic")


# Model arguments


def parse_model_args(text: str) -> dict[str, Any]:
    """``a=1,b=x`` as the harness reads it: numbers, true, false and none become values.

    Raises:
        OptionInvalid: a part without ``=``.
    """
    found = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise OptionInvalid("a model argument", "of the form name=value", part)
        found[name.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def split_options(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The backend's options (and ``dynamic``, of torch.compile), and what is left for the harness.

    Args:
        arguments: model arguments by name.
    """
    options = {name: value for name, value in arguments.items() if name in _OPTIONS}
    return options, {k: v for k, v in arguments.items() if k not in options}


def check_batch_size(batch_size: Any) -> None:
    """Raises: OptionInvalid: it is not 1; see the module's text."""
    if str(batch_size) != "1":
        raise OptionInvalid(
            "batch_size of model 'minference'",
            "1",
            batch_size,
            fix="The harness pads batches on the right without a mask.",
        )


# The model


def byte_tokenizer() -> Any:
    """A transformers tokenizer whose token numbers are the bytes of the text, for the retriever.

    Byte 0 stands for the end of a text, so that texts with NUL characters cannot be encoded.
    """
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    # ByteLevel writes printable bytes as themselves and the others as letters from 256 on.
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    names = [chr(b) if b in plain else chr(next(others)) for b in range(256)]
    names[0] = END_OF_TEXT
    tokenizer = Tokenizer(BPE({name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_model(arguments: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """A model whose forward is compiled by the backend, and its tokenizer; without the harness.

    Args:
        arguments: ``pretrained``, optionally ``device``, and the backend's options.
    Raises:
        OptionInvalid: ``pretrained`` is missing, an argument is unknown, or an option is wrong.
    """
    options, rest = split_options(arguments)
    pretrained = rest.pop("pretrained", None)
    device = rest.pop("device", None) or "cpu"
    check_batch_size(rest.pop("batch_size", 1))
    if rest or pretrained is None:
        raise OptionInvalid(
            "a model argument",
            f"pretrained, device, batch_size or one of {', '.join(_OPTIONS)}, and pretrained given",
            sorted(rest) or None,
            fix="With lm_eval installed its own model arguments work too.",
        )
    if pretrained == RETRIEVER:
        model = load_retriever(torch.float32, device, "transformers")
        tokenizer = byte_tokenizer()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model: Any = AutoModelForCausalLM.from_pretrained(pretrained)
        model = model.eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(pretrained)
    return sparse_compiler.compile(model, **options), tokenizer


@torch.inference_mode()
def loglikelihood(
    model: Any, context: Sequence[int], continuation: Sequence[int]
) -> tuple[float, bool]:
    """How likely a continuation is.

    Args:
        model: from `load_model`.
        context, continuation: token numbers, at least one each.
    Returns:
        The sum of the tokens' log-probabilities, and whether each is the most likely one.
    Raises:
        ValueError: one of them is empty.
    """
    if not context or not continuation:
        raise ValueError("context and continuation need at least one token each")
    device = next(model.parameters()).device
    tokens = torch.tensor([[*context, *continuation]], device=device)
    wanted = tokens[0, len(context) :]
    logits = model(input_ids=tokens[:, :-1], logits_to_keep=len(continuation)).logits[0]
    scores = logits.float().log_softmax(-1)
    chosen = scores.gather(1, wanted[:, None])
    return float(chosen.sum()), bool((scores.argmax(-1) == wanted).all())


@torch.inference_mode()
def generate_until(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    until: Sequence[str] = (),
    max_gen_toks: int = MAX_NEW_TOKENS,
) -> str:
    """Continue a text greedily: one sparse prefill, then dense decode.

    Args:
        model, tokenizer: from `load_model`.
        until: texts that end the answer and do not belong to it.
        max_gen_toks: at most so many tokens.
    Raises:
        ValueError: the text has no tokens.
    """
    device = next(model.parameters()).device
    tokens: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    if not tokens.numel():
        raise ValueError("a text without tokens cannot be continued")
    output = model(input_ids=tokens.to(device), use_cache=True, logits_to_keep=1)
    found: list[int] = []
    answer = ""
    while True:
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        if int(token) == tokenizer.eos_token_id:
            return answer
        found.append(int(token))
        answer = tokenizer.decode(found)
        ends = [answer.index(stop) for stop in until if stop in answer]
        if ends:
            return answer[: min(ends)]
        if len(found) >= max_gen_toks:
            return answer
        output = model(input_ids=token, past_key_values=output.past_key_values)


def evaluate(
    model: nn.Module, tokenizer: Any, task: Task, limit: int | None = None
) -> dict[str, Any]:
    """Answer the items of a task, exactly or not.

    Args:
        limit: only so many items.
    Returns:
        ``task``, ``items``, ``exact_match`` (a share) and ``density``, the mean over the layers of
        the last prompt, or None where nothing ran sparse.
    """
    items = list(load_items(task))[:limit]
    right = sum(
        generate_until(
            model, tokenizer, item.text, until=task.until, max_gen_toks=task.max_gen_toks
        )
        == item.target
        for item in items
    )
    newest = {layer.layer: layer for layer in sparse_compiler.stats(model)}.values()
    density = sum(layer.mean_density for layer in newest) / len(newest) if newest else None
    return {
        "task": task.name,
        "items": len(items),
        "exact_match": right / max(1, len(items)),
        "density": density,
    }


# The harness


def register() -> type:
    """Make the name ``minference`` known to lm_eval, which must be installed; returns the class."""
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    class MinferenceLM(HFLM):
        """The harness's model with its forward compiled: prefill sparse, decode dense."""

        def __init__(self, pretrained: Any, batch_size: Any = 1, **arguments: Any) -> None:
            options, rest = split_options(arguments)
            check_batch_size(batch_size)
            if pretrained == RETRIEVER:
                device = rest.get("device") or "cpu"
                pretrained = load_retriever(torch.float32, device, "transformers")
                rest["tokenizer"] = byte_tokenizer()
            super().__init__(pretrained=pretrained, batch_size=batch_size, **rest)
            sparse_compiler.compile(self.model, **options)

    return register_model("minference")(MinferenceLM)


def main(arguments: Sequence[str] | None = None) -> None:
    """Hand over to the harness where it is installed, else run local tasks."""
    if importlib.util.find_spec("lm_eval") is not None:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

        register()
        if arguments is not None:
            sys.argv = [sys.argv[0], *arguments]
        cli_evaluate()
        return
    parser = argparse.ArgumentParser(description="Local tasks; lm_eval is not installed.")
    parser.add_argument("--model", default="minference", choices=["minference"])
    parser.add_argument("--model_args", default=f"pretrained={RETRIEVER}")
    parser.add_argument("--tasks", type=Path, nargs="+", required=True, help="YAML files")
    parser.add_argument("--limit", type=int)
    given = parser.parse_args(arguments)
    model, tokenizer = load_model(parse_model_args(given.model_args))
    for path in given.tasks:
        print(json.dumps(evaluate(model, tokenizer, load_task(path), given.limit)))


if __name__ == "__main__":
    main()
