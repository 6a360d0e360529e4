"""Prompts that test retrieval: key-value records hidden in a haystack of Python source, then questions.

A record is 16 bytes, ``\\n@rec abcd=1234\\n``; a question repeats the key of one record and, teacher
forced, its digits: ``\\n@ask abcd=1234\\n``. A question is right when the model puts its largest
logit on each of the four digits. Tokens are bytes.

`make_prompt` builds one prompt for evaluation, `sample_training_batch` a whole batch on any device.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparse_compiler.errors import PromptInvalid

__all__ = [
    "PLACEMENTS",
    "RECORD_SIZE",
    "Haystack",
    "Placement",
    "Prompt",
    "TrainingBatch",
    "load_haystack",
    "make_prompt",
    "sample_training_batch",
    "score_answers",
]

Placement = Literal["end-1", "end-4", "end-32", "spread", "anywhere"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)

RECORD_SIZE = 16
"""Bytes (= tokens) of a record, and of a question with its answer."""

_RECORD_TEMPLATE = b"\n@rec ....=....\n"
_QUESTION_TEMPLATE = b"\n@ask ....=....\n"
_KEY = slice(6, 10)
_VALUE = slice(11, 15)
_VALUE_START = 11
_VALUE_DIGITS = 4
_NUM_KEYS = 26**4
_NUM_VALUES = 10**4
_NUM_QUESTIONS: dict[Placement, int] = {
    "end-1": 1,
    "end-4": 4,
    "end-32": 32,
    "spread": 64,
    "anywhere": 64,
}
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
_MAX_TRAINING_FILL = 0.95

# Kinds of target bytes in a training batch.
_KIND_TEXT, _KIND_RANDOM, _KIND_ANSWER = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Haystack:
    """Filler text. `sha256` (hex) names exactly these bytes, so that figures can cite them."""

    text: bytes
    sha256: str

    @classmethod
    def from_bytes(cls, text: bytes) -> Haystack:
        return cls(text, hashlib.sha256(text).hexdigest())


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One prompt with its questions.

    Attributes:
        tokens: [N] int64, byte values; batch it with ``tokens[None]``.
        answer_positions: [Q, 4] int64, where each question's digits stand; the logits one position
            earlier predict them.
        record_positions: [Q] int64, first byte of the record that each question asks for.
        placement: where the questions stand.
        num_records: records in the prompt, asked or not.
        seed: the seed that drew it.
        haystack_sha256: hex digest of the filler text it was drawn from.
    """

    tokens: Tensor
    answer_positions: Tensor
    record_positions: Tensor
    placement: Placement
    num_records: int
    seed: int
    haystack_sha256: str

    @property
    def num_questions(self) -> int:
        return int(self.answer_positions.shape[0])

    @property
    def logit_positions(self) -> Tensor:
        """[4 * Q] int64: the positions whose logits predict the digits, question by question."""
        return (self.answer_positions - 1).flatten()


@dataclass(frozen=True, slots=True, eq=False)
class TrainingBatch:
    """A batch of prompts with the questions at the end.

    Attributes:
        tokens: [B, N] int64.
        text_mask: [B, N] bool, predictable bytes: haystack and template.
        answer_mask: [B, N] bool, the asked digits. Keys and record values are in neither mask.
    """

    tokens: Tensor
    text_mask: Tensor
    answer_mask: Tensor


def _source_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        # In place and sorted: os.walk then descends in an order that is the same everywhere.
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(folder, name)


@lru_cache(maxsize=4)
def load_haystack(num_bytes: int = 1 << 22) -> Haystack:
    """The running Python's standard library source, in path order, without tests and packages.

    Args:
        num_bytes: size wanted, at least 1.
    Returns:
        Exactly `num_bytes` of text. The bytes depend on the Python version; `sha256` names them.
    Raises:
        PromptInvalid: the library holds less source than asked for.
    """
    if num_bytes < 1:
        raise PromptInvalid("num_bytes", "at least 1", num_bytes, where="load_haystack")
    parts: list[bytes] = []
    size = 0
    for path in _source_files(Path(sysconfig.get_paths()["stdlib"])):
        part = path.read_bytes()
        parts.append(part)
        size += len(part)
        if size >= num_bytes:
            return Haystack.from_bytes(b"".join(parts)[:num_bytes])
    raise PromptInvalid(
        "num_bytes",
        f"at most the {size} bytes of source in the standard library",
        num_bytes,
        where="load_haystack",
        fix="Ask for less, or pass make_prompt a Haystack.from_bytes of your own; "
        "a zipped or stripped standard library has no source to read",
    )


