"""Attention written out: a product, things done to its result, softmax, a second product.

Matched by dataflow from softmax outward. Forward, to the product with the values, through casts, views
and dropout. Backward, to the product of queries and keys, through everything that keeps the form
``softcap(scale * q kᵀ) + terms``: numbers that multiply, masks that are added, filled or chosen, a
sink column that is joined on and cut off again, the row maximum that is subtracted. What does not fit
ends the match with a reason.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.ir.report import Code
from sparse_compiler.passes.axes import attention_axes, unread_form
from sparse_compiler.passes.form import AttentionForm, Element, MaskTerm
from sparse_compiler.passes.layout import divided, replaced, step_back, substituted, tidy
from sparse_compiler.passes.products import Product, broadcast, is_product, product_at
from sparse_compiler.passes.purity import is_pure
from sparse_compiler.passes.symbolic_reader import Index, argument, operation, tensor_of
from sparse_compiler.passes.symbolic_tensor import Mutated, NotUnderstood, SymbolicTensors
from sparse_compiler.passes.symbolic_values import Choice, FloorDivide, Modulo
from sparse_compiler.passes.symbolic_views import VIEWS

__all__ = ["is_softmax", "match_softmax_chain"]

_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
_CASTS = frozenset(
    {"to", "_to_copy", "type", "type_as", "float", "half", "bfloat16", "double"}
    | {"contiguous", "clone", "detach", "alias"}
)
_SHAPE_ONLY = frozenset({"size", "dim", "sym_size", "numel", "stride"})
_INPLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "idiv": "div"}
_PLAIN = {
    "__add__": "add", "__radd__": "add", "__sub__": "sub", "subtract": "sub", "multiply": "mul",
    "__mul__": "mul", "__rmul__": "mul", "truediv": "div", "true_divide": "div",
    "__truediv__": "div", "divide": "div", "concat": "cat", "concatenate": "cat",
}  # fmt: skip
# |logits| stay below this, so that a smaller constant gets weight 0 beside any visible key.
_HIDDEN = -1e30
_LIMIT = 256


def is_softmax(node: fx.Node) -> bool:
    """Whether ``node`` is a softmax of a tensor."""
    return (operation(node) or "") in _SOFTMAX


class _Failed(Exception):
    """The graph is no attention that the form can say; the text names node and operation."""

    def __init__(self, node: fx.Node, reason: str, code: Code = Code.CHAIN) -> None:
        super().__init__(f"{node.name} ({node.target}): {reason}")
        self.code = code


def _plain_name(node: fx.Node) -> str:
    """The operation's name; in-place forms count as what they compute."""
    name = operation(node) or ""
    name = _INPLACE.get(name, name)
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _PLAIN.get(name, name)


def match_softmax_chain(node: fx.Node, tensors: SymbolicTensors) -> AttentionForm | None:
    """The attention around a softmax, or None if it is none.

    Returns:
        A form; with an ``obstacle`` where both products were found but what lies between them is not
        of the form.
    """
    if not is_softmax(node):
        return None
    source = argument(node, 0, "input")
    value = tensor_of(node)
    if value is None or not isinstance(source, fx.Node) or value.dim() < 2:
        return None
    if argument(node, 1, "dim") not in (-1, value.dim() - 1):
        return None
    try:
        return _Chain(node, source, tensors).form()
    except NotUnderstood:
        return None


