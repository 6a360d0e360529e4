"""Tasks in plain text for any causal model with a tokenizer, put together in tokens.

Pieces are tokenized on their own and spliced into tokenized filler, so that a prompt has exactly the
length asked for. No chat template is used: prompts are to be continued, as base models do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.fidelity.tasks import Item, Task, loss_item, needle_depth
from sparse_compiler.errors import OptionInvalid

__all__ = ["TextTasks", "matches"]

_NEEDLES = 4
_CHAINS = 3
_HOPS = 4
_CHARACTERS_A_TOKEN = 6
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def matches(generated: str, answer: str) -> bool:
    """Whether generated text begins with the number that is asked for, and not with a longer one."""
    text = generated.lstrip(" \t\n:=\"'")
    rest = text[len(answer) : len(answer) + 1]
    return text.startswith(answer) and not rest.isdigit()


@dataclass
class TextTasks:
    """Makes prompts of one tokenizer.

    Args:
        tokenizer: of transformers.
        text: filler.
        vocabulary: of the model.
        fill: share of the tokens that records fill, of ``key-value``.
        seed: of the first prompt.
    """

    tokenizer: Any
    text: str
    vocabulary: int
    fill: float
    seed: int
    _filler: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, np.int64))
    _characters: int = 0

    def tasks(self) -> dict[str, Task]:
        """Tasks by name."""
        made = [
            Task("needle", True, self._needle),
            Task("needles", True, self._needles),
            Task("key-value", True, self._key_value),
            Task("tracking", True, self._tracking),
            Task("loss", False, self._loss),
        ]
        return {task.name: task for task in made}

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _start(self) -> list[int]:
        """What the tokenizer puts before every text, e.g. its token of the beginning."""
        plain = self._encode("a")
        whole = list(self.tokenizer.encode("a"))
        at = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
        return whole[:at]

    def _rng(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, number])

    def _fill(self, count: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        """``count`` tokens of filler from a random place."""
        wanted = max(_CHARACTERS_A_TOKEN * (count + 1), 4096)
        while self._filler.size <= count:
            # Longer until it is enough: how many characters a token holds is the tokenizer's matter.
            if self._characters >= len(self.text):
                raise OptionInvalid(
                    "--tokens",
                    f"less than the {self._filler.size} tokens of the filler text",
                    count,
                    fix="Give a longer text with --text.",
                )
            self._characters = min(wanted, len(self.text))
            self._filler = np.array(self._encode(self.text[: self._characters]), np.int64)
            wanted *= 2
        first = int(rng.integers(0, self._filler.size - count))
        return self._filler[first : first + count]

    def _name(self, rng: np.random.Generator) -> str:
        letters = [rng.choice(list(_CONSONANTS if n % 2 == 0 else _VOWELS)) for n in range(6)]
        return "".join(letters)

    def _names(self, count: int, rng: np.random.Generator) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            found[self._name(rng)] = None
        return list(found)

    def _splice(
        self,
        tokens: int,
        rng: np.random.Generator,
        pieces: Sequence[tuple[float, list[int]]],
        question: str,
        answer: str,
        depth: float = -1.0,
    ) -> Item:
        """Filler with pieces at ascending depths, then the question."""
        start, end = self._start(), self._encode(question)
        room = tokens - len(start) - len(end) - sum(len(piece) for _, piece in pieces)
        if room < 0:
            raise OptionInvalid("--tokens", f"at least {tokens - room} for this task", tokens)
        filler = self._fill(room, rng)
        parts, last = [np.array(start, np.int64)], 0
        for place_of, piece in pieces:
            place = round(place_of * room)
            parts += [filler[last:place], np.array(piece, np.int64)]
            last = place
        parts += [filler[last:], np.array(end, np.int64)]
        made = torch.from_numpy(np.concatenate(parts))
        twice = torch.full((2,), tokens - 1)
        return Item(made, twice, torch.zeros(2, dtype=torch.int64), 1, answer, depth)

    def _needle(self, tokens: int, number: int) -> Item:
        rng, depth = self._rng(number), needle_depth(number)
        return self._asked_needle(tokens, rng, [depth], depth)

    def _needles(self, tokens: int, number: int) -> Item:
        rng = self._rng(number)
        return self._asked_needle(tokens, rng, sorted(rng.random(_NEEDLES).tolist()), -1.0)

    def _asked_needle(
        self, tokens: int, rng: np.random.Generator, depths: list[float], depth: float
    ) -> Item:
        names = self._names(len(depths), rng)
        values = [str(value) for value in rng.integers(10**6, 10**7, len(depths))]
        asked = int(rng.integers(len(depths)))
        pieces = [
            (at, self._encode(f"\nThe secret number of {name} is {value}.\n"))
            for at, name, value in zip(depths, names, values, strict=True)
        ]
        question = (
            f"\nQuestion: What is the secret number of {names[asked]}?\n"
            f"Answer: The secret number of {names[asked]} is"
        )
        return self._splice(tokens, rng, pieces, question, values[asked], depth)

    def _key_value(self, tokens: int, number: int) -> Item:
        rng = self._rng(number)
        size = len(self._encode("\nrecord bababa: 1234567\n"))
        count = max(1, int(self.fill * tokens) // size)
        names = self._names(count, rng)
        values = [str(value) for value in rng.integers(10**6, 10**7, count)]
        texts = [f"\nrecord {n}: {v}\n" for n, v in zip(names, values, strict=True)]
        pieces = list(
            zip(np.sort(rng.random(count)).tolist(), map(self._encode, texts), strict=True)
        )
        asked = names[int(rng.integers(count))]
        question = f"\nQuestion: What is the number of record {asked}?\nAnswer: record {asked}:"
        return self._splice(tokens, rng, pieces, question, values[names.index(asked)])

    def _tracking(self, tokens: int, number: int) -> Item:
        """Chains of assignments; the question asks for the value at the end of one of them."""
        rng = self._rng(number)
        names = np.array(self._names(_CHAINS * _HOPS, rng)).reshape(_CHAINS, _HOPS)
        values = [str(value) for value in rng.integers(10**4, 10**5, _CHAINS)]
        pieces: list[tuple[float, list[int]]] = []
        for chain, value in zip(names.tolist(), values, strict=True):
            sources = [value, *(f"VAR {name}" for name in chain[:-1])]
            places = np.sort(rng.random(_HOPS)).tolist()
            for at, name, source in zip(places, chain, sources, strict=True):
                pieces.append((at, self._encode(f"\nVAR {name} = {source}\n")))
        asked = int(rng.integers(_CHAINS))
        last = names[asked, -1]
        question = (
            f"\nQuestion: Following the assignments above, what number does VAR {last} hold?\n"
            f"Answer: VAR {last} ="
        )
        return self._splice(
            tokens, rng, sorted(pieces, key=lambda piece: piece[0]), question, values[asked]
        )

    def _loss(self, tokens: int, number: int) -> Item:
        start = self._start()
        body = self._fill(tokens - len(start), self._rng(number))
        made: Tensor = torch.from_numpy(np.concatenate([np.array(start, np.int64), body]))
        return loss_item(made, self.vocabulary)
