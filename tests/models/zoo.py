"""Every causal-LM architecture of transformers, tiny, with random weights, and inputs for each.

``python tests/models/zoo.py --check`` builds them all (models of ``zoo_extra`` included) and runs
each once.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from shrink import VOCAB, shrink
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from zoo_overrides import OVERRIDES

__all__ = ["LENGTH", "UNBUILDABLE", "build", "config_of", "inputs", "names", "randomize"]

# A prime that no size of a model equals, so that a tensor [..., Lq, Lk] shows by its shape.
LENGTH = 43
PADDED = 11
_FIRST_TOKEN = 6  # the special tokens lie below

UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its image tower comes from timm, which needs Pillow",
}
"""Architectures that the mapping names and this environment cannot build, with the reason."""

# Their input ids hold one row for each codebook.
_CODEBOOKS = ("musicgen", "musicgen_melody")
_ASSISTANTS = ("gemma4_assistant", "gemma4_unified_assistant")


def names() -> list[str]:
    """Keys of transformers' mapping for causal language models that can be built here."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in UNBUILDABLE]


def config_of(name: str) -> PreTrainedConfig:
    """The shrunken configuration of an architecture."""
    return shrunken(_class(name).config_class, OVERRIDES.get(name, {}))


def shrunken(cls: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> Any:
    """``cls`` made small, then with ``overrides`` put in.

    Args:
        overrides: keys as for the class, nested configurations as dicts; ``_defaults`` holds what
            the class needs before its defaults can be read.
    """
    first = dict(overrides.get("_defaults", {}))
    rest = {key: value for key, value in overrides.items() if key != "_defaults"}
    return cls(**_merge(_merge(shrink(cls(**first).to_dict()), first), rest))


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``over`` put in, nested dicts likewise."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        nested = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[key] = _merge(old, value) if nested else value  # type: ignore[arg-type]
    return merged


def _class(name: str) -> Any:
    found = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]]
    return found[0] if isinstance(found, tuple) else found


def build(name: str, attn: Literal["sdpa", "eager"] = "sdpa", seed: int = 0) -> nn.Module:
    """A tiny model in eval mode, float32, on the CPU.

    Args:
        name: one of ``names()``.
        attn: ``sdpa`` falls back to ``eager`` where the architecture has nothing else;
            ``model.config._attn_implementation`` says what it got.
        seed: of the weights.
    Raises:
        KeyError: no such architecture.
    """
    torch.manual_seed(seed)
    return finish(instantiate(_class(name), config_of(name), attn), seed)


def instantiate(cls: Any, config: Any, attn: str) -> nn.Module:
    """A model of ``cls`` with the attention implementation ``attn``, or eager where it has none."""
    try:
        return cls._from_config(config, attn_implementation=attn)
    except ValueError as problem:
        if attn not in str(problem) and "scaled_dot_product" not in str(problem):
            raise
        return cls._from_config(config, attn_implementation="eager")


def finish(model: nn.Module, seed: int) -> nn.Module:
    """Random weights, float32, eval; no end token, so that ``generate`` runs its full length."""
    randomize(model, seed)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id, generation.pad_token_id = None, 0
        generation.bos_token_id = 3
        generation.forced_eos_token_id = generation.forced_bos_token_id = None
    return model.float().eval()


