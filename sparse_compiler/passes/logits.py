"""What leads from the product of queries and keys to softmax, read backward."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.ir.site import example_of
from sparse_compiler.passes.chain_steps import (
    LIMIT,
    Failed,
    free_symbols,
    is_row_maximum,
    is_view,
    is_weight,
    number_of,
    plain_name,
    where_operands,
)
from sparse_compiler.passes.form import Element, MaskTerm
from sparse_compiler.passes.hidden import hides
from sparse_compiler.passes.layout import step_back
from sparse_compiler.passes.operations import CASTS
from sparse_compiler.passes.products import Product, broadcast, is_product, product_at
from sparse_compiler.passes.symbolic_reader import Index, argument, tensor_of
from sparse_compiler.passes.symbolic_tensor import Mutated, NotUnderstood, SymbolicTensors
from sparse_compiler.passes.symbolic_values import Choice

__all__ = ["Logits"]


class Logits:
    """``softcap(scale * product) + terms``, as far as it has been read.

    Attributes:
        key, key_size: index symbol and number of the keys; to be set before ``read``.
        dim: symbol of what the product sums over.
        shifted: a number or a row's maximum was added to the scores on the way; no weight shows it.
    """

    def __init__(self, tensors: SymbolicTensors) -> None:
        self.tensors = tensors
        self.key: sympy.Symbol = sympy.Dummy("k", integer=True)
        self.dim = sympy.Dummy("d", integer=True)
        self.key_size: sympy.Expr = sympy.Integer(0)
        self.terms: list[MaskTerm] = []
        self.factors: list[tuple[Element, bool]] = []
        self.softcap = 0.0
        self.shifted = False
        self.scale = 1.0
        self.dropout: Any = 0.0
        self.sinks: Element | None = None
        self.product: Product | None = None
        self.inner: list[fx.Node] = []

    def read_dropout(self, node: fx.Node) -> None:
        """An active dropout makes the result random."""
        if argument(node, 2, "training", True) is not False:
            self.dropout = argument(node, 1, "p", 0.5)

    def read(self, element: Element, factor: float, consumer: fx.Node) -> bool:
        """Read what leads to the product of queries and keys; False if nothing does.

        Args:
            factor: by which the element is multiplied on its way to softmax.
            consumer: who reads it.
        Raises:
            Failed: it leads there through something that the form cannot say.
        """
        node, index = self._written(element.node, consumer), element.index
        if is_product(node):
            return self._read_product(node, index, factor)
        name = plain_name(node)
        if name in CASTS:
            return self._through(node, argument(node, 0, "input"), index, factor)
        if name == "dropout":
            self.read_dropout(node)
            return self._through(node, argument(node, 0, "input"), index, factor)
        handler = _HANDLERS.get(name)
        if handler is not None:
            found = handler(self, node, index, factor)
        else:
            step = step_back(self.tensors, node, index)
            found = step is not None and self.read(Element(*step), factor, node)
        if found:
            self.inner.append(node)
        return found

    def _written(self, node: fx.Node, consumer: fx.Node) -> fx.Node:
        """The node that wrote what ``consumer`` reads: an in-place operation on ``node``, or itself."""
        mutations = self.tensors.mutations
        if not mutations.written_between(node, node, consumer):
            return node
        writer = mutations.last_write(node, consumer)
        first = writer.args[0] if writer is not None and writer.args else None
        if writer is None or first is not node or plain_name(writer) not in _HANDLERS:
            raise Failed(node, "it is written in place before it is read")
        return writer

    def _through(self, node: fx.Node, source: Any, index: Index, factor: float) -> bool:
        value = tensor_of(source) if isinstance(source, fx.Node) else None
        if value is None or not value.dtype.is_floating_point:
            return False
        found = self.read(broadcast(source, index, self.tensors), factor, node)
        if found:
            self.inner.append(node)
        return found

    def _read_product(self, node: fx.Node, index: Index, factor: float) -> bool:
        product = product_at(node, index, self.dim, self.tensors)
        if product is None:
            return False
        sides = [self.key in free_symbols(e) for e in (product.left, product.right)]
        if sides.count(True) != 1:
            return False
        if product.added is not None:
            self._add_term(product.added, factor * number_of(product.beta, node), node)
        self.product = product
        self.scale = factor * number_of(product.alpha, node)
        self.inner.append(node)
        return True

    def _add_term(self, element: Element, factor: float, node: fx.Node) -> None:
        if self.factors and factor:
            raise Failed(node, "something is added before a factor that is a tensor")
        if factor:
            self.terms.append(MaskTerm("add", element, factor))

    def _side(self, node: fx.Node, operand: Any, index: Index, factor: float) -> bool:
        """Try to read one operand of ``node`` as what leads to the product."""
        if not isinstance(operand, fx.Node) or tensor_of(operand) is None:
            return False
        return self.read(broadcast(operand, index, self.tensors), factor, node)

    def _scaled(self, node: fx.Node, index: Index, factor: float) -> bool:
        first, second = argument(node, 0, "input"), argument(node, 1, "other")
        divides = plain_name(node) == "div"
        if divides and node.kwargs.get("rounding_mode") is not None:
            return False
        for inside, other in ((first, second), (second, first))[: 1 if divides else 2]:
            if not isinstance(inside, fx.Node) or not self.has_product(inside):
                continue
            number = self.constant(other)
            if number is not None:
                if number == 0:
                    raise Failed(node, "the logits are multiplied or divided by 0")
                by = factor / number if divides else factor * number
                return self._side(node, inside, index, by)
            tensor = broadcast(other, index, self.tensors)
            if self.key in free_symbols(tensor):
                raise Failed(node, f"the logits are multiplied by {other}, which varies by key")
            self.factors.append((tensor, divides))
            return self._side(node, inside, index, factor)
        return False

    def _added(self, node: fx.Node, index: Index, factor: float) -> bool:
        first, second = argument(node, 0, "input"), argument(node, 1, "other")
        alpha = node.kwargs.get("alpha", 1)
        if not isinstance(alpha, int | float):
            return False
        minus = plain_name(node) == "sub"
        sign = -alpha if minus else alpha
        if isinstance(first, fx.Node) and self.has_product(first):
            inside, other, weight, own = first, second, sign, 1.0
        elif isinstance(second, fx.Node) and self.has_product(second):
            inside, other, weight, own = second, first, 1.0, sign
        else:
            return False
        shift = minus and inside is first and is_row_maximum(other, first)
        if isinstance(other, fx.Node) and tensor_of(other) is not None and not shift:
            self._add_term(broadcast(other, index, self.tensors), factor * weight, node)
        else:
            # A number, or a row's own maximum, changes no weight.
            self.shifted = True
        return self._side(node, inside, index, factor * own)

    def _filled(self, node: fx.Node, index: Index, factor: float) -> bool:
        name = plain_name(node)
        if name == "where":
            condition, yes, no = where_operands(node)
            kind: Any = "keep" if isinstance(yes, fx.Node) and self.has_product(yes) else "drop"
            inside, fill = (yes, no) if kind == "keep" else (no, yes)
        else:
            inside, condition = argument(node, 0, "input"), argument(node, 1, "mask")
            fill, kind = argument(node, 2, "value"), "drop"
        if not isinstance(inside, fx.Node) or not self.has_product(inside):
            return False
        number = self.constant(fill)
        dtype = self.tensors.dtype(node)
        if number is None or not factor > 0:
            raise Failed(node, f"hidden pairs get {fill}, whose value is not known")
        if self.factors:
            # Its sign and size are not known: what is hidden may not stay so.
            raise Failed(node, "pairs are hidden before a factor that is a tensor")
        if not hides(number, factor, dtype):
            raise Failed(node, f"hidden pairs get {number * factor:g}, which need not vanish")
        if not isinstance(condition, fx.Node) or self.tensors.dtype(condition) != torch.bool:
            raise Failed(node, "the condition is no bool tensor")
        self.terms.append(MaskTerm(kind, broadcast(condition, index, self.tensors)))
        return self._side(node, inside, index, factor)

    def _floored(self, node: fx.Node, index: Index, factor: float) -> bool:
        """Logits that are raised to a value so low that it hides: that moves hidden ones only."""
        clamps = plain_name(node) == "clamp"
        inside, floor = argument(node, 0, "input"), argument(node, 1, "min" if clamps else "other")
        if not isinstance(inside, fx.Node) or not self.has_product(inside):
            inside, floor = floor, inside
        if not isinstance(inside, fx.Node) or not self.has_product(inside):
            return False
        number = self.constant(floor)
        known = number is not None and factor > 0 and hides(number, factor, torch.float64)
        if not known or self.factors or (clamps and argument(node, 2, "max") is not None):
            raise Failed(node, "the logits are cut off")
        return self._side(node, inside, index, factor)

    def _capped(self, node: fx.Node, index: Index, factor: float) -> bool:
        if self.softcap or not factor > 0 or self.factors:
            raise Failed(node, "more than one soft cap, or one under a factor that is no number")
        known, sinks = len(self.terms), self.sinks
        shifted, self.shifted = self.shifted, False
        if not self._through(node, argument(node, 0, "input"), index, 1.0):
            return False
        if len(self.terms) > known or self.shifted or self.sinks is not sinks:
            raise Failed(node, "a mask, a bias, a shift or sinks inside of the soft cap")
        self.shifted = shifted
        self.softcap, self.scale = factor, self.scale * factor
        return True

    def _joined(self, node: fx.Node, index: Index, factor: float) -> bool:
        """A column of sinks beside the logits."""
        parts = argument(node, 0, "tensors")
        rank = len(index)
        if argument(node, 1, "dim", 0) not in (-1, rank - 1) or len(parts) != 2:
            return False
        first, sink = parts
        if not self.has_product(first):
            return False
        sizes = self.tensors.shape(first)[-1], self.tensors.shape(sink)[-1]
        if sizes != (self.key_size, 1) or factor != 1.0 or self.sinks is not None:
            raise Failed(node, f"logits joined with {sink}, which is not one sink column")
        self.sinks = broadcast(sink, index, self.tensors)
        if self.terms or self.factors:
            raise Failed(node, "a mask or a factor over logits and sinks together")
        shifted, self.shifted = self.shifted, False
        if not self._side(node, first, index, factor):
            return False
        if self.shifted:
            raise Failed(node, "the logits are shifted, and the sinks beside them are not")
        self.shifted = shifted
        return True

    def has_product(self, node: fx.Node) -> bool:
        """Whether a product with the key axis feeds ``node`` through operations of a chain."""
        work, seen = [node], set()
        while work and len(seen) < LIMIT:
            current = work.pop()
            if current in seen:
                continue
            seen.add(current)
            value = tensor_of(current)
            if value is None or not value.dtype.is_floating_point:
                continue
            if is_product(current):
                if self._is_score(current):
                    return True
                continue
            name = plain_name(current)
            if name in CASTS or name == "dropout" or name in _HANDLERS or is_view(current):
                work += current.all_input_nodes
        return False

    def _is_score(self, node: fx.Node) -> bool:
        """A product of two activations; a linear layer's weight is a parameter."""
        count = sum(is_weight(n) for n in node.all_input_nodes)
        return count == 0

    def constant(self, value: Any) -> float | None:
        """A number that is known now: a literal, a symbolic float, or a tensor of one constant."""
        if isinstance(value, bool):
            return None
        if isinstance(value, int | float):
            return float(value)
        if not isinstance(value, fx.Node):
            return None
        if tensor_of(value) is None:
            example = example_of(value)
            return float(example) if isinstance(example, float | int | torch.SymFloat) else None
        index = tuple(sympy.Dummy("i", integer=True) for _ in self.tensors.shape(value))
        try:
            found = self.tensors.evaluate(value, index)
        except (NotUnderstood, Mutated):
            return None
        if isinstance(found, Choice) and found.exact and found.yes == found.no:
            return float(found.yes)
        if isinstance(found, float | sympy.Integer):
            return float(found)
        return None


_HANDLERS: dict[str, Any] = {
    "mul": Logits._scaled,
    "div": Logits._scaled,
    "add": Logits._added,
    "sub": Logits._added,
    "where": Logits._filled,
    "masked_fill": Logits._filled,
    "tanh": Logits._capped,
    "max": Logits._floored,
    "maximum": Logits._floored,
    "clamp": Logits._floored,
    "cat": Logits._joined,
}
