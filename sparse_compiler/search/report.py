"""The report of a search: one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_compiler.errors import OptionInvalid
from sparse_compiler.search.maps import CELLS, DECADES
from sparse_compiler.search.result import HeadChoice, SearchResult

__all__ = ["check_matplotlib", "write_report"]

_PER_ROW = 8
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em;
  color: #1b1b1b; background: #fff }}
h2 {{ margin: 1.6em 0 .4em; border-top: 1px solid #ccc; padding-top: .6em }}
img {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .15em .8em; text-align: right; border-bottom: 1px solid #e5e5e5 }}
td:nth-child(2), th:nth-child(2) {{ text-align: left }}
summary {{ cursor: pointer }}
</style></head><body>
<h1>{title}</h1>
<p>{facts}</p>
<p>Each map shows the attention of one head on the last prompt, keys from left to right and queries
from top to bottom, pooled to at most {cells} x {cells} cells; colour is the mass of a cell on a
logarithmic scale, from {decades} powers of ten below the head's brightest cell; grey has none. The cyan shade and
outline are what the chosen pattern keeps.</p>
<ul>{notes}</ul>
{layers}
</body></html>
"""


def check_matplotlib() -> None:
    """Raise OptionInvalid where there is no matplotlib, before a search has run for nothing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionInvalid(
            "a report",
            "asked for where matplotlib is installed",
            "no matplotlib",
            fix="pip install 'sparse-compiler[docs]'",
        )


def write_report(result: SearchResult, path: str | os.PathLike[str], title: str) -> None:
    """Write the page.

    Args:
        result: of a search with ``maps=True``.
        title: of the page, plain text.
    Raises:
        OptionInvalid: matplotlib is not installed, or the result has no maps.
    """
    check_matplotlib()
    choices = [choice for layer in result.layers for choice in layer.values()]
    if any(choice.maps is None for choice in choices):
        raise OptionInvalid("the result of a report", "of a search with maps=True", "no maps")
    facts = (
        f"Budget {result.budget:g} of dense attention's time; {len(choices)} heads; samples of "
        f"{', '.join(map(str, result.tokens))} tokens; mean error of the {result.kind} "
        f"{result.mean_error:.3g}, mean cost {result.mean_cost:.3g}."
    )
    layers = [_layer(number, layer) for number, layer in enumerate(result.layers) if layer]
    page = _PAGE.format(
        title=html.escape(title),
        facts=html.escape(facts),
        cells=CELLS,
        decades=DECADES,
        notes="".join(f"<li>{html.escape(note)}</li>" for note in result.notes),
        layers="\n".join(layers),
    )
    Path(path).write_text(page, encoding="utf-8")


def _layer(number: int, layer: Mapping[int, HeadChoice]) -> str:
    picture = base64.b64encode(_picture(layer)).decode()
    rows = "".join(
        f"<tr><td>{head}</td><td>{html.escape(_text(choice))}</td><td>{choice.error:.4f}</td>"
        f"<td>{choice.cost:.3f}</td><td>{choice.density:.3f}</td><td>{_others(choice)}</td></tr>"
        for head, choice in sorted(layer.items())
    )
    names = ("head", "pattern", "error", "cost", "density", "errors of the others")
    header = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<h2>Layer {number}</h2><img alt="Attention maps of layer {number}" '
        f'src="data:image/png;base64,{picture}"><details><summary>Numbers</summary>'
        f"<table><tr>{header}</tr>{rows}</table></details>"
    )


def _text(choice: HeadChoice) -> str:
    head = choice.pattern
    return f"{head.name}({head.first}, {head.second})"


def _others(choice: HeadChoice) -> str:
    others = sorted(choice.errors.items(), key=lambda item: item[1])
    texts = (f"{name} {error:.4f}" for name, error in others if name != choice.candidate)
    return html.escape("; ".join(texts))


def _picture(layer: Mapping[int, HeadChoice]) -> bytes:
    """PNG of the heads of one layer."""
    # Optional: pyright may run where it is not installed.
    from matplotlib.backends.backend_agg import (  # pyright: ignore[reportMissingImports]
        FigureCanvasAgg,
    )
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    columns = min(_PER_ROW, len(layer))
    lines = -(-len(layer) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.85 * lines), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[len(layer) :]:
        axis.set_axis_off()
    for axis, (head, choice) in zip(axes, sorted(layer.items()), strict=False):
        _draw(axis, choice)
        numbers = f"error {choice.error:.3f}, cost {choice.cost:.3f}"
        axis.set_title(f"head {head}: {_text(choice)}\n{numbers}", fontsize=7)
    buffer = io.BytesIO()
    # Without the version of matplotlib in it, the same maps give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(axis: Any, choice: HeadChoice) -> None:
    import numpy as np

    assert choice.maps is not None
    mass, kept = (np.frombuffer(data, np.uint8, offset=1) for data in choice.maps)
    rows = choice.maps[0][0]
    mass, kept = mass.reshape(rows, -1), kept.reshape(rows, -1) / 255.0
    # What no row of a cell may see keeps nothing worth showing.
    kept = np.where(mass > 0, kept, 0.0)
    axis.set_facecolor("#dddddd")
    shown = np.ma.masked_equal(mass, 0)
    axis.imshow(shown, cmap="inferno", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
    shade = np.zeros((*kept.shape, 4))
    shade[..., 1:3] = 1.0
    shade[..., 3] = 0.25 * kept
    axis.imshow(shade, interpolation="nearest", aspect="auto")
    if 0.0 < kept.mean() < 1.0:
        axis.contour(kept, levels=[0.5], colors="cyan", linewidths=0.4)
    axis.set_xticks([])
    axis.set_yticks([])
