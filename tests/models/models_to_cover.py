"""Which models and scenarios a coverage run has, and the thirty that stand for the rest."""

from __future__ import annotations

import zoo
import zoo_extra
from compare import SCENARIOS, applies

__all__ = ["THIRTY", "plan"]

THIRTY = (
    # Grouped heads and rotary positions; windows; soft caps; chunks; sinks.
    *("llama", "mistral", "qwen3", "phi3", "cohere2", "gemma2", "gemma3_text", "llama4_text"),
    *("gpt_oss", "starcoder2"),
    # Learned positions, ALiBi, one key head, other spellings of the chain.
    *("gpt2", "gpt_neo", "gptj", "bloom", "mpt", "falcon", "gpt_bigcode", "opt", "codegen"),
    # Latent attention, experts, differential attention, keys chosen by the data.
    *("deepseek_v3", "minicpm3", "mixtral", "diffllama", "doge"),
    # Hybrids with linear attention or a state.
    *("qwen3_next", "jamba", "recurrent_gemma"),
    # Encoders used as decoders, decoders of encoder-decoders, two streams.
    *("bert", "bart", "xlnet"),
)
"""Architectures chosen for the variety of their masks and spellings of attention."""


def plan(only: str = "", scenarios: str = "", *, quick: bool = False) -> dict[str, list[str]]:
    """Scenarios of each model, in the order in which they run.

    Args:
        only: names, separated by commas; "" for all, ``zoo_extra`` included.
        scenarios: likewise; "" for all.
        quick: every third model.
    Raises:
        SystemExit: a name or scenario that does not exist.
    """
    known = [*zoo.names(), *zoo_extra.names()]
    names = only.split(",") if only else known[:: 3 if quick else 1]
    chosen = scenarios.split(",") if scenarios else list(SCENARIOS)
    unknown = [n for n in names if n not in known] + [s for s in chosen if s not in SCENARIOS]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; scenarios are {', '.join(SCENARIOS)}")
    return {
        name: [
            s
            for s in chosen
            if applies(name, s) and (s != "inductor" or name in THIRTY or bool(scenarios))
        ]
        for name in names
    }
