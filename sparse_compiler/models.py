"""Which graphs belong to which model; a graph is recognised by the parameters it was given."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sparse_compiler.ir.report import Report

__all__ = ["CompiledGraph", "first_time", "graphs_of", "remember"]


@dataclass
class CompiledGraph:
    """One compiled graph's report and the tensors of the model it came from."""

    report: Report
    tensors: list[weakref.ref[torch.Tensor]]

    def belongs_to(self, ids: set[int]) -> bool:
        return any(id(tensor) in ids for ref in self.tensors if (tensor := ref()) is not None)


_graphs: list[CompiledGraph] = []
_warned: list[tuple[str, weakref.ref[torch.Tensor] | None]] = []
_lock = threading.Lock()


def _tensors(inputs: Iterable[Any]) -> list[torch.Tensor]:
    return [t for t in inputs if isinstance(t, nn.Parameter)]


def remember(gm: fx.GraphModule, example_inputs: Sequence[Any], report: Report) -> None:
    """Keep a graph's report as long as its model's parameters live."""
    held = _tensors(example_inputs) or _tensors(gm.parameters())
    with _lock:
        _graphs[:] = [g for g in _graphs if any(ref() is not None for ref in g.tensors)]
        _graphs.append(CompiledGraph(report, [weakref.ref(t) for t in held]))


def graphs_of(model: nn.Module) -> list[CompiledGraph]:
    """Graphs compiled from this model (or a wrapper of it), oldest first."""
    ids = {id(p) for p in model.parameters()}
    with _lock:
        return [graph for graph in _graphs if graph.belongs_to(ids)]


def first_time(example_inputs: Sequence[Any], code: str) -> bool:
    """True the first time that ``code`` is met for the model whose parameters these are."""
    held = _tensors(example_inputs)
    with _lock:
        for seen, ref in _warned:
            owner = ref() if ref is not None else None
            if seen == code and (
                (ref is None and not held) or any(owner is tensor for tensor in held)
            ):
                return False
        _warned.append((code, weakref.ref(held[0]) if held else None))
    return True