def randomize(model: nn.Module, seed: int = 0, gain: float = 1.3) -> None:
    """Weights that keep activations near 1, so that attention is neither flat nor saturated.

    Matrices of linear layers get N(0, gain^2 / fan in), embeddings N(0, 1), their biases N(0, 0.01);
    the rest (norms, convolutions, decay rates, sinks) keeps what the model's own code gave it.
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(parameter: torch.Tensor, std: float) -> None:
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                fill(parameter, 1.0)
            elif name == "bias" and isinstance(module, nn.Linear):
                fill(parameter, 0.1)
            elif name in ("sinks", "A"):
                fill(parameter, 1.0)
            elif name == "weight" and parameter.dim() == 2:
                rows_first = type(module).__name__ == "Conv1D"  # transformers' own: [in, out]
                fill(parameter, gain * parameter.shape[0 if rows_first else 1] ** -0.5)
            elif parameter.dim() == 3 and name in ("q", "k", "v", "o", "r"):  # [in, heads, size]
                fill(parameter, gain * parameter.shape[0] ** -0.5)
            elif name.endswith("proj") and parameter.dim() == 3:  # experts
                fill(parameter, gain * max(parameter.shape[1:]) ** -0.5)


def inputs(
    name: str, scenario: str = "batch1", length: int = LENGTH, seed: int = 1
) -> dict[str, Any]:
    """Keyword arguments of a call.

    Args:
        scenario: ``batch1`` (no mask), ``ones`` (batch of 2, a mask of ones) or ``left_padded``
            (batch of 2, the first row padded on the left); any other name counts as ``batch1``.
        length: tokens of a row.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = 2 if scenario in ("ones", "left_padded") else 1
    rows = batch * (2 if name in _CODEBOOKS else 1)
    ids = torch.randint(_FIRST_TOKEN, VOCAB, (rows, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    if scenario == "left_padded":
        mask[0, :PADDED] = 0
        ids[: rows // batch, :PADDED] = 0
    given: dict[str, Any] = {"input_ids": ids}
    if name in _ASSISTANTS:
        given = _assistant_inputs(name, batch, length, generator)
    if batch > 1:
        given["attention_mask"] = mask
    return given


def _assistant_inputs(
    name: str, batch: int, length: int, generator: torch.Generator
) -> dict[str, Any]:
    """A draft model reads its target's embeddings, keys and values."""
    config: Any = config_of(name)
    text = config.get_text_config()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def pair(size: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        return random(batch, heads, length, size), random(batch, heads, length, size)

    wide = getattr(text, "global_head_dim", None) or text.head_dim
    wide_heads = getattr(text, "num_global_key_value_heads", None) or text.num_key_value_heads
    return {
        "inputs_embeds": random(batch, length, 2 * config.backbone_hidden_size),
        "position_ids": torch.arange(length)[None],
        "shared_kv_states": {
            "full_attention": pair(wide, wide_heads),
            "sliding_attention": pair(text.head_dim, text.num_key_value_heads),
        },
    }


def _check(only: str) -> int:
    """Builds and runs every model; prints seconds, weights, the spread of the output.

    Returns:
        How many failed.
    """
    import zoo_extra  # it imports this module

    failed = 0
    for name in only.split(",") if only else [*names(), *zoo_extra.names()]:
        home: Any = zoo_extra if "/" in name else sys.modules[__name__]
        started = time.perf_counter()
        try:
            model = home.build(name)
            with torch.no_grad():
                output = model(**home.inputs(name, "batch1", 48))
        except Exception as problem:  # noqa: BLE001 - whatever a model raises is its row
            failed += 1
            text = " ".join(str(problem).split())[:150]
            print(f"{name:28s} FAILED {type(problem).__name__}: {text}", flush=True)
            continue
        plain = list(output.values()) if isinstance(output, Mapping) else output
        tensor = next(t for t in tree_leaves(plain) if isinstance(t, torch.Tensor))
        state = "ok" if torch.isfinite(tensor).all() else "NOT FINITE"
        size = sum(p.numel() for p in model.parameters()) / 1e6
        kind = getattr(getattr(model, "config", None), "_attn_implementation", "")
        seconds = time.perf_counter() - started
        print(
            f"{name:28s} {state} {seconds:.2f} s {size:.2f} M {float(tensor.std(correction=0)):.3g} {kind}",
            flush=True,
        )
    print(*(f"{name}: not built, {why}" for name, why in UNBUILDABLE.items()), sep="\n")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="build and run every model")
    parser.add_argument("--only", default="", help="names, separated by commas")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sys.exit(_check(arguments.only) > 0)
