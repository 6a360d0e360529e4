"""Constants of scoring rows, from measurements to ``codegen/devices.json``.

    python benchmarks/attention.py --pattern low_rank --only ours,cudnn --json low_rank.json
    python benchmarks/device_constants.py low_rank.json --write
    minference tune --json tuned.json; python benchmarks/device_constants.py tuned.json --write

Takes results of `benchmarks/attention.py` for patterns that score rows (their `select_ms`, any number
of files, of one device) or one file of `minference tune`, whose times include what the host takes
while the device waits. Prints the fit, every time beside its prediction, and the break-even lengths
that follow. `--write` changes the entry of that device, and with the H200's those of all devices that
nobody measured: theirs are scaled by the rate of dense attention. Only constants of scoring rows
change. `--dense` fits dense attention (`cudnn_ms`) too, `--all` takes every constant of a tuned file.
What is shipped for the H200:

    cd benchmarks; python device_constants.py results/attention_{h200*,low_rank*}.json --dense --write
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from sparse_compiler.codegen import constants as constants_module
from sparse_compiler.codegen.attention_work import amounts_dense, amounts_scoring, scoring
from sparse_compiler.codegen.choose import break_even_tokens
from sparse_compiler.codegen.constants import DENSE, Constants, shipped
from sparse_compiler.codegen.cost import predict
from sparse_compiler.ir.shape import SiteShape
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import BlockRule
from sparse_compiler.runtime.tune_fit import SCORE, Sample, fit_constants, fit_scoring

__all__ = ["fitted", "main", "samples_of", "with_constants"]

DEVICES = Path(constants_module.__file__).with_name("devices.json")
_SCORE = ("score", "score_row", "score_start")
_SOURCE = "h200"  # of the estimates
_SHAPES = {
    "32/8 x 128": SiteShape(1, 32, 8, 1, 1, 128, 128),
    "6/2 x 64": SiteShape(1, 6, 2, 1, 1, 64, 64),
}


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")


def _all_rounded(found: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _all_rounded(value)
        if isinstance(value, dict)
        else _rounded(value)
        if isinstance(value, float)
        else value
        for name, value in found.items()
    }


def samples_of(results: list[dict[str, Any]], *, dense: bool = False) -> list[Sample]:
    """Results of `benchmarks/attention.py` for the patterns that score rows.

    Args:
        dense: times of dense attention too, of all results.
    """
    found = []
    for row in results:
        heads, kv_heads, dim = row["heads"]
        shape = SiteShape(1, heads, kv_heads, row["tokens"], row["tokens"], dim, dim)
        name = f"{row['tokens']}, {heads}/{kv_heads} x {dim}"
        if dense and "cudnn_ms" in row:
            found.append(Sample(DENSE, f"dense {name}", amounts_dense(shape), row["cudnn_ms"]))
        known = row["pattern"] in registry.names()
        if known and isinstance(registry.get(row["pattern"]).rule, BlockRule):
            head = registry.get(row["pattern"]).default()
            amounts = amounts_scoring(scoring(head, shape, row["block_k"]))
            found.append(Sample(SCORE, f"{row['pattern']} {name}", amounts, row["select_ms"]))
    return found


def fitted(samples: list[Sample], start: Constants) -> Constants:
    """``start`` with scoring, and where there are samples of it dense attention, as measured."""
    if any(s.tile == DENSE for s in samples):
        found = fit_constants([s for s in samples if s.tile == DENSE], start).constants
        tiles = {**start.tiles, DENSE: found.tiles[DENSE]}
        start = replace(start, tiles=tiles, miss=found.miss)
    return fit_scoring(samples, start)


def _time_of_dense(constants: dict[str, Any]) -> float:
    """ms per 1e9 pairs of one head of D 128."""
    tile = constants["tiles"][DENSE]
    return 4 * 128 * tile["matrix"] / 1e3 + tile["exponent"]


def with_constants(
    entries: list[dict[str, Any]], match: str, found: dict[str, Any]
) -> list[dict[str, Any]]:
    """Entries of `devices.json` with a device's constants, and estimates that follow from them.

    Args:
        match: of the device's entry.
        found: some or all of ``Constants``.
    """
    entry = next(e for e in entries if e["match"] == match)
    entry["constants"] |= found
    if match != _SOURCE:
        return entries
    dense = _time_of_dense(entry["constants"])
    for other in entries:
        if not other["measured"]:
            slower = _time_of_dense(other["constants"]) / dense
            for name in ("score", "score_row"):
                other["constants"][name] = _rounded(entry["constants"][name] * slower)
            # The host's launches, mostly.
            other["constants"]["score_start"] = entry["constants"]["score_start"]
    return entries


def _show(samples: list[Sample], constants: Constants, console: Console) -> None:
    table = Table(title="choosing keys by scored rows, and dense attention")
    for heading in ("", "measured ms", "predicted ms"):
        table.add_column(heading, justify="right")
    for s in samples:
        predicted = sum(predict(constants, constants.tiles[DENSE], s.amounts).values())
        table.add_row(s.name, f"{s.ms:.3g}", f"{predicted:.3g}")
    if samples:
        console.print(table)
    console.print(", ".join(f"{name} {getattr(constants, name):.4g}" for name in _SCORE))
    for name, shape in _SHAPES.items():
        for pattern in registry.names():
            if isinstance(registry.get(pattern).rule, BlockRule):
                head = registry.get(pattern).default()
                tokens = break_even_tokens(shape, head, constants, block_k=64)
                console.print(f"{pattern}, {name}: pays from {tokens} tokens on")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true", help=f"change {DEVICES.name}")
    parser.add_argument("--dense", action="store_true", help="fit dense attention too")
    parser.add_argument("--all", action="store_true", help="all constants, of a tuned file")
    parser.add_argument("--devices", type=Path, default=DEVICES, help="the file to change")
    arguments = parser.parse_args(argv)
    files = [json.loads(path.read_text()) for path in arguments.files]
    device = files[0]["device"]
    tuned = "constants" in files[0]
    if any(file["device"] != device for file in files) or (tuned and len(files) > 1):
        parser.error("results of one device, or one tuned file")
    if arguments.all and not tuned:
        parser.error("--all takes a tuned file")
    entry = shipped(device)
    if not entry.match:
        parser.error(f"{DEVICES.name} has no entry for {device}: write one first")
    if not entry.measured and not arguments.all:
        parser.error(f"nobody measured {device}: take all constants, with a tuned file and --all")
    constants, samples = entry.constants, []
    if tuned:
        own = msgspec.convert(files[0]["constants"], Constants)
        constants = (
            own
            if arguments.all
            else replace(constants, **{name: getattr(own, name) for name in _SCORE})
        )
    else:
        rows = [row for file in files for row in file["results"]]
        samples = samples_of(rows, dense=arguments.dense)
        if not any(s.tile == SCORE for s in samples):
            parser.error("no result of a pattern that scores rows")
        constants = fitted(samples, constants)
    _show(samples, constants, Console(width=100, file=sys.stdout))
    if not arguments.write:
        return
    found: dict[str, Any] = _all_rounded(msgspec.to_builtins(constants))
    if not arguments.all:
        names = ", ".join(path.name for path in arguments.files)
        what = "dense attention and scoring rows" if arguments.dense else "scoring rows"
        origin = constants.origin.partition(";")[0] + f"; {what}: {names}"
        found |= {"origin": origin, "device": entry.constants.device}
    entries = json.loads(arguments.devices.read_text())
    changed = with_constants(entries, entry.match, found)
    if arguments.all:
        of_entry = next(e for e in changed if e["match"] == entry.match)
        of_entry |= {"measured": True, "reports": files[0]["reports"]}
    arguments.devices.write_text(json.dumps(changed, indent=1) + "\n")


if __name__ == "__main__":
    main()
