# %% [markdown]
# Sparse prefill, then a compressed key-value cache. Prefill leaves keys and values of every token;
# the answer needs few of them. In the manner of SnapKV, the attention of the last rows of the
# prompt (the observation window) is summed over these rows and over the query heads that share a
# key head, and pooled along the keys; each key head keeps the keys with most of it, and the window
# itself.
#
# Where the queries of the window come from: the compiled model does not hand them out. The last
# tokens are taken off the cache and run a second time, through the model as it is, with an
# attention function registered at transformers' own interface that looks on. No module is patched;
# it costs one call with `window` tokens, and these rows are then dense.
#
# What is kept serves what the window asks. A question that is put later may find its record gone.
#
# Run it with `python examples/kv_compression.py`; it takes half a minute on two CPU cores.

# %%
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparse_compiler.demo.checkpoint import load_retriever
from sparse_compiler.demo.records import make_prompt

Scores = dict[int, Tensor]
"""Layer number -> [B, Hkv, Lk] float32: how much the window attends to each key."""

# %% [markdown]
# An attention function that notes what the rows it is given look at, and is SDPA otherwise.


# %%
@contextmanager
def observed(model: PreTrainedModel) -> Iterator[Scores]:
    """Let ``model`` run with an attention that adds up its rows' weights; restored afterwards."""
    scores: Scores = {}

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any
    ) -> tuple[Tensor, None]:
        scores[module.layer_idx] = window_attention(query, key, more.get("scaling"))
        return sdpa_attention_forward(module, query, key, value, mask, **more)

    before: Any = model.config._attn_implementation
    AttentionInterface.register("observed_sdpa", forward)
    AttentionMaskInterface.register("observed_sdpa", sdpa_mask)
    model.set_attn_implementation("observed_sdpa")
    try:
        yield scores
    finally:
        model.set_attn_implementation(before)


def window_attention(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """Attention weights of the last rows, summed over rows and over the heads of a group.

    Args:
        query: [B, Hq, W, D], the last W rows of a causal sequence.
        key: [B, Hkv, Lk, D], all its keys, Lk >= W.
        scale: of the logits; None is D ** -0.5.
    Returns:
        [B, Hkv, Lk] float32.
    """
    rows, keys = query.shape[2], key.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1)).float()
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bhgqd,bhkd->bhgqk", grouped, key.float()) * factor
    hidden = torch.ones(rows, keys, dtype=torch.bool, device=key.device).triu(keys - rows + 1)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).sum((2, 3))


# %% [markdown]
# The choice: all keys of the window, and before it the best of the pooled scores.


# %%
def kept_keys(scores: Tensor, capacity: int, window: int, pool: int) -> Tensor:
    """Which keys each head keeps, in ascending order: int64 [B, Hkv, capacity].

    Args:
        scores: [B, Hkv, Lk], see `window_attention`.
        capacity: keys to keep, window < capacity <= Lk.
        window: the last keys, all kept.
        pool: width of the maximum along the keys, odd: neighbours of a heavy key are kept with it.
    """
    keys = scores.shape[-1]
    old = F.max_pool1d(scores[..., : keys - window], pool, stride=1, padding=pool // 2)
    chosen = old.topk(capacity - window, dim=-1).indices.sort(-1).values
    last = torch.arange(keys - window, keys, device=scores.device)
    return torch.cat((chosen, last.expand(*chosen.shape[:-1], -1)), dim=-1)


def compress(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: DynamicCache,
    *,
    capacity: int,
    window: int = 64,
    pool: int = 7,
) -> tuple[DynamicCache, Tensor]:
    """Run the last ``window`` tokens again, looking on, and keep ``capacity`` keys of each head.

    Args:
        model: the model itself, not its compiled form.
        input_ids: [B, N], the prompt, without padding: a cache has no place for a row's own mask.
        cache: what prefill left, N tokens in plain layers; it is not usable afterwards.
        capacity, window, pool: see `kept_keys`.
    Returns:
        A cache of ``min(capacity, N)`` keys, and the logits of the last token, [B, V]. Decode from
        here with explicit positions: the cache is shorter than the text, see `decode`.
    Raises:
        ValueError: sizes that do not fit, or a cache with other than plain layers.
    """
    tokens = input_ids.shape[1]
    if not 0 < window < min(capacity, tokens) or pool % 2 == 0:
        raise ValueError(
            "0 < window < capacity, window < tokens and an odd pool are needed, but got "
            f"window {window}, capacity {capacity}, {tokens} tokens, pool {pool}"
        )
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise ValueError(f"only plain dynamic layers can be compressed, but got {cache.layers}")
    if cache.get_seq_length() != tokens:
        raise ValueError(f"the cache holds {cache.get_seq_length()} tokens, the prompt {tokens}")
    cache.crop(-window)
    positions = torch.arange(tokens - window, tokens, device=input_ids.device)[None]
    with observed(model) as scores:
        logits = model(
            input_ids=input_ids[:, -window:],
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
    if set(scores) != set(range(len(cache.layers))):
        raise ValueError("the model does not call transformers' attention interface in every layer")
    if capacity >= tokens:
        return cache, logits
    small = DynamicCache(config=model.config)
    layers: Any = cache.layers
    for number, layer in enumerate(layers):
        kept = kept_keys(scores[number], capacity, window, pool)[..., None]
        keys, values = layer.keys, layer.values
        small.update(
            keys.gather(2, kept.expand(-1, -1, -1, keys.shape[-1])),
            values.gather(2, kept.expand(-1, -1, -1, values.shape[-1])),
            number,
        )
    return small, logits


def decode(
    model: Callable[..., Any], cache: DynamicCache, logits: Tensor, position: int, steps: int
) -> Tensor:
    """Choose ``steps`` tokens greedily. logits: [B, V] of the last token; returns [B, steps].

    ``position`` is that of the first new token in the text: the number of tokens before it, not the
    number of keys in the cache.
    """
    chosen = []
    for step in range(steps):
        chosen.append(logits.argmax(-1))
        if step + 1 == steps:
            break
        where = torch.full((len(logits), 1), position + step, device=logits.device)
        logits = model(
            input_ids=chosen[-1][:, None], position_ids=where, past_key_values=cache
        ).logits[:, -1]
    return torch.stack(chosen, dim=1)


# %% [markdown]
# The retriever answers the last question of a prompt, whose digits are cut off, from the whole
# cache and from an eighth of it.

# %%
if __name__ == "__main__":
    model: Any = load_retriever(torch.float32, source="transformers")
    compiled = torch.compile(
        model, backend="minference", options={"inner": "eager", "min_tokens": 0}
    )
    for seed in range(4):
        text = make_prompt(8192, seed=seed).tokens[None]
        prompt, answer = text[:, :-5], bytes(text[0, -5:-1].tolist()).decode()
        size = prompt.shape[1]
        with torch.inference_mode():
            whole = DynamicCache(config=model.config)
            last = compiled(input_ids=prompt, past_key_values=whole, logits_to_keep=1).logits[:, -1]
            kept = DynamicCache(config=model.config)
            compiled(input_ids=prompt, past_key_values=kept, logits_to_keep=1)
            small, again = compress(model, prompt, kept, capacity=1024)
            for name, cache, logits in (("whole", whole, last), ("small", small, again)):
                keys = cache.get_seq_length()
                given = bytes(decode(model, cache, logits, size, 4)[0].tolist()).decode()
                print(f"{name} cache, {keys} keys: {given}, the record says {answer}")
