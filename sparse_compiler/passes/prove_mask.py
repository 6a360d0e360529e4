"""Proves what an attention mask means: a band around the diagonal, met with key padding.

The mask node is read as a predicate over (batch, head, query, key) by `SymbolicTensors`. Its
conjuncts fall into linear ones over query and key, decided over the integers for all sizes by isl,
and one key padding tensor read at exactly (batch, key). Anything else is Unknown, which keeps the
site dense.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from sparse_compiler.ir.mask import Band, MaskFact, MaskProof, Proved, Refuted, Unknown
from sparse_compiler.passes.band import NotABand, find_band
from sparse_compiler.passes.presburger import Decider, Domain, Undecidable
from sparse_compiler.passes.symbolic_tensor import (
    Index,
    Mutated,
    NotUnderstood,
    SymbolicTensors,
    tensor_of,
)
from sparse_compiler.passes.symbolic_values import Choice, as_bool, conj, conjuncts, neg

__all__ = ["MaskProver", "prove_mask"]

logger = logging.getLogger(__name__)


def prove_mask(mask: fx.Node, query_shape: Sequence[Any], key_shape: Sequence[Any]) -> MaskProof:
    """What `mask` means for queries and keys of these shapes; see `MaskProver.prove`."""
    return MaskProver(mask.graph).prove(mask, query_shape, key_shape)


class MaskProver:
    """Proves masks of one graph and remembers the answers: layers share their mask.

    Args:
        graph: with fake values in `meta["example_value"]`. Make a new prover after changing it.

    Attributes:
        tensors: the reader underneath; other passes over the same graph may share it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.tensors = SymbolicTensors(graph)
        self._proofs: dict[Any, MaskProof] = {}

    def prove(
        self, mask: fx.Node, query_shape: Sequence[Any], key_shape: Sequence[Any]
    ) -> MaskProof:
        """What `mask` means.

        Args:
            mask: bool (True is visible) or additive float (0 or the dtype's minimum or -inf)
                tensor of rank 2 to 4 that broadcasts to [B, Hq, Lq, Lk].
            query_shape: [B, Hq, Lq, D] of ints and SymInts.  key_shape: [B, Hkv, Lk, D].
        Returns:
            Proved (equal for every size the graph allows), Refuted (understood, and something
            else) or Unknown (not understood; the reason names node and operation).
        """
        try:
            sizes = tuple(self.tensors.size(s) for s in (*query_shape[:3], key_shape[2]))
            key = (mask, sizes)
            if key not in self._proofs:
                self._proofs[key] = _Proof(self.tensors, mask, sizes).result()
            return self._proofs[key]
        except NotUnderstood as reason:
            return Unknown(f"shape of the attention: {reason}")


@dataclass(frozen=True)
class _Padding:
    node: fx.Node | None
    problem: str = ""


