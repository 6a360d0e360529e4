"""The search: one forward pass a sample, one attention at a time, every candidate at one cost."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_compiler.config import MAX_NUMBER
from sparse_compiler.errors import ExecutorUnavailable, OptionInvalid, TensorInvalid
from sparse_compiler.patterns import registry
from sparse_compiler.runtime.observe import AttentionCall, observing
from sparse_compiler.runtime.registry import executor_for
from sparse_compiler.search import layer_search, logits
from sparse_compiler.search.candidates import Candidate, default_candidates, parse_candidates
from sparse_compiler.search.costs import cost_model
from sparse_compiler.search.layer_search import Plan
from sparse_compiler.search.result import SearchResult, result_of
from sparse_compiler.search.state import (
    LayerRecord,
    SearchState,
    digest_of,
    digest_of_model,
    load_state,
    save_state,
)

__all__ = ["search", "state_path"]

Progress = Callable[[str, int, int], None]

#: The compiler's own layer numbers travel in a pattern's numbers, which a budget of 1 does not read.
_LABEL = "a_shape"
_LAYERS = 1024


def state_path(output: str | os.PathLike[str]) -> Path:
    """Where a search that writes to ``output`` keeps what it has finished."""
    path = Path(output)
    return path.with_name(f"{path.name}.state")


def search(
    model: nn.Module,
    prompts: Sequence[Tensor | Mapping[str, Any]],
    *,
    budget: float,
    candidates: Sequence[str | Candidate] | None = None,
    cost: Literal["model", "measured"] = "model",
    error: Literal["output", "logits"] = "output",
    layers: Sequence[int] | None = None,
    executor: str = "auto",
    device: str | None = None,
    for_tokens: int = 0,
    output: str | os.PathLike[str] | None = None,
    resume: bool = True,
    maps: bool = False,
    progress: Progress | None = None,
) -> SearchResult:
    """Find for each head the pattern that, at one cost, changes its output least.

    Args:
        model: in evaluation mode, on its device.
        prompts: token ids [L] or [1, L], or keyword arguments of a call. Patterns are grown on the
            longest; errors are means over all.
        budget: share of dense attention's time that every candidate may take, 0 < budget < 1.
        candidates: as in ``candidates.GRAMMAR``; None is every pattern that can be grown.
        cost: ``model`` predicts times (and gives the same file every time); ``measured`` takes
            them, of a whole layer whose heads are alike.
        error: of the attention output over all rows; or of the model's logits over its last rows,
            with one forward pass for each head and candidate.
        layers: numbers of those to search; None is all. The others stay empty in the result.
        executor: as the backend's option.
        device: name whose constants predict the cost; None is this device. See ``cost_model``.
        for_tokens: length of the prompts to come: counts of keys and blocks are multiplied to keep
            the same share there, and costs predicted there; 0 is the longest prompt's.
        output: write the configuration here, and keep beside it what is finished.
        resume: go on from what is kept there.
        maps: keep pictures for a report.
        progress: called with (what is next, steps done, steps in all; 0 while not known).
    Raises:
        OptionInvalid: an option is wrong, no attention is rewritten, the budget is below what the
            smallest patterns cost, or the kept state is of other inputs.
    """
    _check(model, prompts, budget, cost, error, layers, for_tokens)
    calls = [_arguments(model, prompt, error) for prompt in prompts]
    # The longest first: patterns are grown on it.
    calls.sort(key=lambda call: -_length(call))
    chosen = default_candidates() if candidates is None else _parsed(candidates)
    where = next(model.parameters()).device
    name = executor_for(executor, where.type).name
    pricing = cost_model(name, device)
    plan = Plan(
        candidates=chosen,
        budget=float(budget),
        clock=cost == "measured",
        cost=pricing,
        by_logits=error == "logits",
        layers=None if layers is None else frozenset(layers),
        samples=len(calls),
        maps=maps,
        for_tokens=for_tokens,
    )
    state = SearchState()
    path = None if output is None else state_path(output)
    if path is not None:
        inputs = _inputs(model, prompts, plan, name)
        state = load_state(path, inputs) if resume else SearchState(inputs=inputs)
    run = _Run(model, calls, plan, name, state, path, progress)
    run.all()
    result = result_of(state, plan, [_length(call) for call in calls], name)
    if output is not None and path is not None:
        result.save(output)
        path.unlink(missing_ok=True)
    return result


def _parsed(candidates: Sequence[str | Candidate]) -> tuple[Candidate, ...]:
    return parse_candidates([str(candidate) for candidate in candidates])


def _check(
    model: nn.Module,
    prompts: Sequence[Any],
    budget: float,
    cost: str,
    error: str,
    layers: Sequence[int] | None,
    for_tokens: int,
) -> None:
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if not (number and 0 < budget < 1):
        raise OptionInvalid("option 'budget'", "a number with 0 < budget < 1", budget)
    for key, value, allowed in (
        ("cost", cost, ("model", "measured")),
        ("error", error, ("output", "logits")),
    ):
        if value not in allowed:
            raise OptionInvalid(f"option {key!r}", f"one of {', '.join(allowed)}", value)
    if isinstance(prompts, Tensor | Mapping) or not prompts:
        raise OptionInvalid(
            "option 'prompts'", "a list of one prompt or more", type(prompts).__name__
        )
    if layers is not None and (not layers or any(not 0 <= n < _LAYERS for n in layers)):
        raise OptionInvalid("option 'layers'", f"numbers from 0 to {_LAYERS - 1}", list(layers))
    whole = isinstance(for_tokens, int) and not isinstance(for_tokens, bool)
    if not (whole and 0 <= for_tokens <= MAX_NUMBER):
        raise OptionInvalid("option 'for_tokens'", f"from 0 to {MAX_NUMBER}", for_tokens)
    if for_tokens and cost == "measured":
        raise OptionInvalid(
            "option 'for_tokens'", "left out where costs are measured on the samples", for_tokens
        )
    if model.training:
        raise OptionInvalid("the model", "in evaluation mode", "one in training mode: call .eval()")


def _arguments(model: nn.Module, prompt: Tensor | Mapping[str, Any], error: str) -> dict[str, Any]:
    """Of a call: no cache, and no logits but those that are compared."""
    if isinstance(prompt, Mapping):
        return dict(prompt)
    if prompt.dim() not in (1, 2) or prompt.dtype.is_floating_point or prompt.shape[-1] < 2:
        raise TensorInvalid(
            "a prompt", "token ids [L] or [B, L] of two tokens or more", tuple(prompt.shape)
        )
    device = next(model.parameters()).device
    call: dict[str, Any] = {"input_ids": prompt.view(-1, prompt.shape[-1]).to(device)}
    known = inspect.signature(model.forward).parameters
    if "logits_to_keep" in known:
        call["logits_to_keep"] = min(prompt.shape[-1], logits.ROWS) if error == "logits" else 1
    if "use_cache" in known:
        call["use_cache"] = False
    return call


def _length(call: Mapping[str, Any]) -> int:
    ids = call.get("input_ids", call.get("inputs_embeds"))
    return 0 if ids is None else int(ids.shape[1])


def _inputs(
    model: nn.Module,
    prompts: Sequence[Tensor | Mapping[str, Any]],
    plan: Plan,
    executor: str,
) -> dict[str, str]:
    """Digests by name, for the state file."""
    texts = []
    for prompt in prompts:
        call = prompt if isinstance(prompt, Mapping) else {"input_ids": prompt}
        for key, value in sorted(call.items()):
            texts.append(key.encode())
            if isinstance(value, Tensor):
                flat = value.detach().to("cpu").contiguous().reshape(-1)
                texts += [f"{value.dtype} {tuple(value.shape)}".encode()]
                texts += [flat.view(torch.uint8).numpy().tobytes()]
            else:
                texts.append(repr(value).encode())
    layers = None if plan.layers is None else sorted(plan.layers)
    options = {
        "budget": plan.budget,
        "candidates": [str(c) for c in plan.candidates],
        "cost": "measured" if plan.clock else repr(plan.cost.constants),
        "error": plan.by_logits,
        "layers": layers,
        "executor": executor,
        "maps": plan.maps,
        "for_tokens": plan.for_tokens,
    }
    return {
        "model": digest_of_model(model),
        "prompts": digest_of(*texts),
        **{f"option {key!r}": digest_of(repr(value).encode()) for key, value in options.items()},
    }


class _Run:
    """Forward passes that fill a state."""

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[Mapping[str, Any]],
        plan: Plan,
        executor: str,
        state: SearchState,
        path: Path | None,
        progress: Progress | None,
    ) -> None:
        table = {n: {"*": (_LABEL, n, MAX_NUMBER)} for n in range(_LAYERS)}
        options = {"pattern": table, "budget": 1.0, "min_tokens": 0, "inner": "eager"}
        self._compiled = torch.compile(
            model, backend="minference", options={**options, "executor": executor}
        )
        self._calls, self._plan, self._state, self._path = calls, plan, state, path
        self._progress = progress
        self._reached = 0

    def all(self) -> None:
        for sample in range(len(self._calls)):
            if sample >= self._state.passes:
                self._pass(sample)
            if self._plan.by_logits:
                self._swaps(sample)
        missing = {n for n, r in self._state.layers.items() if r.errors and not r.maps}
        if self._plan.maps and missing:
            self._draw(missing)

    def _draw(self, layers: set[int]) -> None:
        """One more pass of the last prompt, for pictures of what the logits decided."""

        def watch(call: AttentionCall) -> None:
            layer = _layer_of(call)
            if layer in layers:
                layer_search.add_maps(call, self._state.layers[layer], self._plan)

        self._forward(len(self._calls) - 1, watch)
        self._save()

    def _forward(self, sample: int, watcher: Callable[[AttentionCall], Tensor | None]) -> Any:
        with torch.inference_mode(), observing(watcher):
            return self._compiled(**self._calls[sample])

    def _pass(self, sample: int) -> None:
        state = self._state
        state.unknown, self._reached = 0, 0

        def watch(call: AttentionCall) -> None:
            layer = _layer_of(call)
            if layer is None:
                state.unknown += 1
                return
            self._tell(f"layer {layer}, prompt {sample + 1}", sample)
            record = state.layers.setdefault(layer, LayerRecord(heads=call.q.shape[1]))
            if self._plan.wants(layer) and len(record.densities) <= sample:
                layer_search.try_layer(call, record, self._plan, sample, f"layer {layer}")
                self._save()
            self._reached += 1

        self._forward(sample, watch)
        searched = [n for n in state.layers if self._plan.wants(n)]
        if not searched:
            raise ExecutorUnavailable(
                "attention of the model",
                "rewritten in layers that the compiler can number, to be searched",
                f"{state.unknown} rewritten without a number, {len(state.layers)} in other layers",
                fix="See `sparse_compiler.explain(model, ...)` for each attention's reason.",
            )
        missed = [n for n in searched if len(state.layers[n].densities) <= sample]
        if missed:
            raise ExecutorUnavailable(
                f"attention of layer {missed[0]}",
                "rewritten for every prompt",
                f"not for prompt {sample + 1} of {_length(self._calls[sample])} tokens",
                fix="Use prompts of one length.",
            )
        state.passes = sample + 1
        self._save()

    def _swaps(self, sample: int) -> None:
        """Errors of the logits, of layers that have none yet."""
        todo = [
            (number, record)
            for number, record in sorted(self._state.layers.items())
            if self._plan.wants(number) and len(record.errors) <= sample
        ]
        if not todo:
            return
        dense = logits.of(self._forward(sample, lambda call: None))
        for number, record in todo:
            self._tell(f"logits of layer {number}, prompt {sample + 1}", sample)

            def swapped(
                candidate: int, head: int, number: int = number, record: LayerRecord = record
            ) -> Tensor:
                def watch(call: AttentionCall) -> Tensor | None:
                    if _layer_of(call) != number:
                        return None
                    return layer_search.swap(call, record, self._plan, candidate, head)

                return logits.of(self._forward(sample, watch))

            record.errors.append(logits.errors(record, dense, swapped))
            self._save()

    def _tell(self, what: str, sample: int) -> None:
        if self._progress is not None:
            count = len(self._state.layers) if self._state.passes else 0
            done = sample * count + self._reached
            self._progress(what, done, count * self._plan.samples)

    def _save(self) -> None:
        if self._path is not None:
            save_state(self._path, self._state)


def _layer_of(call: AttentionCall) -> int | None:
    """The number that the compiler gave the layer, by which it reads a configuration too."""
    if call.params is None:
        return None
    number, layer, mark = call.params[0, :3].tolist()
    labelled = number == registry.get(_LABEL).number and mark == MAX_NUMBER
    return layer if labelled else None
