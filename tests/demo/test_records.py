"""Prompts hold what they promise, at every placement and length."""

from __future__ import annotations

import hashlib
import re

import pytest
import torch

from sparse_compiler.demo.records import (
    PLACEMENTS,
    RECORD_SIZE,
    Haystack,
    Placement,
    Prompt,
    TrainingBatch,
    load_haystack,
    make_prompt,
    sample_training_batch,
    score_answers,
)
from sparse_compiler.errors import PromptInvalid

RECORD = re.compile(rb"\n@rec ([a-z]{4})=([0-9]{4})\n")
QUESTION = re.compile(rb"\n@ask ([a-z]{4})=([0-9]{4})\n")
NUM_QUESTIONS = {"end-1": 1, "end-4": 4, "end-32": 32, "spread": 64, "anywhere": 64}


def as_bytes(tokens: torch.Tensor) -> bytes:
    return bytes(tokens.tolist())


def find_all(pattern: re.Pattern[bytes], text: bytes) -> list[tuple[int, bytes, bytes]]:
    return [(m.start(), m.group(1), m.group(2)) for m in pattern.finditer(text)]


def perfect_logits(prompt: Prompt) -> torch.Tensor:
    """[N, 256] logits of a model that knows the next byte."""
    return torch.nn.functional.one_hot(prompt.tokens.roll(-1), 256).float()


def test_haystack_is_deterministic_and_names_its_bytes() -> None:
    haystack = load_haystack(100_000)
    assert len(haystack.text) == 100_000
    assert haystack.sha256 == hashlib.sha256(haystack.text).hexdigest()
    load_haystack.cache_clear()
    assert load_haystack(100_000) == haystack
    assert load_haystack(200_000).text.startswith(haystack.text)
    assert b"@rec " not in load_haystack().text


@pytest.mark.parametrize("num_bytes", [0, 1 << 40])
def test_impossible_haystack_is_refused(num_bytes: int) -> None:
    with pytest.raises(PromptInvalid, match="num_bytes must be at"):
        load_haystack(num_bytes)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("tokens", [4096, 5001, 32768])
@pytest.mark.parametrize("records", [64, 0.25, 0.7])
def test_prompt_holds_what_it_promises(placement: Placement, tokens: int, records: float) -> None:
    prompt = make_prompt(tokens, placement=placement, seed=7, records=records)
    text = as_bytes(prompt.tokens)
    assert len(text) == tokens
    found, questions = find_all(RECORD, text), find_all(QUESTION, text)
    expected = records if isinstance(records, int) else int(records * tokens) // RECORD_SIZE
    assert len(found) == prompt.num_records == expected
    assert len(questions) == prompt.num_questions == NUM_QUESTIONS[placement]
    by_key = {key: (start, value) for start, key, value in found}
    assert len(by_key) == len(found), "keys must be unique"
    assert len({key for _, key, _ in questions}) == len(questions)
    for row, (start, key, value) in enumerate(questions):
        record_start, record_value = by_key[key]
        assert record_value == value
        assert record_start + RECORD_SIZE <= start, "a record must precede its question"
        assert int(prompt.record_positions[row]) == record_start
        assert as_bytes(prompt.tokens[prompt.answer_positions[row]]) == value
        assert int(prompt.answer_positions[row, 0]) == start + 11
    if placement == "spread":
        assert max(prompt.record_positions.tolist()) < questions[0][0]
        assert questions[-1][0] - questions[0][0] > tokens // 3
    elif placement == "anywhere":
        assert questions[0][0] < tokens // 2 < questions[-1][0]
    else:
        tail = RECORD_SIZE * len(questions)
        assert questions[0][0] == tokens - tail
        assert all(start < tokens - tail for start, _, _ in found)


def test_prompt_depends_on_its_arguments_only() -> None:
    first = make_prompt(4096, placement="anywhere", seed=3)
    again = make_prompt(4096, placement="anywhere", seed=3)
    other = make_prompt(4096, placement="anywhere", seed=4)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.answer_positions, again.answer_positions)
    assert not torch.equal(first.tokens, other.tokens)


def test_short_haystack_wraps_around() -> None:
    prompt = make_prompt(512, records=4, haystack=Haystack.from_bytes(b"abc"))
    filler = RECORD.sub(b"", QUESTION.sub(b"", as_bytes(prompt.tokens)))
    assert len(filler) == 512 - 8 * RECORD_SIZE
    assert filler in b"abc" * 512


def test_full_prompt_has_no_haystack() -> None:
    prompt = make_prompt(1024, placement="end-32", records=32)
    text = as_bytes(prompt.tokens)
    assert not QUESTION.sub(b"", RECORD.sub(b"", text))


