# %% [markdown]
# A long prompt in chunks. Each chunk is one call of the compiled model: its queries against all
# keys so far. Sparse attention chooses anew for each chunk, from the last rows of that chunk, so
# that a chunk looks at other keys than one long call would; at `budget=1.0` both compute every pair
# and agree.
#
# How often it compiles depends on the cache:
#
# | cache | graphs | why |
# |---|---|---|
# | dynamic | 3 | no keys yet; some keys; any number of keys (sizes become symbols) |
# | static | 2 | the cache is made inside the first call; afterwards only a counter in it changes |
#
# Prompts of other lengths make the number of queries a symbol too, which adds at most two graphs,
# then no more. `chunks` puts the remainder first, so that all later chunks are alike.
#
# Run it with `python examples/chunked_prefill.py`; it takes half a minute on two CPU cores.

# %%
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from sparse_compiler import models, stats
from sparse_compiler.demo.checkpoint import load_retriever
from sparse_compiler.demo.records import make_prompt, score_answers


# %%
def chunks(tokens: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, end) of each chunk; the remainder comes first, so that all later ones are alike.

    Raises:
        ValueError: ``size`` is not positive.
    """
    if size < 1:
        raise ValueError(f"a chunk needs at least one token, but got {size}")
    end = tokens % size or min(size, tokens)
    start = 0
    while start < tokens:
        yield start, end
        start, end = end, end + size


def prefill(
    model: Callable[..., Any], input_ids: Tensor, cache: Cache, size: int, **more: Any
) -> Tensor:
    """Fill ``cache`` chunk by chunk.

    Args:
        model: a compiled transformers model, or the model itself.
        input_ids: [B, N] without padding.
        cache: empty.
        size: tokens of a chunk; an executor may keep chunks of few queries dense.
        more: passed on with every chunk, e.g. ``logits_to_keep=1``.
    Returns:
        The logits of all chunks one after the other, [B, N, V] without ``logits_to_keep``.
    """
    found = [
        model(input_ids=input_ids[:, start:end], past_key_values=cache, **more).logits
        for start, end in chunks(input_ids.shape[1], size)
    ]
    return torch.cat(found, dim=1)


# %%
if __name__ == "__main__":
    prompt = make_prompt(8192)
    for name in ("dynamic", "static"):
        model = load_retriever(torch.float32, source="transformers")
        compiled: Any = torch.compile(
            model, backend="minference", options={"inner": "eager", "min_tokens": 0}
        )
        config: Any = model.config
        cache = (
            DynamicCache(config=config)
            if name == "dynamic"
            else StaticCache(config=config, max_cache_len=8192 + 64)
        )
        with torch.inference_mode():
            logits = prefill(compiled, prompt.tokens[None], cache, 2048)
        right = int(score_answers(logits, prompt).sum())
        print(f"{name} cache: {right} of 4 answers, {len(models.graphs_of(compiled))} graphs")
        for layer in stats(compiled)[-4:]:
            print(f"  {layer.layer}: {layer.num_q} x {layer.num_k}, {layer.mean_density:.3f}")