class _Proof:
    """One mask at one shape."""

    def __init__(self, tensors: SymbolicTensors, mask: fx.Node, sizes: Index) -> None:
        self.tensors, self.mask, self.sizes = tensors, mask, sizes
        self.axes = tuple(
            tensors.new_index(name, size) for name, size in zip("bhqk", sizes, strict=True)
        )

    def result(self) -> MaskProof:
        try:
            parts = conjuncts(self._predicate())
            padding = [p for p in parts if p.atoms(AppliedUndef)]
            linear = [p for p in parts if not p.atoms(AppliedUndef)]
            found = self._padding(padding)
            if found.problem:
                return Unknown(f"{self.mask.name}: {found.problem}")
            return self._with_band(linear, found.node)
        except Mutated as reason:
            return Unknown(f"{self.mask.name}: {reason}")
        except NotUnderstood as reason:
            return Unknown(f"{self.mask.name} ({self.mask.target}): {reason}")
        except Undecidable as reason:
            return Unknown(f"{self.mask.name}: cannot be decided: {reason}")

    def _predicate(self) -> Any:
        """Where the mask lets (b, h, q, k) through."""
        value = tensor_of(self.mask)
        if value is None or not 2 <= value.dim() <= 4:
            raise NotUnderstood("not a tensor of rank 2 to 4")
        shape = self.tensors.shape(self.mask)
        axes, sizes = self.axes[-len(shape) :], self.sizes[-len(shape) :]
        for size, wanted in zip(shape, sizes, strict=True):
            if size not in (1, wanted):
                raise NotUnderstood(f"its size {size} is not seen to be 1 or {wanted}")
        element = self.tensors.evaluate(self.mask, axes)
        if value.dtype == torch.bool:
            return as_bool(element)
        if not value.dtype.is_floating_point:
            raise NotUnderstood(f"a mask of {value.dtype}")
        return self._visible(element, torch.finfo(value.dtype).min)

    def _visible(self, element: Any, lowest: float) -> Any:
        """Where an additive mask is 0, given that it is hidden elsewhere."""
        if isinstance(element, float):
            element = Choice(sympy.true, element, element)
        if not isinstance(element, Choice):
            raise NotUnderstood(
                f"additive values that are not constants: {self._culprits(element)}"
            )
        always, never = (element.cond is c for c in (sympy.true, sympy.false))
        kinds = [
            "visible" if v == 0 else "hidden" if v <= lowest else "other"
            for v in (element.yes, element.no)
        ]
        kinds = [kinds[0]] * 2 if always else [kinds[1]] * 2 if never else kinds
        table = {
            ("visible", "hidden"): element.cond,
            ("hidden", "visible"): neg(element.cond),
            ("visible", "visible"): sympy.true,
            ("hidden", "hidden"): sympy.false,
        }
        if tuple(kinds) not in table:
            raise NotUnderstood(f"additive values {element.yes} and {element.no} are a bias")
        return table[kinds[0], kinds[1]]

    def _culprits(self, value: Any) -> str:
        nodes = sorted(self.tensors.read_nodes(value), key=lambda n: n.name)
        return "; ".join(self.tensors.reasons.get(n, n.name) for n in nodes) or str(value)

    # -- key padding ---------------------------------------------------------------------------

    def _padding(self, parts: list[Any]) -> _Padding:
        """The 2-D node that says the same as the parts, all of which read unread tensors."""
        if not parts:
            return _Padding(None)
        batch, _, _, key = self.axes
        together = conj(*parts)
        culprits = self._culprits(together)
        if together.free_symbols & {self.axes[1], self.axes[2]}:
            return _Padding(None, f"visibility depends on the row and on data: {culprits}")
        wanted = set(conjuncts(together))
        for node in self._slice():
            shape = self.tensors.shape(node)
            if len(shape) != 2 or shape[0] not in (1, self.sizes[0]) or shape[1] != self.sizes[3]:
                continue
            value: Any = self.tensors.evaluate(node, (batch, key))
            if isinstance(value, Choice) and not value.exact:
                continue
            if set(conjuncts(as_bool(value))) == wanted:
                return _Padding(node)
        reads = {a.args for a in together.atoms(AppliedUndef)}
        several = len(self.tensors.read_nodes(together)) > 1 or len(reads) > 1
        problem = "more than one padding tensor" if several else "no [B, Lk] padding node says this"
        return _Padding(None, f"{problem}: {culprits}")

    def _slice(self) -> list[fx.Node]:
        """The tensor nodes that the mask is made of, nearest first."""
        seen: set[fx.Node] = set()
        queue = [self.mask]
        for node in queue:
            if node not in seen and tensor_of(node) is not None:
                seen.add(node)
                if node not in self.tensors.reads.values():
                    queue += node.all_input_nodes
        return [n for n in dict.fromkeys(queue) if n in seen]

    # -- position ------------------------------------------------------------------------------

    def _with_band(self, parts: list[Any], padding: fx.Node | None) -> MaskProof:
        batch, head, query, key = self.axes
        kept = []
        for part in parts:
            if not part.free_symbols & {batch, head}:
                kept.append(part)
            elif not self.tensors.certain(part):
                return Unknown(
                    f"{self.mask.name}: it differs between batch entries or heads: {part}"
                )
        pairs = ((query, self.sizes[2]), (key, self.sizes[3]))
        decider = Decider(Domain(pairs, self.tensors.size_bounds))
        band = find_band(decider, conj(*kept), *pairs)
        if isinstance(band, NotABand):
            text = f"{self.mask.name}: {band.reason}"
            return Refuted(text, band.witness) if band.certain else Unknown(text)
        return Proved(self._fact(band, padding))

    def _fact(self, band: Band, padding: fx.Node | None) -> MaskFact:
        if padding is None:
            return MaskFact(band)
        is_bool = self.tensors.dtype(padding) == torch.bool
        return MaskFact(band, padding.name, is_bool)
