"""Views as rewritings of the index: element `index` of a view is which element of its source?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.passes.symbolic_reader import (
    Index,
    SymbolicReader,
    argument,
    tensor_of,
)
from sparse_compiler.passes.symbolic_values import NotUnderstood, floor_divide, modulo

__all__ = ["VIEWS", "View"]

View = Callable[[SymbolicReader, fx.Node, Index], tuple[fx.Node, Index]]
_ZERO = sympy.Integer(0)


def _source(node: fx.Node) -> fx.Node:
    source = argument(node, 0, "input")
    if not isinstance(source, fx.Node) or tensor_of(source) is None:
        raise NotUnderstood("the source is not a tensor")
    return source


def _numbers(node: fx.Node, name: str) -> list[int]:
    """Dimension arguments given one by one or as a tuple; all plain ints."""
    given: Any = node.args[1:] or (node.kwargs.get(name, ()),)
    if len(given) == 1 and isinstance(given[0], Sequence):
        given = given[0]
    if not all(isinstance(g, int) and not isinstance(g, bool) for g in given):
        raise NotUnderstood(f"{name} is not a list of ints")
    return list(given)


def _dim(value: Any, rank: int) -> int:
    if not isinstance(value, int) or not -rank <= value < rank:
        raise NotUnderstood(f"dimension {value} of {rank}")
    return value % rank


# -- dimensions that come, go and change places ------------------------------------------------


def _expand(reader: SymbolicReader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    source = _source(node)
    inner, outer = reader.shape(source), reader.shape(node)
    for old, new in zip(reversed(inner), reversed(outer), strict=False):
        if old not in (1, new):
            raise NotUnderstood(f"sizes {old} and {new} may differ")
    place = index[len(index) - len(inner) :]
    return source, tuple(_ZERO if n == 1 else i for i, n in zip(place, inner, strict=True))


def _unsqueeze(reader: SymbolicReader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    dim = _dim(argument(node, 1, "dim"), len(index))
    return _source(node), index[:dim] + index[dim + 1 :]


def _squeeze(reader: SymbolicReader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    source = _source(node)
    shape = reader.shape(source)
    chosen = [_dim(d, len(shape)) for d in _numbers(node, "dim")] if _has_dim(node) else None
    dims = range(len(shape)) if chosen is None else chosen
    gone = {d for d in dims if shape[d] == 1}
    if len(shape) - len(gone) != len(index):
        raise NotUnderstood("which dimensions go depends on a size")
    rest = iter(index)
    return source, tuple(_ZERO if d in gone else next(rest) for d in range(len(shape)))


def _has_dim(node: fx.Node) -> bool:
    return len(node.args) > 1 or "dim" in node.kwargs


def _transpose(reader: SymbolicReader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    a, b = (_dim(argument(node, n, f"dim{n - 1}"), len(index)) for n in (1, 2))
    place = list(index)
    place[a], place[b] = place[b], place[a]
    return _source(node), tuple(place)


def _transpose_last(reader: SymbolicReader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    if len(index) < 2:
        return _source(node), index
    return _source(node), (*index[:-2], index[-1], index[-2])


def _attribute(reader: SymbolicReader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    name = argument(node, 1, "name")
    if name == "T":
        return _source(node), index[::-1]
    if name == "mT":
        return _transpose_last(reader, node, index)
    raise NotUnderstood(f"the attribute {name}")


def _permute(reader: SymbolicReader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    dims = [_dim(d, len(index)) for d in _numbers(node, "dims")]
    place: list[sympy.Expr] = [_ZERO] * len(index)
    for position, dim in enumerate(dims):
        place[dim] = index[position]
    return _source(node), tuple(place)


def _flip(reader: SymbolicReader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    place, shape = list(index), reader.shape(node)
    for dim in (_dim(d, len(index)) for d in _numbers(node, "dims")):
        place[dim] = shape[dim] - 1 - place[dim]
    return _source(node), tuple(place)


# -- repetition --------------------------------------------------------------------------------


def _repeat(reader: SymbolicReader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    source = _source(node)
    inner, outer = reader.shape(source), reader.shape(node)
    place = []
    for i, old, new in zip(
        index[len(index) - len(inner) :], inner, outer[len(outer) - len(inner) :], strict=True
    ):
        place.append(i if old == new else _ZERO if old == 1 else _apart(reader, i, old)[1])
    return source, tuple(place)


def _repeat_interleave(
    reader: SymbolicReader, node: fx.Node, index: Index
) -> tuple[fx.Node, Index]:
    repeats, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(repeats, int) or dim is None:
        raise NotUnderstood("repeats that are not one number along one dimension")
    dim = _dim(dim, len(index))
    quotient = _apart(reader, index[dim], sympy.Integer(repeats))[0]
    return _source(node), (*index[:dim], quotient, *index[dim + 1 :])


# -- reshaping ---------------------------------------------------------------------------------


def _reshape(reader: SymbolicReader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    if any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
        raise NotUnderstood("a view as another dtype")
    source = _source(node)
    inner, outer = reader.shape(source), reader.shape(node)
    # Layers of equal sizes ask the same.
    key = ("reshape", inner, outer, index)
    if key not in reader.shared:
        reader.shared[key] = reshape_index(reader, inner, outer, index)
    return source, reader.shared[key]


def reshape_index(reader: SymbolicReader, inner: Index, outer: Index, index: Index) -> Index:
    """Where element `index` of a row-major [outer] lies in a row-major [inner].

    Dimensions are cut into the smallest groups of equal products, so sizes that pass unchanged
    need no arithmetic and may be symbolic.
    """
    if any(size == 0 for size in (*inner, *outer)):
        raise NotUnderstood("an empty tensor is reshaped")
    old = [n for n, size in enumerate(inner) if size != 1]
    new = [n for n, size in enumerate(outer) if size != 1]
    place: list[sympy.Expr] = [_ZERO] * len(inner)
    for old_group, new_group in _groups([inner[n] for n in old], [outer[n] for n in new]):
        dims = [old[n] for n in old_group]
        flat, stride = _ZERO, sympy.Integer(1)
        for n in reversed(new_group):
            flat, stride = flat + index[new[n]] * stride, stride * outer[new[n]]
        for position, value in zip(
            dims, _split(reader, flat, [inner[d] for d in dims]), strict=True
        ):
            place[position] = value
    return tuple(place)


def _groups(old: list[sympy.Expr], new: list[sympy.Expr]) -> list[tuple[range, range]]:
    """Cuts two shapes without ones where their products so far agree."""
    groups: list[tuple[range, range]] = []
    old_prefix, new_prefix = _prefixes(old), _prefixes(new)
    i = j = 0
    while i < len(old) or j < len(new):
        match = _next_match(old_prefix[i + 1 :], new_prefix[j + 1 :])
        if match is None:
            raise NotUnderstood(f"cannot match sizes {old} and {new}")
        end_i, end_j = i + 1 + match[0], j + 1 + match[1]
        groups.append((range(i, end_i), range(j, end_j)))
        i, j = end_i, end_j
    return groups


def _prefixes(sizes: list[sympy.Expr]) -> list[sympy.Expr]:
    products: list[sympy.Expr] = [sympy.Integer(1)]
    for size in sizes:
        products.append(sympy.expand(products[-1] * size))
    return products


def _next_match(old: list[sympy.Expr], new: list[sympy.Expr]) -> tuple[int, int] | None:
    for i, product in enumerate(old):
        if product in new:
            return i, new.index(product)
    return None


def _split(reader: SymbolicReader, flat: sympy.Expr, sizes: list[sympy.Expr]) -> list[sympy.Expr]:
    """The row-major digits of `flat` in the mixed radix `sizes`."""
    digits: list[sympy.Expr] = []
    rest = flat
    for position, size in enumerate(reversed(sizes)):
        last = position == len(sizes) - 1
        quotient, remainder = _divide(reader, rest, size) if not last else (_ZERO, rest)
        digits.append(remainder)
        rest = quotient
    return digits[::-1]


def _divide(
    reader: SymbolicReader, value: sympy.Expr, by: sympy.Expr
) -> tuple[sympy.Expr, sympy.Expr]:
    """Quotient and remainder; simple where `value` was merged as ``a * by + b`` with b < by."""
    whole, rest = _ZERO, _ZERO
    for term in sympy.Add.make_args(sympy.expand(value)):
        quotient = term / by
        if quotient.is_integer and not quotient.atoms(sympy.Pow):
            whole += quotient
        else:
            rest += term
    if rest == 0 or reader.within(rest, by):
        return whole, rest
    return floor_divide(value, by), modulo(value, by)


def _apart(reader: SymbolicReader, value: sympy.Expr, by: sympy.Expr) -> Index:
    """As `_divide`; only of sums, where there is something to come apart."""
    sums = isinstance(value, sympy.Add)
    return _divide(reader, value, by) if sums else (floor_divide(value, by), modulo(value, by))


# -- indexing ----------------------------------------------------------------------------------


def _getitem(reader: SymbolicReader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    source = _source(node)
    shape = reader.shape(source)
    items = _full_items(argument(node, 1, "indices"), len(shape))
    advanced = [n for n, item in enumerate(items) if _is_tensor(item)]
    if advanced:
        return source, _gather(reader, items, shape, reader.shape(node), index)
    rest, place, dims = iter(index), [], iter(shape)
    for item in items:
        if item is None:
            next(rest)
        elif isinstance(item, slice):
            place.append(_slice(reader, item, next(dims), next(rest)))
        else:
            place.append(_wrap(reader, reader.size(item), next(dims)))
    return source, tuple(place)


def _is_tensor(item: Any) -> bool:
    return isinstance(item, fx.Node) and tensor_of(item) is not None


def _full_items(given: Any, rank: int) -> list[Any]:
    """The items of an indexing expression with the ellipsis written out."""
    items = list(given) if isinstance(given, tuple) else [given]
    for item in items:
        if isinstance(item, bool | list | tuple):
            raise NotUnderstood(f"an index of type {type(item).__name__}")
    consumed = sum(item is not None and item is not Ellipsis for item in items)
    fill = [slice(None)] * (rank - consumed)
    at = next((n for n, item in enumerate(items) if item is Ellipsis), len(items))
    return items[:at] + fill + items[at + 1 :]


def _slice(reader: SymbolicReader, item: slice, size: sympy.Expr, index: sympy.Expr) -> sympy.Expr:
    step = 1 if item.step is None else item.step
    if not isinstance(step, int) or step < 1:
        raise NotUnderstood(f"a slice with step {step}")
    if item.start is None:
        return index * step
    start = reader.size(item.start)
    if isinstance(start, sympy.Integer) and isinstance(size, sympy.Integer):
        start = sympy.Integer(slice(int(start), None, 1).indices(int(size))[0])
    elif isinstance(start, sympy.Integer) and start < 0:
        if not reader.certain(sympy.Ge(size + start, 0, evaluate=False)):
            raise NotUnderstood(f"the slice may start before the first of {size}")
        start = size + start
    elif not reader.certain(sympy.Ge(start, 0, evaluate=False)):
        raise NotUnderstood(f"the slice start {start} may be negative")
    # A start beyond the end leaves nothing to read, so clamping it changes no element.
    return start + index * step


def _wrap(reader: SymbolicReader, value: sympy.Expr, size: sympy.Expr) -> sympy.Expr:
    """An index that counts from the end if negative; its sign must be certain."""
    if reader.within(value, size):
        return value
    if reader.within(value + size, size):
        return value + size
    raise NotUnderstood(f"the index {value} may lie outside of {size}")


def _gather(
    reader: SymbolicReader, items: list[Any], shape: Index, result: Index, index: Index
) -> Index:
    """The place read by an index with tensors in it (numpy's rules; ints count as tensors)."""
    ranks = []
    for item in items:
        tensor = tensor_of(item) if _is_tensor(item) else None
        if tensor is not None:
            if tensor.dtype not in (torch.int64, torch.int32):
                raise NotUnderstood(f"an index tensor of {tensor.dtype}")
            ranks.append(tensor.dim())
    rank = max(ranks)
    kinds = [not (item is None or isinstance(item, slice)) for item in items]
    first, last = kinds.index(True), len(kinds) - 1 - kinds[::-1].index(True)
    adjacent = all(kinds[first : last + 1])
    at = first if adjacent else 0
    gathered, rest = index[at : at + rank], iter(index[:at] + index[at + rank :])
    place, dims = [], iter(shape)
    for item in items:
        if item is None:
            next(rest)
        elif isinstance(item, slice):
            place.append(_slice(reader, item, next(dims), next(rest)))
        else:
            value: Any = reader.evaluate_scalar(item, gathered)
            sizes = reader.shape(item) if _is_tensor(item) else ()
            for size, full in zip(reversed(sizes), reversed(result[at : at + rank]), strict=False):
                if size not in (1, full):
                    raise NotUnderstood(f"index tensors of sizes {size} and {full}")
            place.append(_wrap(reader, value, next(dims)))
    return tuple(place)


def _select(reader: SymbolicReader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    source = _source(node)
    shape = reader.shape(source)
    dim = _dim(argument(node, 1, "dim"), len(shape))
    at = _wrap(reader, reader.size(argument(node, 2, "index")), shape[dim])
    return source, (*index[:dim], at, *index[dim:])


def _narrow(reader: SymbolicReader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    source = _source(node)
    shape = reader.shape(source)
    dim = _dim(argument(node, 1, "dim"), len(shape))
    start = argument(node, 2, "start")
    if _is_tensor(start):
        raise NotUnderstood("a start in a tensor")
    at = _slice(reader, slice(start, None), shape[dim], index[dim])
    return source, (*index[:dim], at, *index[dim + 1 :])


def _aten_slice(reader: SymbolicReader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    source = _source(node)
    dim = _dim(argument(node, 1, "dim", 0), len(index))
    item = slice(argument(node, 2, "start"), None, argument(node, 4, "step", 1))
    at = _slice(reader, item, reader.shape(source)[dim], index[dim])
    return source, (*index[:dim], at, *index[dim + 1 :])


VIEWS: dict[str, View] = {
    "slice": _aten_slice,
    "expand": _expand,
    "expand_as": _expand,
    "broadcast_to": _expand,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "swapdims": _transpose,
    "t": _transpose_last,
    "adjoint": _transpose_last,
    "getattr": _attribute,
    "permute": _permute,
    "flip": _flip,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "view": _reshape,
    "reshape": _reshape,
    "view_as": _reshape,
    "reshape_as": _reshape,
    "_unsafe_view": _reshape,
    "flatten": _reshape,
    "unflatten": _reshape,
    "ravel": _reshape,
    "getitem": _getitem,
    "__getitem__": _getitem,
    "select": _select,
    "narrow": _narrow,
}
