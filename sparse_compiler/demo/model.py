"""A byte-level Llama in plain PyTorch whose weights also load into transformers' LlamaForCausalLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RetrieverConfig", "RetrieverModel", "transformers_config"]


@dataclass(frozen=True, slots=True)
class RetrieverConfig:
    """Sizes of the retriever. The defaults are those of the trained checkpoint."""

    vocab_size: int = 256
    hidden_size: int = 384
    intermediate_size: int = 1024
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 131072
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5


def transformers_config(config: RetrieverConfig | None = None) -> dict[str, Any]:
    """Keyword arguments of `transformers.LlamaConfig` for the same model."""
    config = RetrieverConfig() if config is None else config
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        # Bytes leave no room for special tokens.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding. x: [B, H, L, D]; cos, sin: [B, 1, L, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class _Attention(nn.Module):
    def __init__(self, config: RetrieverConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.uses_groups = config.num_key_value_heads != config.num_attention_heads
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = (*hidden.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden).view(heads).transpose(1, 2)
        k = self.k_proj(hidden).view(heads).transpose(1, 2)
        v = self.v_proj(hidden).view(heads).transpose(1, 2)
        # Under autocast the projections are narrower than the angles, which follow the residual.
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.uses_groups)
        return self.o_proj(out.transpose(1, 2).reshape(*hidden.shape[:-1], -1))


class _Mlp(nn.Module):
    def __init__(self, config: RetrieverConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class _DecoderLayer(nn.Module):
    def __init__(self, config: RetrieverConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _Backbone(nn.Module):
    def __init__(self, config: RetrieverConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rope_theta = config.rope_theta
        self.head_dim = config.head_dim

    def _angles(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin: [B, 1, L, D] in `dtype`. position_ids: [B, L] integers."""
        # Always in float32, and no buffer: a model moved to bf16 must not round its frequencies.
        exponents = torch.arange(0, self.head_dim, 2, device=position_ids.device).float()
        frequencies = 1.0 / self.rope_theta ** (exponents / self.head_dim)
        with torch.autocast(position_ids.device.type, enabled=False):
            half = position_ids[..., None].float() * frequencies
        angles = torch.cat((half, half), dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        cos, sin = self._angles(position_ids, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        return self.norm(hidden)


class RetrieverModel(nn.Module):
    """Causal language model over bytes: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    State-dict names are those of transformers' LlamaForCausalLM; `lm_head.weight` is tied to
    `model.embed_tokens.weight`. There is no key-value cache and no padding: one full pass.
    """

    def __init__(self, config: RetrieverConfig | None = None) -> None:
        super().__init__()
        self.config = RetrieverConfig() if config is None else config
        self.model = _Backbone(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor:
        """Logits of the next byte.

        Args:
            input_ids: [B, L] integers in [0, 256).
            position_ids: [B, L] or [1, L] integers; default 0 .. L - 1. Jumps are allowed: they
                change the rotary angles and nothing else.
            logits_to_keep: 0 for all positions, k > 0 for the last k, a 1-D integer tensor for
                those positions.
        Returns:
            [B, K, 256] in the dtype of the weights.
        """
        hidden = self.model(input_ids, position_ids)
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep.to(hidden.device)]
        elif logits_to_keep > 0:
            hidden = hidden[:, -logits_to_keep:]
        return self.lm_head(hidden)
