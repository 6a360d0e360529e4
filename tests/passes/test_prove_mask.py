"""Masks that must be proved, near misses that must not, and random programs against real values.

Every proof is checked: the nodes that compute the band, padding, bounds and bias are run on real
inputs and compared with the mask and the bias that the program itself makes.
"""

from __future__ import annotations

import math
import random
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_grammar import Grammar, compiled, inputs
from mask_programs import Recorded

from sparse_compiler.ir.mask import Band, Proved, Refuted, Unknown
from sparse_compiler.passes.prove_mask import MaskProver
from sparse_compiler.passes.sdpa import is_sdpa, match_sdpa
from sparse_compiler.passes.symbolic_tensor import SymbolicTensors

# Three times as many programs as examples of the profile: they take milliseconds.
EXAMPLES = 3 * settings().max_examples
LOW = torch.finfo(torch.float32).min


def rows(q):
    return torch.arange(q.shape[2])[None, None, :, None]


def keys(k):
    return torch.arange(k.shape[2])[None, None, None, :]


def causal(q, k):
    return keys(k) <= rows(q)


def place(q, k):
    """Rows counted so that the last one stands at the last key."""
    return rows(q) + (k.shape[2] - q.shape[2])


def padded(pad):
    return pad.bool()[:, None, None, :]


def gathered(q, k, pad):
    """As transformers does it."""
    return pad.to(torch.bool)[torch.arange(q.shape[0])[:, None, None, None], keys(k)]


def same(ids):
    return ids[:, None, :, None] == ids[:, None, None, :]


