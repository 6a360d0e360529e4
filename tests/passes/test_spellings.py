"""Attention however it is written gives what it gave; near misses are declined or right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import near_writes  # noqa: F401 - adds to NEAR
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from near_expressions import EXPRESSIONS
from near_misses import NEAR
from spelling_programs import CHOICES, Program, build, inputs, possible, source
from torch import Tensor, fx

from sparse_compiler.backend import minference

ATTEND = torch.ops.sparse_compiler.attend.default
OPTIONS = {"budget": 1.0, "min_tokens": 0, "inner": "eager", "fallback": "silent"}
PLAIN = {name: values[0] for name, values in CHOICES.items()}

# An input may be a mask, which nobody can prove; the others are read by nobody yet.
DECLINED = [
    PLAIN | {"bias": "full"},
    PLAIN | {"bias": "row_key"},
    PLAIN | {"product": "baddbmm_beta"},
    PLAIN | {"sinks": "first"},
    PLAIN | {"softmax": "exp"},
    PLAIN | {"softmax": "logsumexp"},
]


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
            if possible(program) and program not in DECLINED:
                found.append(pytest.param(program, id=f"{name}-{value}"))
    return found


@pytest.mark.parametrize("program", one_change())
def test_plain_spellings_are_rewritten(program: Program) -> None:
    capture = run(build(program), inputs(program))
    expected = {"chunks": 2, "chain": 2, "pair": 2}.get(program["whole"], 1)
    assert capture.rewritten == expected, source(program)
    num_q = 17 if program["rows"] == "fewer" else 24
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


@pytest.mark.parametrize("name", [*NEAR, *EXPRESSIONS])
def test_near_misses_are_declined_or_right(name: str) -> None:
    q, k, v = (torch.randn(2, 4, 24, 8) for _ in range(3))
    run((NEAR | EXPRESSIONS)[name], (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_between_the_products_may_go(dtype: torch.dtype) -> None:
    """Casts that only lose precision are left out: no further off than the rounding was."""
    q, k, v = (torch.randn(2, 4, 24, 8) for _ in range(3))

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).to(dtype).float().softmax(-1)
        return weights.to(dtype).float() @ v

    run(program, (q, k, v), tolerance=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("upcast", [True, False])
def test_other_dtypes_keep_theirs(dtype: torch.dtype, upcast: bool) -> None:
    q, k, v = (torch.randn(2, 4, 24, 8).to(dtype) for _ in range(3))

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT) * 0.3
        w = s.softmax(-1, dtype=torch.float32).to(q.dtype) if upcast else s.softmax(-1)
        return w @ v

    tolerance = max(2e-5, 8 * torch.finfo(dtype).eps)
    assert run(program, (q, k, v), tolerance).rewritten == 1


def test_active_dropout_is_declined() -> None:
    q, k, v = (torch.randn(2, 4, 24, 8) for _ in range(3))
    capture = Capture()
    compiled = torch.compile(
        lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.5) @ v, backend=capture
    )
    with torch.no_grad():
        assert not torch.equal(compiled(q, k, v), compiled(q, k, v))
    assert capture.rewritten == 0


def test_rows_that_see_nothing_are_zero() -> None:
    """Where a finite number hides everything, eager code averages the values of hidden keys."""
    q, k, v = (torch.randn(2, 4, 24, 8) for _ in range(3))
    capture = Capture()

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        earlier = torch.ones(24, 24, dtype=torch.bool).tril(-1)
        return (q @ k.mT).masked_fill(~earlier, -1e30).softmax(-1) @ v

    with torch.no_grad():
        out, expected = torch.compile(program, backend=capture)(q, k, v), program(q, k, v)
    assert capture.rewritten == 1
    assert torch.equal(out[:, :, 0], torch.zeros(2, 4, 8))
    same(out[:, :, 1:], expected[:, :, 1:])
