"""The model under test: how it is loaded, called, and what its answers are judged by."""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fidelity.tasks import Item, Task, retriever_tasks
from benchmarks.fidelity.text_tasks import TextTasks, matches
from sparse_compiler.demo.checkpoint import load_retriever
from sparse_compiler.demo.records import Haystack
from sparse_compiler.errors import OptionInvalid

__all__ = ["Answer", "Subject", "load_subject", "retriever"]

_DECODE_MARGIN = 3
"""Tokens generated beyond those of the answer itself, for a space or a quote before it."""
_LOSS_CHUNK = 1 << 26


@dataclass(frozen=True)
class Answer:
    """What one prompt gave.

    Args:
        right: question by question; empty for a loss.
        loss: nats, summed over ``Item.positions``; None unless a loss was asked for.
        seconds: of the one pass over the prompt; generated tokens are not timed.
    """

    right: list[bool]
    loss: float | None
    seconds: float


@dataclass
class Subject:
    """A causal language model and its tasks.

    Args:
        model: in evaluation mode, on ``device``.
        tasks: by name.
        call_options: given to every call; always the same, so that a variant compiles once.
        tokenizer: for tasks that generate text, or None.
    """

    name: str
    model: nn.Module
    tasks: dict[str, Task]
    device: torch.device
    call_options: dict[str, Any]
    haystack_sha256: str
    tokenizer: Any = None

    @property
    def dtype(self) -> str:
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def place(self, item: Item) -> Item:
        """The item with its tensors on the device; the number of positions may vary between calls."""
        tokens, positions, targets = (
            t.to(self.device) for t in (item.tokens, item.positions, item.targets)
        )
        # Every task has a number of positions of its own, and only a gather after the last layer
        # sees it: one graph serves all of them.
        torch._dynamo.mark_dynamic(positions, 0)
        return Item(tokens, positions, targets, item.group, item.answer, item.depth)

    def answer(self, run: Callable[..., Any], item: Item) -> Answer:
        """Run a placed item once and judge it; in inference mode.

        Args:
            run: the model or its compiled form.
        """
        tokens = item.tokens[None]
        self._wait()
        started = time.perf_counter()
        output: Any = run(input_ids=tokens, logits_to_keep=item.positions, **self.call_options)
        self._wait()
        seconds = time.perf_counter() - started
        logits: Tensor = getattr(output, "logits", output)[0]
        if item.group == 0:
            return Answer([], _loss(logits, item.targets), seconds)
        if item.answer:
            text = self._generate(logits, output.past_key_values, item)
            return Answer([matches(text, item.answer)], None, seconds)
        right = (logits.argmax(-1) == item.targets).view(-1, item.group).all(-1)
        return Answer(right.tolist(), None, seconds)

    def _generate(self, logits: Tensor, cache: Any, item: Item) -> str:
        """Greedy tokens after the prompt; each step is dense and reads the cache of the prefill."""
        wanted = self.tokenizer.encode(f" {item.answer}", add_special_tokens=False)
        found = [logits[-1].argmax()]
        for _ in range(len(wanted) + _DECODE_MARGIN - 1):
            output = self.model(
                input_ids=found[-1][None, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            found.append(output.logits[0, -1].argmax())
            cache = output.past_key_values
        return str(self.tokenizer.decode(torch.stack(found).tolist(), skip_special_tokens=True))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _loss(logits: Tensor, targets: Tensor) -> float:
    """Summed cross entropy, in float32, some rows at a time."""
    rows = max(1, _LOSS_CHUNK // logits.shape[-1])
    parts = [
        torch.nn.functional.cross_entropy(part.float(), wanted, reduction="sum").double()
        for part, wanted in zip(logits.split(rows), targets.split(rows), strict=True)
    ]
    return float(torch.stack(parts).sum())


def retriever(
    device: torch.device,
    *,
    fill: float,
    seed: int,
    haystack: Haystack,
    dtype: torch.dtype | None = None,
    source: Any = "auto",
) -> Subject:
    """The byte model that ships with the package; ``source`` as for ``load_retriever``."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = load_retriever(dtype, device, source)
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    return Subject(
        name="retriever",
        model=model,
        tasks=retriever_tasks(fill, seed, haystack),
        device=device,
        call_options={"use_cache": False} if takes_cache else {},
        haystack_sha256=haystack.sha256,
    )


def load_subject(
    name: str,
    device: torch.device,
    *,
    fill: float,
    seed: int,
    haystack: Haystack,
    dtype: torch.dtype | None = None,
) -> Subject:
    """``retriever``, or a causal language model of transformers by name or folder.

    Raises:
        OptionInvalid: the model cannot be loaded, or cannot give the logits of chosen positions.
    """
    if name == "retriever":
        return retriever(device, fill=fill, seed=seed, haystack=haystack, dtype=dtype)
    if importlib.util.find_spec("transformers") is None:
        raise OptionInvalid(
            "--model", "retriever where transformers is not installed", name, fix="Install it."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(Path(name)) if Path(name).is_dir() else name
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        raise OptionInvalid(
            "--model", "retriever, or a model of transformers by name or folder", name
        ) from error
    model = model.to(device).eval().requires_grad_(False)
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise OptionInvalid(
            "--model", "one whose forward takes logits_to_keep", type(model).__name__
        )
    text = haystack.text.decode("utf-8", errors="replace")
    made = TextTasks(tokenizer, text, int(model.config.vocab_size), fill, seed)
    return Subject(
        name=name,
        model=model,
        tasks=made.tasks(),
        device=device,
        call_options={"use_cache": True},
        haystack_sha256=haystack.sha256,
        tokenizer=tokenizer,
    )