@pytest.mark.parametrize(
    ("tokens", "placement", "records", "message"),
    [
        (127, "end-4", 4, "tokens must be at least 128"),
        (1024, "end-32", 33, "tokens must be at least 1040"),
        (
            2048,
            "anywhere",
            0.25,
            "number of records in 2048 tokens must be at least 64",
        ),
        (4096, "end-4", 3, "number of records in 4096 tokens must be at least 4"),
        (4096, "end-4", 1.5, "records as a fraction"),
        (0, "end-4", 4, "tokens must be at least 128"),
        (31, "end-1", 1, "tokens must be at least 32"),
        (4096, "middle", 64, "placement must be one of end-1, end-4, end-32, spread, anywhere"),
    ],
)
def test_impossible_prompt_is_refused(
    tokens: int, placement: Placement, records: float, message: str
) -> None:
    with pytest.raises(PromptInvalid, match=message):
        make_prompt(tokens, placement=placement, records=records)


def test_empty_haystack_is_refused() -> None:
    with pytest.raises(PromptInvalid, match=r"haystack\.text must be at least 1"):
        make_prompt(4096, haystack=Haystack.from_bytes(b""))


def test_score_needs_all_four_digits() -> None:
    prompt = make_prompt(2048)
    logits = perfect_logits(prompt)
    assert score_answers(logits, prompt).tolist() == [True] * 4
    wrong = prompt.answer_positions[2, 3] - 1
    logits[wrong] = logits[wrong].roll(1)
    for rows in (logits, logits[-64:], logits[prompt.logit_positions], logits[None]):
        assert score_answers(rows, prompt).tolist() == [True, True, False, True]


def test_score_refuses_logits_that_miss_a_question() -> None:
    prompt = make_prompt(2048)
    logits = perfect_logits(prompt)
    for rows in (logits[-50:], logits.repeat(2, 1), logits[None].repeat(2, 1, 1)):
        with pytest.raises(PromptInvalid, match="of logits must be"):
            score_answers(rows, prompt)


@pytest.mark.parametrize("uniform_share", [0.0, 0.5])
@pytest.mark.parametrize("anywhere", [False, True])
@pytest.mark.parametrize(("tokens", "max_questions"), [(256, 4), (512, 8), (4096, 64)])
def test_training_batch_holds_what_it_promises(
    tokens: int, max_questions: int, anywhere: bool, uniform_share: float
) -> None:
    text = torch.frombuffer(bytearray(load_haystack(100_000).text), dtype=torch.uint8)

    def draw() -> TrainingBatch:
        return sample_training_batch(
            text,
            batch=8,
            tokens=tokens,
            max_questions=max_questions,
            generator=torch.Generator().manual_seed(5),
            anywhere=anywhere,
            uniform_share=uniform_share,
        )

    batch = draw()
    for row, text_mask, answer_mask in zip(
        batch.tokens, batch.text_mask, batch.answer_mask, strict=True
    ):
        content = as_bytes(row)
        found, questions = find_all(RECORD, content), find_all(QUESTION, content)
        by_key = {key: (start, value) for start, key, value in found}
        assert 1 <= len(questions) <= min(max_questions, len(found))
        assert len(by_key) == len(found)
        assert len(found) * RECORD_SIZE <= 0.95 * tokens
        for start, key, value in questions:
            assert by_key[key][1] == value
            assert by_key[key][0] < start
        if not anywhere:
            assert questions[0][0] == tokens - RECORD_SIZE * len(questions)
        assert as_bytes(row[answer_mask]) == b"".join(value for _, _, value in questions)
        # Keys and record values cannot be predicted, so that no loss may ask for them.
        assert int((~text_mask & ~answer_mask).sum()) == 8 * len(found) + 4 * len(questions)
        assert not (text_mask & answer_mask).any()
    assert torch.equal(batch.tokens, draw().tokens)


@pytest.mark.parametrize(("uniform_share", "crowded"), [(0.0, 0.126), (1.0, 0.5)])
def test_uniform_share_crowds_prompts(uniform_share: float, crowded: float) -> None:
    text = torch.frombuffer(bytearray(load_haystack(100_000).text), dtype=torch.uint8)
    batch = sample_training_batch(
        text,
        batch=512,
        tokens=4096,
        max_questions=4,
        generator=torch.Generator().manual_seed(5),
        uniform_share=uniform_share,
    )
    records = (~batch.text_mask & ~batch.answer_mask).sum(1) / 8
    share = (records * RECORD_SIZE > 0.475 * 4096).float().mean()
    # Half of the uniform numbers, and ln 2 / ln 244 of the log-uniform ones, lie above the middle.
    assert abs(float(share) - crowded) < 0.06


def test_training_batch_refuses_too_many_questions() -> None:
    text = torch.zeros(1000, dtype=torch.uint8)
    with pytest.raises(PromptInvalid, match="max_questions"):
        sample_training_batch(
            text, batch=1, tokens=256, max_questions=16, generator=torch.Generator()
        )
