"""Runs of the byte model on the CPU: what is lost is reported as lost, and failures stay small."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.fidelity import run as run_module
from benchmarks.fidelity.layers import kept_keys, watched
from benchmarks.fidelity.results import Results
from benchmarks.fidelity.run import Plan, chosen_tasks, measure
from benchmarks.fidelity.subjects import Subject, retriever
from benchmarks.fidelity.tasks import Task, needle_depth, retriever_tasks
from benchmarks.fidelity.variants import Variant, parse_variants
from sparse_compiler import ops
from sparse_compiler.demo.model import RetrieverConfig, RetrieverModel
from sparse_compiler.demo.records import Haystack, load_haystack
from sparse_compiler.errors import PromptInvalid
from sparse_compiler.ir.index import Geometry
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.a_shape import AShape
from sparse_compiler.patterns.base import SelectRequest
from sparse_compiler.runtime import dispatch
from sparse_compiler.runtime.reference import covered_pairs
from sparse_compiler.testing import random_index

EAGER = {"inner": "eager"}
TOKENS = 1536


class _Breaks(AShape):
    name = "breaks"
    number = 1999
    rule = None
    calls = 0

    def choose(self, request: SelectRequest) -> None:  # type: ignore[override]
        _Breaks.calls += 1
        raise RuntimeError("the estimator is broken")


@pytest.fixture(scope="module", autouse=True)
def broken_pattern() -> Iterator[None]:
    registry.register(_Breaks())
    yield
    registry._PATTERNS.pop("breaks")


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return load_haystack(1 << 17)


@pytest.fixture(scope="module")
def subject(haystack: Haystack) -> Subject:
    return retriever(torch.device("cpu"), fill=0.1, seed=0, haystack=haystack, source="builtin")


@pytest.fixture
def tiny(haystack: Haystack) -> Subject:
    """A model that knows nothing and is fast."""
    model = RetrieverModel(RetrieverConfig(256, 32, 32, 2, 2, 1, 16))
    model = model.eval().requires_grad_(False)
    tasks = retriever_tasks(0.25, 0, haystack)
    return Subject("tiny", model, tasks, torch.device("cpu"), {}, haystack.sha256)


def measured(
    subject: Subject,
    tasks: list[str],
    variants: list[Variant],
    plan: Plan,
    told: Callable[[str, float], None] = lambda text, share: None,
) -> Results:
    results = Results("", "cpu", {}, subject.name, subject.dtype, "", {})
    measure(subject, chosen_tasks(subject, tasks), variants, plan, results, told=told)
    return results


@pytest.fixture(scope="module")
def real(subject: Subject, broken_pattern: None) -> Results:
    variants = parse_variants(["a_shape:16:64", "budget=1.0", "breaks"], EAGER)
    plan = Plan([TOKENS], prompts=2, single_prompts=2, layers=True)
    return measured(subject, ["needles", "end-1", "loss"], variants, plan)


def test_a_variant_that_loses_answers_is_reported_as_losing(real: Results) -> None:
    dense, lost = (real.cell("needles", TOKENS, name) for name in ("dense", "a_shape:16:64"))
    assert dense.tally.asked == 16 and dense.tally.right == dense.tally.both >= 15
    assert lost.tally.asked == 16 and lost.tally.dense_right == dense.tally.right
    assert lost.tally.both < 8 and lost.tally.kept95[1] < 0.8
    assert lost.density is not None and lost.density < 0.4
    dense_loss, lost_loss = real.cell("loss", TOKENS, "a_shape:16:64").mean_loss or (0, 0)
    assert lost_loss > 1.02 * dense_loss


def test_a_variant_that_computes_all_keeps_all(real: Results) -> None:
    for task in ("needles", "end-1"):
        cell = real.cell(task, TOKENS, "budget=1.0")
        assert cell.tally.kept == 1 and cell.density == pytest.approx(1, abs=0.01)
    dense, same = real.cell("loss", TOKENS, "budget=1.0").mean_loss or (1, 0)
    assert same == pytest.approx(dense, rel=1e-4)
    assert real.cell("loss", TOKENS, "dense").loss[0][0] == TOKENS - 1


def test_a_variant_that_raises_costs_its_row_only(real: Results) -> None:
    failures = real.way("breaks").failures
    assert len(failures) == 1 and failures[0].tokens == TOKENS
    assert "the estimator is broken" in failures[0].error
    assert _Breaks.calls == 1, "it is not tried again at this length"
    assert not [cell for cell in real.cells if cell.variant == "breaks"]
    assert real.stopped == ""


def test_first_calls_are_not_in_the_times_and_one_graph_serves_all_tasks(real: Results) -> None:
    for way in real.ways[:3]:
        assert len(way.warm_s[TOKENS]) == 5  # 2 prompts of 3 tasks, without the first
        assert way.graphs == (way.options is not None)
    assert (real.way("budget=1.0").rewritten, real.way("budget=1.0").sites) == (4, 4)


def test_layers_say_what_was_kept(real: Results) -> None:
    rows = {
        name: [r for r in real.layers if r.variant == name]
        for name in ("a_shape:16:64", "budget=1.0")
    }
    assert [len(found) for found in rows.values()] == [4, 4]
    for row in rows["budget=1.0"]:
        assert min(row.recall, row.least_recall, row.last_recall) > 0.9999 and row.error < 1e-3
    lost = rows["a_shape:16:64"]
    assert min(row.last_recall for row in lost) < 0.9 and max(row.error for row in lost) > 0.05
    assert all(row.least_recall <= row.recall for row in lost)


def test_two_lengths_compile_twice_at_most(tiny: Subject) -> None:
    variants = parse_variants(["a_shape:16:64"], EAGER)
    plan = Plan([1024, 1536, 2048], prompts=1, single_prompts=1)
    results = measured(tiny, ["end-1", "end-4", "needles", "loss"], variants, plan)
    assert [way.graphs for way in results.ways] == [0, 2]
    assert results.ways[1].rewritten == 2
    narrow = [results.cell("end-1", n, "a_shape:16:64").density or 1 for n in plan.tokens]
    assert narrow[0] > narrow[1] > narrow[2], "each length reports its own density"


def test_dense_that_raises_ends_its_length(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = tiny.model.forward

    def short_only(input_ids: torch.Tensor, **rest: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > 600:
            raise torch.OutOfMemoryError("too long")
        return forward(input_ids, **rest)

    monkeypatch.setattr(tiny.model, "forward", short_only)
    variants = parse_variants([])
    results = measured(tiny, ["end-1"], variants, Plan([512, 1024], 2, 2))
    assert results.cell("end-1", 512, "dense").prompts == 2
    assert [failure.tokens for failure in results.way("dense").failures] == [1024]
    assert results.stopped == ""


def test_the_limit_stops_between_prompts(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(run_module._Work, "passed", property(lambda self: float(next(clock))))
    results = measured(tiny, ["end-1", "loss"], parse_variants([]), Plan([512], 8, 8, seconds=5))
    assert results.stopped == "after 5 s, with 4 of 16 prompts done"
    # Rounds: both tasks have as many.
    assert [cell.prompts for cell in results.cells] == [2, 2]


def test_no_time_at_all_measures_nothing(tiny: Subject) -> None:
    results = measured(tiny, ["end-1"], parse_variants([]), Plan([512], 2, 2, seconds=0))
    assert results.cells == [] and results.stopped.startswith("after 0 s")


def test_an_interrupt_keeps_what_was_measured(tiny: Subject) -> None:
    def told(text: str, share: float) -> None:
        if 0.5 <= share < 1:
            raise KeyboardInterrupt

    results = measured(tiny, ["end-1"], parse_variants([]), Plan([512], 4, 4), told)
    assert results.stopped == "by hand, with 2 of 4 prompts done"
    assert results.cells[0].prompts == 2


def test_a_prompt_that_cannot_be_made_is_refused_before_anything_runs(tiny: Subject) -> None:
    with pytest.raises(PromptInvalid, match="at least 64"):
        measured(tiny, ["end-1", "anywhere"], parse_variants([]), Plan([1024], 1, 1))


def test_needles_stand_at_their_depths(haystack: Haystack) -> None:
    task: Task = retriever_tasks(0.25, 0, haystack)["needle"]
    for number in (0, 3, 7, 8):
        item = task.make(1000, number)
        text = bytes(item.tokens.tolist())
        assert len(text) == 1000 and text.count(b"@rec ") == 1
        place, room = text.index(b"\n@rec "), 1000 - 32
        assert place == round(needle_depth(number) * room) and item.depth == needle_depth(number)
        record, question = text[place : place + 16], text[-16:]
        assert record.replace(b"rec", b"ask") == question
        assert torch.equal(item.targets, torch.tensor(list(record[11:15])))
        assert torch.equal(item.tokens[item.positions + 1], item.targets)
    assert [needle_depth(n) for n in (0, 7, 8)] == [0, 1, 0]


@pytest.mark.parametrize("name", ["needle", "needles", "end-1", "end-32", "anywhere", "loss"])
def test_tasks_depend_on_their_arguments_only(name: str, haystack: Haystack) -> None:
    task = retriever_tasks(0.25, 5, haystack)[name]
    first, again, other = task.make(4096, 1), task.make(4096, 1), task.make(4096, 2)
    assert torch.equal(first.tokens, again.tokens) and first.tokens.numel() == 4096
    assert not torch.equal(first.tokens, other.tokens)
    assert torch.equal(first.tokens[first.positions + 1], first.targets)


@pytest.mark.parametrize("offset", [0, 37])
def test_kept_keys_are_those_of_the_oracle(offset: int) -> None:
    geometry = Geometry(offset, -1, 0, 32, 16)
    kinds = ("band", "blocks", "none", "band")
    index = random_index(3, geometry, batch=1, num_q=100, num_k=100 + offset, kinds=kinds)
    want = covered_pairs(index, geometry, 100, 100 + offset)[0] > 0
    for head, kind in enumerate(kinds):
        if kind != "none":
            found = kept_keys(index, geometry, offset, head, torch.arange(100), 100 + offset)
            assert torch.equal(found, want[head])


def test_watching_ends_with_its_block() -> None:
    assert ops._IMPLEMENTATIONS["attend"] is dispatch.attend
    with watched():
        assert ops._IMPLEMENTATIONS["attend"] is not dispatch.attend
    assert ops._IMPLEMENTATIONS["attend"] is dispatch.attend
