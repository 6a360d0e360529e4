"""The shipped checkpoint loads, is checked, equals transformers' Llama and answers questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sparse_compiler.demo.checkpoint import (
    CHECKPOINT_FOLDER,
    answer_logits,
    load_retriever,
    read_training_record,
)
from sparse_compiler.demo.model import (
    RetrieverConfig,
    RetrieverModel,
    transformers_config,
)
from sparse_compiler.demo.records import Placement, make_prompt, score_answers
from sparse_compiler.errors import CheckpointCorrupt, OptionInvalid

SMALL = RetrieverConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=2, head_dim=8)


@pytest.fixture(scope="module")
def builtin() -> RetrieverModel:
    model = load_retriever(torch.float32, source="builtin")
    assert isinstance(model, RetrieverModel)
    return model


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for path in CHECKPOINT_FOLDER.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path


def test_checkpoint_is_small_and_its_record_complete() -> None:
    size = (CHECKPOINT_FOLDER / "retriever.safetensors").stat().st_size
    assert size < 13_000_000
    record = read_training_record()
    for name in (
        "seed",
        "recipe",
        "versions",
        "device",
        "stages",
        "evaluation",
        "sha256",
    ):
        assert record[name] not in (None, "", [], {}), name


def test_tied_embedding_is_stored_once_and_shared(builtin: RetrieverModel) -> None:
    weights = safetensors.torch.load_file(CHECKPOINT_FOLDER / "retriever.safetensors")
    assert "lm_head.weight" not in weights
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    assert builtin.lm_head.weight is builtin.model.embed_tokens.weight
    assert not any(weight.requires_grad for weight in builtin.parameters())


@pytest.mark.parametrize(
    ("placement", "tokens", "records"),
    [("end-4", 2048, 0.25), ("end-4", 4096, 0.5), ("end-32", 4096, 0.25), ("spread", 4096, 0.25)],
)
def test_trained_model_answers(
    builtin: RetrieverModel, placement: Placement, tokens: int, records: float
) -> None:
    right = [
        score_answers(answer_logits(builtin, prompt), prompt)
        for seed in range(2)
        for prompt in [make_prompt(tokens, placement=placement, seed=seed, records=records)]
    ]
    assert torch.cat(right).float().mean().item() >= (1.0 if placement == "end-4" else 0.95)


def test_answers_come_from_the_records(builtin: RetrieverModel) -> None:
    """Without its record a question cannot be answered: nothing leaks from elsewhere."""
    prompt = make_prompt(2048, seed=1)
    for start in prompt.record_positions.tolist():
        prompt.tokens[start : start + 16] = ord(" ")
    assert not score_answers(answer_logits(builtin, prompt), prompt).any()


def test_builtin_equals_transformers(builtin: RetrieverModel) -> None:
    pytest.importorskip("transformers")
    other = load_retriever(torch.float32, source="transformers")
    prompt = make_prompt(1024, seed=2)
    tokens = prompt.tokens[None]
    with torch.no_grad():
        for keep in (0, 64, prompt.logit_positions):
            ours = builtin(tokens, logits_to_keep=keep)
            theirs = other(input_ids=tokens, logits_to_keep=keep).logits
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        answer_logits(builtin, prompt),
        answer_logits(other, prompt),
        atol=1e-4,
        rtol=1e-4,
    )


def test_auto_prefers_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    model = load_retriever()
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"  # pyright: ignore


def test_auto_works_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert isinstance(load_retriever(), RetrieverModel)
    with pytest.raises(OptionInvalid, match="transformers is not installed"):
        load_retriever(source="transformers")


def test_unknown_source_is_refused() -> None:
    with pytest.raises(OptionInvalid, match="option 'source'"):
        load_retriever(source="elsewhere")  # pyright: ignore[reportArgumentType]


def test_shipped_config_is_the_default(builtin: RetrieverModel) -> None:
    assert builtin.config == RetrieverConfig()
    content = json.loads((CHECKPOINT_FOLDER / "config.json").read_text())
    assert transformers_config().items() <= content.items()


@pytest.mark.parametrize("name", ["retriever.safetensors", "config.json", "training.json"])
def test_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(CheckpointCorrupt, match=rf"{name} must be a readable file.*Reinstall"):
        load_retriever(folder=copied, source="builtin")


@pytest.mark.parametrize("name", ["config.json", "training.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_broken_json_is_refused(copied: Path, name: str, content: str) -> None:
    (copied / name).write_text(content)
    with pytest.raises(CheckpointCorrupt, match="must be"):
        load_retriever(folder=copied, source="builtin")


def test_truncated_weights_are_refused(copied: Path) -> None:
    path = copied / "retriever.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointCorrupt, match=r"sha256.*over 1000 bytes.*Reinstall"):
        load_retriever(folder=copied, source="builtin")


def test_one_flipped_bit_is_refused(copied: Path) -> None:
    path = copied / "retriever.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointCorrupt, match="sha256 of retriever"):
        load_retriever(folder=copied, source="builtin")


def test_weights_of_another_model_are_refused(copied: Path) -> None:
    content = json.loads((copied / "config.json").read_text())
    content["num_hidden_layers"] = 5
    (copied / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointCorrupt, match=r"tensors in retriever\.safetensors"):
        load_retriever(folder=copied, source="builtin")


def test_logits_to_keep_selects_positions() -> None:
    torch.manual_seed(0)
    model = RetrieverModel(SMALL).eval()
    tokens = torch.randint(0, 256, (2, 40))
    with torch.no_grad():
        whole = model(tokens)
        assert whole.shape == (2, 40, 256)
        torch.testing.assert_close(model(tokens, logits_to_keep=7), whole[:, -7:])
        kept = torch.tensor([3, 30])
        torch.testing.assert_close(model(tokens, logits_to_keep=kept), whole[:, kept])
        # Rotary positions are relative: a common shift changes nothing, a jump does.
        shifted = torch.arange(40)[None] + 1000
        torch.testing.assert_close(model(tokens, shifted), whole, atol=1e-3, rtol=1e-3)


def test_model_is_causal() -> None:
    torch.manual_seed(0)
    model = RetrieverModel(SMALL).eval()
    tokens = torch.randint(0, 256, (1, 40))
    changed = tokens.clone()
    changed[0, 25:] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :25], model(changed)[:, :25])
