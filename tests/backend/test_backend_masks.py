"""Forms of the call and masks: rewritten where proved, equal everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from backend_calls import (
    EXACT,
    LENGTH,
    NUM_K,
    NUM_Q,
    Capture,
    capture_sites,
    check,
    qkv,
    sdpa,
    square,
)
from torch import Tensor

from sparse_compiler.testing import assert_close

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
