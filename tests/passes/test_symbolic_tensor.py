"""Elements read symbolically equal the elements that PyTorch computes."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
from torch import fx

from sparse_compiler.passes.symbolic_tensor import Mutated, SymbolicTensors
from sparse_compiler.passes.symbolic_values import Choice


def numbered(*shape):
    """A tensor whose elements are their own flat positions."""
    return torch.arange(torch.Size(shape).numel()).view(shape)


def written_view(x):
    place = numbered(4)
    seen = place[None]
    place.add_(1)
    return seen + 1


def written_sum(x):
    total = numbered(4) + 0
    total += numbered(4)
    total -= 1
    return total * 2


READ = {
    "arange_step": lambda x: torch.arange(3, 15, 4),
    "arange_keywords": lambda x: torch.arange(start=2, end=9, step=3),
    "arange_end_keyword": lambda x: torch.arange(2, end=9),
    "arithmetic": lambda x: (numbered(2, 3) * 3 - 4 + numbered(3)) // 2 % 5,
    "reversed_sub": lambda x: 7 - numbered(4),
    "negative": lambda x: -numbered(4),
    "absolute": lambda x: (numbered(5) - 2).abs(),
    "floor_div": lambda x: torch.div(numbered(7) - 3, 2, rounding_mode="floor"),
    "none_and_slices": lambda x: numbered(4, 6)[:, None, 1:5:2],
    "negative_slice": lambda x: numbered(4, 6)[-2:, -3],
    "clamped_slice": lambda x: numbered(4, 6)[-9:, 2:99],
    "ellipsis": lambda x: numbered(2, 3, 4)[..., 1, :],
    "reshape_merge": lambda x: numbered(2, 3, 4).transpose(0, 1).reshape(3, 8),
    "reshape_split": lambda x: numbered(6, 4).t().reshape(2, -1, 3),
    "reshape_mixed": lambda x: numbered(4, 6).mT.reshape(8, 3),
    "with_ones": lambda x: numbered(4, 6)[:, None].reshape(1, 4, 1, 6, 1).squeeze(2),
    "flatten": lambda x: numbered(2, 3, 4).permute(2, 0, 1).flatten(1),
    "unflatten": lambda x: numbered(2, 12).unflatten(1, (3, 4)).permute(1, 0, 2),
    "squeeze_all": lambda x: numbered(1, 4, 1, 2).squeeze(),
    "unsqueeze": lambda x: numbered(3, 2).unsqueeze(-1).expand(-1, -1, 4),
    "broadcast": lambda x: torch.broadcast_to(numbered(3, 1), (2, 3, 4)),
    "repeat": lambda x: numbered(2, 3).repeat(2, 2, 1),
    "repeat_interleave": lambda x: numbered(2, 3).repeat_interleave(2, dim=1),
    "flip": lambda x: numbered(2, 3).flip(-1),
    "gather": lambda x: numbered(4, 6)[numbered(3)[:, None], numbered(5)[None]],
    "gather_behind": lambda x: numbered(4, 6, 5)[:, numbered(2, 1) + 1, numbered(3)],
    "gather_split": lambda x: numbered(4, 6, 5)[numbered(3), :, numbered(3) + 1],
    "gather_negative": lambda x: numbered(6)[numbered(3) - 3],
    "select": lambda x: numbered(4, 6).select(1, -2),
    "narrow": lambda x: numbered(4, 6).narrow(1, 2, 3),
    "filled": lambda x: torch.full((2, 3), 7) + numbered(3).new_full((3,), 2),
    "like": lambda x: torch.zeros_like(numbered(3)) + torch.ones_like(numbered(3)),
    "written_view": written_view,
    "written_sum": written_sum,
    "clamped": lambda x: (numbered(6) - 2).clamp(min=0, max=2),
    "steps": lambda x: numbered(6).diff(prepend=numbered(1) - 1),
    "running_sum_of_ones": lambda x: torch.ones(5, dtype=torch.long).cumsum(0),
    "minimum": lambda x: torch.minimum(numbered(6), 5 - numbered(6)),
    "aten": lambda x: torch.ops.aten.add.Tensor(
        torch.ops.aten.slice.Tensor(numbered(6), 0, 2, 6), 1
    ),
}
PREDICATES = {
    "triangle": lambda x: torch.ones(3, 4, dtype=torch.bool).tril(1),
    "not_equal": lambda x: numbered(6) % 4 != 2,
    "exclusive": lambda x: (numbered(6) > 2) ^ (numbered(6) < 4),
    "equal_bools": lambda x: (numbered(6) > 2) == (numbered(6) < 4),
    "logical": lambda x: torch.logical_not(torch.logical_or(numbered(6) - 2, numbered(6) == 2)),
    "where": lambda x: torch.where(numbered(6) > 2, numbered(6) < 5, numbered(6) == 0),
    "through_numbers": lambda x: (1 - (numbered(6) > 2).long()).bool(),
    "through_floats": lambda x: (1.0 - (numbered(6) > 2).float()) == 0,
}
UNREAD = {
    "cumsum": lambda x: numbered(4).cumsum(0),
    "sort": lambda x: numbered(4).sort()[0],
    "true_division": lambda x: (numbered(4) / 2).long(),
    "float_positions": lambda x: numbered(4).float().long(),
    "narrow_integers": lambda x: numbered(4).to(torch.int8).long(),
    "input": lambda x: x + 0,
    "outside": lambda x: numbered(4)[x],
    "huge": lambda x: numbered(4) + 2**40,
}


def captured(function):
    """The graph of `function(x)`, its result node and the result's value."""
    torch._dynamo.reset()
    graphs = []
    x = torch.tensor([2, 0, 1, 3])

    def backend(gm, examples):
        graphs.append(gm)
        return gm.forward

    value = torch.compile(lambda x: (function(x), x + 1), backend=backend, fullgraph=True)(x)[0]
    gm: fx.GraphModule = graphs[0]
    return gm.graph, next(n for n in gm.graph.nodes if n.op == "output").args[0][0], value


