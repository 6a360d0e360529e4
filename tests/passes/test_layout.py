"""Repeated K/V heads are seen through; tilings and other mixtures are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparse_compiler.passes.form import Element
from sparse_compiler.passes.layout import Wanted, layout
from sparse_compiler.passes.symbolic_tensor import SymbolicTensors

HEADS = 4
Function = Callable[[Tensor], Tensor]


def transformers_style(k: Tensor) -> Tensor:
    batch, heads, length, size = k.shape
    wide = k[:, :, None, :, :].expand(batch, heads, HEADS // heads, length, size)
    return wide.reshape(batch, heads * (HEADS // heads), length, size)


def interleaved(k: Tensor) -> Tensor:
    return k.repeat_interleave(HEADS // k.shape[1], dim=1)


def unsqueezed(k: Tensor) -> Tensor:
    wide = k.unsqueeze(2).repeat(1, 1, HEADS // k.shape[1], 1, 1)
    return wide.flatten(1, 2).contiguous()


def transposed_first(k: Tensor) -> Tensor:
    wide = k.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, HEADS // k.shape[1], -1)
    return wide.reshape(k.shape[0], k.shape[2], HEADS, k.shape[3]).transpose(1, 2)


def tiled(k: Tensor) -> Tensor:
    return k.repeat(1, HEADS // k.shape[1], 1, 1)


def reversed_heads(k: Tensor) -> Tensor:
    return transformers_style(k).flip(1)


def mixed_tokens(k: Tensor) -> Tensor:
    return transformers_style(k).flip(2)


def other_dtype(k: Tensor) -> Tensor:
    return transformers_style(k).to(torch.float64)


def mutated(k: Tensor) -> Tensor:
    base = k + 1
    wide = transformers_style(base)
    base.add_(1)
    return wide


def static_cache(k: Tensor) -> Tensor:
    cache = torch.zeros(k.shape[0], k.shape[1], 9, k.shape[3])
    cache.index_copy_(2, torch.arange(k.shape[2]), k)
    return transformers_style(cache)


REPEATS = [transformers_style, interleaved, unsqueezed, transposed_first]
OTHERS = [reversed_heads, mixed_tokens, other_dtype, mutated]


def operand_of(gm: fx.GraphModule) -> tuple[fx.Node, Any, int]:
    """(the key of the attention, the operand that ``layout`` finds for it, its head groups)."""
    site = next(n for n in gm.graph.nodes if "scaled_dot" in str(n.target))
    key = site.args[1]
    tensors = SymbolicTensors(gm.graph)
    sizes = tensors.shape(key)
    symbols = tuple(tensors.new_index(n, s) for n, s in zip("bhkd", sizes, strict=True))
    index: tuple[sympy.Expr, ...] = symbols
    wanted = Wanted(symbols, sizes, head=1, shared=True)
    found = layout(Element(key, index), wanted, tensors, site, site)
    assert found is not None
    return key, *found


def seen(
    function: Function, kv_heads: int, dynamic: bool = False, lengths: Sequence[int] = (6,)
) -> tuple[int, int]:
    """(heads of the operand, groups) in the graph of ``function``, checked against real values."""
    torch.compiler.reset()
    answers: list[tuple[int, int]] = []

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        key, operand, groups = operand_of(gm)
        answers.append((int(operand.shape[1]), groups))

        def run(*args: Any) -> Any:
            interpreter = fx.Interpreter(gm, garbage_collect_values=False)
            out = interpreter.run(*args)
            small, wide = interpreter.env[operand.node], interpreter.env[key]
            for method, arguments in operand.steps:
                small = getattr(small, method)(*arguments)
            assert torch.equal(small.repeat_interleave(groups, dim=1), wide)
            return out

        return run

    def program(k: Tensor) -> Tensor:
        wide = function(k * 2)
        return F.scaled_dot_product_attention(wide, wide, wide)

    compiled = torch.compile(program, backend=backend, fullgraph=True, dynamic=dynamic)
    for length in lengths:
        k = torch.randn(3, kv_heads, length, 8)
        if dynamic:
            torch._dynamo.mark_static(k, 1)
        compiled(k)
    assert len(answers) == 1
    return answers[-1]


@pytest.mark.parametrize("function", REPEATS)
def test_repeats_are_seen_through(function: Function) -> None:
    assert seen(function, 2) == (2, 2)
    assert seen(function, 1) == (1, 4)


@pytest.mark.parametrize("function", REPEATS)
def test_sizes_may_be_symbolic(function: Function) -> None:
    assert seen(function, 2, dynamic=True, lengths=(6, 9)) == (2, 2)


def test_tiling_is_not_a_repeat_unless_there_is_one_head() -> None:
    assert seen(tiled, 2) == (4, 1)
    assert seen(tiled, 1) == (1, 4)


def test_a_cache_written_before_it_is_read_is_seen_through() -> None:
    assert seen(static_cache, 2) == (2, 2)


@pytest.mark.parametrize("function", OTHERS)
def test_other_mixtures_stay(function: Function) -> None:
    assert seen(function, 2) == (4, 1)


def test_nothing_repeated() -> None:
    assert seen(lambda k: k.contiguous(), 4) == (4, 1)
