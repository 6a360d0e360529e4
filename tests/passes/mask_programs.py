"""Attention masks recorded as graphs without Dynamo, and what is proved of them checked by values.

Recording a program takes a millisecond where Dynamo takes a second, so that many can be tried. The
graph is what Dynamo hands to a backend as far as the prover is concerned: calls of torch functions
and methods with fake values, sizes as SymInts.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode

from sparse_compiler.ir.mask import MaskFact, MaskProof, Proved
from sparse_compiler.passes.bias import emit_bias
from sparse_compiler.passes.emit_mask import emit_bounds, emit_padding
from sparse_compiler.passes.form import Axes, Element, MaskTerm
from sparse_compiler.passes.grid import Place
from sparse_compiler.passes.prove_mask import MaskProver
from sparse_compiler.passes.symbolic_tensor import SymbolicTensors

NEVER = -1e29


class _Recorder(TorchFunctionMode):
    """Writes every torch call on fake tensors into a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Any] = []

    def place(self, value: torch.Tensor, node: fx.Node) -> None:
        node.meta["example_value"] = value
        self.nodes[id(value)] = node
        self.alive.append(value)

    def node(self, value: Any) -> Any:
        return self.nodes.get(id(value), value) if isinstance(value, torch.Tensor) else value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        reads = name in ("__get__", "size", "dim", "numel", "stride", "is_floating_point")
        if reads and not isinstance(result, torch.Tensor):
            return result
        mapped_args = torch.utils._pytree.tree_map(self.node, tuple(args))
        mapped_kwargs = torch.utils._pytree.tree_map(self.node, dict(kwargs))
        if name == "__setitem__":
            self.graph.call_function(operator.setitem, mapped_args, {})
            return result
        if name == "__get__":  # an attribute such as mT
            attribute = func.__self__.__name__
            node = self.graph.call_function(getattr, (mapped_args[0], attribute))
        elif name == "__getitem__":
            node = self.graph.call_function(operator.getitem, mapped_args)
        elif getattr(torch.Tensor, name, None) is func:
            node = self.graph.call_method(name, mapped_args, mapped_kwargs)
        else:
            node = self.graph.call_function(func, mapped_args, mapped_kwargs)
        if isinstance(result, torch.Tensor):
            self.place(result, node)
        elif isinstance(result, tuple | list):
            node.meta["example_value"] = result
            for n, part in enumerate(result):
                if isinstance(part, torch.Tensor):
                    self.place(part, self.graph.call_function(operator.getitem, (node, n)))
        return result


