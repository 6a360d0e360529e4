"""Small models of transformers with random weights; without transformers their tests are skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend_calls import LENGTH
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 16}


def build(name: str, **changes: Any) -> nn.Module:
    t = transformers
    torch.manual_seed(0)
    if name == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**GROUPED | changes))
    elif name == "mistral":
        model = t.MistralForCausalLM(t.MistralConfig(**GROUPED | {"sliding_window": 20} | changes))
    elif name == "qwen3":
        model = t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED | changes))
    elif name == "gemma2":
        sizes = GROUPED | {"sliding_window": 20, "query_pre_attn_scalar": 16}
        model = t.Gemma2ForCausalLM(t.Gemma2Config(**sizes | changes))
    elif name == "gpt2":
        config = t.GPT2Config(
            n_embd=64,
            n_layer=2,
            n_head=4,
            vocab_size=128,
            n_positions=512,
            bos_token_id=1,
            eos_token_id=1,
        )
        model = t.GPT2LMHeadModel(config)
    elif name == "bert":
        model = t.BertModel(t.BertConfig(**COMMON))
    else:
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = {key: COMMON[key] for key in names}
        model = t.ViTModel(t.ViTConfig(**sizes, image_size=64, patch_size=8))
    return model.eval()


def ids(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(2, 128, (batch, length), generator=draw)


def first(output: Any) -> Tensor:
    return output[0] if not isinstance(output, Tensor) else output


def plainly_compiled(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The unmodified model, compiled: for some models that differs from the uncompiled one."""
    return first(torch.compile(model, backend="eager")(*args, **kwargs))
