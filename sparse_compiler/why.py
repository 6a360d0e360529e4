"""``minference kernels why SITE``: the candidates for a site, ranked, with predicted times by term."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparse_compiler.codegen.attention_work import key_rule
from sparse_compiler.codegen.choose import Ranked, Ranking, choose_tile
from sparse_compiler.codegen.constants import DENSE
from sparse_compiler.errors import OptionInvalid, SparseCompilerError
from sparse_compiler.ir.pattern import HeadPattern, LayerPatterns
from sparse_compiler.ir.shape import DTYPE_BYTES, SiteShape
from sparse_compiler.patterns import registry
from sparse_compiler.runtime.tune import load_constants

__all__ = ["GRAMMAR", "parse_site", "print_measured", "print_why", "why", "why_command"]

GRAMMAR = "[B*]HqxHkvxL[/Lk]xD[/Dv]:dtype:pattern[(first, second)]"
EXAMPLE = "32x8x131072x128:bfloat16:vertical_slash(512,2048)"
_SHAPE = re.compile(
    r"(?:(?P<batch>\d+)\*)?(?P<heads>\d+)x(?P<kv>\d+)x(?P<q>\d+)(?:/(?P<k>\d+))?"
    r"x(?P<d>\d+)(?:/(?P<dv>\d+))?"
)
_PATTERN = re.compile(r"(?P<name>\w+)(?:\(\s*(?P<first>\d+)\s*(?:,\s*(?P<second>\d+)\s*)?\))?")
_SITE_HELP = escape(f"{GRAMMAR}, e.g. {EXAMPLE}; or FILE.json#N of a saved explanation.")
_DEFAULT_DEVICE = "NVIDIA H200"


def parse_site(text: str) -> tuple[SiteShape, HeadPattern]:
    """Read a site such as ``32x8x131072x128:bfloat16:vertical_slash(512,2048)``.

    Raises:
        OptionInvalid: the text does not follow ``GRAMMAR``; names the part that does not.
    """
    parts = text.split(":")
    if len(parts) != 3:
        raise _wrong("a site", f"of three parts, {GRAMMAR}", text)
    found = _SHAPE.fullmatch(parts[0].strip())
    if found is None:
        raise _wrong("sizes of a site", "[B*]HqxHkvxL[/Lk]xD[/Dv] in numbers", parts[0])
    sizes = {name: int(value) for name, value in found.groupdict().items() if value is not None}
    if parts[1] not in DTYPE_BYTES:
        raise _wrong("dtype of a site", f"one of {', '.join(DTYPE_BYTES)}", parts[1])
    try:
        shape = SiteShape(
            batch=sizes.get("batch", 1),
            heads=sizes["heads"],
            kv_heads=sizes["kv"],
            num_q=sizes["q"],
            num_k=sizes.get("k", sizes["q"]),
            head_dim=sizes["d"],
            value_dim=sizes.get("dv", sizes["d"]),
            dtype=parts[1],
        )
    except SparseCompilerError as error:
        raise _wrong(error.subject, error.requirement, error.got) from error
    return shape, _parse_pattern(parts[2])


def _wrong(subject: str, requirement: str, got: object) -> OptionInvalid:
    return OptionInvalid(subject, requirement, got, fix=f"For example: {EXAMPLE}")


def _parse_pattern(text: str) -> HeadPattern:
    found = _PATTERN.fullmatch(text.strip())
    if found is None or found["name"] not in registry.names():
        names = ", ".join(registry.names())
        raise _wrong("pattern of a site", f"name or name(first, second), name of {names}", text)
    if found["first"] is None:
        return registry.get(found["name"]).default()
    return HeadPattern(found["name"], int(found["first"]), int(found["second"] or 0))


def _from_explanation(
    text: str, tokens: int | None, dtype: str
) -> tuple[SiteShape, HeadPattern | LayerPatterns]:
    """A site of a saved ``explain(...).to_json()``: ``FILE.json#N``, N counted over all graphs."""
    name, _, number = text.rpartition("#")
    path = Path(name)
    if not number.isdecimal() or not path.is_file():
        raise OptionInvalid("a saved site", "FILE.json#N with an existing file", text)
    try:
        sites = [site for report in json.loads(path.read_text()) for site in report["sites"]]
        site = sites[int(number)]
        query, key, value = (_sizes(site["shapes"][n], tokens) for n in ("query", "key", "value"))
        pattern = site["pattern"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise OptionInvalid(
            f"site {number} of {path.name}",
            "in a file written by explain(...).to_json()",
            str(error),
        ) from error
    shape = SiteShape(query[0], query[1], key[1], query[2], key[2], query[3], value[3], dtype)
    heads: list[HeadPattern] = []
    for part in pattern.split(" + ") if pattern else []:
        count, _, head = part.partition(" x ")
        heads += [_parse_pattern(head)] * int(count)
    if len(heads) != shape.heads:
        raise OptionInvalid(
            f"pattern of site {number}",
            "given for every head",
            pattern or site.get("reason", ""),
            fix=f"Write the site out: {shape}:vertical_slash(512,2048)",
        )
    return shape, LayerPatterns(tuple(heads), path.name)


def _sizes(text: str, tokens: int | None) -> list[int]:
    found = [part.strip() for part in text.strip("[]").split(",")]
    if len(found) != 4:
        raise ValueError(f"shape {text!r} is not of rank 4")
    numbers = []
    for part in found:
        if not part.isdecimal() and tokens is None:
            raise ValueError(f"size {part!r} is symbolic: give its length with --tokens")
        numbers.append(int(part) if part.isdecimal() else int(tokens or 0))
    return numbers


def _device_here() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else _DEFAULT_DEVICE


def why(
    site: str | SiteShape,
    pattern: HeadPattern | LayerPatterns | None = None,
    *,
    device: str | None = None,
    density: float | None = None,
    tokens: int | None = None,
    dtype: str = "bfloat16",
) -> Ranking:
    """Rank the candidates of a site.

    Args:
        site: ``GRAMMAR``, or ``FILE.json#N`` of a saved explanation, or a shape with ``pattern``.
        device: name that chooses the constants; None is the CUDA device here, else an H200.
        density: measured share of the allowed pairs at row blocks of 64, in place of an estimate.
        tokens: length for symbolic sizes; replaces that of a written-out site.
        dtype: of a saved site, whose file does not say.
    Raises:
        OptionInvalid: the site cannot be read.
    """
    if isinstance(site, str):
        saved = "#" in site
        shape, pattern = _from_explanation(site, tokens, dtype) if saved else parse_site(site)
        shape = shape.at_length(tokens) if tokens is not None and not saved else shape
    elif pattern is None:
        raise OptionInvalid("argument 'pattern'", "given with a shape", None)
    else:
        shape = site
    if density is not None and not 0 < density <= 1:
        raise OptionInvalid("density", "a number with 0 < density <= 1", density)
    loaded = load_constants(device or _device_here())
    ranking = choose_tile(
        shape,
        pattern,
        loaded.constants,
        density=density,
        target=loaded.target,
        reports=loaded.reports,
    )
    return replace(ranking, note=loaded.note)


def print_why(ranking: Ranking, console: Console) -> None:
    """A table of candidates, fastest first: predicted ms by term, and what stops the others."""
    pattern = ranking.pattern
    text = (
        pattern.describe()
        if isinstance(pattern, LayerPatterns)
        else f"{pattern.name}({pattern.first}, {pattern.second})"
    )
    table = Table(title=f"{ranking.shape}, {text} on {ranking.constants.device}: predicted ms")
    rows = [r for r in ranking.ranked if r.feasible]
    table.add_column("")
    for row in rows:
        table.add_column(str(row.candidate).replace(" ", "\n"), justify="right")
    for term in ranking.best.terms:
        if any(row.terms[term] for row in rows):
            table.add_row(term, *(_short(row.terms[term]) for row in rows))
    table.add_section()
    dense = next(r.ms for r in rows if r.candidate.schedule == DENSE)
    table.add_row("total", *(_short(row.ms) for row in rows))
    table.add_row("x dense", *(f"{dense / row.ms:.2f}" for row in rows))
    table.add_row("density", *(f"{row.density:.3f}" for row in rows))
    console.print(table)
    for row in ranking.ranked:
        if row.obstacles:
            console.print(f"{row.candidate}: {'; '.join(row.obstacles)}", highlight=False)
    best = ranking.best
    console.print(f"Rule: {key_rule().describe()}.", markup=False, highlight=False)
    verdict = "Stays dense" if best.candidate.schedule == DENSE else f"Chosen: {best.candidate}"
    console.print(f"{verdict}, predicted {_short(best.ms)} ms.")
    if ranking.note:
        console.print(ranking.note, highlight=False)


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def print_measured(
    path: Path, ranking: Ranking, console: Console, *, schedule: str | None = None
) -> None:
    """Predictions against the results of ``benchmarks/attention.py``, one line a length.

    ``attend`` is predicted twice: from the estimated density, and from the measured one.

    Args:
        schedule: that was measured; None is the result's own, or the best for its tile.
    Raises:
        OptionInvalid: the file is not such a result.
    """
    table = Table(title=f"predicted / measured ms, {path.name}")
    for name in ("tokens", "tile", "density", "dense", "attend", "known density", "select", "all"):
        table.add_column(name, justify="right")
    for row in _results(path):
        table.add_row(*_compared(row, ranking, schedule or row.get("schedule")))
    console.print(table)


def _results(path: Path) -> Sequence[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text())["results"]
        needed = {"tokens", "block_q", "block_k", "density", "cudnn_ms", "attend_ms", "select_ms"}
        missing = [needed - set(row) for row in rows if needed - set(row)]
        if missing:
            raise KeyError(f"no {sorted(missing[0])}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionInvalid(
            "measured results",
            "a JSON file of benchmarks/attention.py",
            str(path),
            where=str(error),
        ) from error
    return rows


def _compared(row: dict[str, Any], ranking: Ranking, schedule: str | None) -> list[str]:
    shape = ranking.shape.at_length(row["tokens"])
    blocks = (row["block_q"], row["block_k"])
    guess = choose_tile(shape, ranking.pattern, ranking.constants)

    def tile(found: Ranking) -> Ranked:
        for ranked in found.ranked:
            candidate = ranked.candidate
            fits = (candidate.block_q, candidate.block_k) == blocks
            if ranked.feasible and fits and schedule in (None, candidate.schedule):
                return ranked
        raise OptionInvalid("a measured tile", "one that can run there", (schedule, *blocks))

    guessed = tile(guess)
    # The measurement at these row blocks, carried over to blocks of 64 by the model's own ratio.
    narrow = next(r for r in guess.ranked if r.feasible and r.candidate.block_q == 64)
    at_64 = min(1.0, row["density"] * narrow.density / guessed.density)
    known = choose_tile(shape, ranking.pattern, ranking.constants, density=at_64)
    exact = tile(known)
    dense = next(r.ms for r in guess.ranked if r.candidate.schedule == DENSE)
    index = guessed.terms["index"] + guessed.terms["score"]
    ours = row.get("ours_ms", row.get("sparse_ms", row["attend_ms"] + row["select_ms"]))
    pairs = [
        (guessed.density, row["density"]),
        (dense, row["cudnn_ms"]),
        (guessed.ms - index, row["attend_ms"]),
        (exact.ms - index, row["attend_ms"]),
        (index, row["select_ms"]),
        (guessed.ms, ours),
    ]
    cells = [f"{_short(a)} / {_short(b)}" for a, b in pairs]
    return [str(row["tokens"]), str(guessed.candidate), *cells]


def why_command(
    site: Annotated[str, typer.Argument(help=_SITE_HELP)],
    device: Annotated[str | None, typer.Option(help="Device name; the one here if absent.")] = None,
    density: Annotated[float | None, typer.Option(help="Measured, at row blocks of 64.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Length of the prompt.")] = None,
    dtype: Annotated[str, typer.Option(help="Of a saved site.")] = "bfloat16",
    measured: Annotated[
        Path | None, typer.Option(help="Results of benchmarks/attention.py to compare with.")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="Schedule of those results.")] = None,
) -> None:
    """Rank the candidate tiles for a site with predicted times by term."""
    console = Console()
    try:
        ranking = why(site, device=device, density=density, tokens=tokens, dtype=dtype)
        print_why(ranking, console)
        if measured is not None:
            print_measured(measured, ranking, console, schedule=schedule)
    except SparseCompilerError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