class _Chain:
    """One softmax and what surrounds it."""

    def __init__(self, node: fx.Node, source: fx.Node, tensors: SymbolicTensors) -> None:
        self.node, self.source, self.tensors = node, source, tensors
        self.terms: list[MaskTerm] = []
        self.factors: list[tuple[Element, bool]] = []
        self.softcap = 0.0
        self.scale = 1.0
        self.dropout: Any = 0.0
        self.sinks: Element | None = None
        self.cleared: list[fx.Node] = []
        self.product: Product | None = None
        # Symbols of the key, of what the products sum over; and how many keys there are.
        self.key = self.dim = self.contracted = sympy.Dummy("d", integer=True)
        self.key_size: sympy.Expr = sympy.Integer(0)
        self.inner: list[fx.Node] = [node]

    def form(self) -> AttentionForm | None:
        if not self._has_product(self.source):
            return None
        try:
            found = self._values()
        except _Failed as failed:
            return unread_form(self.node, self.node, self.tensors, (failed.code, str(failed)))
        if found is None:
            return None
        out, out_index, probs, values, key_size = found
        shape = self.tensors.shape(self.node)
        rows = tuple(
            self.tensors.new_index(f"x{n}", size) for n, size in enumerate(shape[:-1])
        )
        key = self.tensors.new_index("k", key_size)
        element = Element(self.source, (*rows, key))
        obstacle: tuple[str, str] = ("", "")
        self.key, self.key_size = key, key_size
        try:
            if not self._logits(element, 1.0, self.node):
                return None
            self._check_cleared(rows, key)
            if shape[-1] != key_size and self.sinks is None:
                raise _Failed(self.node, "weights are cut off after softmax")
        except _Failed as failed:
            obstacle = (failed.code, str(failed))
        except Mutated as mutated:
            obstacle = (Code.CHAIN, str(mutated))
        if obstacle[0] or self.product is None:
            return unread_form(self.node, out, self.tensors, obstacle)
        return _Roles(self, rows, (out, out_index, probs, values)).form()

    # -- forward: the product with the values ------------------------------------------------------

    def _values(self) -> tuple[fx.Node, Index, Index, Element, sympy.Expr] | None:
        """(product, its index, softmax's index, value element, number of keys).

        Raises:
            _Failed: there is such a product, but it reads something else than the weights.
        """
        node = self.node
        for _ in range(_LIMIT):
            users = [u for u in node.users if not _only_asks(u)]
            if len(users) != 1:
                if any(self._feeds_product(u) for u in users):
                    raise _Failed(node, "the weights themselves are read too", Code.WEIGHTS)
                return None
            user = users[0]
            if is_product(user):
                return self._values_of(user)
            if not self._passes(user, node):
                if self._feeds_product(user):
                    raise _Failed(user, "the weights are changed after softmax")
                return None
            self.inner.append(user)
            node = user
        return None

    def _passes(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether ``user`` hands the weights on as they are, but for pairs that are hidden anyway."""
        name = _plain_name(user)
        if name in _CASTS or name == "dropout":
            return True
        if name == "masked_fill" and argument(user, 0, "input") is node:
            zero = self._constant(argument(user, 2, "value")) == 0
            self.cleared.append(argument(user, 1, "mask"))
            return zero and self.tensors.shape(user) == self.tensors.shape(self.node)
        return step_back(self.tensors, user, self._zeros(user)) is not None

    def _check_cleared(self, rows: Index, key: sympy.Symbol) -> None:
        """Weights that are set to 0 after softmax must have been hidden before it."""
        for mask in self.cleared:
            wanted = broadcast(mask, (*rows, key), self.tensors)
            same = any(
                term.kind == "drop" and self._equal(term.where, wanted) for term in self.terms
            )
            if not same:
                raise _Failed(mask, "weights that took part in the softmax are set to 0")

    def _equal(self, first: Element, second: Element) -> bool:
        if first.index == second.index and _computed_alike(first.node, second.node):
            return True
        values = (self.tensors.evaluate(e.node, e.index) for e in (first, second))
        return next(values) == next(values)

    def _feeds_product(self, node: fx.Node) -> bool:
        """Whether a product reads what becomes of ``node`` in a few steps."""
        work, seen = [node], set()
        while work and len(seen) < 32:
            current = work.pop()
            if current in seen:
                continue
            seen.add(current)
            if is_product(current):
                return True
            work += current.users
        return False

    def _zeros(self, node: fx.Node) -> Index:
        return tuple(sympy.Integer(0) for _ in self.tensors.shape(node))

    def _values_of(
        self, node: fx.Node
    ) -> tuple[fx.Node, Index, Index, Element, sympy.Expr] | None:
        index = tuple(
            self.tensors.new_index(f"y{n}", size) for n, size in enumerate(self.tensors.shape(node))
        )
        zeros = product_at(node, self._zeros(node), sympy.Dummy("c"), self.tensors)
        if zeros is None or zeros.added is not None or zeros.alpha != 1.0:
            return None
        contracted = self.tensors.new_index("c", zeros.size)
        product = product_at(node, index, contracted, self.tensors)
        if product is None:
            return None
        for weights, values in ((product.left, product.right), (product.right, product.left)):
            place = self._back_to_softmax(weights)
            if place is not None and place[-1] == contracted:
                probs = tuple(place[:-1])
                self.contracted = contracted
                return node, index, probs, values, zeros.size
        return None

    def _back_to_softmax(self, element: Element) -> Index | None:
        node, index = element.node, element.index
        for _ in range(_LIMIT):
            if node is self.node:
                return index
            name = _plain_name(node)
            if name == "dropout":
                self._read_dropout(node)
            if name in _CASTS or name in ("dropout", "masked_fill"):
                source = argument(node, 0, "input")
                if not isinstance(source, fx.Node):
                    return None
                node = source
                continue
            step = step_back(self.tensors, node, index)
            if step is None:
                return None
            node, index = step
        return None

    def _read_dropout(self, node: fx.Node) -> None:
        if argument(node, 2, "training", True) is not False:
            self.dropout = argument(node, 1, "p", 0.5)

    # -- backward: the logits ----------------------------------------------------------------------

    def _logits(self, element: Element, factor: float, consumer: fx.Node) -> bool:
        """Read what leads to the product of queries and keys; False if nothing does.

        Args:
            factor: by which the element is multiplied on its way to softmax.
            consumer: who reads it.
        Raises:
            _Failed: it leads there through something that the form cannot say.
        """
        node, index = element.node, element.index
        if self.tensors.mutations.written_between(node, node, consumer):
            raise _Failed(node, "it is written in place before it is read")
        if is_product(node):
            return self._read_product(node, index, factor)
        name = _plain_name(node)
        if name in _CASTS:
            return self._through(node, argument(node, 0, "input"), index, factor)
        if name == "dropout":
            self._read_dropout(node)
            return self._through(node, argument(node, 0, "input"), index, factor)
        handler = _HANDLERS.get(name)
        if handler is not None:
            found = handler(self, node, index, factor)
        else:
            step = step_back(self.tensors, node, index)
            found = step is not None and self._logits(Element(*step), factor, node)
        if found:
            self.inner.append(node)
        return found

    def _through(self, node: fx.Node, source: Any, index: Index, factor: float) -> bool:
        value = tensor_of(source) if isinstance(source, fx.Node) else None
        if value is None or not value.dtype.is_floating_point:
            return False
        found = self._logits(broadcast(source, index, self.tensors), factor, node)
        if found:
            self.inner.append(node)
        return found

    def _read_product(self, node: fx.Node, index: Index, factor: float) -> bool:
        product = product_at(node, index, self.dim, self.tensors)
        if product is None:
            return False
        sides = [self.key in _free(e) for e in (product.left, product.right)]
        if sides.count(True) != 1:
            return False
        if product.added is not None:
            self._add_term(product.added, factor * _number(product.beta, node), node)
        self.product = product
        self.scale = factor * _number(product.alpha, node)
        self.inner.append(node)
        return True

    def _add_term(self, element: Element, factor: float, node: fx.Node) -> None:
        if self.factors:
            raise _Failed(node, "something is added before a factor that is a tensor")
        if factor:
            self.terms.append(MaskTerm("add", element, factor))

    def _side(self, node: fx.Node, operand: Any, index: Index, factor: float) -> bool:
        """Try to read one operand of ``node`` as what leads to the product."""
        if not isinstance(operand, fx.Node) or tensor_of(operand) is None:
            return False
        return self._logits(broadcast(operand, index, self.tensors), factor, node)

    def _scaled(self, node: fx.Node, index: Index, factor: float) -> bool:
        first, second = argument(node, 0, "input"), argument(node, 1, "other")
        divides = _plain_name(node) == "div"
        if divides and node.kwargs.get("rounding_mode") is not None:
            return False
        for inside, other in ((first, second), (second, first))[: 1 if divides else 2]:
            if not isinstance(inside, fx.Node) or not self._has_product(inside):
                continue
            number = self._constant(other)
            if number is not None:
                if number == 0:
                    raise _Failed(node, "the logits are multiplied or divided by 0")
                by = factor / number if divides else factor * number
                return self._side(node, inside, index, by)
            tensor = broadcast(other, index, self.tensors)
            if self.key in _free(tensor):
                raise _Failed(node, f"the logits are multiplied by {other}, which varies by key")
            self.factors.append((tensor, divides))
            return self._side(node, inside, index, factor)
        return False

    def _added(self, node: fx.Node, index: Index, factor: float) -> bool:
        first, second = argument(node, 0, "input"), argument(node, 1, "other")
        alpha = node.kwargs.get("alpha", 1)
        if not isinstance(alpha, int | float):
            return False
        minus = _plain_name(node) == "sub"
        sign = -alpha if minus else alpha
        if isinstance(first, fx.Node) and self._has_product(first):
            inside, other, weight, own = first, second, sign, 1.0
        elif isinstance(second, fx.Node) and self._has_product(second):
            inside, other, weight, own = second, first, 1.0, sign
        else:
            return False
        shift = minus and inside is first and _is_row_maximum(other, first)
        if isinstance(other, fx.Node) and tensor_of(other) is not None and not shift:
            self._add_term(broadcast(other, index, self.tensors), factor * weight, node)
        # A number, or a row's own maximum, changes no weight.
        return self._side(node, inside, index, factor * own)

    def _filled(self, node: fx.Node, index: Index, factor: float) -> bool:
        name = _plain_name(node)
        if name == "where":
            condition, yes, no = _where_operands(node)
            kind: Any = "keep" if isinstance(yes, fx.Node) and self._has_product(yes) else "drop"
            inside, fill = (yes, no) if kind == "keep" else (no, yes)
        else:
            inside, condition = argument(node, 0, "input"), argument(node, 1, "mask")
            fill, kind = argument(node, 2, "value"), "drop"
        if not isinstance(inside, fx.Node) or not self._has_product(inside):
            return False
        number = self._constant(fill)
        dtype = self.tensors.dtype(node)
        if number is None or not factor > 0:
            raise _Failed(node, f"hidden pairs get {fill}, whose value is not known")
        if not self._hides(number * factor, dtype):
            raise _Failed(node, f"hidden pairs get {number * factor:g}, which need not vanish")
        if not isinstance(condition, fx.Node) or self.tensors.dtype(condition) != torch.bool:
            raise _Failed(node, "the condition is no bool tensor")
        self.terms.append(MaskTerm(kind, broadcast(condition, index, self.tensors)))
        return self._side(node, inside, index, factor)

    @staticmethod
    def _hides(number: float, dtype: torch.dtype) -> bool:
        return number <= max(torch.finfo(dtype).min, _HIDDEN)

    def _floored(self, node: fx.Node, index: Index, factor: float) -> bool:
        """Logits that are raised to a value so low that it hides: that moves hidden ones only."""
        clamps = _plain_name(node) == "clamp"
        inside, floor = argument(node, 0, "input"), argument(node, 1, "min" if clamps else "other")
        if not isinstance(inside, fx.Node) or not self._has_product(inside):
            inside, floor = floor, inside
        if not isinstance(inside, fx.Node) or not self._has_product(inside):
            return False
        number = self._constant(floor)
        known = number is not None and factor > 0 and self._hides(number * factor, torch.float64)
        if not known or (clamps and argument(node, 2, "max") is not None):
            raise _Failed(node, "the logits are cut off")
        return self._side(node, inside, index, factor)

    def _capped(self, node: fx.Node, index: Index, factor: float) -> bool:
        if self.softcap or not factor > 0 or self.factors:
            raise _Failed(node, "more than one soft cap, or one under a factor that is no number")
        known = len(self.terms)
        if not self._through(node, argument(node, 0, "input"), index, 1.0):
            return False
        if len(self.terms) > known or self.sinks is not None:
            raise _Failed(node, "a mask or a bias inside of the soft cap")
        self.softcap, self.scale = factor, self.scale * factor
        return True

    def _joined(self, node: fx.Node, index: Index, factor: float) -> bool:
        """A column of sinks beside the logits."""
        parts = argument(node, 0, "tensors")
        rank = len(index)
        if argument(node, 1, "dim", 0) not in (-1, rank - 1) or len(parts) != 2:
            return False
        first, sink = parts
        if not self._has_product(first):
            return False
        sizes = self.tensors.shape(first)[-1], self.tensors.shape(sink)[-1]
        if sizes != (self.key_size, 1) or factor != 1.0 or self.sinks is not None:
            raise _Failed(node, f"logits joined with {sink}, which is not one sink column")
        self.sinks = broadcast(sink, index, self.tensors)
        self.sink_depth = len(self.terms)
        if self.terms:
            raise _Failed(node, "a mask over logits and sinks together")
        return self._side(node, first, index, factor)

    # -- helpers -----------------------------------------------------------------------------------

    def _has_product(self, node: fx.Node) -> bool:
        """Whether a product with the key axis feeds ``node`` through operations of a chain."""
        work, seen = [node], set()
        while work and len(seen) < _LIMIT:
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
            name = _plain_name(current)
            if name in _CASTS or name == "dropout" or name in _HANDLERS or _is_view(current):
                work += current.all_input_nodes
        return False

    def _is_score(self, node: fx.Node) -> bool:
        """A product of two activations; a linear layer's weight is a parameter."""
        count = sum(_is_parameter(n) for n in node.all_input_nodes)
        return count == 0

    def _constant(self, value: Any) -> float | None:
        """A number that is known now: a literal, a symbolic float, or a tensor of one constant."""
        if isinstance(value, bool):
            return None
        if isinstance(value, int | float):
            return float(value)
        if not isinstance(value, fx.Node):
            return None
        if tensor_of(value) is None:
            example = value.meta.get("example_value", value.meta.get("val"))
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
    "mul": _Chain._scaled,
    "div": _Chain._scaled,
    "add": _Chain._added,
    "sub": _Chain._added,
    "where": _Chain._filled,
    "masked_fill": _Chain._filled,
    "tanh": _Chain._capped,
    "max": _Chain._floored,
    "maximum": _Chain._floored,
    "clamp": _Chain._floored,
    "cat": _Chain._joined,
}


