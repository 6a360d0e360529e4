"""Tensors of an fx graph read as functions of their position.

`SymbolicReader` answers "what is element (i, j, ...) of this node?" with a sympy expression,
walking backward from the node of interest and no further than needed. Views only rewrite the
index, elementwise operations combine values, and what is not understood becomes an uninterpreted
read ``node(i, j, ...)``, so that a key padding input stays visible in the answer. Nothing is
guessed: memory that is written in place anywhere in the graph is refused altogether.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from sparse_compiler.ir.site import example_of, tensor_of
from sparse_compiler.passes.mask_rules import rule_for
from sparse_compiler.passes.mutation import MutationMap
from sparse_compiler.passes.operations import IN_PLACE, functional, operation
from sparse_compiler.passes.presburger import Decider, Domain, Undecidable
from sparse_compiler.passes.symbolic_values import NotUnderstood, Value, as_bool

__all__ = [
    "GIVEN",
    "IN_PLACE",
    "Evaluate",
    "Index",
    "Mutated",
    "SymbolicReader",
    "argument",
    "described",
    "functional",
    "maker",
    "operation",
    "size_expr",
    "tensor_of",
]

logger = logging.getLogger(__name__)

GIVEN = "sparse_compiler_given"
"""Key of ``node.meta`` of an input that the caller has told about (`passes.given_masks`)."""
Index = tuple[sympy.Expr, ...]
Evaluate = Callable[["SymbolicReader", fx.Node, Index], Value]


class Mutated(Exception):
    """The value depends on memory that the graph writes in place; the text names the node."""


def size_expr(size: Any) -> sympy.Expr:
    """An int or SymInt as a sympy expression; raises NotUnderstood for anything else."""
    if isinstance(size, bool):
        raise NotUnderstood("a bool where an int was expected")
    if isinstance(size, int):
        return sympy.Integer(size)
    if isinstance(size, torch.SymInt):
        return sympy.sympify(size.node.expr)  # already a sympy expression: no text is parsed
    if isinstance(size, sympy.Expr):
        return size
    raise NotUnderstood(f"{type(size).__name__} where an int was expected")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of the call by position or else by name; `self` or the input is position 0."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def maker(node: fx.Node, writer: fx.Node | None) -> tuple[fx.Node, str | None]:
    """The node that computed what `node` holds after `writer` wrote to its memory, and the
    operation, as one that writes nothing.
    """
    if writer is None or not _covers(writer, node):
        return node, operation(node)
    return writer, functional(writer)


def _covers(writer: fx.Node, node: fx.Node) -> bool:
    """Whether `writer` overwrites just the elements of `node`, in its order."""
    first = writer.args[0] if writer.args else None
    target = tensor_of(first) if isinstance(first, fx.Node) else None
    value = tensor_of(node)
    if target is None or value is None or writer.kwargs.get("out") is not None:
        return False
    same = target.dtype == value.dtype and target.dim() == value.dim()
    if not same or target.storage_offset() != value.storage_offset():
        return False
    places = zip(target.shape + target.stride(), value.shape + value.stride(), strict=True)
    return all(size_expr(a) == size_expr(b) for a, b in places)


def described(node: fx.Node) -> str:
    """A node for people: its name and what it does, the same in every process."""
    if node.op == "placeholder":
        return f"input {node.name}"
    return f"{node.name} ({operation(node) or getattr(node.target, '__name__', node.target)})"


class SymbolicReader:
    """Lazy reader of one graph's tensors; remembers what it evaluated.

    Args:
        graph: a graph as Dynamo hands it to a backend, fake values in `meta["example_value"]`.
        handlers: for each operation's name, how an element of its result is computed.

    Attributes:
        reads: which node each uninterpreted function symbol stands for.
        reasons: for each node that became uninterpreted, why.
        late: the functions among `reads` that are read after all writes to their node's memory;
            others are read before any.
        segments: for each function made by `segment`, its node and side.
        shared: what callers keep for the lifetime of the reader.
    """

    def __init__(self, graph: fx.Graph, handlers: Mapping[str, Evaluate]) -> None:
        self._handlers = handlers
        self.mutations = MutationMap(graph)
        self.reads: dict[Any, fx.Node] = {}
        self.reasons: dict[fx.Node, str] = {}
        self.segments: dict[Any, tuple[fx.Node, str]] = {}
        self.size_bounds: dict[sympy.Symbol, tuple[int | None, int | None]] = {}
        self.shared: dict[Any, Any] = {}
        self.late: set[Any] = set()
        self._functions: dict[Any, Any] = {}
        self._index_sizes: dict[sympy.Symbol, sympy.Expr] = {}
        self._memo: dict[tuple[fx.Node, Index, fx.Node | None], Value] = {}
        # The operation that is being read and when it ran: its operands are what they were then.
        self._consumer: fx.Node | None = None
        self._moment: fx.Node | None = None

    # -- sizes and indices ---------------------------------------------------------------------

    def new_index(self, name: str, size: Any) -> sympy.Symbol:
        """A fresh index symbol that runs over 0 <= index < size."""
        symbol = sympy.Dummy(name, integer=True)
        self._index_sizes[symbol] = self.size(size)
        return symbol

    def size(self, size: Any) -> sympy.Expr:
        """A size as an expression; remembers what the tracer knows about its symbols."""
        if isinstance(size, fx.Node):
            size = example_of(size)
        if isinstance(size, torch.SymInt):
            self._learn_bounds(size)
        return size_expr(size)

    def shape(self, node: fx.Node) -> Index:
        """The shape of a tensor node as expressions."""
        value = tensor_of(node)
        if value is None:
            raise NotUnderstood(f"{node.name} is not a tensor")
        return tuple(self.size(s) for s in value.shape)

    def dtype(self, node: fx.Node) -> torch.dtype:
        """The dtype of a tensor node."""
        value = tensor_of(node)
        if value is None:
            raise NotUnderstood(f"{node.name} is not a tensor")
        return value.dtype

    def domain(self, *values: Any) -> Domain:
        """All the index symbols that occur in the values, with their sizes, and the size ranges."""
        free = set().union(*(v.free_symbols for v in values))
        indices = tuple((s, n) for s, n in self._index_sizes.items() if s in free)
        return Domain(indices, self.size_bounds)

    def within(self, expr: sympy.Expr, size: sympy.Expr) -> bool:
        """Whether 0 <= expr < size is certain."""
        if self._index_sizes.get(expr) == size:  # type: ignore[arg-type]
            return True
        if isinstance(expr, sympy.Integer) and isinstance(size, sympy.Integer):
            return 0 <= int(expr) < int(size)
        low = sympy.Ge(expr, 0, evaluate=False)
        high = sympy.Lt(expr, size, evaluate=False)
        return self.certain(low, high)

    def certain(self, *claims: Any) -> bool:
        """Whether all the claims hold for all indices and sizes."""
        if any(c is sympy.false for c in claims):
            return False
        try:
            decider = Decider(self.domain(*claims))
            verdicts = [decider.implies(sympy.true, claim) for claim in claims]
        except Undecidable:
            return False
        return all(v is not None and v.holds for v in verdicts)

    def _learn_bounds(self, size: torch.SymInt) -> None:
        shape_env = getattr(size.node, "shape_env", None)
        ranges = getattr(shape_env, "var_to_range", {})
        for symbol in size_expr(size).free_symbols:
            if symbol in self.size_bounds or symbol not in ranges:
                continue
            low, high = ranges[symbol].lower, ranges[symbol].upper
            self.size_bounds[symbol] = (  # type: ignore[index]
                int(low) if isinstance(low, sympy.Integer) else None,
                int(high) if isinstance(high, sympy.Integer) else None,
            )

    # -- values --------------------------------------------------------------------------------

    def evaluate(self, node: fx.Node, index: Sequence[sympy.Expr]) -> Value:
        """Element `index` of `node`.

        Args:
            node: a tensor node.
            index: one expression for each dimension, within bounds; where a size is 1 it is not
                looked at.
        Returns:
            The value; an uninterpreted read where the operation is not understood.
        Raises:
            Mutated: memory that the value depends on is written in place before it is used (for
                `node` itself: anywhere).
            NotUnderstood: not a tensor.
        """
        moment = self.moment(node, self._consumer, self._moment)
        return self.evaluate_at(node, index, moment)

    def moment(
        self, node: fx.Node, consumer: fx.Node | None, outer: fx.Node | None
    ) -> fx.Node | None:
        """The operation that takes the value of `node` out of its memory, on behalf of `consumer`,
        whose own value is taken by `outer`; None is the reader's caller, at any time.
        """
        if consumer is None:
            return outer
        shared = self.mutations.same_memory(node, consumer)
        return outer if shared and not self.mutations.writes(consumer) else consumer

    def evaluate_at(
        self, node: fx.Node, index: Sequence[sympy.Expr], moment: fx.Node | None
    ) -> Value:
        """As `evaluate`, the value being what is in memory when `moment` runs."""
        place = tuple(
            sympy.Integer(0) if n == 1 else i for i, n in zip(index, self.shape(node), strict=True)
        )
        writer = self.writer(node, moment)
        key = (node, place, writer)
        known = self._memo.get(key)
        if known is None:
            with self.reading(maker(node, writer)[0], moment):
                known = self._memo[key] = self._evaluate(node, place, writer)
        return known

    @contextlib.contextmanager
    def reading(self, consumer: fx.Node, moment: fx.Node | None) -> Iterator[None]:
        """`evaluate` gives what `consumer` reads, its own value being taken by `moment`."""
        outer = self._consumer, self._moment
        self._consumer, self._moment = consumer, moment
        try:
            yield
        finally:
            self._consumer, self._moment = outer

    def writer(self, node: fx.Node, moment: fx.Node | None) -> fx.Node | None:
        """The operation that last wrote all of `node` before `moment`; None if there is none.

        Raises:
            Mutated: the memory is written in a way that is not followed.
        """
        problem = Mutated(f"{described(node)} is written in place")
        if moment is None:
            if self.mutations.written(node):
                raise problem
            return None
        writer = self.mutations.last_write(node, moment)
        if writer is None:
            return None
        if _covers(writer, node):
            known = functional(writer) in self._handlers
        else:
            first = node.args[0] if node.args else None
            # A view of memory that was written shows what its source holds.
            known = isinstance(first, fx.Node) and self.mutations.same_memory(first, node)
            known = known and not self.mutations.writes(node)
        if not known:
            raise problem
        return writer

    def evaluate_scalar(self, value: Any, index: Sequence[sympy.Expr]) -> Value:
        """An operand that is a number, a SymInt, or a tensor node whose shape broadcasts to
        `index`.

        `index` is aligned to the right; dimensions of size 1 are read at 0.
        """
        if isinstance(value, bool):
            return sympy.true if value else sympy.false
        if isinstance(value, float):
            return value
        if isinstance(value, fx.Node) and tensor_of(value) is not None:
            rank = len(self.shape(value))
            if rank > len(index):
                raise NotUnderstood(f"{value.name} has more dimensions than the result")
            return self.evaluate(value, tuple(index)[len(index) - rank :])
        return self.size(value)

    def operand(self, node: fx.Node, value: Any, index: Index) -> Value:
        """An operand of the elementwise operation `node`, read at the position that feeds `index`.

        Raises:
            NotUnderstood: the operand's sizes cannot be seen to broadcast to those of `node`.
        """
        if isinstance(value, fx.Node) and tensor_of(value) is not None:
            inner, outer = self.shape(value), self.shape(node)
            for size, full in zip(reversed(inner), reversed(outer), strict=False):
                if size not in (1, full):
                    raise NotUnderstood(f"sizes {size} and {full} of {value.name} may differ")
        return self.evaluate_scalar(value, index)

    def truth(self, value: Any, node: fx.Node, index: Index) -> Any:
        """An operand as a truth value: nonzero is True. Float tensors are allowed as reads."""
        return as_bool(self.operand(node, value, index))

    def read(self, node: fx.Node, index: Index, writer: fx.Node | None = None) -> sympy.Expr:
        """The uninterpreted element ``node(index)``, as `writer` left it in memory."""
        key = (node, writer)
        function = self._functions.get(key)
        if function is None:
            suffix = "" if writer is None else f"_after_{writer.name}"
            function = sympy.Function(f"read_{node.name}{suffix}", integer=True)
            self._functions[key] = function
            self.reads[function] = node
            if writer is not None:
                self.late.add(function)
        return function(*index)

    def segment(self, node: fx.Node, side: str, index: Index) -> sympy.Expr:
        """The first (side ``start``) or last (``end``) position along the last dimension of `node`
        that holds the same value as `index` does; the values never decrease along it.
        """
        name = f"{side}_{node.name}"
        function = next((f for f, s in self.segments.items() if s == (node, side)), None)
        if function is None:
            function = sympy.Function(name, integer=True)
            self.segments[function] = (node, side)
        return function(*index)

    def read_nodes(self, value: Any) -> set[fx.Node]:
        """The nodes that a value reads without understanding them."""
        atoms = value.atoms(AppliedUndef) if hasattr(value, "atoms") else ()
        return {self.reads[a.func] for a in atoms if a.func in self.reads}

    def _evaluate(self, node: fx.Node, index: Index, writer: fx.Node | None) -> Value:
        if writer is None and GIVEN in node.meta:
            return node.meta[GIVEN].element(self, node, index)
        made_by, name = maker(node, writer)
        handler = rule_for(made_by) if writer is None else None
        if handler is None:
            handler = self._handlers.get(name) if name is not None else None
        if handler is None:
            self.reasons.setdefault(node, f"{described(node)} is an input or unread")
            return self._unread(node, index, writer)
        try:
            return handler(self, made_by, index)
        except NotUnderstood as reason:
            logger.debug("%s is read as it is: %s", node.name, reason)
            self.reasons.setdefault(node, f"{node.name} ({name or node.target}): {reason}")
            return self._unread(node, index, writer)

    def _unread(self, node: fx.Node, index: Index, writer: fx.Node | None) -> Value:
        if writer is not None and self.mutations.written_after(node, writer):
            raise Mutated(f"{described(node)} is written in place")
        read = self.read(node, index, writer)
        return as_bool(read) if self.dtype(node) == torch.bool else read
