"""``torch.compile(model, backend="minference")``: the passes, then the inner compiler."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._logging._internal import trace_structured

from sparse_compiler import models
from sparse_compiler.config import PATTERNS, SparseConfig
from sparse_compiler.errors import SiteDeclined
from sparse_compiler.graph_breaks import compile_graph
from sparse_compiler.ir.report import Code, Condition, Report
from sparse_compiler.passes.context import Capability, PassContext
from sparse_compiler.patterns import registry as pattern_registry
from sparse_compiler.runtime import dispatch as _dispatch  # noqa: F401 - installs the operators
from sparse_compiler.runtime import registry as executor_registry
from sparse_compiler.runtime.executor import Problem
from sparse_compiler.runtime.requester import name_sites
from sparse_compiler.search.published_config import load_config

__all__ = ["build_context", "minference"]

logger = logging.getLogger(__name__)

_SITE_NUMBERS = itertools.count()


def minference(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend that Dynamo calls with each graph.

    Args:
        gm: the traced graph; edited in place unless ``dryrun``.
        example_inputs: its inputs.
        options: see ``SparseConfig``.
        mode: Inductor's, e.g. ``max-autotune``; torch refuses it together with ``options``.
    Returns:
        The compiled callable.
    Raises:
        OptionInvalid: an option is wrong.
        SiteDeclined: an unexpected decline while ``fallback='error'``.
    """
    config = parse_options(options)

    def decided(ctx: PassContext) -> None:
        name_sites({s.number: s.layer or s.name for s in ctx.report.sites if s.number >= 0})
        emit_artifact(ctx.report)
        act_on_declines(ctx, example_inputs)

    def inner(gm: fx.GraphModule, inputs: Sequence[Any], ctx: PassContext) -> Callable[..., Any]:
        blocked = ctx.blocked is not None and ctx.blocked.code == Code.NO_CXX
        if config.inner == "eager" or blocked:
            return gm.forward
        return compile_inner(gm, inputs, config, mode)

    compiled, report = compile_graph(
        gm, example_inputs, lambda gm: build_context(gm, config), inner, decided
    )
    # Only now: Inductor may abandon a graph and have Dynamo trace it again.
    models.remember(gm, example_inputs, report)
    return compiled


def parse_options(options: Mapping[str, Any] | None) -> SparseConfig:
    """Check options against the patterns and executors that exist, plug-ins included."""
    asked = isinstance(options, Mapping) and options.get("target_recall") is not None
    return SparseConfig.from_options(
        options,
        patterns=tuple(dict.fromkeys((*PATTERNS, *pattern_registry.names()))),
        executors=executor_registry.executor_names(),
        recalls=pattern_registry.recall_names() if asked else (),
    )


def build_context(
    gm: fx.GraphModule, config: SparseConfig, *, keep_graphs: bool = False
) -> PassContext:
    """Everything the passes need to know about the outside."""
    return PassContext(
        config=config,
        capability=lambda device_type: _capability(config.executor, device_type),
        tables=None if config.config is None else load_config(config.config),
        grad_enabled=torch.is_grad_enabled(),
        blocked=_no_compiler(gm, config),
        report=Report(dryrun=config.dryrun),
        site_numbers=lambda: next(_SITE_NUMBERS),
        keep_graphs=keep_graphs,
    )


def _capability(name: str, device_type: str) -> Capability | str:
    executor = executor_registry.executor_for(name, device_type)

    def obstacles(
        dtype: torch.dtype,
        head_dim: int,
        value_dim: int,
        groups: int,
        softcap: float,
        device_type: str,
    ) -> list[str]:
        return executor.obstacles(Problem(device_type, dtype, head_dim, value_dim, groups, softcap))

    return Capability(
        name=executor.name,
        block_q=executor.block_q,
        block_k=executor.block_k,
        min_tokens=executor.min_tokens,
        min_queries=executor.min_queries,
        auto=executor.auto,
        obstacles=obstacles,
        tile=executor.tile,
    )


def _no_compiler(gm: fx.GraphModule, config: SparseConfig) -> Condition | None:
    """Inductor writes C++ for the CPU: without a compiler the graph must run as it is."""
    if config.inner != "inductor":
        return None
    values = (n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder")
    if not any(isinstance(v, torch.Tensor) and v.device.type == "cpu" and v.dim() for v in values):
        return None
    if has_cxx_compiler():
        return None
    return Condition(
        Code.NO_CXX,
        "PyTorch's CPU code generation needs a C++ compiler and none was found: install g++ "
        "(Debian and Ubuntu: package g++; Fedora: gcc-c++), or use inner='eager'",
    )


def has_cxx_compiler() -> bool:
    """Whether Inductor finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def compile_inner(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: SparseConfig, mode: str | None
) -> Callable[..., Any]:
    """Hand the graph to Inductor with the user's mode or options."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = dict(config.inner_options)
    if mode is not None and mode != "default":
        patches = {**list_mode_options(mode), **patches}
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches or None)
    return compiled


def emit_artifact(report: Report) -> None:
    """Put the report into the torch trace, where tlparse shows it."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "minference_explain", "encoding": "json"},
        payload_fn=lambda: report.to_json(),
    )


def act_on_declines(ctx: PassContext, example_inputs: Sequence[Any]) -> None:
    """Warn or raise, once per code and model; expected codes pass, gradients warn always."""
    for site in ctx.report.sites:
        if site.decision == "rewritten" or not site.code:
            continue
        code = Code(site.code)
        text = f"minference keeps attention {site.layer or site.name} dense: {code}: {site.reason}"
        if code == Code.GRAD_ENABLED:
            if models.first_time(example_inputs, code):
                warnings.warn(text, UserWarning, stacklevel=2)
            continue
        if code.expected or ctx.config.fallback == "silent":
            logger.debug(text)
            continue
        if ctx.config.fallback == "error":
            raise SiteDeclined(
                f"attention {site.layer or site.name}",
                "rewritable, since fallback='error'",
                f"{code}: {site.reason}",
                where=site.source,
                fix="Fix the cause, or use fallback='warn'.",
            )
        if models.first_time(example_inputs, code):
            warnings.warn(text, UserWarning, stacklevel=2)
