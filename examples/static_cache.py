# %% [markdown]
# A static cache: sparse prefill, dense decode. transformers' `StaticCache` has room for
# `max_cache_len` tokens from the beginning; keys that are not written yet are masked. The mask says
# where the prompt ends and the compiler proves it, so that the choice is that of a dynamic cache.
#
# `sparse_compiler.compile` sends calls with one new token to the model as it is, so that decode
# reads the same buffers densely.
#
# Run it with `python examples/static_cache.py`; it takes half a minute on two CPU cores.

# %%
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

import sparse_compiler
from sparse_compiler.demo.checkpoint import load_retriever
from sparse_compiler.demo.records import make_prompt


# %%
def generate(
    model: nn.Module, input_ids: Tensor, cache: Cache, steps: int
) -> tuple[Tensor, Tensor]:
    """Prefill in one call, then choose ``steps`` tokens greedily.

    Args:
        model: a transformers model, as it is or after `sparse_compiler.compile`.
        input_ids: [B, N] without padding.
        cache: empty, with room for N + steps.
    Returns:
        The tokens, [B, steps], and the logits they were chosen from, [B, steps, V].
    """
    rows = [model(input_ids=input_ids, past_key_values=cache, logits_to_keep=1).logits]
    chosen = [rows[0].argmax(-1)]
    while len(chosen) < steps:
        rows.append(model(input_ids=chosen[-1], past_key_values=cache).logits)
        chosen.append(rows[-1].argmax(-1))
    return torch.cat(chosen, dim=1), torch.cat(rows, dim=1)


# %%
if __name__ == "__main__":
    model = load_retriever(torch.float32, source="transformers")
    sparse_compiler.compile(model, inner="eager", min_tokens=0)
    config: Any = model.config
    text = make_prompt(8192).tokens[None]
    prompt, answer = text[:, :-5], bytes(text[0, -5:-1].tolist()).decode()
    with torch.inference_mode():
        for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=8448)):
            tokens, _ = generate(model, prompt, cache, 4)
            given = bytes(tokens[0].tolist()).decode()
            print(f"{type(cache).__name__}: {given}, the record says {answer}")
    for layer in sparse_compiler.stats(model):
        print(f"  {layer.layer}: {layer.num_q} x {layer.num_k}, {layer.mean_density:.3f}")
