"""Masks that must be proved, near misses that must not, and random programs against real values."""

from __future__ import annotations

import functools
import time

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_capture import prove, prove_all

from sparse_compiler.ir.mask import Band, MaskFact, Proved, Refuted, Unknown
from sparse_compiler.passes.prove_mask import MaskProver

SQUARE = ((2, 6, 6),)
# Three lists of programs in the default profile; a profile with more examples runs more of them.
EXAMPLES = max(3, settings().max_examples // 33)
MANY = ((2, 6, 6), (2, 4, 9), (3, 9, 4), (2, 5, 7))


def rows(q):
    return torch.arange(q.shape[2])[None, None, :, None]


def keys(k):
    return torch.arange(k.shape[2])[None, None, None, :]


def padded(pad):
    return pad.bool()[:, None, None, :]


def gathered(q, k, pad):
    """As transformers does it."""
    return pad.to(torch.bool)[torch.arange(q.shape[0])[:, None, None, None], keys(k)]


def causal(q, k, pad):
    return keys(k) <= rows(q)


def aligned(q, k, pad):
    return keys(k) <= rows(q) + (k.shape[2] - q.shape[2])


def old_transformers(q, k, pad):
    hidden = torch.full((q.shape[2], k.shape[2]), torch.finfo(torch.float32).min).triu(1)
    return hidden[None, None].expand(q.shape[0], 1, -1, -1)


def summed(q, k, pad):
    """Two additive masks, one from padding: finfo.min + finfo.min is -inf."""
    hidden = (1.0 - padded(pad).float()) * torch.finfo(torch.float32).min
    return torch.where(causal(q, k, pad), 0.0, torch.finfo(torch.float32).min) + hidden


PROVED = {
    "causal": (causal, "causal"),
    "reversed": (lambda q, k, pad: rows(q).ge(keys(k)), "causal"),
    "strict": (lambda q, k, pad: torch.lt(keys(k), rows(q) + 1), "causal"),
    "negated": (lambda q, k, pad: ~(keys(k) > rows(q)), "causal"),
    "tril": (lambda q, k, pad: torch.ones(q.shape[2], k.shape[2]).tril().bool(), "causal"),
    "triu": (
        lambda q, k, pad: torch.triu(q.new_ones(q.shape[2], k.shape[2]), diagonal=1) == 0,
        "causal",
    ),
    "where": (
        lambda q, k, pad: torch.where(causal(q, k, pad), 0.0, float("-inf")),
        "causal",
    ),
    "masked_fill": (
        lambda q, k, pad: torch.zeros(q.shape[2], k.shape[2]).masked_fill(
            torch.arange(k.shape[2]) > torch.arange(q.shape[2]).view(-1, 1), float("-inf")
        ),
        "causal",
    ),
    "additive_triu": (old_transformers, "causal"),
    "two_factors": (lambda q, k, pad: causal(q, k, pad) * (rows(q) >= 0), "causal"),
    "all_true": (lambda q, k, pad: (rows(q) >= 0).expand(-1, -1, -1, k.shape[2]), "full"),
    "ones": (lambda q, k, pad: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool), "full"),
    "zeros": (lambda q, k, pad: torch.zeros(1, 1, q.shape[2], k.shape[2]), "full"),
    "sliding": (
        lambda q, k, pad: causal(q, k, pad) & (keys(k) > rows(q) - 3),
        "causal, window 3",
    ),
    "two_sided": (lambda q, k, pad: (rows(q) - keys(k)).abs() <= 2, "band(-2, 2)+0"),
    "one_more": (lambda q, k, pad: keys(k) <= rows(q) + 1, "causal+1"),
    "one_less": (lambda q, k, pad: keys(k) < rows(q), "causal+-1"),
    "padding": (lambda q, k, pad: padded(pad), "full, key padding"),
    "int_padding": (lambda q, k, pad: pad[:, None, None, :] != 0, "full, key padding"),
    "padding_is_one": (
        lambda q, k, pad: (pad == 1).view(pad.shape[0], 1, 1, pad.shape[1]),
        "full, key padding",
    ),
    "causal_padding": (
        lambda q, k, pad: causal(q, k, pad) & gathered(q, k, pad),
        "causal, key padding",
    ),
    "where_padding": (
        lambda q, k, pad: torch.where(padded(pad), causal(q, k, pad), False),
        "causal, key padding",
    ),
    "summed": (summed, "causal, key padding"),
    "window_padding": (
        lambda q, k, pad: (causal(q, k, pad) & (rows(q) - keys(k) < 3)).logical_and(padded(pad)),
        "causal, window 3, key padding",
    ),
}


