"""Masks that one graph returns and another is given, where the model breaks into several graphs.

A graph that only receives its mask can prove nothing about it. What the first graph proved therefore
travels with the mask: ``return_masks`` finds the outputs of a graph that are masks and has the graph
return their key padding and row bounds too; ``assume_masks`` tells the next graph what such an input
is. The assumption is no part of the graph's guards: whoever calls that graph has to check it
(`sparse_compiler.mask_tags`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.ir.mask import Band, MaskFact, Proved
from sparse_compiler.passes.context import PassContext
from sparse_compiler.passes.emit_mask import emit_bounds, emit_padding
from sparse_compiler.passes.form import AttentionForm, Axes, Element, MaskTerm
from sparse_compiler.passes.grid import Place, call
from sparse_compiler.passes.prove_mask import MaskProver
from sparse_compiler.passes.sizes import SizeMissing, size_node
from sparse_compiler.passes.symbolic_reader import GIVEN, Index, SymbolicReader
from sparse_compiler.passes.symbolic_tensor import (
    Mutated,
    NotUnderstood,
    SymbolicTensors,
    tensor_of,
)
from sparse_compiler.passes.symbolic_values import Choice, Value, as_bool, conj, is_bool

__all__ = [
    "Given",
    "GivenMask",
    "GivenPositions",
    "Returned",
    "ReturnedMask",
    "ReturnedPositions",
    "assume_masks",
    "is_mask_input",
    "may_be_mask",
    "rests_on_given",
    "return_masks",
]

_ZERO, _ONE = sympy.Integer(0), sympy.Integer(1)
# Nodes that are looked at on the way back from a mask to the inputs; enough for any real mask.
_FURTHEST = 2000


@dataclass(frozen=True)
class GivenMask:
    """What a mask [B|1, 1, Lq, Lk] says: all of it but the tensors; equal ones can be exchanged.

    Args:
        q_offset, left, right: the band, see `ir.mask.Band`.
        padded: visible keys are bounded by ``key_mask`` bool [B|1, Lk], B as that of the mask.
        bounded: visible keys are bounded by ``bounds`` int32 [B|1, Lq, 2], first and last key.
        hidden: what an additive mask holds where a key is hidden (0 elsewhere); None for bool.
        exact: whether it holds just that. Otherwise something at least as low.
    """

    q_offset: int
    left: int | None
    right: int | None
    padded: bool = False
    bounded: bool = False
    hidden: float | None = None
    exact: bool = True


@dataclass(frozen=True)
class GivenPositions:
    """A tensor that counts up from ``first``, from which another graph may make a mask."""

    first: int
    padded: bool = False
    bounded: bool = False


@dataclass(frozen=True)
class ReturnedPositions:
    """An output of a graph that counts up from ``first``; see `ReturnedMask`."""

    position: int
    first: int
    key_mask: None = None
    bounds: None = None

    def given(self, shape: Iterable[int]) -> GivenPositions:
        return GivenPositions(self.first)


@dataclass(frozen=True)
class ReturnedMask:
    """An output of a graph that is a mask.

    Args:
        position: among the outputs.
        key_mask, bounds: positions among the outputs of what the mask needs beside its band.
        band: sides may be expressions over ``shape``.
        shape: of the mask: ints and symbols.
        hidden, exact: as for `GivenMask`.
    """

    position: int
    key_mask: int | None
    bounds: int | None
    band: Band
    shape: tuple[Any, ...]
    hidden: float | None
    exact: bool

    def given(self, shape: Iterable[int]) -> GivenMask | None:
        """What a mask of this shape says; None where a side of the band is no int."""
        sizes = dict(zip(self.shape, shape, strict=True))
        sides: list[Any] = []
        for side in (self.band.q_offset, self.band.left, self.band.right):
            if isinstance(side, sympy.Expr):
                side = side.subs({s: n for s, n in sizes.items() if isinstance(s, sympy.Symbol)})
                if not isinstance(side, sympy.Integer):
                    return None
            sides.append(None if side is None else int(side))
        return GivenMask(
            *sides,
            padded=self.key_mask is not None,
            bounded=self.bounds is not None,
            hidden=self.hidden,
            exact=self.exact,
        )


Given = GivenMask | GivenPositions
Returned = ReturnedMask | ReturnedPositions


@dataclass(frozen=True)
class _Assumed:
    """On the node of a mask: what it says, and the names of the placeholders that it needs."""

    given: GivenMask | GivenPositions
    key_mask: str
    bounds: str

    def element(self, reader: SymbolicReader, node: fx.Node, index: Index) -> Value:
        """The mask's element, as `passes.symbolic_reader` reads it."""
        given = self.given
        if isinstance(given, GivenPositions):
            return index[0] + given.first
        batch, query, key = index[0], index[-2], index[-1]
        row = query + given.q_offset
        parts: list[Any] = []
        if given.left is not None:
            parts.append(sympy.Ge(key, row - given.left, evaluate=False))
        if given.right is not None:
            parts.append(sympy.Le(key, row + given.right, evaluate=False))
        if given.padded:
            mask = reader.evaluate(_named(node, self.key_mask), (batch, key))
            parts.append(as_bool(mask))
        if given.bounded:
            bounds = _named(node, self.bounds)
            low, high = (reader.evaluate(bounds, (batch, query, n)) for n in (_ZERO, _ONE))
            parts.append(sympy.Le(low, key, evaluate=False))  # type: ignore[arg-type]
            parts.append(sympy.Le(key, high, evaluate=False))  # type: ignore[arg-type]
        visible = conj(*parts)
        return visible if given.hidden is None else Choice(visible, 0.0, given.hidden, given.exact)


