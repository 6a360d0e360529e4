"""Models that break into several graphs: a mask proved in one is known in the next, or not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_compiler
from sparse_compiler import mask_tags
from sparse_compiler.explanation import report_of
from sparse_compiler.ir.report import SiteReport

HEADS, WIDTH = 4, 32
LENGTH = 24
INNERS = ("eager", "inductor")
Change = Callable[[Tensor], Tensor]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of a graph that was compiled for a given mask: whether the mask was that."""
    found: list[bool] = []
    original = mask_tags.GivenGraph._operands

    def spied(self: mask_tags.GivenGraph, args: Any) -> Any:
        operands = original(self, args)
        found.append(operands is not None)
        return operands

    monkeypatch.setattr(mask_tags.GivenGraph, "_operands", spied)
    return found


def causal(length: int, pad: Tensor | None) -> Tensor:
    place = torch.arange(length)
    mask = (place[:, None] >= place[None])[None, None]
    return mask if pad is None else mask & pad[:, None, None, :].bool()


def window(length: int, pad: Tensor | None) -> Tensor:
    place = torch.arange(length)
    near = (place[:, None] - place[None] < 5)[None, None]
    return near & causal(length, pad)


def chunks(length: int, pad: Tensor | None) -> Tensor:
    place = torch.arange(length) // 8
    return (place[:, None] == place[None])[None, None] & causal(length, pad)


def prefix(length: int, pad: Tensor | None) -> Tensor:
    """``pad`` is the number of leading keys that every row of an entry sees."""
    assert pad is not None
    return causal(length, None) | (torch.arange(length) < pad[:, :1])[:, None, None, :]


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


class Broken(nn.Module):
    """Makes its mask in one graph, and attends in another.

    Args:
        make: the mask from a length and padding.  added: as floats.
    Attributes:
        change: what happens to the mask between the graphs, in eager code.
    """

    def __init__(self, make: Any = causal, added: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.make, self.added = make, added
        self.change: Change | None = None

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        mask = self.make(x.shape[1], pad)
        if self.added:
            mask = additive(mask)
        torch._dynamo.graph_break()
        mask = changed(self, mask)  # type: ignore
        return attend(self.project(x), mask)


@torch.compiler.disable
def changed(model: Any, mask: Tensor) -> Tensor:
    return mask if model.change is None else model.change(mask)


def attend(x: Tensor, mask: Tensor) -> Tensor:
    parts = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in x.chunk(3, -1))
    return F.scaled_dot_product_attention(*parts, attn_mask=mask)


def compiled(model: Any, **options: Any) -> Any:
    dynamic = options.pop("dynamic", None)
    given = {"budget": 1.0, "min_tokens": 0, "inner": "eager", "fallback": "silent"} | options
    return torch.compile(model, backend="minference", options=given, dynamic=dynamic)


def padding(length: int = LENGTH) -> Tensor:
    pad = torch.ones(2, length, dtype=torch.long)
    pad[0, length - 4 :] = 0
    return pad


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, WIDTH)


def sites(model: nn.Module) -> list[SiteReport]:
    return report_of(model).sites


@pytest.fixture(params=["no_grad", "inference_mode"])
def mode(request: pytest.FixtureRequest) -> Any:
    with getattr(torch, request.param)():
        yield request.param