def _write_items(
    template: bytes, keys: npt.NDArray[np.int64], values: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]:
    """Render records or questions. keys, values: [R]; returns [R, 16]."""
    items = np.tile(np.frombuffer(template, dtype=np.uint8), (keys.size, 1))
    items[:, _KEY] = ord("a") + keys[:, None] // 26 ** np.arange(3, -1, -1) % 26
    items[:, _VALUE] = ord("0") + values[:, None] // 10 ** np.arange(3, -1, -1) % 10
    return items


def _count_records(records: float, tokens: int, placement: Placement) -> int:
    """Number of records meant by `records`, checked against the room and the questions."""
    where = "make_prompt"
    num_questions = _NUM_QUESTIONS[placement]
    if isinstance(records, float):
        if not 0.0 < records <= 1.0:
            raise PromptInvalid(
                "records as a fraction of the tokens",
                "in (0, 1]",
                records,
                where=where,
                fix="Pass an int to give the number of records instead",
            )
        num_records = int(records * tokens) // RECORD_SIZE
    else:
        num_records = records
    if num_records < num_questions:
        raise PromptInvalid(
            f"the number of records in {tokens} tokens",
            f"at least {num_questions}, since placement {placement!r} asks that many different ones",
            num_records,
            where=where,
            fix=f"Raise records or tokens; the shortest prompt of this placement has "
            f"{2 * num_questions * RECORD_SIZE} tokens",
        )
    needed = RECORD_SIZE * (num_records + num_questions)
    if needed > tokens:
        raise PromptInvalid(
            "tokens",
            f"at least {needed}, the room of {num_records} records and {num_questions} questions "
            f"of {RECORD_SIZE} bytes",
            tokens,
            where=where,
            fix="Raise tokens or lower records",
        )
    if num_records > _NUM_KEYS:
        raise PromptInvalid(
            "the number of records",
            f"at most {_NUM_KEYS}, the number of keys",
            num_records,
            where=where,
            fix="Lower records",
        )
    return num_records


def make_prompt(
    tokens: int,
    *,
    placement: Placement = "end-4",
    seed: int = 0,
    records: float = 0.25,
    haystack: Haystack | None = None,
) -> Prompt:
    """Draw one prompt; the same arguments give the same bytes.

    Args:
        tokens: length N in bytes.
        placement: "end-1" puts one question into the last 16 tokens, "end-4" 4 into the last 64,
            "end-32" 32 into the last 512, "spread" 64 at random places in the later three quarters, about records of the first;
            "anywhere" 64 at random places, each after its record. Only in "anywhere" do asked
            records stand behind questions, which no model has seen that was trained with its
            questions at the end.
        seed: any non-negative integer.
        records: a float is the fraction of the tokens that records fill, an int their number.
            Records stand at random places before the end questions, with unique keys.
        haystack: filler; default `load_haystack()`. Read from a random offset, wrapping around.
    Raises:
        PromptInvalid: unknown placement, or too few tokens or records for the questions.
    """
    if placement not in _NUM_QUESTIONS:
        raise PromptInvalid(
            "placement",
            f"one of {', '.join(PLACEMENTS)}",
            placement,
            where="make_prompt",
        )
    num_records = _count_records(records, tokens, placement)
    num_questions = _NUM_QUESTIONS[placement]
    haystack = load_haystack() if haystack is None else haystack
    if not haystack.text:
        raise PromptInvalid(
            "the size of haystack.text",
            "at least 1",
            0,
            where="make_prompt",
            fix="Pass some text",
        )
    rng = np.random.default_rng(seed)
    keys = rng.choice(_NUM_KEYS, size=num_records, replace=False).astype(np.int64)
    values = rng.integers(0, _NUM_VALUES, size=num_records)
    asked = rng.choice(num_records, size=num_questions, replace=False)

    # Items in prompt order get sorted gaps of haystack before them; questions that must close the
    # prompt get the largest gap, so that nothing follows them.
    free = tokens - RECORD_SIZE * (num_records + num_questions)
    num_items = num_records + num_questions
    if placement in ("spread", "anywhere"):
        rank = rng.random(num_records)
        if placement == "spread":
            rank[asked] = rng.uniform(0.0, 0.25, size=num_questions)
        earliest = 0.25 if placement == "spread" else rank[asked]
        # A question draws its place between its record and the end of the prompt.
        rank = np.concatenate([rank, rng.uniform(earliest, 1.0, size=num_questions)])
        order = np.argsort(rank, kind="stable")
        # Equal ranks keep the stable order, in which records come first.
        gaps = np.sort(rng.integers(0, free + 1, size=num_items))
    else:
        order = np.arange(num_items)
        gaps = np.sort(rng.integers(0, free + 1, size=num_records))
        gaps = np.concatenate([gaps, np.full(num_questions, free)])
    starts = np.empty(num_items, dtype=np.int64)
    starts[order] = gaps + RECORD_SIZE * np.arange(num_items)

    items = np.concatenate(
        [
            _write_items(_RECORD_TEMPLATE, keys, values),
            _write_items(_QUESTION_TEMPLATE, keys[asked], values[asked]),
        ]
    )
    item_positions = starts[:, None] + np.arange(RECORD_SIZE)
    is_filler = np.ones(tokens, dtype=np.bool_)
    is_filler[item_positions] = False
    text = np.frombuffer(haystack.text, dtype=np.uint8)
    offset = int(rng.integers(0, text.size))
    prompt = np.empty(tokens, dtype=np.uint8)
    prompt[is_filler] = text[(offset + np.arange(free)) % text.size]
    prompt[item_positions] = items

    # Questions in prompt order, so that the first row is the first one a reader meets.
    by_place = np.argsort(starts[num_records:])
    question_starts = starts[num_records:][by_place]
    digits = np.arange(_VALUE_START, _VALUE_START + _VALUE_DIGITS)
    return Prompt(
        tokens=torch.from_numpy(prompt.astype(np.int64)),
        answer_positions=torch.from_numpy(question_starts[:, None] + digits),
        record_positions=torch.from_numpy(starts[asked][by_place]),
        placement=placement,
        num_records=num_records,
        seed=seed,
        haystack_sha256=haystack.sha256,
    )


