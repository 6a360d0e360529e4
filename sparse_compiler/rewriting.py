"""``rewrite``: the passes over a program that ``torch.export`` or ``make_fx`` made.

Such programs are graphs of ATen operators with fake values in ``meta["val"]``, where Dynamo's have torch
functions and methods. What the passes emit is traced once more, so that the result holds overloads of
operators only; tensors that they add become constants of the program.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_compiler.backend import act_on_declines, build_context, emit_artifact, parse_options
from sparse_compiler.ir.report import Report
from sparse_compiler.passes.aten import Spellings
from sparse_compiler.passes.manager import copied, run_pipeline
from sparse_compiler.runtime.requester import name_sites

__all__ = ["rewrite", "rewrite_and_report"]

Program = TypeVar("Program", ExportedProgram, fx.GraphModule)

_INHERITED = ("nn_module_stack", "stack_trace", "torch_fn")


def rewrite(program: Program, *, options: Mapping[str, Any] | None = None) -> Program:
    """A program of the same kind, with attention by the operators where that was proved right.

    It is for inference: no gradient flows through the operators, and an exported program does not say
    whether one will be asked for.
    Before a saved program is loaded again, ``sparse_compiler.ops`` and an executor must have been
    imported (``import sparse_compiler.backend``).

    Args:
        program: exported, or a graph of ATen operators with fake values in ``meta["val"]``; unchanged.
        options: as for ``torch.compile(..., backend="minference", options=...)``.
    Raises:
        OptionInvalid: an option is wrong.
        SiteDeclined: an unexpected decline while ``fallback='error'``.
    """
    return rewrite_and_report(program, options=options)[0]


def rewrite_and_report(
    program: Program, *, options: Mapping[str, Any] | None = None
) -> tuple[Program, Report]:
    """As ``rewrite``, and what was decided for each attention."""
    config = parse_options({**(options or {}), "inner": "eager"})
    source = program.graph_module if isinstance(program, ExportedProgram) else program
    gm = copied(source)
    ctx = build_context(gm, config)
    checks, spellings = _Checks(gm.graph), Spellings(gm.graph)
    run_pipeline(gm, ctx)
    spellings.restore()
    checks.restore()
    report = ctx.report
    name_sites({s.number: s.layer or s.name for s in report.sites if s.number >= 0})
    emit_artifact(report)
    act_on_declines(ctx, list(program.parameters()))
    if config.dryrun:
        return program, report
    if isinstance(program, ExportedProgram):
        return _exported(program, gm), report
    if any("val" in n.meta for n in gm.graph.nodes):
        _to_aten(gm)
    gm.graph.lint()
    gm.recompile()
    return gm, report


class _Checks:
    """Nodes without a result that check inputs and metadata of tensors, taken out for a while.

    They look at tensors of which nothing else may be left after the passes, and a call of a module could
    write to its arguments for all that the passes know.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.taken: list[tuple[fx.Node, str, Any, Any, Any, dict[str, Any]]] = []
        for node in list(graph.nodes):
            if node.users or not _is_check(node):
                continue
            kept = node.op, node.target, node.args, node.kwargs, dict(node.meta)
            self.taken.append((node.prev, *kept))
            graph.erase_node(node)

    def restore(self) -> None:
        """Put back those whose tensors are still computed."""
        if not self.taken:
            return
        order = list(self.graph.nodes)
        inputs = [n for n in order if n.op == "placeholder"]
        alive = set(order)
        for _, kind, target, args, kwargs, meta in self.taken:
            read: list[fx.Node] = []
            fx.map_arg((args, kwargs), lambda n, read=read: read.append(n))
            if not all(n in alive and (n.users or n.op == "placeholder") for n in read):
                continue
            last = max([*inputs, *read])
            with self.graph.inserting_after(last):
                node = self.graph.create_node(kind, target, args, kwargs)
            node.meta.update(meta)


def _is_check(node: fx.Node) -> bool:
    if node.op == "call_module":
        return str(node.target) == "_guards_fn"
    return node.target is torch.ops.aten._assert_tensor_metadata.default


# -- exported programs -------------------------------------------------------------------------------


def _exported(program: ExportedProgram, gm: fx.GraphModule) -> ExportedProgram:
    """The program around an edited graph: constants lifted to inputs, names brought up to date."""
    old = program.graph_signature
    lifted = _lift(gm, {s.arg.name for s in old.input_specs if s.kind == InputKind.USER_INPUT})
    _to_aten(gm)
    gm.graph.lint()
    gm.recompile()
    specs = {s.arg.name: s for s in old.input_specs}
    added = {
        name: InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name), target)
        for name, (target, _) in lifted.items()
    }
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    outputs = [
        _renamed(s, node) for s, node in zip(old.output_specs, _results(gm.graph), strict=True)
    ]
    signature = ExportGraphSignature(
        input_specs=[specs.get(name) or added[name] for name in names], output_specs=outputs
    )
    constants = {**program.constants, **dict(lifted.values())}
    return ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=_module_calls(program, old, outputs),
        example_inputs=program.example_inputs,
        constants=constants,
        verifiers=program.verifiers,
    )


