"""The measurement: each prompt once dense, then by every variant, in rounds over all tasks and lengths.

Rounds make a run that is stopped early cover all tasks and lengths alike.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.fidelity.layers import watched
from benchmarks.fidelity.results import DENSE, Failure, LayerRow, Results, Way
from benchmarks.fidelity.subjects import Answer, Subject
from benchmarks.fidelity.tasks import Item, Task
from benchmarks.fidelity.variants import Variant
from sparse_compiler import models
from sparse_compiler.backend import minference
from sparse_compiler.errors import OptionInvalid, SparseCompilerError
from sparse_compiler.ir.report import SiteReport
from sparse_compiler.runtime import recorder

__all__ = ["Plan", "chosen_tasks", "measure"]

logger = logging.getLogger(__name__)

_DYNAMO = {
    # One function is compiled a few times for each variant.
    "recompile_limit": 64,
    "accumulated_recompile_limit": 1024,
    # Past the limit Dynamo would run a variant's model dense without a word.
    "fail_on_recompile_limit_hit": True,
}


@dataclass(frozen=True)
class Plan:
    """What to run.

    Args:
        tokens: lengths.
        prompts: of each task and length;  single_prompts: of tasks that ask one question a prompt.
        seconds: of wall-clock time after which nothing new is begun; inf for no limit.
        layers: also sample every layer, once for each length and variant.
    """

    tokens: Sequence[int]
    prompts: int = 16
    single_prompts: int = 64
    seconds: float = float("inf")
    layers: bool = False


class _TimeOver(Exception):
    """The limit has passed."""


@dataclass
class _Runner:
    """One variant in work: its compiled form, its graphs and what they did in the newest call."""

    variant: Variant
    subject: Subject
    way: Way
    broken: set[int] = field(default_factory=set)
    sites: list[SiteReport] = field(default_factory=list)
    density: float = 1.0

    def __post_init__(self) -> None:
        self.run: Callable[..., Any] = self.subject.model
        if self.variant.options is not None:
            self.run = torch.compile(
                self.subject.model, backend=minference, options=self.variant.options
            )

    def ask(self, item: Item, tokens: int) -> Answer:
        """Answer one prompt and keep its time; the first call of a length may compile."""
        before = {id(graph) for graph in models.graphs_of(self.subject.model)}
        recorder.drop({site.number for site in self.sites})
        answer = self.subject.answer(self.run, item)
        # All variants share one model: what is new since a call belongs to the one that was called.
        new = [g for g in models.graphs_of(self.subject.model) if id(g) not in before]
        self.sites += [site for graph in new for site in graph.report.sites]
        self.way.graphs += len(new)
        if new:
            newest = [site for graph in new for site in graph.report.sites]
            self.way.sites = len(newest)
            self.way.rewritten = sum(site.decision == "rewritten" for site in newest)
        if tokens in self.way.first_s:
            self.way.warm_s.setdefault(tokens, []).append(answer.seconds)
        else:
            self.way.first_s[tokens] = answer.seconds
        layers = self.densities().values()
        self.density = statistics.fmean(share for _, share in layers) if layers else 1.0
        return answer

    def densities(self) -> dict[str, tuple[int, float]]:
        """Site number and density of every layer in the newest call; a dense layer counts 1."""
        found = {site.layer or site.name: (-1, 1.0) for site in self.sites}
        for site in self.sites:
            record = recorder.read(site.number) if site.number >= 0 else None
            if record is not None:
                found[site.layer or site.name] = (site.number, float(record.density.mean()))
        return found


def chosen_tasks(subject: Subject, names: Sequence[str] | None) -> list[Task]:
    """Tasks by name; None for all.

    Raises:
        OptionInvalid: the model has no such task.
    """
    if names is None:
        return list(subject.tasks.values())
    for name in names:
        if name not in subject.tasks:
            reason = ""
            if name == "tracking":
                reason = "The retriever knows one kind of question, for the digits behind a key."
            raise OptionInvalid(
                f"a task of {subject.name}", f"one of {', '.join(subject.tasks)}", name, fix=reason
            )
    return [subject.tasks[name] for name in dict.fromkeys(names)]


def measure(
    subject: Subject,
    tasks: Sequence[Task],
    variants: Sequence[Variant],
    plan: Plan,
    results: Results,
    *,
    told: Callable[[str, float], None] = lambda text, share: None,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Fill ``results``.

    Args:
        tasks: made once at every length before anything runs, so that one that cannot be made says so
            at once.
        variants: dense first.
        told: called before each prompt with what is run and the share of the work that is done.
        save: called after each round.
    """
    for tokens in plan.tokens:
        for task in tasks:
            task.make(tokens, 0)
    results.ways = [Way(variant.name, variant.options) for variant in variants]
    runners = [_Runner(v, subject, w) for v, w in zip(variants, results.ways, strict=True)]
    work = _Work(subject, runners, plan, results, told)
    results.stopped = "before its end"  # what a file says that is left by a killed run
    done, total = 0, sum(work.count(task) for task in tasks) * len(plan.tokens)
    try:
        with torch.inference_mode(), torch._dynamo.config.patch(_DYNAMO):
            for turn in range(plan.prompts):
                for tokens in plan.tokens:
                    for task in tasks:
                        for number in work.numbers(task, turn):
                            told(f"{tokens} tokens, {task.name}", done / total)
                            work.prompt(task, tokens, number)
                            done += 1
                    if turn == 0 and plan.layers:
                        told(f"{tokens} tokens, layers", done / total)
                        work.layers(tasks, tokens)
                results.seconds = work.passed
                save()
            results.stopped = ""
    except _TimeOver:
        results.stopped = f"after {plan.seconds:.0f} s, with {done} of {total} prompts done"
    except KeyboardInterrupt:
        results.stopped = f"by hand, with {done} of {total} prompts done"
    results.seconds = work.passed
    told("done", 1.0)
    save()


