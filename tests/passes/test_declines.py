"""What the passes cannot know is declined with a reason, and what they see they say."""

from __future__ import annotations

from typing import Any, cast

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from sparse_compiler.backend import minference
from sparse_compiler.explanation import report_of
from sparse_compiler.ir.report import Code
from sparse_compiler.passes.expand import Closed, Inserter, _multi_head
from sparse_compiler.passes.hidden import hides
from sparse_compiler.passes.layout import divided, step_back
from sparse_compiler.passes.origins import is_of_module, is_parameter
from sparse_compiler.passes.rewrite_sparse import _check_strides, _order_of, _StridesUnknown
from sparse_compiler.passes.sdpa import match_sdpa
from sparse_compiler.passes.symbolic_tensor import SymbolicTensors
from sparse_compiler.passes.symbolic_values import FloorDivide, Modulo

OPTIONS = {"budget": 1.0, "min_tokens": 0, "inner": "eager", "fallback": "silent"}


# -- divisions of what was merged --------------------------------------------------------------------


def test_divisions_come_apart_only_where_the_inner_index_stays_below() -> None:
    tensors = SymbolicTensors(fx.Graph())
    outer = tensors.new_index("a", 3)
    for size, by in ((4, 4), (3, 4), (5, 4)):
        inner = tensors.new_index("b", size)
        merged, number = outer * by + inner, sympy.Integer(by)
        found = [divided(kind, merged, number, tensors) for kind in (FloorDivide, Modulo)]
        apart = [outer, inner]
        kept = [FloorDivide(merged, number), Modulo(merged, number)]
        assert found == (apart if size <= by else kept)


def test_an_index_of_unknown_range_is_kept_under_its_division() -> None:
    tensors = SymbolicTensors(fx.Graph())
    outer, inner = tensors.new_index("a", 3), sympy.Dummy("b", integer=True)
    number = sympy.Integer(4)
    assert divided(FloorDivide, outer * 4 + inner, number, tensors) != outer
    assert divided(Modulo, outer * 4 + inner, number, tensors) != inner


# -- flags that the graph computes -------------------------------------------------------------------


def graph_with_flag(name: str) -> tuple[fx.Graph, fx.Node]:
    graph = fx.Graph()
    inputs = []
    for operand in "qkv":
        inputs.append(graph.placeholder(operand))
        inputs[-1].meta["example_value"] = torch.randn(1, 2, 8, 4)
    flag = graph.placeholder("flag")
    flag.meta["example_value"] = False
    node = graph.call_function(F.scaled_dot_product_attention, tuple(inputs), {name: flag})
    node.meta["example_value"] = torch.randn(1, 2, 8, 4)
    graph.output((node,))
    return graph, node


@pytest.mark.parametrize(
    ("name", "code"), [("is_causal", Code.MASK_UNKNOWN), ("enable_gqa", Code.SHAPES)]
)
def test_flags_of_sdpa_that_are_nodes(name: str, code: Code) -> None:
    graph, node = graph_with_flag(name)
    form = match_sdpa(node, SymbolicTensors(graph))
    assert form is not None
    assert form.obstacle is not None
    assert form.obstacle[0] == code
    assert f"{name} is computed by the graph (flag)" in form.obstacle[1]


@pytest.mark.parametrize("name", ["is_causal", "enable_gqa"])
@pytest.mark.parametrize("value", [False, True])
def test_a_graph_with_such_a_flag_stays_as_it_is(name: str, value: bool) -> None:
    graph, _ = graph_with_flag(name)
    gm = fx.GraphModule(torch.nn.Module(), graph)
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    flag: dict[str, Any] = {name: value}
    expected = F.scaled_dot_product_attention(q, k, v, **flag)
    run = minference(gm, [q, k, v, value], options=OPTIONS)
    torch.testing.assert_close(run(q, k, v, value)[0], expected)
    assert not any("attend" in str(n.target) for n in gm.graph.nodes)


@pytest.mark.parametrize("name", ["add_zero_attn", "is_causal", "need_weights", "training"])
def test_flags_of_multi_head_attention_that_are_nodes(name: str) -> None:
    graph = fx.Graph()
    x, flag = graph.placeholder("x"), graph.placeholder("flag")
    x.meta["example_value"], flag.meta["example_value"] = torch.randn(6, 2, 8), False
    weights = torch.randn(24, 8), torch.randn(24), None, None, False, 0.0, torch.randn(8, 8)
    function = F.multi_head_attention_forward
    given: dict[str, Any] = {"training": False, "need_weights": False, "is_causal": False}
    args = [x, x, x, 8, 2, *weights, torch.randn(8)]
    if name == "add_zero_attn":
        args[9] = flag
    else:
        given[name] = flag
    node = graph.call_function(function, tuple(args), given)
    with pytest.raises(Closed, match=f"{name} is computed by the graph"):
        _multi_head(node, cast("Inserter", None))  # before anything is inserted


# -- nothing to attend to ----------------------------------------------------------------------------


