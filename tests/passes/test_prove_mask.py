"""Masks that must be proved, near misses that must not, and random programs against real values.

Every proof is checked: the nodes that compute the band, padding, bounds and bias are run on real
inputs and compared with the mask and the bias that the program itself makes.
"""

from __future__ import annotations

import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_grammar import Grammar, compiled, inputs
from mask_programs import Recorded
from proved_masks import PROVED, SQUARE, causal, keys, padded, place, rows, same

from sparse_compiler.ir.mask import Band, Proved, Refuted, Unknown
from sparse_compiler.passes.prove_mask import MaskProver
from sparse_compiler.passes.sdpa import is_sdpa, match_sdpa
from sparse_compiler.passes.symbolic_tensor import SymbolicTensors

# Three times as many programs as examples of the profile: they take milliseconds.
EXAMPLES = 3 * settings().max_examples


@pytest.mark.parametrize("name", [*PROVED, *SQUARE])
@pytest.mark.parametrize("dynamic", [False, True])
def test_proved_and_equal_to_the_real_mask(name, dynamic):
    program, text = {**PROVED, **SQUARE}[name]
    square = name in SQUARE
    traced = (2, 6, 6) if square or not dynamic else (2, 5, 7)
    found = Recorded(program, inputs(*traced), dynamic)
    assert isinstance(found.proof, Proved), found.proof
    assert found.proof.fact.describe() == text
    for seed in range(4):
        shape = traced
        if dynamic:
            shape = (2, 4 + seed, 4 + seed) if square else (2, 4 + 2 * seed, 9 - seed)
        found.check(inputs(*shape, seed=seed))


def setitem(q, k):
    mask = causal(q, k).expand(q.shape[0], 1, -1, -1).clone()
    mask[:, :, 0, 1] = True
    return mask


def filled_later(q, k):
    mask = causal(q, k) & True
    mask.masked_fill_(keys(k) == 2, False)
    return mask