def _lift(gm: fx.GraphModule, inputs: set[str]) -> dict[str, tuple[str, torch.Tensor]]:
    """Make inputs of the tensors that the passes registered, before the user's own.

    Returns:
        For each new input (name of the attribute, tensor).
    """
    first = next((n for n in gm.graph.nodes if n.name in inputs or n.op != "placeholder"), None)
    made: dict[str, fx.Node] = {}
    for node in [n for n in gm.graph.nodes if n.op == "get_attr" and "val" not in n.meta]:
        target = str(node.target)
        if not isinstance(getattr(gm, target, None), torch.Tensor):
            continue
        if target not in made:
            assert first is not None
            with gm.graph.inserting_before(first):
                made[target] = gm.graph.placeholder(f"c_{target.lstrip('_')}")
            made[target].meta["val"] = node.meta["example_value"]
        node.replace_all_uses_with(made[target])
        gm.graph.erase_node(node)
    found = {}
    for target, node in made.items():
        found[node.name] = (target, getattr(gm, target))
        delattr(gm, target)
    return found


def _results(graph: fx.Graph) -> Sequence[Any]:
    output = next(n for n in reversed(list(graph.nodes)) if n.op == "output")
    return output.args[0] if isinstance(output.args[0], list | tuple) else (output.args[0],)


def _renamed(spec: OutputSpec, node: Any) -> OutputSpec:
    if not isinstance(node, fx.Node) or spec.arg.name == node.name:
        return spec
    return replace(spec, arg=replace(spec.arg, name=node.name))


def _module_calls(
    program: ExportedProgram, old: ExportGraphSignature, new: list[OutputSpec]
) -> Any:
    """The module call graph with renamed outputs of the whole program."""
    names = {o.arg.name: n.arg.name for o, n in zip(old.output_specs, new, strict=True)}
    calls = copy.deepcopy(program.module_call_graph)
    for call in calls:
        if call.fqn == "" and call.signature is not None:
            for argument in call.signature.outputs:
                argument.name = names.get(argument.name, argument.name)
    return calls


# -- operators only ----------------------------------------------------------------------------------


def _to_aten(gm: fx.GraphModule) -> None:
    """Trace again what the passes emitted, run by run; ``meta["val"]`` on every node afterwards."""
    run: list[fx.Node] = []
    for node in list(gm.graph.nodes):
        # Only what the passes emit has an example value in such a program.
        if node.op in ("call_function", "call_method") and "example_value" in node.meta:
            run.append(node)
            continue
        if run:
            _retrace(gm, run)
            run = []
    for node in gm.graph.nodes:
        if "example_value" in node.meta:
            example = node.meta.pop("example_value")
            node.meta.setdefault("val", example)


def _retrace(gm: fx.GraphModule, run: list[fx.Node]) -> None:
    """Replace neighbouring nodes by the operators that they call."""
    inside = set(run)
    inputs = list(dict.fromkeys(i for n in run for i in n.all_input_nodes if i not in inside))
    outputs = [n for n in run if any(user not in inside for user in n.users)]

    def function(*values: Any) -> tuple[Any, ...]:
        known: dict[fx.Node, Any] = dict(zip(inputs, values, strict=True))
        for node in run:
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            if node.op == "call_method":
                known[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return tuple(known[node] for node in outputs)

    values = [_value(node) for node in inputs]
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)
    if mode is None:
        raise RuntimeError(f"{run[0].name}: the program has no fake values in meta['val']")
    # Within the mode of the program sizes stay symbols; outside of it they would become numbers. The
    # tracer asks whether results are contiguous for its notes, which must not bind sizes to the answer:
    # what the nodes need was asked, and noted, when they were emitted.
    env = mode.shape_env
    with mode, contextlib.nullcontext() if env is None else env.suppress_guards():
        traced = make_fx(function, pre_dispatch=True)(*values)
    _inline(gm, traced, run, inputs, outputs)


def _inline(
    gm: fx.GraphModule,
    traced: fx.GraphModule,
    run: list[fx.Node],
    inputs: list[fx.Node],
    outputs: list[fx.Node],
) -> None:
    meta = next(({k: n.meta[k] for k in _INHERITED if k in n.meta} for n in reversed(run)), {})
    places = iter(inputs)
    known: dict[fx.Node, fx.Node] = {}
    results: Any = ()
    with gm.graph.inserting_before(run[0]):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(places)
            elif node.op == "output":
                results = node.args[0]
            else:
                made = known[node] = gm.graph.node_copy(node, known.__getitem__)
                made.meta.update(meta)
    for old, new in zip(outputs, results, strict=True):
        _substitute(old, known[new] if isinstance(new, fx.Node) else new)
    for node in reversed(run):
        gm.graph.erase_node(node)


def _substitute(old: fx.Node, new: Any) -> None:
    """``new``, a node or a number, for ``old`` wherever it is read."""
    for user in list(old.users):
        args, kwargs = fx.map_arg((user.args, user.kwargs), lambda n: new if n is old else n)
        user.args, user.kwargs = args, kwargs


def _value(node: fx.Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))