@dataclass
class _Work:
    subject: Subject
    runners: Sequence[_Runner]
    plan: Plan
    results: Results
    told: Callable[[str, float], None]
    started: float = field(default_factory=time.perf_counter)

    @property
    def passed(self) -> float:
        return time.perf_counter() - self.started

    def count(self, task: Task) -> int:
        return max(self.plan.prompts, self.plan.single_prompts if task.single else 0)

    def numbers(self, task: Task, turn: int) -> range:
        """Numbers of the prompts of one round."""
        count, turns = self.count(task), self.plan.prompts
        return range(turn * count // turns, (turn + 1) * count // turns)

    def prompt(self, task: Task, tokens: int, number: int) -> None:
        """One prompt by everybody who still runs at this length."""
        if tokens in self.runners[0].broken:
            return
        made = task.make(tokens, number)
        try:
            item = self.subject.place(made)
        except Exception as error:  # noqa: BLE001 - a device that failed before fails here
            self._broke(self.runners[0], task.name, tokens, error)
            return
        dense: Answer | None = None
        for runner in self.runners:
            if tokens in runner.broken:
                continue
            answer = self._ask(runner, item, task, tokens)
            if runner.variant.name == DENSE:
                dense = answer
            if dense is None:
                return
            if answer is not None:
                self._count(runner, task, tokens, item, dense, answer)

    def _ask(self, runner: _Runner, item: Item, task: Task, tokens: int) -> Answer | None:
        if self.passed > self.plan.seconds:
            raise _TimeOver
        try:
            return runner.ask(item, tokens)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others can still run
            self._broke(runner, task.name, tokens, error)
            return None

    def _broke(self, runner: _Runner, task: str, tokens: int, error: Exception) -> None:
        text = str(error) if isinstance(error, SparseCompilerError) else repr(error)
        runner.broken.add(tokens)
        runner.way.failures.append(Failure(tokens, task, text[:2000]))
        logger.warning("%s failed at %d tokens: %s", runner.variant.name, tokens, text[:500])

    def _count(
        self, runner: _Runner, task: Task, tokens: int, item: Item, dense: Answer, mine: Answer
    ) -> None:
        cell = self.results.cell(task.name, tokens, runner.variant.name)
        cell.prompts += 1
        cell.densities.append(runner.density)
        if dense.loss is not None and mine.loss is not None:
            cell.loss.append((item.targets.numel(), dense.loss, mine.loss))
        cell.tally.add(dense.right, mine.right)
        if item.depth >= 0:
            name = f"{item.depth:.2f}"
            cell.depths.setdefault(name, type(cell.tally)()).add(dense.right, mine.right)

    def layers(self, tasks: Sequence[Task], tokens: int) -> None:
        """Sample every layer of each variant on the first prompt of the first task."""
        task = next((task for task in tasks if task.name != "loss"), tasks[0])
        for runner in self.runners[1:]:
            if tokens in runner.broken:
                continue
            if self.passed > self.plan.seconds:
                raise _TimeOver
            recorder.drop({site.number for site in runner.sites})
            try:
                item = self.subject.place(task.make(tokens, 0))
                with watched() as found:
                    self.subject.answer(runner.run, item)
                densities = runner.densities()
            except Exception as error:  # noqa: BLE001 - as for the prompts
                self._broke(runner, "layers", tokens, error)
                continue
            for layer, (number, density) in densities.items():
                if number in found:
                    sample = found[number]
                    row = (density, sample.recall, sample.least_recall, sample.last_recall)
                    name = runner.variant.name
                    self.results.layers.append(
                        LayerRow(name, tokens, task.name, layer, *row, sample.error)
                    )