DECLINED = {
    "padding_or": (lambda q, k, pad, *_: [("keep", padded(pad) | causal(q, k))], Unknown, "x2"),
    "padding_or_diagonal": (
        lambda q, k, pad, *_: [("keep", padded(pad) | (rows(q) == keys(k)))],
        Unknown,
        "x2",
    ),
    "hole": (
        lambda q, k, *_: [("keep", causal(q, k) & (rows(q) - keys(k) != 2))],
        Refuted,
        "gaps",
    ),
    "dilated": (
        lambda q, k, *_: [("keep", causal(q, k) & ((rows(q) - keys(k)) % 2 == 0))],
        Refuted,
        "gaps",
    ),
    "nothing": (
        lambda q, k, *_: [("keep", torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool))],
        Refuted,
        "hides every key",
    ),
    "square": (lambda q, k, *_: [("keep", rows(q) * rows(q) >= keys(k))], Unknown, "affine"),
    "setitem": (lambda q, k, *_: [("keep", setitem(q, k))], Unknown, "in place"),
    "filled_later": (lambda q, k, *_: [("keep", filled_later(q, k))], Unknown, "in place"),
    "ids_of_unknown_order": (
        lambda q, k, pad, ids, *_: [("keep", causal(q, k) & same(ids))],
        Unknown,
        "x3",
    ),
    "sums_of_unknown_sign": (
        lambda q, k, pad, ids, *_: [("keep", causal(q, k) & same(ids.cumsum(-1)))],
        Unknown,
        "cumsum",
    ),
    "ids_that_wrap": (
        lambda q, k, pad, ids, *_: [("keep", same((ids == 0).cumsum(-1).to(torch.int8)))],
        Unknown,
        "to",
    ),
    "ids_backward": (
        lambda q, k, pad, ids, *_: [("keep", same((ids == 0).cumsum(-1).flip(-1)))],
        Unknown,
        "cumsum",
    ),
    "data": (
        lambda q, k, *_: [("keep", (q @ k.repeat(1, 2, 1, 1).mT) > 0)],
        Unknown,
        "data|heads",
    ),
    "user_mask": (
        lambda q, k, pad, ids, off, w: [("add", pad.float()[:, :, None] * pad.float()[:, None])],
        Unknown,
        "by data",
    ),
    "product": (
        lambda q, k, *_: [("keep", keys(k) * rows(q) <= 3)],
        Unknown,
        "affine",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_near_misses_are_declined(name):
    program, kind, reason = DECLINED[name]
    proof = Recorded(program, inputs(2, 6, 6)).proof
    assert isinstance(proof, kind), proof
    assert any(part in proof.reason for part in reason.split("|")), proof
    if kind is Refuted and "hides every" not in proof.reason:
        assert "q=" in proof.witness


def test_a_mask_of_pairs_asks_for_a_padding_mask():
    def program(q, k, mask):
        return [("add", mask)]

    made = (torch.zeros(2, 4, 6, 8), torch.zeros(2, 2, 6, 8), torch.zeros(2, 1, 6, 6))
    assert "pass a padding mask [B, Lk]" in Recorded(program, made).proof.reason


def test_parameters_may_say_something_of_each_pair():
    def swin(q, k, index, table):
        return [("add", table[index.view(-1)].view(6, 6, 4).permute(2, 0, 1).contiguous()[None])]

    index = torch.nn.Parameter(torch.randint(0, 9, (6, 6)), requires_grad=False)
    table = torch.nn.Parameter(torch.randn(9, 4), requires_grad=False)
    made = (torch.zeros(2, 4, 6, 8), torch.zeros(2, 2, 6, 8), index, table)
    found = Recorded(swin, made)
    assert isinstance(found.proof, Proved), found.proof
    (bias,) = found.proof.fact.bias
    assert bias.by_row and not bias.by_distance
    found.check(made)


def test_what_is_left_out_of_a_row_is_said():
    program, _ = PROVED["of_the_rows"]
    assert Recorded(program, inputs(2, 6, 6)).proof.fact.row_shift
    assert not Recorded(PROVED["falcon"][0], inputs(2, 6, 6)).proof.fact.row_shift


def test_flags_and_bounds_that_do_not_bind():
    def wide(q, k, *_):
        return [("keep", causal(q, k) & (keys(k) > rows(q) - 100))]

    assert Recorded(wide, inputs(2, 6, 6)).proof.fact.band == Band(0, None, 0)
    assert Recorded(wide, inputs(2, 5, 7), dynamic=True).proof.fact.band == Band(0, 99, 0)
    assert Recorded(lambda *_: [], inputs(2, 6, 6), is_causal=True).proof.fact.band.causal
    assert Recorded(lambda *_: [], inputs(2, 6, 6)).proof.fact.trivial

    def aligned(q, k, *_):
        return [("keep", keys(k) <= place(q, k))]

    band = Recorded(aligned, inputs(2, 5, 7), dynamic=True).proof.fact.band
    assert (band.left, band.right) == (None, 0)
    assert len(band.q_offset.free_symbols) == 2
    decode = Recorded(aligned, inputs(2, 1, 9)).proof.fact.band
    assert decode == Band(0, None, None)


def test_thirty_two_layers_ask_once():
    found = Recorded(SQUARE["packed"][0], inputs(2, 6, 6))
    start = time.perf_counter()
    for _ in range(32):
        assert found.prover.prove_form(found.axes, tuple(found.terms)) is found.proof
    assert time.perf_counter() - start < 0.03


# -- random programs -----------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_proved_of_random_programs_equals_the_real_masks(dynamic):
    counts = {Proved: 0, Refuted: 0, Unknown: 0}

    @settings(max_examples=EXAMPLES // (5 if dynamic else 1), deadline=None, derandomize=True)
    @given(st.randoms(use_true_random=False), st.booleans())
    def check(chance: random.Random, square: bool):
        text = Grammar(chance, square).program()
        traced = (2, 6, 6) if square else (2, 5, 7)
        found = Recorded(compiled(text), inputs(*traced), dynamic)
        counts[type(found.proof)] += 1
        if isinstance(found.proof, Proved):
            shapes = [traced, traced]
            if dynamic:
                shapes = [(3, 4, 4), (2, 7, 7)] if square else [(3, 4, 9), (2, 9, 3)]
            for seed, shape in enumerate(shapes):
                found.check(inputs(*shape, seed=seed))

    check()
    assert counts[Proved] > sum(counts.values()) / 4, counts


# -- models of transformers ----------------------------------------------------------------------


SLIDING = "causal, window 8"
MODELS = {
    "llama": ["causal", "causal"],
    "qwen3": ["causal", "causal"],
    "gpt2": ["causal", "causal"],
    "mistral": [SLIDING, SLIDING],
    "gemma2": [SLIDING, "causal"],
    "bert": ["full", "full"],
}


def tiny(kind):
    """A two-layer model with random weights and a window of 8."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "head_dim": 16,
        "sliding_window": 8,
        "pad_token_id": 0,
    }
    for name, value in sizes.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    encoder = kind == "bert"
    auto = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    return auto.from_config(config).eval()


def described(kind, dynamic=None, **given):
    """What is proved of each attention of a model compiled by Dynamo."""
    torch._dynamo.reset()
    found = []

    def backend(gm, examples):
        tensors = SymbolicTensors(gm.graph)
        prover = MaskProver(tensors)
        for node in gm.graph.nodes:
            if is_sdpa(node):
                form = match_sdpa(node, tensors)
                found.append(prover.prove_form(form.axes, form.terms, form.is_causal))
        return gm.forward

    compiled_model = torch.compile(tiny(kind), backend=backend, dynamic=dynamic)
    with torch.no_grad():
        compiled_model(torch.ones(2, 16, dtype=torch.long), **given)
    return [getattr(p, "fact", p) and p.fact.describe() for p in found]


@pytest.mark.parametrize(("kind", "dynamic"), [*((k, None) for k in MODELS), ("mistral", True)])
def test_models_of_transformers(kind, dynamic):
    mask = torch.ones(2, 16, dtype=torch.long)
    expected = [f"{text}, key padding" for text in MODELS[kind]]
    assert described(kind, dynamic, attention_mask=mask) == expected


def test_positions_in_order_are_one_document():
    assert described("llama", use_cache=False) == ["causal", "causal"]


def test_positions_that_are_given_are_packed_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 5]]).expand(2, -1)
    texts = described("llama", use_cache=False, position_ids=positions)
    assert texts == ["causal, rows bounded"] * 2
