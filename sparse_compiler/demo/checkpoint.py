"""Loading the trained retriever that ships with the package, and running prompts through it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sparse_compiler.demo.model import (
    RetrieverConfig,
    RetrieverModel,
    transformers_config,
)
from sparse_compiler.demo.records import Prompt
from sparse_compiler.errors import CheckpointCorrupt, OptionInvalid

__all__ = [
    "CHECKPOINT_FOLDER",
    "answer_logits",
    "load_retriever",
    "read_training_record",
]

CHECKPOINT_FOLDER = Path(__file__).with_name("checkpoint")
"""Package data: retriever.safetensors, config.json, training.json, training.log."""

_WEIGHTS = "retriever.safetensors"
_FIX = "Reinstall the package, or train a checkpoint with examples/retriever/train.py"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointCorrupt(
            f"checkpoint file {path.name}",
            "a readable file",
            error.strerror,
            where=str(path),
            fix=_FIX,
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise CheckpointCorrupt(
            f"checkpoint file {path.name}",
            "valid JSON",
            str(error),
            where=str(path),
            fix=_FIX,
        ) from error
    if not isinstance(content, dict):
        raise CheckpointCorrupt(
            f"checkpoint file {path.name}",
            "a JSON object",
            content,
            where=str(path),
            fix=_FIX,
        )
    return cast("dict[str, Any]", content)


def read_training_record(folder: Path | None = None) -> dict[str, Any]:
    """training.json: seed, recipe, versions, device, stages, dense accuracy, sha256 of the weights.

    Raises:
        CheckpointCorrupt: the file is missing or no JSON object.
    """
    return _read_json((folder or CHECKPOINT_FOLDER) / "training.json")


def _read_config(folder: Path) -> RetrieverConfig:
    """The sizes in config.json, which is written in transformers' terms."""
    path = folder / "config.json"
    content = _read_json(path)
    rope: Any = content.get("rope_parameters")
    known = {
        **content,
        **(cast("Mapping[str, Any]", rope) if isinstance(rope, dict) else {}),
    }
    names = [field.name for field in fields(RetrieverConfig)]
    missing = sorted(name for name in names if not isinstance(known.get(name), int | float))
    if missing:
        raise CheckpointCorrupt(
            "config.json",
            "a file with numbers for all of " + ", ".join(names),
            f"none for {', '.join(missing)}",
            where=str(path),
            fix=_FIX,
        )
    return RetrieverConfig(**{name: known[name] for name in names})


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors on the CPU, after the check of their sha256 against training.json."""
    path = folder / _WEIGHTS
    expected = read_training_record(folder).get("sha256")
    data = _read(path)
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise CheckpointCorrupt(
            f"the sha256 of {_WEIGHTS}",
            f"{expected}, the one in training.json",
            f"{found} over {len(data)} bytes",
            where=str(path),
            fix=_FIX,
        )
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointCorrupt(
            _WEIGHTS, "in the safetensors format", str(error), where=str(path), fix=_FIX
        ) from error


def load_retriever(
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    source: Literal["auto", "builtin", "transformers"] = "auto",
    *,
    folder: Path | None = None,
) -> nn.Module:
    """The trained retriever in evaluation mode, without gradients.

    Args:
        dtype: of the weights; they are stored in bfloat16.
        device: where they go.
        source: "builtin" is `RetrieverModel`, which returns logits; "transformers" is
            `LlamaForCausalLM` with SDPA attention, which returns an output with ``.logits``; "auto"
            is transformers where it is installed. `answer_logits` runs either. Do not pass
            position_ids with jumps to transformers: it reads them as packed documents.
        folder: another checkpoint of the same layout.
    Raises:
        OptionInvalid: unknown source, or transformers asked for but not installed.
        CheckpointCorrupt: a file is missing, unreadable, truncated or changed.
    """
    if source not in ("auto", "builtin", "transformers"):
        raise OptionInvalid("option 'source'", "'auto', 'builtin' or 'transformers'", source)
    has_transformers = importlib.util.find_spec("transformers") is not None
    if source == "transformers" and not has_transformers:
        raise OptionInvalid(
            "option 'source'",
            "'auto' or 'builtin' where transformers is not installed",
            source,
            fix="Install transformers, or use source='builtin'",
        )
    folder = folder or CHECKPOINT_FOLDER
    config = _read_config(folder)
    weights = _read_weights(folder)
    weights["lm_head.weight"] = weights.get("model.embed_tokens.weight", torch.empty(0))
    # On the meta device, so that no random weights are drawn only to be replaced.
    with torch.device("meta"):
        model: nn.Module = RetrieverModel(config)
    try:
        # `assign` would otherwise part the tied embedding into two parameters.
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointCorrupt(
            f"the tensors in {_WEIGHTS}",
            "those of the model that config.json describes",
            str(error),
            where=str(folder / _WEIGHTS),
            fix=_FIX,
        ) from error
    if source != "builtin" and has_transformers:
        model = _as_transformers(config, weights)
    else:
        model.lm_head.weight = model.model.embed_tokens.weight  # pyright: ignore
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _as_transformers(config: RetrieverConfig, weights: Mapping[str, Tensor]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    llama_config = LlamaConfig(**transformers_config(config))
    llama_config._attn_implementation = "sdpa"  # pyright: ignore[reportPrivateUsage]
    model = LlamaForCausalLM(llama_config)
    model.load_state_dict(dict(weights))
    return model


@torch.no_grad()
def answer_logits(model: nn.Module, prompt: Prompt) -> Tensor:
    """Run one prompt and return the logits that predict its answers.

    Args:
        model: from `load_retriever`, or anything called the same way, e.g. its compiled form.
        prompt: on any device; moved to the one of the model.
    Returns:
        [4 * Q, 256], the rows of `prompt.logit_positions`; feed them to `score_answers`.
    """
    device = next(model.parameters()).device
    output = model(
        input_ids=prompt.tokens[None].to(device),
        logits_to_keep=prompt.logit_positions.to(device),
    )
    logits = output if isinstance(output, Tensor) else output.logits
    return logits[0]
