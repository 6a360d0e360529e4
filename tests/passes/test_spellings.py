"""Attention however it is written gives what it gave; near misses are declined or right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from spelling_programs import CHOICES, Program, build, inputs, possible, source
from torch import Tensor, fx

from sparse_compiler.backend import minference

ATTEND = torch.ops.sparse_compiler.attend.default
OPTIONS = {"budget": 1.0, "min_tokens": 0, "inner": "eager", "fallback": "silent"}
PLAIN = {name: values[0] for name, values in CHOICES.items()}


class Capture:
    """The backend; keeps every graph as it left the passes."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        run = minference(gm, examples, options=OPTIONS)
        self.graphs.append(gm)
        return run

    @property
    def rewritten(self) -> int:
        return sum(n.target == ATTEND for gm in self.graphs for n in gm.graph.nodes)

    def squares(self, num_q: int, num_k: int) -> list[str]:
        """Nodes, inputs apart, that hold a tensor [..., Lq, Lk] or its transpose."""
        pairs = {(num_q, num_k), (num_k, num_q)}
        found = []
        for gm in self.graphs:
            for node in gm.graph.nodes:
                value = node.meta.get("example_value")
                if node.op == "placeholder" or not isinstance(value, Tensor):
                    continue
                if tuple(value.shape[-2:]) in pairs:
                    found.append(node.name)
        return found