@functools.cache
def proofs_of(table, dynamic):
    """For each name in the table, the proofs of its mask in every graph that was compiled."""
    names = {"proved": PROVED, "declined": DECLINED}[table]
    functions = [mask for mask, _ in names.values()]
    shapes = (MANY if table == "proved" else SQUARE) if dynamic else SQUARE
    result = prove_all(lambda q, k, pad: tuple(f(q, k, pad) for f in functions), shapes, dynamic)
    return {name: [g[n] for g in result.graphs] for n, name in enumerate(names)}


@pytest.mark.parametrize("name", PROVED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_proved_for_every_size(name, dynamic):
    for proof in proofs_of("proved", dynamic)[name]:
        assert isinstance(proof, Proved), proof
        assert proof.fact.describe() == PROVED[name][1]


def test_causal_aligned_to_the_last_row_has_a_symbolic_offset():
    proof = prove(aligned, ((2, 4, 9), (2, 5, 7)), dynamic=True)
    assert isinstance(proof, Proved)
    band = proof.fact.band
    assert isinstance(band.q_offset, sympy.Expr)
    assert len(band.q_offset.free_symbols) == 2
    assert (band.left, band.right) == (None, 0)
    assert prove(aligned, ((2, 4, 9),)) == Proved(MaskFact(Band(5, None, 0)))
    assert prove(aligned) == Proved(MaskFact(Band(0, None, 0)))


def test_aligned_window_has_a_symbolic_offset():
    def mask(q, k, pad):
        place = rows(q) + (k.shape[2] - q.shape[2])
        return (keys(k) <= place) & (keys(k) > place - 3)

    proof = prove(mask, ((2, 4, 9), (2, 5, 7)), dynamic=True)
    assert isinstance(proof, Proved)
    assert (proof.fact.band.left, proof.fact.band.right) == (2, 0)


def test_bounds_that_do_not_bind_are_dropped():
    def wide(q, k, pad):
        return causal(q, k, pad) & (keys(k) > rows(q) - 100)

    assert prove(wide) == Proved(MaskFact(Band(0, None, 0)))
    assert prove(wide, MANY, dynamic=True).fact.band == Band(0, 99, 0)
    assert prove(aligned, ((2, 1, 9),)) == Proved(MaskFact(Band(0, None, None)))  # decode


def fill_in_place(q, k, pad):
    mask = causal(q, k, pad).expand(q.shape[0], 1, -1, -1).clone()
    mask[:, :, 0, 1] = True
    return mask


def filled(q, k, pad):
    mask = torch.ones(q.shape[2], k.shape[2]).tril().bool()
    mask.masked_fill_(torch.arange(k.shape[2]) == 2, False)
    return mask


def view_mutated(q, k, pad):
    place = torch.arange(q.shape[2])
    view = place[None, None, :, None]
    place.add_(1)
    return keys(k) <= view


def packed(q, k, pad):
    documents = pad.cumsum(-1)
    return causal(q, k, pad) & (documents[:, None, :, None] == documents[:, None, None, :])


DECLINED = {
    "query_padding": (lambda q, k, pad: pad.bool()[:, None, :, None] & causal(q, k, pad), Unknown),
    "padding_or": (lambda q, k, pad: padded(pad) | causal(q, k, pad), Unknown),
    "padding_or_diagonal": (lambda q, k, pad: padded(pad) | (rows(q) == keys(k)), Unknown),
    "reversed_padding": (
        lambda q, k, pad: pad.bool()[:, None, None, :].expand(-1, 1, q.shape[2], -1).flip(3),
        Unknown,
    ),
    "rolled_padding": (
        lambda q, k, pad: pad.roll(1, 1).bool()[:, None, None] & (pad > 0)[:, None, None],
        Unknown,
    ),
    "two_paddings": (
        lambda q, k, pad: (pad > 0)[:, None, None] & (pad < 5)[:, None, None],
        Unknown,
    ),
    "chunk": (lambda q, k, pad: causal(q, k, pad) & (keys(k) // 4 == rows(q) // 4), Refuted),
    "prefix": (lambda q, k, pad: causal(q, k, pad) | (keys(k) < 3), Refuted),
    "hole": (lambda q, k, pad: causal(q, k, pad) & (rows(q) - keys(k) != 2), Refuted),
    "row_dependent": (lambda q, k, pad: causal(q, k, pad) & (rows(q) > 1), Refuted),
    "nothing": (lambda q, k, pad: torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool), Refuted),
    "square": (lambda q, k, pad: rows(q) * rows(q) >= keys(k), Unknown),
    "setitem": (fill_in_place, Unknown),
    "in_place": (filled, Unknown),
    "mutated_view": (view_mutated, Unknown),
    "soft": (lambda q, k, pad: torch.where(causal(q, k, pad), 0.0, -1.0), Unknown),
    "bias": (lambda q, k, pad: (keys(k) - rows(q)).float(), Unknown),
    "packed": (packed, Unknown),
    "data": (lambda q, k, pad: (q @ k.repeat(1, 2, 1, 1).mT) > 0, Unknown),
    "per_entry": (
        lambda q, k, pad: causal(q, k, pad) & (torch.arange(q.shape[0])[:, None, None, None] > 0),
        Unknown,
    ),
}


@pytest.mark.parametrize("name", DECLINED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_near_misses_are_declined(name, dynamic):
    kind = DECLINED[name][1]
    (proof,) = proofs_of("declined", dynamic)[name]
    assert isinstance(proof, kind), proof
    if kind is Refuted:
        assert "q=" in proof.witness or "hides every key" in proof.reason
    else:
        assert proof.reason


def test_padding_of_another_length_is_declined():
    def mask(q, k, pad):
        return torch.nn.functional.pad(pad, (0, 3))[:, None, None, : k.shape[2]] > 0

    proof = prove(mask)
    assert isinstance(proof, Unknown)

    def later(q, k, pad):
        return torch.nn.functional.pad(pad, (0, 3))[:, None, None, 3:] > 0

    assert isinstance(prove(later), Unknown)


def test_unknown_names_the_operation():
    proof = prove(packed)
    assert "cumsum" in proof.reason


def test_typical_mask_is_proved_quickly():
    start = time.perf_counter()
    result = prove_all(lambda q, k, pad: (causal(q, k, pad) & gathered(q, k, pad),), SQUARE, False)
    assert isinstance(result.last, Proved)
    assert time.perf_counter() - start < 10  # the compile included; the proof takes milliseconds


# -- random programs ---------------------------------------------------------------------------

SIDES = st.tuples(st.sampled_from(["q", "k", "q_end", "const"]), st.integers(-3, 4))
RELATIONS = st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"])
ATOMS = st.one_of(
    st.tuples(st.just("compare"), RELATIONS, SIDES, SIDES),
    st.tuples(st.just("causal"), st.integers(0, 1)),
    st.tuples(st.just("causal"), st.integers(-2, 3)),
    st.tuples(st.just("window"), st.integers(1, 5)),
    st.tuples(st.just("near"), st.integers(0, 4)),
    st.tuples(st.just("triangle"), st.booleans(), st.integers(-2, 2)),
    st.tuples(st.just("chunk"), st.integers(1, 4)),
    st.tuples(st.just("modulo"), st.integers(1, 3)),
    st.tuples(st.just("pad"), st.sampled_from(["bool", "gather", "eq", "query", "later"])),
)
PROGRAMS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(st.just("and"), inner, inner),
        st.tuples(st.just("and"), inner, inner),
        st.tuples(st.just("or"), inner, inner),
        st.tuples(st.just("not"), inner),
        st.tuples(st.just("where"), inner, inner, inner),
        st.tuples(st.just("merge"), inner),
        st.tuples(st.just("numbers"), inner),
    ),
    max_leaves=4,
)
FINAL = st.sampled_from(["bool", "expand", "where", "fill", "product", "in_place"])


ROWS = "torch.arange(q.shape[2])[None, None, :, None]"
KEYS = "torch.arange(k.shape[2])[None, None, None, :]"
FULL = "expand(q.shape[0], 1, q.shape[2], k.shape[2])"
LOW = "torch.finfo(torch.float32).min"
BASES = {
    "q": ROWS,
    "k": KEYS,
    "q_end": f"{ROWS} + (k.shape[2] - q.shape[2])",
    "const": "torch.zeros((), dtype=torch.long)",
}
PADDINGS = {
    "bool": "pad.bool()[:, None, None, :]",
    "gather": f"pad.to(torch.bool)[torch.arange(q.shape[0])[:, None, None, None], {KEYS}]",
    "eq": "(pad == 1)[:, None, None]",
    "query": "pad.bool()[:, None, :1, None]",
    "later": "torch.cat([pad[:, 1:], pad[:, :1]], 1).bool()[:, None, None]",
}
# A flat view and back, which must not change anything.
MERGED = "{0}.transpose(-1, -2).flatten(1).view(-1, 1, k.shape[2], q.shape[2]).mT"
SOURCE = {
    "compare": lambda r, a, b: (
        f"torch.{r}({BASES[a[0]]} + {a[1]}, {BASES[b[0]]} + {b[1]})"
        ".expand(1, 1, q.shape[2], k.shape[2])"
    ),
    "causal": lambda c: f"({KEYS} <= {ROWS} + {c})",
    "window": lambda w: f"({KEYS} > {ROWS} - {w})",
    "near": lambda w: f"(({ROWS} - {KEYS}).abs() <= {w})",
    "triangle": lambda low, d: (
        f"torch.{'tril' if low else 'triu'}("
        f"torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool), {d})"
    ),
    "chunk": lambda c: f"({ROWS} // {c} == {KEYS} // {c})",
    "modulo": lambda c: f"(({ROWS} - {KEYS}) % {c} == 0)",
    "pad": lambda kind: PADDINGS[kind],
    "and": lambda a, b: f"({source(a)} & {source(b)})",
    "or": lambda a, b: f"torch.logical_or({source(a)}, {source(b)})",
    "not": lambda a: f"(~{source(a)})",
    "where": lambda c, a, b: f"torch.where({source(c)}, {source(a)}, {source(b)})",
    "merge": lambda a: MERGED.format(f"{source(a)}.{FULL}"),
    "numbers": lambda a: f"((1 - {source(a)}.long()) == 0)",
}
FINISHED = {
    "bool": "{0}",
    "expand": "{0}." + FULL,
    "where": "torch.where({0}, 0.0, " + LOW + ")",
    "fill": "torch.zeros(1, 1, 1, k.shape[2])." + FULL + ".masked_fill(~{0}, float('-inf'))",
    "product": "(1.0 - {0}.float()) * " + LOW,
    "in_place": "{0}." + FULL + ".clone().masked_fill_(" + KEYS + " == 0, True)",
}


def source(program):
    """A mask [1 or B, 1, Lq or 1, Lk or 1] as Python text: Dynamo traces straight code fastest."""
    kind, *args = program
    return SOURCE[kind](*args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_proved_equals_the_real_mask(dynamic):
    counts = {"proved": 0, "checked": 0}
    shapes = ((2, 6, 6), (3, 4, 9), (2, 9, 5)) if dynamic else ((2, 4, 4), (1, 3, 5))

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.tuples(PROGRAMS, FINAL), min_size=6, max_size=10))
    def check(programs):
        texts = [FINISHED[form].format(source(program)) for program, form in programs]
        masks = eval(f"lambda q, k, pad: ({', '.join(texts)},)", {"torch": torch})
        result = prove_all(masks, shapes, dynamic)
        counts["proved"] += sum(isinstance(p, Proved) for p in result.proofs)
        counts["checked"] += result.checked

    check()
    assert counts["proved"] > 2 * EXAMPLES
    assert counts["checked"] >= counts["proved"]


# -- models of transformers --------------------------------------------------------------------

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


@pytest.mark.parametrize(("kind", "dynamic"), [*((k, False) for k in MODELS), ("mistral", True)])
def test_models_of_transformers(kind, dynamic):
    torch._dynamo.reset()
    found = []

    def backend(gm, examples):
        prover = MaskProver(gm.graph)
        for node in gm.graph.nodes:
            if "scaled_dot" in str(node.target):
                q, k = (n.meta["example_value"].shape for n in node.args[:2])
                found.append(prover.prove(node.kwargs["attn_mask"], q, k))
        return gm.forward

    compiled = torch.compile(tiny(kind), backend=backend, dynamic=dynamic or None)
    with torch.no_grad():
        compiled(
            torch.ones(2, 16, dtype=torch.long), attention_mask=torch.ones(2, 16, dtype=torch.long)
        )
    assert [p.fact.describe() for p in found] == [f"{text}, key padding" for text in MODELS[kind]]
