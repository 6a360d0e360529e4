"""Results as figures: needles by depth and length, answers kept against density, layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fidelity.results import DENSE, Cell, Results
from benchmarks.fidelity.tables import short_layer
from sparse_compiler.errors import OptionInvalid

__all__ = ["check_matplotlib", "draw"]

# Told apart by those who do not see all colours, and by their markers in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_MARKERS = "osD^vP*X"
_TICKS = [digit * 10.0**power for power in range(-4, 1) for digit in (1, 2, 5)]


def check_matplotlib() -> None:
    """Raise what to do where figures cannot be drawn.

    Raises:
        OptionInvalid: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionInvalid(
            "--figures",
            "left out where matplotlib is not installed",
            "--figures",
            fix="pip install matplotlib; the numbers are in the file of --json, and --from draws them.",
        )


def draw(results: Results, folder: Path) -> list[Path]:
    """Write PNG files.

    Returns:
        The files: needle.png, kept.png and layers-LENGTH.png, as far as there is something to show.
    Raises:
        OptionInvalid: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    figures = {"needle": _needle(plt, results), "kept": _kept(plt, results)}
    for tokens in dict.fromkeys(row.tokens for row in results.layers):
        figures[f"layers-{tokens}"] = _layers(plt, results, tokens)
    for name, figure in figures.items():
        if figure is not None:
            made.append(folder / f"{name}.png")
            figure.savefig(made[-1], dpi=150)
            plt.close(figure)
    return made


def _grid(plt: Any, count: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with ``count`` panels, ``width`` x ``height`` inches each."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        squeeze=False,
        layout="constrained",
    )
    panels = axes.flatten().tolist()
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels[:count]


def _title(figure: Any, results: Results, text: str) -> None:
    figure.suptitle(f"{text}\n{results.model}, {results.dtype}, {results.device}", fontsize=10)


def _length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _needle(plt: Any, results: Results) -> Any:
    """Share of needles found, by depth and length, one panel a variant."""
    cells = [cell for cell in results.cells if cell.depths]
    if not cells:
        return None
    names = [w.name for w in results.ways if any(cell.variant == w.name for cell in cells)]
    lengths = sorted({cell.tokens for cell in cells})
    depths = sorted({depth for cell in cells for depth in cell.depths}, key=float)
    figure, panels = _grid(plt, len(names), 3, 1.9 + 0.62 * len(lengths), 0.9 + 0.34 * len(depths))
    image = None
    for panel, name in zip(panels, names, strict=True):
        found = {cell.tokens: cell.depths for cell in cells if cell.variant == name}
        shares = [[_found_share(found.get(n, {}), depth) for n in lengths] for depth in depths]
        image = panel.imshow(shares, vmin=0, vmax=1, cmap="RdYlBu", aspect="auto")
        panel.set_title(name, fontsize=9)
        panel.set_xticks(range(len(lengths)), [_length(n) for n in lengths], fontsize=8)
        panel.set_yticks(range(len(depths)), depths, fontsize=8)
        panel.set_xlabel("tokens", fontsize=8)
        panel.set_ylabel("depth of the needle", fontsize=8)
        for x, tokens in enumerate(lengths):
            for y, depth in enumerate(depths):
                tally = found.get(tokens, {}).get(depth)
                text = f"{tally.right}/{tally.asked}" if tally else "-"
                ink = "white" if abs(shares[y][x] - 0.5) > 0.35 else "black"
                panel.text(x, y, text, ha="center", va="center", fontsize=8, color=ink)
    figure.colorbar(image, ax=panels, label="needles found", shrink=0.8)
    _title(figure, results, "Needle in a haystack")
    return figure


def _found_share(depths: dict[str, Any], depth: str) -> float:
    tally = depths.get(depth)
    return tally.right / tally.asked if tally and tally.asked else float("nan")


def _kept(plt: Any, results: Results) -> Any:
    """Answers kept against density, one panel for each task and length."""
    cells = [c for c in results.cells if c.variant != DENSE and c.tally.dense_right and c.densities]
    groups = list(dict.fromkeys((cell.task, cell.tokens) for cell in cells))
    if not groups:
        return None
    figure, panels = _grid(plt, len(groups), 3, 3.4, 2.9)
    names = [way.name for way in results.ways if way.name != DENSE]
    handles: dict[str, Any] = {}
    for panel, (task, tokens) in zip(panels, groups, strict=True):
        members = [cell for cell in cells if (cell.task, cell.tokens) == (task, tokens)]
        for cell in members:
            style = names.index(cell.variant)
            handles[cell.variant] = panel.errorbar(
                [cell.density],
                [cell.tally.kept],
                yerr=_bars(cell),
                color=_COLOURS[style % len(_COLOURS)],
                marker=_MARKERS[(style + style // len(_COLOURS)) % len(_MARKERS)],
                markersize=6,
                capsize=2,
                linewidth=1,
            )
        panel.set_xscale("log")
        low, high = _range([cell.density or 1.0 for cell in members])
        panel.set_xlim(low, high)
        panel.set_xticks([tick for tick in _TICKS if low <= tick <= high])
        panel.set_xticks([], minor=True)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_ylim(-0.04, 1.06)
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
        panel.set_title(f"{task}, {_length(tokens)} tokens", fontsize=9)
        panel.set_xlabel("density (computed / allowed pairs)", fontsize=8)
        panel.set_ylabel("dense's right answers kept", fontsize=8)
        panel.tick_params(labelsize=8)
    names = [name for name in names if name in handles]
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside lower center",
        ncols=min(4, len(names)),
        fontsize=8,
    )
    _title(figure, results, "Answers kept (95 % Wilson intervals)")
    return figure


def _bars(cell: Cell) -> list[list[float]]:
    """Lengths of the error bars below and above."""
    low, high = cell.tally.kept95
    kept = cell.tally.kept or 0.0
    return [[max(0.0, kept - low)], [max(0.0, high - kept)]]


def _range(densities: Sequence[float]) -> tuple[float, float]:
    return min(densities) / 1.6, max(1.0, max(densities)) * 1.3


def _layers(plt: Any, results: Results, tokens: int) -> Any:
    """Bars for each layer: density, recall and error, one row of panels each, one colour a variant."""
    rows = [row for row in results.layers if row.tokens == tokens]
    names = list(dict.fromkeys(row.variant for row in rows))
    layers = list(dict.fromkeys(row.layer for row in rows))
    width = max(6.0, 1.6 + 0.16 * len(layers) * (len(names) + 1))
    figure, axes = plt.subplots(
        3, 1, figsize=(min(width, 30.0), 7.5), sharex=True, layout="constrained"
    )
    kinds = (
        ("density", "density"),
        ("recall", "weight on kept keys"),
        ("error", "relative error\nof the output"),
    )
    bar = 0.85 / len(names)
    for panel, (kind, label) in zip(axes, kinds, strict=True):
        for place, name in enumerate(names):
            values = {row.layer: getattr(row, kind) for row in rows if row.variant == name}
            at = [n + (place - (len(names) - 1) / 2) * bar for n in range(len(layers))]
            heights = [values.get(layer, 0.0) for layer in layers]
            hatch = "///" if place >= len(_COLOURS) else ""
            colour = _COLOURS[place % len(_COLOURS)]
            panel.bar(at, heights, bar, color=colour, hatch=hatch, label=name)
        panel.set_ylabel(label, fontsize=9)
        panel.grid(axis="y", alpha=0.3, linewidth=0.5)
        panel.tick_params(labelsize=8)
        if kind != "error":
            panel.set_ylim(0, 1.02)
    axes[-1].set_xticks(range(len(layers)), [short_layer(layer) for layer in layers], fontsize=8)
    axes[-1].set_xlabel("layer", fontsize=9)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, len(names)),
        fontsize=8,
    )
    _title(figure, results, f"Layers, one prompt of {rows[0].task}, {_length(tokens)} tokens")
    return figure
