"""Random mask programs as Python text: the spellings of models, and things that are nearly so.

A program is a function of (q, k, pad, ids, off, table): query [B, 4, Lq, 8], key [B, 2, Lk, 8],
padding int64 [B, Lk] of zeros and ones, ids int64 [B, Lk], a 0-d int64, and a float table [32, 4].
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

ROWS = "torch.arange(q.shape[2])[None, None, :, None]"
KEYS = "torch.arange(k.shape[2])[None, None, None, :]"
LOW = "torch.finfo(torch.float32).min"
FULL = "expand(q.shape[0], 1, q.shape[2], k.shape[2])"
RELATIONS = ("le", "lt", "ge", "gt", "eq", "ne")
# Places of rows and keys; the last three are numbers that only the run knows.
BASES = (
    *(ROWS, ROWS, KEYS, KEYS, f"({ROWS} + (k.shape[2] - q.shape[2]))"),
    *("torch.zeros((), dtype=torch.long)", "off", "pad.sum(-1)[:, None, None, None]"),
)
PADDINGS = (
    "pad.bool()[:, None, None, :]",
    "(pad != 0)[:, None, None]",
    "(pad == 1).view(pad.shape[0], 1, 1, pad.shape[1])",
    "pad.roll(1, 1).bool()[:, None, None]",
    "(pad.bool() & (ids > 0))[:, None, None]",
    f"pad.to(torch.bool)[torch.arange(q.shape[0])[:, None, None, None], {KEYS}]",
    "torch.nn.functional.pad(pad, (0, 2)).bool()[:, None, None, : k.shape[2]]",
    "torch.nn.functional.pad(pad, (2, 0)).bool()[:, None, None, 2:]",
)
# Monotone ids, and ids that only look like it.
IDS = (
    "(ids != 1).cumsum(-1)",
    "pad.bool().cumsum(-1)",
    "(ids.diff(prepend=ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)",
    "(ids == 0).long().cumsum(-1).to(torch.int32)",
    "(ids == 0).long().cumsum(1) - 1",
    "ids",
    "ids.cumsum(-1)",
    "(ids != 1).cumsum(0)",
    "(ids != 1).cumsum(-1).flip(-1)",
    "(ids != 1).cumsum(-1) % 2",
    "-(ids != 1).cumsum(-1)",
)


class Grammar:
    """Makes programs from a source of random choices.

    Args:
        chance: `random.Random` or one of Hypothesis's.
        square: rows and keys are as many, so that packed documents may occur.
    """

    def __init__(self, chance: random.Random, square: bool) -> None:
        self.chance, self.square = chance, square

    def program(self) -> str:
        """The list of (kind, tensor) as text."""
        terms = [self._term() for _ in range(self.chance.choice((1, 1, 1, 2)))]
        return f"[{', '.join(terms)}]"

    def _term(self) -> str:
        form = self.chance.choice(
            ("keep", "keep", "expand", "drop", "where", "fill", "product", "sum", "bias", "hidden")
        )
        mask = self.mask(self.chance.choice((1, 2, 2, 3)))
        if form in ("keep", "drop"):
            return f"('{form}', {mask})"
        if form == "expand":
            return f"('keep', {mask}.{FULL})"
        if form == "where":
            low = self.chance.choice((LOW, "-float('inf')", "-1e31", "-3.0"))
            return f"('add', torch.where({mask}, 0.0, {low}))"
        if form == "fill":
            zeros = f"torch.zeros(1, 1, 1, k.shape[2]).{FULL}"
            return f"('add', {zeros}.masked_fill(~{mask}, -float('inf')))"
        if form == "product":
            return f"('add', (1.0 - {mask}.float()) * {LOW})"
        other = self.mask(1)
        if form == "sum":
            return f"('add', torch.where({mask}, 0.0, {LOW}) + (1.0 - {other}.float()) * {LOW})"
        bias = self._bias()
        if form == "bias":
            return f"('add', {bias} + torch.where({mask}, 0.0, {LOW}))"
        return f"('add', ({bias}).masked_fill(~{mask}, {LOW}))"

    def _bias(self) -> str:
        distance = f"({KEYS} - {ROWS})"
        head = "table[0][None, :, None, None]"
        buckets = f"({distance}.abs().clamp(max=8) + ({distance} > 0).long() * 9)[0, 0]"
        large = f"(torch.log({distance}.abs().float() / 2 + 1) * 3).to(torch.long).clamp(max=31)"
        return self.chance.choice(
            (
                f"{head} * {distance}",
                f"{head} * {KEYS}",
                f"{head} * {distance}.abs()",
                f"torch.nn.functional.embedding({buckets}, table).permute(2, 0, 1)[None]",
                f"table[{large}[0, 0]].permute(2, 0, 1)[None]",
                f"{head} * pad.float()[:, None, None]",
                f"{head} * (pad.cumsum(-1) * pad)[:, None, None]",
                f"{head} * ({KEYS} * {ROWS})",
                f"{head} * {ROWS}",
                f"{head} * (ids[:, None, None] - {ROWS}).float()",
                f"{head} * torch.where({distance} > 1, 2.0, 0.5)",
                f"{head} * (({KEYS} - 3) / 7)",
            )
        )

    def mask(self, depth: int) -> str:
        """A bool mask [1 or B, 1, Lq or 1, Lk or 1]."""
        if depth <= 1:
            return self._atom()
        kind = self.chance.choice(
            ("and", "and", "and", "or", "not", "where", "merge", "numbers", "shared")
        )
        first = self.mask(depth - 1)
        if kind == "and":
            return f"({first} & {self.mask(depth - 1)})"
        if kind == "or":
            return f"torch.logical_or({first}, {self.mask(depth - 1)})"
        if kind == "not":
            return f"(~{first})"
        if kind == "where":
            return f"torch.where({self._atom()}, {first}, {self.mask(depth - 1)})"
        if kind == "merge":
            merged = f"{first}.{FULL}.transpose(-1, -2).flatten(1)"
            return f"{merged}.view(-1, 1, k.shape[2], q.shape[2]).mT"
        if kind == "numbers":
            return f"((1 - {first}.long()) == 0)"
        padding = self.chance.choice(PADDINGS)
        return f"(({first} & {padding}) | ({self.mask(depth - 1)} & {padding}))"

    def _atom(self) -> str:
        choice = self.chance.choice
        offset, width = self.chance.randint(-3, 4), self.chance.randint(1, 5)
        left = choice(("0", "0", "pad.sum(-1)[:, None, None, None]", "off"))
        atoms: list[Callable[[], str]] = [
            lambda: f"({KEYS} <= {ROWS})",
            lambda: f"({KEYS} <= {ROWS})",
            lambda: f"({KEYS} <= {ROWS} + {offset})",
            lambda: f"({KEYS} > {ROWS} - {width})",
            lambda: f"(({ROWS} - {KEYS}).abs() <= {width})",
            lambda: (
                f"torch.{choice(RELATIONS)}({choice(BASES)} + {offset}, {choice(BASES)})"
                f".expand(q.shape[0], 1, q.shape[2], k.shape[2])"
            ),
            lambda: (
                f"torch.{choice(('tril', 'triu'))}("
                f"torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool), {offset})"
            ),
            lambda: f"(({ROWS} - {left}) // {width} == ({KEYS} - {left}) // {width})",
            lambda: f"({KEYS} // {width} <= {ROWS} // {width})",
            lambda: f"(({ROWS} - {KEYS}) % {width} == 0)",
            lambda: f"({KEYS} < {choice(('off', str(width)))})",
            lambda: choice(PADDINGS),
            lambda: choice(PADDINGS),
        ]
        if self.square:
            atoms += [self._packed] * 3
            atoms.append(lambda: "pad.bool()[:, None, :, None]")
        return choice(atoms)()

    def _packed(self) -> str:
        ids = self.chance.choice(IDS)
        relation = self.chance.choice(("eq", "eq", "eq", "ne"))
        return f"(lambda i: torch.{relation}(i[:, None, :, None], i[:, None, None, :]))({ids})"


def compiled(text: str) -> Callable[..., Any]:
    """The program as a function."""
    return eval(f"lambda q, k, pad, ids, off, table: {text}", {"torch": torch})


def inputs(batch: int, num_q: int, num_k: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Real arguments of a program."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    return (
        torch.zeros(batch, 4, num_q, 8),
        torch.zeros(batch, 2, num_k, 8),
        draw(2, batch, num_k),
        draw(3, batch, num_k),
        draw(4, 1)[0],
        torch.randn(32, 4, generator=generator),
    )
