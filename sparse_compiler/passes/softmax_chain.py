"""Attention written out: a product, things done to its result, softmax, a second product.

Matched by dataflow from softmax outward. Forward, to the product with the values, through casts, views
and dropout. Backward, to the product of queries and keys, through everything that keeps the form
``softcap(scale * q kᵀ) + terms``: numbers that multiply, masks that are added, filled or chosen, a
sink column that is joined on and cut off again, the row maximum that is subtracted. What does not fit
ends the match with a reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch import fx

from sparse_compiler.ir.report import Code
from sparse_compiler.passes.axes import attention_axes, unread_form
from sparse_compiler.passes.chain_steps import (
    LIMIT,
    Failed,
    absorbed,
    asks_of_other,
    computed_alike,
    free_symbols,
    is_log_sum,
    only_asks,
    plain_name,
)
from sparse_compiler.passes.form import AttentionForm, Element, MaskTerm
from sparse_compiler.passes.layout import divided, replaced, step_back, substituted, tidy
from sparse_compiler.passes.logits import Logits
from sparse_compiler.passes.operations import CASTS, operation
from sparse_compiler.passes.products import broadcast, is_product, product_at
from sparse_compiler.passes.symbolic_reader import Index, argument, tensor_of
from sparse_compiler.passes.symbolic_tensor import Mutated, NotUnderstood, SymbolicTensors
from sparse_compiler.passes.symbolic_values import FloorDivide, Modulo

__all__ = ["is_softmax", "match_softmax_chain"]

_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})


def is_softmax(node: fx.Node) -> bool:
    """Whether ``node`` is a softmax of a tensor, into memory of its own."""
    return (operation(node) or "") in _SOFTMAX and node.kwargs.get("out") is None


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


@dataclass(frozen=True)
class _Second:
    """The product with the values.

    Args:
        node, index: the product and symbols of its own index.
        rows: softmax's index, without the key's, in those symbols.
        values: the element of the values.
        contracted, size: symbol and number of the keys.
    """

    node: fx.Node
    index: Index
    rows: Index
    values: Element
    contracted: sympy.Symbol
    size: sympy.Expr


class _Chain:
    """One softmax and what surrounds it."""

    def __init__(self, node: fx.Node, source: fx.Node, tensors: SymbolicTensors) -> None:
        self.node, self.source, self.tensors = node, source, tensors
        self.logits = Logits(tensors)
        self.cleared: list[tuple[fx.Node, fx.Node]] = []
        self.inner: list[fx.Node] = [node]
        self.log_sums: list[Element] = []

    def form(self) -> AttentionForm | None:
        logits, tensors = self.logits, self.tensors
        if not logits.has_product(self.source):
            return None
        try:
            second = self._second()
        except Failed as failed:
            return unread_form(self.node, self.node, tensors, (failed.code, str(failed)))
        if second is None:
            return None
        shape = tensors.shape(self.node)
        rows = tuple(tensors.new_index(f"x{n}", size) for n, size in enumerate(shape[:-1]))
        logits.key, logits.key_size = tensors.new_index("k", second.size), second.size
        try:
            if not logits.read(Element(self.source, (*rows, logits.key)), 1.0, self.node):
                return None
            self._check_cleared((*rows, logits.key))
            if shape[-1] != second.size and logits.sinks is None:
                raise Failed(self.node, "weights are cut off after softmax")
            self._check_readers(rows)
        except Failed as failed:
            return unread_form(self.node, second.node, tensors, (failed.code, str(failed)))
        except Mutated as mutated:
            return unread_form(self.node, second.node, tensors, (Code.CHAIN, str(mutated)))
        return _Roles(self, rows, second).form()

    def _check_readers(self, rows: Index) -> None:
        """The logits must have no other readers than their log-sum-exp, which attention knows."""
        inner = {self.node, *self.logits.inner}
        final = self._final_logits()
        for node in self.logits.inner:
            for user in node.users:
                if absorbed(user, inner) or asks_of_other(user, node):
                    continue
                moved = self.logits.sinks is not None or self.logits.shifted
                if node not in final or not is_log_sum(user, node) or moved:
                    raise Failed(node, f"{user.name} reads the scores themselves", Code.WEIGHTS)
                kept = len(self.tensors.shape(user)) > len(rows)
                self.log_sums.append(Element(user, (*rows, sympy.Integer(0)) if kept else rows))

    def _final_logits(self) -> set[fx.Node]:
        """What softmax reads, before and after casts."""
        node, found = self.source, {self.source}
        while plain_name(node) in CASTS and isinstance(argument(node, 0, "input"), fx.Node):
            node = argument(node, 0, "input")
            found.add(node)
        return found

    # -- forward: the product with the values ------------------------------------------------------

    def _second(self) -> _Second | None:
        """The product that reads the weights.

        Raises:
            Failed: there is such a product, but it reads something else than the weights.
        """
        node = self.node
        for _ in range(LIMIT):
            users = [u for u in node.users if not only_asks(u)]
            if len(users) != 1:
                if any(self._feeds_product(u) for u in users):
                    raise Failed(node, "the weights themselves are read too", Code.WEIGHTS)
                return None
            user = users[0]
            if is_product(user):
                return self._second_of(user)
            if not self._passes(user, node):
                if self._feeds_product(user):
                    raise Failed(user, "the weights are changed after softmax")
                return None
            self.inner.append(user)
            node = user
        return None

    def _passes(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether ``user`` hands the weights on as they are, but for pairs that are hidden anyway."""
        name = plain_name(user)
        if name in CASTS or name == "dropout":
            return self.tensors.dtype(user).is_floating_point
        if name == "masked_fill" and argument(user, 0, "input") is node:
            zero = self.logits.constant(argument(user, 2, "value")) == 0
            self.cleared.append((argument(user, 1, "mask"), user))
            return zero and self.tensors.shape(user) == self.tensors.shape(self.node)
        return step_back(self.tensors, user, self._zeros(user)) is not None

    def _check_cleared(self, index: Index) -> None:
        """Weights that are set to 0 after softmax must have been hidden before it."""
        for mask, user in self.cleared:
            wanted = broadcast(mask, index, self.tensors)
            same = any(
                term.kind == "drop" and self._equal(term.where, wanted, user)
                for term in self.logits.terms
            )
            if not same:
                raise Failed(mask, "weights that took part in the softmax are set to 0")

    def _equal(self, first: Element, second: Element, reader: fx.Node) -> bool:
        """Whether two elements are the same by the time that ``reader`` reads the second."""
        alike = first.index == second.index and computed_alike(first.node, second.node)
        if alike and not any(self._written(e.node, reader) for e in (first, second)):
            return True
        values = (self.tensors.evaluate(e.node, e.index) for e in (first, second))
        return next(values) == next(values)

    def _written(self, node: fx.Node, until: fx.Node) -> bool:
        """Whether anything that ``node`` comes of is written in place before ``until``."""
        work, seen, writes = [node], set(), self.tensors.mutations
        while work:
            current = work.pop()
            if current in seen:
                continue
            seen.add(current)
            if len(seen) > LIMIT or writes.written_between(current, current, until):
                return True
            work += current.all_input_nodes
        return False

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

    def _second_of(self, node: fx.Node) -> _Second | None:
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
                return _Second(node, index, place[:-1], values, contracted, zeros.size)
        return None

    def _back_to_softmax(self, element: Element) -> Index | None:
        node, index = element.node, element.index
        for _ in range(LIMIT):
            if node is self.node:
                return index
            name = plain_name(node)
            if name == "dropout":
                self.logits.read_dropout(node)
            if name in CASTS or name in ("dropout", "masked_fill"):
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