class Recorded:
    """The graph of ``terms(*inputs)`` and the proof of what the terms mean.

    Args:
        program: gives a list of (kind, tensor [B|1, H|1, Lq|1, Lk|1] or fewer dimensions), the
            tensors as `MaskTerm` takes them.
        inputs: real tensors for one call; the first is the query [B, H, Lq, D], the second the key.
        dynamic: sizes of the batch and the lengths are symbols.
    """

    def __init__(
        self,
        program: Callable[..., list[tuple[str, torch.Tensor]]],
        inputs: tuple[torch.Tensor, ...],
        dynamic: bool = False,
        is_causal: bool = False,
    ) -> None:
        self.program, self.dynamic = program, dynamic
        self.graph = fx.Graph()
        # With fixed sizes the tensors are real ones: faster, and nobody looks at their values.
        self.shape_env = ShapeEnv() if dynamic else None
        self.checked = 0
        fake_mode = FakeTensorMode(shape_env=self.shape_env) if dynamic else None
        mode: Any = fake_mode or contextlib.nullcontext()
        recorder = _Recorder(self.graph)
        fakes = []
        self.symbols: list[tuple[sympy.Symbol, int, int]] = []
        shared: dict[int, Any] = {}
        for n, real in enumerate(inputs):
            fakes.append(self._fake(mode, n, real, shared))
            recorder.place(fakes[-1], self.graph.placeholder(f"x{n}"))
        with mode, recorder:
            terms = program(*fakes)
        tensors = SymbolicTensors(self.graph)
        q, k = fakes[:2]
        sizes = tuple(tensors.size(s) for s in (*q.shape[:3], k.shape[2], q.shape[3], q.shape[3]))
        names = "bhqkdv"
        symbols = [tensors.new_index(n, s) for n, s in zip(names, sizes, strict=True)]
        self.axes = Axes(*symbols, sizes)
        self.terms = []
        for kind, tensor in terms:
            node = recorder.nodes[id(tensor)]
            rank = tensor.dim()
            self.terms.append(MaskTerm(kind, Element(node, tuple(symbols[4 - rank : 4]))))
        self.tensors = tensors
        self.prover = MaskProver(tensors)
        self.is_causal = is_causal
        self.proof: MaskProof = self.prover.prove_form(self.axes, tuple(self.terms), is_causal)
        self.outputs: dict[str, fx.Node] = {}
        self._free = tuple(
            next((k for k, v in self.symbols_at.items() if v == s), None) for s in sizes
        )
        if isinstance(self.proof, Proved):
            self._emit(self.proof.fact)

    def _fake(self, mode: Any, number: int, real: torch.Tensor, shared: dict[int, Any]) -> Any:
        if not self.dynamic:
            self.symbols_at = {}
            copy = real.clone()
            is_parameter = isinstance(real, torch.nn.Parameter)
            return torch.nn.Parameter(copy, requires_grad=False) if is_parameter else copy
        kinds = [
            DimDynamic.DUCK if dim not in self._fixed(number, real) else DimDynamic.STATIC
            for dim in range(real.dim())
        ]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        from torch._dynamo.source import ConstantSource

        fake = mode.from_tensor(real, symbolic_context=context, source=ConstantSource(f"x{number}"))
        for dim, size in enumerate(fake.shape):
            if isinstance(size, torch.SymInt):
                self.symbols.append((size.node.expr, number, dim))
        self.symbols_at = {s: (n, d) for s, n, d in reversed(self.symbols)}
        return fake

    @staticmethod
    def _fixed(number: int, real: torch.Tensor) -> tuple[int, ...]:
        return (1, 3) if number < 2 else tuple(d for d in range(real.dim()) if real.shape[d] == 1)

    def size_of(self, expr: Any) -> Any:
        """An int or a node that holds a size, as the compiler's own would give."""
        if isinstance(expr, int):
            return expr
        if isinstance(expr, sympy.Integer):
            return int(expr)
        value = self._symint(expr)
        node = self.graph.call_function(_constant_size, (value,))
        node.meta["example_value"] = value
        return node

    def _symint(self, expr: sympy.Expr) -> Any:
        assert self.shape_env is not None
        return self.shape_env.create_symintnode(expr, hint=None)

    def _emit(self, fact: MaskFact) -> None:
        place = Place(self.graph, self.tensors, self.axes, self.size_of, "cpu")
        emitters = {"padding": emit_padding, "bounds": emit_bounds, "bias": emit_bias}
        for name, emitter in emitters.items():
            node = emitter(place, fact)
            if node is not None:
                self.outputs[name] = node
        if fact.offset_is_read:
            self.outputs["offset"] = place.emit(fact.band.q_offset, "")

    # -- running ---------------------------------------------------------------------------------

    def check(self, inputs: tuple[torch.Tensor, ...]) -> None:
        """Compares the emitted band, padding, bounds and bias with the real terms."""
        assert isinstance(self.proof, Proved)
        known = {s: inputs[n].shape[d] for s, n, d in self.symbols}
        if not self._guards_hold(known):
            return  # the compiler would trace again for these sizes
        self.checked += 1
        env = _run(self.graph, [x.clone() for x in inputs], known)
        found = {name: env[node] for name, node in self.outputs.items()}
        for name, node in self.outputs.items():
            fake = node.meta["example_value"]
            assert fake.dtype == found[name].dtype
            assert fake.dim() == found[name].dim()
        batch, heads, num_q, num_k = (
            int(sympy.sympify(s).subs(known)) for s in self.axes.sizes[:4]
        )
        shape = (batch, heads, num_q, num_k)
        visible, bias = _by_fact(self.proof.fact, found, shape, known)
        real_visible, real_bias = self._real(inputs, shape)
        assert torch.equal(visible, real_visible), (self.proof, visible.int(), real_visible.int())
        if self.proof.fact.row_shift or self.proof.fact.bias or real_bias.any():
            _same_weights(bias, real_bias, visible)

    def _guards_hold(self, known: dict[Any, int]) -> bool:
        if self.shape_env is None:
            return True
        guards = [g.expr.xreplace(known) for g in self.shape_env.guards]
        fixed = self.shape_env.replacements.items()
        guards += [sympy.Eq(s.xreplace(known), e.xreplace(known)) for s, e in fixed]
        return not any(g is sympy.false or g == sympy.false for g in guards)

    def _real(self, inputs: tuple[torch.Tensor, ...], shape: Any) -> Any:
        visible = torch.ones(shape, dtype=torch.bool)
        bias = torch.zeros(shape, dtype=torch.float64)
        for kind, value in self.program(*(x.clone() for x in inputs)):
            if kind == "add":
                value = value.double().expand(shape)
                visible &= ~(value <= NEVER)
                bias += torch.where(value <= NEVER, 0.0, value)
            else:
                visible &= (value if kind == "keep" else ~value).expand(shape)
        if self.is_causal:
            visible &= torch.ones(shape[2:], dtype=torch.bool).tril()
        return visible, bias


