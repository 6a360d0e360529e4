"""Emission: pure, strict, complete, and readable enough to compare with golden files.

To accept a changed template: ``python tests/codegen/test_emit.py``, then read the difference.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
from row_score_specs import HALF, SWEEP, SWEPT

from sparse_compiler.codegen import emit as emit_module
from sparse_compiler.codegen.emit import emit
from sparse_compiler.codegen.hopper_spec import HopperSpec
from sparse_compiler.codegen.row_scores_spec import RowScoresSpec
from sparse_compiler.codegen.sketch_spec import SketchSpec
from sparse_compiler.codegen.spec import (
    BIAS_KINDS,
    AttendSpec,
    KernelSpec,
    ProbeSpec,
    WorkListSpec,
    power_of_two,
)

GOLDEN = Path(__file__).parent / "golden"
SPECS: dict[str, KernelSpec] = {
    "attend_band_tma": AttendSpec(
        dtype="bfloat16",
        head_dim=128,
        value_dim=128,
        groups=4,
        tma=True,
        num_stages=3,
        packed=True,
        wide=False,
    ),
    "attend_everything": AttendSpec(
        dtype="float16",
        head_dim=80,
        value_dim=96,
        groups=1,
        window=True,
        key_mask=True,
        has_blocks=True,
        softcap=True,
        step_k=32,
        kv_dtype="float8_e4m3fn",
        split=True,
    ),
    "attend_operands": AttendSpec(
        dtype="bfloat16",
        head_dim=128,
        value_dim=128,
        groups=4,
        has_blocks=True,
        packed=True,
        wide=False,
        bounds=True,
        bias="distance",
    ),
    "attend_hopper": HopperSpec(dtype="bfloat16", head_dim=128, value_dim=128, groups=4),
    "work_list": WorkListSpec(packed=True, has_blocks=True, window=True, key_mask=True),
    "probe": ProbeSpec(dtype="bfloat16", head_dim=128, groups=4, heads=4, last_rows=True),
    "row_scores": HALF,
    "row_scores_swept": SWEPT,
    "sweep": SWEEP,
    "row_scores_means": RowScoresSpec(
        dtype="bfloat16", head_dim=80, groups=2, heads=8, window=True, key_mask=True
    ),
    "sketch": SketchSpec(
        dtype="bfloat16",
        head_dim=128,
        groups=4,
        query_parts=2,
        key_parts=2,
        num_stages=3,
        eight=True,
    ),
    "sketch_wide": SketchSpec(
        dtype="float16", head_dim=256, groups=1, key_mask=True, rows=64, num_stages=3
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_text_matches_the_golden_file(name: str) -> None:
    assert emit(SPECS[name]) == (GOLDEN / f"{name}.py.txt").read_text()


@pytest.mark.parametrize("name", SPECS)
def test_same_spec_gives_the_same_bytes_in_another_process(name: str) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/codegen'); import test_emit as t, hashlib;"
        f"print(hashlib.sha256(t.emit(t.SPECS[{name!r}]).encode()).hexdigest())"
    )
    root = Path(__file__).parents[2]
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={"PYTHONPATH": ".", "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


FLAGS = ("causal", "window", "key_mask", "has_band", "has_blocks", "softcap", "tma", "interpret")
FLAGS += ("packed", "split", "lse", "wide", "bounds")


# An odd stride through all combinations: every pair of flags, in both values, is among them.
@pytest.mark.parametrize("bits", range(0, 2 ** len(FLAGS), 89))
def test_every_combination_is_complete_python(bits: int) -> None:
    flags: dict[str, Any] = {flag: bool(bits >> place & 1) for place, flag in enumerate(FLAGS)}
    for step_k, bias in ((32, "key"), (64, ""), (32, "row"), (64, "distance")):
        sizes: dict[str, Any] = {"head_dim": 72, "value_dim": 64, "groups": 2, "step_k": step_k}
        stored = "float8_e4m3fn" if step_k == 32 else ""
        text = emit(AttendSpec(dtype="float32", kv_dtype=stored, bias=bias, **sizes, **flags))
        names = {
            node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
        }
        assert "attend" in names
        assert ("combine" in names) == flags["split"]
        assert ("pack_columns" in names) == (flags["packed"] and flags["has_band"])
        assert ("int64" in text.partition("def attend")[2].partition("\n@")[0]) == flags["wide"]
        assert "{{" not in text
        assert "{%" not in text
        assert "\t" not in text
        assert max(map(len, text.splitlines())) <= 100


def test_the_header_says_what_the_kernel_is_for() -> None:
    text = emit(SPECS["attend_everything"])
    head = (ast.get_docstring(ast.parse(text)) or "").replace("\n     ", "")
    for field in ("dtype='float16'", "head_dim=80", "value_dim=96", "window=True", "step_k=32"):
        assert field in head
    assert "Glossary" in head


def test_different_specs_give_different_texts() -> None:
    base = SPECS["attend_band_tma"]
    others = [
        replace(base, dtype="float16"),
        replace(base, num_warps=8),
        replace(base, groups=2),
        replace(base, causal=False),
        replace(base, packed=False),
        replace(base, split=True),
        replace(base, lse=False),
        replace(base, wide=True),
        replace(base, kv_dtype="float8_e4m3fn"),
        replace(base, bounds=True),
        *(replace(base, bias=kind) for kind in BIAS_KINDS if kind),
    ]
    assert len({emit(spec) for spec in [base, *others]}) == 14


def test_a_misspelt_name_in_a_template_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = emit_module._environment()
    loader = jinja2.DictLoader({"attend.py.jinja": "N = {{ spec.blok_k }}\n"})
    monkeypatch.setattr(emit_module, "_environment", lambda: environment.overlay(loader=loader))
    with pytest.raises(jinja2.UndefinedError, match="blok_k"):
        emit(SPECS["attend_band_tma"])


def test_text_that_is_not_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = emit_module._environment()
    loader = jinja2.DictLoader({"attend.py.jinja": "def attend(:\n"})
    monkeypatch.setattr(emit_module, "_environment", lambda: environment.overlay(loader=loader))
    with pytest.raises(SyntaxError):
        emit(SPECS["attend_band_tma"])


def test_specs_are_values() -> None:
    spec = SPECS["attend_band_tma"]
    assert spec == replace(spec)
    assert hash(spec) == hash(replace(spec))
    with pytest.raises(FrozenInstanceError):
        spec.dtype = "float32"  # type: ignore[misc]


@pytest.mark.parametrize(("size", "padded"), [(16, 16), (17, 32), (80, 128), (256, 256)])
def test_power_of_two(size: int, padded: int) -> None:
    assert power_of_two(size) == padded


def test_codegen_imports_neither_fx_nor_the_runtime() -> None:
    code = (
        "import sys, sparse_compiler.codegen.emit;"
        "bad = [m for m in sys.modules if m.startswith(('torch', 'triton', 'sparse_compiler.runtime'))];"
        "sys.exit(' '.join(bad) or 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def write_golden() -> None:
    """Replace the golden files by what the templates render now."""
    GOLDEN.mkdir(exist_ok=True)
    for name, spec in SPECS.items():
        (GOLDEN / f"{name}.py.txt").write_text(emit(spec))


if __name__ == "__main__":
    write_golden()
