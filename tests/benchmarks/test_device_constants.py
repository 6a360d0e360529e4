"""From measurements to the constants that are shipped."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import device_constants

from sparse_compiler.codegen.constants import Constants, shipped

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
NAMES = ("score", "score_row", "score_start")


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    """A copy of the shipped file."""
    return Path(shutil.copy(device_constants.DEVICES, tmp_path / "devices.json"))


def entries(path: Path) -> dict[str, dict[str, Any]]:
    return {entry["match"]: entry for entry in json.loads(path.read_text())}


def results(tmp_path: Path, device: str = "NVIDIA H200") -> Path:
    """Times that one rate explains."""
    rows = [
        {
            "pattern": "low_rank",
            "tokens": tokens,
            "heads": [32, 8, 128],
            "block_k": 64,
            "select_ms": 1.0 + 8.8 * (tokens / 131072) ** 2,
            "cudnn_ms": 238 * (tokens / 131072) ** 2,
        }
        for tokens in (16384, 32768, 131072)
    ]
    path = tmp_path / "low_rank.json"
    path.write_text(json.dumps({"device": device, "results": rows}))
    return path


def test_shipped_constants_follow_from_the_results_that_they_name() -> None:
    """Re-fitting what is named moves nothing by more than rounding and the prior do."""
    constants = shipped("NVIDIA H200").constants
    _, what, files = constants.origin.rpartition("rows: ")
    assert what, "scoring rows were fitted to results"
    rows: list[dict[str, Any]] = []
    for name in files.split(", "):
        rows += json.loads((RESULTS / name).read_text())["results"]
    dense_too = "dense attention" in constants.origin
    samples = device_constants.samples_of(rows, dense=dense_too)
    found = device_constants.fitted(samples, constants)
    for name in NAMES:
        assert getattr(found, name) == pytest.approx(getattr(constants, name), rel=0.02)
    dense = constants.tiles["dense"]
    assert found.tiles["dense"].matrix == pytest.approx(dense.matrix, rel=0.02)


def test_results_become_constants(
    tmp_path: Path, devices: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = entries(devices)
    path = results(tmp_path)
    device_constants.main([str(path), "--devices", str(devices)])
    assert entries(devices) == before, "without --write"
    assert "pays from" in capsys.readouterr().out
    device_constants.main([str(path), "--devices", str(devices), "--write"])
    after = entries(devices)
    new, old = (e["h200"]["constants"] for e in (after, before))
    assert new["score_start"] == pytest.approx(1.0 - old["select"], rel=0.05)
    assert new["score"] == pytest.approx(1.0, rel=0.05)
    assert "low_rank.json" in new["origin"]
    assert {n for n in new if new[n] != old[n]} <= {*NAMES, "origin"}
    scaled = after["a100"]["constants"]["score"] / new["score"]
    assert scaled == pytest.approx(before["a100"]["constants"]["score"] / old["score"], rel=1e-3), (
        "estimates keep their ratio"
    )


def test_dense_attention_is_fitted_on_demand(tmp_path: Path, devices: Path) -> None:
    path = results(tmp_path)
    device_constants.main([str(path), "--devices", str(devices), "--write", "--dense"])
    assert (
        "dense attention and scoring rows: low_rank"
        in entries(devices)["h200"]["constants"]["origin"]
    )


def tuned(tmp_path: Path, device: str) -> Path:
    constants = msgspec.to_builtins(shipped("NVIDIA H200").constants)
    constants |= {"device": device, "score": 1.25, "origin": "minference tune, 9 measurements"}
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"device": device, "constants": constants, "reports": {}}))
    return path


def test_a_tuned_file_becomes_constants(tmp_path: Path, devices: Path) -> None:
    arguments = ["--devices", str(devices), "--write"]
    device_constants.main([str(tuned(tmp_path, "NVIDIA H200")), *arguments])
    after = entries(devices)
    assert after["h200"]["constants"]["score"] == 1.25
    assert (
        after["h200"]["constants"]["tiles"]
        == entries(device_constants.DEVICES)["h200"]["constants"]["tiles"]
    )
    other = str(tuned(tmp_path, "NVIDIA A100-SXM4-80GB"))
    with pytest.raises(SystemExit):
        device_constants.main([other, *arguments])
    device_constants.main([other, *arguments, "--all"])
    entry = entries(devices)["a100"]
    assert (entry["measured"], entry["constants"]["score"], entry["reports"]) == (True, 1.25, {})
    msgspec.convert(entry["constants"], Constants, strict=True)


@pytest.mark.parametrize("device", ["Abacus", "NVIDIA A100"])
def test_what_no_entry_can_take_is_refused(tmp_path: Path, devices: Path, device: str) -> None:
    path = results(tmp_path, device)
    with pytest.raises(SystemExit):
        device_constants.main([str(path), "--devices", str(devices), "--write"])
    assert entries(devices) == entries(device_constants.DEVICES)