class _Roles:
    """Gives the index symbols of a chain their roles: batch, head, query, key."""

    def __init__(
        self,
        chain: _Chain,
        rows: tuple[sympy.Symbol, ...],
        second: _Second,
    ) -> None:
        self.chain, self.rows, self.second = chain, rows, second
        self.tensors, self.logits = chain.tensors, chain.logits
        assert self.logits.product is not None
        self.product = self.logits.product
        first, last = self.product.left, self.product.right
        swapped = self.logits.key in free_symbols(first)
        self.q, self.k = (last, first) if swapped else (first, last)

    def form(self) -> AttentionForm:
        logits, second, tensors = self.logits, self.second, self.tensors
        query, inner = self._query(), self._value_axis()
        if query is None or inner is None:
            return self._unread("which axis is the query's, or the value's")
        sizes = dict(zip(self.rows, tensors.shape(self.chain.node)[:-1], strict=True))
        v_size = tensors.shape(second.node)[second.index.index(inner)]
        made = attention_axes(
            [(row, sizes[row]) for row in self.rows if row is not query],
            (query, logits.key, logits.dim, inner),
            (sizes[query], second.size, self.product.size, v_size),
            (self.q, self.k, *(t.where for t in logits.terms)),
            tensors,
        )
        if made is None:
            return self._unread("which axes are the heads'")
        axes, mapping = made
        targets = [replaced(r, mapping, self.tensors) for r in self.rows]
        solved = _solve(second.index, second.rows, targets, self.tensors)
        if solved is None:
            return self._unread("how the second product is laid out")
        solved |= {inner: axes.value_dim, second.contracted: axes.key}
        for symbol in second.index:
            solved.setdefault(symbol, sympy.Integer(0))  # type: ignore[arg-type]

        def moved(element: Element) -> Element:
            return substituted(element, mapping, self.tensors)

        output = Element(second.node, second.index)
        return AttentionForm(
            axes=axes,
            query=moved(self.q),
            key=moved(self.k),
            value=substituted(second.values, solved, self.tensors),
            output=substituted(output, solved, self.tensors),
            terms=tuple(MaskTerm(t.kind, moved(t.where), t.factor) for t in reversed(logits.terms)),
            scale=logits.scale,
            dropout=logits.dropout,
            softcap=logits.softcap,
            sinks=None if logits.sinks is None else moved(logits.sinks),
            factors=tuple((moved(e), divides) for e, divides in logits.factors),
            spelling="softmax chain",
            inner=tuple(dict.fromkeys((*self.chain.inner, *logits.inner))),
            log_sums=tuple(moved(e) for e in self.chain.log_sums),
        )

    def _value_axis(self) -> sympy.Symbol | None:
        """The axis of the second product that comes from the values alone."""
        weighed = set().union(*(sympy.sympify(e).free_symbols for e in self.second.rows))
        own = free_symbols(self.second.values)
        inner = [y for y in self.second.index if y in own and y not in weighed]
        return inner[0] if len(inner) == 1 else None  # type: ignore[return-value]

    def _unread(self, what: str) -> AttentionForm:
        reason = f"{self.chain.node.name}: it is not clear {what}"
        return unread_form(self.chain.node, self.second.node, self.tensors, (Code.CHAIN, reason))

    def _query(self) -> sympy.Symbol | None:
        """The row axis that the keys do not share; the last one where several do not."""
        shared, own = free_symbols(self.k), free_symbols(self.q)
        free = [r for r in self.rows if r not in shared]
        named = [r for r in free if r in own]
        if self.rows[-1] in free:
            return self.rows[-1]
        return named[0] if len(named) == 1 else None


def _solve(
    out_index: Index, probs: Index, targets: list[sympy.Expr], tensors: SymbolicTensors
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
            solved[outer] = divided(FloorDivide, target, by, tensors)  # type: ignore[index]
            solved[low[0]] = divided(Modulo, target, by, tensors)  # type: ignore[arg-type]
        else:
            return None
    for symbol, both in parts.items():
        if set(both) != {"upper", "lower"} or both["upper"][1] != both["lower"][1]:
            return None
        solved[symbol] = tidy(sympy.expand(both["upper"][0] * both["upper"][1] + both["lower"][0]))
    return solved
