"""What is asked: prompts with the positions whose logits answer them. Tasks of the byte retriever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sparse_compiler.demo.records import (
    PLACEMENTS,
    RECORD_SIZE,
    Haystack,
    Placement,
    make_prompt,
)
from sparse_compiler.errors import OptionInvalid

__all__ = ["DEPTHS", "Item", "Task", "loss_item", "needle_depth", "retriever_tasks"]

DEPTHS = 8
"""Depths of a needle, from the beginning to just before the question."""

_NEEDLES = 8
_DIGITS = 4
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_LOSS_LOGITS = 1 << 29
"""The most logits that a loss looks at; a larger vocabulary looks at fewer positions."""


@dataclass(frozen=True, eq=False)
class Item:
    """One prompt.

    Args:
        tokens: [N] int64.
        positions: [K] int64, K >= 2, the positions whose logits are wanted.
        targets: [K] int64, the tokens that follow them; one position may stand there twice.
        group: positions of one answer, which is right when all of them are; 0 for a loss.
        answer: text to generate greedily after the prompt instead; "" where logits are judged.
        depth: of what is asked for, 0 to 1; -1 where the task has none.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    group: int = 0
    answer: str = ""
    depth: float = -1.0


@dataclass(frozen=True)
class Task:
    """A kind of prompt.

    Args:
        name: on the command line.
        single: one question a prompt, so that more prompts are needed.
        make: ``(tokens, number) -> Item``; the same arguments give the same prompt.
    """

    name: str
    single: bool
    make: Callable[[int, int], Item]


def needle_depth(number: int) -> float:
    """Depth of the needle of prompt ``number``."""
    return number % DEPTHS / (DEPTHS - 1)


def loss_item(tokens: Tensor, vocabulary: int) -> Item:
    """Next-token loss at all positions, or at evenly spread ones if the logits would be too many."""
    last = tokens.numel() - 1
    count = min(last, max(2, _LOSS_LOGITS // vocabulary))
    positions = torch.arange(count) * (last - 1) // max(1, count - 1)
    return Item(tokens, positions, tokens[positions + 1])


def retriever_tasks(fill: float, seed: int, haystack: Haystack) -> dict[str, Task]:
    """Tasks of the byte model, by name.

    Args:
        fill: share of the tokens that records fill, of the key-value tasks.
        seed: of the first prompt.
        haystack: filler.
    """

    def records(placement: Placement, tokens: int, number: int) -> Item:
        prompt = make_prompt(
            tokens, placement=placement, seed=seed + number, records=fill, haystack=haystack
        )
        return _digits_item(prompt.tokens, prompt.answer_positions)

    def needle(tokens: int, number: int) -> Item:
        return _needle_item(tokens, [needle_depth(number)], [seed, number], haystack)

    def needles(tokens: int, number: int) -> Item:
        depths = np.random.default_rng([seed, number, 1]).random(_NEEDLES)
        return _needle_item(tokens, sorted(depths.tolist()), [seed, number], haystack)

    def loss(tokens: int, number: int) -> Item:
        return loss_item(_window(haystack, tokens, number), 256)

    tasks = [Task("needle", True, needle), Task("needles", False, needles)]
    tasks += [Task(name, name == "end-1", partial(records, name)) for name in PLACEMENTS]
    return {task.name: task for task in (*tasks, Task("loss", False, loss))}


def _digits_item(tokens: Tensor, answers: Tensor, depth: float = -1.0) -> Item:
    """Questions whose digits stand at ``answers`` [Q, 4]."""
    places = answers.flatten()
    return Item(tokens, places - 1, tokens[places], _DIGITS, depth=depth)


def _window(haystack: Haystack, tokens: int, number: int) -> Tensor:
    """Window ``number`` of the text, [N]; they overlap only if the text is shorter than all of them."""
    text = np.frombuffer(haystack.text, dtype=np.uint8)
    if tokens >= text.size:
        raise OptionInvalid("--tokens", f"less than the {text.size} bytes of text", tokens)
    first = number * tokens % (text.size - tokens)
    return torch.from_numpy(text[first : first + tokens].astype(np.int64))


def _needle_item(tokens: int, depths: list[float], seed: list[int], haystack: Haystack) -> Item:
    """Records at ascending depths in the haystack, then a question about each, in random order."""
    count = len(depths)
    room = tokens - 2 * RECORD_SIZE * count
    if room < 0:
        raise OptionInvalid("--tokens", f"at least {2 * RECORD_SIZE * count} for needles", tokens)
    rng = np.random.default_rng(seed)
    keys = ["".join(rng.choice(list(_LETTERS), 4)) for _ in range(count)]
    while len(set(keys)) < count:
        keys = ["".join(rng.choice(list(_LETTERS), 4)) for _ in range(count)]
    values = [f"{value:04d}" for value in rng.integers(0, 10**_DIGITS, count)]
    start = int(rng.integers(0, len(haystack.text)))
    text = (haystack.text[start:] + haystack.text * (1 + room // len(haystack.text)))[:room]
    parts, last = [], 0
    for depth, key, value in zip(depths, keys, values, strict=True):
        place = round(depth * room)
        parts += [text[last:place], f"\n@rec {key}={value}\n".encode()]
        last = place
    parts.append(text[last:])
    order = rng.permutation(count)
    parts += [f"\n@ask {keys[n]}={values[n]}\n".encode() for n in order]
    found = torch.from_numpy(np.frombuffer(b"".join(parts), dtype=np.uint8).astype(np.int64))
    first = torch.arange(count) * RECORD_SIZE + tokens - RECORD_SIZE * count
    answers = first[:, None] + torch.arange(11, 11 + _DIGITS)
    return _digits_item(found, answers, depths[0] if count == 1 else -1.0)
