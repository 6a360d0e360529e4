# %% [markdown]
# A small LLaMA with random weights, a long prompt, one line: what was found, what was computed.
# Run it with `python examples/quickstart.py`; it takes about a minute on two CPU cores.

# %%
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparse_compiler

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
    max_position_embeddings=16384,
)
model = LlamaForCausalLM(config).eval()
text = torch.tensor([list(Path(__file__).read_bytes() * 10)[:12288]])  # bytes as tokens

# %% [markdown]
# Ask first: every attention, what its mask was proved to be, and what happens to it.

# %%
with torch.inference_mode():
    print(sparse_compiler.explain(model, (text,)))

# %% [markdown]
# Then compile. `inner="eager"` skips Inductor here, to be quick.

# %%
compiled = torch.compile(model, backend="minference", options={"inner": "eager"})
with torch.inference_mode():
    sparse = compiled(text).logits
    dense = model(text).logits
print("largest difference of the logits:", (sparse - dense).abs().max().item())
for layer in sparse_compiler.stats(compiled):
    print(f"{layer.layer}: density {layer.mean_density:.3f}, index in {layer.index_ms:.0f} ms")
