"""The search from end to end, on small models on the CPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from search_calls import PlantedModel, prompt, small_model
from torch import nn

from sparse_compiler.errors import ExecutorUnavailable, OptionInvalid, TensorInvalid
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.search import SearchResult, layer_search, offline, search
from sparse_compiler.search.costs import CostModel
from sparse_compiler.search.costs import cost_model as real_cost_model
from sparse_compiler.search.published_config import check_config, load_config

FEW = ["a_shape(16,*)", "vertical_slash(*,100)", "block_sparse(*)"]
BUDGET = 0.5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 rows, so that a few hundred tokens are many blocks."""
    monkeypatch.setattr(
        offline, "cost_model", lambda executor, device: CostModel(None, (64, 64), "pairs")
    )


def _search(model: nn.Module | None = None, **changed: Any) -> SearchResult:
    prompts = changed.pop("prompts", [prompt()])
    options: dict[str, Any] = {"budget": BUDGET, "candidates": FEW, **changed}
    return search(model or small_model(), prompts, **options)


def test_each_head_gets_the_pattern_that_was_planted() -> None:
    result = _search(PlantedModel().eval(), prompts=[{"input_ids": prompt()[None]}], budget=0.35)
    [layer] = result.layers
    assert [layer[head].pattern.name for head in range(3)] == [
        "a_shape",
        "vertical_slash",
        "block_sparse",
    ]
    for choice in layer.values():
        assert choice.cost <= 0.35
        assert choice.error == pytest.approx(min(choice.errors.values()), abs=1e-6)
    # Head 0 needs no more than any pattern keeps near by: the first candidate wins.
    assert layer[0].error < 1e-5
    for head in (1, 2):
        assert layer[head].error < 0.5 * sorted(layer[head].errors.values())[1]


def test_costs_keep_the_budget_and_scores_follow_from_errors() -> None:
    result = _search()
    assert len(result.layers) == 2
    for layer, scores in zip(result.layers, result.scores, strict=True):
        assert sorted(layer) == [0, 1, 2, 3]
        for head, choice in layer.items():
            assert choice.cost <= BUDGET
            assert set(choice.errors) <= {*FEW, "block_sparse(*,0)"}
            assert scores[head] == pytest.approx(max(0, 1 - choice.error), abs=1e-6)
    assert result.mean_cost <= BUDGET


def test_the_same_search_writes_the_same_bytes_and_leaves_no_state(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path in paths:
        result = _search(output=path)
        torch.compiler.reset()
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert load_config(paths[0]) == result.patterns
    check_config(load_config(paths[0]), [4, 4])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_the_file_is_what_the_backend_takes(tmp_path: Path) -> None:
    """With it the output of the first layer is as far from dense as the search says."""
    path, model, ids = tmp_path / "best.json", small_model(layers=1), prompt()[None]
    result = _search(model, output=path, executor="reference", prompts=[prompt()[:512]])
    torch.compiler.reset()
    options = {"config": str(path), "min_tokens": 0, "inner": "eager", "executor": "reference"}
    compiled = torch.compile(model, backend="minference", options=options)
    found: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        found.append(out)

    attention: Any = model.model.layers[0]
    handle = attention.self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: found.append(args[0])
    )
    with torch.inference_mode():
        compiled(input_ids=ids[:, :512])
        model(input_ids=ids[:, :512])
    handle.remove()
    sparse, dense = (t.view(512, 4, 16) for t in found)
    for head, choice in result.layers[0].items():
        missed = (sparse[:, head] - dense[:, head]).norm() / dense[:, head].norm()
        assert float(missed) == pytest.approx(choice.error, rel=1e-3)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("error", ["output", "logits"])
def test_an_interrupted_search_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    prompts = [prompt(256), prompt(384, seed=1)]
    options: dict[str, Any] = {"prompts": prompts, "error": error, "candidates": FEW[:2]}
    options["budget"] = 0.9
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    _search(output=whole, **options)
    torch.compiler.reset()
    tried: list[str] = []
    real = layer_search.try_layer

    def counted(call: Any, record: Any, plan: Any, sample: int, where: str) -> None:
        tried.append(f"{where} {sample}")
        real(call, record, plan, sample, where)

    monkeypatch.setattr(layer_search, "try_layer", counted)
    for stop in ("layer 1, prompt 1", "layer 0, prompt 2", "layer 1, prompt 2"):

        def progress(what: str, done: int, steps: int, stop: str = stop) -> None:
            if what == stop:
                raise _Stop

        with pytest.raises(_Stop):
            _search(output=broken, progress=progress, **options)
        assert not broken.exists()
        assert offline.state_path(broken).exists()
    _search(output=broken, **options)
    assert tried == ["layer 0 0", "layer 1 0", "layer 0 1", "layer 1 1"]
    assert broken.read_bytes() == whole.read_bytes()
    assert not offline.state_path(broken).exists()