class Owner(torch.nn.Module):
    """Reports are kept for modules by their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))


class Empty(Owner):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.arange(q.shape[2])[:, None] >= torch.arange(k.shape[2])
        return F.scaled_dot_product_attention(q * self.weight, k, v, attn_mask=seen)


@pytest.mark.parametrize(("batch", "rows", "keys"), [(2, 6, 0), (2, 0, 6), (0, 6, 6), (2, 0, 0)])
def test_empty_tensors_are_called_empty(batch: int, rows: int, keys: int) -> None:
    torch.compiler.reset()
    q = torch.randn(batch, 2, rows, 8)
    k, v = torch.randn(2, batch, 2, keys, 8)
    model = Empty()
    expected = model(q, k, v)
    compiled = torch.compile(model, backend="minference", options=OPTIONS, dynamic=False)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(q, k, v), expected, equal_nan=True)
    [site] = report_of(model).sites
    assert "every key" not in site.mask
    assert f"nothing to attend to: {batch} batch entries, {rows} rows and {keys} keys" in site.mask


# -- strides that views rely on ----------------------------------------------------------------------


def symbolic(*sizes: int) -> Tensor:
    """A fake tensor whose batch and length (dimensions 0 and 1) are symbols."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    kinds = [DimDynamic.DYNAMIC] * 2 + [DimDynamic.STATIC] * (len(sizes) - 2)
    context = StatelessSymbolicContext(dynamic_sizes=kinds)
    source = ConstantSource("x")
    return mode.from_tensor(torch.empty(sizes), symbolic_context=context, source=source)


def test_the_order_of_dimensions_is_read_off_symbolic_strides() -> None:
    made = symbolic(2, 6, 4, 8)
    assert _order_of(made) == [0, 1, 2, 3]
    assert _order_of(made.transpose(1, 2)) == [0, 2, 1, 3]
    assert _order_of(made.permute(2, 0, 3, 1)) == [1, 3, 0, 2]
    assert _order_of(torch.empty(2, 6, 4, 8).transpose(1, 2)) == [0, 2, 1, 3]
    assert _order_of(torch.empty(2, 6, 1, 8).transpose(1, 2)) in ([0, 1, 2, 3], [0, 2, 1, 3])


def test_symbolic_strides_with_gaps_are_declined_where_a_view_relies_on_them() -> None:
    made = symbolic(2, 6, 4, 8)[..., :5].transpose(1, 2)
    assert _order_of(made) is None
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["example_value"] = made
    _check_strides(node)  # nobody views it
    graph.call_method("view", (node, -1))
    with pytest.raises(_StridesUnknown, match="x has strides"):
        _check_strides(node)


class Viewed(Owner):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            (x * self.weight).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).view(q.shape[0], q.shape[2], -1)


def test_a_view_of_the_output_holds_for_every_length() -> None:
    torch.compiler.reset()
    model = Viewed()
    compiled = torch.compile(model, backend="minference", options=OPTIONS, dynamic=True)
    for length in (24, 40):
        q, k, v = torch.randn(3, 2, 4, length, 16)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(q, k, v), model(q, k, v), rtol=0, atol=2e-5)
    assert report_of(model).sites[0].decision == "rewritten"


# -- casts, constants, parameters --------------------------------------------------------------------


def test_a_copy_on_another_device_is_no_view() -> None:
    graph = fx.Graph()
    source = graph.placeholder("x")
    source.meta["example_value"] = torch.empty(2, 3)
    node = graph.call_method("to", (source, "meta"))
    node.meta["example_value"] = torch.empty(2, 3, device="meta")
    tensors = SymbolicTensors(graph)
    index = (tensors.new_index("a", 2), tensors.new_index("b", 3))
    assert step_back(tensors, node, index) is None
    node.meta["example_value"] = torch.empty(2, 3)
    assert step_back(SymbolicTensors(graph), node, index) == (source, index)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_hides(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    assert hides(lowest, 1.0, dtype) and hides(lowest, 2.0, dtype)
    assert hides(float("-inf"), 0.5, dtype) and not hides(float("-inf"), 0.0, dtype)
    assert not hides(float("-inf"), -1.0, dtype) and not hides(float("nan"), 1.0, dtype)
    assert not hides(-1e4, 1.0, dtype)
    # What a factor lowers further in a wider dtype is no lowest number any more.
    assert hides(lowest, 0.5, dtype) == (lowest * 0.5 <= -1e30)
    assert not hides(-4e4, 2.0, dtype)


def test_whose_a_tensor_is() -> None:
    graph = fx.Graph()
    given, weight = graph.placeholder("x"), graph.placeholder("w")
    given.meta["example_value"] = torch.empty(2)
    weight.meta["val"] = torch.nn.Parameter(torch.empty(2))
    attribute = graph.create_node("get_attr", "buffer")
    for node, expected in ((given, False), (weight, True), (attribute, True)):
        assert is_parameter(node) == is_of_module(node) == expected
