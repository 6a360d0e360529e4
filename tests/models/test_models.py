"""Thirty architectures and attention written by hand, against themselves without ``minference``.

`make coverage` runs all of transformers' causal language models in every scenario.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_extra
from compare import SCENARIOS, Row, applies, compare
from coverage_table import render
from handmade import MODULES
from models_to_cover import THIRTY, plan
from run_coverage import latest, one_process, read

from sparse_compiler.ir.report import Code
from sparse_compiler.runtime import cpu_executor

# Scenario of each of the thirty, and how many sites are rewritten at least.
CASES: dict[str, tuple[str, int]] = {
    "llama": ("left_padded", 2),
    "mistral": ("ones", 2),
    "qwen3": ("dynamic", 2),
    "phi3": ("batch1", 2),
    "cohere2": ("ones", 2),
    "gemma2": ("eager_attn", 0),
    "gemma3_text": ("static_cache", 2),
    "llama4_text": ("ones", 0),
    "gpt_oss": ("ones", 0),
    "starcoder2": ("ones", 2),
    "gpt2": ("batch1", 2),
    "gpt_neo": ("batch1", 0),
    "gptj": ("ones", 0),
    "bloom": ("left_padded", 0),
    "mpt": ("ones", 0),
    "falcon": ("ones", 2),
    "gpt_bigcode": ("left_padded", 2),
    "opt": ("ones", 2),
    "codegen": ("batch1", 0),
    "deepseek_v3": ("ones", 2),
    "minicpm3": ("batch1", 2),
    "mixtral": ("left_padded", 2),
    "diffllama": ("ones", 0),
    "doge": ("batch1", 0),
    "qwen3_next": ("ones", 1),
    "jamba": ("ones", 1),
    "recurrent_gemma": ("batch1", 1),
    "bert": ("left_padded", 2),
    "bart": ("generate", 2),
    "xlnet": ("batch1", 0),
}
# By hand: with a mask, or whose result must stay what it is.
NEVER_REWRITTEN = ("top_k", "weights_used", "softmax_of_rows", "multihead_weights")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose time to more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(row: Row) -> None:
    """No crash, no difference, and a code with a reason for every site that stays."""
    if row.state == "stock_fails":
        pytest.skip(f"the unmodified model fails: {row.error}")
    assert row.state == "ok", f"{row.state} {row.difference} {row.error}"
    for site in row.sites:
        if site["decision"] != "rewritten":
            assert site["code"] in set(Code) and site["reason"], site
    assert not row.mask_left, row.mask_left


def rewritten(row: Row) -> int:
    return sum(site["decision"] == "rewritten" for site in row.sites)


def test_cases_are_the_thirty_of_make_coverage() -> None:
    assert set(CASES) == set(THIRTY) and len(THIRTY) == 30
    assert all(scenario in SCENARIOS for scenario, _ in CASES.values())


@pytest.mark.parametrize("name", CASES)
def test_architecture_equals_itself(name: str) -> None:
    scenario, least = CASES[name]
    row = compare(name, scenario)
    check(row)
    assert rewritten(row) >= least, row.sites


@pytest.mark.parametrize("name", MODULES)
def test_attention_by_hand_equals_itself(name: str) -> None:
    row = compare(f"by-hand/{name}", "batch1")
    check(row)
    if name in NEVER_REWRITTEN:
        assert rewritten(row) == 0, row.sites


@pytest.mark.parametrize("name", ["padded", "padded_causal", "packed", "multihead_causal"])
def test_attention_by_hand_with_padding_equals_itself(name: str) -> None:
    check(compare(f"by-hand/{name}", "left_padded"))


def test_wrong_attention_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison would notice: outputs of attention one percent too large."""
    right = cpu_executor.CpuExecutor.attend

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, lse = right(*args, **kwargs)
        return out * 1.01, lse

    monkeypatch.setattr(cpu_executor.CpuExecutor, "attend", wrong)
    row = compare("llama", "ones")
    assert row.state == "mismatch" and row.difference is not None and row.difference > 1e-3


def test_every_architecture_is_planned_once() -> None:
    todo = plan()
    assert len(zoo.names()) + len(zoo_extra.names()) == len(todo)
    assert set(plan(quick=True)) < set(todo)
    assert sum("inductor" in scenarios for scenarios in todo.values()) == 30
    assert all(applies(name, s) for name, chosen in todo.items() for s in chosen)


def test_unknown_names_end_the_plan() -> None:
    with pytest.raises(SystemExit, match="no_such_model"):
        plan("no_such_model")


WORKER = """
import json, os, sys, time
print('@start batch1'); print('@row ' + json.dumps({'name': 'x', 'scenario': 'batch1', 'state': 'ok'}))
print('@start ones', flush=True)
"""


@pytest.mark.parametrize(
    ("ending", "state", "text"),
    [
        ("sys.stderr.write('gone'); sys.stderr.flush(); os._exit(3)", "crash", "status 3: gone"),
        ("time.sleep(60)", "timeout", "more than 1 s"),
    ],
)
def test_a_lost_process_costs_one_row(ending: str, state: str, text: str) -> None:
    rows: list[dict[str, Any]] = []
    command = [sys.executable, "-c", WORKER + ending]
    settled = one_process(command, "x", ["batch1", "ones", "generate"], 1.0, rows.append)
    assert settled == 2
    assert [row["state"] for row in rows] == ["ok", state]
    assert text in rows[1]["error"]


def test_a_cut_off_line_is_left_out_and_the_newest_row_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    old, new = Row("x", "ones", "crash").as_dict(), Row("x", "ones").as_dict()
    path.write_text(f"{json.dumps(old)}\n{json.dumps(new)}\n{{'cut", encoding="utf-8")
    assert [row["state"] for row in latest(read(path))] == ["ok"]


def test_table_counts_sites_and_names_what_differs() -> None:
    site = {"layer": "a", "decision": "rewritten", "code": "", "reason": "", "mask": ""}
    kept = {**site, "decision": "declined", "code": "RANK", "reason": "ranks [3, 3, 3]"}
    rows = [
        Row("llama", "batch1", difference=0.0, sites=[site, kept], missed=1).as_dict(),
        Row("gpt2", "ones", "mismatch", 0.5, sites=[site]).as_dict(),
        Row("opt", "ones", "stock_fails", error="boom").as_dict(),
    ]
    text = render(rows)
    assert "| llama | 2 | 1 | 1 RANK | 1 |" in text
    assert "gpt2 (ones): difference 0.5" in text
    assert "0 have all prefill sites rewritten" in text  # gpt2's is, but the result differs
    assert "opt (ones): boom" in text
