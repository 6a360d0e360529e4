"""``flex_attention``: its two functions read as scale, soft cap, biases and masks.

Dynamo leaves ``score_mod`` and ``mask_mod`` as graphs of scalars (score, b, h, q, k, buffers). What they
add and hide is computed a second time beside the call, over views of ``arange`` in the place of the
indices, so that the prover reads it like any other mask. Those nodes have no readers of their own:
they go when the site has been decided, and the call itself stays unless the operators replace it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sparse_compiler.ir.report import Code, PassReport
from sparse_compiler.ir.site import example_of
from sparse_compiler.passes.axes import unread_form
from sparse_compiler.passes.context import PassContext
from sparse_compiler.passes.expand import Inserter
from sparse_compiler.passes.form import AttentionForm, MaskTerm
from sparse_compiler.passes.hidden import hides
from sparse_compiler.passes.opaque import first_output, is_item, keep_closed
from sparse_compiler.passes.operations import CASTS, operation
from sparse_compiler.passes.products import broadcast
from sparse_compiler.passes.remove_dead import remove_dead
from sparse_compiler.passes.sdpa import sdpa_form
from sparse_compiler.passes.symbolic_reader import argument, described, tensor_of
from sparse_compiler.passes.symbolic_tensor import Mutated, NotUnderstood, SymbolicTensors

__all__ = ["forget_flex", "is_flex", "match_flex", "read_flex"]

_READING = "sparse_compiler_flex"
_MADE = "sparse_compiler_flex_made"

_ELEMENTWISE = frozenset(
    {"add", "sub", "mul", "div", "truediv", "floordiv", "mod", "neg", "abs", "pow", "remainder"}
    | {"floor_divide", "true_divide", "minimum", "maximum", "clamp", "exp", "exp2", "log", "log2"}
    | {"sqrt", "tanh", "sin", "cos", "sign", "floor", "ceil", "round", "where", "masked_fill"}
    | {"le", "lt", "ge", "gt", "eq", "ne", "and_", "or_", "xor", "invert", "inv", "logical_and"}
    | {"logical_or", "logical_not", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_not"}
    | (CASTS | {"long", "int", "bool"})
)
_GATHERS = frozenset({"getitem", "index"})


def is_flex(node: fx.Node) -> bool:
    """Whether ``node`` calls the higher-order operator."""
    return node.op == "call_function" and node.target is torch.ops.higher_order.flex_attention


class _Unread(Exception):
    """The functions do something that the form cannot say; the text says what."""


@dataclass(frozen=True)
class _Score:
    """``softcap(factor * score) + terms``, the soft cap being ``cap * tanh(x / cap)``, 0 for none.

    Args:
        terms: (kind, node, factor) as of ``MaskTerm``; nodes [B|1, Hq|1, Lq|1, Lk|1].
        shifted: something that is the same for all pairs was added, which softmax cancels.
    """

    factor: float = 1.0
    cap: float = 0.0
    terms: tuple[tuple[Any, fx.Node, float], ...] = ()
    shifted: bool = False


def read_flex(gm: fx.GraphModule, ctx: PassContext) -> PassReport:
    """Emit what each call's functions add and hide, and note it, or a reason, on the call."""
    nodes = [n for n in gm.graph.nodes if is_flex(n)]
    tensors = ctx.tensors(gm)  # of the graph as it is now: it is asked for old nodes only
    for node in nodes:
        insert = Inserter(node)
        try:
            reading = _read(gm, node, insert, tensors)
        except _Unread as reason:
            insert.undo()
            keep_closed(node, Code.FLEX, str(reason))
            continue
        node.meta[_READING] = reading
        for made in insert.made:
            made.meta[_MADE] = True
    if nodes:
        ctx.edited()
    return PassReport("read_flex", touched=len(nodes))


def forget_flex(gm: fx.GraphModule, ctx: PassContext) -> PassReport:
    """Remove the nodes of ``read_flex`` that nobody reads, and its notes."""
    made = []
    for node in gm.graph.nodes:
        node.meta.pop(_READING, None)
        if node.meta.pop(_MADE, None):
            made.append(node)
    gone = remove_dead(gm.graph, made)[0]
    if gone:
        gm.recompile()
        ctx.edited()
    return PassReport("forget_flex", touched=gone)


