"""Models besides causal language models: encoders, encoder-decoders, vision, audio, by hand."""

from __future__ import annotations

from typing import Any, Literal

import torch
from handmade import MODULES
from shrink import HIDDEN, VOCAB
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from zoo import LENGTH, PADDED, finish, instantiate, shrunken

__all__ = ["build", "inputs", "names"]

_ENCODERS = [
    "albert",
    "bert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "ernie",
    "esm",
    "eurobert",
    "fnet",
    "funnel",
    "ibert",
    "layoutlm",
    "longformer",
    "luke",
    "megatron-bert",
    "mobilebert",
    "modernbert",
    "mpnet",
    "mra",
    "nomic_bert",
    "nystromformer",
    "roberta",
    "squeezebert",
    "xlm-roberta",
    "yoso",
]
_SEQ2SEQ = [
    "bart",
    "bigbird_pegasus",
    "fsmt",
    "led",
    "longt5",
    "m2m_100",
    "mbart",
    "mt5",
    "pegasus_x",
    "switch_transformers",
    "t5",
    "t5gemma",
    "umt5",
]
_VISION = [
    "beit",
    "clip_vision_model",
    "data2vec-vision",
    "deit",
    "dinov2",
    "dinov3_vit",
    "ijepa",
    "segformer",
    "siglip_vision_model",
    "swin",
    "swinv2",
    "vit",
    "vivit",
]
_AUDIO = [
    "audio-spectrogram-transformer",
    "hubert",
    "wav2vec2",
    "wav2vec2-conformer",
    "wavlm",
    "whisper",
]
_BOTH = ["clip", "siglip"]

_KINDS = {
    **{f"encoder/{n}": n for n in _ENCODERS},
    **{f"encoder-decoder/{n}": n for n in _SEQ2SEQ},
    **{f"vision/{n}": n for n in _VISION},
    **{f"audio/{n}": n for n in _AUDIO},
    **{f"vision-text/{n}": n for n in _BOTH},
}

# Few strides, so that 43 frames come from a few hundred samples.
_WAVES: dict[str, Any] = {
    "conv_dim": [32, 32],
    "conv_kernel": [8, 4],
    "conv_stride": [4, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
_SWIN: dict[str, Any] = {
    "window_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "num_layers": 2,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "esm": {"vocab_size": VOCAB, "pad_token_id": 0, "mask_token_id": 5},
    "distilbert": {"dim": HIDDEN, "hidden_dim": 96},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32},
    "fsmt": {"langs": ["en", "de"]},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "hubert": _WAVES,
    "wav2vec2": _WAVES,
    "wav2vec2-conformer": _WAVES,
    "wavlm": _WAVES,
    "whisper": {"max_source_positions": 64},
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32},
}


def names() -> list[str]:
    """``kind/name`` of every model here."""
    return [*_KINDS, *(f"by-hand/{name}" for name in MODULES)]


def build(name: str, attn: Literal["sdpa", "eager"] = "sdpa", seed: int = 0) -> nn.Module:
    """As ``zoo.build``; a model written by hand ignores ``attn``.

    Raises:
        KeyError: no such model.
    """
    torch.manual_seed(seed)
    kind, _, short = name.partition("/")
    if kind == "by-hand":
        module = MODULES[short]()
        return finish(module, seed) if not short.startswith("exported") else module
    cls = MODEL_MAPPING[CONFIG_MAPPING[short]]
    cls = cls[0] if isinstance(cls, tuple) else cls
    config = shrunken(CONFIG_MAPPING[short], OVERRIDES.get(short, {}))
    if kind == "encoder" and hasattr(config, "is_decoder"):
        config.is_decoder = False
    return finish(instantiate(cls, config, attn), seed)


def inputs(
    name: str, scenario: str = "batch1", length: int = LENGTH, seed: int = 1
) -> dict[str, Any]:
    """As ``zoo.inputs``; images and sound know no length and no padding."""
    generator = torch.Generator().manual_seed(seed)
    kind, _, short = name.partition("/")
    batch = 2 if scenario in ("ones", "left_padded") else 1
    mask = torch.ones(batch, length, dtype=torch.long)
    if scenario == "left_padded":
        mask[0, :PADDED] = 0

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(6, VOCAB, (batch, count), generator=generator)

    given: dict[str, Any] = {}
    if kind == "by-hand":
        given["x"] = random(length, HIDDEN)
        if getattr(_probe(short), "masked", False):
            given["attention_mask"] = mask
        return given
    if kind == "audio":
        return _audio(short, random, tokens)
    if kind in ("vision", "vision-text"):
        given["pixel_values"] = random(*((32,) if short == "vivit" else ()), 3, 32, 32)
    if kind != "vision":
        given["input_ids"] = tokens(length)
        if scenario == "left_padded":
            given["input_ids"][0, :PADDED] = 0
        if batch > 1:
            given["attention_mask"] = mask
    if kind == "encoder-decoder":
        given["decoder_input_ids"] = tokens(length - 6)
    return given


def _probe(short: str) -> Any:
    return MODULES[short]() if not short.startswith("exported") else None


def _audio(short: str, random: Any, tokens: Any) -> dict[str, Any]:
    if short == "whisper":
        return {"input_features": random(80, 2 * 64), "decoder_input_ids": tokens(LENGTH - 6)}
    if short == "audio-spectrogram-transformer":
        return {"input_values": random(64, 32)}
    return {"input_values": random(8 * LENGTH + 8)}
