"""Shrinks a transformers configuration: a few layers, one of each kind, of a few dozen features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["HEADS", "HEAD_DIM", "HIDDEN", "KV_HEADS", "POSITIONS", "VOCAB", "WINDOW", "shrink"]

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, WINDOW, POSITIONS = 64, 4, 2, 16, 128, 16, 256

# Sizes of every key that transformers' configurations use for one of these things.
_BY_VALUE: tuple[tuple[int, str], ...] = (
    (
        VOCAB,
        "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size src_vocab_size tgt_vocab_size entity_vocab_size "
        "ngram_vocab_size_base encoder_hash_byte_group_vocab codebook_size text_vocab_size "
        "pronunciation_vocab_size shape_vocab_size",
    ),
    (
        HIDDEN,
        "hidden_size d_model entity_emb_size n_embd dim emb_dim embedding_size embedding_dim lru_width "
        "input_embedding_size output_embedding_size word_embed_proj_dim hidden_size_global "
        "attention_hidden_size router_hidden_size backbone_hidden_size d_embed projection_dim "
        "out_hidden_size vision_output_dim projector_input_dim projector_output_dim conv_dim "
        "pronunciation_embed_dim shape_embed_dim output_hidden_size adaptor_intermediate_size",
    ),
    (
        96,
        "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff dff dim_ff d_inner "
        "ffn_hidden_size intermediate_size_mlp feed_forward_size dense_intermediate_size mlp_dim "
        "shared_intermediate_size prompt_mid_dim",
    ),
    (
        32,
        "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
        "moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank hidden_size_per_layer_input "
        "ple_embed_dim hc_lowrank nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel output_channels  o_lora_rank adapter_rank mamba_chunk_size latent_size",
    ),
    (
        2,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth "
        "num_encoder_layers num_decoder_layers num_layers_per_stack num_experts_per_tok moe_topk "
        "moe_top_k moe_k num_experts_per_token num_key_value_heads num_kv_heads kv_n_heads "
        "num_global_layers linear_num_key_heads num_query_groups swa_num_key_value_heads num_quantizers "
        "num_codebooks conf_num_hidden_layers n_groups depth_decoder_layers num_blocks ",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads attention_heads num_encoder_attention_heads "
        "num_decoder_attention_heads num_local_experts num_experts n_routed_experts "
        "moe_num_experts linear_num_value_heads conf_num_attention_heads swa_num_attention_heads "
        "index_n_heads linear_num_heads mamba_n_heads mamba_num_heads",
    ),
    (
        HEAD_DIM,
        "head_dim kv_channels attention_head_size d_kv v_head_dim qk_nope_head_dim dim_head "
        "linear_key_head_dim linear_value_head_dim swa_head_dim mamba_d_state mamba_d_head "
        "mamba_head_dim mamba_headdim state_size ssm_state_size index_head_dim d_head linear_head_dim "
        "attention_head_dim global_head_dim chunk_size swa_v_head_dim num_buckets codebook_dim",
    ),
    (8, "qk_rope_head_dim rotary_dim mamba_dt_rank time_step_rank d_rel index_topk n_mels"),
    (
        WINDOW,
        "sliding_window sliding_window_size attention_window_size window_size local_attention "
        "attention_chunk_size keep_window_size position_bias_num_buckets block_size",
    ),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length "
        "max_target_positions max_source_positions context_length original_max_position_embeddings "
        "model_max_length rel_extent position_bias_max_distance",
    ),
    (
        1,
        "num_shared_experts n_shared_experts moe_num_shared_experts first_k_dense_replace "
        "num_dense_layers topk_group n_group num_nextn_predict_layers zero_expert_num "
        "num_mem_blocks mtp_num_hidden_layers moe_layer_end_index",
    ),
    (0, "num_kv_shared_layers pad_token_id"),
    (3, "bos_token_id decoder_start_token_id"),
    (4, "eos_token_id patch_size"),
    (32, "image_size"),
)
_SIZES = {key: value for value, keys in _BY_VALUE for key in keys.split()}
_KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "indexer_types")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Special tokens have no meaning in a random model: all become tokens that the inputs never hold.
_SPECIAL = 5


def shrink(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration class that make its model small.

    Args:
        defaults: ``ConfigClass().to_dict()``, nested configurations as dicts.
    Returns:
        The keys to change; per-layer lists keep one layer of each kind, at least two in all.
    """
    chosen = _layers(defaults)
    small: dict[str, Any] = {}
    for key, value in defaults.items():
        if isinstance(value, Mapping) and ("model_type" in value or key.endswith("_config")):
            small[key] = {
                **({"model_type": value["model_type"]} if "model_type" in value else {}),
                **shrink(value),
            }
        elif chosen and isinstance(value, list) and len(value) == _depth(defaults):
            small[key] = [_SIZES.get(key, value[i]) for i in chosen]
        elif key in _COUNTS and isinstance(value, int):
            small[key] = max(2, len(chosen))
        elif key in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[key] = _SIZES[key]
        elif key == "is_decoder":
            small[key] = True
        elif _is_token(key) and isinstance(value, int | list):
            small[key] = _SPECIAL
    if small.get("kv_lora_rank"):  # latent attention: keys are expanded to every head
        small["num_key_value_heads"] = HEADS
    if "head_dim" in small and "qk_rope_head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]
    kinds = set(small.get("layer_types") or ())
    windowed = isinstance(small.get("sliding_window"), int)
    if windowed and len(kinds) == 1 and kinds <= {"full_attention", "sliding_attention"}:
        small["layer_types"] = ["full_attention", "sliding_attention"]
        if "use_sliding_window" in defaults:
            small["use_sliding_window"] = True
    return small


def _is_token(key: str) -> bool:
    return key.endswith(("_token_id", "_token_index"))


def _depth(defaults: Mapping[str, Any]) -> int:
    return next((d for key in _COUNTS if isinstance(d := defaults.get(key), int)), 0)


def _layers(defaults: Mapping[str, Any], most: int = 4) -> list[int]:
    """Numbers of the layers to keep: the first of each kind."""
    depth = _depth(defaults)
    columns: list[Iterable[Any]] = [
        defaults[key]
        for key in _KINDS
        if isinstance(defaults.get(key), list) and len(defaults[key]) == depth
    ]
    if not columns:
        return list(range(min(2, depth)))
    first: dict[Any, int] = {}
    for number, kind in enumerate(zip(*columns, strict=True)):
        first.setdefault(kind, number)
    chosen = sorted(first.values())[:most]
    return chosen if len(chosen) > 1 else list(range(min(2, depth)))
