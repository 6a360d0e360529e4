"""The backend on real and on hand-written models: rewritten where proved, equal everywhere."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sparse_compiler
from sparse_compiler.backend import minference
from sparse_compiler.errors import OptionInvalid, SiteDeclined
from sparse_compiler.explanation import report_of
from sparse_compiler.testing import assert_close, random_qkv

transformers = pytest.importorskip("transformers")

LENGTH = 90
ATTEND = torch.ops.sparse_compiler.attend.default
EXACT = {"budget": 1.0}


class Capture:
    """The backend under test; keeps every graph as it left the passes."""

    def __init__(self, **options: Any) -> None:
        self.options = {"min_tokens": 0, "inner": "eager"} | options
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        run = minference(gm, inputs, options=self.options)
        self.graphs.append(gm)
        return run

    def count(self, target: Any) -> int:
        return sum(n.target == target for gm in self.graphs for n in gm.graph.nodes)

    @property
    def rewritten(self) -> int:
        return self.count(ATTEND)

    @property
    def dense(self) -> int:
        return self.count(F.scaled_dot_product_attention)

    def masks(self, num_q: int, num_k: int) -> list[str]:
        """Nodes that hold a tensor [..., Lq, Lk] without heads' values: masks left in the graph."""
        found = []
        for gm in self.graphs:
            for node in gm.graph.nodes:
                value = node.meta.get("example_value")
                if isinstance(value, Tensor) and tuple(value.shape[-2:]) == (num_q, num_k):
                    found.append(node.name)
        return found


@pytest.fixture
def gradients() -> None:
    """Asked for by tests that run with gradients on."""


@pytest.fixture(autouse=True)
def inference(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.inference_mode("gradients" not in request.fixturenames):
        yield


# ---- real models -------------------------------------------------------------------------------

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 16}


def build(name: str, **changes: Any) -> nn.Module:
    t = transformers
    torch.manual_seed(0)
    if name == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**GROUPED | changes))
    elif name == "mistral":
        model = t.MistralForCausalLM(t.MistralConfig(**GROUPED | {"sliding_window": 20} | changes))
    elif name == "qwen3":
        model = t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED | changes))
    elif name == "gemma2":
        sizes = GROUPED | {"sliding_window": 20, "query_pre_attn_scalar": 16}
        model = t.Gemma2ForCausalLM(t.Gemma2Config(**sizes | changes))
    elif name == "gpt2":
        config = t.GPT2Config(
            n_embd=64,
            n_layer=2,
            n_head=4,
            vocab_size=128,
            n_positions=512,
            bos_token_id=1,
            eos_token_id=1,
        )
        model = t.GPT2LMHeadModel(config)
    elif name == "bert":
        model = t.BertModel(t.BertConfig(**COMMON))
    else:
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = {key: COMMON[key] for key in names}
        model = t.ViTModel(t.ViTConfig(**sizes, image_size=64, patch_size=8))
    return model.eval()


