"""Proves what the masks and biases of an attention mean.

Every term is read as a predicate over (batch, head, query, key) and as something added to the
logits. The predicate falls into parts that look at the key alone, which are the key padding, and
parts in which nothing but the key's place says anything about the key: those are decided over the
integers for all sizes by isl, as a band around the diagonal or as an interval of keys for each row.
Anything else is Unknown, which keeps the site dense.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from sparse_compiler.ir.mask import Band, MaskFact, MaskProof, Proved, Refuted, Unknown
from sparse_compiler.passes.additive import Effect, read_term
from sparse_compiler.passes.band import NotABand, find_band
from sparse_compiler.passes.bias import classify
from sparse_compiler.passes.form import Axes, Element, MaskTerm
from sparse_compiler.passes.interval import NoInterval, find_interval
from sparse_compiler.passes.presburger import Decider, Domain, Undecidable
from sparse_compiler.passes.segments import segments_as_intervals
from sparse_compiler.passes.symbolic_tensor import (
    Mutated,
    NotUnderstood,
    SymbolicTensors,
    tensor_of,
)
from sparse_compiler.passes.symbolic_values import (
    Choice,
    as_bool,
    common_factors,
    conj,
    conjuncts,
    rewrite,
)

__all__ = ["MaskProver", "prove_mask"]

logger = logging.getLogger(__name__)


def prove_mask(mask: fx.Node, query_shape: Sequence[Any], key_shape: Sequence[Any]) -> MaskProof:
    """What `mask` means for queries and keys of these shapes; see `MaskProver.prove`."""
    return MaskProver(SymbolicTensors(mask.graph)).prove(mask, query_shape, key_shape)


class MaskProver:
    """Proves masks of one graph and remembers the answers: layers share their mask.

    Args:
        tensors: the reader of the graph, or the graph. Make new ones after changing the graph.

    Attributes:
        tensors: the reader underneath; other passes over the same graph may share it.
    """

    def __init__(self, tensors: SymbolicTensors | fx.Graph) -> None:
        if isinstance(tensors, fx.Graph):
            tensors = SymbolicTensors(tensors)
        self.tensors = tensors
        self._proofs: dict[Any, MaskProof] = {}

    def prove_form(
        self, axes: Axes, terms: tuple[MaskTerm, ...], is_causal: bool = False
    ) -> MaskProof:
        """What the terms of an attention mean together.

        Args:
            axes: index symbols made by `tensors.new_index`, and sizes.
            terms: masks and biases, their elements written over `axes`.
            is_causal: row i sees keys j <= i, beside the terms.
        Returns:
            Proved (equal for every size the graph allows), Refuted (understood, and something
            else) or Unknown (not understood; the reason names node and operation).
        """
        key = (axes, terms, is_causal)
        if key not in self._proofs:
            self._proofs[key] = _Proof(self.tensors, axes, terms, is_causal).result()
        return self._proofs[key]

    def prove(
        self, mask: fx.Node, query_shape: Sequence[Any], key_shape: Sequence[Any]
    ) -> MaskProof:
        """What `mask` alone means, if that is a band and one padding node.

        Args:
            mask: bool (True is visible) or additive float (0 or the dtype's minimum or -inf)
                tensor of rank 2 to 4 that broadcasts to [B, Hq, Lq, Lk].
            query_shape: [B, Hq, Lq, D] of ints and SymInts.  key_shape: [B, Hkv, Lk, D].
        Returns:
            As `prove_form`; ``key_padding`` is the name of a node [B, Lk].
        """
        try:
            sizes = tuple(self.tensors.size(s) for s in (*query_shape[:3], key_shape[2]))
            known = (mask, sizes)
            if known not in self._proofs:
                self._proofs[known] = self._prove_alone(mask, sizes)
            return self._proofs[known]
        except NotUnderstood as reason:
            return Unknown(f"{mask.name}: {reason}")

    def _prove_alone(self, mask: fx.Node, sizes: tuple[sympy.Expr, ...]) -> MaskProof:
        value = tensor_of(mask)
        if value is None or not 2 <= value.dim() <= 4:
            raise NotUnderstood("not a tensor of rank 2 to 4")
        shape = self.tensors.shape(mask)
        for size, wanted in zip(shape, sizes[4 - len(shape) :], strict=True):
            if size not in (1, wanted):
                raise NotUnderstood(f"its size {size} is not seen to be 1 or {wanted}")
        symbols = [self.tensors.new_index(n, s) for n, s in zip("bhqk", sizes, strict=True)]
        unused = [sympy.Dummy(n, integer=True) for n in "dv"]
        axes = Axes(*symbols, *unused, (*sizes, sympy.Integer(1), sympy.Integer(1)))
        where = Element(mask, tuple(symbols[4 - len(shape) :]))
        kind = "keep" if value.dtype == torch.bool else "add"
        proof = self.prove_form(axes, (MaskTerm(kind, where),))
        if not isinstance(proof, Proved):
            return proof
        fact = proof.fact
        if fact.bounded or fact.bias or fact.offset_is_read:
            return Unknown(f"{mask.name}: {fact.describe()}")
        if fact.key_padding is None:
            return proof
        node = self._padding_node(mask, axes, fact.key_padding)
        if node is None:
            return Unknown(f"{mask.name}: no [B, Lk] padding node says this")
        is_bool = self.tensors.dtype(node) == torch.bool
        return Proved(MaskFact(fact.band, node.name, is_bool))

    def _padding_node(self, mask: fx.Node, axes: Axes, wanted: Any) -> fx.Node | None:
        """A node [B, Lk] that `mask` is made of and that says `wanted`, nearest first."""
        parts = set(conjuncts(wanted))
        queue, seen = [mask], set()
        for node in queue:
            if node in seen or tensor_of(node) is None:
                continue
            seen.add(node)
            queue += node.all_input_nodes
            shape = self.tensors.shape(node)
            fits = len(shape) == 2 and shape[0] in (1, axes.sizes[0]) and shape[1] == axes.sizes[3]
            if not fits or self.tensors.mutations.written(node):
                continue
            value: Any = self.tensors.evaluate(node, (axes.batch, axes.key))
            if isinstance(value, Choice) and not value.exact:
                continue
            if set(conjuncts(as_bool(value))) == parts:
                return node
        return None


class _Proof:
    """The terms of one attention."""

    def __init__(
        self, tensors: SymbolicTensors, axes: Axes, terms: tuple[MaskTerm, ...], is_causal: bool
    ) -> None:
        self.tensors, self.axes, self.terms, self.is_causal = tensors, axes, terms, is_causal
        self.name = ", ".join(f"{t.where.node.name} ({t.where.node.target})" for t in terms)
        self.rows = (axes.query, axes.sizes[2])
        self.keys = (axes.key, axes.sizes[3])

    def result(self) -> MaskProof:
        try:
            effect = Effect()
            for term in self.terms:
                effect = effect.join(read_term(self.tensors, self.axes, term))
            if self.is_causal:
                effect.visible.append(sympy.Le(self.axes.key, self.axes.query, evaluate=False))
            bias, shifts = classify(self.tensors, self.axes, effect.bias)
            proof = self._visibility(conj(*effect.visible))
            if not isinstance(proof, MaskFact):
                return proof
            fact = MaskFact(
                proof.band,
                proof.key_padding,
                True,
                proof.low,
                proof.high,
                bias,
                shifts or effect.shifts,
            )
            return Proved(fact)
        except (NotUnderstood, Mutated) as reason:
            return Unknown(f"{self.name}: {reason}")
        except Undecidable as reason:
            return Unknown(f"{self.name}: cannot be decided: {reason}")

    def _visibility(self, pred: Any) -> MaskFact | MaskProof:
        """The fact, without bias, that says the same as `pred`."""
        pred = segments_as_intervals(self.tensors, self.axes, pred)
        padding, placed = [], []
        for part in conjuncts(common_factors(pred)):
            kind = self._kind(part)
            if kind == "padding":
                padding.append(part)
            elif kind == "placed":
                placed.append(part)
            elif kind:
                return Unknown(f"{self.name}: {kind}")
        joined = conj(*padding) if padding else None
        return self._placed(conj(*placed), joined)

    def _kind(self, part: Any) -> str:
        """``padding``, ``placed`` (only the key's place counts), "" (always true) or a problem."""
        axes = self.axes
        free = part.free_symbols
        if axes.head in free:
            if not part.atoms(AppliedUndef) and self.tensors.certain(part):
                return ""
            return f"visibility differs between heads: {self._culprits(part)}"
        at_key = [r for r in _outer_reads(part) if axes.key in r.free_symbols]
        if not at_key:
            return "placed"
        if axes.query not in free:
            return "padding"
        return f"visibility depends on the row and on data at the key: {self._culprits(part)}"

    def _culprits(self, value: Any) -> str:
        nodes = sorted(self.tensors.read_nodes(value), key=lambda n: n.name)
        return "; ".join(self.tensors.reasons.get(n, n.name) for n in nodes) or str(value)

    def _placed(self, pred: Any, padding: Any) -> MaskFact | MaskProof:
        """The fact for a predicate that reads nothing at the key."""
        axes = self.axes
        reads = {r: sympy.Dummy(str(r), integer=True) for r in _outer_reads(pred)}
        pred = rewrite(pred, reads.get)
        facts = list(self._facts(reads))
        if axes.batch in pred.free_symbols:
            facts += [
                sympy.Ge(axes.batch, 0, evaluate=False),
                sympy.Lt(axes.batch, axes.sizes[0], evaluate=False),
            ]
        private = frozenset(
            s for r, s in reads.items() if r.free_symbols & {axes.batch, axes.query}
        ) | ({axes.batch} & pred.free_symbols)
        domain = Domain((self.rows, self.keys), self.tensors.size_bounds, tuple(facts))
        decider = Decider(domain)
        # Numbers that the graph computes may not take every value, so they never refute.
        decider.opaque |= set(reads.values()) & pred.free_symbols
        back = {symbol: read for read, symbol in reads.items()}
        if not private:
            band = find_band(decider, pred, self.rows, self.keys)
            if isinstance(band, Band) and not _reads_width(band, back):
                return MaskFact(_renamed(band, back), padding)
            if isinstance(band, NotABand) and band.reason == NotABand.EMPTY:
                return self._refused(band)
        visible = decider.set_of(pred)
        found = find_interval(decider, visible, self.rows, self.keys, private)
        if not isinstance(found, NoInterval) and _reads_width(found.band, back):
            found = find_interval(decider, visible, self.rows, self.keys, frozenset(back) | private)
        if isinstance(found, NoInterval):
            return self._refused(found)
        low, high = (e if e is None else rewrite(e, back.get) for e in (found.low, found.high))
        return MaskFact(_renamed(found.band, back), padding, True, low, high)

    def _facts(self, reads: dict[Any, sympy.Symbol]) -> Any:
        """What is known of segments: a row's own place lies in its segment."""
        for read, symbol in reads.items():
            segment = self.tensors.segments.get(read.func)
            if segment is None:
                continue
            place = read.args[-1]
            if segment[1] == "start":
                yield sympy.Ge(symbol, 0, evaluate=False)
                yield sympy.Le(symbol, place, evaluate=False)
            else:
                yield sympy.Ge(symbol, place, evaluate=False)
                yield sympy.Lt(symbol, self.keys[1], evaluate=False)

    def _refused(self, why: NotABand | NoInterval) -> MaskProof:
        text = f"{self.name}: {why.reason}"
        return Refuted(text, why.witness) if why.certain else Unknown(text)


def _outer_reads(value: Any) -> list[Any]:
    """The reads in a value that are not the index of another read."""
    if isinstance(value, AppliedUndef):
        return [value]
    return list(dict.fromkeys(r for arg in value.args for r in _outer_reads(arg)))


def _reads_width(band: Band, back: dict[sympy.Symbol, Any]) -> bool:
    """Whether a band's width, not just its place, is a number that only the run knows."""
    sides = (side for side in (band.left, band.right) if isinstance(side, sympy.Expr))
    return any(side.free_symbols & back.keys() for side in sides)


def _renamed(band: Band, back: dict[sympy.Symbol, Any]) -> Band:
    """The band with reads in the place of the symbols that stood for them."""
    sides = [band.q_offset, band.left, band.right]
    for n, side in enumerate(sides):
        if isinstance(side, sympy.Expr):
            sides[n] = rewrite(side, back.get)
    return Band(*sides)