def same(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Equal to ``tolerance`` of the largest value; tuples entry by entry."""
    if isinstance(expected, tuple):
        for one, other in zip(actual, expected, strict=True):
            same(one, other, tolerance)
        return
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    size = max(1.0, expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * size, equal_nan=True)


def run(function: Callable[..., Any], args: Sequence[Any], tolerance: float = 2e-5) -> Capture:
    """Compile, call on copies of ``args``, compare results and what was left in the arguments."""
    torch.compiler.reset()
    kept = [a.clone() if isinstance(a, Tensor) else a for a in args]
    given_ = [a.clone() if isinstance(a, Tensor) else a for a in args]
    capture = Capture()
    with torch.no_grad():
        expected = function(*kept)
        actual = torch.compile(function, backend=capture, fullgraph=True)(*given_)
    same(actual, expected, tolerance)
    same(tuple(given_), tuple(kept), tolerance)
    return capture


# ---- programs from the grammar -----------------------------------------------------------------

def programs() -> st.SearchStrategy[Program]:
    """Few choices away from the plain program at a time, so that most are possible."""
    names = st.lists(st.sampled_from(list(CHOICES)), max_size=8, unique=True)
    return names.flatmap(
        lambda chosen: st.fixed_dictionaries(
            {
                name: st.sampled_from(values) if name in chosen else st.just(values[0])
                for name, values in CHOICES.items()
            }
        )
    ).filter(possible)


@settings(max_examples=4 * settings.default.max_examples)
@given(programs())
def test_every_program_gives_what_it_gave(program: Program) -> None:
    try:
        run(build(program), inputs(program))
    except Exception as error:
        error.add_note(source(program))
        raise


def one_change() -> list[Any]:
    """The plain program, and those one choice away from it (or two where one is not enough)."""
    found = []
    for name, values in CHOICES.items():
        for value in values if name == "layout" else values[1:]:
            program = PLAIN | {name: value}
            if name == "value" and value == "wide":
                program |= {"layout": "blhd"}
            if value == "alpha":
                program |= {"product": "baddbmm"}
            if name == "view":
                program |= {"product": "bmm"}
            if possible(program):
                found.append(pytest.param(program, id=f"{name}-{value}"))
    return found


@pytest.mark.parametrize("program", one_change())
def test_plain_spellings_are_rewritten(program: Program) -> None:
    capture = run(build(program), inputs(program))
    expected = {"chunks": 2, "chain": 2, "pair": 2}.get(program["whole"], 1)
    assert capture.rewritten == expected, source(program)
    num_q = 17 if program["rows"] == "fewer" else 24
    # A bias over rows and keys is a tensor of that shape.
    if program["bias"] not in ("full", "row_key") and program["product"] != "baddbmm_beta":
        assert capture.squares(num_q, 24) == []


LAYOUTS = ["bhld", "blhd", "lbhd", "merged", "grouped", "headless"]


@pytest.mark.parametrize("product", ["matmul", "bmm", "baddbmm", "einsum", "swapped"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_product_is_rewritten(layout: str, product: str) -> None:
    program = PLAIN | {"layout": layout, "product": product, "see": "all", "value": "wide"}
    assert possible(program)
    capture = run(build(program), inputs(program))
    assert capture.rewritten == 1, source(program)
    assert capture.squares(24, 24) == []


@pytest.mark.parametrize(
    "program",
    [
        PLAIN,
        PLAIN | {"layout": "blhd", "product": "bmm", "out": "flat"},
        PLAIN | {"layout": "blhd", "product": "einsum", "softcap": "yes"},
        PLAIN | {"product": "baddbmm", "see": "causal_padding", "sinks": "last"},
        PLAIN | {"gqa": "expand", "see": "window", "mask": "masked_fill"},
        PLAIN | {"layout": "grouped", "mask": "fill_"},
    ],
    ids=["plain", "bmm", "einsum", "sinks", "grouped", "five axes"],
)
def test_one_graph_serves_two_lengths(program: Program) -> None:
    torch.compiler.reset()
    function, capture = build(program), Capture()
    compiled = torch.compile(function, backend=capture, fullgraph=True)
    axis = -2
    for length in (24, 37):
        args = inputs(program, length)
        with torch.no_grad():
            expected = function(*args)
            if program["layout"] == "blhd":
                axis = 1
            for tensor in args[:3]:
                torch._dynamo.mark_dynamic(tensor, axis % tensor.ndim)
            torch._dynamo.mark_dynamic(args[3], 1)
            torch._dynamo.mark_dynamic(args[5], (1, 2))
            same(compiled(*args), expected)
    assert len(capture.graphs) == 1
    assert capture.rewritten == 1


# ---- near misses -------------------------------------------------------------------------------

MIN = torch.finfo(torch.float32).min
SCALE = 8**-0.5


def see(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()


def scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(~see(q, k), MIN)


def router(q, k, v):
    return torch.softmax(q @ q.new_ones(8, 24) + q[..., :1], -1) @ v


def router_plain(q, k, v):
    return q.repeat(1, 1, 1, 3).softmax(-1) @ v


def top_keys(q, k, v):
    s = scores(q, k)
    return s.masked_fill(s < s.topk(5, -1).values[..., -1:], MIN).softmax(-1) @ v


def two_values(q, k, v):
    w = scores(q, k).softmax(-1)
    return w @ v, w @ (v * 2 + 1)


def two_sinks(q, k, v):
    s = torch.cat([scores(q, k), torch.zeros(2, 4, 24, 2)], -1)
    return s.softmax(-1)[..., :-2] @ v


def two_sinks_one_cut(q, k, v):
    s = torch.cat([scores(q, k)[..., 1:], torch.zeros(2, 4, 24, 2)], -1)
    return s.softmax(-1)[..., :-1] @ v


def sinks_kept(q, k, v):
    s = torch.cat([scores(q, k), torch.zeros(2, 4, 24, 1)], -1)
    return s.softmax(-1) @ torch.cat([v, v[:, :, :1]], 2)


def sink_cut_elsewhere(q, k, v):
    s = torch.cat([scores(q, k), torch.zeros(2, 4, 24, 1)], -1)
    return s.softmax(-1)[..., 1:] @ v


def sink_of_rows(q, k, v):
    s = torch.cat([scores(q, k), q[..., :1]], -1)
    return s.softmax(-1)[..., :-1] @ v


def keys_written_between(q, k, v):
    k = k.clone()
    s = q @ k.mT * SCALE
    k.mul_(3)
    return (s + see(q, k) * 0).softmax(-1) @ v + k


def queries_written_between(q, k, v):
    q = q.clone()
    s = q @ k.mT * SCALE
    q[:, :, 3] = 7
    return s.softmax(-1) @ v + q


def values_written_between(q, k, v):
    v = v * 1
    w = scores(q, k).softmax(-1)
    v[:, :, 0].zero_()
    return w @ v


def argument_written_between(q, k, v):
    w = scores(q, k).softmax(-1)
    v.add_(1)
    k.zero_()
    return w @ v


def values_written_after(q, k, v):
    v = v.clone()
    o = scores(q, k).softmax(-1) @ v
    v.zero_()
    return o + v


def mask_written_between(q, k, v):
    mask = see(q, k).clone()
    s = (q @ k.mT).masked_fill(~mask, MIN)
    mask.fill_(True)
    return s.softmax(-1) @ v, mask


def mask_written_before(q, k, v):
    mask = see(q, k)
    mask[:, 3:6] = False
    return (q @ k.mT).masked_fill(~mask, MIN).softmax(-1) @ v


def added_mask_written_between(q, k, v):
    mask = torch.zeros(24, 24)
    s = q @ k.mT + mask
    mask.masked_fill_(~see(q, k), MIN)
    return s.softmax(-1) @ v


def one_row_written(q, k, v):
    s = scores(q, k)
    s[:, :, 5] = 0.0
    return s.softmax(-1) @ v


def view_written(q, k, v):
    s = q @ k.mT
    s.view(-1, 24, 24).masked_fill_(~see(q, k), MIN)
    return s.softmax(-1) @ v


def weights_written(q, k, v):
    w = scores(q, k).softmax(-1)
    w[..., 0] = 0
    return w @ v


def weights_scaled_in_place(q, k, v):
    w = scores(q, k).softmax(-1)
    w.mul_(0.5)
    return w @ v


def output_written(q, k, v):
    o = scores(q, k).softmax(-1) @ v
    o.mul_(2)
    return o


def out_argument(q, k, v):
    o = torch.empty_like(v)
    torch.matmul(scores(q, k).softmax(-1), v, out=o)
    return o


def bias_in_softcap(q, k, v):
    s = q @ k.mT + torch.arange(24.0) / 9
    return (3 * torch.tanh(s / 3)).masked_fill(~see(q, k), MIN).softmax(-1) @ v


def mask_in_softcap(q, k, v):
    return (3 * torch.tanh(scores(q, k) / 3)).softmax(-1) @ v


def uneven_softcap(q, k, v):
    return (2 * torch.tanh(q @ k.mT / 3)).masked_fill(~see(q, k), MIN).softmax(-1) @ v


def softcap_of_pairs(q, k, v):
    cap = torch.arange(1.0, 25.0)
    return (cap * torch.tanh(q @ k.mT / cap)).softmax(-1) @ v


def same_softmax_as_keys(q, k, v):
    w = scores(q, k).softmax(-1)
    return w @ w @ v


def keys_in_halves(q, k, v):
    w = scores(q, k).softmax(-1)
    return w[..., :12] @ v[:, :, :12]


def mixed_batch(q, k, v):
    return (q @ k.flip(0).mT).softmax(-1) @ v.roll(1, 1)


def tiled_keys_grouped_values(q, k, v):
    k, v = k[:, :2].repeat(1, 2, 1, 1), v[:, :2].repeat_interleave(2, 1)
    return scores(q, k).softmax(-1) @ v


def window_of_rows(q, k, v):
    w = scores(q, k)[:, :, 4:20].softmax(-1)
    return w @ v


def keys_cut_after(q, k, v):
    return scores(q, k)[..., :20].softmax(-1) @ v[:, :, :20]


def relu_of_masked(q, k, v):
    s = scores(q, k).relu()
    return s / (s.sum(-1, keepdim=True) + 1) @ v


def head_mixing(q, k, v):
    s = torch.einsum("bhij,hg->bgij", scores(q, k).clamp(-50), torch.ones(4, 4).tril())
    return s.softmax(-1) @ v


def integers(q, k, v):
    s = (q * 4).long() @ (k * 4).long().mT
    return s.float().mul(0.02).masked_fill(~see(q, k), MIN).softmax(-1) @ v


def rounded_scores(q, k, v):
    return (q @ k.mT).bfloat16().float().masked_fill(~see(q, k), MIN).softmax(-1) @ v


def wide_scores(q, k, v):
    return ((q.double() @ k.double().mT).softmax(-1) @ v.double()).float()


def rounded_weights(q, k, v):
    return scores(q, k).softmax(-1).bfloat16().float() @ v


def no_batch_for_keys(q, k, v):
    return scores(q, k[:1]).softmax(-1) @ v[:1]


def no_batch_for_queries(q, k, v):
    return scores(q[:1], k).softmax(-1) @ v


def weights_of_other_batch(q, k, v):
    return scores(q[:1], k[:1]).softmax(-1) @ v


def means(q, k, v):
    s = scores(q, k)
    return s.softmax(-1) @ v - s.softmax(-1).mean(-1, keepdim=True)


def scores_minus_constant_max(q, k, v):
    s = scores(q, k)
    return (s - s.amax((-1, -2), keepdim=True)).softmax(-1) @ v


def exp_without_sum(q, k, v):
    return torch.exp(scores(q, k)) @ v


def exp_with_other_sum(q, k, v):
    e = torch.exp(scores(q, k))
    return e / e.sum(-2, keepdim=True) @ v


def exp_with_more(q, k, v):
    e = torch.exp(scores(q, k))
    return e / (e.sum(-1, keepdim=True) + 1.0) @ v


def normalised_after(q, k, v):
    e = torch.exp(scores(q, k))
    return (e @ v) / e.sum(-1, keepdim=True)


NEAR: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    **{f.__name__: f for f in (router, router_plain, top_keys, two_values, two_sinks)},
    **{f.__name__: f for f in (two_sinks_one_cut, sinks_kept, sink_cut_elsewhere, sink_of_rows)},
    **{f.__name__: f for f in (keys_written_between, queries_written_between, integers)},
    **{f.__name__: f for f in (values_written_between, argument_written_between, view_written)},
    **{f.__name__: f for f in (values_written_after, mask_written_between, mask_written_before)},
    **{f.__name__: f for f in (added_mask_written_between, one_row_written, weights_written)},
    **{f.__name__: f for f in (weights_scaled_in_place, output_written, out_argument)},
    **{f.__name__: f for f in (bias_in_softcap, mask_in_softcap, uneven_softcap)},
    **{f.__name__: f for f in (softcap_of_pairs, same_softmax_as_keys, keys_in_halves)},
    **{f.__name__: f for f in (mixed_batch, tiled_keys_grouped_values, window_of_rows)},
    **{f.__name__: f for f in (keys_cut_after, relu_of_masked, head_mixing, rounded_scores)},
    **{f.__name__: f for f in (wide_scores, rounded_weights, no_batch_for_keys)},
    **{f.__name__: f for f in (no_batch_for_queries, weights_of_other_batch, means)},
    **{f.__name__: f for f in (scores_minus_constant_max, exp_without_sum, exp_with_other_sum)},
    **{f.__name__: f for f in (exp_with_more, normalised_after)},
    "over rows": lambda q, k, v: scores(q, k).softmax(-2) @ v,
    "over heads": lambda q, k, v: scores(q, k).softmax(1) @ v,
    "over the batch": lambda q, k, v: scores(q, k).softmax(0) @ v,
    "transposed weights": lambda q, k, v: scores(q, k).softmax(-1).mT @ v,
    "over rows of the transpose": lambda q, k, v: scores(q, k).mT.softmax(-1) @ v,
    "scores returned": lambda q, k, v: ((s := scores(q, k)).softmax(-1) @ v, s),
    "scores summed": lambda q, k, v: (s := q @ k.mT).softmax(-1) @ v + s.sum(),
    "weights returned": lambda q, k, v: ((w := scores(q, k).softmax(-1)) @ v, w),
    "weights multiplied": lambda q, k, v: (scores(q, k).softmax(-1) * 0.5) @ v,
    "weights of keys": lambda q, k, v: (scores(q, k).softmax(-1) * k[:, :, None, :, 0]) @ v,
    "gated": lambda q, k, v: (scores(q, k).softmax(-1) * q[..., :1].sigmoid()) @ v,
    "normalised again": lambda q, k, v: F.normalize(scores(q, k).softmax(-1), p=2, dim=-1) @ v,
    "masked after": lambda q, k, v: ((q @ k.mT).softmax(-1) * see(q, k)) @ v,
    "tril after": lambda q, k, v: (q @ k.mT).softmax(-1).tril() @ v,
    "masked before and after": lambda q, k, v: (scores(q, k).softmax(-1) * see(q, k)) @ v,
    "masked wider after": lambda q, k, v: scores(q, k).softmax(-1).tril(2) @ v,
    "masked narrower after": lambda q, k, v: scores(q, k).softmax(-1).tril(-1) @ v,
    "relu": lambda q, k, v: scores(q, k).relu() @ v,
    "sigmoid": lambda q, k, v: scores(q, k).sigmoid() @ v,
    "log softmax": lambda q, k, v: scores(q, k).clamp(-50).log_softmax(-1) @ v,
    "softmin": lambda q, k, v: F.softmin(scores(q, k).clamp(-50), -1) @ v,
    "negated": lambda q, k, v: (-(q @ k.mT)).softmax(-1) @ v,
    "gumbel": lambda q, k, v: (scores(q, k) / 0.5).softmax(-1).round() @ v,
    "squared scores": lambda q, k, v: (q @ k.mT).square().softmax(-1) @ v,
    "absolute scores": lambda q, k, v: (q @ k.mT).abs().softmax(-1) @ v,
    "clamped scores": lambda q, k, v: (q @ k.mT).clamp(-1, 1).softmax(-1) @ v,
    "temperature of keys": lambda q, k, v: (q @ k.mT * torch.linspace(0, 1, 24)).softmax(-1) @ v,
    "temperature of rows": lambda q, k, v: (
        (q @ k.mT * torch.linspace(0, 1, 24)[:, None]).softmax(-1) @ v
    ),
    "temperature of pairs": lambda q, k, v: ((q @ k.mT) * see(q, k)).softmax(-1) @ v,
    "zero temperature": lambda q, k, v: (q @ k.mT * 0.0).softmax(-1) @ v,
    "mask of -1e4": lambda q, k, v: (q @ k.mT + (~see(q, k)) * -1e4).softmax(-1) @ v,
    "mask of -5": lambda q, k, v: (q @ k.mT).masked_fill(~see(q, k), -5.0).softmax(-1) @ v,
    "mask of +5": lambda q, k, v: (q @ k.mT + see(q, k) * 5.0).softmax(-1) @ v,
    "mask of +max": lambda q, k, v: (q @ k.mT).masked_fill(see(q, k), -MIN).softmax(-1) @ v,
    "mask scaled after": lambda q, k, v: (scores(q, k) * 1e-38).softmax(-1) @ v,
    "other mask of keys": lambda q, k, v: (q @ k.mT + torch.linspace(0, -9, 24)).softmax(-1) @ v,
    "strictly later": lambda q, k, v: (q @ k.mT).masked_fill(see(q, k).mT, MIN).softmax(-1) @ v,
    "aliased keys and values": lambda q, k, v: scores(k, k).softmax(-1) @ k,
    "values are queries": lambda q, k, v: scores(q, k).softmax(-1) @ q,
    "values transposed": lambda q, k, v: scores(q, k).softmax(-1) @ v[:, :, :8].mT.repeat(1, 1, 3, 1),
    "reversed keys": lambda q, k, v: scores(q, k.flip(-2)).softmax(-1) @ v,
    "shifted weights": lambda q, k, v: scores(q, k).softmax(-1).roll(1, -1) @ v,
    "heads turned": lambda q, k, v: scores(q, k).flip(1).softmax(-1) @ v,
    "added weights": lambda q, k, v: (scores(q, k).softmax(-1) + torch.eye(24)) @ v,
    "added outputs": lambda q, k, v: torch.baddbmm(
        *(v.flatten(0, 1), scores(q, k).softmax(-1).flatten(0, 1), v.flatten(0, 1)), beta=2, alpha=3
    ),
    "half softmax": lambda q, k, v: (q @ k.mT).softmax(-1, dtype=torch.float64).float() @ v,
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_declined_or_right(name: str) -> None:
    q, k, v = (torch.randn(2, 4, 24, 8) for _ in range(3))
    run(NEAR[name], (q, k, v))
