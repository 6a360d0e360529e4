# %% [markdown]
# Weights of 8 bits, by torchao, under sparse attention. Quantisation replaces the weights of the
# linear layers; the attention between them reads activations of the model's dtype, as before.
#
# It needs torchao (`pip install torchao`). Run it with `python examples/quantized_weights.py`.

# %%
from typing import Any

import torch
from torch import nn

from sparse_compiler import stats
from sparse_compiler.demo.checkpoint import load_retriever
from sparse_compiler.demo.records import make_prompt, score_answers


# %%
def quantized(model: nn.Module) -> nn.Module:
    """Quantise the linear layers to int8 in place, one scale for each row of a weight.

    Raises:
        ImportError: torchao is not installed.
    """
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Int8WeightOnlyConfig,
        quantize_,
    )

    quantize_(model, Int8WeightOnlyConfig())
    return model


# %%
if __name__ == "__main__":
    prompt = make_prompt(8192)
    model = quantized(load_retriever(torch.float32, source="transformers"))
    compiled: Any = torch.compile(
        model, backend="minference", options={"inner": "eager", "min_tokens": 0}
    )
    with torch.inference_mode():
        dense = model(input_ids=prompt.tokens[None]).logits
        sparse = compiled(input_ids=prompt.tokens[None]).logits
    for name, logits in (("dense", dense), ("sparse", sparse)):
        print(f"8-bit weights, {name}: {int(score_answers(logits, prompt).sum())} of 4 answers")
    for layer in stats(compiled):
        print(f"  {layer.layer}: density {layer.mean_density:.3f}")