def elements(function):
    """(element as read, element as computed) at every place."""
    graph, node, value = captured(function)
    reader = SymbolicTensors(graph)
    for place in itertools.product(*(range(n) for n in value.shape)):
        yield reader.evaluate(node, [sympy.Integer(p) for p in place]), value[place].item()


@pytest.mark.parametrize("name", READ)
def test_integers_are_read(name):
    for read, computed in elements(READ[name]):
        assert read == computed


@pytest.mark.parametrize("name", PREDICATES)
def test_predicates_are_read(name):
    for read, computed in elements(PREDICATES[name]):
        assert bool(read.doit()) == computed


def test_additive_values_are_choices():
    graph, node, _ = captured(lambda x: torch.zeros(4).masked_fill(numbered(4) > 1, float("-inf")))
    reader = SymbolicTensors(graph)
    value = reader.evaluate(node, [reader.new_index("i", 4)])
    assert isinstance(value, Choice)
    assert (value.yes, value.no) in {(0.0, float("-inf")), (float("-inf"), 0.0)}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_understood_is_a_read(name):
    graph, node, _ = captured(UNREAD[name])
    reader = SymbolicTensors(graph)
    value = reader.evaluate(node, [reader.new_index("i", 4)])
    assert reader.read_nodes(value)
    assert reader.reasons


def written_item(x):
    place = numbered(4)
    place[0] = 5
    return place + 1


def written_out(x):
    place = numbered(4)
    torch.add(x, 1, out=place)
    return place + 1


@pytest.mark.parametrize("function", [written_item, written_out])
def test_memory_written_in_place_is_refused(function):
    graph, node, value = captured(function)
    index = [sympy.Integer(0)] * value.dim()
    with pytest.raises(Mutated):
        SymbolicTensors(graph).evaluate(node, index)


def test_a_foreign_function_named_like_an_operation_is_not_trusted():
    def add(a, b):
        return a - b

    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(add, (x, 1))
    for n in (x, node):
        n.meta["example_value"] = torch.arange(4)
    reader = SymbolicTensors(graph)
    assert reader.mutations.written(x)
    assert reader.read_nodes(reader.evaluate(node, [sympy.Integer(0)])) == {node}
