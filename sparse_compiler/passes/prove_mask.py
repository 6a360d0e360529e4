"""Proves what the masks and biases of an attention mean.

Every term is read as a predicate over (batch, head, query, key) and as something added to the
logits. The predicate falls into parts that look at the key alone, which are the key padding, and
parts in which nothing but the key's place says anything about the key: those are decided over the
integers for all sizes by isl, as a band around the diagonal or as an interval of keys for each row.
Anything else is Unknown, which keeps the site dense.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from torch import fx

from sparse_compiler.ir.mask import Band, MaskFact, MaskProof, Proved, Refuted, Unknown
from sparse_compiler.passes.additive import Effect, read_term, summands
from sparse_compiler.passes.band import NotABand, find_band
from sparse_compiler.passes.bias import classify
from sparse_compiler.passes.form import Axes, MaskTerm
from sparse_compiler.passes.interval import NoInterval, find_interval
from sparse_compiler.passes.predicates import common_factors, rewrite
from sparse_compiler.passes.presburger import Decider, Domain, Undecidable
from sparse_compiler.passes.segments import segments_as_intervals
from sparse_compiler.passes.symbolic_reader import described
from sparse_compiler.passes.symbolic_tensor import (
    Mutated,
    NotUnderstood,
    SymbolicTensors,
)
from sparse_compiler.passes.symbolic_values import (
    conj,
    conjuncts,
)

__all__ = ["MaskProver"]

logger = logging.getLogger(__name__)


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


class _Proof:
    """The terms of one attention."""

    def __init__(
        self, tensors: SymbolicTensors, axes: Axes, terms: tuple[MaskTerm, ...], is_causal: bool
    ) -> None:
        self.tensors, self.axes, self.terms, self.is_causal = tensors, axes, terms, is_causal
        self.name = ", ".join(described(t.where.node) for t in terms)
        self.rows = (axes.query, axes.sizes[2])
        self.keys = (axes.key, axes.sizes[3])

    def result(self) -> MaskProof:
        batch, _, num_q, num_k = self.axes.sizes[:4]
        if 0 in (batch, num_q, num_k):
            # Of no pairs every mask says the same: what this one hides is not the point.
            sizes = f"{batch} batch entries, {num_q} rows and {num_k} keys"
            return Refuted(
                f"{self.name or 'the attention'}: there is nothing to attend to: {sizes}"
            )
        try:
            effect = Effect()
            for term in self.terms:
                effect = effect.join(read_term(self.tensors, self.axes, term))
            if self.is_causal:
                effect.visible.append(sympy.Le(self.axes.key, self.axes.query, evaluate=False))
            split = partial(summands, self.tensors, self.axes)
            bias, shifts = classify(self.tensors, self.axes, effect.bias, split)
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

    def _facts(self, reads: Mapping[Any, sympy.Symbol]) -> Any:
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


def _reads_width(band: Band, back: Mapping[Any, Any]) -> bool:
    """Whether a band's width, not just its place, is a number that only the run knows."""
    sides = (side for side in (band.left, band.right) if isinstance(side, sympy.Expr))
    return any(side.free_symbols & back.keys() for side in sides)


def _renamed(band: Band, back: Mapping[Any, Any]) -> Band:
    """The band with reads in the place of the symbols that stood for them."""
    sides = [band.q_offset, band.left, band.right]
    for n, side in enumerate(sides):
        if isinstance(side, sympy.Expr):
            sides[n] = rewrite(side, back.get)
    return Band(*sides)