@pytest.mark.parametrize("added", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("make", [causal, window])
def test_a_mask_is_known_after_a_break(
    make: Any, padded: bool, added: bool, mode: Any, taken: list[bool]
) -> None:
    model, x, pad = Broken(make, added), tokens(), padding() if padded else None
    run = compiled(model)
    for _ in range(2):
        assert_close(run(x, pad), model(x, pad))
    (site,) = sites(model)
    assert site.decision == "rewritten" and site.mask_given
    assert site.mask.startswith("causal") and site.mask.endswith("(proved before a graph break)")
    assert ("key padding" in site.mask) == padded
    assert taken == [True, True]


@pytest.mark.parametrize("make", [causal, prefix])
@pytest.mark.parametrize("added", [False, True], ids=["bool", "additive"])
def test_inductor(make: Any, added: bool, taken: list[bool]) -> None:
    model, x = Broken(make, added), tokens()
    pad = padding() if make is causal else torch.tensor([[5], [2]])
    with torch.inference_mode():
        run = compiled(model, inner="inductor")
        for _ in range(2):
            assert_close(run(x, pad), model(x, pad))
        model.change = lambda mask: mask.fill_(mask[0, 0, 0, 0].item())
        assert_close(run(x, pad), model(x, pad))
    assert sites(model)[0].decision == "rewritten"
    assert taken == [True, True, False]


@pytest.mark.parametrize("make", [prefix, chunks])
def test_rows_with_bounds(make: Any, mode: Any, taken: list[bool]) -> None:
    model, x = Broken(make), tokens()
    run = compiled(model)
    for lengths in ([[5], [2]], [[0], [17]]):
        pad = torch.tensor(lengths) if make is prefix else None
        assert_close(run(x, pad), model(x, pad))
    assert sites(model)[0].decision == "rewritten"
    assert "rows bounded" in sites(model)[0].mask
    assert taken == [True, True]


def _through_a_view(mask: Tensor) -> Tensor:
    mask[0, 0, :, -6:] = mask[0, 0, 0, 0]
    return mask


def _in_place(mask: Tensor) -> Tensor:
    return mask.masked_fill_(torch.eye(LENGTH).bool().flip(0), mask[0, 0, 0, 0].item())


def _assigned(mask: Tensor) -> Tensor:
    mask.data = mask.data.flip(2)
    return mask


def _detached(mask: Tensor) -> Tensor:
    mask.detach().logical_not_().logical_not_()[0, 0, 0].fill_(mask[0, 0, 0, 0].item())
    return mask


def _out(mask: Tensor) -> Tensor:
    return torch.logical_or(mask, torch.eye(LENGTH).bool().flip(0), out=mask)


def _copied(mask: Tensor) -> Tensor:
    return mask.clone()


def _replaced(mask: Tensor) -> Tensor:
    return torch.ones_like(mask).tril(3)


CHANGES = (_through_a_view, _in_place, _assigned, _detached, _out, _copied, _replaced)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first", [False, True], ids=["later", "at once"])
def test_a_mask_changed_between_the_graphs(
    change: Change, first: bool, mode: Any, taken: list[bool]
) -> None:
    model, x = Broken(), tokens()
    run = compiled(model)
    model.change = change if first else None
    for _ in range(2):
        assert_close(run(x, padding()), model(x, padding()))
        model.change = change
    # Changed before the later graph was compiled: it never assumes anything. A new tensor made in
    # inference mode is of another kind than the graph's, and gets a graph of its own.
    assert taken in ([[]] if first else [[True, False], [True]])


def test_a_compiled_write_between_the_graphs(mode: Any, taken: list[bool]) -> None:
    for backend in INNERS:
        write = torch.compile(lambda mask: mask[:, :, :, :3].fill_(True), backend=backend)

        def change(mask: Tensor, write: Any = write) -> Tensor:
            write(mask)
            return mask

        model, x = Broken(), tokens()
        run = compiled(model)
        for model.change in (None, change, None):
            assert_close(run(x), model(x))
    assert taken == [True, False, True] * 2


def test_another_mask_of_the_same_shape(mode: Any, taken: list[bool]) -> None:
    model, x = Broken(), tokens()
    run = compiled(model)
    for make, pad in ((causal, None), (window, None), (causal, padding()), (chunks, None)):
        model.make = make
        assert_close(run(x, pad), model(x, pad))
    model.make = causal
    assert_close(run(x), model(x))
    # Padding gives a mask of another batch size, so a graph of its own.
    assert taken == [True, False, True, False, True]


def test_masks_that_nobody_proved(mode: Any, taken: list[bool]) -> None:
    make = compiled(causal)
    run = compiled(attend)
    x = torch.randn(2, LENGTH, 3 * WIDTH)
    known = make(LENGTH, None)
    assert_close(run(x, known), attend(x, known))
    for _ in range(2):
        mask = torch.rand(1, 1, LENGTH, LENGTH) > 0.3
        assert_close(run(x, mask), attend(x, mask))
    assert_close(run(x, known), attend(x, known))
    # Tensors made in inference mode are of another kind than the graph's and get one of their own.
    assert taken == ([True, False, False, True] if mode == "no_grad" else [True, True])


def test_padding_changed_between_the_graphs(mode: Any, taken: list[bool]) -> None:
    """The mask is a copy of the padding: it stays, whatever becomes of that."""
    model, x = Broken(), tokens()
    run = compiled(model)
    results = []
    for call in (run, model):
        pad = padding().bool()

        def change(mask: Tensor, pad: Tensor = pad) -> Tensor:
            pad.zero_()
            return mask

        model.change = change
        results.append(call(x, pad))
    assert_close(*results)
    assert taken == [True]


def test_a_mask_that_is_a_view_of_an_input(mode: Any, taken: list[bool]) -> None:
    """Whoever wrote to the padding has changed the mask."""

    class View(Broken):
        def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
            assert pad is not None
            mask = pad[:, None, None, :]
            torch._dynamo.graph_break()
            pad[:, :2] = False
            return attend(self.project(x), mask)

    model, x = View(), tokens()
    run = compiled(model)
    for _ in range(2):
        assert_close(run(x, padding().bool()), model(x, padding().bool()))
    assert not any(taken)


def test_a_mask_whose_memory_another_output_has(mode: Any, taken: list[bool]) -> None:
    class Shared(Broken):
        def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
            mask = causal(x.shape[1], pad)
            rows = mask[0, 0]
            torch._dynamo.graph_break()
            rows[:, :2] = True
            torch._dynamo.graph_break()
            return attend(self.project(x), mask)

    for inner in INNERS:
        model, x = Shared(), tokens()
        run = compiled(model, inner=inner)
        for _ in range(2):
            assert_close(run(x), model(x))
    assert not any(taken)


def test_a_graph_that_writes_to_a_view_of_its_mask(mode: Any, taken: list[bool]) -> None:
    make = compiled(causal)

    def writes(x: Tensor, mask: Tensor, part: Tensor) -> Tensor:
        part[..., :3] = True
        return attend(x, mask)

    run = compiled(writes)
    x = torch.randn(2, LENGTH, 3 * WIDTH)
    for shared in (False, True):
        results = []
        for call in (run, writes):
            mask = make(LENGTH, None)
            part = mask[0] if shared else mask[0].clone()
            results.append(call(x, mask, part))
        assert_close(*results)


def test_a_mask_goes_on_through_a_graph(mode: Any, taken: list[bool]) -> None:
    """The graph in the middle is given a mask and returns another."""

    class Chain(Broken):
        def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
            assert pad is not None
            mask = causal(x.shape[1], None)
            torch._dynamo.graph_break()
            mask = mask & pad[:, None, None, :].bool()
            torch._dynamo.graph_break()
            return attend(self.project(x), additive(mask))

    model, x = Chain(), tokens()
    run = compiled(model)
    for _ in range(2):
        assert_close(run(x, padding()), model(x, padding()))
    assert sites(model)[0].decision == "rewritten"
    assert taken == [True] * 4


@pytest.mark.parametrize("inner", INNERS)
def test_sizes_that_are_symbols(inner: str, taken: list[bool]) -> None:
    model = Broken()
    with torch.inference_mode():
        run = compiled(model, inner=inner, dynamic=True)
        for length in (24, 31, 40):
            x, pad = tokens(length), padding(length)
            assert_close(run(x, pad), model(x, pad))
        model.make = window
        assert_close(run(x, pad), model(x, pad))
    assert sites(model)[0].decision == "rewritten"
    assert taken == [True, True, True, False]


def test_sizes_that_become_symbols(taken: list[bool]) -> None:
    model = Broken(added=True)
    with torch.inference_mode():
        run = compiled(model)
        for length in (24, 31, 40):
            x, pad = tokens(length), padding(length)
            assert_close(run(x, pad), model(x, pad))
    assert all(taken) and len(taken) == 3


def test_an_offset_that_depends_on_the_sizes(taken: list[bool]) -> None:
    """Fewer rows than keys: the diagonal is known for one pair of sizes and right for others."""

    def make(rows: Tensor, keys: Tensor) -> Tensor:
        row = torch.arange(rows.shape[0]) + keys.shape[0] - rows.shape[0]
        return (row[:, None] >= torch.arange(keys.shape[0])[None])[None, None]

    def last(x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in x.chunk(3, -1))
        q = q[:, :, q.shape[2] - mask.shape[2] :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    with torch.no_grad():
        first, second = compiled(make, dynamic=True), compiled(last, dynamic=True)
        for rows, keys in ((16, 24), (16, 24), (17, 25), (16, 30)):
            x = torch.randn(2, keys, 3 * WIDTH)
            mask = first(torch.empty(rows), torch.empty(keys))
            assert_close(second(x, mask), last(x, mask))
    assert taken in ([True, True, True, False], [])


def test_a_mask_input_is_named_as_such() -> None:
    run = compiled(attend, fallback="warn")
    x, mask = torch.randn(2, LENGTH, 3 * WIDTH), torch.rand(1, 1, LENGTH, LENGTH) > 0.3
    with torch.no_grad(), pytest.warns(UserWarning, match=r"MASK_INPUT.*TORCH_LOGS=graph_breaks"):
        assert_close(run(x, mask), attend(x, mask))


def test_nothing_is_added_while_gradients_are_recorded(taken: list[bool]) -> None:
    model, x = Broken(), tokens()
    run = compiled(model)
    assert_close(run(x, padding()), model(x, padding()))
    assert not taken and sites(model)[0].decision == "declined"


def test_explain_shows_a_mask_that_crossed_a_break() -> None:
    model = Broken()
    with torch.inference_mode():
        options = {"budget": 1.0, "min_tokens": 0}
        told = sparse_compiler.explain(model, (tokens(), padding()), options=options)
    assert [s.mask for s in told.sites] == ["causal, key padding (proved before a graph break)"]
    assert told.rewritten == 1