def _free(element: Element) -> set[Any]:
    return set().union(*(sympy.sympify(e).free_symbols for e in element.index))


def _computed_alike(first: Any, second: Any, depth: int = 16) -> bool:
    """Whether two nodes apply the same pure operations to the same nodes."""
    if first is second:
        return True
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or not depth:
        return not isinstance(first, fx.Node) and not isinstance(second, fx.Node) and first == second
    if first.op not in ("call_function", "call_method") or not is_pure(first):
        return False
    same = (first.op, first.target, first.kwargs.keys()) == (
        *(second.op, second.target, second.kwargs.keys()),
    )
    if not same or len(first.args) != len(second.args):
        return False
    pairs = [*zip(first.args, second.args, strict=True)]
    pairs += [(first.kwargs[name], second.kwargs[name]) for name in first.kwargs]
    return all(_computed_alike(a, b, depth - 1) for a, b in pairs)


def _number(value: Any, node: fx.Node) -> float:
    if isinstance(value, fx.Node):
        value = value.meta.get("example_value", value.meta.get("val"))
    if not isinstance(value, int | float | torch.SymFloat):
        raise _Failed(node, "alpha or beta is no number")
    return float(value)


def _only_asks(node: fx.Node) -> bool:
    """Reads nothing but sizes and the like, or is itself read by nobody."""
    name = operation(node) or getattr(node.target, "__name__", str(node.target))
    if name in _SHAPE_ONLY:
        return True
    if name == "getattr":
        return argument(node, 1, "name") in ("shape", "dtype", "device", "ndim")
    return False