def ids(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(2, 128, (batch, length), generator=draw)


def first(output: Any) -> Tensor:
    return output[0] if not isinstance(output, Tensor) else output


def plainly_compiled(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The unmodified model, compiled: for some models that differs from the uncompiled one."""
    return first(torch.compile(model, backend="eager")(*args, **kwargs))


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("llama", "causal"),
        ("mistral", "causal, window 20"),
        ("qwen3", "causal"),
        ("gemma2", "causal, window 20"),
        ("gpt2", "causal"),
        ("bert", "full"),
        ("vit", "full"),
    ],
)
def test_every_attention_of_a_model_is_rewritten_and_equal_at_budget_one(
    name: str, mask: str
) -> None:
    model = build(name)
    inputs = torch.randn(2, 3, 64, 64) if name == "vit" else ids()
    length = 65 if name == "vit" else LENGTH
    capture = Capture(**EXACT)
    out = first(torch.compile(model, backend=capture)(inputs))
    assert (capture.rewritten, capture.dense) == (2, 0)
    assert capture.masks(length, length) == []
    expected = plainly_compiled(model, inputs)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    sites = report_of(model).sites
    assert [site.decision for site in sites] == ["rewritten"] * 2
    assert sites[0].mask == mask
    assert all(site.layer for site in sites)
    pattern = "block_sparse" if name in ("bert", "vit") else "vertical_slash"
    assert all(pattern in site.pattern for site in sites)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_a_left_padded_batch_is_equal_on_its_real_tokens(name: str) -> None:
    model, tokens = build(name), ids()
    attention = torch.ones_like(tokens)
    attention[1, :37] = 0
    capture = Capture(**EXACT)
    out = first(torch.compile(model, backend=capture)(tokens, attention_mask=attention))
    assert capture.rewritten == 2
    assert capture.masks(LENGTH, LENGTH) == []
    expected = first(model(tokens, attention_mask=attention))
    real = attention.bool()
    torch.testing.assert_close(out[real], expected[real], rtol=1e-4, atol=1e-4)
    # What the padding says must not matter.
    tokens[1, :37] = 5
    other = first(torch.compile(model, backend=capture)(tokens, attention_mask=attention))
    torch.testing.assert_close(other[real], out[real], rtol=1e-4, atol=1e-4)


def test_a_padded_bidirectional_batch_is_equal_on_its_real_tokens() -> None:
    model, tokens = build("bert"), ids()
    attention = torch.ones_like(tokens)
    attention[0, 60:] = 0
    capture = Capture(**EXACT)
    out = first(torch.compile(model, backend=capture)(tokens, attention_mask=attention))
    assert capture.rewritten == 2
    expected = first(model(tokens, attention_mask=attention))
    real = attention.bool()
    torch.testing.assert_close(out[real], expected[real], rtol=1e-4, atol=1e-4)


def test_one_dynamic_graph_serves_several_lengths() -> None:
    model, capture = build("llama"), Capture(**EXACT)
    compiled = torch.compile(model, backend=capture, dynamic=True)
    for length in (90, 64, 131, 40):
        out = first(compiled(ids(1, length)))
        torch.testing.assert_close(out, first(model(ids(1, length))), rtol=1e-4, atol=1e-4)
    assert len(capture.graphs) == 1
    assert capture.rewritten == 2


def test_a_dynamic_padded_graph_serves_several_batches_and_lengths() -> None:
    model, capture = build("mistral"), Capture(**EXACT)
    compiled = torch.compile(model, backend=capture, dynamic=True)
    for batch, length in ((2, 90), (3, 61)):
        tokens = ids(batch, length)
        attention = torch.ones_like(tokens)
        attention[1, : length // 3] = 0
        out = first(compiled(tokens, attention_mask=attention))
        expected = first(model(tokens, attention_mask=attention))
        real = attention.bool()
        torch.testing.assert_close(out[real], expected[real], rtol=1e-4, atol=1e-4)
    assert len(capture.graphs) == 1
    assert capture.rewritten == 2


def test_low_precision_models_keep_their_dtype_and_stay_close() -> None:
    model = build("llama").bfloat16()
    capture = Capture(**EXACT)
    out = first(torch.compile(model, backend=capture)(ids()))
    assert out.dtype == torch.bfloat16
    assert capture.rewritten == 2
    wide = first(build("llama").double()(ids()))
    own = (first(model(ids())).double() - wide).abs().max()
    assert (out.double() - wide).abs().max() <= 2 * own


def test_eager_attention_of_a_model_is_equal_whether_found_or_not() -> None:
    model = build("llama", attn_implementation="eager")
    capture = Capture(fallback="silent", **EXACT)
    out = first(torch.compile(model, backend=capture)(ids()))
    torch.testing.assert_close(out, first(model(ids())), rtol=1e-4, atol=1e-4)


# ---- hand-written models -----------------------------------------------------------------------


class Block(nn.Module):
    """Grouped-query attention as people write it."""

    def __init__(self, grouping: str, heads: int = 4, kv_heads: int = 2, dim: int = 16) -> None:
        super().__init__()
        self.grouping, self.heads, self.kv_heads, self.dim = grouping, heads, kv_heads, dim
        self.q = nn.Linear(48, heads * dim)
        self.k = nn.Linear(48, kv_heads * dim)
        self.v = nn.Linear(48, kv_heads * dim)
        self.o = nn.Linear(heads * dim, 48)
        self.dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.dim).transpose(1, 2)
        k, v = (
            layer(x).view(batch, length, self.kv_heads, self.dim).transpose(1, 2)
            for layer in (self.k, self.v)
        )
        groups = self.heads // self.kv_heads
        keywords: dict[str, Any] = {}
        if self.grouping == "enable_gqa":
            keywords["enable_gqa"] = True
        elif self.grouping == "repeat_interleave":
            k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        elif self.grouping == "expand":
            shape = (batch, self.kv_heads, groups, length, self.dim)
            k, v = (t[:, :, None].expand(shape).flatten(1, 2) for t in (k, v))
        elif self.grouping == "tiled":
            # Not grouping: query head h reads key head h % Hkv.
            k, v = (t.repeat(1, groups, 1, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout, is_causal=True, **keywords
        )
        return x + self.o(out.transpose(1, 2).reshape(batch, length, -1))


@pytest.mark.parametrize("grouping", ["enable_gqa", "repeat_interleave", "expand", "tiled"])
def test_grouped_heads_are_seen_through_and_equal(grouping: str) -> None:
    model, x = Block(grouping), torch.randn(2, LENGTH, 48)
    capture = Capture(**EXACT)
    out = torch.compile(model, backend=capture)(x)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
    assert capture.rewritten == 1
    [site] = report_of(model).sites
    heads = 4 if grouping == "tiled" else 2
    assert site.shapes["key"] == f"[2, {heads}, {LENGTH}, 16]"


def test_a_model_without_attention_is_left_alone() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(3, 8)
    capture = Capture()
    assert torch.equal(torch.compile(model, backend=capture)(x), model(x))
    assert report_of(model).sites == []


# ---- argument forms and masks ------------------------------------------------------------------

NUM_Q, NUM_K = 70, 101


def qkv(num_q: int = NUM_Q, num_k: int = NUM_K, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    sizes = {"batch": 2, "heads": 4, "kv_heads": 4, "dim": 16} | changes
    return random_qkv(0, num_q=num_q, num_k=num_k, **sizes)


def square(**changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    return qkv(LENGTH, LENGTH, **changes)


def check(
    function: Callable[..., Tensor], *args: Tensor, rewritten: bool | None, **options: Any
) -> Capture:
    """Compile ``function``, compare with running it plainly, and count what was rewritten."""
    expected = function(*args)
    capture = Capture(**{"fallback": "silent"} | EXACT | options)
    out = torch.compile(function, backend=capture)(*args)
    # Rows that see nothing: torch's kernels differ among themselves (0 or NaN).
    expected = expected.nan_to_num(0.0)
    assert_close(out.nan_to_num(0.0), expected, length=args[1].shape[2])
    if rewritten is not None and capture.rewritten != int(rewritten):
        raise AssertionError([(s.code, s.reason) for s in capture_sites(function, args, capture)])
    return capture


def capture_sites(function: Callable[..., Tensor], args: Any, capture: Capture) -> list[Any]:
    return sparse_compiler.explain(function, args, options=capture.options).sites


sdpa = F.scaled_dot_product_attention
CALLS: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]] = {
    "plain": (lambda q, k, v: sdpa(q, k, v), square),
    "causal keyword": (lambda q, k, v: sdpa(q, k, v, is_causal=True), square),
    "causal positional": (lambda q, k, v: sdpa(q, k, v, None, 0.0, True), square),
    "all keywords": (
        lambda q, k, v: sdpa(
            query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=True
        ),
        square,
    ),
    "torch.nn.functional through the module": (
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        square,
    ),
    # The flag is aligned to the first row and key, not to the last.
    "causal, fewer rows": (lambda q, k, v: sdpa(q, k, v, is_causal=True), qkv),
    "causal, fewer keys": (
        lambda q, k, v: sdpa(q, k, v, is_causal=True),
        lambda: qkv(NUM_K, NUM_Q),
    ),
    "scale": (lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.05), square),
    "scale from a size": (
        lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=1 / math.sqrt(k.size(-1) + 3)),
        square,
    ),
    "grouped": (
        lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True),
        lambda: square(kv_heads=2),
    ),
    "one key head": (
        lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True),
        lambda: square(kv_heads=1),
    ),
    "flag without grouping": (
        lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True),
        square,
    ),
    "other value size": (
        lambda q, k, v: sdpa(q, k, v, is_causal=True),
        lambda: square(value_dim=24),
    ),
    "strided": (
        lambda q, k, v: sdpa(q, k, v, is_causal=True),
        lambda: square(layout="tokens_first"),
    ),
}


@pytest.mark.parametrize("form", CALLS)
def test_every_form_of_the_call_is_rewritten_and_equal(form: str) -> None:
    function, inputs = CALLS[form]
    check(function, *inputs(), rewritten=True)


Mask = Callable[[Tensor, Tensor], Tensor]
MASKS: dict[str, tuple[Mask, bool | None]] = {
    "causal, aligned to the last row": (lambda q, k: k <= q + (NUM_K - NUM_Q), True),
    "causal, aligned to the first row": (lambda q, k: k <= q, True),
    "causal, spelled the other way": (lambda q, k: q + 31 >= k, True),
    "causal by subtraction": (lambda q, k: q - k + 31 >= 0, True),
    "not future": (lambda q, k: ~(k > q + 31), True),
    "window": (lambda q, k: (k <= q + 31) & (k > q + 31 - 20), True),
    # Fewer rows that see all keys: cross-attention, dense by design.
    "all true": (lambda q, k: (q >= 0) & (k >= 0), False),
    # None of these may be taken for an unbounded side.
    "strictly causal": (lambda q, k: k < q, None),
    "five keys back": (lambda q, k: k <= q - 5, None),
    "three keys ahead": (lambda q, k: k <= q + 3, None),
    "own key only": (lambda q, k: k == q, None),
    "strictly later": (lambda q, k: k > q, None),
    "later and own": (lambda q, k: k >= q, None),
    "from five keys on": (lambda q, k: k >= q + 5, None),
    "band on both sides": (lambda q, k: (q - k).abs() <= 9, None),
    "ring far away": (lambda q, k: (k <= q - 5) & (k > q - 15), None),
    "later by one, window": (lambda q, k: (k < q) & (k >= q - 1), None),
    "fewer than all rows": (lambda q, k: (k <= q + 31) & (q >= 5), None),
    "without the first key": (lambda q, k: (k <= q + 31) & (k > 0), None),
    "every second key": (lambda q, k: (k <= q + 31) & (k % 2 == 0), False),
    "dilated": (lambda q, k: (k <= q + 31) & ((q - k) % 3 == 0), False),
    "chunks": (lambda q, k: k // 16 == q // 16, True),
    "chunks from the right": (lambda q, k: (k <= q + 31) & (k // 16 == (q + 31) // 16), True),
    "prefix": (lambda q, k: (k <= q + 31) | (k < 40), True),
    "sink and window": (lambda q, k: (k <= q + 31) & ((k > q + 20) | (k < 4)), False),
    "nothing": (lambda q, k: (k < 0) & (q >= 0), None),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_every_mask_is_honoured_and_the_known_ones_are_proved_away(name: str, kind: str) -> None:
    mask, rewritten = MASKS[name]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        seen = mask(rows, keys)
        if kind == "float":
            seen = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
        return sdpa(q, k, v, attn_mask=seen[None, None])

    # Additive masks need not be understood, only honoured.
    expected = rewritten if kind == "bool" or rewritten is False else None
    capture = check(function, *qkv(), rewritten=expected)
    if capture.rewritten:
        assert capture.masks(NUM_Q, NUM_K) == []


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_is_honoured_for_symbolic_sizes(name: str) -> None:
    mask, _ = MASKS[name]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = mask(torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None])
        return sdpa(q, k, v, attn_mask=seen)

    capture = Capture(fallback="silent", **EXACT)
    compiled = torch.compile(function, backend=capture, dynamic=True)
    for sizes in ((70, 101), (33, 64), (64, 40)):
        inputs = qkv(*sizes)
        expected = function(*inputs).nan_to_num(0.0)
        assert_close(compiled(*inputs).nan_to_num(0.0), expected, length=sizes[1])


def test_the_offset_of_chunked_prefill_is_proved_for_symbolic_sizes() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        offset = k.shape[2] - q.shape[2]
        rows = torch.arange(q.shape[2])[:, None] + offset
        return sdpa(q, k, v, attn_mask=torch.arange(k.shape[2])[None] <= rows)

    capture = Capture(**EXACT)
    compiled = torch.compile(function, backend=capture, dynamic=True)
    for sizes in ((70, 101), (33, 64), (50, 51)):
        inputs = qkv(*sizes)
        assert_close(compiled(*inputs), function(*inputs), length=sizes[1])
    assert len(capture.graphs) == 1
    assert capture.rewritten == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padding_from_an_input_is_honoured(dtype: torch.dtype) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        seen = (keys <= rows)[None, None] & padding.bool()[:, None, None, :]
        return sdpa(q, k, v, attn_mask=seen)

    padding = torch.ones(2, LENGTH)
    padding[0, :20], padding[1, 80:] = 0, 0
    capture = check(function, *square(), padding.to(dtype), rewritten=True)
    assert capture.masks(LENGTH, LENGTH) == []


def test_padding_of_one_entry_is_shared_by_the_batch() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=padding[:, None, None, :].expand(2, 4, LENGTH, LENGTH))

    padding = torch.ones(1, LENGTH, dtype=torch.bool)
    padding[0, 50:] = False
    check(function, *square(), padding, rewritten=None)


@pytest.mark.parametrize("shape", [(2, 4), (2, 1), (1, 4), (1, 1), (1,), ()])
def test_a_mask_that_is_an_input_stays_dense(shape: tuple[int, ...]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=mask)

    mask = torch.rand(*shape, LENGTH, LENGTH) < 0.7
    mask[..., 0] = True
    capture = check(function, *square(), mask, rewritten=False)
    codes = [site.code for site in capture_sites(function, (*square(), mask), capture)]
    assert codes == ["MASK_INPUT"]


def test_a_learned_bias_stays_dense() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        return sdpa(q, k, v, attn_mask=bias + torch.where(keys <= rows, 0.0, float("-inf")))

    check(function, *square(), torch.randn(4, LENGTH, LENGTH), rewritten=False)


def test_alibi_is_a_bias() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        slope = torch.tensor([0.5, 0.25, 0.1, 0.0])[:, None, None]
        return sdpa(q, k, v, attn_mask=slope * (keys - rows) + (keys > rows) * -1e9)

    capture = check(function, *square(), rewritten=True)
    [site] = capture_sites(function, square(), capture)
    assert "bias" in site.mask
    assert capture.masks(LENGTH, LENGTH) == []


def test_a_mask_that_depends_on_the_head_stays_dense() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        reach = torch.tensor([5, 10, 20, 100])[:, None, None]
        return sdpa(q, k, v, attn_mask=(keys <= rows) & (keys > rows - reach))

    check(function, *square(), rewritten=False)


def test_packed_documents_are_honoured() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
        rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        same = document[:, None, :, None] == document[:, None, None, :]
        return sdpa(q, k, v, attn_mask=same & (keys <= rows))

    document = torch.arange(LENGTH).div(25, rounding_mode="floor").expand(2, -1).contiguous()
    check(function, *square(), document, rewritten=False)


def test_a_mask_changed_in_place_is_not_the_mask_it_was() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        mask[:, 0] = False
        mask[0, 0] = True
        return sdpa(q, k, v, attn_mask=mask)

    check(function, *square(), rewritten=False)


def test_a_mask_that_is_used_elsewhere_survives_its_attention() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.arange(LENGTH)[None] <= torch.arange(LENGTH)[:, None]
        return sdpa(q, k, v, attn_mask=mask) + mask.sum() / LENGTH

    check(function, *square(), rewritten=True)


def test_several_attentions_in_one_graph_keep_their_own_masks() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
        a = sdpa(q, k, v, is_causal=True)
        b = sdpa(a, k, v, attn_mask=(keys <= rows) & (keys > rows - 10))
        return sdpa(b, k, v) + sdpa(q, k, v, attn_mask=torch.rand(LENGTH, LENGTH) < 2)

    inputs = square()
    capture = Capture(fallback="silent", **EXACT)
    out = torch.compile(function, backend=capture)(*inputs)
    assert_close(out, function(*inputs), length=LENGTH)
    assert (capture.rewritten, capture.dense) == (3, 1)


@pytest.mark.parametrize("dims", [2, 3, 5])
def test_any_rank_is_rewritten(dims: int) -> None:
    q, k, v = (t[0, 0] if dims == 2 else t[0] if dims == 3 else t[None] for t in square())
    capture = Capture(fallback="silent", **EXACT)
    out = torch.compile(lambda q, k, v: sdpa(q, k, v, is_causal=True), backend=capture)(q, k, v)
    assert_close(out, sdpa(q, k, v, is_causal=True), length=LENGTH)
    assert capture.rewritten == 1


def test_keys_of_a_batch_of_one_are_shared_or_left_dense() -> None:
    q, k, v = square()
    check(lambda q, k, v: sdpa(q, k, v), q, k[:1], v[:1], rewritten=None)


def test_half_written_static_keys_beyond_the_rows_are_never_seen() -> None:
    """A static cache: more keys than positions, the mask compares with a position input."""

    def function(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=torch.arange(k.shape[2])[None] <= position[:, None])

    check(function, *qkv(40, 101), torch.arange(40) + 10, rewritten=None)


# ---- declines ----------------------------------------------------------------------------------


def block_and_input(length: int = LENGTH) -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    return Block("enable_gqa"), torch.randn(2, length, 48)


def warned(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "minference" in str(w.message)]


def test_active_dropout_is_declined_and_random_numbers_are_the_same() -> None:
    model, x = block_and_input()
    model.dropout = 0.3
    capture = Capture(fallback="silent", **EXACT)
    compiled = torch.compile(model, backend=capture)
    torch.manual_seed(7)
    out = compiled(x)
    torch.manual_seed(7)
    assert torch.equal(out, model(x))
    assert capture.rewritten == 0
    assert report_of(model).sites[0].code == "DROPOUT"


@pytest.mark.parametrize(
    ("options", "length", "code"),
    [
        ({"pattern": "dense"}, LENGTH, "CONFIG_DENSE"),
        ({"min_tokens": 91}, LENGTH, "SHORT"),
        ({"min_tokens": "auto"}, LENGTH, "SHORT"),
        ({}, 1, "DECODE"),
    ],
)
@pytest.mark.parametrize("fallback", ["warn", "error"])
def test_expected_declines_are_dense_and_silent(
    options: dict[str, Any], length: int, code: str, fallback: str
) -> None:
    model, x = block_and_input(length)
    capture = Capture(**{"fallback": fallback} | options)
    compiled = torch.compile(model, backend=capture)
    assert warned(lambda: compiled(x)) == []
    assert_close(compiled(x), model(x), length=length)
    assert capture.rewritten == 0
    [site] = report_of(model).sites
    assert (site.decision, site.code) == ("declined", code)
    assert site.reason


def test_cross_attention_is_declined_silently() -> None:
    q, k, v = qkv(50, 77)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v)

    capture = Capture(fallback="error")
    compiled = torch.compile(function, backend=capture, dynamic=True)
    assert warned(lambda: compiled(q, k, v)) == []
    assert_close(compiled(q, k, v), function(q, k, v), length=77)


def test_min_tokens_is_the_least_length_that_is_rewritten() -> None:
    model, x = block_and_input(64)
    for least, count in ((64, 1), (65, 0)):
        torch.compiler.reset()
        capture = Capture(min_tokens=least)
        torch.compile(model, backend=capture)(x)
        assert capture.rewritten == count


def refuse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=mask)


class Masked(nn.Module):
    """Two attentions whose mask is data."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = sdpa(self.proj(q), k, v, attn_mask=mask)
        return sdpa(out, k, v, attn_mask=mask)


def masked_inputs(length: int = LENGTH) -> tuple[Tensor, ...]:
    return (*qkv(length, length), torch.ones(length, length, dtype=torch.bool).tril())


def test_fallback_warn_warns_once_per_code_and_model() -> None:
    first_model, second_model = Masked(), Masked()
    for model in (first_model, second_model):
        capture = Capture()
        compiled = torch.compile(model, backend=capture)
        texts = warned(lambda: (compiled(*masked_inputs()), compiled(*masked_inputs(64))))  # noqa: B023
        assert len(texts) == 1, texts
        assert "MASK_INPUT" in texts[0]
        torch.testing.assert_close(compiled(*masked_inputs()), model(*masked_inputs()))


def test_fallback_error_raises_with_the_reason() -> None:
    compiled = torch.compile(Masked(), backend=Capture(fallback="error"))
    with pytest.raises(Exception, match="MASK_INPUT") as caught:
        compiled(*masked_inputs())
    chain: list[BaseException | None] = [caught.value]
    while chain[-1] is not None:
        chain.append(getattr(chain[-1], "inner_exception", None) or chain[-1].__cause__)
    assert any(isinstance(error, SiteDeclined) for error in chain)


def test_fallback_silent_says_nothing() -> None:
    model = Masked()
    compiled = torch.compile(model, backend=Capture(fallback="silent"))
    assert warned(lambda: compiled(*masked_inputs())) == []
    torch.testing.assert_close(compiled(*masked_inputs()), model(*masked_inputs()))


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("fallback", ["warn", "error"])
def test_gradients_keep_a_model_dense_with_one_warning(fallback: str) -> None:
    model, x = block_and_input()
    capture = Capture(fallback=fallback)
    compiled = torch.compile(model, backend=capture)
    texts = warned(lambda: (compiled(x), compiled(torch.randn(2, 64, 48))))
    assert len(texts) == 1, texts
    assert "GRAD_ENABLED" in texts[0]
    assert "inference_mode" in texts[0]
    assert capture.rewritten == 0
    out, expected = compiled(x), model(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected.sum().backward()
    for got, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_same_model_is_rewritten(mode: Any) -> None:
    model, x = block_and_input()
    capture = Capture(**EXACT)
    compiled = torch.compile(model, backend=capture)
    compiled(x)
    with mode():
        assert warned(lambda: compiled(x)) == []
        assert_close(compiled(x), model(x), length=LENGTH)
    assert capture.rewritten == 1


@pytest.mark.usefixtures("gradients")
def test_a_frozen_model_needs_no_gradient_mode() -> None:
    model, x = block_and_input()
    model.requires_grad_(False)
    capture = Capture(**EXACT)
    out = torch.compile(model, backend=capture)(x)
    assert capture.rewritten == 1
    assert_close(out, model(x), length=LENGTH)


def test_without_a_cxx_compiler_the_graph_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_compiler.backend.has_cxx_compiler", lambda: False)
    model, x = block_and_input()
    capture = Capture(inner="inductor", **EXACT)
    compiled = torch.compile(model, backend=capture)
    texts = warned(lambda: compiled(x))
    assert any("NO_CXX" in text for text in texts), texts
    assert_close(compiled(x), model(x), length=LENGTH)


def test_every_failed_condition_is_in_the_report() -> None:
    q, k, v, mask = masked_inputs()

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=mask, dropout_p=0.1)

    [site] = sparse_compiler.explain(function, (q, k, v, mask), options={"min_tokens": 5000}).sites
    codes = [condition.code for condition in site.conditions]
    assert set(codes) >= {"DROPOUT", "MASK_INPUT", "SHORT"}
    assert site.code == codes[0]
    assert all(condition.reason for condition in site.conditions)


def test_a_declined_site_with_a_proved_mask_loses_the_mask() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.arange(LENGTH)[None] <= torch.arange(LENGTH)[:, None]
        return sdpa(q, k, v, attn_mask=mask)

    capture = check(function, *square(), rewritten=False, min_tokens=5000)
    assert capture.dense == 1
    assert capture.masks(LENGTH, LENGTH) == []
    [site] = capture_sites(function, square(), capture)
    assert site.mask_removed


def test_dryrun_reports_and_changes_nothing() -> None:
    model, x = block_and_input()
    capture = Capture(dryrun=True)
    out = torch.compile(model, backend=capture)(x)
    assert (capture.rewritten, capture.dense) == (0, 1)
    torch.testing.assert_close(out, model(x), rtol=0, atol=0)
    explanation = report_of(model)
    assert explanation.reports[0].dryrun
    assert [site.decision for site in explanation.sites] == ["rewritten"]


@pytest.mark.parametrize("pattern", ["vertical_slash", "a_shape", "block_sparse"])
def test_every_pattern_serves_a_mask_that_looks_ahead(pattern: str) -> None:
    check(lambda q, k, v: sdpa(q, k, v), *square(), rewritten=True, pattern=pattern)


# ---- patterns by option ------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["vertical_slash", "a_shape", "block_sparse", "auto"])
@pytest.mark.parametrize("executor", ["cpu", "reference", "auto"])
def test_every_pattern_and_executor_is_equal_at_budget_one(pattern: str, executor: str) -> None:
    model, x = block_and_input()
    capture = Capture(pattern=pattern, executor=executor, **EXACT)
    assert_close(torch.compile(model, backend=capture)(x), model(x), length=LENGTH)
    assert capture.rewritten == 1


def test_a_table_gives_layers_and_heads_their_patterns() -> None:
    model = build("llama")
    table = {
        0: {"*": ("a_shape", 4, 16), 2: ("vertical_slash", 30, 100)},
        "*": {0: ("block_sparse", 1, 0), "*": ("dense", 0, 0)},
    }
    # Row blocks of 64, so that 90 rows have something to leave out.
    capture = Capture(pattern=table, executor="reference")
    torch.compile(model, backend=capture)(ids())
    one, two = report_of(model).sites
    assert "a_shape" in one.pattern
    assert "vertical_slash" in one.pattern
    assert "block_sparse" in two.pattern
    assert "dense" in two.pattern
    numbers = [s.mean_density for s in sparse_compiler.stats(model)]
    assert len(numbers) == 2
    assert 0 < numbers[0] < 1
    [report] = sparse_compiler.stats(model)[1:]
    assert report.density[1:] == pytest.approx([1.0] * 3, abs=1e-6)


def test_a_pattern_in_a_table_without_numbers_has_its_own() -> None:
    texts = []
    for pattern in ("a_shape", {"*": "a_shape"}, [{"*": ("a_shape",)}] * 2):
        explanation = sparse_compiler.explain(
            build("llama"), (ids(),), options={"min_tokens": 0, "pattern": pattern}
        )
        texts.append([site.pattern for site in explanation.sites])
    assert texts == [texts[0]] * 3
    assert "-1" not in texts[0][0]


def test_a_layer_that_a_list_does_not_have_is_declined() -> None:
    model = build("llama")
    capture = Capture(pattern=[{"*": ("a_shape", 4, 16)}], fallback="silent")
    torch.compile(model, backend=capture)(ids())
    one, two = report_of(model).sites
    assert one.decision == "rewritten"
    assert (two.decision, two.code) == ("declined", "LAYER_MISSING")


def test_an_unknown_layer_gets_the_policy_and_a_note() -> None:
    table = {0: {"*": ("a_shape", 4, 16)}, 1: {"*": ("dense", 0, 0)}}

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, is_causal=True)

    capture = check(function, *square(), rewritten=True, pattern=table)
    [site] = capture_sites(function, square(), capture)
    assert site.pattern.startswith("4 x vertical_slash")
    assert [note.code for note in site.notes] == ["LAYER_UNKNOWN"]


def test_a_budget_sets_the_density_that_stats_shows() -> None:
    model, x = block_and_input(512)
    densities = []
    for budget in (0.2, 0.6, 1.0):
        torch.compiler.reset()
        capture = Capture(budget=budget, pattern="a_shape", executor="reference")
        compiled = torch.compile(model, backend=capture)
        compiled(x)
        densities.append(sparse_compiler.stats(compiled)[-1].mean_density)
    assert densities == sorted(densities)
    assert densities[0] < 0.5
    assert densities[-1] == pytest.approx(1.0, abs=1e-6)


# ---- explain and stats -------------------------------------------------------------------------


def test_explain_shows_sites_graphs_and_passes() -> None:
    model = build("llama")
    explanation = sparse_compiler.explain(model, (ids(),), options={"min_tokens": 0})
    assert explanation.rewritten == 2
    assert [s.layer for s in explanation.sites] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    for site in explanation.sites:
        assert site.shapes["query"] == f"[2, 4, {LENGTH}, 16]"
        assert site.shapes["key"] == f"[2, 2, {LENGTH}, 16]"
        assert site.mask == "causal"
        assert ".py:" in site.source
    [graphs] = explanation.graphs
    names = [report.name for report in explanation.reports[0].passes]
    assert list(graphs) == names
    assert names[-2:] == ["rewrite_sparse", "forget_flex"]
    assert "sparse_compiler.attend" in graphs["rewrite_sparse"]
    assert "scaled_dot_product_attention" not in graphs["rewrite_sparse"]
    assert "scaled_dot_product_attention" in graphs["find_attention"]
    assert isinstance(explanation.kernels, list)
    data = json.loads(explanation.to_json())
    assert [site["decision"] for site in data[0]["sites"]] == ["rewritten"] * 2
    assert json.loads(explanation.to_json(indent=None)) == data
    text = str(explanation)
    assert "model.layers.0.self_attn" in text
    assert "rewritten" in text


def test_explain_leaves_warnings_and_errors_to_the_report() -> None:
    result: list[Any] = []
    texts = warned(
        lambda: result.extend(
            sparse_compiler.explain(
                Masked(), masked_inputs(), options={"min_tokens": 0, "fallback": fallback}
            )
            for fallback in ("warn", "error")
        )
    )
    assert texts == []
    for explanation in result:
        assert [site.code for site in explanation.sites] == ["MASK_INPUT"] * 2
        assert "MASK_INPUT" in str(explanation)


def test_explain_does_not_disturb_what_is_compiled() -> None:
    model, x = block_and_input()
    capture = Capture(**EXACT)
    compiled = torch.compile(model, backend=capture)
    before = compiled(x)
    explanation = sparse_compiler.explain(compiled, (x,), options={"min_tokens": 0})
    assert explanation.rewritten == 1
    assert torch.equal(compiled(x), before)
    assert len(capture.graphs) == 1


def test_explain_refuses_wrong_options() -> None:
    model, x = block_and_input()
    with pytest.raises(OptionInvalid, match="budgte"):
        sparse_compiler.explain(model, (x,), options={"budgte": 1.0})


def test_stats_are_of_the_newest_call_of_each_site() -> None:
    model, x = block_and_input(256)
    compiled = torch.compile(
        model, backend=Capture(pattern={"*": {"*": ("a_shape", 16, 32)}}), dynamic=True
    )
    assert sparse_compiler.stats(model) == []
    for length in (256, 128):
        # Contiguous: Dynamo compiles again for other strides.
        compiled(x[:, :length].contiguous())
        [stats] = sparse_compiler.stats(model)
        assert (stats.num_q, stats.num_k) == (length, length)
        assert len(stats.density) == 4
        assert all(0 < share <= 1 for share in stats.density)
        assert stats.mean_density == pytest.approx(sum(stats.density) / 4)
        assert stats.index_ms >= 0
    assert sparse_compiler.stats(compiled) == sparse_compiler.stats(model)


def test_two_models_do_not_mix_their_reports_and_statistics() -> None:
    models = [Block("enable_gqa"), Block("enable_gqa")]
    x = torch.randn(1, LENGTH, 48)
    for model in models:
        torch.compile(model, backend=Capture())(x)
    for model in models:
        assert len(report_of(model).sites) == 1
        assert len(sparse_compiler.stats(model)) == 1
    assert report_of(Block("enable_gqa")).reports == ()


def test_the_passes_take_a_small_share_of_compiling() -> None:
    model = build("llama")
    start = time.perf_counter()
    explanation = sparse_compiler.explain(model, (ids(),), options={"min_tokens": 0})
    whole = time.perf_counter() - start
    spent = sum(stage.seconds for stage in explanation.reports[0].passes)
    # An eager inner compiler costs a tenth of Inductor: 5 % of that is 50 % of this.
    assert spent < 0.5 * whole


# ---- caches and generate -----------------------------------------------------------------------


def generated(model: nn.Module, prompt: Tensor, **kwargs: Any) -> Tensor:
    return model.generate(prompt, max_new_tokens=5, do_sample=False, **kwargs)


def test_compiled_generate_equals_dense_and_can_be_undone() -> None:
    model, prompt = build("llama"), ids()
    expected = generated(model, prompt)
    original = model.forward
    same = sparse_compiler.compile(model, min_tokens=0, inner="eager", budget=1.0)
    assert same is model
    assert torch.equal(generated(model, prompt), expected)
    assert report_of(model).rewritten == 2
    # Decode never reaches the compiler: one graph, the prefill's.
    assert len(report_of(model).reports) == 1
    with pytest.raises(OptionInvalid, match="already"):
        sparse_compiler.compile(model)
    sparse_compiler.restore(model)
    assert model.forward == original
    assert "forward" not in model.__dict__
    assert torch.equal(generated(model, prompt), expected)
    assert sparse_compiler.restore(model) is model


def test_compiled_generate_of_a_left_padded_batch_equals_dense() -> None:
    model, prompt = build("mistral"), ids()
    attention = torch.ones_like(prompt)
    attention[0, :30] = 0
    expected = generated(model, prompt, attention_mask=attention)
    sparse_compiler.compile(model, min_tokens=0, inner="eager", budget=1.0)
    assert torch.equal(generated(model, prompt, attention_mask=attention), expected)
    assert report_of(model).rewritten >= 2
    sparse_compiler.restore(model)


def test_restore_gives_back_a_forward_of_the_instance() -> None:
    model, x = block_and_input()
    calls = []

    def own(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return 2 * x

    model.forward = own
    sparse_compiler.compile(model, inner="eager")
    sparse_compiler.restore(model)
    assert model.forward is own


def test_compile_refuses_wrong_options_before_it_changes_the_model() -> None:
    model, _ = block_and_input()
    with pytest.raises(OptionInvalid, match="budgte"):
        sparse_compiler.compile(model, budgte=1.0)
    assert "forward" not in model.__dict__


def test_a_dynamic_cache_is_filled_as_without_the_backend() -> None:
    model, tokens = build("llama"), ids()
    caches = []
    outs = []
    for backend in ("eager", Capture(**EXACT)):
        torch.compiler.reset()
        cache = transformers.DynamicCache(config=model.config)
        compiled = torch.compile(model, backend=backend)
        outs.append(compiled(tokens, past_key_values=cache, use_cache=True).logits)
        # A second chunk: fewer rows than keys.
        outs.append(compiled(ids(seed=2), past_key_values=cache, use_cache=True).logits)
        caches.append(cache)
    assert backend.rewritten == 4
    for got, want in zip(outs[2:], outs[:2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for got, want in zip(caches[1].layers, caches[0].layers, strict=True):
        assert got.keys.shape[2] == 2 * LENGTH
        torch.testing.assert_close(got.keys, want.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.values, want.values, rtol=1e-4, atol=1e-4)


def test_a_static_cache_is_filled_as_without_the_backend() -> None:
    model = build("llama")
    caches, outs = [], []
    for backend in ("eager", Capture(fallback="silent", **EXACT)):
        torch.compiler.reset()
        cache = transformers.StaticCache(config=model.config, max_cache_len=2 * LENGTH + 10)
        compiled = torch.compile(model, backend=backend)
        for chunk in range(2):
            position = torch.arange(LENGTH) + chunk * LENGTH
            out = compiled(
                ids(seed=chunk),
                past_key_values=cache,
                position_ids=position[None],
                use_cache=True,
            )
            outs.append(out.logits)
        caches.append(cache)
    for got, want in zip(outs[2:], outs[:2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for got, want in zip(caches[1].layers, caches[0].layers, strict=True):
        assert want.keys.abs().sum() > 0
        torch.testing.assert_close(got.keys, want.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.values, want.values, rtol=1e-4, atol=1e-4)


def test_writes_into_an_input_happen_though_attention_is_rewritten() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, store: Tensor, counter: Tensor) -> Tensor:
        store.index_copy_(2, torch.arange(LENGTH), k)
        counter.add_(1)
        return sdpa(q, store[:, :, :LENGTH], v, is_causal=True)

    q, k, v = square()
    stores = [torch.zeros(2, 4, 120, 16) for _ in range(2)]
    counters = [torch.zeros(()) for _ in range(2)]
    expected = function(q, k, v, stores[0], counters[0])
    capture = Capture(**EXACT)
    out = torch.compile(function, backend=capture)(q, k, v, stores[1], counters[1])
    assert capture.rewritten == 1
    assert_close(out, expected, length=LENGTH)
    assert torch.equal(stores[0], stores[1])
    assert counters[1] == 1


def test_q_changed_in_place_after_attention_does_not_change_its_result() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.clone()
        out = sdpa(q, k, v, is_causal=True)
        q.mul_(0)
        k = k + 1
        return out + q + k.sum() * 0

    check(function, *square(), rewritten=True)


# ---- the name, the inner compiler, imports -----------------------------------------------------

BY_NAME = """
import sys, warnings
import torch
import torch.nn.functional as F
warnings.simplefilter("error", UserWarning)
q, k, v = torch.randn(3, 1, 2, 70, 16).unbind(0)
f = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
assert "sparse_compiler" not in sys.modules
assert "minference" in torch._dynamo.list_backends()
options = {"min_tokens": 0, "inner": "eager", "budget": 1.0}
with torch.inference_mode():
    out = torch.compile(f, backend="minference", options=options)(q, k, v)
torch.testing.assert_close(out, f(q, k, v), rtol=1e-4, atol=1e-4)
from sparse_compiler.runtime import recorder
assert recorder.read(0) is not None
try:
    torch.compile(f, backend="minference", options={"budget": 3})(q, k, v)
except Exception as error:
    assert "budget" in str(error), error
else:
    raise AssertionError("budget 3 was taken")
"""

IMPORT = """
import sys
import sparse_compiler
assert "torch" not in sys.modules
import sparse_compiler.ops, sparse_compiler.runtime.dispatch, sparse_compiler.patterns.registry
import torch
assert "triton" not in sys.modules, "triton was imported"
assert not torch.cuda.is_initialized()
# From here on torch's own compiler is loaded, which looks for Triton itself.
for name in sparse_compiler.__all__:
    getattr(sparse_compiler, name)
assert not torch.cuda.is_initialized()
try:
    sparse_compiler.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError("unknown attribute was found")
"""


@pytest.mark.parametrize("program", [BY_NAME, IMPORT], ids=["by name", "import"])
def test_programs_of_their_own(program: str) -> None:
    """By its name without an import; and importing the package touches neither CUDA nor Triton."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def compiled_by(monkeypatch: pytest.MonkeyPatch, **keywords: Any) -> dict[str, Any]:
    """What reaches Inductor; compiling with it in every test would take minutes."""
    seen: dict[str, Any] = {}

    def compile_fx(gm: fx.GraphModule, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs, args=args, ops=[n.target for n in gm.graph.nodes])
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model, x = block_and_input(64)
    out = torch.compile(model, backend="minference", **keywords)(x)
    assert_close(out, model(x), length=64)
    return seen


@pytest.mark.parametrize("keywords", [{}, {"options": {}}, {"options": None}])
def test_no_options_mean_the_defaults(
    monkeypatch: pytest.MonkeyPatch, keywords: dict[str, Any]
) -> None:
    # Short prompts stay dense by default.
    assert ATTEND not in compiled_by(monkeypatch, **keywords)["ops"]


def test_a_mode_reaches_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = compiled_by(monkeypatch, mode="max-autotune-no-cudagraphs")
    assert "max_autotune" in str(seen.get("config_patches")) + str(seen["args"])


def test_inner_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"min_tokens": 0, "budget": 1.0, "inner_options": {"max_autotune": True}}
    seen = compiled_by(monkeypatch, options=options)
    assert ATTEND in seen["ops"]
    assert "max_autotune" in str(seen.get("config_patches")) + str(seen["args"])


def test_inductor_compiles_the_rewritten_graph_once_for_all_lengths() -> None:
    model, x = block_and_input(96)
    options = {"min_tokens": 0, "budget": 1.0}
    compiled = torch.compile(model, backend="minference", options=options, dynamic=True)
    for length in (96, 64):
        part = x[:, :length].contiguous()
        assert_close(compiled(part), model(part), length=length)
    # Dynamo may call a backend again for one graph; the abandoned attempt leaves no report.
    assert len(report_of(model).reports) == 1
    assert report_of(model).rewritten == 1
