"""What the reader read, computed again by nodes of the graph."""

from __future__ import annotations

import random

import pytest
import torch
from mask_grammar import Grammar, compiled, inputs
from mask_programs import Recorded, _run

from sparse_compiler.passes.grid import emit, emit_element
from sparse_compiler.passes.symbolic_tensor import Mutated


def recorded(program):
    return Recorded(lambda *given: [("keep", program(*given))], inputs(2, 6, 6))


@pytest.mark.parametrize("seed", range(40))
def test_what_is_emitted_is_what_was_read(seed):
    text = Grammar(random.Random(seed), square=True).mask(3)
    found = recorded(compiled(text))
    (term,) = found.terms
    try:
        value = found.tensors.evaluate(term.where.node, term.where.index)
    except Mutated:
        pytest.skip("not read at all")
    node = emit(
        found.graph, found.tensors, value, found.axes.pairs, found.size_of, torch.device("cpu")
    )
    for draw in range(3):
        given = inputs(2, 6, 6, seed=draw)
        env = _run(found.graph, list(given), {})
        shape = (2, 4, 6, 6)
        assert torch.equal(env[node].expand(shape), env[term.where.node].expand(shape))


def test_reads_that_name_each_element_once_are_views():
    found = recorded(lambda q, k, pad, *_: pad.bool()[:, None, None, :])
    node = next(n for n in found.graph.nodes if n.name == "x2")
    batch, _, _, key = found.axes.pairs
    args = (found.graph, found.tensors, node)
    for index, axes in (
        ((batch[0], key[0]), (batch, key)),
        ((batch[0], key[0]), (key, batch)),
        ((batch[0] * 0 + 1, key[0]), (key,)),
        ((batch[0], key[0]), found.axes.pairs),
    ):
        seen = emit_element(*args, index, axes, found.size_of)
        assert seen.meta["example_value"].untyped_storage()._cdata == (
            node.meta["example_value"].untyped_storage()._cdata
        )


def test_a_number_is_read_before_it_is_written():
    def program(q, k, pad, ids, off, _):
        mask = torch.arange(6)[None, :] <= torch.arange(6)[:, None] + off
        off.add_(100)
        return mask

    found = recorded(program)
    names = [n.name for n in found.graph.nodes]
    copies = [n for n in found.graph.nodes if n.target == "clone"]
    assert copies
    assert all(names.index(c.name) < names.index("add_") for c in copies)