def _is_view(node: fx.Node) -> bool:
    return (operation(node) or "") in VIEWS


def _is_parameter(node: fx.Node) -> bool:
    for _ in range(8):
        value = node.meta.get("example_value", node.meta.get("val"))
        if isinstance(value, torch.nn.Parameter) or node.op == "get_attr":
            return True
        if not _is_view(node) and (operation(node) or "") not in _CASTS:
            return False
        inputs = node.all_input_nodes
        if not inputs:
            return False
        node = inputs[0]
    return False


def _is_row_maximum(node: Any, of: fx.Node) -> bool:
    """``of.amax(-1, keepdim=True)`` or the values of ``of.max(-1, keepdim=True)``."""
    if not isinstance(node, fx.Node):
        return False
    name = operation(node) or getattr(node.target, "__name__", "")
    if name in ("detach", "getitem", "getattr"):
        picks = name == "detach" or argument(node, 1, "name") in (0, "values")
        inner = node.args[0]
        return picks and isinstance(inner, fx.Node) and _is_row_maximum(inner, of)
    if name not in ("amax", "max") or argument(node, 0, "input") is not of:
        return False
    value = tensor_of(of)
    dim = argument(node, 1, "dim")
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    last = value is not None and dim in (-1, value.dim() - 1)
    return last and argument(node, 2, "keepdim", False) is True