def packed(positions):
    """As transformers finds packed documents in position ids."""
    return (positions.diff(prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def additive(mask):
    return torch.where(mask, 0.0, LOW)


def chunks(q, k, start, size=4):
    return (rows(q) - start) // size == (keys(k) - start) // size


def left_padding(pad):
    return (pad.cumsum(-1) == torch.zeros_like(pad)).sum(-1)[:, None, None, None]


def chunked_and_left_padded(q, k, pad):
    return causal(q, k) & chunks(q, k, left_padding(pad))


def bucket(distance, bidirectional):
    """T5's, with its in-place sums."""
    buckets, number = 0, 32
    if bidirectional:
        number //= 2
        buckets += (distance > 0).to(torch.long) * number
        distance = torch.abs(distance)
    else:
        distance = -torch.min(distance, torch.zeros_like(distance))
    exact = number // 2
    large = torch.log(distance.float() / exact) / math.log(128 / exact) * (number - exact)
    large = exact + large.to(torch.long)
    large = torch.min(large, torch.full_like(large, number - 1))
    buckets += torch.where(distance < exact, distance, large)
    return buckets


def t5(q, k, table, bidirectional=True):
    buckets = bucket((keys(k) - rows(q))[0, 0], bidirectional)
    return F.embedding(buckets, table).permute([2, 0, 1]).unsqueeze(0)


def bloom(pad, table):
    ahead = ((pad.cumsum(-1) - 1) * pad)[:, None, :]
    return (table[0][:, None] * ahead).view(pad.shape[0], 4, 1, -1)


def falcon(q, k, pad, table):
    return torch.masked_fill(bloom(pad, table) / math.sqrt(8), additive(causal(q, k)) < -1, LOW)


def offset_then_moved(q, k, off):
    """A static cache: its length is read, then written."""
    mask = keys(k) <= rows(q) + off
    off.add_(q.shape[2])
    return mask


def moved_then_used(q, k):
    start = torch.arange(q.shape[2])
    start += 2
    return keys(k) <= start[None, None, :, None]


def view_mutated(q, k):
    start = torch.arange(q.shape[2])
    view = start[None, None, :, None]
    start.add_(1)
    return keys(k) <= view


def both(q, k, pad):
    """(causal and padding) or (prefix and padding)."""
    return (causal(q, k) & padded(pad)) | ((keys(k) < 3) & padded(pad))


PROVED = {
    "causal": (lambda q, k, *_: [("keep", causal(q, k))], "causal"),
    "dropped": (lambda q, k, *_: [("drop", keys(k) > rows(q))], "causal"),
    "strict": (lambda q, k, *_: [("keep", torch.lt(keys(k), rows(q) + 1))], "causal"),
    "tril": (
        lambda q, k, *_: [("keep", torch.ones(q.shape[2], k.shape[2]).tril().bool())],
        "causal",
    ),
    "triu_additive": (
        lambda q, k, *_: [
            (
                "add",
                torch.full((q.shape[2], k.shape[2]), LOW).triu(1)[None, None].expand(2, 1, -1, -1),
            )
        ],
        "causal",
    ),
    "two_terms": (
        lambda q, k, pad, *_: [("keep", causal(q, k)), ("add", additive(padded(pad)))],
        "causal, key padding",
    ),
    "full": (lambda q, k, *_: [("add", torch.zeros(1, 1, q.shape[2], k.shape[2]))], "full"),
    "sliding": (
        lambda q, k, *_: [("keep", causal(q, k) & (keys(k) > rows(q) - 3))],
        "causal, window 3",
    ),
    "two_sided": (lambda q, k, *_: [("keep", (rows(q) - keys(k)).abs() <= 2)], "band(-2, 2)+0"),
    "one_less": (lambda q, k, *_: [("keep", keys(k) < rows(q))], "causal+-1"),
    "gathered": (
        lambda q, k, pad, *_: [("keep", causal(q, k) & gathered(q, k, pad))],
        "causal, key padding",
    ),
    "two_paddings": (
        lambda q, k, pad, *_: [("keep", (padded(pad) & (pad.roll(1, 1) > 0)[:, None, None]))],
        "full, key padding",
    ),
    "reversed_padding": (
        lambda q, k, pad, *_: [("keep", padded(pad).flip(3))],
        "full, key padding",
    ),
    "longer_padding": (
        lambda q, k, pad, *_: [("keep", F.pad(pad, (0, 3))[:, None, None, 3:] > 0)],
        "full, key padding",
    ),
    "shared_padding": (
        lambda q, k, pad, *_: [("keep", both(q, k, pad))],
        "causal+2, rows bounded, key padding",
    ),
    "summed": (
        lambda q, k, pad, *_: [("add", additive(causal(q, k)) + (1.0 - padded(pad).float()) * LOW)],
        "causal, key padding",
    ),
    "raw_padding": (
        lambda q, k, pad, *_: [("add", (1.0 - pad[:, None, None].float()) * LOW)],
        "full, bias",
    ),
    "very_low": (lambda q, k, *_: [("add", torch.where(causal(q, k), 0.0, -1e31))], "causal"),
    "offset_in_a_tensor": (
        lambda q, k, pad, ids, off, _: [("keep", keys(k) <= rows(q) + off)],
        "causal+read_x4()",
    ),
    "static_cache": (
        lambda q, k, pad, ids, off, _: [("keep", offset_then_moved(q, k, off))],
        "causal+read_x4()",
    ),
    "moved_in_place": (lambda q, k, *_: [("keep", moved_then_used(q, k))], "causal+2"),
    "mutated_view": (lambda q, k, *_: [("keep", view_mutated(q, k))], "causal+1"),
    "offset_of_each_entry": (
        lambda q, k, pad, *_: [("keep", keys(k) <= rows(q) + left_padding(pad))],
        "full, rows bounded",
    ),
    "one_entry_hidden": (
        lambda q, k, *_: [
            ("keep", causal(q, k) & (torch.arange(q.shape[0])[:, None, None, None] > 0))
        ],
        "causal, rows bounded",
    ),
    "chunks": (
        lambda q, k, *_: [("keep", causal(q, k) & chunks(q, k, 0))],
        "causal, window 4, rows bounded",
    ),
    "chunks_both_ways": (
        lambda q, k, *_: [("keep", chunks(q, k, 0, 3))],
        "band(-2, 2)+0, rows bounded",
    ),
    "chunks_left_padded": (
        lambda q, k, pad, *_: [("keep", chunked_and_left_padded(q, k, pad))],
        "causal, window 4, rows bounded",
    ),
    "prefix": (
        lambda q, k, *_: [("keep", causal(q, k) | (keys(k) < 3))],
        "causal+2, rows bounded",
    ),
    "prefix_at_run_time": (
        lambda q, k, pad, ids, off, _: [("keep", causal(q, k) | (keys(k) < off))],
        "full, rows bounded",
    ),
    "rows_that_see_nothing": (
        lambda q, k, *_: [("keep", causal(q, k) & (rows(q) > 1))],
        "causal, rows bounded",
    ),
    "t5": (
        lambda q, k, pad, ids, off, w: [("add", t5(q, k, w) + additive(padded(pad)))],
        "full, key padding, bias",
    ),
    "t5_decoder": (
        lambda q, k, pad, ids, off, w: [("add", t5(q, k, w, False) + additive(causal(q, k)))],
        "causal, bias",
    ),
    "alibi_both_ways": (
        lambda q, k, pad, ids, off, w: [
            ("add", -w[0][None, :, None, None] * (rows(q) - keys(k)).abs())
        ],
        "full, bias",
    ),
    "bloom": (
        lambda q, k, pad, ids, off, w: [("add", bloom(pad, w)), ("keep", causal(q, k))],
        "causal, bias",
    ),
    "falcon": (lambda q, k, pad, ids, off, w: [("add", falcon(q, k, pad, w))], "causal, bias"),
    "soft": (lambda q, k, *_: [("add", torch.where(causal(q, k), 0.0, -1.0))], "full, bias"),
    "of_the_rows": (
        lambda q, k, *_: [("add", rows(q).float()), ("keep", causal(q, k))],
        "causal",
    ),
    "of_positions_only": (
        lambda q, k, *_: [("add", (keys(k) * rows(q)).float())],
        "full, bias",
    ),
}
SQUARE = {
    "packed": (
        lambda q, k, pad, ids, *_: [("keep", causal(q, k) & same(packed(ids)))],
        "causal, rows bounded",
    ),
    "packed_both_ways": (
        lambda q, k, pad, ids, *_: [("keep", same((ids == 0).cumsum(-1)))],
        "full, rows bounded",
    ),
    "packed_and_sliding": (
        lambda q, k, pad, ids, *_: [
            ("keep", causal(q, k) & (rows(q) - keys(k) < 3) & same(packed(ids)) & padded(pad))
        ],
        "causal, window 3, rows bounded, key padding",
    ),
    "positions_in_order": (
        lambda q, k, *_: [
            ("keep", causal(q, k) & same(packed(torch.arange(q.shape[2])[None].expand(2, -1))))
        ],
        "causal",
    ),
    "query_padding": (
        lambda q, k, pad, *_: [("keep", pad.bool()[:, None, :, None] & causal(q, k))],
        "causal, rows bounded",
    ),
}


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
