"""Repeated K/V heads are seen through; tilings and other mixtures are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparse_compiler.passes.repeat_kv import see_through_repeat
from sparse_compiler.passes.symbolic_tensor import tensor_of

HEADS = 4


def transformers_style(k):
    batch, heads, length, size = k.shape
    wide = k[:, :, None, :, :].expand(batch, heads, HEADS // heads, length, size)
    return wide.reshape(batch, heads * (HEADS // heads), length, size)


def interleaved(k):
    return k.repeat_interleave(HEADS // k.shape[1], dim=1)


def unsqueezed(k):
    wide = k.unsqueeze(2).repeat(1, 1, HEADS // k.shape[1], 1, 1)
    return wide.flatten(1, 2).contiguous()


def transposed_first(k):
    wide = k.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, HEADS // k.shape[1], -1)
    return wide.reshape(k.shape[0], k.shape[2], HEADS, k.shape[3]).transpose(1, 2)


def tiled(k):
    return k.repeat(1, HEADS // k.shape[1], 1, 1)


def reversed_heads(k):
    return transformers_style(k).flip(1)


def mixed_tokens(k):
    return transformers_style(k).flip(2)


def other_dtype(k):
    return transformers_style(k).to(torch.float64)


def mutated(k):
    base = k + 1
    wide = transformers_style(base)
    base.add_(1)
    return wide


REPEATS = [transformers_style, interleaved, unsqueezed, transposed_first]
OTHERS = [reversed_heads, mixed_tokens, other_dtype, mutated]


def seen(function, kv_heads, dynamic=False, lengths=(6,)):
    """What is seen through in the graph of `function`, checked against the real values."""
    torch._dynamo.reset()
    answers = []

    def backend(gm, examples):
        site = next(n for n in gm.graph.nodes if "scaled_dot" in str(n.target))
        key = site.args[1]
        base, groups = see_through_repeat(key)
        answers.append((base, groups))

        def run(*args):
            interpreter = fx.Interpreter(gm, garbage_collect_values=False)
            out = interpreter.run(*args)
            small, wide = interpreter.env[base], interpreter.env[key]
            assert torch.equal(small.repeat_interleave(groups, dim=1), wide)
            return out

        return run

    def program(k):
        wide = function(k * 2)
        return F.scaled_dot_product_attention(wide, wide, wide)

    compiled = torch.compile(program, backend=backend, fullgraph=True, dynamic=dynamic)
    for length in lengths:
        k = torch.randn(3, kv_heads, length, 8)
        if dynamic:
            torch._dynamo.mark_static(k, 1)
        compiled(k)
    base, groups = answers[-1]
    value = tensor_of(base)
    assert value is not None
    return value.shape[1], groups


@pytest.mark.parametrize("function", REPEATS)
def test_repeats_are_seen_through(function):
    assert seen(function, 2) == (2, 2)
    assert seen(function, 1) == (1, 4)


def test_sizes_may_be_symbolic():
    assert seen(transformers_style, 2, dynamic=True, lengths=(6, 9)) == (2, 2)


def test_tiling_is_not_a_repeat_unless_there_is_one_head():
    assert seen(tiled, 2) == (4, 1)
    assert seen(tiled, 1) == (1, 4)


def static_cache(k):
    cache = torch.zeros(k.shape[0], k.shape[1], 9, k.shape[3])
    cache.index_copy_(2, torch.arange(k.shape[2]), k)
    return transformers_style(cache)


def test_a_cache_written_before_it_is_read_is_seen_through():
    assert seen(static_cache, 2) == (2, 2)


@pytest.mark.parametrize("function", OTHERS)
def test_other_mixtures_stay(function):
    assert seen(function, 2) == (4, 1)


def test_nothing_repeated():
    assert seen(lambda k: k.contiguous(), 4) == (4, 1)