def _where_operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """(condition, yes, no) of ``torch.where(c, a, b)`` or ``a.where(c, b)``."""
    given = [*node.args, *(node.kwargs.get(n) for n in ("condition", "input", "self", "other"))]
    given = [g for g in given if g is not None][:3]
    if len(given) < 3:
        return None, None, None
    if node.op == "call_method":
        return given[1], given[0], given[2]
    return given[0], given[1], given[2]


class _Roles:
    """Gives the index symbols of a chain their roles: batch, head, query, key."""

    def __init__(
        self,
        chain: _Chain,
        rows: tuple[sympy.Symbol, ...],
        second: tuple[fx.Node, Index, Index, Element],
    ) -> None:
        self.chain, self.rows, self.second = chain, rows, second
        self.tensors = chain.tensors
        assert chain.product is not None
        self.product = chain.product
        first, last = chain.product.left, chain.product.right
        self.q, self.k = (last, first) if chain.key in _free(first) else (first, last)

    def form(self) -> AttentionForm:
        chain, tensors = self.chain, self.tensors
        out, out_index, probs, values = self.second
        query = self._query()
        if query is None:
            return self._unread("which axis is the query's")
        sizes = dict(zip(self.rows, tensors.shape(chain.node)[:-1], strict=True))
        weighed = set().union(*(sympy.sympify(e).free_symbols for e in probs))
        inner = [y for y in out_index if y in _free(values) and y not in weighed]
        if len(inner) != 1:
            return self._unread("which axis is the value's")
        v_size = tensors.shape(out)[out_index.index(inner[0])]
        made = attention_axes(
            [(row, sizes[row]) for row in self.rows if row is not query],
            (query, chain.key, chain.dim, inner[0]),
            (sizes[query], chain.key_size, self.product.size, v_size),
            (self.q, self.k, *(t.where for t in chain.terms)),
            tensors,
        )
        if made is None:
            return self._unread("which axes are the heads'")
        axes, mapping = made
        solved = _solve(out_index, probs, [replaced(row, mapping) for row in self.rows])
        if solved is None:
            return self._unread("how the second product is laid out")
        solved |= {inner[0]: axes.value_dim, chain.contracted: axes.key}
        solved |= {y: sympy.Integer(0) for y in out_index if y not in solved}
        return AttentionForm(
            axes=axes,
            query=substituted(self.q, mapping),
            key=substituted(self.k, mapping),
            value=substituted(values, solved),
            output=substituted(Element(out, out_index), solved),
            terms=tuple(
                MaskTerm(t.kind, substituted(t.where, mapping), t.factor)
                for t in reversed(chain.terms)
            ),
            scale=chain.scale,
            dropout=chain.dropout,
            softcap=chain.softcap,
            sinks=None if chain.sinks is None else substituted(chain.sinks, mapping),
            factors=tuple((substituted(e, mapping), divides) for e, divides in chain.factors),
            spelling="softmax chain",
            inner=tuple(dict.fromkeys(chain.inner)),
        )

    def _unread(self, what: str) -> AttentionForm:
        reason = f"{self.chain.node.name}: it is not clear {what}"
        return unread_form(self.chain.node, self.second[0], self.tensors, (Code.CHAIN, reason))

    def _query(self) -> sympy.Symbol | None:
        """The row axis that the keys do not share; the last one where several do not."""
        shared, own = _free(self.k), _free(self.q)
        free = [r for r in self.rows if r not in shared]
        named = [r for r in free if r in own]
        if self.rows[-1] in free:
            return self.rows[-1]
        return named[0] if len(named) == 1 else None


