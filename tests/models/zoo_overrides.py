"""What the general shrinking of a configuration leaves wrong, by architecture."""

from __future__ import annotations

from typing import Any

__all__ = ["OVERRIDES"]

_HYBRID = ["linear_attention", "full_attention"]

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "blt": {"use_cache": False},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    # 8 prompt tokens stand before the input: they must fit into the cache as well.
    "cpmant": {"prompt_length": 8, "prompt_types": 8},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 128},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": _HYBRID},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1, "num_hidden_layers": 4},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 48]},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "hybrid_layer_ids": [1],
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlm": {"causal": True},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_assistant": {
        "_defaults": {
            "text_config": {
                "model_type": "gemma4_text",
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
                "num_kv_shared_layers": 30,
            }
        },
        "text_config": {"num_kv_shared_layers": 2},
    },
    "gemma4_unified_assistant": {
        "_defaults": {
            "text_config": {"model_type": "gemma4_unified_text", "num_kv_shared_layers": 48}
        },
        "text_config": {"num_kv_shared_layers": 2},
    },
}
OVERRIDES["qwen4_exp"] = OVERRIDES["qwen4_exp_text"]