def match_flex(node: fx.Node, tensors: SymbolicTensors) -> AttentionForm | None:
    """The form of a call that ``read_flex`` has read."""
    reading: _Score | None = node.meta.get(_READING)
    result = first_output(node)
    if reading is None or result is None:
        return None
    query, key, value = node.args[:3]
    given = {"query": query, "key": key, "value": value, "attn_mask": None, "dropout_p": 0.0}
    given |= {"is_causal": False, "scale": _scale(node, reading.factor), "enable_gqa": True}
    try:
        form = sdpa_form(result, given, tensors)
        axes = form.axes
        place = (axes.batch, axes.head, axes.query, axes.key)
        terms = [MaskTerm(k, broadcast(n, place, tensors), f) for k, n, f in reading.terms]
    except NotUnderstood as reason:
        return unread_form(result, result, tensors, (Code.SHAPES, str(reason)))
    unread = [user for user in node.users if user is not result]
    return replace(
        form,
        terms=tuple(terms),
        softcap=reading.cap,
        spelling="flex_attention",
        inner=(node, *unread),
    )


def _scale(node: fx.Node, factor: float) -> float:
    given = argument(node, 5, "scale")
    if isinstance(given, fx.Node):
        given = example_of(given)
    if given is None:
        query = tensor_of(node.args[0])  # type: ignore[arg-type]
        assert query is not None
        given = int(query.shape[-1]) ** -0.5
    return float(given) * factor


def _read(gm: fx.GraphModule, node: fx.Node, insert: Inserter, tensors: SymbolicTensors) -> _Score:
    if first_output(node) is None:
        raise _Unread("its result is not read")
    for user in node.users:
        if user.users and not is_item(user, 0):
            raise _Unread(
                "its log-sum-exp or maximum is read: call it without return_lse or return_aux"
            )
    operands = [tensor_of(o) if isinstance(o, fx.Node) else None for o in node.args[:3]]
    if any(o is None or o.dim() != 4 for o in operands):
        raise _Unread("q, k and v are not [B, heads, L, D]")
    blocks = node.args[4]
    _check_blocks(node, blocks, tensors)
    indices = _indices(node, insert)
    score = _Mod(_body(gm, node.args[3]), insert).run(
        (_Score(), *indices), argument(node, 7, "", ())
    )
    seen = _Mod(_body(gm, blocks[-1]), insert).run(indices, argument(node, 8, "", ()))  # type: ignore[index]
    if not isinstance(score, _Score):
        raise _Unread("score_mod gives something that does not depend on the score")
    if isinstance(seen, bool | int):
        if not seen:
            raise _Unread("mask_mod hides everything")
        return score
    if not isinstance(seen, fx.Node):
        raise _Unread("mask_mod gives no bool")
    return replace(score, terms=(*score.terms, ("keep", seen, 1.0)))


def _body(gm: fx.GraphModule, function: Any) -> fx.Graph:
    owner = gm.get_submodule(str(function.target)) if isinstance(function, fx.Node) else function
    if not isinstance(owner, fx.GraphModule):
        raise _Unread("its functions are no graphs")
    return owner.graph


def _check_blocks(node: fx.Node, blocks: Any, tensors: SymbolicTensors) -> None:
    """Raise unless the lists of blocks name one block that covers everything.

    Lists made by ``create_block_mask`` agree with ``mask_mod``; others need not, and the graph does not
    say who made them.
    """
    if not isinstance(blocks, tuple | list) or len(blocks) < 9:
        raise _Unread("its block lists have an unknown layout")
    counts, places, full = blocks[2], blocks[3], blocks[4]
    query, key = (tensor_of(o) for o in node.args[:2])  # type: ignore[arg-type]
    assert query is not None and key is not None
    covers = all(isinstance(size, int) and size >= 2**30 for size in (blocks[-3], blocks[-2]))
    if (
        full is None
        and covers
        and _is_constant(tensors, counts, 1)
        and _is_constant(tensors, places, 0)
    ):
        return
    raise _Unread(
        "its block lists cannot be shown to agree with mask_mod: leave block_mask out and hide pairs in "
        "score_mod, as torch.where(visible, score, -float('inf'))"
    )