def _constant_size(value: Any) -> Any:
    return value


def _run(graph: fx.Graph, inputs: list[torch.Tensor], known: dict[Any, int]) -> dict[Any, Any]:
    """Runs the graph node by node, SymInts replaced by their values."""
    env: dict[fx.Node, Any] = {}
    queue = iter(inputs)

    def real(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return env[value]
        if isinstance(value, torch.SymInt):
            return int(value.node.expr.subs(known))
        return value

    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = next(queue)
            continue
        args, kwargs = (
            torch.utils._pytree.tree_map(real, fx.node.map_aggregate(part, real))
            for part in (node.args, node.kwargs)
        )
        kwargs = {k: "cpu" if k == "device" else v for k, v in kwargs.items()}
        if node.op == "call_method":
            env[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            env[node] = node.target(*args, **kwargs)
    return env


def _by_fact(fact: MaskFact, found: dict[str, Any], shape: Any, known: Any) -> Any:
    batch, heads, num_q, num_k = shape
    keys = torch.arange(num_k)
    band = fact.band

    def size(value: Any) -> int:
        return int(sympy.sympify(value).subs(known))

    if "offset" in found:
        assert found["offset"].dtype == torch.int64
        assert found["offset"].dim() == 0
        rows = torch.arange(num_q) + found["offset"]
    else:
        rows = torch.arange(num_q) + size(band.q_offset)
    visible = torch.ones(num_q, num_k, dtype=torch.bool)
    if band.left is not None:
        visible &= keys >= rows[:, None] - size(band.left)
    if band.right is not None:
        visible &= keys <= rows[:, None] + size(band.right)
    visible = visible.expand(batch, num_q, num_k)
    if "padding" in found:
        assert found["padding"].dtype == torch.bool
        assert found["padding"].shape in ((batch, num_k), (1, num_k))
        visible = visible & found["padding"][:, None]
    if "bounds" in found:
        bounds = found["bounds"]
        assert bounds.dtype == torch.int32
        assert bounds.shape in ((batch, num_q, 2), (1, num_q, 2))
        low, high = bounds[..., 0, None], bounds[..., 1, None]
        visible = visible & (keys >= low) & (keys <= high)
    visible = visible[:, None].expand(shape)
    bias = torch.zeros(shape, dtype=torch.float64)
    if "bias" in found:
        given = found["bias"].double()
        if given.dim() == 2:
            assert given.shape[0] in (1, heads)
            assert given.shape[1] == num_q + num_k - 1
            at = keys[None] - torch.arange(num_q)[:, None] + num_q - 1
            given = given[:, at][None]
        assert given.shape[3] == num_k
        # What the bias hides it hides; the rest of the fact need not say so again.
        visible = visible & ~(given.expand(shape) <= NEVER)
        bias = torch.where(given.expand(shape) <= NEVER, 0.0, given)
    return visible, bias


def _same_weights(bias: torch.Tensor, real: torch.Tensor, visible: torch.Tensor) -> None:
    """The biases differ by the same number for all the visible keys of a row."""
    apart = (bias - real).masked_fill(~visible, float("nan"))
    first = apart.nan_to_num(-float("inf")).amax(-1, keepdim=True)
    first = first.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    scale = 1.0 + real.masked_fill(~visible, 0.0).abs().max()
    wrong = ((apart - first).abs() > 1e-5 * scale) & visible
    assert not wrong.any(), (bias, real)