def _leave_state(path: Path) -> None:
    def progress(what: str, done: int, steps: int) -> None:
        if what == "layer 1, prompt 1":
            raise _Stop

    with pytest.raises(_Stop):
        _search(output=path, progress=progress)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"budget": 0.6}, "option 'budget'"),
        ({"candidates": FEW[:2]}, "option 'candidates'"),
        ({"prompts": [prompt(seed=7)]}, "prompts"),
        ({"model": small_model(seed=3)}, "model"),
        ({"layers": [0]}, "option 'layers'"),
        ({"error": "logits"}, "option 'error'"),
        ({"maps": True}, "option 'maps'"),
        ({"executor": "reference"}, "option 'executor'"),
    ],
)
def test_a_state_of_other_inputs_is_refused_by_name(
    tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    path = tmp_path / "best.json"
    _leave_state(path)
    kept = offline.state_path(path).read_bytes()
    with pytest.raises(OptionInvalid, match="fresh") as caught:
        _search(output=path, **changed)
    assert f"another {named}" in str(caught.value)
    assert str(caught.value).count("another ") == 2  # and "another output"
    assert offline.state_path(path).read_bytes() == kept


def test_a_fresh_search_ignores_the_state(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    _leave_state(path)
    _search(output=path, budget=0.6, resume=False, candidates=FEW[:1])
    assert path.exists()
    assert not offline.state_path(path).exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x81\xa6format\x63"])
def test_a_broken_state_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "best.json"
    offline.state_path(path).write_bytes(content)
    with pytest.raises(OptionInvalid, match=r"best\.json\.state"):
        _search(output=path)


def test_only_some_layers(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    result = _search(layers=[1], output=path, candidates=FEW[:1])
    assert [len(layer) for layer in result.layers] == [0, 4]
    assert json.loads(path.read_text())[0] == {}
    assert any("layers 0 were not searched" in note for note in result.notes)


def test_several_prompts_are_averaged_and_the_longest_decides_the_numbers() -> None:
    few = {"candidates": FEW[:1], "layers": [0]}
    one = _search(prompts=[prompt(768, seed=1)], **few)
    torch.compiler.reset()
    both = _search(prompts=[prompt(512), prompt(768, seed=1)], **few)
    assert both.tokens == (768, 512)
    assert both.patterns == one.patterns
    assert any(both.layers[0][h].error != pytest.approx(one.layers[0][h].error) for h in range(4))


def test_numbers_for_a_longer_prompt_are_those_of_the_sample_times_the_lengths_ratio(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"candidates": ["a_shape(16,*)"], "layers": [0]}
    result = _search(**options, for_tokens=8 * 1024, output=tmp_path / "long.json")
    assert load_config(tmp_path / "long.json")[0] == result.patterns[0]
    assert any("8192 tokens" in note for note in result.notes)
    choice = result.layers[0][0]
    assert choice.cost == pytest.approx(BUDGET, rel=0.1) and choice.cost <= BUDGET
    assert choice.pattern.first == 16 and choice.pattern.second % 8 == 0
    # Errors are of the sample, with the numbers that it was tried with.
    options["candidates"] = [f"a_shape(16,{choice.pattern.second // 8})"]
    same = _search(**{**options, "budget": 0.99}).layers[0]
    assert same[0].error == choice.error


def test_scoring_rows_is_paid_at_the_length_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    model = real_cost_model("triton", "NVIDIA H200")
    monkeypatch.setattr(offline, "cost_model", lambda executor, device: model)
    options = {"candidates": ["key_groups"], "layers": [0], "budget": 0.9}
    with pytest.raises(OptionInvalid, match=r"at least \d+\.\d+.* 1024 tokens"):
        _search(**options)
    layer = _search(**options, for_tokens=1 << 17).layers[0]
    assert all(choice.cost <= 0.9 and choice.pattern.second == 0 for choice in layer.values())


def test_errors_of_the_logits_are_those_of_one_sparse_head() -> None:
    model, ids = small_model(), prompt(256)
    more = {"executor": "reference", "candidates": ["a_shape(8,64)"], "budget": 0.99}
    result = _search(model, prompts=[ids], error="logits", **more)
    torch.compiler.reset()
    table = {1: {2: ("a_shape", 8, 64), "*": "dense"}, 0: {0: ("a_shape", 0, 999), "*": "dense"}}
    options = {"pattern": table, "min_tokens": 0, "inner": "eager", "executor": "reference"}
    compiled = torch.compile(model, backend="minference", options=options)
    with torch.inference_mode():
        dense = model(input_ids=ids[None], logits_to_keep=64)
        sparse = compiled(input_ids=ids[None], logits_to_keep=64)
    error = float((sparse - dense).norm() / dense.norm())
    assert error > 0
    assert result.layers[1][2].error == pytest.approx(error, rel=1e-2)
    assert result.kind == "logits"


def test_measured_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tiny problems are slower sparse than dense: any budget below 1 may be too small here.
    monkeypatch.setattr(offline, "_check", lambda *arguments: None)
    few = ["a_shape(16,64)", "a_shape(16,*)"]
    result = _search(cost="measured", budget=1e6, candidates=few, prompts=[prompt(512)])
    for layer in result.layers:
        assert len({(c.pattern, c.candidate) for c in layer.values()}) <= 2
    assert "measured" in result.notes[0]


def test_maps_are_kept_where_they_are_asked_for() -> None:
    for error in ("output", "logits"):
        result = _search(
            maps=True, candidates=FEW[:1], layers=[1], error=error, prompts=[prompt(256)]
        )
        torch.compiler.reset()
        assert all(
            len(part) == 1 + 128**2 for c in result.layers[1].values() for part in c.maps or ()
        )
        assert all(c.maps is not None for c in result.layers[1].values())


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"budget": 0}, "budget"),
    ({"budget": 1}, "budget"),
    ({"budget": True}, "budget"),
    ({"budget": "0.1"}, "budget"),
    ({"budget": float("nan")}, "budget"),
    ({"cost": "guessed"}, "cost"),
    ({"error": "loss"}, "error"),
    ({"prompts": []}, "prompts"),
    ({"prompts": prompt()}, "prompts"),
    ({"layers": []}, "layers"),
    ({"for_tokens": -1}, "for_tokens"),
    ({"for_tokens": True}, "for_tokens"),
    ({"for_tokens": 4096, "cost": "measured"}, "for_tokens"),
    ({"layers": [-1]}, "layers"),
    ({"candidates": []}, "candidates"),
    ({"candidates": ["dense"]}, "candidate"),
]