def _is_constant(tensors: SymbolicTensors, node: Any, number: int) -> bool:
    if not isinstance(node, fx.Node) or tensor_of(node) is None:
        return False
    try:
        index = [tensors.new_index("i", size) for size in tensors.shape(node)]
        value: Any = tensors.evaluate(node, index)
    except (NotUnderstood, Mutated):
        return False
    return bool(value == number)


def _indices(node: fx.Node, insert: Inserter) -> tuple[fx.Node, ...]:
    """b, h, q and k as int64 tensors of rank 4."""
    query, key = node.args[:2]
    found = []
    for axis, source, dim in ((0, query, 0), (1, query, 1), (2, query, 2), (3, key, 2)):
        value = tensor_of(source)  # type: ignore[arg-type]
        assert value is not None
        size = value.shape[dim]
        count = size if isinstance(size, int) else insert("size", source, dim)
        line = insert(torch.arange, count, device=value.device)
        found.append(insert("reshape", line, [-1 if n == axis else 1 for n in range(4)]))
    return tuple(found)


class _Mod:
    """One function, evaluated for all (b, h, q, k) at once.

    Its scalars that depend on an index become tensors of rank 4 (``points``); what depends on none stays
    as it is; what depends on the score becomes a ``_Score``.
    """

    def __init__(self, body: fx.Graph, insert: Inserter) -> None:
        self.body, self.insert = body, insert
        self.points: set[fx.Node] = set()

    def run(self, scalars: tuple[Any, ...], buffers: Any) -> Any:
        self.points |= {s for s in scalars if isinstance(s, fx.Node)}
        inputs = [n for n in self.body.nodes if n.op == "placeholder"]
        given = (*scalars, *(buffers or ()))
        if len(inputs) != len(given):
            raise _Unread(f"a function of {len(inputs)} values is given {len(given)}")
        values: dict[fx.Node, Any] = dict(zip(inputs, given, strict=True))
        for node in self.body.nodes:
            if node.op == "output":
                result = node.args[0]
                return values.get(result, result) if isinstance(result, fx.Node) else result
            if node.op != "placeholder":
                values[node] = self._evaluate(node, values)
        raise _Unread("a function without a result")

    def _evaluate(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        name = operation(node) or ""
        constant = _constant(node, name)
        if constant is not None:
            return constant
        if node.op not in ("call_function", "call_method"):
            raise _Unread(f"{described(node)} is not read")
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        if any(isinstance(a, _Score) for a in (*args, *kwargs.values())):
            return self._scored(node, name, args, kwargs)
        inner = _nodes((args, kwargs))
        if not any(isinstance(n, fx.Node) and n in self.points for n in inner):
            return (
                self.insert(node.target, *args, **kwargs) if inner else _folded(node, args, kwargs)
            )
        if name not in _ELEMENTWISE | _GATHERS:
            raise _Unread(f"{described(node)} is no elementwise operation")
        value = tensor_of(node)
        if value is None or value.dim():
            raise _Unread(f"{described(node)} is no scalar")
        if name in _GATHERS and args[0] in self.points:
            raise _Unread(f"{described(node)} indexes an index")
        made = self.insert(node.target, *args, **kwargs)
        shape = tensor_of(made)
        if shape is None or shape.dim() != 4:
            raise _Unread(f"{described(node)} is not of rank 4 over all indices")
        self.points.add(made)
        return made

    # -- what is done to the score -----------------------------------------------------------------

    def _scored(self, node: fx.Node, name: str, args: tuple[Any, ...], kwargs: Any) -> _Score:
        if name in CASTS:
            value = tensor_of(node)
            if value is None or value.dtype not in (torch.float32, torch.float64):
                raise _Unread(f"{node.name} rounds the score")
            return args[0]
        handler = _ON_SCORES.get({"truediv": "div", "true_divide": "div"}.get(name, name))
        if handler is None or kwargs:
            raise _Unread(f"{described(node)} of the score")
        return handler(self, node, *args)

    def _add(self, node: fx.Node, left: Any, right: Any, sign: float = 1.0) -> _Score:
        score, other = (left, right) if isinstance(left, _Score) else (right, left)
        if isinstance(other, _Score) or (sign < 0 and score is right):
            raise _Unread(f"{described(node)} subtracts or adds scores")
        if not isinstance(other, int | float | fx.Node) or other in (math.inf, -math.inf):
            raise _Unread(f"{node.name} adds {other}")
        if not isinstance(other, fx.Node) or other not in self.points:
            return replace(score, shifted=True)
        value = tensor_of(other)
        if value is not None and not value.dtype.is_floating_point:
            other = self.insert("to", other, torch.float32)
        return replace(score, terms=(*score.terms, ("add", other, sign)))

    def _sub(self, node: fx.Node, left: Any, right: Any) -> _Score:
        return self._add(node, left, right, -1.0)

    def _mul(self, node: fx.Node, left: Any, right: Any) -> _Score:
        score, by = (left, right) if isinstance(left, _Score) else (right, left)
        if not isinstance(by, int | float) or not by > 0 or not math.isfinite(by):
            raise _Unread(f"{node.name} multiplies the score by {by}, which is no positive number")
        terms = tuple((k, n, f * by if k == "add" else f) for k, n, f in score.terms)
        return replace(score, factor=score.factor * by, cap=score.cap * by, terms=terms)

    def _div(self, node: fx.Node, left: Any, right: Any) -> _Score:
        if not isinstance(left, _Score) or not isinstance(right, int | float) or not right > 0:
            raise _Unread(f"{node.name} divides by or through something that is no positive number")
        return self._mul(node, left, 1.0 / right)

    def _tanh(self, node: fx.Node, score: Any) -> _Score:
        if score.cap or score.terms or score.shifted:
            raise _Unread(f"{node.name} is a second tanh, or one of a sum")
        return _Score(score.factor, 1.0)

    def _where(self, node: fx.Node, cond: Any, yes: Any, no: Any) -> _Score:
        if node.op == "call_method":
            cond, yes = yes, cond
        score, fill, kind = (yes, no, "keep") if isinstance(yes, _Score) else (no, yes, "drop")
        return self._filled(node, score, cond, fill, kind)

    def _masked_fill(self, node: fx.Node, score: Any, cond: Any, fill: Any) -> _Score:
        return self._filled(node, score, cond, fill, "drop")

    def _filled(self, node: fx.Node, score: Any, cond: Any, fill: Any, kind: str) -> _Score:
        if not isinstance(fill, int | float) or not hides(fill, 1.0, torch.float32):
            raise _Unread(
                f"{node.name} puts {fill} in the place of a score, which does not hide it"
            )
        if (
            not isinstance(score, _Score)
            or not isinstance(cond, fx.Node)
            or cond not in self.points
        ):
            raise _Unread(
                f"{node.name} hides by a condition that depends on no index, or on the score"
            )
        return replace(score, terms=(*score.terms, (kind, cond, 1.0)))


_ON_SCORES: dict[str, Callable[..., _Score]] = {
    "add": _Mod._add,
    "sub": _Mod._sub,
    "mul": _Mod._mul,
    "div": _Mod._div,
    "tanh": _Mod._tanh,
    "where": _Mod._where,
    "masked_fill": _Mod._masked_fill,
}


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, lambda n: found.append(n))
    return found


def _folded(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """A call of numbers alone."""
    function: Any = node.target
    if node.op != "call_function" or not all(isinstance(a, int | float) for a in args):
        raise _Unread(f"{described(node)} is not read")
    return function(*args, **kwargs)


def _constant(node: fx.Node, name: str) -> Any:
    """The number that a factory fills a scalar with; None if it is none."""
    value = tensor_of(node)
    if value is None or value.dim():
        return None
    stem = name.removesuffix("_like").removeprefix("new_")
    if stem in ("ones", "zeros"):
        number: Any = int(stem == "ones")
    elif stem in ("full", "tensor", "scalar_tensor"):
        at = {"tensor": 0, "scalar_tensor": 0, "new_tensor": 1, "new_full": 2}.get(name, 1)
        key = "fill_value" if stem == "full" else "data" if stem == "tensor" else "s"
        number = argument(node, at, key)
        if not isinstance(number, bool | int | float):
            return None
    else:
        return None
    if value.dtype == torch.bool:
        return bool(number)
    return float(number) if value.dtype.is_floating_point else int(number)