def score_answers(logits: Tensor, prompt: Prompt) -> Tensor:
    """Which questions are right: the argmax is right on all four digits.

    Args:
        logits: [K, V] or [1, K, V], V >= 256, any device and floating dtype. With K == 4 * Q the
            rows are those of `prompt.logit_positions`; otherwise the last K positions.
        prompt: the prompt that was run.
    Returns:
        [Q] bool on the CPU; ``.float().mean()`` is the accuracy.
    Raises:
        PromptInvalid: the rows cannot be those of this prompt, or miss a question.
    """
    where = "score_answers"
    if logits.ndim == 3 and logits.shape[0] == 1:
        logits = logits[0]
    if logits.ndim != 2:
        raise PromptInvalid(
            "the shape of logits",
            "[K, V] or [1, K, V]",
            tuple(logits.shape),
            where=where,
            fix="Score one prompt at a time",
        )
    rows, num_tokens = logits.shape[0], prompt.tokens.numel()
    positions = prompt.logit_positions
    if rows != positions.numel():
        first = num_tokens - rows
        if first < 0 or int(positions.min()) < first:
            raise PromptInvalid(
                "the number of rows of logits",
                f"{positions.numel()}, those of prompt.logit_positions, or between "
                f"{num_tokens - int(positions.min())} and {num_tokens}, the last ones",
                rows,
                where=where,
                fix="Run the model with logits_to_keep=prompt.logit_positions",
            )
        logits = logits[(positions - first).to(logits.device)]
    guesses = logits.argmax(-1).cpu().view(-1, _VALUE_DIGITS)
    return (guesses == prompt.tokens.cpu()[prompt.answer_positions.cpu()]).all(-1)