@pytest.mark.parametrize(("changed", "named"), WRONG, ids=str)
def test_wrong_options_are_refused_by_name(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionInvalid, match=named):
        _search(**changed)


@pytest.mark.parametrize(
    "ids", [torch.zeros(1), torch.zeros(1, 1, 4).long(), torch.zeros(1).long()]
)
def test_a_prompt_that_is_none_is_refused(ids: torch.Tensor) -> None:
    with pytest.raises(TensorInvalid, match="prompt"):
        _search(prompts=[ids])


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(OptionInvalid, match="eval"):
        _search(small_model().train())


def test_a_layer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ExecutorUnavailable, match="2 in other layers"):
        _search(layers=[9])


def test_a_budget_that_nothing_meets_names_layer_head_and_what_it_takes() -> None:
    with pytest.raises(OptionInvalid, match=r"at least 0\.\d+.*1024 tokens.*layer 0, head 0"):
        _search(budget=0.01)


def test_the_budget_that_a_layer_is_said_to_take_is_enough_for_all_its_heads() -> None:
    options: dict[str, Any] = {"candidates": ["vertical_slash(40,*)"], "layers": [0]}
    with pytest.raises(OptionInvalid) as refused:
        _search(**options, budget=0.01)
    needed = re.search(r"at least (0\.\d+)", str(refused.value))
    assert needed is not None
    assert len(_search(**options, budget=float(needed[1])).layers[0]) == 4


def test_attention_that_is_not_finite_is_refused() -> None:
    model = small_model()
    model.model.embed_tokens.weight[3] = float("nan")
    with pytest.raises(TensorInvalid, match="layer 0"):
        _search(model)


def test_a_plug_ins_pattern_is_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_compiler.patterns import registry
    from sparse_compiler.patterns.a_shape import AShape

    class Mine(AShape):
        name, config_name, number, rule = "mine", None, 4242, None

        def default(self) -> HeadPattern:
            return HeadPattern(self.name, 16, 64)

        def from_budget(self, *args: Any, **kwargs: Any) -> HeadPattern:
            found = super().from_budget(*args, **kwargs)
            return HeadPattern(self.name, found.first, found.second)

    monkeypatch.setitem(registry._PATTERNS, "mine", Mine())
    result = _search(candidates=["mine", "mine(*,64)"], layers=[0], prompts=[prompt(512)])
    assert {c.pattern.name for c in result.layers[0].values()} == {"mine"}


def test_importing_the_search_loads_neither_matplotlib_nor_transformers() -> None:
    program = (
        "import sys, sparse_compiler.search as s; s.search; import sparse_compiler.cli_search; "
        "import sparse_compiler.search.report; "
        "print([m for m in ('matplotlib', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