def _solve(
    out_index: Index, probs: Index, targets: list[sympy.Expr]
) -> dict[sympy.Symbol, sympy.Expr] | None:
    """The output's index symbols such that ``probs`` equals ``targets``; None if unclear."""
    solved: dict[sympy.Symbol, sympy.Expr] = {}
    parts: dict[sympy.Symbol, dict[str, tuple[sympy.Expr, sympy.Expr]]] = {}
    for expr, target in zip(map(tidy, probs), targets, strict=True):
        if expr == 0:
            continue
        if isinstance(expr, sympy.Symbol):
            solved[expr] = target
        elif isinstance(expr, FloorDivide | Modulo) and isinstance(expr.args[0], sympy.Symbol):
            part = "upper" if isinstance(expr, FloorDivide) else "lower"
            parts.setdefault(expr.args[0], {})[part] = (target, expr.args[1])  # type: ignore
        elif isinstance(expr, sympy.Add) and len(expr.args) == 2:
            low = [a for a in expr.args if isinstance(a, sympy.Symbol)]
            high = [a for a in expr.args if isinstance(a, sympy.Mul)]
            if len(low) != 1 or len(high) != 1 or len(high[0].args) != 2:
                return None
            by = next((a for a in high[0].args if a not in out_index), None)
            outer = next((a for a in high[0].args if a in out_index), None)
            if by is None or outer is None:
                return None
            solved[outer] = divided(FloorDivide, target, by)  # type: ignore[index]
            solved[low[0]] = divided(Modulo, target, by)  # type: ignore[arg-type]
        else:
            return None
    for symbol, both in parts.items():
        if set(both) != {"upper", "lower"} or both["upper"][1] != both["lower"][1]:
            return None
        solved[symbol] = tidy(sympy.expand(both["upper"][0] * both["upper"][1] + both["lower"][0]))
    return solved