def sample_training_batch(
    text: Tensor,
    *,
    batch: int,
    tokens: int,
    max_questions: int,
    generator: torch.Generator,
    anywhere: bool = False,
    uniform_share: float = 0.0,
) -> TrainingBatch:
    """Draw a batch on the device of `text`, without waiting for that device.

    Every row draws its own number of questions (uniform, up to `max_questions`) and of records
    (log-uniform, up to 95 % of the tokens; few rows are then crowded, see `uniform_share`).

    Args:
        text: [T] uint8, the haystack; T > tokens.
        batch: rows B.
        tokens: row length N.
        max_questions: at most; B * N / 16 must not exceed the number of keys, 26 ** 4.
        generator: on the same device.
        anywhere: questions stand at random places after their record instead of at the end.
        uniform_share: probability that a row draws its number of records uniformly instead.
    Raises:
        PromptInvalid: the sizes do not fit together.
    """
    slots = tokens // RECORD_SIZE
    width = int(_MAX_TRAINING_FILL * slots)
    if not (1 <= max_questions < slots and batch * width <= _NUM_KEYS and text.numel() > tokens):
        raise PromptInvalid(
            "(tokens, max_questions, batch, bytes of text)",
            f"such that 1 <= max_questions < tokens // 16, batch * tokens / 16 <= {_NUM_KEYS} and "
            "tokens < bytes of text",
            (tokens, max_questions, batch, text.numel()),
            where="sample_training_batch",
        )
    device = text.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    num_questions = 1 + integers(max_questions, batch, 1)
    most = (slots - num_questions).clamp(max=width)
    num_records = torch.exp(uniform(batch, 1) * torch.log(most + 1.0)).long()
    if uniform_share > 0:
        crowded = (uniform(batch, 1) * (most + 1)).long()
        num_records = torch.where(uniform(batch, 1) < uniform_share, crowded, num_records)
    num_records = torch.minimum(num_records.clamp(min=1), most)
    num_questions = torch.minimum(num_questions, num_records)

    column = torch.arange(width, device=device)
    used = column < num_records
    # One permutation for the batch makes keys unique in every row.
    keys = torch.randperm(_NUM_KEYS, generator=generator, device=device)[: batch * width]
    keys = keys.view(batch, width)
    values = integers(_NUM_VALUES, batch, width)
    asked = uniform(batch, width).masked_fill(~used, -1.0)
    asked = asked.topk(min(max_questions, width), dim=-1).indices
    question = torch.arange(asked.shape[-1], device=device)

    # Items stand in the order of their ranks: records below 1, unused columns from 3 on.
    record_rank = uniform(batch, width).masked_fill(~used, 3.0)
    if anywhere:
        after = record_rank.gather(1, asked)
        question_rank = after + uniform(*after.shape) * (1 - after)
    else:
        question_rank = (1 + question / question.numel()).expand(batch, -1)
    question_rank = question_rank.masked_fill(question >= num_questions, 3.0)
    order = torch.cat([record_rank, question_rank], dim=1).argsort(dim=1, stable=True)

    # Sorted gaps of haystack before the items; what must close the row gets all of it. Unused
    # columns are written behind the end of the row and cut off, which keeps shapes fixed.
    num_items = num_records + num_questions
    free = tokens - RECORD_SIZE * num_items
    place = torch.arange(order.shape[1], device=device)
    is_spread = place < (num_items if anywhere else num_records)
    gaps = uniform(*order.shape).masked_fill(~is_spread, 1.0).sort(-1).values
    gaps = torch.minimum((gaps * (free + 1)).long(), free)
    placed = (gaps + RECORD_SIZE * place).masked_fill(place >= num_items, tokens)
    starts = torch.empty_like(placed).scatter_(1, order, placed)

    def write(template: bytes, keys: Tensor, values: Tensor) -> Tensor:
        # Only here for the device: the same bytes as _write_items.
        row = torch.tensor(list(template), device=device)
        items = row.repeat(*keys.shape, 1)
        powers = torch.arange(3, -1, -1, device=device)
        items[..., _KEY] = ord("a") + keys[..., None] // 26**powers % 26
        items[..., _VALUE] = ord("0") + values[..., None] // 10**powers % 10
        return items

    records = write(_RECORD_TEMPLATE, keys, values)
    questions = write(_QUESTION_TEMPLATE, keys.gather(1, asked), values.gather(1, asked))
    record_kind = torch.zeros_like(records)
    record_kind[..., _KEY] = _KIND_RANDOM
    record_kind[..., _VALUE] = _KIND_RANDOM
    question_kind = torch.zeros_like(questions)
    question_kind[..., _KEY] = _KIND_RANDOM
    question_kind[..., _VALUE] = _KIND_ANSWER

    positions = (starts[..., None] + torch.arange(RECORD_SIZE, device=device)).flatten(1)
    filler = torch.ones(batch, tokens + RECORD_SIZE, dtype=torch.long, device=device)
    filler.scatter_(1, positions, 0)
    offset = integers(text.numel() - tokens, batch, 1)
    source = (offset + filler.cumsum(1) - 1).clamp(0, text.numel() - 1)
    rows = text[source].long()
    rows.scatter_(1, positions, torch.cat([records, questions], dim=1).flatten(1))
    kind = torch.zeros_like(rows)
    kind.scatter_(1, positions, torch.cat([record_kind, question_kind], dim=1).flatten(1))
    kind = kind[:, :tokens]
    return TrainingBatch(rows[:, :tokens], kind == _KIND_TEXT, kind == _KIND_ANSWER)