def may_be_mask(value: Any) -> bool:
    """Whether a tensor may be a mask for all heads: [B, 1, Lq, Lk], or bool [B, Lq, Lk]."""
    if not isinstance(value, torch.Tensor) or value.requires_grad:
        return False
    if value.dim() != 4:
        return value.dim() == 3 and value.dtype == torch.bool
    one = value.shape[1]
    known = isinstance(one, int) and one == 1
    return known and (value.dtype == torch.bool or value.dtype.is_floating_point)


def may_be_positions(value: Any) -> bool:
    """Whether a tensor has the shape and dtype of a list of positions."""
    return isinstance(value, torch.Tensor) and value.dim() == 1 and value.dtype == torch.int64


def assume_masks(gm: fx.GraphModule, masks: Mapping[int, Given]) -> list[fx.Node]:
    """Have the graph take inputs for what they are said to be.

    Args:
        gm: edited in place: placeholders for the masks' tensors follow its own.
        masks: position of a placeholder -> what it says.
    Returns:
        The new placeholders: for each mask in order its key mask, its bounds, where it needs them.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    added: list[fx.Node] = []
    for position, given in masks.items():
        node = placeholders[position]
        value = tensor_of(node)
        assert value is not None
        if isinstance(given, GivenPositions):
            node.meta[GIVEN] = _Assumed(given, "", "")
            continue
        batch, num_q, num_k = value.shape[0], *value.shape[-2:]
        names = ["", ""]
        wanted = (
            (given.padded, "key_mask", (batch, num_k), torch.bool),
            (given.bounded, "bounds", (batch, num_q, 2), torch.int32),
        )
        for at, (needed, name, shape, dtype) in enumerate(wanted):
            if needed:
                last = (added or placeholders)[-1]
                new = _add_placeholder(gm.graph, last, f"{node.name}_{name}", node)
                new.meta["example_value"] = _empty(value, shape, dtype)
                names[at] = new.name
                added.append(new)
        node.meta[GIVEN] = _Assumed(given, *names)
    gm.recompile()
    return added


def rests_on_given(nodes: Iterable[fx.Node]) -> bool:
    """Whether one of the nodes is computed from an input that ``assume_masks`` told about."""
    return any(GIVEN in node.meta for node in _producers(nodes))


def is_mask_input(form: AttentionForm, tensors: SymbolicTensors) -> bool:
    """Whether a mask was not read because a graph's input is all that is known about it.

    True if what could not be read leads back to inputs only, and one of them has a row for each query
    and a column for each key.
    """
    unread = [n for n in _producers(t.where.node for t in form.terms) if n in tensors.reasons]
    first = [
        n for n in unread if not any(p in tensors.reasons for p in _producers([n]) if p is not n)
    ]
    pairs = any(_ends_in(tensors, n, form.axes.sizes[2:4]) for n in first)
    return pairs and all(n.op == "placeholder" for n in first)


def return_masks(gm: fx.GraphModule, ctx: PassContext) -> list[Returned]:
    """Find the outputs that are masks, and return what they need after the graph's own outputs.

    Args:
        gm: edited in place, after all other passes.
        ctx: of the same graph.
    Returns:
        One for each such output. An output that cannot be proved is left alone.
    """
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    outputs = output.args[0]
    if not isinstance(outputs, tuple | list):
        return []
    values = [tensor_of(n) for n in outputs if isinstance(n, fx.Node)]
    if not any(may_be_mask(value) or may_be_positions(value) for value in values):
        return []
    tensors = SymbolicTensors(gm.graph)
    finder = _Finder(gm, tensors, MaskProver(tensors), output)
    found = [finder.find(at, node) for at, node in enumerate(outputs) if isinstance(node, fx.Node)]
    if finder.added:
        output.args = ((*outputs, *finder.added),)
        gm.graph.lint()
        gm.recompile()
        ctx.edited()
    return [mask for mask in found if mask is not None]


class _Finder:
    """Proves outputs of one graph."""

    def __init__(
        self, gm: fx.GraphModule, tensors: SymbolicTensors, prover: MaskProver, output: fx.Node
    ) -> None:
        self.gm, self.tensors, self.prover, self.output = gm, tensors, prover, output
        self.first = len(output.args[0])  # type: ignore[arg-type]
        self.added: list[fx.Node] = []

    def find(self, position: int, node: fx.Node) -> Returned | None:
        value = tensor_of(node)
        if value is None or not (may_be_mask(value) or may_be_positions(value)):
            return None
        try:
            # What is returned is what the memory holds at the end.
            with self.tensors.reading(self.output, None):
                if value.dim() == 1:
                    return self._positions(position, node)
                return self._find(position, node, value)
        except (Mutated, NotUnderstood, SizeMissing):
            return None

    def _positions(self, position: int, node: fx.Node) -> ReturnedPositions | None:
        index = self.tensors.new_index("i", self.tensors.shape(node)[0])
        value = self.tensors.evaluate(node, (index,))
        first = value - index if isinstance(value, sympy.Expr) else None
        return ReturnedPositions(position, int(first)) if isinstance(first, sympy.Integer) else None

    def _find(self, position: int, node: fx.Node, value: torch.Tensor) -> ReturnedMask | None:
        shape = self.tensors.shape(node)
        if not all(isinstance(n, sympy.Integer | sympy.Symbol) for n in shape):
            return None
        full = (shape[0], _ONE, *shape[-2:])
        symbols = [self.tensors.new_index(s, n) for s, n in zip("bhqk", full, strict=True)]
        unused = [sympy.Dummy(s, integer=True) for s in "dv"]
        axes = Axes(*symbols, *unused, sizes=(*full, _ONE, _ONE))
        if len(shape) == 3:
            del symbols[1]
        hidden = self._hidden(node, tuple(symbols))
        kind = "keep" if value.dtype == torch.bool else "add"
        proof = self.prover.prove_form(axes, (MaskTerm(kind, Element(node, tuple(symbols))),))
        if not isinstance(proof, Proved):
            return None
        fact, band = proof.fact, proof.fact.band
        sides = [s for s in (band.q_offset, band.left, band.right) if isinstance(s, sympy.Expr)]
        told = set().union(*(s.free_symbols for s in sides)) <= set(shape)
        if fact.bias or fact.row_shift or fact.offset_is_read or not told:
            return None
        key_mask, bounds = self._operands(axes, fact, value)
        return ReturnedMask(position, key_mask, bounds, band, shape, *hidden)

    def _hidden(self, node: fx.Node, index: Index) -> tuple[float | None, bool]:
        """What the mask holds at hidden keys, and whether it is always just that."""
        value = self.tensors.evaluate(node, index)
        if is_bool(value):
            return None, True
        if isinstance(value, float | sympy.Integer) and float(value) == 0:
            return float("-inf"), True
        if isinstance(value, Choice) and 0 in (value.yes, value.no):
            return float(value.yes or value.no), value.exact
        raise NotUnderstood("neither a bool nor a choice of 0 and something else")

    def _operands(
        self, axes: Axes, fact: MaskFact, value: torch.Tensor
    ) -> tuple[int | None, int | None]:
        """Positions of the new outputs; sizes are those of the mask, not ones that broadcast."""
        graph, before = self.gm.graph, set(self.gm.graph.nodes)
        positions: list[int | None] = []
        added: list[fx.Node] = []
        try:
            with graph.inserting_before(self.output):
                place = Place(graph, self.tensors, axes, self._size, value.device)
                for emitter in (emit_padding, emit_bounds):
                    node = emitter(place, fact)
                    if node is not None:
                        rest = [-1] * (1 if emitter is emit_padding else 2)
                        node = call(graph, "expand", node, self._size(axes.sizes[0]), *rest)
                        added.append(call(graph, "contiguous", node))
                    taken = self.first + len(self.added) + len(added)
                    positions.append(None if node is None else taken - 1)
        except (NotUnderstood, SizeMissing):
            for node in reversed(list(graph.nodes)):
                if node not in before:
                    graph.erase_node(node)
            raise
        self.added += added
        return positions[0], positions[1]

    def _size(self, expr: Any) -> Any:
        return size_node(self.gm.graph, expr)


def _producers(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes and what they are computed from."""
    found = dict.fromkeys(nodes)
    queue = list(found)
    while queue and len(found) < _FURTHEST:
        new = [n for n in queue.pop().all_input_nodes if n not in found]
        found.update(dict.fromkeys(new))
        queue += new
    return list(found)


def _named(node: fx.Node, name: str) -> fx.Node:
    return next(n for n in node.graph.nodes if n.name == name)


def _ends_in(tensors: SymbolicTensors, node: fx.Node, sizes: tuple[Any, ...]) -> bool:
    if tensor_of(node) is None:
        return False
    return tensors.shape(node)[-len(sizes) :] == sizes and 1 not in sizes


def _add_placeholder(graph: fx.Graph, last: fx.Node, name: str, mask: fx.Node) -> fx.Node:
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    if hasattr(mask, "_dynamo_source"):
        # AOTAutograd asks every input where it came from; this one is none of the user's.
        node._dynamo_source = None  # type: ignore[attr-defined]
    return node


def _empty(like: torch.Tensor, shape: tuple[Any, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in the fake mode of ``like``."""
    mode = getattr(like, "fake_mode", None)
    if mode is None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    with mode:
        return torch.empty(shape, dtype=dtype, device=like.device)
